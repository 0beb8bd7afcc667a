package http1

import (
	"errors"
	"io"
	"syscall"
	"time"

	"assay.dev/proxy/mux"
	"golang.org/x/sys/unix"
)

// The way of a request: nextHead -> begin -> dispatch -> upload -> await. While the
// response is on its way the goroutine reads the application's socket, so the end of
// an exchange costs it nothing: the next bytes that wake it are the next request.

// carry takes the request whose head was parsed to its end. It reports whether the
// connection goes on, and otherwise why not.
func (c *client) carry() (bool, error) {
	data, fin, refusal := c.firstBytes()
	if refusal != nil {
		c.refuse(refusal)
		return false, refusal
	}
	x := c.begin(data)
	data, held := c.plan(x, data)
	defer held.release()
	for {
		if c.dispatch(x, data, fin) && !c.body.Done() {
			c.upload(x)
		}
		next, err := c.await(x)
		switch next {
		case goOn:
			return true, nil
		case end:
			return false, err
		}
		x = c.repeat(x)
	}
}

// firstBytes returns the head and what is there of the body, which travel together,
// and whether they are the whole request.
func (c *client) firstBytes() (data []byte, fin bool, refusal *Refusal) {
	c.body = c.req.Body(&c.lim)
	n, refusal := c.body.Advance(c.in.b[c.req.Size:])
	if refusal != nil {
		return nil, false, refusal
	}
	c.sent = c.req.Size + n
	if c.sent == len(c.in.b) && c.in.full() && c.body.Done() {
		// Without room nobody would notice that the client half-closes.
		c.in = c.in.grown(1, c.sent+1)
		c.req.Reset()
		c.req.Parse(c.in.b, &c.lim)
	}
	c.uploaded = false
	// What may become a tunnel, or another request on the same stream, stays open.
	bound := c.req.BoundAuth || c.x != nil && c.x.bound
	fin = c.body.Done() && !c.req.Upgrade && !c.req.IsConnect && !bound
	return c.in.b[:c.sent], fin, nil
}

// begin makes the exchange. A connection that authenticated itself keeps its stream.
func (c *client) begin(data []byte) *exchange {
	c.mu.Lock()
	defer c.mu.Unlock()
	x := c.x
	switch {
	case x != nil && x.bound:
		x.nextRequest()
	case x != nil && x.gotFin && x.sentFin: // no call for its stream can follow
		*x = exchange{c: c, p: x.p}
	default:
		x = &exchange{c: c}
	}
	c.x, c.fresh = x, false
	x.bound = x.bound || c.req.BoundAuth
	x.reqDone = c.body.Done()
	x.Request = &c.req
	x.Start = now()
	x.RequestBytes = int64(len(data))
	if c.observer != nil {
		c.observer.Begin(&x.Exchange)
	}
	return x
}

// repeat prepares another attempt with the same bytes. Late calls for the stream
// that failed go to its own handler.
func (c *client) repeat(old *exchange) *exchange {
	c.mu.Lock()
	defer c.mu.Unlock()
	x := &exchange{c: c, Exchange: old.Exchange, bound: old.bound, ending: old.ending, reqDone: old.reqDone}
	x.Attempt++
	x.Cause, x.Last = old.cause(), old.code
	x.Status, x.ResponseBytes = 0, 0
	x.expires = old.expires
	old.gone = true
	c.x = x
	return x
}

// dispatch gives the first bytes to an upstream. It reports whether there is one.
func (c *client) dispatch(x *exchange, data []byte, fin bool) bool {
	n, err := 0, error(nil)
	if c.planned(x) {
		return false
	}
	if x.Attempt == 0 {
		x.copyOut(data, c.body.Done())
	}
	switch {
	case x.opened: // bound
	case c.direct != nil && (c.d == nil || x.Plan == nil || x.Plan.Local):
		n, err = c.openDirect(x, data, fin)
	default:
		x.Request = &c.req
		st, taken, openErr := c.d.Dispatch(c.ctx, &x.Exchange, data, fin, x)
		n, err = taken, openErr
		if err == nil {
			c.mu.Lock()
			x.st.Stream = st
			c.mu.Unlock()
		}
	}
	if err != nil {
		f, ok := errors.AsType[*Failure](err)
		switch {
		case ok:
		case err == ErrNoOther && x.Attempt > 0:
			x.Guard.GiveBack(x.Cause)
			f = x.lastFailure()
		default:
			f = &Failure{Status: failDispatch.Status, Reason: failDispatch.Reason, Text: failDispatch.Text + " (" + err.Error() + ")"}
		}
		c.fail(x, f)
		return false
	}
	c.mu.Lock()
	x.Request = nil
	x.opened = true
	x.sentFin = fin && n == len(data)
	if x.owed > 0 {
		x.st.consumed(x.owed)
		x.owed = 0
	}
	if x.gone && (!x.gotFin || x.again) {
		x.st.reset(mux.Cancelled) // it was refused before it was known
	}
	c.settle(x)
	c.limit(x)
	c.mu.Unlock()
	return n == len(data) || c.send(x, data[n:], fin) == nil
}

// upload sends what is left of the body as it comes.
func (c *client) upload(x *exchange) {
	moved, timed := int64(0), false
	for !c.body.Done() {
		if c.in == nil || len(c.in.b) == c.sent {
			if c.in != nil && c.in.full() {
				c.dropSent()
			}
			if !timed {
				moved, timed = c.moved(x), true
				c.setDeadline(time.Now().Add(c.timeouts.Body))
			}
			switch err := c.fill(); {
			case err == nil:
			case err == errKicked:
				if c.interrupted(x) {
					return
				}
			case err == io.EOF:
				c.cutShort(x)
				return
			case err == errTimeout:
				if moved == c.moved(x) {
					c.refuseBody(x, ErrBodySlow)
					return
				}
				timed = false
			default:
				c.mu.Lock()
				c.dead = true
				c.mu.Unlock()
				return
			}
			continue
		}
		n, refusal := c.body.Advance(c.in.b[c.sent:])
		if refusal != nil {
			c.refuseBody(x, refusal)
			return
		}
		c.count(x, n)
		x.copyOut(c.in.b[c.sent:c.sent+n], c.body.Done())
		if c.send(x, c.in.b[c.sent:c.sent+n], c.body.Done() && !x.bound && !c.req.Upgrade) != nil {
			return
		}
		if n > classes[small]/2 {
			c.class = large
		}
		c.sent += n
		c.dropSent()
	}
	c.class = small
	if timed {
		c.setDeadline(time.Time{})
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	x.reqDone = true
	c.settle(x)
	c.limit(x)
}

// moved is how many bytes of the exchange have been carried, in either direction.
func (c *client) moved(x *exchange) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return x.RequestBytes + x.ResponseBytes
}

// cutShort passes on a half-close in the middle of a body: the application sees it at
// the same byte, and may still answer.
func (c *client) cutShort(x *exchange) {
	c.mu.Lock()
	x.shut = true // before the application can answer to it
	c.mu.Unlock()
	if c.send(x, nil, true) != nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	x.reqDone = true
	c.settle(x)
}

// count notes n more bytes of the request.
func (c *client) count(x *exchange, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.uploaded = true
	x.RequestBytes += int64(n)
}

// dropSent forgets what the upstream has; no other can be given it any more.
func (c *client) dropSent() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.uploaded = true
	c.dropSentLocked()
}

func (c *client) dropSentLocked() {
	if c.in != nil {
		c.discard(c.sent)
	}
	c.sent = 0
}

// errInterrupted says that something else must be decided first.
var errInterrupted = errors.New("http1: interrupted")

// send gives p to the upstream, waiting for credit.
func (c *client) send(x *exchange, p []byte, fin bool) error {
	for {
		n, err := x.st.tryWrite(p, fin)
		if err != nil {
			// The stream's Reset, which tells why, is on its way.
			return c.pause(x, false)
		}
		if n == len(p) {
			if fin {
				c.mu.Lock()
				x.sentFin = true
				c.mu.Unlock()
			}
			return nil
		}
		p = p[n:]
		if err := c.pause(x, true); err != nil {
			return err
		}
	}
}

// pause waits for room at the upstream, or for what makes waiting pointless.
func (c *client) pause(x *exchange, writable bool) error {
	tick := time.NewTimer(time.Second)
	defer tick.Stop()
	start := now()
	for {
		c.mu.Lock()
		stop := c.halted(x)
		c.waiting = !stop
		c.mu.Unlock()
		if stop {
			return errInterrupted
		}
		woken := false
		select {
		case <-c.wake:
			woken = writable
		case <-tick.C:
			// Nobody reads the socket now, so its reset would go unnoticed.
			if c.isReset() {
				c.mu.Lock()
				c.dead = true
				c.mu.Unlock()
			}
			if now()-start > c.timeouts.Stall && writable {
				x.stalled()
			}
			tick.Reset(time.Second)
		}
		c.mu.Lock()
		c.waiting = false
		c.mu.Unlock()
		if woken {
			return nil
		}
	}
}

// isReset asks the kernel whether the application's connection was reset.
func (c *client) isReset() bool {
	state := uint8(0)
	c.raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), syscall.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			state = info.State
		}
	})
	return state == unix.BPF_TCP_CLOSE
}

func (c *client) interrupted(x *exchange) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.halted(x)
}

// halted reports whether sending the request has become pointless.
func (c *client) halted(x *exchange) bool {
	return c.dead || c.stopped || c.closing || x.failed || x.ended
}

type outcome int

const (
	goOn  outcome = iota // with the next request
	end                  // of the connection
	retry                // the same bytes at another upstream
)

// await waits for the end of the exchange, and watches the application meanwhile.
func (c *client) await(x *exchange) (outcome, error) {
	for {
		c.mu.Lock()
		switch {
		case c.stopped:
			c.drop(x, Aborted)
			c.abort()
			c.mu.Unlock()
			return end, ErrStopped
		case c.dead:
			c.drop(x, ClientGone)
			c.mu.Unlock()
			return end, c.cause(x)
		case x.ended:
			keep := x.keep
			c.mu.Unlock()
			if !keep {
				return end, c.cause(x)
			}
			return goOn, nil
		case x.failed:
			again := x.again || c.tryAgain(x)
			x.again = false
			c.mu.Unlock()
			if !again {
				c.fail(x, x.failure())
			} else if x.wait == 0 || c.rest(x) {
				return retry, nil
			}
			continue
		case c.closing: // answered before the request was complete
			c.drop(x, "")
			c.mu.Unlock()
			return end, c.cause(x)
		case x.tunnel && !x.reqDone:
			c.mu.Unlock()
			c.pump(x)
			continue
		}
		c.halfClose(x)
		// With another request at hand, or nothing left to read, there is nothing to
		// watch; a reset is noticed by the write of the response.
		watch := !c.eof && (c.in == nil || len(c.in.b) == c.sent && !c.in.full())
		c.waiting = !watch
		c.mu.Unlock()
		if !watch {
			<-c.wake
			c.mu.Lock()
			c.waiting = false
			c.mu.Unlock()
			continue
		}
		switch err := c.fill(); {
		case err == nil, err == errKicked, err == io.EOF, err == errTimeout:
		default:
			c.mu.Lock()
			c.dead = true
			c.mu.Unlock()
		}
	}
}

// cause returns the error of an exchange that ended the connection.
func (c *client) cause(x *exchange) error {
	if x.Failure == "" {
		return nil
	}
	return &endError{x.Failure}
}

type endError struct{ reason string }

func (e *endError) Error() string { return "http1: connection ended: " + e.reason }

// pump carries the application's side of a tunnel.
func (c *client) pump(x *exchange) {
	c.mu.Lock()
	c.dropSentLocked() // the head of the request that asked for it
	c.mu.Unlock()
	c.class = small
	for {
		if c.in != nil {
			n := len(c.in.b)
			c.count(x, n)
			if c.send(x, c.in.b, false) != nil {
				return
			}
			c.class = small
			if n == cap(c.in.b) {
				c.class = large
			}
			c.discard(n)
		}
		if c.eof {
			if c.send(x, nil, true) != nil {
				return
			}
			c.mu.Lock()
			x.reqDone = true
			c.settle(x)
			c.mu.Unlock()
			return
		}
		switch err := c.fill(); {
		case err == nil, err == io.EOF:
		case err == errKicked:
			if c.interrupted(x) {
				return
			}
		default:
			c.mu.Lock()
			c.dead = true
			c.mu.Unlock()
			return
		}
	}
}
