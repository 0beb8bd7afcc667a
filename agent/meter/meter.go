package meter

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"assay.dev/agent/internal/sockdiag"
	"assay.dev/agent/netns"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// Config is what a meter depends on.
type Config struct {
	Link     string   // the workload's one link
	OwnMark  uint32   // of the proxy's packets
	Excluded []uint16 // ports that the capture leaves alone
}

// Meter is the meter of one namespace. It is safe for concurrent use.
type Meter struct {
	ns *netns.Namespace

	mu       sync.Mutex
	cfg      Config
	want     []string             // as the kernel listed the rules after Install
	overflow map[sockdiag.ID]bool // sockets of older connections that found no place in the sets
}

// New returns the meter of ns, which it uses but does not close.
func New(ns *netns.Namespace) *Meter { return &Meter{ns: ns} }

// Count is a number of frames and their bytes.
type Count struct{ Packets, Bytes uint64 }

func (c Count) plus(o Count) Count { return Count{c.Packets + o.Packets, c.Bytes + o.Bytes} }

// minus is never less than nothing.
func (c Count) minus(o Count) Count {
	return Count{c.Packets - min(o.Packets, c.Packets), c.Bytes - min(o.Bytes, c.Bytes)}
}

// Traffic is what passed a link, as the workload sees it.
type Traffic struct{ In, Out Count }

func (t Traffic) plus(o Traffic) Traffic  { return Traffic{t.In.plus(o.In), t.Out.plus(o.Out)} }
func (t Traffic) minus(o Traffic) Traffic { return Traffic{t.In.minus(o.In), t.Out.minus(o.Out)} }

func tables() (packets, frames *nftables.Table) {
	return &nftables.Table{Family: nftables.TableFamilyINet, Name: Table}, &nftables.Table{Family: nftables.TableFamilyNetdev, Name: Table}
}

// Install writes the rules in one transaction. What was counted before, by this
// process or another, is kept. In a namespace that had no meter counting begins now:
// link tells what passed the link until then, and TCP connections that exist are
// remembered as older than the capture. So are those on ports that were excluded and
// are not any more.
func (m *Meter) Install(cfg Config, link func() (Traffic, error)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if cfg.Link == "" || cfg.OwnMark == 0 || len(cfg.Excluded) > maxExcluded {
		return fmt.Errorf("meter: a link, a mark and at most %d excluded ports are needed", maxExcluded)
	}
	conn, err := netns.NFTables(m.ns)
	if err != nil {
		return fmt.Errorf("meter: %w", err)
	}
	first, err := m.missing(conn)
	if err != nil {
		return err
	}
	packets, frames := tables()
	list := sets(packets)
	older, err := m.older(conn, list[0], first, cfg.Excluded)
	if err != nil {
		return err
	}
	conn.AddTable(packets)
	conn.AddTable(frames)
	for _, way := range ways {
		for _, name := range packetCounters {
			conn.AddObj(&nftables.CounterObj{Table: packets, Name: name + "_" + way})
		}
		for _, name := range frameCounters {
			conn.AddObj(&nftables.CounterObj{Table: frames, Name: name + "_" + way})
		}
	}
	for _, s := range list {
		var elems []nftables.SetElement
		switch name := s.Name; {
		case name == "transports":
			for _, p := range transports {
				elems = append(elems, nftables.SetElement{Key: []byte{p}})
			}
		case strings.HasPrefix(name, "older_"):
			elems = older[name]
		}
		if err := conn.AddSet(s, elems); err != nil {
			return fmt.Errorf("meter: set %s: %w", s.Name, err)
		}
		if s.Name != "excluded" {
			continue
		}
		conn.FlushSet(s)
		for _, p := range cfg.Excluded {
			elems = append(elems, nftables.SetElement{Key: be16(p)})
		}
		if err := conn.SetAddElements(s, elems); len(elems) > 0 && err != nil {
			return fmt.Errorf("meter: excluded ports: %w", err)
		}
	}
	for _, c := range slices.Concat(packetChains(packets, cfg.Link, cfg.OwnMark), frameChains(frames, cfg.Link)) {
		added := conn.AddChain(c.chain)
		conn.FlushChain(added)
		for _, e := range c.rules {
			conn.AddRule(&nftables.Rule{Table: added.Table, Chain: added, Exprs: e})
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("meter: nftables refused the rules: %w", err)
	}
	want, err := m.list(conn)
	if err != nil {
		return err
	}
	m.cfg, m.want = cfg, want
	if first {
		return m.begin(conn, link)
	}
	return nil
}

// begin writes down, beside the counters, what had passed the link before the rules
// began to count. A transaction takes its time and frames do not wait: so it is what
// has passed until now, less what was counted until now.
func (m *Meter) begin(conn *nftables.Conn, link func() (Traffic, error)) error {
	var before Traffic
	for range 20 {
		now, err := link()
		if err != nil {
			return fmt.Errorf("meter: %w", err)
		}
		r, err := m.read()
		if err != nil {
			return err
		}
		before = now.minus(r.counted())
		if after, err := link(); err == nil && after == now {
			break
		}
	}
	_, frames := tables()
	conn.AddObj(&nftables.CounterObj{Table: frames, Name: beganIn, Packets: before.In.Packets, Bytes: before.In.Bytes})
	conn.AddObj(&nftables.CounterObj{Table: frames, Name: beganOut, Packets: before.Out.Packets, Bytes: before.Out.Bytes})
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("meter: nftables refused the beginning: %w", err)
	}
	return nil
}

// What had passed the link when counting began is kept as two counters of no rule.
const beganIn, beganOut = "before_in", "before_out"

// missing reports whether there is no meter, or only half of one.
func (m *Meter) missing(conn *nftables.Conn) (bool, error) {
	all, err := conn.ListTables()
	if err != nil {
		return false, fmt.Errorf("meter: list tables: %w", err)
	}
	var there []*nftables.Table
	for _, t := range all {
		if t.Name == Table {
			there = append(there, t)
		}
	}
	if len(there) == 2 {
		_, frames := tables()
		if have, err := counters(conn, frames); err != nil {
			return false, err
		} else if _, began := have[beganOut]; began {
			return false, nil
		}
	}
	for _, t := range there {
		conn.DelTable(t)
	}
	return true, nil
}

// older returns the connections to be remembered, as elements of the sets by name.
func (m *Meter) older(conn *nftables.Conn, excluded *nftables.Set, first bool, now []uint16) (map[string][]nftables.SetElement, error) {
	gone := map[uint16]bool{} // ports that were excluded
	if !first {
		elems, err := conn.GetSetElements(excluded)
		if err != nil {
			return nil, fmt.Errorf("meter: list excluded ports: %w", err)
		}
		for _, e := range elems {
			if p := binary.BigEndian.Uint16(e.Key); !slices.Contains(now, p) {
				gone[p] = true
			}
		}
		if len(gone) == 0 {
			return nil, nil
		}
	}
	list, err := connections(m.ns)
	if err != nil {
		return nil, err
	}
	out := map[string][]nftables.SetElement{}
	for _, c := range list {
		if !first && !gone[c.local.Port()] && !gone[c.remote.Port()] {
			continue
		}
		role := "client"
		if c.server {
			role = "server"
		}
		f := families[0]
		if c.remote.Addr().Is6() {
			f = families[1]
		}
		name := older(role, f)
		if len(out[name]) == maxOlder/2 { // what the rest carries is shown as escaped, or stray
			if m.overflow == nil {
				m.overflow = map[sockdiag.ID]bool{}
			}
			m.overflow[c.socket.ID] = true
			continue
		}
		key := binary.BigEndian.AppendUint16(c.remote.Addr().AsSlice(), c.remote.Port())
		key = binary.BigEndian.AppendUint16(append(key, 0, 0), c.local.Port())
		out[name] = append(out[name], nftables.SetElement{Key: append(key, 0, 0)})
	}
	return out, nil
}

// Remove takes the rules away.
func (m *Meter) Remove() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	conn, err := netns.NFTables(m.ns)
	if err != nil {
		return fmt.Errorf("meter: %w", err)
	}
	packets, frames := tables()
	for _, t := range []*nftables.Table{packets, frames} {
		conn.AddTable(t) // so that there is one
		conn.DelTable(t)
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("meter: remove the rules: %w", err)
	}
	m.cfg, m.want, m.overflow = Config{}, nil, nil
	return nil
}

// Verify reads back the rules and reports a difference from what was written.
func (m *Meter) Verify() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.want == nil {
		return errors.New("meter: no rules installed")
	}
	conn, err := netns.NFTables(m.ns)
	if err != nil {
		return fmt.Errorf("meter: %w", err)
	}
	got, err := m.list(conn)
	if err != nil {
		return err
	}
	if !slices.Equal(got, m.want) {
		return fmt.Errorf("meter: the rules of table %s were changed", Table)
	}
	return nil
}

// list is all rules as the kernel tells them, in a form that can be compared.
func (m *Meter) list(conn *nftables.Conn) ([]string, error) {
	all, err := conn.ListChains()
	if err != nil {
		return nil, fmt.Errorf("meter: list chains: %w", err)
	}
	var out []string
	for _, ch := range all {
		if ch.Table.Name != Table {
			continue
		}
		var text strings.Builder
		fmt.Fprintf(&text, "%d %s %s", ch.Table.Family, ch.Name, ch.Type)
		if ch.Hooknum != nil && ch.Priority != nil {
			fmt.Fprintf(&text, " hook %d priority %d", *ch.Hooknum, *ch.Priority)
		}
		rules, err := conn.GetRules(ch.Table, ch)
		if err != nil {
			return nil, fmt.Errorf("meter: list chain %s: %w", ch.Name, err)
		}
		for _, r := range rules {
			text.WriteByte('\n')
			for _, e := range r.Exprs {
				if d, ok := e.(*expr.Dynset); ok { // it has pointers inside
					fmt.Fprintf(&text, "note %s %d ", d.SetName, d.SrcRegKey)
					continue
				}
				fmt.Fprintf(&text, "%T%+v ", e, e)
			}
		}
		out = append(out, text.String())
	}
	slices.Sort(out)
	return out, nil
}

// connection is one of TCP that exists.
type connection struct {
	local, remote netip.AddrPort
	server        bool // the workload listens on its local port
	socket        *sockdiag.Socket
}
