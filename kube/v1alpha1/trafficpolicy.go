package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// TrafficPolicy says how the requests to services are protected: time, retries, the
// choice of an endpoint, and what a workload takes. Its form follows Gateway API's
// policies that are attached to targets; retryConstraint is that of its
// XBackendTrafficPolicy. What is left out has a safe default, and 0 (or 0s) switches
// off what it bounds. docs/resilience.md has both.
//
// A service has one policy at most.
type TrafficPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              TrafficPolicySpec `json:"spec"`
	Status            Status            `json:"status,omitempty"`
}

// TrafficPolicySpec is the content of a TrafficPolicy.
type TrafficPolicySpec struct {
	// TargetRefs are the services, in the policy's namespace.
	TargetRefs      []TargetReference `json:"targetRefs"`
	Timeouts        *Timeouts         `json:"timeouts,omitempty"`
	Retry           *Retry            `json:"retry,omitempty"`
	RetryConstraint *RetryConstraint  `json:"retryConstraint,omitempty"`
	Ejection        *Ejection         `json:"ejection,omitempty"`
	// Circuit says when the service whole is asked no more for a while (never).
	Circuit *Breaker `json:"circuit,omitempty"`
	// SlowStart is the time in which a new endpoint comes to its full share (10s).
	SlowStart *Duration `json:"slowStart,omitempty"`
	// PanicPercent of the endpoints must be fit, or all are used (50).
	PanicPercent *int32 `json:"panicPercent,omitempty"`
	// Locality is "PreferZone" (the default) or "Any".
	Locality string `json:"locality,omitempty"`
	// MaxConnections that one client has at once, of an opaque protocol; requests in
	// flight, of HTTP.
	MaxConnections *int32   `json:"maxConnections,omitempty"`
	Inbound        *Inbound `json:"inbound,omitempty"`
}

// Duration is one as GEP-2257 has them: 500ms, 10s, 1m30s.
type Duration string

// TargetReference names a Service.
type TargetReference struct {
	Group string `json:"group,omitempty"` // "" (core)
	Kind  string `json:"kind,omitempty"`  // Service
	Name  string `json:"name"`
}

// Timeouts bound a request.
type Timeouts struct {
	Request *Duration `json:"request,omitempty"` // with its retries, to the end of the response
	Try     *Duration `json:"try,omitempty"`     // one try, to the beginning of a response
}

// Retry says what is sent again.
type Retry struct {
	Attempts *int32    `json:"attempts,omitempty"` // beyond the first (2)
	Codes    []int32   `json:"codes,omitempty"`    // statuses to try again for
	Backoff  *Duration `json:"backoff,omitempty"`  // least wait (25ms)
	// Repeatable says that every request may be acted upon twice, whatever its method.
	Repeatable bool `json:"repeatable,omitempty"`
}

// RetryConstraint is the budget of a client's retries.
type RetryConstraint struct {
	Budget       *RetryBudget `json:"budget,omitempty"`
	MinRetryRate *RequestRate `json:"minRetryRate,omitempty"`
}

// RetryBudget is a share of the requests of an interval.
type RetryBudget struct {
	Percent  *int32    `json:"percent,omitempty"`  // (20)
	Interval *Duration `json:"interval,omitempty"` // (10s)
}

// RequestRate is so many in an interval.
type RequestRate struct {
	Count    *int32    `json:"count,omitempty"`
	Interval *Duration `json:"interval,omitempty"` // (1s)
}

// Ejection says when an endpoint is unfit.
type Ejection struct {
	Breaker    `json:",inline"`
	MaxPercent *int32 `json:"maxPercent,omitempty"` // of the endpoints (50); 0 ejects none
}

// Breaker says when something answers so badly that it is asked no more for a while. In
// parentheses are the defaults for an endpoint and for a circuit.
type Breaker struct {
	ConsecutiveFailures *int32    `json:"consecutiveFailures,omitempty"` // (5; never)
	FailurePercent      *int32    `json:"failurePercent,omitempty"`      // of the requests of interval
	SlowerThan          *Duration `json:"slowerThan,omitempty"`          // an answer that takes longer is slow
	SlowPercent         *int32    `json:"slowPercent,omitempty"`         // of the answers may be (50)
	MinRequests         *int32    `json:"minRequests,omitempty"`         // before percents mean anything (20)
	Interval            *Duration `json:"interval,omitempty"`            // (10s)
	BaseTime            *Duration `json:"baseTime,omitempty"`            // of the first time (10s; 1s)
	MaxTime             *Duration `json:"maxTime,omitempty"`             // of any (5m; 30s)
}

// Inbound is what one workload takes.
type Inbound struct {
	RateLimit      *RateLimit   `json:"rateLimit,omitempty"`
	Concurrency    *Concurrency `json:"concurrency,omitempty"`
	MaxConnections *int32       `json:"maxConnections,omitempty"` // of opaque protocols
}

// RateLimit is so many requests in an interval, and so many at once.
type RateLimit struct {
	Requests int32     `json:"requests"`
	Interval *Duration `json:"interval,omitempty"` // (1s)
	Burst    *int32    `json:"burst,omitempty"`    // (as many as requests)
}

// Concurrency bounds the requests that an application has at once.
type Concurrency struct {
	MaxDelay *Duration `json:"maxDelay,omitempty"` // that requests may wait for one another (500ms)
	Min      *int32    `json:"min,omitempty"`      // always taken (32)
	Max      *int32    `json:"max,omitempty"`      // never more
}

// TrafficPolicyList is a list of them.
type TrafficPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []TrafficPolicy `json:"items"`
}
