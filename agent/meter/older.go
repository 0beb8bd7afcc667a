package meter

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"assay.dev/agent/netns"
	"golang.org/x/sys/unix"
)

// connections lists the TCP connections of a namespace that are not its own business.
func connections(ns *netns.Namespace) ([]connection, error) {
	fd := -1
	err := ns.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
		return err
	})
	if err == nil {
		defer unix.Close(fd)
		// A kernel that does not answer must not hold a goroutine for ever.
		err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2})
	}
	listening := map[uint16]bool{}
	var list []connection
	for _, f := range []byte{unix.AF_INET, unix.AF_INET6} {
		if err != nil {
			break
		}
		err = dump(fd, f, func(state byte, local, remote netip.AddrPort) {
			switch {
			case state == tcpListen:
				listening[local.Port()] = true
			case remote.Port() != 0 && !remote.Addr().IsLoopback() && remote.Addr() != local.Addr():
				list = append(list, connection{local: local, remote: remote})
			}
		})
	}
	if err != nil {
		return nil, fmt.Errorf("meter: list connections: %w", err)
	}
	for i := range list {
		list[i].server = listening[list[i].local.Port()]
	}
	return list, nil
}

const tcpListen = 10 // TCP_LISTEN of linux/tcp_states.h

// dump asks for all TCP sockets of one family: struct inet_diag_req_v2 and
// inet_diag_msg of linux/inet_diag.h.
func dump(fd int, family byte, visit func(state byte, local, remote netip.AddrPort)) error {
	const (
		sockDiagByFamily = 20
		header           = 16
		request          = header + 56
	)
	b := make([]byte, request)
	ne := binary.NativeEndian
	ne.PutUint32(b[0:], request)
	ne.PutUint16(b[4:], sockDiagByFamily)
	ne.PutUint16(b[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	b[header], b[header+1] = family, unix.IPPROTO_TCP
	ne.PutUint32(b[header+4:], 1<<12-1) // every state
	if err := unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	buf := make([]byte, 32<<10)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		for m := buf[:n]; len(m) >= header; {
			size := int(ne.Uint32(m))
			if size < header || size > len(m) {
				return fmt.Errorf("message of %d bytes in %d", size, len(m))
			}
			switch ne.Uint16(m[4:]) {
			case unix.NLMSG_DONE:
				return nil
			case unix.NLMSG_ERROR:
				if size >= header+4 {
					return unix.Errno(-int32(ne.Uint32(m[header:])))
				}
				return fmt.Errorf("error without a number")
			case sockDiagByFamily:
				// family, state, timer, retrans; then ports in network order and addresses.
				if body := m[header:size]; len(body) >= 40 {
					visit(body[1], endpoint(body[0], body[4:6], body[8:24]), endpoint(body[0], body[6:8], body[24:40]))
				}
			}
			m = m[min((size+3)&^3, len(m)):]
		}
	}
}

func endpoint(family byte, port, addr []byte) netip.AddrPort {
	a := netip.AddrFrom16([16]byte(addr)).Unmap()
	if family == unix.AF_INET {
		a = netip.AddrFrom4([4]byte(addr))
	}
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(port))
}
