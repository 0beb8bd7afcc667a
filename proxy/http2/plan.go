package http2

import (
	"strings"

	"assay.dev"
	"assay.dev/proxy/mux"
	"assay.dev/proxy/route"
)

// Planner is a Dispatcher that may have requests changed or answered on their way.
type Planner interface {
	// Plan is asked once for each request, before the first Dispatch; x.Request is valid
	// until it returns. nil changes nothing. It may not wait. The engine uses the plan until
	// End, and Dispatch may add to it before it opens anything.
	Plan(x *Exchange) *Plan
}

// Plan is what becomes of one request.
type Plan struct {
	// Fields go on in place of the request's own head; nil: as it came.
	Fields []Field
	// Answer, or Failure, is given to the client instead of a dispatch; nil: it is not.
	Answer  *Answer
	Failure *Failure
	// Response are changes of the final response's head, in order; nil ones change nothing.
	Response [3]*route.HeadEdit
	// Copy is given the request as it goes on, each byte once; nil: there is none. It must
	// not wait. After a request that is not sent to its end there is no call with fin: End
	// tells.
	Copy func(p []byte, fin bool)
	// Own is the planner's.
	Own any
}

// Answer is a response of our own that is no failure. It has no body.
type Answer struct {
	Status int
	Fields []assay.HeaderField
}

// plan asks for a plan and does what it says; conn.mu is held. It reports whether the
// request goes on.
func (x *stream) plan() bool {
	p, ok := x.c.d.(Planner)
	if !ok {
		return true
	}
	x.Plan = p.Plan(&x.Exchange)
	switch p := x.Plan; {
	case p == nil:
		return true
	case p.Failure != nil:
		x.fail(p.Failure)
		return false
	case p.Answer != nil:
		x.resetMesh(mux.Cancelled)
		x.Status = p.Answer.Status
		fields := []Field{{Name: ":status", Value: status(p.Answer.Status)}}
		for _, f := range p.Answer.Fields {
			fields = append(fields, Field{Name: strings.ToLower(f.Name), Value: f.Value})
		}
		x.c.appendFields(x.id, fields, nil, true)
		x.close()
		return false
	case p.Fields != nil:
		x.rehead(p.Fields)
	}
	x.copyOut(x.up.b, x.upFin)
	return true
}

// copyOut gives what goes on to the plan's copy.
func (x *stream) copyOut(p []byte, fin bool) {
	if x.Plan != nil && x.Plan.Copy != nil {
		x.Plan.Copy(p, fin)
	}
}

// rehead replaces the head that is kept.
func (x *stream) rehead(fields []Field) {
	_, n := parseBlock(x.up.b)
	up := buffer{of: x.c}
	up.appendFields(blockHead, fields)
	up.append(x.up.b[blockHeader+n:])
	x.up.release()
	x.up = up
}
