package proxy

import (
	"math/rand/v2"
	"slices"
	"time"

	"assay.dev"
	"assay.dev/proxy/balance"
	"assay.dev/proxy/http1"
	"assay.dev/proxy/http2"
	"assay.dev/proxy/route"
)

// routed2 is what rules made of one request of HTTP/2.
type routed2 struct {
	decision
	plan    *http2.Plan
	mirrors []*mirror
	session route.HeadEdit
	local   bool // for the application here, of guests
}

// end ends what was about the request; r may be nil.
func (r *routed2) end() {
	if r != nil {
		for _, m := range r.mirrors {
			m.end()
		}
	}
}

// planned returns what a plan of ours is about, nil for none.
func planned(p *http2.Plan) *routed2 {
	if p == nil {
		return nil
	}
	return p.Own.(*routed2)
}

// Plan implements http2.Planner.
func (d *streams) Plan(x *http2.Exchange) *http2.Plan {
	d.mu.Lock()
	defer d.mu.Unlock()
	o := d.o
	if d.follow() != nil || o.rules == nil { // Dispatch says so
		return nil
	}
	q := x.Request
	r := &routed2{decision: o.decide(q.View())}
	p := &http2.Plan{Own: r}
	r.plan = p
	switch {
	case r.refused != nil:
		p.Failure = failure2(r.refused)
		return p
	case r.status != 0:
		p.Answer = &http2.Answer{Status: r.status, Fields: r.fields}
		return p
	}
	p.Response[1] = r.response
	e := r.backend.Edits
	if e == nil {
		return p
	}
	if !e.Response.IsZero() {
		p.Response[0] = &e.Response
	}
	for i := range e.Mirrors {
		m := &e.Mirrors[i]
		if q.Method == "CONNECT" || !m.Takes(rand.Uint64()) {
			continue
		}
		if started := o.mirror(m, assay.HTTP2); started != nil {
			r.mirrors = append(r.mirrors, started)
			p.Copy = r.copy
		}
	}
	p.Fields = q.Edited(e)
	return p
}

func (r *routed2) copy(b []byte, fin bool) {
	for _, m := range r.mirrors {
		m.write(b, fin)
	}
}

func failure2(f *http1.Failure) *http2.Failure {
	code := grpcUnavailable
	if f.Status == 404 {
		code = grpcUnimplemented // what a gRPC client takes a 404 for
	}
	return &http2.Failure{Status: f.Status, Code: code, Reason: f.Reason, Text: f.Text}
}

const grpcUnimplemented = 12

// aimed points a request at its backend; d.mu is held.
func (d *streams) aimed(r *routed2, w *way) error {
	o, b := d.o, r.backend
	sp := o.snap.backend(b.Service, b.Port)
	if sp == nil { // it went a moment ago
		return failure2(o.gone(&r.decision))
	}
	w.port, w.set, w.direct = sp, sp.endpoints(o.dst.Addr()), nil
	if w.set.Len() == 0 {
		return o.nobody(sp)
	}
	w.sticky = r.kept(o, sp, b)
	if r.rule.Session != nil {
		w.chosen = r.chosen
	}
	at := *o
	at.target = w.target
	h := at.header(assay.HTTP2)
	h.Port = sp.port
	w.header = h.AppendTo(make([]byte, 0, maxHeader))
	return nil
}

// chosen has a client hear whom it is to come back to.
func (r *routed2) chosen(e *balance.Endpoint) {
	r.plan.Response[2] = nil
	if r.keeps(e, &r.session) {
		r.plan.Response[2] = &r.session
	}
}

// pick chooses an endpoint.
func (w *way) pick() *balance.Endpoint {
	if e := w.sticky; e != nil && !slices.Contains(w.tried, e) {
		return e
	}
	return w.set.Pick(time.Now(), w.tried)
}
