package http1

import (
	"sync"
	"time"

	"assay.dev/proxy/mux"
	"assay.dev/proxy/route"
)

// served is the handler of one stream from a peer: one request, or, once the client
// connection authenticated itself, all that follow. The session's reader writes the
// request into the application's socket; the connection's goroutine writes the
// response into the stream.
//
// mu guards it, and is never held while the stream is written or reset: within the
// process that calls the other end.
type served struct {
	Exchange
	in     *Inbound
	origin Origin
	st     stream
	wake   chan struct{} // for the connection's goroutine, while the stream has no credit

	mu     sync.Mutex
	b      *backend
	req    Request
	held   *buffer // of a head in pieces
	inBody bool
	body   Body
	reply  reply

	bound    bool
	reused   bool    // b has served before
	replay   *buffer // the request, when it may be sent again
	tunnel   bool
	reqDone  bool
	respDone bool
	passed   bool // a part of the response is on its way
	gotFin   bool
	shut     bool          // the client half-closed
	left     time.Duration // how long after its request; 0: it did not, or with it
	sentFin  bool
	dead     bool   // the stream or the application is gone; what still comes is dropped
	waits    bool   // for the stream, to write
	moved    uint32 // tick of the last byte in either direction
	headless bool   // it is in in.heads
	part     int    // bytes of its head that are counted there; in.mu guards it
	writing  bool   // somebody writes the stream: it must not be pooled
	reported bool
	admitted bool // the guard was not told of an answer yet
}

// done reports whether nobody will call or look at x again; then x is as good as new,
// and the caller gives it back to the pool when it has unlocked mu. Only a late
// flushed may still come: it finds nothing to do, or credits what mux bounds.
func (x *served) done() bool {
	if !x.gotFin || !x.sentFin || !x.respDone || x.b != nil || x.writing || x.dead {
		return false
	}
	x.replay.release()
	x.held.release()
	x.Exchange, x.origin, x.st = Exchange{}, Origin{}, stream{}
	x.req, x.body, x.reply = Request{}, Body{}, reply{}
	x.b, x.held, x.replay = nil, nil, nil
	x.inBody, x.bound, x.reused, x.tunnel, x.reported = false, false, false, false, false
	x.reqDone, x.respDone, x.passed, x.gotFin, x.sentFin, x.shut = false, false, false, false, false, false
	x.waits, x.moved, x.left = false, 0, 0
	select {
	case <-x.wake:
	default:
	}
	return true
}

func (x *served) pool() { x.in.served.Put(x) }

// Received takes bytes of the request.
func (x *served) Received(_ mux.Stream, p []byte, fin bool) {
	x.mu.Lock()
	x.gotFin = x.gotFin || fin
	code := x.receive(p, fin)
	done := x.done()
	x.mu.Unlock()
	if code != 0 {
		x.st.reset(code)
		x.signal()
	}
	if done {
		x.pool()
	}
}

// receive frames p and gives the application what belongs to the request.
func (x *served) receive(p []byte, fin bool) mux.Code {
	if x.dead || x.respDone && x.b == nil {
		x.consumed(len(p)) // answered already, and nobody reads more
		return 0
	}
	if x.bound && x.respDone && x.reqDone && len(p) > 0 {
		x.nextRequest()
	}
	x.moved = x.in.tick.Load()
	lim := &x.in.cfg.Limits
	own, came := x.held != nil, len(p)
	if own {
		x.consumed(len(p))
		x.held = held(x.held, p)
		p = x.held.b
	}
	end := 0
	edited := false // the head, which is at the beginning of p
	switch {
	case x.tunnel:
		end = len(p)
	case len(p) == 0:
	default:
		if !x.inBody {
			ok, refusal := x.req.Parse(p, lim)
			if refusal != nil {
				return x.refuse(refusal)
			}
			if !ok {
				if !own {
					x.held = held(nil, p)
					x.consumed(len(p))
				}
				if !x.in.expectHead(x, came) {
					x.refuse(ErrHeadLong)
					return mux.Overloaded
				}
				break
			}
			x.headOver()
			x.inBody, x.body, end = true, x.req.Body(lim), x.req.Size
			if x.origin.Edit != nil {
				if x.req.IsConnect {
					return x.refuse(ErrMethod)
				}
				edited, x.body.edit = true, x.origin.Edit
			}
			if code := x.begin(); code != 0 {
				x.lose()
				x.dead = true
				return code
			}
		}
		n, refusal := x.body.Advance(p[end:])
		if refusal != nil {
			return x.refuse(refusal)
		}
		end += n
		x.reqDone = x.body.Done()
		if end < len(p) {
			// The peer's proxy sends one request at a time.
			return x.refuse(ErrRequestLine)
		}
	}
	if edited {
		x.forwardEdited(p[:end], own)
	} else {
		x.forward(p[:end], own)
	}
	if own && x.inBody {
		x.held.release()
		x.held = nil
	}
	if fin {
		return x.finRequest()
	}
	x.release()
	return 0
}

// forwardEdited is forward for p with the head, which the application gets edited. It is
// apart from it so that others need no stack for it.
//
//go:noinline
func (x *served) forwardEdited(p []byte, own bool) {
	n := x.req.Size
	h := NewHead(p, n)
	edits := []*route.HeadEdit{x.origin.Edit, nil}
	if x.req.Upgrade && !x.req.WebSocket {
		edits[1] = &noUpgrade
	}
	if !own {
		x.consumed(n) // the kernel counts other bytes than the peer sent
	}
	x.forward(h.AppendRequest(make([]byte, 0, n+512), nil, nil, edits...), true)
	x.forward(p[n:], own)
}

// noUpgrade takes away the wish to leave HTTP, which a server need not grant (RFC 9110
// section 7.8).
var noUpgrade = route.HeadEdit{Drop: []string{"upgrade", "http2-settings"}}

// begin starts the exchange whose head was parsed.
func (x *served) begin() mux.Code {
	x.bound = x.bound || x.req.BoundAuth
	x.Start = now()
	if x.origin.Observer != nil {
		x.Request = &x.req
		x.origin.Observer.Begin(&x.Exchange)
		x.Request = nil
	}
	if x.origin.Guard != nil {
		if code := x.origin.Guard.Admit(x.Start); code != 0 {
			x.fail(failureOf(code).Reason)
			return code
		}
		x.admitted = true
	}
	if x.b != nil {
		return 0
	}
	var err error
	if x.b, x.reused, err = x.in.attach(x, false); err != nil {
		x.fail("stopped")
		return mux.Refused
	}
	return 0
}

// leaves is how long after its request a client half-closes that no longer waits for
// the answer. Who closes has half-closed, as far as anybody can see until it is written
// to; who wants an answer and no more does so with the request.
const leaves = 20 * time.Millisecond

// answered tells the guard that the application has answered, or never will.
func (x *served) answered(took time.Duration) {
	if x.admitted {
		x.admitted = false
		if x.left > 0 {
			// Applications answer at once when their client leaves; that is no answer.
			took = -x.left
		}
		x.origin.Guard.Answered(took, x.Start+max(took, -took))
	}
}

// nextRequest prepares for another request on a bound stream.
func (x *served) nextRequest() {
	x.Exchange = Exchange{Tag: x.Tag}
	x.req, x.body, x.reply = Request{}, Body{}, reply{}
	x.inBody, x.reqDone, x.respDone, x.passed, x.reported = false, false, false, false, false
	x.reused = false // never to another connection
	x.replay.release()
	x.replay = nil
}

// forward gives p to the application's connection.
func (x *served) forward(p []byte, own bool) {
	if len(p) == 0 {
		return
	}
	first := x.RequestBytes == 0
	x.RequestBytes += int64(len(p))
	if first && x.reused && x.reqDone && x.req.Idempotent && !x.req.HasBody() {
		x.replay = held(nil, p)
	}
	n, err := x.b.w.write(p)
	if err != nil && n == 0 && first && x.reused {
		// It died before the kernel took a byte: nobody has read any.
		if fresh, _, attachErr := x.in.attach(x, true); attachErr == nil {
			x.lose()
			x.b, x.reused = fresh, false
			n, err = fresh.w.write(p)
			x.passShut()
		}
	}
	if err != nil {
		n = len(p) // its reader will say how it ended
	}
	if !own {
		x.consumed(n)
	}
}

// drop frees what is held of a head: a peer may keep a stream that we reset for long.
func (x *served) drop() {
	x.held.release()
	x.held = nil
}

// headOver notes that nobody waits for the rest of a head any more.
func (x *served) headOver() {
	if x.headless {
		x.headless = false
		x.in.forgetHead(x)
	}
}

// headOverdue resets a stream whose peer began a head and does not go on with it.
func (x *served) headOverdue() {
	x.mu.Lock()
	if !x.headless {
		x.mu.Unlock()
		return
	}
	code := x.refuse(ErrHeadSlow)
	st := x.st
	x.mu.Unlock()
	st.reset(code)
}

// lose gives the connection up for good.
func (x *served) lose() {
	if b := x.b; b != nil {
		x.b = nil
		b.x.CompareAndSwap(x, nil)
		b.shut()
	}
}

// abort does so with a reset: what was cut short may not look as if it ended.
func (x *served) abort() {
	if x.b != nil {
		x.b.abort()
		x.lose()
	}
}

// finRequest handles the end of what the client sends.
func (x *served) finRequest() mux.Code {
	switch {
	case x.tunnel:
		x.reqDone = true
		x.b.w.shutdown()
		x.release()
	case x.bound && x.respDone && x.reqDone:
		x.lose() // the client's connection ended, so does the one that is bound to it
		if !x.sentFin {
			x.dead = true
			return mux.Cancelled
		}
	case !x.inBody:
		x.headOver()
		x.drop()
		x.lose()
		x.dead = true
		x.fail(ClientGone)
		return mux.Cancelled
	case !x.reqDone:
		// The client half-closed in the body. The application sees that, too.
		x.reqDone, x.shut = true, true
		if x.respDone {
			x.lose() // answered already: it is in the middle of a request for good
		}
		x.passShut()
		x.release()
	default:
		x.shut = x.shut || x.bound
		x.passShut()
		x.release()
	}
	return 0
}

// Shut is the client's half-close after its last request.
func (x *served) Shut(st mux.Stream) { x.shutBy(stream{Stream: st}) }

// shutBy is told by st's other end, perhaps so late that x serves another stream.
func (x *served) shutBy(st stream) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.st == st {
		if waited := now() - x.Start; x.admitted && !x.shut && waited > leaves {
			x.left = waited
		}
		x.shut = true
		x.passShut()
	}
}

// passShut half-closes the application's connection when the client has half-closed
// and its request is complete. The connection serves nobody else after it.
func (x *served) passShut() {
	if x.shut && x.b != nil && x.reqDone && !x.respDone {
		x.b.w.shutdown()
	}
}

// refuse ends a stream whose bytes are not the request that its peer claimed.
func (x *served) refuse(why *Refusal) mux.Code {
	x.headOver()
	x.drop()
	x.abort()
	x.dead = true
	if x.Start == 0 && x.origin.Observer != nil {
		x.Start = now()
		x.origin.Observer.Begin(&x.Exchange)
	}
	x.Refused = x.Failure == ""
	x.fail(why.Reason)
	return mux.BadRequest
}

// blame returns whose fault it is that the application ended the connection.
func (x *served) blame(reason string) string {
	if x.shut {
		return ClientGone // it half-closed first
	}
	return reason
}

// fail reports an exchange that did not end well.
func (x *served) fail(reason string) {
	if x.Failure == "" {
		x.Failure = reason
	}
	x.report()
}

func (x *served) report() {
	if x.reported || x.Start == 0 {
		return
	}
	x.reported = true
	x.Duration = now() - x.Start
	if x.Status == 0 {
		x.answered(-max(x.Duration, 1))
	} else {
		x.answered(x.Duration)
	}
	if x.origin.Observer != nil {
		x.origin.Observer.End(&x.Exchange)
	}
}

// Reset is the client's end of the stream.
func (x *served) Reset(_ mux.Stream, code mux.Code) {
	x.mu.Lock()
	x.dead = true
	x.headOver()
	x.drop()
	x.abort()
	reason := ClientGone
	if code != mux.Cancelled {
		reason = code.String()
	}
	x.fail(reason)
	x.mu.Unlock()
	x.signal()
}

// Writable lets the connection's goroutine write more.
func (x *served) Writable(mux.Stream) { x.signal() }

func (x *served) signal() {
	select {
	case x.wake <- struct{}{}:
	default:
	}
}

func (x *served) consumed(n int) {
	if n > 0 && !x.gotFin {
		x.st.consumed(n)
	}
}

// flushed follows queued bytes of the request that have left.
func (x *served) flushed(b *backend, n int) {
	x.mu.Lock()
	if x.b == b {
		x.consumed(n)
		x.release()
	}
	done := x.done()
	x.mu.Unlock()
	if done {
		x.pool()
	}
}

// release gives the connection back once request and response are complete.
func (x *served) release() {
	if x.b == nil || !x.respDone || !x.reqDone || x.writing || !x.b.w.empty() {
		return
	}
	switch {
	case x.tunnel:
		x.report()
		x.lose()
	case !x.bound:
		b := x.b
		x.b = nil
		x.in.put(b)
	}
}
