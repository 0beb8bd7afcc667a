package http1

import (
	"fmt"
	"time"

	"assay.dev/proxy/mux"
)

// exchange is the handler of the stream that carries one request: the session's
// reader frames the response and writes it into the application's socket.
//
// client.mu guards it. It may be held while a stream is written or reset: the other
// end of a pipe never holds its own lock while it calls here.
type exchange struct {
	Exchange
	c  *client
	st stream
	p  *pipe // st's, kept for the next exchange; nil when c is not direct

	opened  bool // st is known
	bound   bool // st carries the following requests, too
	ending  bool // the client's connection ends with the request, and nobody behind it knows
	gotFin  bool
	sentFin bool
	owed    int // bytes consumed before st was known

	reply    reply
	passed   bool // a part of the final response was passed on
	tunnel   bool
	keep     bool // both sides let the connection live
	reqDone  bool
	respDone bool
	shut     bool // the other end knows that the client half-closed
	ended    bool
	failed   bool // the stream was reset with code, or given up for fault or another try
	code     mux.Code
	fault    *Failure      // why we gave it up; nil: code says
	again    bool          // it was decided to try again, after wait
	wait     time.Duration //
	expires  time.Duration // when the whole exchange must be over; 0: never
	tryBy    time.Duration // when the response must have begun; 0: never
	gone     bool          // nobody waits for this stream any more
	reported bool
}

// nextRequest prepares a bound exchange for the next request on its stream.
func (x *exchange) nextRequest() {
	x.Exchange = Exchange{Tag: x.Tag}
	x.reply = reply{}
	x.passed, x.keep = false, false
	x.expires, x.tryBy = 0, 0
	x.reqDone, x.respDone, x.ended, x.reported = false, false, false, false
}

// Received takes bytes of the response.
func (x *exchange) Received(_ mux.Stream, p []byte, fin bool) {
	x.c.mu.Lock()
	defer x.c.mu.Unlock()
	x.gotFin = x.gotFin || fin
	switch {
	case x.gone || x.c.dead || x.respDone && !x.bound:
		x.consumed(len(p))
		if len(p) > 0 && !x.gone && x.respDone {
			x.unasked()
		}
	case x.respDone:
		// Between the requests of a bound stream: the application closed, or said
		// something that nobody asked for.
		x.consumed(len(p))
		x.gone = true
		x.c.shutdown()
		x.c.kick()
		if !fin {
			x.st.reset(mux.BadRequest)
		}
	default:
		x.receive(p, fin)
	}
}

// receive frames p, passes on what belongs to the response, and ends it.
func (x *exchange) receive(p []byte, fin bool) {
	c, r := x.c, &x.reply
	size := len(p)
	p = r.take(p)
	if r.own {
		x.consumed(size)
	}
	tunnel := x.tunnel
	end, refusal := r.frame(p, &c.req, &c.lim)
	if r.inBody && !tunnel {
		x.Status = r.resp.Status
		if refusal == nil && x.tryStatus() {
			return
		}
		if r.body.Framing == Tunnel {
			if refusal == nil {
				refusal = r.tunnel(&c.req, x.reqDone)
			}
			x.tunnel, x.Tunnel = true, true
			c.w.unbound()
			x.reqDone = false // the request's direction is the tunnel's now
			c.kick()
		}
	}
	if refusal != nil {
		x.bad(refusal)
		return
	}
	if end > 0 {
		if r.whole() && !x.keepable() {
			c.w.hold()
			defer c.w.push()
		}
		n, err := 0, error(nil)
		if r.headDone && (x.Plan.edits() || x.endUnsaid()) {
			n, err = x.writeEdited(p[:end])
		} else {
			n, err = c.w.write(p[:end])
		}
		if err != nil {
			c.dead = true
			c.kick()
			return
		}
		x.ResponseBytes += int64(end)
		x.passed = r.inBody
		if !r.own {
			x.consumed(n)
		}
	}
	whole := r.whole()
	if whole && end < len(p) {
		x.unasked()
	}
	x.consumed(r.keep(p, end))
	x.finish(whole, fin)
	c.settle(x)
}

// finish notes the end of the response.
func (x *exchange) finish(whole, fin bool) {
	switch {
	case whole:
		x.keep = x.keepable() && !(x.bound && fin)
	case !fin:
		return
	case !x.reply.inBody:
		// The application closed without an answer. So do we: a client that may
		// repeat its request knows what that means.
		x.Failure = x.blame(failNoResponse)
	case x.reply.body.Framing == Length || x.reply.body.Framing == Chunks:
		x.Failure = x.blame(failTruncated)
	case x.tunnel:
		x.c.w.shutdown()
	}
	x.respDone = true
}

// blame returns whose fault it is that the application ended the connection.
func (x *exchange) blame(reason string) string {
	if x.shut {
		return ClientGone // it half-closed first
	}
	return reason
}

func (x *exchange) keepable() bool {
	return x.Failure == "" && x.reply.resp.Persistent(&x.c.req)
}

// unasked ends the stream and the connection after a response that was followed by
// bytes which belong to no request: the far end and we disagree on where it ended.
func (x *exchange) unasked() {
	x.Failure = failUnasked
	x.keep, x.gone = false, true
	if x.opened {
		x.st.reset(mux.BadRequest)
	}
}

// bad refuses a response.
func (x *exchange) bad(why *Refusal) {
	c := x.c
	x.Failure, x.Refused, x.gone = why.Reason, true, true
	if x.opened {
		x.st.reset(mux.BadRequest)
	}
	if x.passed {
		c.report(x)
		c.abort()
		return
	}
	x.Status = 502
	c.answer(x.Status, why.Reason, "the application's response was refused: "+why.Error(), true)
	x.keep, x.respDone = false, true
	c.settle(x)
}

// Reset is the end of the stream.
func (x *exchange) Reset(_ mux.Stream, code mux.Code) {
	c := x.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if x.gone {
		return
	}
	x.gotFin, x.sentFin = true, true
	switch {
	case x.respDone && x.reqDone && x.bound:
		// Idle, and the application is gone.
		x.gone = true
		c.abort()
	case x.respDone:
		// It answered and then stopped reading the request.
		x.gone, x.keep = true, false
		c.settle(x)
	case x.passed:
		x.gone, x.Failure = true, failureOf(code).Reason
		if code == mux.AppReset {
			x.Failure = x.blame(x.Failure)
		}
		c.report(x)
		c.abort()
	default:
		x.gone, x.failed, x.code = true, true, code
		c.kick()
	}
}

// stalled gives up an upstream that takes nothing.
func (x *exchange) stalled() {
	x.c.mu.Lock()
	st, stop := x.st, x.gone || x.tunnel
	x.c.mu.Unlock()
	if !stop {
		st.reset(mux.Cancelled)
		x.Reset(mux.Stream{}, mux.Stalled)
	}
}

// Writable lets the goroutine send more.
func (x *exchange) Writable(mux.Stream) { x.c.signal() }

// consumed gives credit for n bytes, at once or when the stream is known.
func (x *exchange) consumed(n int) {
	switch {
	case n == 0 || x.gotFin:
	case x.opened:
		x.st.consumed(n)
	default:
		x.owed += n
	}
}

// flushed follows bytes that were queued and have left.
func (c *client) flushed(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.w.failed() != nil && !c.dead {
		c.dead = true
		c.kick()
	}
	if x := c.x; x != nil {
		x.consumed(n)
		c.settle(x)
	}
}

// halfClose passes on that the application half-closed after its last request, which
// is what a client does that does not want to wait any longer: servers that look for
// it stop working.
func (c *client) halfClose(x *exchange) {
	if !c.eof || x.shut || !x.opened || !x.reqDone || x.respDone || x.gone || x.failed || c.in != nil && len(c.in.b) > c.sent {
		return
	}
	x.shut = true
	if !x.bound {
		x.st.shut()
	} else if !x.sentFin {
		x.sentFin = true
		x.st.tryWrite(nil, true)
	}
}

// settle ends the exchange once everything about it has happened.
func (c *client) settle(x *exchange) {
	if x.ended || !x.respDone || !x.opened || c.dead || !c.w.empty() {
		return
	}
	if !x.reqDone {
		if !x.keep && !x.tunnel {
			// An early answer, and the application reads no more: close in time for
			// the client to see it. The goroutine ends the stream.
			c.shutdown()
			c.kick()
		}
		return
	}
	if !x.sentFin && !x.bound && !x.gone {
		x.st.tryWrite(nil, true) // it could have become a tunnel
		x.sentFin = true
	}
	c.finishExchange(x)
}

// finishExchange makes room for the next request, or shuts down.
func (c *client) finishExchange(x *exchange) {
	x.ended = true
	c.report(x)
	c.dropSentLocked()
	if c.draining && c.give == nil || c.eof && c.in == nil {
		x.keep = false
	}
	if !x.keep {
		c.shutdown()
	}
	if c.waiting {
		c.signal()
	}
}

// report tells the observer that the exchange is over, but not while Dispatch still
// runs: whoever waited for that reports it.
func (c *client) report(x *exchange) {
	if x.reported || !x.opened {
		return
	}
	x.reported = true
	x.Duration = now() - x.Start
	if c.observer != nil {
		c.observer.End(&x.Exchange)
	}
}

// drop gives the exchange up. why is "" when it was answered.
func (c *client) drop(x *exchange, why string) {
	if x.Failure == "" {
		x.Failure = why
	}
	if x.opened && !x.gone {
		x.st.reset(mux.Cancelled)
	}
	x.gone = true
	c.report(x)
}

// fail tells the application that there is no response.
func (c *client) fail(x *exchange, f *Failure) {
	c.mu.Lock()
	defer c.mu.Unlock()
	x.gone, x.opened, x.failed = true, true, false
	x.gotFin, x.sentFin = false, false // not to be used again
	x.Failure = f.Reason
	if f == failAppReset {
		x.Failure = x.blame(f.Reason)
	}
	if f.Reset {
		c.report(x)
		c.abort()
		return
	}
	x.Status = f.Status
	x.keep = x.reqDone && c.req.Persistent() && !x.bound
	c.w.write(answer(f.Status, f.Reason, f.Text, !x.keep, c.req.IsHead, f.RetryAfter))
	x.respDone = true
	c.settle(x)
}

// refuse answers a request that is not carried at all.
func (c *client) refuse(why *Refusal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	x := &exchange{c: c, gone: true, opened: true, reqDone: true, respDone: true}
	x.Start, x.Status, x.Failure, x.Refused = now(), why.Status, why.Reason, true
	if c.in != nil {
		x.RequestBytes = int64(len(c.in.b))
	}
	o := c.observer
	if c.direct != nil {
		o = c.origin.Observer
	}
	if o != nil {
		o.Begin(&x.Exchange)
		o.End(&x.Exchange)
	}
	c.answer(why.Status, why.Reason, "the request was refused: "+why.Error()+". It is never repaired: send it as that section says", true)
	c.shutdown()
}

// refuseBody ends a request whose body turned out to be malformed.
func (c *client) refuseBody(x *exchange, why *Refusal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if x.opened && !x.gone {
		x.st.reset(mux.Cancelled)
	}
	x.gone, x.Failure, x.Refused = true, why.Reason, true
	if x.passed {
		c.report(x)
		c.abort()
		return
	}
	x.Status, x.reqDone = why.Status, true
	c.answer(why.Status, why.Reason, "the request was refused: "+why.Error()+". It is never repaired: send it as that section says", true)
	x.keep, x.respDone = false, true
	c.settle(x)
	c.shutdown()
}

// answer writes a response of our own.
func (c *client) answer(status int, reason, text string, last bool) {
	c.w.write(answer(status, reason, text, last, c.req.IsHead, 0))
}

// answer makes a response that names what was refused, why, and what would allow it,
// after so many seconds perhaps.
func answer(status int, reason, text string, last, head bool, after int) []byte {
	body := "assay: " + text + "\n"
	b := fmt.Appendf(nil, "HTTP/1.1 %d %s\r\nDate: %s\r\nAssay-Error: %s\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: %d\r\n",
		status, statusText(status), time.Now().UTC().Format("Mon, 02 Jan 2006 15:04:05 GMT"), reason, len(body))
	if after > 0 {
		b = fmt.Appendf(b, "Retry-After: %d\r\n", after)
	}
	if last {
		b = append(b, "Connection: close\r\n"...)
	}
	b = append(b, "\r\n"...)
	if head {
		return b
	}
	return append(b, body...)
}

func statusText(status int) string {
	switch status {
	case 200:
		return "OK"
	case 204:
		return "No Content"
	case 301:
		return "Moved Permanently"
	case 302:
		return "Found"
	case 303:
		return "See Other"
	case 307:
		return "Temporary Redirect"
	case 308:
		return "Permanent Redirect"
	case 400:
		return "Bad Request"
	case 403:
		return "Forbidden"
	case 404:
		return "Not Found"
	case 408:
		return "Request Timeout"
	case 413:
		return "Content Too Large"
	case 414:
		return "URI Too Long"
	case 429:
		return "Too Many Requests"
	case 417:
		return "Expectation Failed"
	case 431:
		return "Request Header Fields Too Large"
	case 500:
		return "Internal Server Error"
	case 501:
		return "Not Implemented"
	case 502:
		return "Bad Gateway"
	case 503:
		return "Service Unavailable"
	case 504:
		return "Gateway Timeout"
	case 505:
		return "HTTP Version Not Supported"
	}
	return "Refused"
}
