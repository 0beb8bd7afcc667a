package http2

import (
	"time"

	"assay.dev/proxy/guard"
	"assay.dev/proxy/mux"
)

// What policy does to an exchange: limits of time, and other attempts. guard decides;
// this file says what is at hand, and ends or waits.

// limit notes when x must be over, now that it is on its way; conn.mu is held. The timer
// is left running at the end of an exchange: a fast one costs a comparison.
func (x *stream) limit() {
	x.expires = x.Policy.Expires(x.Start, x.wire)
	if x.gotEnd && x.tryBy == 0 && !x.passed { // a long upload is the client's time
		x.tryBy = x.Policy.TryExpires(now())
	}
	if at := x.dueAt(); at != 0 {
		x.c.arm(at)
	}
}

// dueAt is when something about x is due, 0 for never.
func (x *stream) dueAt() time.Duration {
	if x.tryBy != 0 && !x.passed && (x.expires == 0 || x.tryBy < x.expires) {
		return x.tryBy
	}
	return x.expires
}

func (c *conn) arm(at time.Duration) {
	if c.armed != 0 && c.armed <= at || c.end != nil {
		return
	}
	c.armed = at
	if d := at - now(); c.timer == nil {
		c.timer = time.AfterFunc(d, c.due)
	} else {
		c.timer.Reset(d)
	}
}

// due is the timer's: it ends what took too long, and is armed for what comes next.
func (c *conn) due() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.armed = 0
	if c.end != nil {
		return
	}
	next, t := time.Duration(0), now()
	c.streams.each(func(x *stream) {
		at := x.dueAt()
		switch {
		case at == 0 || x.Tunnel || x.fresh || x.waiting || x.rst || x.sentEnd:
		case t < at:
			if next == 0 || at < next {
				next = at
			}
		case x.expires != 0 && t >= x.expires:
			x.Guard.Count(guard.Timeout)
			x.giveUp(failTimeout)
		default:
			x.tryBy = 0
			if x.tryAgain(guard.TimedOut, 0) {
				x.again(0)
				return
			}
			x.Guard.Count(guard.TryTimeout)
			x.giveUp(failTryTimeout)
		}
	})
	if next != 0 {
		c.arm(next)
	}
	c.flush()
}

// giveUp ends an exchange that took too long.
func (x *stream) giveUp(f *Failure) {
	if x.passed {
		x.cut(f)
	} else {
		x.fail(f)
	}
	x.settle()
}

// causeOf is why an attempt came to nothing, 0 when that is nothing to try again for.
func causeOf(code mux.Code) guard.Cause {
	switch {
	case code == mux.Refused, code == mux.Overloaded, code == mux.Unreachable:
		return guard.Unread
	case code == mux.Broken:
		return guard.Broken
	}
	return 0
}

// tryAgain decides whether the request may go to another upstream. All of it must be at
// hand, and the client must know nothing of the attempt.
func (x *stream) tryAgain(cause guard.Cause, status int) bool {
	if cause == 0 || !x.keep || x.passed || x.c.end != nil || x.rst {
		return false
	}
	if cause != guard.Unread && !x.gotEnd {
		return false // who reads it in part may act on that
	}
	wait, ok := x.Guard.Retry(x.Policy, guard.Attempt{
		Number: x.Attempt, Cause: cause, Status: status, Idempotent: x.idempotent, Expires: x.expires,
	}, now())
	if !ok {
		return false
	}
	x.Cause, x.pause = cause, wait
	return true
}

// again tries another upstream, in a goroutine.
func (x *stream) again(code mux.Code) {
	if x.opened && !x.dead && !(x.finSent && x.finGot) {
		x.st.Reset(mux.Cancelled)
	}
	x.Attempt++
	x.Last = code
	x.past = append(x.past, x.st)
	x.st = mux.Stream{}
	x.opened, x.dead, x.finSent, x.finGot, x.stuck = false, false, false, false, false
	x.sent, x.left, x.off, x.tryBy = 0, 0, 0, 0
	x.Status, x.Code = 0, -1
	x.down.release()
	x.wait()
}

// lastFailure is what the attempt before came to.
func (x *stream) lastFailure() *Failure {
	switch {
	case x.Cause == guard.TimedOut:
		return failTryTimeout
	case x.Last == 0:
		return failDispatch
	}
	return failureOf(x.Last)
}

// retime writes what is left of the caller's own deadline into the head that is kept: the
// time that was spent here is spent there, too.
func (x *stream) retime(fields []Field) {
	left, ok := guard.Remaining(x.Policy.Expires(x.Start, x.wire), now())
	if x.wire == 0 || !ok || x.sent > 0 {
		return
	}
	for i := range fields {
		if fields[i].Name == guard.GRPCTimeout {
			fields[i].Value = string(guard.AppendGRPCTimeout(nil, left))
			x.rehead(fields)
			return
		}
	}
}
