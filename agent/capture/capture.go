package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"assay.dev/agent/netns"
	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// Table is the name of the nftables table.
const Table = "assay"

// Names of the sets: address and port of what may be dialled.
const (
	open4 = "open4"
	open6 = "open6"
)

// Names of the counters: connections that the kernel refused because nothing listens
// where the rules lead them, and because a virtual address has no ready endpoint; and
// attempts that it dropped because it would have taken them for another connection.
const (
	noProxy    = "no-proxy"
	noEndpoint = "no-endpoint"
	staleSYN   = "stale"
)

// Refused is how many connections the kernel has refused on behalf of the rules, since
// they were first installed in the namespace: no process was asked, so none counted.
type Refused struct {
	NoProxy    uint64 // nothing listened: neither the proxy nor the agent that keeps its listeners
	NoEndpoint uint64 // a virtual address and port without a ready endpoint
	Stale      uint64 // attempts to begin what is tracked as another connection, beside the proxy
}

// Rules say what is captured. They are compared by value; a nil and an empty list
// are the same.
type Rules struct {
	OutboundPort, InboundPort uint16 // of the proxy's listeners
	OwnMark, ReturnMark       uint32
	// Virtual are the networks of virtual addresses: a SYN to an address in one of
	// them that is not open is refused by the kernel.
	Virtual []netip.Prefix
	// Excluded ports pass untouched in both directions.
	Excluded []uint16
	// Tracked needs no setting of the kernel's, which a container that is not privileged cannot
	// make, and no TCP passes beside the proxy but on excluded ports, also none that is older
	// than the rules.
	Tracked bool
	// Released lets everything new pass untouched; connections that were led through the
	// proxy go on.
	Released bool
}

// Capture is the capture of one namespace. It is safe for concurrent use.
type Capture struct {
	ns *netns.Namespace

	mu    sync.Mutex
	rules Rules
	open  map[netip.AddrPort]bool // as installed
	want  []listing               // as the kernel listed them after Install
	leg   []byte                  // the rule of LegTable, as the kernel told it
	asks  *netns.Questions        // for the counters, which are read often
	moves uint32                  // transactions that opened and closed
}

// New returns the capture of ns, which it uses but does not close.
func New(ns *netns.Namespace) *Capture {
	return &Capture{ns: ns, asks: netns.QuestionsIn(ns)}
}

// Install replaces all rules in one transaction, with open as the set of what may be
// dialled; nil keeps the set as it is. Connections that exist are not touched.
func (c *Capture) Install(r Rules, open map[netip.AddrPort]bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if open == nil {
		open = c.open
	}
	return c.install(r, open)
}

func (c *Capture) install(r Rules, open map[netip.AddrPort]bool) error {
	if r.OutboundPort == 0 || r.InboundPort == 0 || r.OwnMark == 0 || r.ReturnMark == 0 || r.OwnMark == r.ReturnMark {
		return errors.New("capture: listeners' ports and two different marks are needed")
	}
	if err := c.prepare(r); err != nil {
		return err
	}
	conn, err := netns.NFTables(c.ns)
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	// Added before it is deleted, so that it need not be there; all of it is one
	// transaction, so no packet ever meets half of it.
	t := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: Table})
	conn.DelTable(t)
	conn.AddTable(t)
	// What was counted goes on from there; what is refused in this moment may be missing.
	refused, err := c.refused()
	if err != nil {
		return err
	}
	conn.AddObj(&nftables.CounterObj{Table: t, Name: noProxy, Packets: refused.NoProxy})
	conn.AddObj(&nftables.CounterObj{Table: t, Name: noEndpoint, Packets: refused.NoEndpoint})
	conn.AddObj(&nftables.CounterObj{Table: t, Name: staleSYN, Packets: refused.Stale})
	for _, s := range sets(t) {
		if err := conn.AddSet(s, elements(s, slices.Collect(maps.Keys(open)))); err != nil {
			return fmt.Errorf("capture: set %s: %w", s.Name, err)
		}
	}
	for _, ch := range chains(t, r) {
		added := conn.AddChain(ch.chain)
		for _, e := range ch.rules {
			conn.AddRule(&nftables.Rule{Table: t, Chain: added, Exprs: e})
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("capture: nftables refused the rules: %w", err)
	}
	if !r.Tracked {
		if err := c.ns.Do(func() error { return set(true) }); err != nil {
			return err
		}
	}
	want, err := c.list()
	if err != nil {
		return err
	}
	c.rules, c.open, c.want = r, copied(open), want
	return nil
}

// prepare makes what the rules stand on.
func (c *Capture) prepare(r Rules) error {
	if r.Tracked {
		return errors.Join(c.ns.Do(func() error { return routes(r.ReturnMark) }), c.zone())
	}
	return c.ns.Do(func() error { return errors.Join(set(false), routes(r.ReturnMark)) })
}

// Adopt takes over what another process has installed: what is open stays open until
// Install or SetOpen says otherwise. Where nothing is, nothing is open.
func (c *Capture) Adopt() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	open, err := c.listOpen()
	c.open = copied(open)
	return err
}

// copied never returns nil, which means that nothing is installed.
func copied(open map[netip.AddrPort]bool) map[netip.AddrPort]bool {
	m := make(map[netip.AddrPort]bool, len(open))
	maps.Copy(m, open)
	return m
}

// SetOpen makes open the virtual addresses and ports that have ready endpoints, in
// one transaction that holds only what changed.
func (c *Capture) SetOpen(open map[netip.AddrPort]bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var add, remove []netip.AddrPort
	for a := range open {
		if !c.open[a] {
			add = append(add, a)
		}
	}
	for a := range c.open {
		if !open[a] {
			remove = append(remove, a)
		}
	}
	return c.change(add, remove)
}

// Change opens and closes virtual addresses and ports, each of which is named once, in one
// transaction. What is so already may be among them.
func (c *Capture) Change(open, closed []netip.AddrPort) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	add := slices.DeleteFunc(slices.Clone(open), func(a netip.AddrPort) bool { return c.open[a] })
	remove := slices.DeleteFunc(slices.Clone(closed), func(a netip.AddrPort) bool { return !c.open[a] })
	return c.change(add, remove)
}

func (c *Capture) change(add, remove []netip.AddrPort) error {
	if c.open == nil {
		return errors.New("capture: no rules installed")
	}
	if len(add)+len(remove) == 0 {
		return nil
	}
	conn, err := netns.NFTables(c.ns)
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	for _, s := range sets(&nftables.Table{Family: nftables.TableFamilyINet, Name: Table}) {
		if e := elements(s, add); len(e) > 0 {
			err = errors.Join(err, conn.SetAddElements(s, e))
		}
		if e := elements(s, remove); len(e) > 0 {
			err = errors.Join(err, conn.SetDeleteElements(s, e))
		}
	}
	if err == nil {
		err = conn.Flush()
	}
	open := c.open
	if err != nil {
		open = copied(open)
	} else {
		c.moves++
	}
	for _, a := range add {
		open[a] = true
	}
	for _, a := range remove {
		delete(open, a)
	}
	if err != nil {
		// What the kernel has is unknown now, so all of it is written anew.
		if again := c.install(c.rules, open); again != nil {
			return fmt.Errorf("capture: change of open addresses: %w", errors.Join(err, again))
		}
	}
	return nil
}

// Verify reads back everything and reports the first difference from what was
// written. Whoever holds CAP_NET_ADMIN in the namespace can change it; a workload
// that `assay run` started does not.
func (c *Capture) Verify() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open == nil {
		return errors.New("capture: no rules installed")
	}
	got, err := c.list()
	if err != nil {
		return err
	}
	if len(got) != len(c.want) {
		return fmt.Errorf("capture: table %s has %d chains, want %d", Table, len(got), len(c.want))
	}
	for i, want := range c.want {
		if got[i].head != want.head {
			return fmt.Errorf("capture: chain is %q, want %q", got[i].head, want.head)
		}
		if !slices.Equal(got[i].rules, want.rules) {
			return fmt.Errorf("capture: chain %q: its rules were changed", want.head)
		}
	}
	open, err := c.listOpen()
	if err != nil {
		return err
	}
	if !maps.Equal(open, c.open) {
		return fmt.Errorf("capture: %d addresses are open, want %d, or they are others", len(open), len(c.open))
	}
	if c.rules.Tracked {
		err = c.verifyZone()
	}
	return errors.Join(err, c.verifyWay())
}

// VerifyWay is Verify for what Generation says nothing of: routes and settings.
func (c *Capture) VerifyWay() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open == nil {
		return errors.New("capture: no rules installed")
	}
	return c.verifyWay()
}

func (c *Capture) verifyWay() error {
	return c.ns.Do(func() error {
		if c.rules.Tracked {
			return verifyRoutes(c.rules.ReturnMark)
		}
		return errors.Join(verifySettings(), verifyRoutes(c.rules.ReturnMark))
	})
}

// Open returns what is open now.
func (c *Capture) Open() map[netip.AddrPort]bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.open)
}

// Refused reads the counters of the kernel. They outlive this process.
func (c *Capture) Refused() (Refused, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.refused()
}

// Generation returns a number that every change of the namespace's rules makes another one,
// also of rules that are not the capture's, but for what SetOpen and Change do. The kernel
// counts transactions; so does the capture.
func (c *Capture) Generation() (uint32, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	id, err := c.asks.Generation()
	return id - c.moves, err
}

// Remove takes away the rules and the routes for the return mark, and puts the settings
// back to what the kernel begins with, unless the rules that it installed are Tracked. What
// still goes through the proxy ends.
func (c *Capture) Remove(returnMark uint32) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	conn, err := netns.NFTables(c.ns)
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	t := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: Table}) // so that there is one
	conn.DelTable(t)
	tracked := c.rules.Tracked
	if tracked {
		c.removeZone(conn)
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("capture: remove the rules: %w", err)
	}
	c.rules, c.open, c.want = Rules{}, nil, nil
	return errors.Join(c.asks.Close(), c.ns.Do(func() error {
		if tracked {
			return removeRoutes(returnMark)
		}
		return errors.Join(unset(), removeRoutes(returnMark))
	}))
}

// Close gives up what Refused keeps open. The rules stay.
func (c *Capture) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.asks.Close()
}

func (c *Capture) refused() (r Refused, err error) {
	var list []nftables.Obj
	err = c.asks.Ask(func(conn *nftables.Conn) (err error) {
		list, err = conn.GetObjects(&nftables.Table{Family: nftables.TableFamilyINet, Name: Table})
		return err
	})
	if err != nil {
		return r, fmt.Errorf("capture: list counters: %w", err)
	}
	for _, o := range list {
		counter, ok := o.(*nftables.CounterObj)
		switch {
		case !ok:
		case counter.Name == noProxy:
			r.NoProxy = counter.Packets
		case counter.Name == noEndpoint:
			r.NoEndpoint = counter.Packets
		case counter.Name == staleSYN:
			r.Stale = counter.Packets
		}
	}
	return r, nil
}

// listing is a chain as the kernel tells it, in a form that can be compared.
type listing struct {
	head  string
	rules []string
}

func (c *Capture) list() ([]listing, error) {
	conn, err := netns.NFTables(c.ns)
	if err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	all, err := conn.ListChainsOfTableFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("capture: list chains: %w", err)
	}
	var list []listing
	for _, ch := range all {
		if ch.Table.Name != Table {
			continue
		}
		l := listing{head: ch.Name}
		if ch.Hooknum != nil && ch.Priority != nil && ch.Policy != nil {
			l.head = fmt.Sprintf("%s type %s hook %d priority %d policy %d", ch.Name, ch.Type, *ch.Hooknum, *ch.Priority, *ch.Policy)
		}
		rules, err := conn.GetRules(ch.Table, ch)
		if err != nil {
			return nil, fmt.Errorf("capture: list chain %s: %w", ch.Name, err)
		}
		for _, r := range rules {
			var text strings.Builder
			for _, e := range r.Exprs {
				fmt.Fprintf(&text, "%T%+v ", e, e)
			}
			l.rules = append(l.rules, text.String())
		}
		list = append(list, l)
	}
	slices.SortFunc(list, func(a, b listing) int { return compare(a.head, b.head) })
	return list, nil
}

func (c *Capture) listOpen() (map[netip.AddrPort]bool, error) {
	conn, err := netns.NFTables(c.ns)
	if err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	open := map[netip.AddrPort]bool{}
	for _, s := range sets(&nftables.Table{Family: nftables.TableFamilyINet, Name: Table}) {
		elems, err := conn.GetSetElements(s)
		if err != nil {
			return nil, fmt.Errorf("capture: list set %s: %w", s.Name, err)
		}
		for _, e := range elems {
			n := len(e.Key) - 4
			a, ok := netip.AddrFromSlice(e.Key[:max(n, 0)])
			if !ok {
				return nil, fmt.Errorf("capture: set %s: element %x", s.Name, e.Key)
			}
			open[netip.AddrPortFrom(a, binary.BigEndian.Uint16(e.Key[n:]))] = true
		}
	}
	return open, nil
}

func sets(t *nftables.Table) []*nftables.Set {
	return []*nftables.Set{
		{Table: t, ID: 1, Name: open4, Concatenation: true, KeyType: nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)},
		{Table: t, ID: 2, Name: open6, Concatenation: true, KeyType: nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetService)},
	}
}

// elements returns the elements of list that belong into s.
func elements(s *nftables.Set, list []netip.AddrPort) []nftables.SetElement {
	var out []nftables.SetElement
	for _, a := range list {
		if a.Addr().Is4() == (s.Name == open4) {
			key := binary.BigEndian.AppendUint16(a.Addr().AsSlice(), a.Port())
			out = append(out, nftables.SetElement{Key: append(key, 0, 0)})
		}
	}
	return out
}

func compare(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// Supported reports why the kernel cannot capture in ns, or nil.
func Supported(ns *netns.Namespace) error {
	conn, err := netns.NFTables(ns)
	if err == nil {
		_, err = conn.ListTablesOfFamily(nftables.TableFamilyINet)
	}
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("nftables: %w (CAP_NET_ADMIN is missing)", err)
	}
	return err
}
