package proxy

import (
	"errors"
	"fmt"
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
	rule    *route.Rule
	backend *route.Backend // nil: what was dialled
	token   route.Token    // that the client brought
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
	r.rule, r.backend, r.token, r.plan, r.mirrors = nil, nil, 0, http1.Plan{}, nil
}

// decide follows the rule that takes the request.
func (r *routed) decide(req *http1.Request, head []byte) *http1.Plan {
	o, p, v := r.d.o, &r.plan, &r.view
	r.head = http1.NewHead(head, len(head))
	v.Method, v.Authority, v.Fields = req.Method, req.Authority, &r.head
	v.Path, v.Query = req.Path()
	r.rule = o.rules.Match(v)
	if r.rule == nil {
		return r.refuse(404, refusedNoRule, "no rule of the routes of service "+o.port.service+" takes the request; one whose match it meets would")
	}
	if c := r.rule.CORS; c != nil {
		if fields, ok := c.Preflight(v); ok {
			p.Answer = &http1.Answer{Status: 204, Fields: fields}
			return p
		}
		p.Response[1] = c.Response(v)
	}
	switch {
	case r.rule.Refuse != "":
		return r.refuse(500, refusedRule, r.about("cannot be followed: "+r.rule.Refuse))
	case r.rule.Redirect != nil:
		to := r.rule.Redirect
		p.Answer = &http1.Answer{Status: to.Status, Fields: []assay.HeaderField{
			{Name: "Location", Value: string(route.AppendLocation(nil, to, v, "http", o.port.port))},
		}}
		return p
	}
	if r.rule.Session != nil {
		r.resume()
	}
	if r.backend == nil {
		r.backend = r.rule.Pick(rand.Uint64())
	}
	switch b := r.backend; {
	case b == nil:
		return r.refuse(500, refusedRule, r.about("has no backend with a weight over 0"))
	case b.Invalid != "":
		return r.refuse(500, refusedRule, r.about("sends the request to a backend that cannot be used: "+b.Invalid))
	case b.Edits != nil:
		r.edit(req, b.Edits)
	}
	return p
}

func (r *routed) about(text string) string {
	return fmt.Sprintf("rule %d of %s %s; see assay describe of it", r.rule.Index, r.rule.Route, text)
}

func (r *routed) refuse(status int, reason, text string) *http1.Plan {
	o := r.d.o
	o.p.rec.Refusals.Inc(reason)
	o.log(&refusal{reason, errors.New(text)})
	r.plan.Failure = &http1.Failure{Status: status, Reason: reason, Text: text}
	return &r.plan
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
		if started := r.d.o.mirror(m); started != nil {
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

// resume finds the endpoint that the client was kept at.
func (r *routed) resume() {
	o := r.d.o
	r.token = r.rule.Session.Token(&r.view, time.Now())
	if r.token == 0 {
		return
	}
	for i := range r.rule.Backends {
		b := &r.rule.Backends[i]
		if b.Weight == 0 || b.Invalid != "" {
			continue
		}
		if e := r.kept(o.snap.backend(b.Service, b.Port), b); e != nil {
			r.backend = b
			return
		}
	}
	r.token = 0 // nobody has it any more
}

// kept returns the endpoint of a backend that the client's token names.
func (r *routed) kept(sp *servicePort, b *route.Backend) *balance.Endpoint {
	if sp == nil || r.token == 0 {
		return nil
	}
	for _, e := range sp.endpoints(r.d.o.dst.Addr()).Endpoints() {
		if route.TokenOf(b, e.Workload) == r.token {
			return e
		}
	}
	return nil
}

// chosen is told the endpoint of the request before anything is sent there: a client that
// is to come back to it hears of it with the response.
func (r *routed) chosen(e *balance.Endpoint) {
	r.plan.Response[2] = nil
	if r.rule == nil || r.rule.Session == nil || r.backend == nil {
		return
	}
	token := route.TokenOf(r.backend, e.Workload)
	if token == r.token {
		return
	}
	r.session = route.HeadEdit{Append: []assay.HeaderField{r.rule.Session.Field(token, time.Now())}}
	r.plan.Response[2] = &r.session
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
			return r.refuse(500, refusedRule, r.about(fmt.Sprintf("sends the request to %s:%d, which is not there any more", b.Service, b.Port))).Failure
		}
		o.target = target{port: sp, set: sp.endpoints(o.dst.Addr())}
		if e := r.kept(sp, b); e != nil && !slices.Contains(o.tried, e) {
			o.sticky = e
		}
		if o.set.Len() == 0 {
			return d.failure(&refusal{refusedNoEndpoint, errors.New("service " + b.Service + " has none")})
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
