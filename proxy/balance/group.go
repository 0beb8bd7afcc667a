package balance

import (
	"math"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"assay.dev"
	"assay.dev/proxy/guard"
)

// Group is what the endpoints of one port of a service share, in whatever sets they
// are: who is unfit, who is new, and the rules for that. It outlives the sets.
//
// As long as every endpoint is fit and none is new, which is nearly always, Pick looks
// at one number of it.
type Group struct {
	Counts *guard.Counts // of what is decided; may be nil
	// busy is until when Pick must look further, on the guards' clock: 0 when nothing
	// is the matter.
	busy atomic.Int64

	mu      sync.Mutex
	rules   *assay.TrafficPolicy
	members map[*Endpoint]struct{}
	ejected int           // unfit, and given nothing
	unfit   int           // those and the ones that are kept in use
	ramps   time.Duration // until when somebody is new
	began   time.Duration // when there was a first endpoint

	panics atomic.Bool  // too few are fit
	leaked atomic.Int64 // when a request was last given to who had enough
	probe  atomic.Int64 // when the first of the ejected may be probed
}

// since puts a time on the guards' clock.
func since(now time.Time) time.Duration { return guard.At(now) }

// NewGroup makes a group with the default rules.
func NewGroup(counts *guard.Counts) *Group {
	g := &Group{Counts: counts, members: map[*Endpoint]struct{}{}}
	g.Configure(nil)
	return g
}

// Configure changes the rules; nil are the defaults.
func (g *Group) Configure(p *assay.TrafficPolicy) {
	rules := p.WithDefaults()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.rules = &rules
	for e := range g.members {
		e.calm.Store(false)
	}
	g.settle()
}

// Consist says which sets there are now. What is in none of them is forgotten.
func (g *Group) Consist(now time.Time, sets ...*Set) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.members) == 0 {
		g.began = since(now)
	}
	// Where all came a moment ago, none is warmer than another.
	warm := since(now)-g.began >= g.rules.SlowStart
	next := make(map[*Endpoint]struct{}, len(g.members))
	for _, s := range sets {
		s.group = g
		for _, e := range s.list {
			if _, known := g.members[e]; !known && warm && len(g.members) > 0 {
				g.ramp(e, now)
			}
			e.group.Store(g)
			next[e] = struct{}{}
		}
	}
	g.members = next
	g.settle()
}

// ramp gives e a small share that grows; g.mu is held.
func (g *Group) ramp(e *Endpoint, now time.Time) {
	if g.rules.SlowStart > 0 {
		e.ramp.Store(int64(since(now)) + 1)
		g.ramps = max(g.ramps, since(now)+g.rules.SlowStart)
	}
}

// settle computes what Pick looks at; g.mu is held.
func (g *Group) settle() {
	g.ejected, g.unfit = 0, 0
	throttled := int64(0)
	probe := int64(math.MaxInt64)
	for e := range g.members {
		if e.throttle.Limit() > 0 {
			throttled = math.MaxInt64 // until it is lifted
		}
		if e.breaker.Fit() {
			e.out.Store(false)
			continue
		}
		g.unfit++
		if e.out.Load() {
			g.ejected++
			probe = min(probe, int64(e.breaker.Until()))
		}
	}
	n := len(g.members)
	g.panics.Store(g.unfit > 0 && 100*(n-g.unfit) < g.rules.PanicPercent*n)
	g.probe.Store(probe)
	switch {
	case g.unfit > 0:
		g.busy.Store(math.MaxInt64)
	default:
		g.busy.Store(max(int64(g.ramps), throttled))
	}
}

// failed and answered take what became of a request to e.
func (g *Group) failed(e *Endpoint, now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.changed(e, e.breaker.Failed(&g.rules.Ejection.BreakerPolicy, since(now)), now)
	e.calm.Store(false)
}

func (g *Group) overloaded(e *Endpoint, now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if e.throttle.Refused(e.inFlight.Load()+1, since(now)) {
		g.Counts.Count(guard.Throttled)
		e.roomFor.Store(int64(since(now) + throttleHold))
		g.roomOf(e)
		g.settle()
	}
}

// roomOf publishes what e's throttle gives it.
func (g *Group) roomOf(e *Endpoint) {
	e.room.Store(e.throttle.Limit())
	e.calm.Store(e.breaker.Quiet(&g.rules.Ejection.BreakerPolicy) && e.throttle.Limit() == 0)
}

// leak lets a request through to an endpoint that has enough, now and then: what is
// under way there may last for hours (a stream, a long poll) and say nothing.
func (g *Group) leak(now time.Time) bool {
	last, at := g.leaked.Load(), int64(since(now))
	return at-last >= int64(leakEvery) && g.leaked.CompareAndSwap(last, at)
}

const leakEvery = 100 * time.Millisecond

func (g *Group) answered(e *Endpoint, took time.Duration, now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if e.throttle.Limit() > 0 {
		if e.throttle.Answered(e.inFlight.Load(), since(now)-took); int64(since(now)) >= e.roomFor.Load() {
			e.throttle.Lift()
			g.settle()
		}
	}
	g.changed(e, e.breaker.Answered(&g.rules.Ejection.BreakerPolicy, took, since(now)), now)
	g.roomOf(e)
}

func (g *Group) changed(e *Endpoint, c guard.Change, now time.Time) {
	switch {
	case c == guard.Opened:
		if most := g.rules.Ejection.MaxPercent; 100*(g.ejected+1) <= most*len(g.members) {
			e.out.Store(true)
			g.Counts.Count(guard.Eject)
		} else {
			g.Counts.Count(guard.EjectFloor)
		}
	case c == guard.Closed:
		g.Counts.Count(guard.Restore)
		e.cost.Store(0) // what it was like is no measure for what it is
		e.out.Store(false)
		g.ramp(e, now)
	case e.breaker.Fit():
		return
	}
	g.settle()
}

// Unfit calls f with each endpoint that is unfit now.
func (g *Group) Unfit(f func(e *Endpoint, why string, until time.Duration)) {
	if g.busy.Load() != math.MaxInt64 {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for e := range g.members {
		if !e.breaker.Fit() {
			f(e, e.breaker.Why(), e.breaker.Until())
		}
	}
}

// due returns an ejected endpoint of list that is to be probed with this request.
func (g *Group) due(list []*Endpoint, now time.Time, tried []*Endpoint) *Endpoint {
	if int64(since(now)) < g.probe.Load() {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, e := range list {
		if e.out.Load() && !contains(tried, e) && e.breaker.Probe(&g.rules.Ejection.BreakerPolicy, since(now)) {
			g.Counts.Count(guard.Probe)
			g.settle()
			return e
		}
	}
	return nil
}

// share is how much of its part e is given now, over 0 and up to 1.
func (g *Group) share(e *Endpoint, now time.Time) float64 {
	began := e.ramp.Load()
	if began == 0 {
		return 1
	}
	g.mu.Lock()
	whole := g.rules.SlowStart
	g.mu.Unlock()
	f := float64(since(now)-time.Duration(began)) / float64(max(whole, 1))
	if f >= 1 {
		e.ramp.Store(0)
		return 1
	}
	return max(f, 0.1)
}

// careful is Pick where not every endpoint is as good as any other: some are ejected,
// or new.
func (g *Group) careful(s *Set, list []*Endpoint, now time.Time) *Endpoint {
	if e := g.due(s.list, now, nil); e != nil {
		return e
	}
	all := g.panics.Load()
	if all {
		g.Counts.Count(guard.Panic)
	}
	at := stamp(now)
	var a, b *Endpoint
	// Two at random of those that may be used; in a set where nearly all are ejected
	// the dice would roll for long, so it is searched from where they fell.
	n := len(list)
	for range 2 {
		start := rand.IntN(n)
		for i := range n {
			e := list[(start+i)%n]
			if e == a || !all && e.out.Load() || e.full(now) {
				continue
			}
			if a == nil {
				a = e
			} else {
				b = e
			}
			break
		}
	}
	switch {
	case a == nil:
		return nil
	case b == nil:
		return a
	}
	if b.load(at) < a.load(at) {
		a, b = b, a
	}
	if f := g.share(a, now); f < 1 && rand.Float64() > f {
		return b
	}
	return a
}
