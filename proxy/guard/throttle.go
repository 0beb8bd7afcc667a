package guard

import "time"

// Throttle bounds what one client has under way at one endpoint, from what the endpoint
// itself says: it refuses what is too much for it, unread. Then the client asks for less
// than it did, and for one more with each round of answers, as TCP treats a path that
// loses packets. So a refusal costs the way there for a few requests, and not for all
// that are too many. Whoever has a Throttle guards it.
//
// It believes no latencies: an endpoint knows better than its clients whether requests
// wait there for one another.
type Throttle struct {
	limit float64       // 0: none
	since time.Duration // when the endpoint last refused
}

const (
	throttleRound = 100 * time.Millisecond // refusals within it are one
	throttleLess  = 0.7
)

// Refused takes a refusal, with what was under way, itself among it. It reports whether
// the limit changed.
func (t *Throttle) Refused(underWay int64, now time.Duration) bool {
	if t.limit > 0 && now-t.since < throttleRound {
		return false
	}
	base := float64(underWay)
	if t.limit > 0 {
		base = min(base, t.limit)
	}
	t.limit, t.since = max(throttleLess*base, 1), now
	return true
}

// Answered takes an answer of any kind, what is under way without it, and when it was
// asked for.
func (t *Throttle) Answered(underWay int64, asked time.Duration) {
	n := float64(underWay + 1)
	switch {
	case t.limit == 0 || asked < t.since:
	case n > t.limit+1: // beside what lasts, a stream or a long poll, there is room
		t.limit = n
	case n >= t.limit-1:
		t.limit += 1 / t.limit
	}
}

// Lift ends the bound. Its holder does so when nobody has met it for a while: without a
// bound that is met everything that is held back would come at once.
func (t *Throttle) Lift() { *t = Throttle{} }

// Limit returns the bound, 0 for none.
func (t *Throttle) Limit() int64 { return int64(t.limit) }
