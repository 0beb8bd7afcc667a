package proxy

import (
	"math/rand/v2"
	"slices"
	"time"

	"assay.dev"
	"assay.dev/proxy/balance"
	"assay.dev/proxy/golden"
	"assay.dev/proxy/http1"
	"assay.dev/proxy/route"
)

// routed is what a dispatcher needs for requests to a port with routes: which rule took
// the request, and where it goes. Without routes there is none.
type routed struct {
	d         *dispatcher
	dialled   target // what the application dialled
	payloadOf *servicePort
	answered  *golden.Series // of requests that a rule answers by itself

	// Of the request.
	decision
	plan    http1.Plan
	mirrors []*mirror
	session route.HeadEdit

	view   route.View
	head   http1.Head
	edited []byte
	target []byte
}

// Plan implements http1.Planner.
func (d *dispatcher) Plan(x *http1.Exchange, head []byte) *http1.Plan {
	o := d.o
	if r := d.routed; r != nil {
		r.forget()
	}
	if d.follow() != nil { // Dispatch says so
		return nil
	}
	if o.rules == nil {
		return nil
	}
	r := d.routed
	if r == nil {
		r = &routed{d: d, dialled: o.target}
		d.routed = r
		o.chosen = r.chosen
	}
	return r.decide(x.Request, head)
}

// forget ends what was about the last request.
func (r *routed) forget() {
	for _, m := range r.mirrors {
		m.end()
	}
	r.decision, r.plan, r.mirrors = decision{}, http1.Plan{}, nil
}

// decide follows the rule that takes the request.
func (r *routed) decide(req *http1.Request, head []byte) *http1.Plan {
	o, p, v := r.d.o, &r.plan, &r.view
	r.head = http1.NewHead(head, len(head))
	v.Method, v.Authority, v.Fields = req.Method, req.Authority, &r.head
	v.Path, v.Query = req.Path()
	r.decision = o.decide(v)
	switch {
	case r.refused != nil:
		p.Failure = r.refused
		return p
	case r.status != 0:
		p.Answer = &http1.Answer{Status: r.status, Fields: r.fields}
		return p
	}
	p.Response[1] = r.response
	if e := r.backend.Edits; e != nil {
		r.edit(req, e)
	}
	return p
}

// edit notes what changes of the request and its response, and begins the copies.
func (r *routed) edit(req *http1.Request, e *route.Edits) {
	p := &r.plan
	if !e.Response.IsZero() {
		p.Response[0] = &e.Response
	}
	if e.Path != nil || e.Host != "" || !e.Request.IsZero() {
		var target, host []byte
		if e.Host != "" && !req.IsConnect { // whose target is its host
			host = []byte(e.Host)
		}
		if e.Path != nil || host != nil {
			r.target = req.AppendTarget(r.target[:0], host, e.Path)
			target = r.target
		}
		r.edited = r.head.AppendRequest(r.edited[:0], target, host, &e.Request)
		p.Head = r.edited
	}
	for i := range e.Mirrors {
		m := &e.Mirrors[i]
		if !m.Takes(rand.Uint64()) || req.Upgrade || req.IsConnect {
			continue
		}
		if started := r.d.o.mirror(m, assay.HTTP1); started != nil {
			r.mirrors = append(r.mirrors, started)
			p.Copy = r.copy
		}
	}
}

func (r *routed) copy(b []byte, fin bool) {
	for _, m := range r.mirrors {
		m.write(b, fin)
	}
}

// chosen is told the endpoint of the request before anything is sent there: a client that
// is to come back to it hears of it with the response.
func (r *routed) chosen(e *balance.Endpoint) {
	r.plan.Response[2] = nil
	if r.keeps(e, &r.session) {
		r.plan.Response[2] = &r.session
	}
}

// aim points the request at its backend.
func (d *dispatcher) aim() error {
	r, o := d.routed, d.o
	if r == nil {
		return nil
	}
	if b := r.backend; b != nil {
		sp := o.snap.backend(b.Service, b.Port)
		if sp == nil { // it went a moment ago
			return o.gone(&r.decision)
		}
		o.target = target{port: sp, set: sp.endpoints(o.dst.Addr())}
		if e := r.kept(o, sp, b); e != nil && !slices.Contains(o.tried, e) {
			o.sticky = e
		}
		if o.set.Len() == 0 {
			return d.failure(o.nobody(sp))
		}
	}
	if o.port != r.payloadOf || o.port == nil {
		h := o.header(assay.HTTP1)
		if o.rules != nil {
			h.Port = o.port.port
		}
		d.payload, r.payloadOf = h.AppendTo(d.payload[:0]), o.port
	}
	return nil
}

// end takes note of an exchange that ended. It reports whether that was all.
func (r *routed) end(x *http1.Exchange, now time.Time) bool {
	for _, m := range r.mirrors {
		m.end()
	}
	if r.plan.Answer == nil || x.Failure != "" {
		return false
	}
	if r.answered == nil {
		o := r.d.o
		o.target = r.dialled
		key := o.key()
		key.Reason = reasonRule
		r.answered = o.p.rec.Series(key)
	}
	r.answered.Begin()
	observe(r.answered, x, now, false)
	return true
}

// reasonRule is of requests that reached nobody because a rule answered them.
const reasonRule = "answered-by-rule"
