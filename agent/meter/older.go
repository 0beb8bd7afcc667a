package meter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"assay.dev/agent/internal/sockdiag"
	"assay.dev/agent/netns"
)

// connections lists the TCP connections of a namespace that are not its own business.
func connections(ns *netns.Namespace) ([]connection, error) {
	sockets, err := sockdiag.Open(ns)
	if err != nil {
		return nil, fmt.Errorf("meter: list connections: %w", err)
	}
	defer sockets.Close()
	listening := map[uint16]bool{}
	var list []connection
	for _, family := range sockdiag.Families {
		err := sockets.List(family, sockdiag.AllStates, func(s *sockdiag.Socket) {
			switch {
			case s.State == sockdiag.Listen:
				listening[s.Local.Port()] = true
			case s.Remote.Port() != 0 && !s.Remote.Addr().IsLoopback() && s.Remote.Addr() != s.Local.Addr():
				list = append(list, connection{local: s.Local, remote: s.Remote, socket: s})
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

// OlderConnection is a connection that is older than the capture, and exists.
type OlderConnection struct {
	Local, Remote netip.AddrPort
	Inbound       bool // the workload listens on its local port
	socket        *sockdiag.Socket
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
	list = slices.DeleteFunc(list, func(c connection) bool {
		return c.socket.State == sockdiag.TimeWait || c.socket.State == sockdiag.Close
	})
	known := map[sockdiag.ID]bool{} // of the overflow, what is there still
	ends := m.ends(list, outbound)
	led := map[netip.AddrPort][]OlderConnection{}
	for _, c := range list {
		if m.overflow[c.socket.ID] {
			known[c.socket.ID] = true
		}
		switch {
		case !remembered[memory{c.remote, c.local.Port()}] && !known[c.socket.ID]:
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
	return c.socket.Mark == m.cfg.OwnMark || slices.Contains(m.cfg.Excluded, c.serverPort())
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
	sockets, err := sockdiag.Open(m.ns)
	if err != nil {
		return fmt.Errorf("meter: end connections: %w", err)
	}
	defer sockets.Close()
	var failed error
	for i := range list {
		if err := sockets.Destroy(list[i].socket); err != nil {
			failed = errors.Join(failed, fmt.Errorf("meter: end %s to %s: %w", list[i].Local, list[i].Remote, err))
		}
	}
	return failed
}
