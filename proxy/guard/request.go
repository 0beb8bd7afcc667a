package guard

import "time"

var epoch = time.Now()

// Now is the clock on which guards are told the time.
func Now() time.Duration { return time.Since(epoch) }

// At puts a time on that clock.
func At(t time.Time) time.Duration { return t.Sub(epoch) }

// Request is what one request is allowed. A field that is zero is not set: a rule's
// Request is laid over its service's, and what neither sets is the default.
type Request struct {
	// Timeout bounds a request, retries included, from its head to the end of its
	// response. Not set and negative: unbounded, because an answer may be a stream.
	// It ends where a connection becomes a tunnel.
	Timeout time.Duration
	// TryTimeout bounds one attempt, from when it is sent to the first byte of its
	// final response. Not set and negative: unbounded.
	TryTimeout time.Duration
	Retry      Retry
}

// Retry says what may be sent again, beyond what provably nobody has read.
type Retry struct {
	// Attempts is how often at most. 0: DefaultRetries; negative: never.
	Attempts int
	// Codes are the statuses of a response that is thrown away for another attempt.
	Codes []int
	// Backoff is the least time before another attempt; it doubles with each, and up
	// to half of it is added at random. 0: DefaultBackoff, and none before the first
	// attempt after one that nobody has read.
	Backoff time.Duration
	// Repeatable is the owner's word that each of these requests may be acted upon
	// twice, whatever its method says.
	Repeatable bool
}

// Defaults.
const (
	DefaultRetries = 2
	DefaultBackoff = 25 * time.Millisecond
	maxBackoff     = 10 // times the least
)

// Over returns r with what it does not set taken from base. Retry is one decision: a
// rule that says anything of it says all of it.
func (r *Request) Over(base *Request) *Request {
	switch {
	case r == nil:
		return base
	case base == nil:
		return r
	}
	out := *r
	if out.Timeout == 0 {
		out.Timeout = base.Timeout
	}
	if out.TryTimeout == 0 {
		out.TryTimeout = base.TryTimeout
	}
	if out.Retry.isZero() {
		out.Retry = base.Retry
	}
	return &out
}

func (r *Retry) isZero() bool {
	return r.Attempts == 0 && len(r.Codes) == 0 && r.Backoff == 0 && !r.Repeatable
}

// Expires returns when a request that began at start must be over, 0 for never. wire
// is the deadline that the caller itself sent (gRPC's), as a duration from start; 0
// when it sent none. The earlier one counts: nobody waits for a later answer.
func (r *Request) Expires(start, wire time.Duration) time.Duration {
	limit := wire
	if r != nil && r.Timeout > 0 && (limit == 0 || r.Timeout < limit) {
		limit = r.Timeout
	}
	if limit <= 0 {
		return 0
	}
	return start + limit
}

// TryExpires returns when an attempt that is sent at sent must be answered, 0 for
// never.
func (r *Request) TryExpires(sent time.Duration) time.Duration {
	if r == nil || r.TryTimeout <= 0 {
		return 0
	}
	return sent + r.TryTimeout
}

// HasCode reports whether a response with status is one to try again for.
func (r *Request) HasCode(status int) bool {
	if r == nil {
		return false
	}
	for _, c := range r.Retry.Codes {
		if c == status {
			return true
		}
	}
	return false
}

func (r *Request) retries() int {
	switch {
	case r == nil || r.Retry.Attempts == 0:
		return DefaultRetries
	case r.Retry.Attempts < 0:
		return 0
	}
	return r.Retry.Attempts
}
