package egress

import (
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"assay.dev"
)

// Bounds of what is remembered for one workload.
const (
	MaxAddrs = 4096 // addresses
	maxNames = 8    // for each, the ones looked up last
	// A resolver's answer is used for its TTL, but programs keep it a little longer: the
	// one that asked, and whoever it told.
	minTTL = time.Minute
	maxTTL = 24 * time.Hour
	grace  = time.Minute
)

// Names remembers which names had which address. It is safe for concurrent use.
type Names struct {
	now func() time.Time

	mu sync.Mutex
	m  map[netip.Addr][]entry
}

type entry struct {
	name string
	ends time.Time
}

// NewNames makes an empty memory; now is time.Now but in tests.
func NewNames(now func() time.Time) *Names {
	return &Names{now: now, m: map[netip.Addr][]entry{}}
}

// Add takes in that name has addr for ttl.
func (n *Names) Add(name string, addr netip.Addr, ttl time.Duration) {
	name = strings.TrimSuffix(strings.ToLower(name), ".")
	if !assay.ValidDNSName(name) {
		return
	}
	now := n.now()
	ends := now.Add(min(max(ttl, minTTL), maxTTL) + grace)
	addr = addr.Unmap()
	n.mu.Lock()
	defer n.mu.Unlock()
	list, known := n.m[addr]
	if !known && len(n.m) >= MaxAddrs {
		n.makeRoom(now)
	}
	list = slices.DeleteFunc(list, func(e entry) bool { return e.name == name || !e.ends.After(now) })
	if len(list) >= maxNames {
		list = list[:maxNames-1]
	}
	n.m[addr] = slices.Insert(list, 0, entry{name, ends})
}

// makeRoom forgets what has ended, or else one of a few that ends first.
func (n *Names) makeRoom(now time.Time) {
	var first netip.Addr
	var ends time.Time
	looked := 0
	for a, list := range n.m { // in no order, so that the same ones are not looked at again
		last := list[0].ends
		for _, e := range list {
			if e.ends.After(last) {
				last = e.ends
			}
		}
		if !last.After(now) {
			delete(n.m, a)
			first = netip.Addr{}
			if looked++; looked > 64 {
				return
			}
			continue
		}
		if !first.IsValid() || last.Before(ends) {
			first, ends = a, last
		}
		if looked++; looked > 64 {
			break
		}
	}
	if len(n.m) >= MaxAddrs && first.IsValid() {
		delete(n.m, first)
	}
}

// Of returns the names of addr, the one looked up last first.
func (n *Names) Of(addr netip.Addr) []string {
	now := n.now()
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []string
	for _, e := range n.m[addr.Unmap()] {
		if e.ends.After(now) {
			out = append(out, e.name)
		}
	}
	return out
}

// Len is the number of addresses that are remembered.
func (n *Names) Len() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.m)
}
