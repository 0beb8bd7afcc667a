package guard

import (
	"fmt"
	"math/rand/v2"
	"time"

	"assay.dev"
)

// Breaker decides whether an endpoint is fit. It opens on failures in a row, or when
// too many answers of an interval failed or were slow; it stays open for a time that
// doubles; then one request probes, and its end closes the breaker or opens it again.
// Whoever has a Breaker guards it.
//
//	fit --too much went wrong--> open --its time is over, a probe--> probing
//	 ^                            ^                                    |
//	 +------- the probe ended well / badly ----------------------------+
type Breaker struct {
	state  breakerState
	why    string        // it is not fit
	row    int           // failures in a row
	trips  int           // openings in a row
	until  time.Duration // when the open breaker lets a probe through, or a probe counts as lost
	closed time.Duration // when it last became fit

	began               time.Duration // of the running half of the interval
	total, bad, slow    int           // in it
	total0, bad0, slow0 int           // in the half before
}

type breakerState uint8

const (
	fit breakerState = iota
	open
	probing
)

// Change is what an observation did to a breaker.
type Change uint8

const (
	Same   Change = iota
	Opened        // it is unfit from now on
	Closed        // it is fit again
)

// Fit reports whether the endpoint may be given requests as any other.
func (b *Breaker) Fit() bool { return b.state == fit }

// Quiet reports whether a good answer tells the breaker nothing, under l.
func (b *Breaker) Quiet(l *assay.BreakerPolicy) bool {
	return b.state == fit && b.row == 0 && l.FailurePercent <= 0 && l.SlowerThan <= 0
}

// Probe reports whether an unfit endpoint may be given one request now, to see. The
// caller must send it. Until is when to ask again.
func (b *Breaker) Probe(l *assay.BreakerPolicy, now time.Duration) bool {
	if b.state == fit || now < b.until {
		return false
	}
	b.state, b.until = probing, now+l.BaseTime // by then its end is known, or nobody will tell
	return true
}

// Why says why the endpoint is unfit, "" when it is not.
func (b *Breaker) Why() string { return b.why }

// Until is when an unfit endpoint may be probed.
func (b *Breaker) Until() time.Duration { return b.until }

// Failed takes a request that came to nothing or was answered as a server's fault.
func (b *Breaker) Failed(l *assay.BreakerPolicy, now time.Duration) Change {
	return b.observe(l, true, false, now)
}

// Answered takes a good answer and how long it took.
func (b *Breaker) Answered(l *assay.BreakerPolicy, took, now time.Duration) Change {
	return b.observe(l, false, l.SlowerThan > 0 && took > l.SlowerThan, now)
}

func (b *Breaker) observe(l *assay.BreakerPolicy, failed, slow bool, now time.Duration) Change {
	switch b.state {
	case open:
		return Same // it was sent before: old news
	case probing:
		if failed || slow {
			b.trip(l, now)
			return Same // unfit before, unfit after
		}
		*b = Breaker{trips: b.trips, closed: now, began: now}
		return Closed
	}
	b.count(l, failed, slow, now)
	if !failed {
		b.row = 0
	} else {
		b.row++
	}
	why := b.tooBad(l)
	if why == "" {
		return Same
	}
	b.why = why
	if now-b.closed > l.MaxTime {
		b.trips = 0 // it was fit for long
	}
	b.trip(l, now)
	return Opened
}

func (b *Breaker) trip(l *assay.BreakerPolicy, now time.Duration) {
	d := l.BaseTime
	for range b.trips {
		if d = 2 * d; d >= l.MaxTime {
			d = l.MaxTime
			break
		}
	}
	// A tenth at random, so that what failed together is not probed together.
	*b = Breaker{state: open, why: b.why, trips: b.trips + 1, until: now + d + time.Duration(rand.Int64N(int64(d)/10+1)), closed: b.closed}
}

// count keeps two halves of the interval.
func (b *Breaker) count(l *assay.BreakerPolicy, failed, slow bool, now time.Duration) {
	if half := l.Interval / 2; now-b.began >= half {
		if now-b.began >= 2*half {
			b.total, b.bad, b.slow = 0, 0, 0
		}
		b.total0, b.bad0, b.slow0 = b.total, b.bad, b.slow
		b.total, b.bad, b.slow, b.began = 0, 0, 0, now
	}
	b.total++
	if failed {
		b.bad++
	}
	if slow {
		b.slow++
	}
}

func (b *Breaker) tooBad(l *assay.BreakerPolicy) string {
	total := b.total + b.total0
	switch {
	case l.ConsecutiveFailures > 0 && b.row >= l.ConsecutiveFailures:
		return fmt.Sprintf("%d failures in a row", b.row)
	case total < l.MinRequests:
	case l.FailurePercent > 0 && 100*(b.bad+b.bad0) >= l.FailurePercent*total:
		return fmt.Sprintf("%d of %d requests failed", b.bad+b.bad0, total)
	case l.SlowerThan > 0 && l.SlowPercent > 0 && 100*(b.slow+b.slow0) > l.SlowPercent*total:
		return fmt.Sprintf("%d of %d answers took longer than %v", b.slow+b.slow0, total, l.SlowerThan)
	}
	return ""
}
