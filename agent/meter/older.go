package meter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"assay.dev/agent/netns"
	"golang.org/x/sys/unix"
)

// diag opens a socket of the kernel's sock_diag interface in a namespace.
func diag(ns *netns.Namespace) (fd int, err error) {
	fd = -1
	err = ns.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
		return err
	})
	if err != nil {
		return fd, err
	}
	// A kernel that does not answer must not hold a goroutine for ever.
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// connections lists the TCP connections of a namespace that are not its own business.
func connections(ns *netns.Namespace) ([]connection, error) {
	fd, err := diag(ns)
	if err != nil {
		return nil, fmt.Errorf("meter: list connections: %w", err)
	}
	defer unix.Close(fd)
	listening := map[uint16]bool{}
	var list []connection
	for _, f := range []byte{unix.AF_INET, unix.AF_INET6} {
		err := dump(fd, f, func(s socket) {
			switch {
			case s.state == tcpListen:
				listening[s.local.Port()] = true
			case s.remote.Port() != 0 && !s.remote.Addr().IsLoopback() && s.remote.Addr() != s.local.Addr():
				list = append(list, connection{local: s.local, remote: s.remote, socket: s})
			}
		})
		if err != nil {
			return nil, fmt.Errorf("meter: list connections: %w", err)
		}
	}
	for i := range list {
		list[i].server = listening[list[i].local.Port()]
	}
	return list, nil
}

// States of linux/tcp_states.h.
const (
	tcpTimeWait = 6
	tcpClose    = 7
	tcpListen   = 10
)

// socket is one of TCP, as sock_diag tells it.
type socket struct {
	family, state byte
	id            [sockID]byte // struct inet_diag_sockid, which names it alone
	local, remote netip.AddrPort
	mark          uint32
}

// Sizes of sock_diag's messages, and their kinds.
const (
	sockID      = 48
	diagHeader  = 16
	diagRequest = diagHeader + 8 + sockID
	diagAnswer  = 72 // struct inet_diag_msg; then attributes
	diagMark    = 15 // INET_DIAG_MARK of them
	diagDump    = 20 // SOCK_DIAG_BY_FAMILY
	diagDestroy = 21 // SOCK_DESTROY
)

// dump asks for all TCP sockets of one family: struct inet_diag_req_v2 and
// inet_diag_msg of linux/inet_diag.h.
func dump(fd int, family byte, visit func(socket)) error {
	b := question(diagDump, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, family)
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
		ne := binary.NativeEndian
		for m := buf[:n]; len(m) >= diagHeader; {
			size := int(ne.Uint32(m))
			if size < diagHeader || size > len(m) {
				return fmt.Errorf("message of %d bytes in %d", size, len(m))
			}
			switch ne.Uint16(m[4:]) {
			case unix.NLMSG_DONE:
				return nil
			case unix.NLMSG_ERROR:
				if size >= diagHeader+4 {
					return unix.Errno(-int32(ne.Uint32(m[diagHeader:])))
				}
				return fmt.Errorf("error without a number")
			case diagDump:
				// family, state, timer, retrans; then ports in network order and addresses.
				if body := m[diagHeader:size]; len(body) >= diagAnswer {
					visit(socket{
						family: body[0], state: body[1], id: [sockID]byte(body[4:]),
						local: endpoint(body[0], body[4:6], body[8:24]), remote: endpoint(body[0], body[6:8], body[24:40]),
						mark: markIn(body[diagAnswer:]),
					})
				}
			}
			m = m[min((size+3)&^3, len(m)):]
		}
	}
}

// markIn finds a socket's mark among attributes: struct rtattr of linux/rtnetlink.h.
func markIn(attrs []byte) uint32 {
	ne := binary.NativeEndian
	for len(attrs) >= 4 {
		size := int(ne.Uint16(attrs))
		if size < 4 || size > len(attrs) {
			return 0
		}
		if ne.Uint16(attrs[2:]) == diagMark && size >= 8 {
			return ne.Uint32(attrs[4:])
		}
		attrs = attrs[min((size+3)&^3, len(attrs)):]
	}
	return 0
}

// question is a request about every state of a family's TCP sockets.
func question(kind, flags uint16, family byte) []byte {
	b := make([]byte, diagRequest)
	ne := binary.NativeEndian
	ne.PutUint32(b[0:], diagRequest)
	ne.PutUint16(b[4:], kind)
	ne.PutUint16(b[6:], flags)
	b[diagHeader], b[diagHeader+1] = family, unix.IPPROTO_TCP
	ne.PutUint32(b[diagHeader+4:], 1<<12-1)
	return b
}

// destroy ends a connection as if it had been reset: the peer is told, and who has the
// socket. One that has ended meanwhile is no error.
func destroy(fd int, s *socket) error {
	b := question(diagDestroy, unix.NLM_F_REQUEST|unix.NLM_F_ACK, s.family)
	copy(b[diagHeader+8:], s.id[:])
	if err := unix.Sendto(fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	buf := make([]byte, 512)
	n, _, err := unix.Recvfrom(fd, buf, 0)
	switch {
	case err != nil:
		return err
	case n < diagHeader+4 || binary.NativeEndian.Uint16(buf[4:]) != unix.NLMSG_ERROR:
		return fmt.Errorf("an answer of %d bytes", n)
	}
	if e := unix.Errno(-int32(binary.NativeEndian.Uint32(buf[diagHeader:]))); e != 0 && e != unix.ENOENT {
		return e
	}
	return nil
}

// OlderConnection is a connection that is older than the capture, and exists.
type OlderConnection struct {
	Local, Remote netip.AddrPort
	Inbound       bool // the workload listens on its local port
	socket        socket
}

// OlderConnections lists them, but for those on excluded ports, and for the proxy's own: rules
// that somebody has removed are new again, and all that there is is older than they are. The
// ports are those of the proxy's listeners. unclear is how many more there may be: they are to
// be looked for again, even if none is listed.
func (m *Meter) OlderConnections(outbound, inbound uint16) (older []OlderConnection, unclear int, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.want == nil {
		return nil, 0, nil
	}
	remembered, err := m.remembered()
	if err != nil || len(remembered)+len(m.overflow) == 0 {
		return nil, 0, err
	}
	list, err := connections(m.ns)
	if err != nil {
		return nil, 0, err
	}
	list = slices.DeleteFunc(list, func(c connection) bool { return c.socket.state == tcpTimeWait || c.socket.state == tcpClose })
	known := map[[sockID]byte]bool{} // of the overflow, what is there still
	ends := m.ends(list, outbound)
	led := map[netip.AddrPort][]OlderConnection{}
	for _, c := range list {
		if m.overflow[c.socket.id] {
			known[c.socket.id] = true
		}
		switch {
		case !remembered[memory{c.remote, c.local.Port()}] && !known[c.socket.id]:
		case m.beside(&c), c.local.Port() == outbound, c.local.Port() == inbound, ends.dialled[[2]netip.AddrPort{c.remote, c.local}]:
		default:
			o := OlderConnection{Local: c.local, Remote: c.remote, Inbound: c.server, socket: c.socket}
			if ends.led[c.local] > 0 {
				led[c.local] = append(led[c.local], o)
			} else {
				older = append(older, o)
			}
		}
	}
	m.overflow = known
	for a, some := range led {
		if len(some)+ends.led[a] <= ends.from[a] {
			older = append(older, some...)
		} else {
			unclear += len(some)
		}
	}
	return older, unclear, nil
}

// ends are what tells a captured connection from an older one with the same addresses and
// ports: there is a socket of the proxy at its other end.
type ends struct {
	dialled map[[2]netip.AddrPort]bool // local and remote
	// led is how many connections the outbound listener has from an address and port, which
	// several of the application's may share, to different destinations; from is how many it has.
	led, from map[netip.AddrPort]int
}

func (m *Meter) ends(list []connection, outbound uint16) ends {
	e := ends{dialled: map[[2]netip.AddrPort]bool{}, led: map[netip.AddrPort]int{}, from: map[netip.AddrPort]int{}}
	for _, c := range list {
		e.dialled[[2]netip.AddrPort{c.local, c.remote}] = true
		switch {
		case c.local.Port() == outbound:
			e.led[c.remote]++
		case !m.beside(&c):
			e.from[c.local]++
		}
	}
	return e
}

// beside reports whether a connection passes beside the proxy as it may: the proxy's own, and
// those on excluded ports.
func (m *Meter) beside(c *connection) bool {
	return c.socket.mark == m.cfg.OwnMark || slices.Contains(m.cfg.Excluded, c.serverPort())
}

func (c *connection) serverPort() uint16 {
	if c.server {
		return c.local.Port()
	}
	return c.remote.Port()
}

// memory is what is remembered of a connection.
type memory struct {
	remote netip.AddrPort
	local  uint16
}

// remembered reads which connections were there when counting began, or when their port was
// excluded no more.
func (m *Meter) remembered() (map[memory]bool, error) {
	conn, err := netns.NFTables(m.ns)
	if err != nil {
		return nil, fmt.Errorf("meter: %w", err)
	}
	packets, _ := tables()
	out := map[memory]bool{}
	for _, s := range sets(packets) {
		if !strings.HasPrefix(s.Name, "older_") {
			continue
		}
		elems, err := conn.GetSetElements(s)
		if err != nil {
			return nil, fmt.Errorf("meter: list set %s: %w", s.Name, err)
		}
		for _, e := range elems {
			n := len(e.Key) - 8 // an address, and two ports that take four bytes each
			if remote, ok := netip.AddrFromSlice(e.Key[:max(n, 0)]); ok {
				out[memory{netip.AddrPortFrom(remote, binary.BigEndian.Uint16(e.Key[n:])), binary.BigEndian.Uint16(e.Key[n+4:])}] = true
			}
		}
	}
	return out, nil
}

// End ends such connections: both sides see a reset.
func (m *Meter) End(list []OlderConnection) error {
	fd, err := diag(m.ns)
	if err != nil {
		return fmt.Errorf("meter: end connections: %w", err)
	}
	defer unix.Close(fd)
	var failed error
	for i := range list {
		if err := destroy(fd, &list[i].socket); err != nil {
			failed = errors.Join(failed, fmt.Errorf("meter: end %s to %s: %w", list[i].Local, list[i].Remote, err))
		}
	}
	return failed
}

func endpoint(family byte, port, addr []byte) netip.AddrPort {
	a := netip.AddrFrom16([16]byte(addr)).Unmap()
	if family == unix.AF_INET {
		a = netip.AddrFrom4([4]byte(addr))
	}
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(port))
}
