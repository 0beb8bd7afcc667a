package http2

import (
	"time"

	"assay.dev/proxy/mux"
	"assay.dev/proxy/route"
)

// stream is one request and its response: a stream of an application's connection on one
// side, a stream between the proxies on the other. conn.mu guards it.
//
// In either role the application's bytes go up, into the mesh (up.go), and the mesh's come
// down (down.go). Each of the four directions ends once, by its end or by a reset of both
// directions on that side; then the stream is over, and may be another one.
type stream struct {
	c *conn // for good: streams are pooled by their connection
	state
}

// state is what another stream does not share.
type state struct {
	Exchange
	id       uint32 // 0 until the application was sent its head
	st       mux.Stream
	past     []mux.Stream // of attempts that came to nothing
	chain    *stream      // in the table
	next     *stream      // in a queue, or in the pool
	observer Observer
	guard    Guard           // that admitted it, until it was answered; nil for none
	edit     *route.HeadEdit // of the request, for the application; nil for none

	head     Head
	from, to int // its fields in conn.fields, in the batch that brought it

	app, mesh message // what the application sends, and what the mesh does

	up   buffer // for the mesh: not sent, or kept to be sent again
	sent int    // of up
	debt int    // bytes in up that the application's window is owed
	rest ErrCode

	down  buffer        // for the application
	off   int           // what was used of it
	left  int           // bytes of a block of data that are still to come
	since time.Duration // when its reader began to take nothing; 0: it does not

	sendWin, recvWin, credit int

	// Limits of time, as readings of now; 0 for none.
	expires, tryBy time.Duration
	wire           time.Duration // the caller's own deadline, from Start
	pause          time.Duration // before the next attempt

	early   mux.Code // ended the stream while it was dispatched
	pending ErrCode  // to be sent when the response has been

	isHead, connect, idempotent bool
	admitted                    bool // by guard, which was not told of an answer
	loaded                      bool // counted in conn.load
	listed                      bool // in a queue
	fresh                       bool // not dispatched: the batch is not over
	dirty                       bool // has something for the mesh at the batch's end
	waiting                     bool // a goroutine dispatches it
	keep                        bool // up holds everything since the beginning
	upFin                       bool // up is all that the application says
	stuck                       bool // the mesh takes no more now: Writable follows
	opened                      bool // st was opened
	finSent, finGot             bool // ends of the mesh's stream
	dead                        bool // it was reset, by either side
	gotEnd, sentEnd             bool // ends of the application's stream
	rst                         bool // it was reset, by either side
	blocked                     bool // its window is closed
	passed                      bool // a part of the response has passed
	hasRest, hasPending         bool // rest and pending mean something
	reported                    bool
	over                        bool
}

// newStream takes a stream from the pool; mu is held.
func (c *conn) newStream() *stream {
	x := c.free
	if x == nil {
		x = &stream{c: c}
	} else {
		c.free, x.next = x.next, nil
		c.nfree--
	}
	x.sendWin, x.recvWin = c.peerWindow, c.window
	x.up.of, x.down.of = c, c
	if c.server {
		x.observer = c.d
	}
	return x
}

// remove takes a stream out of the table; mu is held.
func (c *conn) remove(x *stream) {
	if x.id == 0 || !c.streams.remove(x) {
		return
	}
	c.unload(x)
	if c.server {
		c.maybeDrained()
		return
	}
	c.admit()
	c.maybeIdle()
}

func (c *conn) unload(x *stream) {
	if x.loaded {
		x.loaded = false
		c.load.Add(-1)
	}
}

// maybeIdle ends a connection to an application that said goodbye.
func (c *conn) maybeIdle() {
	if !c.server && c.bye.heard && c.streams.n == 0 && c.end == nil {
		c.fail(errIdle)
	}
}

// settle ends the stream once both sides have. Nobody may touch it afterwards.
func (x *stream) settle() {
	if x.over || x.waiting || x.fresh || x.dirty {
		return
	}
	c := x.c
	if !x.rst && !(x.sentEnd && x.gotEnd) {
		return
	}
	c.remove(x)
	if x.opened && !x.dead && !(x.finSent && x.finGot) {
		return
	}
	x.over = true
	c.unload(x)
	x.report()
	x.up.release()
	x.down.release()
	// Only what ended well cannot be called again but for a late Writable, which sees
	// another stream.
	if x.listed || x.dead || !x.opened || len(x.past) > 0 || c.nfree >= 64 {
		return
	}
	x.state = state{next: c.free}
	c.free = x
	c.nfree++
}

// closed takes the stream out of the table once both of its directions have ended: what
// still comes on it is an error.
func (x *stream) closed() {
	if x.gotEnd && x.sentEnd {
		x.c.remove(x)
	}
}

// report tells the observer that the exchange is over.
func (x *stream) report() {
	if x.reported || x.Start == 0 {
		return
	}
	x.reported = true
	x.Duration = now() - x.Start
	x.answered(-1)
	request, response := &x.app, &x.mesh
	if !x.c.server {
		request, response = response, request
	}
	x.RequestMessages, x.ResponseMessages = request.count.n, response.count.n
	if x.Failure == "" {
		x.c.flood.carried++
	}
	if x.observer != nil {
		x.observer.End(&x.Exchange)
	}
}

// answered tells the guard that let the request in.
func (x *stream) answered(took time.Duration) {
	if x.admitted {
		x.admitted = false
		x.guard.Answered(took, x.Start+max(took, x.Duration))
	}
}

func (x *stream) failure(reason string) {
	if x.Failure == "" {
		x.Failure = reason
	}
}

// resetMesh ends the mesh's side.
func (x *stream) resetMesh(code mux.Code) {
	if x.dead {
		return
	}
	x.dead = true
	x.up.release()
	x.sent, x.keep = 0, false
	if x.opened && !(x.finSent && x.finGot) {
		x.st.Reset(code)
	}
}

// resetApp ends the application's side.
func (x *stream) resetApp(code ErrCode) {
	if x.rst {
		return
	}
	over := x.gotEnd && x.sentEnd
	x.rst = true
	x.down.release()
	x.off = 0
	if x.id == 0 || over {
		return
	}
	x.c.out = appendReset(x.c.out, x.id, code)
	if !x.gotEnd {
		x.c.resets.add(x.id)
	}
	x.c.remove(x)
}

// refuse ends a stream whose application broke a rule on it. Too many of them are a
// flood.
func (x *stream) refuse(why *Refusal) *Refusal {
	c := x.c
	if x.rst {
		return c.flood.count(floodMalformed)
	}
	x.failure(why.Reason)
	x.Refused = x.Failure == why.Reason
	switch {
	case c.server:
		x.resetMesh(mux.Cancelled)
	case why == ErrMemory && x.id == 0:
		x.resetMesh(mux.Overloaded)
	case why == ErrMemory || why == ErrWindowStall:
		x.resetMesh(mux.Stalled)
	default:
		x.resetMesh(mux.BadRequest)
	}
	if why.Status != 0 && c.server && !x.passed && !x.sentEnd {
		x.answer(&Failure{Status: why.Status, Code: 13, Reason: why.Reason, Text: "the request was refused: " + why.Error()})
	} else {
		x.resetApp(why.Code)
	}
	x.settle()
	return c.flood.count(floodMalformed)
}

// resetByApp is RST_STREAM of the application.
func (x *stream) resetByApp(code ErrCode) {
	c := x.c
	x.rst = true
	x.down.release()
	x.off = 0
	c.remove(x)
	switch {
	case c.server:
		x.failure(ClientGone)
		x.resetMesh(toMuxClient(code))
	case x.gotEnd:
		// The response is whole; what the application does not want is the rest of the
		// request. The client hears so once it has the response.
		x.rest, x.hasRest = code, true
		x.push()
	default:
		x.failure(failReset)
		x.resetMesh(toMux(code))
	}
	x.settle()
}

// toMuxClient is toMux for a client, which cannot refuse a stream of its own.
func toMuxClient(code ErrCode) mux.Code {
	if code == RefusedStream {
		code = Cancel
	}
	return toMux(code)
}

// broken is the end of the application's connection.
func (x *stream) broken(err error) {
	c := x.c
	x.rst = true
	x.down.release()
	x.off = 0
	_, refused := err.(*Refusal)
	switch {
	case c.server && err == ErrStopped:
		x.failure(Aborted)
		x.resetMesh(mux.Cancelled)
	case c.server:
		x.failure(ClientGone)
		x.resetMesh(mux.Cancelled)
	case x.gotEnd: // the response is whole, and on its way
	case c.raw == nil:
		x.failure(failUnreachable.Reason)
		x.resetMesh(mux.Unreachable)
	case err == ErrStopped:
		x.failure(Aborted)
		x.resetMesh(mux.Broken)
	case refused:
		x.failure(err.(*Refusal).Reason)
		x.resetMesh(mux.BadRequest)
	default:
		x.failure(failAppReset.Reason)
		x.resetMesh(mux.AppReset)
	}
	x.settle()
}

// unread ends a stream that the application has not looked at.
func (x *stream) unread() {
	x.rst = true
	x.down.release()
	x.off = 0
	x.failure(failRefused.Reason)
	x.resetMesh(mux.Refused)
	x.c.unload(x)
	x.settle()
}

// Reset implements mux.Handler.
func (x *stream) Reset(st mux.Stream, code mux.Code) {
	c := x.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if !x.current(st) {
		return
	}
	if x.waiting {
		x.early = code
		return
	}
	x.meshReset(code)
	x.settle()
	c.later(st)
}

// meshReset is the end of the mesh's stream by the far side, or with its session.
func (x *stream) meshReset(code mux.Code) {
	c := x.c
	x.dead = true
	whole := x.finGot
	if x.rst {
		return
	}
	carried, isCarried := fromMux(code)
	if !c.server {
		// The client is gone, with a code of its own perhaps.
		if !isCarried {
			carried = Cancel
		}
		if !x.finSent {
			x.failure(ClientGone)
		}
		x.resetApp(carried)
		return
	}
	switch {
	case x.sentEnd:
		// The response has passed; the far side does not want the rest of the request.
		if !isCarried {
			carried = NoError
		}
		x.resetApp(carried)
	case whole:
		if !isCarried {
			carried = NoError
		}
		x.pending, x.hasPending = carried, true
	case x.tryAgain(causeOf(code), 0):
		x.again(code)
	case isCarried:
		x.failure(failReset)
		x.resetApp(carried)
	case !x.passed:
		x.fail(failureOf(code))
	default:
		x.cut(failureOf(code))
	}
}

// Writable implements mux.Handler.
func (x *stream) Writable(st mux.Stream) {
	c := x.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if x.waiting || !x.current(st) {
		return
	}
	x.stuck = false
	x.push()
	x.settle()
	c.later(st)
}
