package guard

import (
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"assay.dev"
)

// Decision names what was decided. The names are stable: they are a metric's labels.
type Decision uint8

// Where a client is.
const (
	RetryUnread    Decision = iota // sent again: nobody had read it
	RetryBroken                    // sent again: idempotent, and the way broke
	RetryTimeout                   // sent again: no answer within the try's time
	RetryStatus                    // sent again: a status to try again for
	RetryLimit                     // not sent again: too often already
	RetryBudget                    // not sent again: the service's budget is spent
	Timeout                        // ended: the request's time is over
	TryTimeout                     // ended: the last try's time is over
	Eject                          // an endpoint gets nothing for a while
	EjectFloor                     // an unfit endpoint stays in use: too many are ejected already
	Probe                          // an ejected endpoint was given one request
	Restore                        // an ejected endpoint is fit again
	Panic                          // too few endpoints are fit: all were used, the unfit too
	Failover                       // sent to another zone: those in the client's own do not suffice
	Crowded                        // refused: too many at once from this client
	Throttled                      // an endpoint refused: it is given less at once
	HeldBack                       // refused: every endpoint has as much as it takes
	CircuitOpen                    // the service whole is asked no more
	CircuitProbe                   // but for one request
	CircuitRefused                 // refused: the circuit is open
	CircuitClosed                  // the service is asked again

	// Where a server is.
	Shed          // refused: the application has more than it can do
	RateLimited   // refused: more in a second than it takes
	TooManyAtOnce // refused: more at once than it takes
	decisions
)

var decisionNames = [decisions]string{
	RetryUnread: "retry-unread", RetryBroken: "retry-broken", RetryTimeout: "retry-timeout", RetryStatus: "retry-status",
	RetryLimit: "retry-limit", RetryBudget: "retry-budget", Timeout: "timeout", TryTimeout: "try-timeout",
	Eject: "eject", EjectFloor: "eject-floor", Probe: "probe", Restore: "restore", Panic: "panic", Failover: "failover",
	Crowded: "crowded", Throttled: "throttle", HeldBack: "held-back",
	CircuitOpen: "circuit-open", CircuitProbe: "circuit-probe", CircuitRefused: "circuit-refused", CircuitClosed: "circuit-close",
	Shed: "shed", RateLimited: "rate-limited", TooManyAtOnce: "too-many",
}

func (d Decision) String() string { return decisionNames[d] }

// Counts counts decisions. A nil one counts nothing.
type Counts struct{ n [decisions]atomic.Uint64 }

// Count counts a decision.
func (c *Counts) Count(d Decision) {
	if c != nil {
		c.n[d].Add(1)
	}
}

// takeBack undoes a Count of what did not come to pass.
func (c *Counts) takeBack(d Decision) {
	if c != nil {
		c.n[d].Add(^uint64(0))
	}
}

// Each calls f with each decision that was ever taken.
func (c *Counts) Each(f func(name string, n uint64)) {
	for d := range c.n {
		if n := c.n[d].Load(); n > 0 {
			f(Decision(d).String(), n)
		}
	}
}

// maxServices bounds how many services a Registry counts apart.
const maxServices = 256

// Registry holds the counts of all services, for as long as the process lives: a
// service that goes and comes is counted on.
type Registry struct {
	mu sync.Mutex
	m  map[string]*Counts
}

// Of returns the counts of a service, or of all that are over the bound.
func (r *Registry) Of(service string) *Counts {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c := r.m[service]; c != nil {
		return c
	}
	if len(r.m) >= maxServices {
		service = assay.Overflow
		if c := r.m[service]; c != nil {
			return c
		}
	}
	if r.m == nil {
		r.m = map[string]*Counts{}
	}
	c := new(Counts)
	r.m[service] = c
	return c
}

// Decided returns all counts that are over 0, sorted.
func (r *Registry) Decided() []assay.Decided {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []assay.Decided
	for _, service := range slices.Sorted(maps.Keys(r.m)) {
		r.m[service].Each(func(name string, n uint64) {
			out = append(out, assay.Decided{Service: service, Decision: name, Count: n})
		})
	}
	return out
}
