package guard

import (
	"sync"
	"sync/atomic"
	"time"
)

// Budget bounds the retries of a service to a share of its requests, so that many
// callers of something that fails do not multiply its load. It is the retry constraint
// of Gateway API's XBackendTrafficPolicy: within Interval, retries may be Percent of
// requests, and MinPerSecond on top so that a quiet service can be retried at all.
//
// Requests are only counted; the window is looked at when somebody wants to retry.
type Budget struct {
	requests atomic.Uint64

	mu      sync.Mutex
	limits  Budgeted
	began   time.Duration // of the running half of the window
	before  uint64        // requests when it began
	retries uint64        // in it
	// The half before it; requests are scaled to its length.
	lastRequests, lastRetries float64
}

// Budgeted is how much a budget allows. The zero value is the default.
type Budgeted struct {
	Percent      int           // of requests; 0: 20, negative: none
	MinPerSecond int           // 0: 10, negative: none
	Interval     time.Duration // 0: 10 s
}

func (l Budgeted) withDefaults() Budgeted {
	def := func(v *int, def int) {
		switch {
		case *v == 0:
			*v = def
		case *v < 0:
			*v = 0
		}
	}
	def(&l.Percent, 20)
	def(&l.MinPerSecond, 10)
	if l.Interval <= 0 {
		l.Interval = 10 * time.Second
	}
	return l
}

// Set changes the limits; what was counted stays.
func (b *Budget) Set(l Budgeted) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.limits = l
}

// Request counts one request, not its retries.
func (b *Budget) Request() { b.requests.Add(1) }

// Take takes one retry, if there is one.
func (b *Budget) Take(now time.Duration) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := b.limits.withDefaults()
	half := l.Interval / 2
	total := b.requests.Load()
	if elapsed := now - b.began; elapsed >= half {
		b.lastRequests, b.lastRetries = float64(total-b.before), float64(b.retries)
		if elapsed >= 2*half {
			// Nobody looked for longer: what counts is the rate meanwhile.
			b.lastRequests *= float64(half) / float64(elapsed)
			b.lastRetries = 0
		}
		b.began, b.before, b.retries = now, total, 0
	}
	// The last half counts for as much of it as is within the window still.
	rest := 1 - float64(now-b.began)/float64(half)
	requests := float64(total-b.before) + b.lastRequests*rest
	allowed := requests*float64(l.Percent)/100 + float64(l.MinPerSecond)*l.Interval.Seconds()
	if float64(b.retries)+b.lastRetries*rest+1 > allowed {
		return false
	}
	b.retries++
	return true
}

func (b *Budget) giveBack() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.retries > 0 {
		b.retries--
	}
}
