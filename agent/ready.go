package agent

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"assay.dev/agent/netns"
	"golang.org/x/sys/unix"
)

// Listening sockets are asked for often while something changes and seldom when
// nothing does.
const (
	readyFast = 200 * time.Millisecond
	readySlow = 2 * time.Second
	// verifyEvery is how often the capture's rules and routes are read back, verifySoon how
	// soon they are when somebody has changed rules.
	verifyEvery = 30 * time.Second
	verifySoon  = 2 * time.Second
	// endsWithin is how long a pod's lo may be down before that is somebody's doing: a runtime
	// that ends a pod begins with that link, which takes the routes along.
	endsWithin = 10 * time.Second
)

// sockets lists the listening TCP sockets of one namespace through a socket of the
// kernel's sock_diag interface that was made there.
type sockets struct{ fd int }

func openSockets(ns *netns.Namespace) (*sockets, error) {
	s := &sockets{fd: -1}
	err := ns.Do(func() (err error) {
		s.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("sock_diag: %w", err)
	}
	// A kernel that does not answer must not hold a goroutine for ever.
	if err := unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2}); err != nil {
		unix.Close(s.fd)
		return nil, fmt.Errorf("sock_diag: %w", err)
	}
	return s, nil
}

func (s *sockets) Close() error { return unix.Close(s.fd) }

// listening returns the ports on which a connection to one of addrs would be
// accepted, in order. A socket bound to loopback alone is nobody's endpoint.
func (s *sockets) listening(addrs []netip.Addr, except []uint16) ([]uint16, error) {
	var ports []uint16
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		err := s.dump(family, func(at netip.AddrPort) {
			a := at.Addr().Unmap()
			if (a.IsUnspecified() || slices.Contains(addrs, a)) && !slices.Contains(except, at.Port()) {
				ports = append(ports, at.Port())
			}
		})
		if err != nil {
			return nil, err
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports), nil
}

// dump asks for all listening sockets of one family: struct inet_diag_req_v2 and
// inet_diag_msg of linux/inet_diag.h.
func (s *sockets) dump(family byte, visit func(netip.AddrPort)) error {
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
	ne.PutUint32(b[header+4:], 1<<tcpListen)
	if err := unix.Sendto(s.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("sock_diag: %w", err)
	}
	buf := make([]byte, 32<<10)
	for {
		n, _, err := unix.Recvfrom(s.fd, buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("sock_diag: %w", err)
		}
		for m := buf[:n]; len(m) >= header; {
			size := int(ne.Uint32(m))
			if size < header || size > len(m) {
				return fmt.Errorf("sock_diag: message of %d bytes in %d", size, len(m))
			}
			switch ne.Uint16(m[4:]) {
			case unix.NLMSG_DONE:
				return nil
			case unix.NLMSG_ERROR:
				if size >= header+4 {
					return fmt.Errorf("sock_diag: %w", unix.Errno(-int32(ne.Uint32(m[header:]))))
				}
				return fmt.Errorf("sock_diag: error")
			case sockDiagByFamily:
				// family, state, timer, retrans; then the id: ports in network order,
				// then both addresses.
				if body := m[header:size]; len(body) >= 24 {
					port := binary.BigEndian.Uint16(body[4:])
					var a netip.Addr
					if body[0] == unix.AF_INET {
						a = netip.AddrFrom4([4]byte(body[8:12]))
					} else {
						a = netip.AddrFrom16([16]byte(body[8:24]))
					}
					visit(netip.AddrPortFrom(a, port))
				}
			}
			m = m[min(len(m), (size+3)&^3):]
		}
	}
}

// watchReadiness keeps Listening and the executable's digest what the kernel says,
// and looks after the capture rules.
func (w *workload) watchReadiness(ctx context.Context) {
	sock, err := openSockets(w.ns)
	if err != nil {
		w.log.Error("readiness cannot be watched", "err", err)
		return
	}
	defer sock.Close()
	wait, rules := readyFast, verifying{at: time.Now()}
	for {
		changed := w.checkArtifacts()
		ports, err := sock.listening(w.addrs, w.ownPorts())
		if err != nil {
			w.log.Error("readiness", "err", err)
		} else if w.setListening(ports) {
			changed = true
		}
		w.lookAtCapture(&rules)
		wait = min(wait*3/2, readySlow)
		if changed || !w.allListening() {
			wait = readyFast
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		case <-w.lookNow:
		}
	}
}
