package proxy

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"assay.dev"
	"assay.dev/proxy/balance"
	"assay.dev/proxy/http1"
	"assay.dev/proxy/route"
)

// decision is what rules say of one request, whatever it came in: it is refused, or
// answered with status, or it goes to backend.
type decision struct {
	rule     *route.Rule
	refused  *http1.Failure
	status   int
	fields   []assay.HeaderField // of the answer
	backend  *route.Backend
	token    route.Token     // that the client brought, and somebody has
	response *route.HeadEdit // CORS
}

// decide follows the rule that takes the request.
func (o *outbound) decide(v *route.View) (d decision) {
	d.rule = o.rules.Match(v)
	if d.rule == nil {
		d.refused = o.refused(404, refusedNoRule, "no rule of the routes of service "+o.port.service+" takes the request; one whose match it meets would")
		return d
	}
	if c := d.rule.CORS; c != nil {
		if fields, ok := c.Preflight(v); ok {
			d.status, d.fields = 204, fields
			return d
		}
		d.response = c.Response(v)
	}
	switch {
	case d.rule.Refuse != "":
		d.refused = o.refused(500, refusedRule, d.about("cannot be followed: "+d.rule.Refuse))
		return d
	case d.rule.Redirect != nil:
		to := d.rule.Redirect
		d.status = to.Status
		d.fields = []assay.HeaderField{{Name: "Location", Value: string(route.AppendLocation(nil, to, v, "http", o.port.port))}}
		return d
	}
	if d.rule.Session != nil {
		d.resume(o, v)
	}
	if d.backend == nil {
		d.backend = d.rule.Pick(rand.Uint64())
	}
	switch b := d.backend; {
	case b == nil:
		d.refused = o.refused(500, refusedRule, d.about("has no backend with a weight over 0"))
	case b.Invalid != "":
		d.refused = o.refused(500, refusedRule, d.about("sends the request to a backend that cannot be used: "+b.Invalid))
	}
	return d
}

func (d *decision) about(text string) string {
	return fmt.Sprintf("rule %d of %s %s; see assay describe of it", d.rule.Index, d.rule.Route, text)
}

// refused counts a request that rules refuse.
func (o *outbound) refused(status int, reason, text string) *http1.Failure {
	o.p.rec.Refusals.Inc(reason)
	o.log(&refusal{reason, errors.New(text)}, text)
	return &http1.Failure{Status: status, Reason: reason, Text: text}
}

// gone refuses a request whose backend went a moment ago.
func (o *outbound) gone(d *decision) *http1.Failure {
	return o.refused(500, refusedRule, d.about(fmt.Sprintf("sends the request to %s:%d, which is not there any more", d.backend.Service, d.backend.Port)))
}

// resume finds the endpoint that the client was kept at.
func (d *decision) resume(o *outbound, v *route.View) {
	d.token = d.rule.Session.Token(v, time.Now())
	if d.token == 0 {
		return
	}
	for i := range d.rule.Backends {
		b := &d.rule.Backends[i]
		if b.Weight == 0 || b.Invalid != "" {
			continue
		}
		if d.kept(o, o.snap.backend(b.Service, b.Port), b) != nil {
			d.backend = b
			return
		}
	}
	d.token = 0 // nobody has it any more
}

// kept returns the endpoint of a backend that the client's token names.
func (d *decision) kept(o *outbound, sp *servicePort, b *route.Backend) *balance.Endpoint {
	if sp == nil || d.token == 0 {
		return nil
	}
	for _, e := range sp.endpoints(o.dst.Addr()).Endpoints() {
		if route.TokenOf(b, e.Workload) == d.token {
			return e
		}
	}
	return nil
}

// keeps reports whether the client is to be told to come back to e, and how.
func (d *decision) keeps(e *balance.Endpoint, with *route.HeadEdit) bool {
	if d.rule == nil || d.rule.Session == nil || d.backend == nil {
		return false
	}
	token := route.TokenOf(d.backend, e.Workload)
	if token == d.token {
		return false
	}
	*with = route.HeadEdit{Append: []assay.HeaderField{d.rule.Session.Field(token, time.Now())}}
	return true
}
