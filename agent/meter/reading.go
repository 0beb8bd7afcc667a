package meter

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"

	"assay.dev/agent/netns"
	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// frameHeader is what a frame has besides its packet.
const frameHeader = 14

// Class is why packets did not go through the proxy. Its values are stable.
type Class string

const (
	UDP      Class = "udp"
	UDPLite  Class = "udp-lite"
	SCTP     Class = "sctp"
	DCCP     Class = "dccp"
	ICMP     Class = "icmp"               // echo requests and answers
	IP       Class = "ip"                 // any other protocol
	Excluded Class = "excluded-port"      // TCP on a port that the capture leaves alone
	Older    Class = "older-than-capture" // TCP that was there before the capture
	Escaped  Class = "escaped"            // TCP that should have been captured
)

// Classes are all of them.
var Classes = []Class{UDP, UDPLite, SCTP, DCCP, ICMP, IP, Excluded, Older, Escaped}

var counterOf = map[Class]string{
	UDP: "udp", UDPLite: "udplite", SCTP: "sctp", DCCP: "dccp", ICMP: "icmp", IP: "ip", Excluded: "excluded", Older: "older", Escaped: "escaped",
}

// Flow is what a class exchanged with one remote address and port.
type Flow struct {
	FlowKey
	In, Out Count // as the workload sees it
}

// FlowKey tells flows apart.
type FlowKey struct {
	Class    Class
	Inbound  bool // the remote end began it
	Remote   netip.Addr
	Port     uint16 // the server's; 0 where there are none
	Protocol byte   // IP's number
}

// Reading is everything that was counted since the meter began.
type Reading struct {
	Before Traffic // on the link before that
	Proxy  Traffic
	// Exceptions are the totals; Flows are as much of them as the kernel still
	// remembers.
	Exceptions map[Class]Traffic
	Flows      []Flow
	// Control is what keeps the network going and carries nobody's data, by name: arp,
	// icmp (errors and neighbour discovery), igmp, ethernet (other protocols of the
	// link), stranger (frames for somebody else that were flooded here), stray (TCP that
	// belongs to no connection, resets for the most part).
	Control map[string]Traffic
	// Fragments bounds what fragmentation changes: a datagram is one packet to most
	// rules and several frames on the link.
	Fragments Traffic
}

// Read reads all counters. It costs a few hundred microseconds: ask when something
// passed the link.
func (m *Meter) Read() (*Reading, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.read()
}

func (m *Meter) read() (r *Reading, err error) {
	q := netns.QuestionsIn(m.ns)
	defer q.Close()
	err = q.Ask(func(conn *nftables.Conn) (err error) {
		r, err = readBy(conn)
		return err
	})
	return r, err
}

func readBy(conn *nftables.Conn) (*Reading, error) {
	packets, frames := tables()
	p, err := counters(conn, packets)
	if err != nil {
		return nil, err
	}
	f, err := counters(conn, frames)
	if err != nil {
		return nil, err
	}
	if len(p) == 0 || len(f) == 0 {
		return nil, fmt.Errorf("meter: table %s is gone", Table)
	}
	packet := func(name string) Traffic {
		return Traffic{In: framed(p[name+"_in"]), Out: framed(p[name+"_out"])}
	}
	frame := func(name string) Traffic { // rules on egress see the header already
		return Traffic{In: framed(f[name+"_in"]), Out: f[name+"_out"]}
	}
	r := &Reading{
		Before: Traffic{In: f[beganIn], Out: f[beganOut]}, Proxy: packet("own"), Exceptions: map[Class]Traffic{},
		Control: map[string]Traffic{"icmp": packet("icmpcontrol"), "igmp": packet("igmp"), "stray": packet("stray"),
			"arp": frame("arp"), "ethernet": frame("ethernet"), "stranger": frame("stranger")},
	}
	beside := uint64(0)
	for _, c := range Classes {
		t := packet(counterOf[c])
		r.Exceptions[c] = t
		beside += t.In.Packets + t.Out.Packets
	}
	// The header of each frame, and of each packet in it: RFC 791, RFC 8200 section 4.5.
	four, six := frame("fragment"), frame("fragment6")
	r.Fragments = Traffic{In: fragments(four.In, six.In), Out: fragments(four.Out, six.Out)}
	if beside == 0 {
		return r, nil
	}
	for _, s := range sets(packets) {
		if !s.Dynamic {
			continue
		}
		elems, err := conn.GetSetElements(s)
		if err != nil {
			return nil, fmt.Errorf("meter: list set %s: %w", s.Name, err)
		}
		for _, e := range elems {
			if f, ok := flow(s.Name, e); ok {
				r.Flows = append(r.Flows, f)
			}
		}
	}
	return r, nil
}

func fragments(four, six Count) Count {
	return Count{four.Packets + six.Packets, four.Packets*(frameHeader+20) + six.Packets*(frameHeader+48)}
}

func framed(c Count) Count { return Count{c.Packets, c.Bytes + frameHeader*c.Packets} }

func counters(conn *nftables.Conn, t *nftables.Table) (map[string]Count, error) {
	list, err := conn.GetObjects(t)
	if err != nil {
		return nil, fmt.Errorf("meter: list counters: %w", err)
	}
	out := make(map[string]Count, len(list))
	for _, o := range list {
		if c, ok := o.(*nftables.CounterObj); ok && c.Table.Name == Table {
			out[c.Name] = Count{c.Packets, c.Bytes}
		}
	}
	return out, nil
}

// flow reads an element of a set of remotes: class, direction, address, port.
func flow(set string, e nftables.SetElement) (Flow, bool) {
	n := len(e.Key) - 12
	if e.Counter == nil || n != 4 && n != 16 {
		return Flow{}, false
	}
	remote, _ := netip.AddrFromSlice(e.Key[8 : 8+n])
	f := Flow{FlowKey: FlowKey{Remote: remote, Port: binary.BigEndian.Uint16(e.Key[8+n:]), Protocol: e.Key[0]}}
	switch class := uint16(e.Key[1])<<8 | uint16(e.Key[0]); class {
	case tcpExcluded:
		f.Class = Excluded
	case tcpOlder:
		f.Class = Older
	case tcpEscaped:
		f.Class = Escaped
	case unix.IPPROTO_UDP:
		f.Class = UDP
	case unix.IPPROTO_UDPLITE:
		f.Class = UDPLite
	case unix.IPPROTO_SCTP:
		f.Class = SCTP
	case unix.IPPROTO_DCCP:
		f.Class = DCCP
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		f.Class = ICMP
	default:
		f.Class = IP
	}
	count := framed(Count{e.Counter.Packets, e.Counter.Bytes})
	answer := e.Key[4] == directions[1]
	if strings.HasPrefix(set, "in") {
		f.In, f.Inbound = count, !answer
	} else {
		f.Out, f.Inbound = count, answer
	}
	return f, true
}

// counted is everything that rules counted.
func (r *Reading) counted() Traffic {
	all := r.Proxy
	for _, t := range r.Exceptions {
		all = all.plus(t)
	}
	for _, t := range r.Control {
		all = all.plus(t)
	}
	return all
}

// Unexplained is what passed the link and is in none of the counts, given the link's
// counters before and after the meter was read: as little as it can be, since frames
// pass all the time. A negative number was counted and did not pass: it was dropped
// on the way to the link.
func (r *Reading) Unexplained(before, after Traffic) (in, out int64) {
	counted := r.counted()
	rest := func(before, after, base, counted, fragments Count) int64 {
		low := int64(before.Bytes) - int64(base.Bytes) - int64(counted.Bytes) - int64(fragments.Bytes)
		high := int64(after.Bytes) - int64(base.Bytes) - int64(counted.Bytes)
		switch {
		case low > 0:
			return low
		case high < 0:
			return high
		}
		return 0
	}
	return rest(before.In, after.In, r.Before.In, counted.In, r.Fragments.In), rest(before.Out, after.Out, r.Before.Out, counted.Out, r.Fragments.Out)
}
