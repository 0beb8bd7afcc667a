package http1

import (
	"fmt"
	"time"

	"assay.dev"
	"assay.dev/proxy/route"
)

// Planner is a Dispatcher that may have requests changed, copied or answered on their
// way. Without a plan every byte goes on as it came, and the only cost is the question.
type Planner interface {
	// Plan is asked once for each request, before the first Dispatch. head is the
	// request's whole head; it and x.Request are valid until Plan returns. nil changes
	// nothing. The engine uses the plan until End, and Dispatch may still add to it.
	Plan(x *Exchange, head []byte) *Plan
}

// Plan is what becomes of one request.
type Plan struct {
	// Head goes on in place of the request's own head; nil: as it came. It must frame the
	// same body.
	Head []byte
	// Answer, or Failure, is given to the client instead of a dispatch; nil: it is not.
	Answer  *Answer
	Failure *Failure
	// Response are changes of the final response's head, in order; nil ones change nothing.
	Response [3]*route.HeadEdit
	// Copy is given the request as it goes on, its head first, while it is sent for the
	// first time; nil: there is none. It must not wait. After a request that is not sent to
	// its end there is no call with fin: End tells.
	Copy func(p []byte, fin bool)
	// Local says that the application here is the upstream (Inbound.ServeRouted): there is
	// no dispatch.
	Local bool
}

// Answer is a response of our own that is no failure. It has no body.
type Answer struct {
	Status int
	Fields []assay.HeaderField
}

// edits reports whether the response's head changes.
func (p *Plan) edits() bool {
	return p != nil && (p.Response[0] != nil || p.Response[1] != nil || p.Response[2] != nil)
}

// plan asks for a plan. It returns the first bytes as they go on; held is to be released
// when the exchange is over.
func (c *client) plan(x *exchange, data []byte) (_ []byte, held *buffer) {
	head := c.req.Size
	goes := data[:head]
	x.ending = c.req.ends() && !x.bound
	if c.planner != nil {
		x.Request = &c.req
		p := c.planner.Plan(&x.Exchange, goes)
		c.mu.Lock()
		x.Plan = p
		c.mu.Unlock()
		if p != nil && p.Head != nil {
			goes = p.Head
		} else if !x.ending {
			return data, nil
		}
	} else if !x.ending {
		return data, nil
	}
	held = bufferFor(len(goes) + len(data) - head)
	if x.ending {
		h := NewHead(goes, len(goes))
		held.b = h.AppendRequest(held.b, nil, nil, &unsaid)
	} else {
		held.b = append(held.b, goes...)
	}
	held.b = append(held.b, data[head:]...)
	return held.b, held
}

// unsaid takes away what a request says of the client's connection, and said says in its
// response that that ends now.
var (
	unsaid = route.HeadEdit{Drop: []string{"connection"}}
	said   = route.HeadEdit{Drop: []string{"connection", "keep-alive"}, Append: []assay.HeaderField{{Name: "Connection", Value: "close"}}}
)

// planned answers a request whose plan does. It reports whether it did.
func (c *client) planned(x *exchange) bool {
	p := x.Plan
	switch {
	case p == nil:
		return false
	case p.Failure != nil:
		c.fail(x, p.Failure)
		return true
	case p.Answer == nil:
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	x.gone, x.opened, x.failed = true, true, false
	x.gotFin, x.sentFin = false, false // not to be used again
	x.Status = p.Answer.Status
	x.keep = x.reqDone && c.req.Persistent() && !x.bound
	b := p.Answer.append(nil, !x.keep)
	x.ResponseBytes = int64(len(b))
	c.w.write(b)
	x.respDone = true
	c.settle(x)
	return true
}

func (a *Answer) append(b []byte, last bool) []byte {
	b = fmt.Appendf(b, "HTTP/1.1 %d %s\r\nDate: %s\r\n", a.Status, statusText(a.Status), time.Now().UTC().Format("Mon, 02 Jan 2006 15:04:05 GMT"))
	for _, f := range a.Fields {
		b = append(append(append(append(b, f.Name...), ": "...), f.Value...), "\r\n"...)
	}
	if a.Status != 204 {
		b = append(b, "Content-Length: 0\r\n"...)
	}
	if last {
		b = append(b, "Connection: close\r\n"...)
	}
	return append(b, "\r\n"...)
}

// copyOut gives what is sent to the plan's copy, each byte once: what goes beyond the
// first bytes is never sent again.
func (x *exchange) copyOut(p []byte, fin bool) {
	if x.Plan != nil && x.Plan.Copy != nil && !x.bound && !x.c.req.Upgrade && !x.c.req.IsConnect {
		x.Plan.Copy(p, fin)
	}
}

// endUnsaid reports whether the response must be made to say that the client's connection
// ends: its application was not told.
func (x *exchange) endUnsaid() bool { return x.ending && !x.reply.resp.Close }

// writeEdited writes p, in which the final response's head is complete, with that head
// changed. It returns how many bytes of p the kernel has, as far as that can be said:
// what a change adds or takes is acknowledged with the rest.
func (x *exchange) writeEdited(p []byte) (int, error) {
	r := &x.reply
	head := Head{p[r.headAt : r.headAt+r.resp.Size]}
	out := bufferFor(len(p) + 1024)
	out.b = append(out.b, p[:r.headAt]...)
	var edits [4]*route.HeadEdit
	if x.Plan != nil {
		copy(edits[:], x.Plan.Response[:])
	}
	if x.endUnsaid() {
		edits[3] = &said
	}
	out.b = head.AppendResponse(out.b, edits[:]...)
	out.b = append(out.b, p[r.headAt+r.resp.Size:]...)
	n, err := x.c.w.write(out.b)
	more := len(out.b) - n // queued: flushed acknowledges as much
	out.release()
	return max(0, len(p)-more), err
}
