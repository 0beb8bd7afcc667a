package http1

import (
	"io"
	"time"

	"assay.dev/proxy/mux"
)

// The way of a response on the application's side: backend.serve -> respond -> write,
// and lost when the connection ends. All of it is the connection's goroutine's.

// respond passes on what the application said. It reports whether the connection
// goes on.
func (x *served) respond(b *backend, p []byte) bool {
	x.mu.Lock()
	if x.b != b || x.dead {
		x.mu.Unlock()
		return false
	}
	if x.respDone {
		// More after the end of a response: whose it is nobody knows.
		x.Failure = failUnasked
		return x.hangUp(b)
	}
	r := &x.reply
	x.moved = x.in.tick.Load()
	p = r.take(p)
	end, refusal := r.frame(p, &x.req, &x.in.cfg.Limits)
	if r.inBody && x.Status == 0 {
		x.Status = r.resp.Status
		if r.body.Framing == Tunnel {
			if refusal == nil {
				refusal = r.tunnel(&x.req, x.reqDone)
			}
			x.tunnel, x.Tunnel, x.reqDone = true, true, x.gotFin
			b.w.unbound()
		}
	}
	if refusal != nil {
		return x.bad(b, refusal)
	}
	keep, fin, whole := true, false, r.whole()
	if x.admitted && r.inBody && !whole {
		x.answered(now() - x.Start) // what streams waits for nobody
	}
	x.ResponseBytes += int64(end)
	x.passed = x.passed || r.inBody
	if whole {
		x.respDone = true
		if end < len(p) {
			x.Failure = failUnasked
		}
		keep = x.Failure == "" && r.resp.Persistent(&x.req) && !x.shut
		fin = !keep || !x.bound
		x.report()
		if !keep {
			x.b = nil
			b.x.Store(nil)
		} else {
			// Before the last bytes are written, so that the client's next request finds
			// the connection.
			x.release()
		}
	}
	x.writing = true
	early := whole && x.b != b && keep
	x.mu.Unlock()
	ok := x.write(p[:end], fin, early)
	x.mu.Lock()
	if ok {
		r.keep(p, end)
		x.wrote(fin)
	}
	more := early || ok && keep && !x.dead
	done := x.done()
	x.mu.Unlock()
	if done {
		x.pool()
	}
	return more
}

// wrote notes that what was due has been written.
func (x *served) wrote(fin bool) {
	x.writing = false
	x.sentFin = x.sentFin || fin
	x.release()
}

// write waits for credit. When the connection was given back already, it may not
// wait: the rest is left to a goroutine of its own.
func (x *served) write(p []byte, fin, early bool) bool {
	for {
		n, err := x.st.tryWrite(p, fin)
		if err != nil {
			return false
		}
		if n == len(p) {
			x.wait(false)
			return true
		}
		p = p[n:]
		if early {
			x.in.wg.Add(1)
			go x.writeRest(append([]byte(nil), p...))
			return false
		}
		x.wait(true)
		select {
		case <-x.wake:
		case <-x.in.ctx.Done():
			x.st.reset(mux.Broken)
			return false
		}
	}
}

// wait notes whether the stream is waited for, and that it was written.
func (x *served) wait(waits bool) {
	if waits || x.waits {
		x.mu.Lock()
		x.waits, x.moved = waits, x.in.tick.Load()
		x.mu.Unlock()
	}
}

// writeRest writes the end of a response to a client that does not read: a buffer
// at most.
func (x *served) writeRest(p []byte) {
	defer x.in.wg.Done()
	stall := time.AfterFunc(x.in.cfg.Timeouts.Stall, func() {
		x.st.reset(mux.Stalled)
		x.signal()
	})
	ok := x.write(p, true, false)
	if !stall.Stop() || !ok {
		return
	}
	x.mu.Lock()
	x.wrote(true)
	done := x.done()
	x.mu.Unlock()
	if done {
		x.pool()
	}
}

// hangUp ends the stream after what was passed on, and the connection. It unlocks mu.
func (x *served) hangUp(b *backend) bool {
	bound := x.bound && !x.sentFin
	x.b = nil
	b.x.Store(nil)
	x.mu.Unlock()
	if bound {
		x.write(nil, true, false)
		x.mu.Lock()
		x.wrote(true)
		x.mu.Unlock()
	}
	return false
}

// bad refuses a response, with an answer of our own while there is time. It unlocks
// mu.
func (x *served) bad(b *backend, why *Refusal) bool {
	x.b = nil
	b.x.Store(nil)
	passed := x.passed
	x.respDone = true
	if passed {
		x.dead = true
	} else {
		x.Status = 502
	}
	x.Refused = x.Failure == ""
	x.fail(why.Reason)
	head := x.req.IsHead
	x.mu.Unlock()
	if passed {
		x.st.reset(mux.BadRequest)
		return false
	}
	x.write(answer(502, why.Reason, "the application's response was refused: "+why.Error(), true, head, 0), true, false)
	x.mu.Lock()
	x.sentFin = true
	x.mu.Unlock()
	return false
}

// lost handles the end of the connection.
func (x *served) lost(b *backend, err error) {
	x.mu.Lock()
	if x.b != b || x.dead {
		x.mu.Unlock()
		return
	}
	r := &x.reply
	if !x.respDone && !r.begun() && x.reused && x.replay != nil {
		// The application closed the kept connection as we used it. The request may be
		// sent again, on a connection that it has not seen.
		if fresh, _, attachErr := x.in.attach(x, true); attachErr == nil {
			x.b, x.reused = fresh, false
			b.x.Store(nil)
			fresh.w.write(x.replay.b)
			x.passShut()
			x.mu.Unlock()
			return
		}
	}
	if x.respDone {
		x.hangUp(b) // between requests, or while it was still sent one
		return
	}
	if err != io.EOF {
		x.cut(b, mux.AppReset, x.blame(failAppReset.Reason))
		return
	}
	switch {
	case !r.inBody:
		x.Failure = x.blame(failNoResponse)
	case r.body.Framing == Length || r.body.Framing == Chunks:
		x.Failure = x.blame(failTruncated)
	case r.body.Framing == Tunnel:
		x.halfClose(b)
		return
	}
	x.respDone = true
	x.report()
	x.b = nil
	b.x.Store(nil)
	x.writing = true
	x.mu.Unlock()
	x.finish()
}

// finish ends the response's direction of the stream.
func (x *served) finish() {
	if !x.write(nil, true, false) {
		return
	}
	x.mu.Lock()
	x.wrote(true)
	done := x.done()
	x.mu.Unlock()
	if done {
		x.pool()
	}
}

// halfClose passes the application's half-close of a tunnel on, and keeps the
// connection until the client's direction ends, too. It unlocks mu.
func (x *served) halfClose(b *backend) {
	x.respDone, x.writing = true, true
	x.mu.Unlock()
	if !x.write(nil, true, false) {
		return
	}
	x.mu.Lock()
	x.wrote(true)
	done := x.done()
	x.mu.Unlock()
	if done {
		x.pool()
		return
	}
	<-b.over
}

// unreachable says that there was no connection to be had.
func (x *served) unreachable(b *backend) {
	x.mu.Lock()
	if x.b != b || x.dead {
		x.mu.Unlock()
		return
	}
	x.cut(b, mux.Unreachable, failUnreachable.Reason)
}

// cut resets the stream. It unlocks mu.
func (x *served) cut(b *backend, code mux.Code, reason string) {
	x.dead = true
	x.b = nil
	b.x.Store(nil)
	x.fail(reason)
	x.mu.Unlock()
	x.st.reset(code)
}

// stop resets an exchange because the Inbound stops.
func (x *served) stop(b *backend) {
	x.mu.Lock()
	if x.b != b || x.dead {
		x.mu.Unlock()
		return
	}
	x.cut(b, mux.Broken, "stopped")
	x.signal()
}

// overdue resets an exchange in which nothing moves although something must: the
// client takes nothing of its response, or brings nothing of its request.
func (x *served) overdue(b *backend, tick uint32) {
	x.mu.Lock()
	t := &x.in.cfg.Timeouts
	late := x.waits && x.in.older(x.moved, tick, t.Stall) ||
		!x.reqDone && x.in.older(x.moved, tick, t.Body)
	if x.b != b || x.dead || x.tunnel || !late {
		x.mu.Unlock()
		return
	}
	x.cut(b, mux.Stalled, failStalled.Reason)
	x.signal()
	b.abort()
	b.shut()
}

// stuck is told that the application takes nothing of a request.
func (x *served) stuck(b *backend) {
	x.mu.Lock()
	if x.b != b || x.dead {
		x.mu.Unlock()
		return
	}
	x.cut(b, mux.Stalled, failStalled.Reason)
	x.signal()
	b.abort()
	b.shut()
}
