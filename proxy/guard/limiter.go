package guard

import (
	"math"
	"sync"
	"sync/atomic"
	"time"

	"assay.dev"
)

// Limiter bounds how many requests an application has at once, so that what it takes
// it can answer in time. It learns the bound, and has none as long as nothing waits.
//
// What it believes. Requests that wait for one another show in the fastest tenth of
// the answers: when even those take much longer than they used to, and by Little's
// law the requests at hand take longer to answer than MaxDelay, the application has
// more than it can do. Slow answers among fast ones (long polls, reports) are none of
// that. Then the bound is what it answers in MaxDelay. When there are fewer answers under
// it than before, the bound may be the reason, and is doubled to see: if answers come no
// later then, nothing waits, the application has become slower; the bound is lifted, and
// the new pace is the one to compare with.
type Limiter struct {
	inFlight atomic.Int64
	limit    atomic.Int64 // 0: none
	ends     atomic.Int64 // of the window
	refused  atomic.Int64 // in it
	given    atomic.Int64 // requests in it that ended without an answer: given up, most of them
	buckets  [assay.LatencyBuckets]atomic.Uint32

	mu    sync.Mutex
	rules assay.InboundPolicy
	began time.Duration
	core  limiterCore
}

// window is the shortest time over which answers are looked at, and enough how many
// there must be; a window is longer until it has them.
const (
	window = 100 * time.Millisecond
	enough = 10
)

// Set changes the rules, which must have their defaults.
func (l *Limiter) Set(rules assay.InboundPolicy) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rules = rules
	if rules.MaxDelay <= 0 {
		l.core = limiterCore{}
	}
	l.apply()
}

func (l *Limiter) apply() {
	limit := int64(l.core.limit)
	if most := int64(l.rules.MaxConcurrency); most > 0 && (limit == 0 || most < limit) {
		limit = most
	}
	l.limit.Store(limit)
}

// Admit takes a request, or refuses it. What it took is given back with Done.
func (l *Limiter) Admit(now time.Duration) bool {
	n := l.inFlight.Add(1)
	if limit := l.limit.Load(); limit > 0 && n > limit {
		l.inFlight.Add(-1)
		l.refused.Add(1)
		if int64(now) >= l.ends.Load() {
			l.look(now)
		}
		return false
	}
	return true
}

// Limit returns the bound, 0 for none.
func (l *Limiter) Limit() int64 { return l.limit.Load() }

// InFlight returns how many requests are between Admit and Done.
func (l *Limiter) InFlight() int64 { return l.inFlight.Load() }

// Done gives back what Admit took. took is how long the answer needed; negative when
// there was none, and then how long it was waited for.
func (l *Limiter) Done(took, now time.Duration) {
	l.inFlight.Add(-1)
	if took < 0 {
		took = -took
		l.given.Add(1)
	}
	l.buckets[assay.LatencyBucket(took)].Add(1)
	if int64(now) >= l.ends.Load() {
		l.look(now)
	}
}

// look ends a window, unless somebody does already.
func (l *Limiter) look(now time.Duration) {
	if !l.mu.TryLock() {
		return
	}
	defer l.mu.Unlock()
	if l.rules.MaxDelay <= 0 {
		l.ends.Store(math.MaxInt64)
		return
	}
	l.ends.Store(int64(now + window))
	if l.began == 0 || now-l.began > 100*window && l.core.limit == 0 {
		l.began = now // the first, or after a time in which nothing was asked
		for i := range l.buckets {
			l.buckets[i].Store(0)
		}
		return
	}
	w := seen{elapsed: now - l.began, inFlight: l.inFlight.Load()}
	var counts [assay.LatencyBuckets]uint32
	for i := range l.buckets {
		counts[i] = l.buckets[i].Load()
		w.ended += int64(counts[i])
	}
	if w.ended == 0 && l.core.limit > 0 && l.refused.Load() > 0 && !l.core.sour() && w.elapsed > max(10*window, 4*l.core.pace) {
		// What is at hand is not what waits. A bound that lets nothing through is worse
		// than none.
		l.core = limiterCore{pace: l.core.pace, idle: float64(w.inFlight)}
		l.began = now
		l.refused.Store(0)
		l.apply()
		return
	}
	if w.ended < enough {
		return
	}
	w.fastest = tenth(&counts, w.ended)
	w.refused, w.given = l.refused.Swap(0), l.given.Swap(0)
	for i := range l.buckets {
		l.buckets[i].Add(-counts[i])
	}
	l.began = now
	l.core.see(&l.rules, w)
	l.apply()
}

// tenth is how long the fastest tenth of the answers took: between the bounds of its
// bucket, by how many are before it there.
func tenth(counts *[assay.LatencyBuckets]uint32, total int64) time.Duration {
	rank, before := float64(total)/10, 0.0
	for i, n := range counts {
		if n == 0 || before+float64(n) < rank {
			before += float64(n)
			continue
		}
		low, high := time.Duration(0), assay.LatencyBound(i)
		if i > 0 {
			low = assay.LatencyBound(i - 1)
		}
		if high == 0 {
			return low
		}
		return low + time.Duration(float64(high-low)*(rank-before)/float64(n))
	}
	return 0
}

// seen is what happened in a window.
type seen struct {
	elapsed  time.Duration
	ended    int64
	refused  int64
	given    int64         // up by clients: the application goes on with them, unseen
	inFlight int64         // at its end
	fastest  time.Duration // tenth of what ended; who gave up waited for that long at least
}

// limiterCore is the decision: a function of what it remembers and one window.
type limiterCore struct {
	limit   float64       // 0: none
	pace    time.Duration // of the fastest tenth when nothing waits
	over    int           // windows in a row that looked overloaded
	calm    int           // windows in a row that did not need the limit
	idle    float64       // requests at hand that wait for something else, as long polls do
	wasRate float64       // when the limit began
	// Since then.
	ended, given float64
	settled      time.Duration // in which no more was at hand than the limit
	// While a trial runs.
	trial  float64       // the limit that it began with; 0: none runs
	before time.Duration // the fastest tenth then
	tried  time.Duration // how long it has run
}

// sour reports whether many clients gave up since the limit began: what they left
// behind is still waited for by the application, though nobody sees it.
func (c *limiterCore) sour() bool { return c.given > c.ended/4 }

func (c *limiterCore) see(rules *assay.InboundPolicy, w seen) {
	rate := float64(max(w.ended-w.given, 0)) / w.elapsed.Seconds()
	least := float64(rules.MinConcurrency)
	if c.pace == 0 || w.fastest < c.pace {
		c.pace = w.fastest
	}
	most := max(4*c.pace, c.pace+rules.MaxDelay) // that an answer may take
	c.idle = min(c.idle, float64(w.inFlight))
	room := c.idle + max(least, rate*most.Seconds())
	if c.limit == 0 {
		waits := w.fastest > max(2*c.pace, c.pace+rules.MaxDelay/4)
		if !waits && float64(w.inFlight) < least {
			c.pace += (w.fastest - c.pace) / 64 // an application may change
		}
		if !waits || float64(w.inFlight) <= room {
			c.over = 0
			return
		}
		if c.over++; c.over < 2 {
			return
		}
		c.limit, c.over, c.calm = room, 0, 0
		c.wasRate = rate
		c.ended, c.given, c.settled, c.trial = float64(w.ended), float64(w.given), 0, 0
		return
	}
	// The last few seconds count most.
	c.ended, c.given = 0.97*c.ended+float64(w.ended), 0.97*c.given+float64(w.given)
	if c.settled > 0 || float64(w.inFlight) <= c.limit {
		c.settled += w.elapsed
	}
	if c.trial > 0 {
		c.judge(w)
		return
	}
	// What the limit is worth shows in what came under it alone: an application that is
	// overloaded goes on at its pace while what waited already is answered.
	settled := c.settled > w.fastest
	switch {
	case settled && w.refused > 0 && !c.sour() && rate < 0.6*c.wasRate:
		// Fewer answers than before: because of the limit, or because the application can
		// do no more. With twice the limit the one gives more answers, the other later ones.
		c.trial, c.before, c.tried = c.limit, w.fastest, 0
		c.limit *= 2
	case w.fastest > most:
		c.limit, c.calm = min(c.limit, room), 0
		if settled {
			c.idle *= 0.9 // not all of them are, or the rest would not be so slow
		}
	case w.refused > 0:
		// What it could do with more shows in the rate, as long as nothing waits.
		c.limit, c.calm = min(max(room, c.limit/2), 2*c.limit), 0
	default:
		if c.calm++; c.calm >= 10 && float64(w.inFlight) < c.limit/2 {
			*c = limiterCore{pace: c.pace, idle: c.idle}
		}
	}
}

// judge ends a trial once what came under it is answered.
func (c *limiterCore) judge(w seen) {
	c.tried += w.elapsed
	switch {
	case c.sour():
	case c.tried <= 2*max(w.fastest, c.before):
		return
	case w.fastest < c.before*14/10:
		*c = limiterCore{pace: w.fastest} // nothing waits
		return
	}
	c.limit, c.trial = c.trial, 0
	c.wasRate /= 2
}
