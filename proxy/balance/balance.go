// Package balance chooses among a service's endpoints: power of two choices on
// peak EWMA of what an endpoint took to answer, times what it has in hand.
//
// It refuses to know how an endpoint is reached. A Set is immutable; the endpoints
// in it are shared between a set and its successors, so that what was learned about
// one survives a change of the others.
//
// Invariants: Pick, Begin and Done take no lock and allocate nothing. Goroutines:
// none; everything may be called by any.
package balance

import (
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"assay.dev"
	"assay.dev/proxy/guard"
)

// decay is the time in which an observation loses 1-1/e of its weight. Short: with
// the ten seconds that others use, one answer of 50 ms keeps an endpoint out of light
// traffic for most of a minute.
const decay = 2 * time.Second

// floor is what no average is below: among answers that fast a difference is noise,
// which would send everything to one endpoint for the length of decay.
const floor = float64(time.Millisecond)

// failure is what a failed attempt counts as: so much worse than any answer that
// an endpoint that failed is chosen only when the other one of two failed too.
const failure = 5 * time.Second

// Endpoint is one address that a service's port can be reached at.
type Endpoint struct {
	Addr     netip.AddrPort
	Identity assay.Identity // nobody when it is not meshed
	Workload string
	// Value is the caller's own, set by the function that New was given.
	Value any

	inFlight atomic.Int64
	// cost packs the average in nanoseconds as a float32 (low half) and when it was
	// taken in units of 2^20 ns (high half; wraps in 52 days, which reads as old).
	cost atomic.Uint64

	group   atomic.Pointer[Group]
	calm    atomic.Bool  // a good answer tells neither breaker nor throttle anything
	out     atomic.Bool  // ejected
	ramp    atomic.Int64 // when it began to take its share slowly, 0: it has all of it
	room    atomic.Int64 // that the throttle gives it, 0: any
	roomFor atomic.Int64 // until when, on the guards' clock, if nobody meets it
	// Guarded by the group's mutex.
	breaker  guard.Breaker
	throttle guard.Throttle
}

// InFlight returns how many attempts are between Begin and Done.
func (e *Endpoint) InFlight() int64 { return e.inFlight.Load() }

// Begin counts an attempt in.
func (e *Endpoint) Begin() { e.inFlight.Add(1) }

// Done counts it out.
func (e *Endpoint) Done() { e.inFlight.Add(-1) }

// Answered takes how long the endpoint needed for a good answer.
func (e *Endpoint) Answered(took time.Duration, now time.Time) {
	e.observe(took, now)
	if g := e.group.Load(); g != nil && !e.calm.Load() {
		g.answered(e, took, now)
	}
}

// Erred takes how long it needed to answer that it failed.
func (e *Endpoint) Erred(took time.Duration, now time.Time) {
	e.observe(took, now)
	if g := e.group.Load(); g != nil {
		g.failed(e, now)
	}
}

// Alive notes that it does what it should, where there is no answer to time.
func (e *Endpoint) Alive(now time.Time) {
	if g := e.group.Load(); g != nil && !e.calm.Load() {
		g.answered(e, 0, now)
	}
}

// Failed notes that it could not be reached, or broke off.
func (e *Endpoint) Failed(now time.Time) {
	e.observe(failure, now)
	if g := e.group.Load(); g != nil {
		g.failed(e, now)
	}
}

// Avoid notes that it is there and takes nothing: others are better for now.
func (e *Endpoint) Avoid(now time.Time) { e.observe(failure, now) }

// Overloaded notes that it refused a request because it has too much to do. The request
// still counts as in flight or is the last that did not.
func (e *Endpoint) Overloaded(now time.Time) {
	e.observe(failure, now)
	if g := e.group.Load(); g != nil {
		g.overloaded(e, now)
	}
}

// full reports whether it has as much as its throttle gives it, which then goes on to
// bound it.
func (e *Endpoint) full(now time.Time) bool {
	room := e.room.Load()
	if room == 0 || e.inFlight.Load() < room {
		return false
	}
	at := since(now)
	if int64(at) >= e.roomFor.Load() {
		return false
	}
	e.roomFor.Store(int64(at + throttleHold))
	return true
}

// throttleHold is how long an endpoint is bounded that nobody meets the bound of.
const throttleHold = 10 * time.Second

// Ejected reports whether it is given no requests.
func (e *Endpoint) Ejected() bool { return e.out.Load() }

func stamp(now time.Time) uint32 { return uint32(now.UnixNano() >> 20) }

func (e *Endpoint) observe(took time.Duration, now time.Time) {
	at := stamp(now)
	for {
		old := e.cost.Load()
		avg := decayed(old, at)
		if t := float64(took); t > avg {
			avg = t // peak: bad news at once, good news slowly
		} else {
			w := math.Exp(-float64(at-uint32(old>>32)) * (1 << 20) / float64(decay))
			avg = float64(math.Float32frombits(uint32(old)))*w + t*(1-w)
		}
		if e.cost.CompareAndSwap(old, uint64(at)<<32|uint64(math.Float32bits(float32(avg)))) {
			return
		}
	}
}

// decayed is the average as it counts at a later time: an endpoint that nobody
// chose because it was bad is forgiven in time.
func decayed(cost uint64, at uint32) float64 {
	avg := float64(math.Float32frombits(uint32(cost)))
	if avg == 0 {
		return 0
	}
	return avg * math.Exp(-float64(at-uint32(cost>>32))*(1<<20)/float64(decay))
}

func (e *Endpoint) load(at uint32) float64 {
	return max(decayed(e.cost.Load(), at), floor) * float64(e.inFlight.Load()+1)
}

// Set is the ready endpoints of one port of a service, those that are near first.
type Set struct {
	list  []*Endpoint
	near  int    // in the zone of who chooses
	group *Group // nil: all are fit
	kept  *affinity
}

// Want describes an endpoint to New.
type Want struct {
	Addr     netip.AddrPort
	Identity assay.Identity
	Workload string
	Near     bool // in the zone of who chooses
}

// New makes a set, taking from old (which may be nil) the endpoints that are in
// both. value makes Endpoint.Value for the new ones.
func New(old *Set, want []Want, value func(Want) any) *Set {
	known := make(map[netip.AddrPort]*Endpoint, old.Len())
	for _, e := range old.Endpoints() {
		known[e.Addr] = e
	}
	s := &Set{list: make([]*Endpoint, 0, len(want))}
	for _, w := range want {
		e := known[w.Addr]
		if e == nil || e.Identity != w.Identity || e.Workload != w.Workload {
			e = &Endpoint{Addr: w.Addr, Identity: w.Identity, Workload: w.Workload}
			if value != nil {
				e.Value = value(w)
			}
		}
		s.list = append(s.list, e)
		if w.Near {
			last := len(s.list) - 1
			s.list[s.near], s.list[last] = e, s.list[s.near]
			s.near++
		}
	}
	return s
}

// Of makes a set of existing endpoints.
func Of(list []*Endpoint) *Set { return &Set{list: list} }

// Len returns the number of endpoints; a nil set has none.
func (s *Set) Len() int {
	if s == nil {
		return 0
	}
	return len(s.list)
}

// Endpoints returns the endpoints, which the caller must not change.
func (s *Set) Endpoints() []*Endpoint {
	if s == nil {
		return nil
	}
	return s.list
}

// Pick returns the better of two random endpoints that are not in tried, or nil
// when all were tried or have as much as they take. With Keep it is the one that is kept.
func (s *Set) Pick(now time.Time, tried []*Endpoint) *Endpoint {
	if s != nil && s.kept != nil {
		return s.kept.pick(now, tried, s.pick)
	}
	return s.pick(now, tried)
}

func (s *Set) pick(now time.Time, tried []*Endpoint) *Endpoint {
	n := s.Len()
	switch n {
	case 0:
		return nil
	case 1:
		if e := s.list[0]; !contains(tried, e) && (!e.full(now) || s.group.leak(now)) {
			return e
		}
		return nil
	}
	if len(tried) > 0 {
		return s.pickUntried(now, tried)
	}
	busy := s.group != nil && s.group.busy.Load() > int64(since(now))
	if s.near > 0 && s.near < n {
		return s.pickNear(now, busy)
	}
	if busy {
		if e := s.group.careful(s, s.list, now); e != nil {
			return e
		}
		return s.whatever(now)
	}
	return pickOf(s.list, stamp(now))
}

// PickConnection is Pick for a connection of which nobody knows that it carries requests:
// throttles do not bound it.
func (s *Set) PickConnection(now time.Time, tried []*Endpoint) *Endpoint {
	if s != nil && s.kept != nil {
		return s.kept.pick(now, tried, s.pickConnection)
	}
	return s.pickConnection(now, tried)
}

func (s *Set) pickConnection(now time.Time, tried []*Endpoint) *Endpoint {
	if e := s.pick(now, tried); e != nil || s.Len() == 0 {
		return e
	}
	start := rand.IntN(len(s.list))
	for i := range s.list {
		if e := s.list[(start+i)%len(s.list)]; !contains(tried, e) {
			return e
		}
	}
	return nil
}

// whatever chooses where nobody may be given anything.
func (s *Set) whatever(now time.Time) *Endpoint {
	full := slices.ContainsFunc(s.list, func(e *Endpoint) bool { return e.full(now) })
	if full && !s.group.leak(now) {
		return nil
	}
	return pickOf(s.list, stamp(now))
}

// pickOf returns the better of two.
func pickOf(list []*Endpoint, at uint32) *Endpoint {
	n := len(list)
	if n == 1 {
		return list[0]
	}
	i := rand.IntN(n)
	j := rand.IntN(n - 1)
	if j >= i {
		j++
	}
	a, b := list[i], list[j]
	if b.load(at) < a.load(at) {
		return b
	}
	return a
}

// pickUntried is the rare case: the best of what is left, and of those that are
// ejected only when nothing else is.
func (s *Set) pickUntried(now time.Time, tried []*Endpoint) *Endpoint {
	var best *Endpoint
	least := math.Inf(1)
	at := stamp(now)
	start := rand.IntN(len(s.list))
	for i := range s.list {
		e := s.list[(start+i)%len(s.list)]
		if contains(tried, e) || e.full(now) {
			continue
		}
		l := e.load(at)
		if e.out.Load() {
			l += float64(time.Hour)
		}
		if l < least {
			best, least = e, l
		}
	}
	return best
}

func contains(list []*Endpoint, e *Endpoint) bool {
	for _, x := range list {
		if x == e {
			return true
		}
	}
	return false
}
