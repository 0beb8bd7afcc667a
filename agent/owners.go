package agent

import (
	"maps"
	"net/netip"
	"slices"
	"sync"

	"assay.dev"
)

// owners knows whose an address is. It is safe for concurrent use, and as new as the newest
// view.
type owners struct {
	mu sync.RWMutex
	of map[netip.Addr][]*assay.Workload // those that claim it, by newer
}

// newer orders those that claim an address, the owner first. That two do (it was used again
// and the old one's removal is on its way) is so for a moment: it belongs to the newer one.
func newer(x, y *assay.Workload) int {
	if c := y.MeshedSince.Compare(x.MeshedSince); c != 0 {
		return c
	}
	if x.ID < y.ID {
		return -1
	}
	return 1
}

// owner returns the workload that has a, or nil.
func (o *owners) owner(a netip.Addr) *assay.Workload {
	o.mu.RLock()
	defer o.mu.RUnlock()
	if of := o.of[a.Unmap()]; len(of) > 0 {
		return of[0]
	}
	return nil
}

// addrs are all addresses that are somebody's.
func (o *owners) addrs() []netip.Addr {
	o.mu.RLock()
	defer o.mu.RUnlock()
	return slices.Collect(maps.Keys(o.of))
}

// reset makes them those of all.
func (o *owners) reset(all map[string]*assay.Workload) {
	next := owners{of: make(map[netip.Addr][]*assay.Workload, len(all))}
	for _, w := range all {
		next.replace(nil, w)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.of = next.of
}

// replace takes in a workload instead of what it was; nil for none.
func (o *owners) replace(was, is *assay.Workload) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if was != nil {
		for _, a := range was.Addrs {
			a = a.Unmap()
			of := slices.DeleteFunc(o.of[a], func(w *assay.Workload) bool { return w == was })
			if o.of[a] = of; len(of) == 0 {
				delete(o.of, a)
			}
		}
	}
	if is != nil {
		for _, a := range is.Addrs {
			a = a.Unmap()
			of := append(o.of[a], is)
			if len(of) > 1 {
				slices.SortFunc(of, newer)
			}
			o.of[a] = of
		}
	}
}
