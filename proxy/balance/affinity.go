package balance

import (
	"slices"
	"sync/atomic"
	"time"
)

// affinity keeps the one client that a proxy is for at one endpoint of a set, which is
// always one of it: a set's successor has another. One that is ejected, or was tried in
// vain, is left for the next; one that has much to do is not.
type affinity struct {
	life     time.Duration // for how long it holds after it was used last
	endpoint atomic.Pointer[Endpoint]
	used     atomic.Int64 // on the guards' clock
}

// Keep has Pick and PickConnection return the same endpoint, until that was not used for
// life; 0 has them choose anew each time. What an older set, which may be nil, keeps is kept on
// if it is here. Nothing is picked before.
func (s *Set) Keep(life time.Duration, old *Set) {
	if s == nil || life <= 0 {
		return
	}
	s.kept = &affinity{life: life}
	if old == nil || old.kept == nil {
		return
	}
	if e := old.kept.endpoint.Load(); slices.Contains(s.list, e) {
		s.kept.endpoint.Store(e)
		s.kept.used.Store(old.kept.used.Load())
	}
}

// pick returns the endpoint at which the client is kept, or has choose find one.
func (a *affinity) pick(now time.Time, tried []*Endpoint, choose func(time.Time, []*Endpoint) *Endpoint) *Endpoint {
	at := since(now)
	old := a.endpoint.Load()
	if a.holds(old, tried, at) {
		a.used.Store(int64(at))
		return old
	}
	e := choose(now, tried)
	if e == nil {
		return nil
	}
	if !a.endpoint.CompareAndSwap(old, e) {
		// Somebody else has chosen meanwhile: it is the same client.
		if other := a.endpoint.Load(); !other.out.Load() && !contains(tried, other) {
			e = other
		}
	}
	a.used.Store(int64(at))
	return e
}

func (a *affinity) holds(e *Endpoint, tried []*Endpoint, at time.Duration) bool {
	return e != nil && at-time.Duration(a.used.Load()) < a.life && !e.out.Load() && !contains(tried, e)
}
