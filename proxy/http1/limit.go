package http1

import (
	"time"

	"assay.dev/proxy/guard"
	"assay.dev/proxy/mux"
)

// What policy does to an exchange: limits of time, and other attempts. guard decides;
// this file says what is at hand, and ends or waits.

// limit notes when x must be over, now that it is on its way; c.mu is held. The timer
// is left running at the end of an exchange: a fast one costs a comparison.
func (c *client) limit(x *exchange) {
	if x.Policy == nil || x.ended || x.gone || x.failed || x.bound {
		return
	}
	x.expires = x.Policy.Expires(x.Start, 0)
	if x.reqDone && x.tryBy == 0 && !x.passed { // a long upload is the client's time
		x.tryBy = x.Policy.TryExpires(now())
	}
	if x.expires != 0 || x.tryBy != 0 {
		c.arm(x.next())
	}
}

// next is when something about x is due.
func (x *exchange) next() time.Duration {
	if x.tryBy != 0 && !x.passed && (x.expires == 0 || x.tryBy < x.expires) {
		return x.tryBy
	}
	return x.expires
}

func (c *client) arm(at time.Duration) {
	if c.armed != 0 && c.armed <= at {
		return
	}
	c.armed = at
	if d := at - now(); c.timer == nil {
		c.timer = time.AfterFunc(d, c.due)
	} else {
		c.timer.Reset(d)
	}
}

// due is the timer's.
func (c *client) due() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.armed = 0
	x := c.x
	if x == nil || c.dead || x.ended || x.gone || x.failed || x.tunnel || !x.opened || x.respDone && x.reqDone {
		return
	}
	at := x.next()
	switch t := now(); {
	case at == 0:
	case t < at:
		c.arm(at)
	case x.expires != 0 && t >= x.expires:
		x.Guard.Count(guard.Timeout)
		x.giveUp(failTimeout)
	default:
		x.giveUp(failTryTimeout)
	}
}

// giveUp ends an exchange that took too long.
func (x *exchange) giveUp(f *Failure) {
	x.st.reset(mux.Cancelled)
	x.gone = true
	if x.passed || x.respDone {
		x.Failure = f.Reason
		x.c.report(x)
		x.c.abort() // what was cut short may not look complete
		return
	}
	x.failed, x.fault = true, f
	x.c.kick()
}

// failure is what an exchange that failed comes to.
func (x *exchange) failure() *Failure {
	if x.fault != nil {
		return x.fault
	}
	return failureOf(x.code)
}

// lastFailure is what the attempt before x came to.
func (x *exchange) lastFailure() *Failure {
	switch {
	case x.Cause == guard.TimedOut:
		return failTryTimeout
	case x.Last == 0:
		return failDispatch
	}
	return failureOf(x.Last)
}

// cause is why the attempt came to nothing, 0 when that is nothing to try again for.
func (x *exchange) cause() guard.Cause {
	switch {
	case x.fault == failTryTimeout:
		return guard.TimedOut
	case x.fault != nil:
		return 0
	case x.code == 0:
		return guard.Answered
	case x.code == mux.Refused || x.code == mux.Overloaded || x.code == mux.Unreachable:
		return guard.Unread
	case failureOf(x.code) == failBroken:
		return guard.Broken
	}
	return 0
}

// tryAgain decides whether the same bytes go to another upstream; c.mu is held. They
// must all be at hand, and the client must know nothing of the attempt. For one that
// half-closed nothing is done twice: it may be gone.
func (c *client) tryAgain(x *exchange) bool {
	cause := x.cause()
	if cause == 0 || x.passed || x.reply.interim || c.uploaded || c.d == nil || x.st.end != nil || x.shut && cause != guard.Unread || x.bound {
		return x.noRetry()
	}
	wait, ok := x.Guard.Retry(x.Policy, guard.Attempt{
		Number: x.Attempt, Cause: cause, Status: x.Status, Idempotent: c.req.Idempotent,
		Expires: x.Policy.Expires(x.Start, 0), // it may fail before Dispatch has returned
	}, now())
	if !ok {
		return x.noRetry()
	}
	x.wait = wait
	return true
}

func (x *exchange) noRetry() bool {
	if x.fault == failTryTimeout {
		x.Guard.Count(guard.TryTimeout)
	}
	return false
}

// tryStatus throws a response away that is one to try again for, if that can be
// done: nothing of it has been passed on yet.
func (x *exchange) tryStatus() bool {
	c := x.c
	if x.passed || !x.Policy.HasCode(x.Status) || !c.tryAgain(x) {
		return false
	}
	if x.opened {
		x.st.reset(mux.Cancelled)
	}
	x.reply.held.release()
	x.reply.held = nil
	x.gone, x.failed, x.again = true, true, true
	c.kick()
	return true
}

// rest waits before another attempt. It reports whether there may be one still.
func (c *client) rest(x *exchange) bool {
	t := time.NewTimer(x.wait)
	defer t.Stop()
	for {
		c.mu.Lock()
		over := c.dead || c.stopped
		c.waiting = !over
		c.mu.Unlock()
		if over {
			return false
		}
		rested := false
		select {
		case <-c.wake:
		case <-t.C:
			rested = true
		}
		c.mu.Lock()
		c.waiting = false
		c.mu.Unlock()
		if rested {
			break
		}
	}
	if !c.isReset() { // nobody read the socket meanwhile
		return true
	}
	c.mu.Lock()
	c.dead = true
	c.mu.Unlock()
	return false
}
