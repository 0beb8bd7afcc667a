package route

import (
	"time"

	"assay.dev"
	"assay.dev/proxy/guard"
)

// Rule is what becomes of the requests that it takes. Exactly one of these holds: Refuse
// is set (answer 500), Redirect is set (answer with Location), or Pick says where they go.
type Rule struct {
	Route    string // assay.Route.Key, for people
	Index    int    // of the rule in the route
	Name     string
	Refuse   string // why it can only answer 500
	Redirect *assay.Redirect
	CORS     *CORS
	Backends []Backend      // at least one, without a redirect
	Request  *guard.Request // limits and retries, to be laid over the service's; nil: it says nothing
	Session  *Session

	weight uint64 // sum of all
}

// Backend is one place where requests go.
type Backend struct {
	Service string // its key
	Port    uint16
	Invalid string // why its share is answered 500
	Weight  uint32
	Edits   *Edits // the rule's, then its own; nil when nothing changes

	upTo uint64 // sum of the weights up to and with this one
}

func newRule(r *assay.Route, index int, service string, port uint16) *Rule {
	in := &r.Rules[index]
	if r.Kind != assay.TLSRoute {
		// Control sends none that is not sound. Should one come, nothing of it is written
		// into a message.
		if err := in.Validate(); err != nil {
			return &Rule{Route: r.Key(), Index: index, Name: in.Name, Refuse: "the proxy cannot follow it: " + err.Error()}
		}
	}
	out := &Rule{
		Route: r.Key(), Index: index, Name: in.Name, Refuse: in.Refuse, Redirect: in.Redirect,
		CORS: newCORS(in.CORS), Request: newRequest(in), Session: newSession(in),
	}
	backends := in.Backends
	if len(backends) == 0 && in.Redirect == nil {
		backends = []assay.RouteBackend{{Service: service, Port: port, Weight: 1}}
	}
	for i := range backends {
		b := &backends[i]
		out.weight += uint64(b.Weight)
		out.Backends = append(out.Backends, Backend{
			Service: b.Service, Port: b.Port, Invalid: b.Invalid, Weight: b.Weight,
			Edits: newEdits(&in.RouteEdits, &b.RouteEdits), upTo: out.weight,
		})
	}
	return out
}

// newRequest is what a rule says of limits and retries; nil when it says nothing. A zero
// timeout is none at all, whatever the service has.
func newRequest(in *assay.RouteRule) *guard.Request {
	if in.Timeouts == (assay.RouteTimeouts{}) && in.Retry == nil {
		return nil
	}
	bound := func(d *time.Duration) time.Duration {
		switch {
		case d == nil:
			return 0
		case *d == 0:
			return -1
		}
		return *d
	}
	out := &guard.Request{Timeout: bound(in.Timeouts.Request), TryTimeout: bound(in.Timeouts.Backend)}
	if t := in.Retry; t != nil {
		out.Retry.Codes = t.Codes
		if t.Attempts != nil {
			out.Retry.Attempts = *t.Attempts
		}
		if t.Backoff != nil {
			out.Retry.Backoff = *t.Backoff
		}
	}
	return out
}

// Pick returns the backend for a random number, nil when none has weight: then the
// request is answered 500. The share of each is its weight over the sum of all, to
// within the grain of 64 bits.
func (r *Rule) Pick(random uint64) *Backend {
	if r.weight == 0 {
		return nil
	}
	if len(r.Backends) == 1 {
		return &r.Backends[0]
	}
	n := random % r.weight
	for i := range r.Backends {
		if b := &r.Backends[i]; n < b.upTo {
			return b
		}
	}
	return nil
}
