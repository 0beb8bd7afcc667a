package assay

import "time"

// TrafficPolicy says how the requests to some services are protected. A field that is
// zero is not set and takes the default in parentheses, which is safe for everybody;
// a negative number or duration switches off what it bounds. docs/resilience.md says
// what each does.
//
// Retry, timeouts, ejection and what concerns the choice of an endpoint happen where
// a client is; Inbound where a server is.
type TrafficPolicy struct {
	Namespace string   `json:"namespace"`
	Name      string   `json:"name"`
	Services  []string `json:"services,omitempty"` // names in the namespace, sorted

	Timeout    time.Duration `json:"timeout,omitempty"`    // of a request with its retries (none)
	TryTimeout time.Duration `json:"tryTimeout,omitempty"` // of one try, to the beginning of a response (none)

	Retry    RetryPolicy    `json:"retry,omitzero"`
	Ejection EjectionPolicy `json:"ejection,omitzero"`
	// Circuit says when the service whole is asked no more for a while. Its first three
	// fields are all never by default.
	Circuit   BreakerPolicy `json:"circuit,omitzero"`
	SlowStart time.Duration `json:"slowStart,omitempty"` // in which a new endpoint comes to its full share (10 s)
	Inbound   InboundPolicy `json:"inbound,omitzero"`

	// PanicPercent of endpoints must be fit, or all are used, the unfit too (50).
	PanicPercent int `json:"panicPercent,omitempty"`
	// AnyZone spreads requests over all endpoints alike. Otherwise those in the
	// client's zone are preferred while they suffice.
	AnyZone bool `json:"anyZone,omitempty"`
	// MaxConnections that one client has to the service at once, of an opaque
	// protocol; requests in flight, of HTTP (unbounded).
	MaxConnections int `json:"maxConnections,omitempty"`
}

// Key returns "NAMESPACE/NAME".
func (p *TrafficPolicy) Key() string { return p.Namespace + "/" + p.Name }

// RetryPolicy says what is sent again, beyond what provably nobody has read.
type RetryPolicy struct {
	Attempts   int           `json:"attempts,omitempty"`   // beyond the first (2)
	Codes      []int         `json:"codes,omitempty"`      // statuses to try again for (none)
	Backoff    time.Duration `json:"backoff,omitempty"`    // least wait before the second try (25 ms)
	Repeatable bool          `json:"repeatable,omitempty"` // every request may be acted upon twice

	// The budget: retries may be BudgetPercent of requests (20) within BudgetInterval
	// (10 s), and MinPerSecond on top (10).
	BudgetPercent  int           `json:"budgetPercent,omitempty"`
	BudgetInterval time.Duration `json:"budgetInterval,omitempty"`
	MinPerSecond   int           `json:"minPerSecond,omitempty"`
}

// EjectionPolicy says when an endpoint is unfit and gets no requests for a while.
type EjectionPolicy struct {
	BreakerPolicy
	MaxPercent int `json:"maxPercent,omitempty"` // of a service's endpoints that may be ejected (50)
}

// BreakerPolicy says when something answers so badly that it is asked no more for a
// while. The defaults are those of an endpoint; a circuit's are in parentheses after them.
type BreakerPolicy struct {
	ConsecutiveFailures int           `json:"consecutiveFailures,omitempty"` // (5; never)
	FailurePercent      int           `json:"failurePercent,omitempty"`      // of the requests of Interval (never)
	SlowerThan          time.Duration `json:"slowerThan,omitempty"`          // an answer that takes longer is slow (never)
	SlowPercent         int           `json:"slowPercent,omitempty"`         // of the requests of Interval that may be slow (50)
	MinRequests         int           `json:"minRequests,omitempty"`         // in Interval, before percents mean anything (20)
	Interval            time.Duration `json:"interval,omitempty"`            // (10 s)
	BaseTime            time.Duration `json:"baseTime,omitempty"`            // of the first time; each further one doubles it (10 s; 1 s)
	MaxTime             time.Duration `json:"maxTime,omitempty"`             // (5 min; 30 s)
}

// Off reports whether nothing can be so bad. The policy must have its defaults.
func (p *BreakerPolicy) Off() bool {
	return p.ConsecutiveFailures <= 0 && p.FailurePercent <= 0 && (p.SlowerThan <= 0 || p.SlowPercent <= 0)
}

// InboundPolicy protects a workload from its clients.
type InboundPolicy struct {
	// RateLimit is requests a second that one workload takes, RateBurst how many at
	// once (unbounded; burst: a second's worth).
	RateLimit float64 `json:"rateLimit,omitempty"`
	RateBurst int     `json:"rateBurst,omitempty"`
	// MaxDelay is how long requests may wait for one another in the application
	// before new ones are refused (500 ms; negative: no limit adapts).
	MaxDelay time.Duration `json:"maxDelay,omitempty"`
	// MinConcurrency requests are always taken, whatever they wait (32); more than
	// MaxConcurrency never (unbounded).
	MinConcurrency int `json:"minConcurrency,omitempty"`
	MaxConcurrency int `json:"maxConcurrency,omitempty"`
	// MaxConnections of opaque protocols at once (unbounded).
	MaxConnections int `json:"maxConnections,omitempty"`
}

// WithDefaults returns p with what is not set as it will be; p may be nil.
func (p *TrafficPolicy) WithDefaults() TrafficPolicy {
	out := TrafficPolicy{}
	if p != nil {
		out = *p
	}
	number := func(v *int, def int) {
		if *v == 0 {
			*v = def
		}
	}
	duration := func(v *time.Duration, def time.Duration) {
		if *v == 0 {
			*v = def
		}
	}
	number(&out.Retry.Attempts, 2)
	number(&out.Retry.BudgetPercent, 20)
	number(&out.Retry.MinPerSecond, 10)
	duration(&out.Retry.BudgetInterval, 10*time.Second)
	duration(&out.SlowStart, 10*time.Second)
	number(&out.PanicPercent, 50)
	breaker := func(b *BreakerPolicy, consecutive int, base, most time.Duration) {
		number(&b.ConsecutiveFailures, consecutive)
		number(&b.SlowPercent, 50)
		number(&b.MinRequests, 20)
		duration(&b.Interval, 10*time.Second)
		duration(&b.BaseTime, base)
		duration(&b.MaxTime, most)
	}
	breaker(&out.Ejection.BreakerPolicy, 5, 10*time.Second, 5*time.Minute)
	number(&out.Ejection.MaxPercent, 50)
	breaker(&out.Circuit, -1, time.Second, 30*time.Second)
	duration(&out.Inbound.MaxDelay, 500*time.Millisecond)
	number(&out.Inbound.MinConcurrency, 32)
	return out
}
