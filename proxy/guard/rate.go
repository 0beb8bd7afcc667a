package guard

import (
	"sync/atomic"
	"time"
)

// RateLimit is a token bucket, kept as the time at which it would be full again. The
// zero value lets everything pass.
type RateLimit struct {
	full atomic.Int64 // a time on the caller's clock
	each atomic.Int64 // nanoseconds that a token takes to come; 0: no limit
	room atomic.Int64 // what burst tokens take
}

// Set changes the limit to so many a second, and so many at once (0: a second's
// worth). A rate that is not over 0 is no limit.
func (r *RateLimit) Set(perSecond float64, burst int) {
	if perSecond <= 0 {
		r.each.Store(0)
		return
	}
	if burst <= 0 {
		burst = max(int(perSecond), 1)
	}
	each := max(int64(float64(time.Second)/perSecond), 1)
	r.each.Store(each)
	r.room.Store(each * int64(burst))
}

// Take takes a token, if there is one.
func (r *RateLimit) Take(now time.Duration) bool {
	each := r.each.Load()
	if each == 0 {
		return true
	}
	room := r.room.Load()
	for {
		old := r.full.Load()
		next := max(old, int64(now)) + each
		if next > int64(now)+room {
			return false
		}
		if r.full.CompareAndSwap(old, next) {
			return true
		}
	}
}
