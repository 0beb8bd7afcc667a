package http2

import (
	"encoding/binary"
	"time"
)

// alive asks a silent peer whether it is there, and looks for readers that do not read.
// Its timer runs while the connection has streams, or drains. conn.mu guards it.
type alive struct {
	timer   *time.Timer
	running bool
	read    time.Duration // when bytes last came
	asked   time.Duration // when a PING was sent that is not answered
	number  uint64
}

const tickEvery = 10 * time.Second

func (a *alive) start(c *conn) {
	if a.running || c.end != nil {
		return
	}
	a.running = true
	every := min(tickEvery, c.cfg.PingEvery, c.cfg.PingTimeout, c.cfg.StallTime)
	if c.bye.asked {
		every = min(every, time.Second)
	}
	if a.timer == nil {
		a.timer = time.AfterFunc(every, c.tick)
		return
	}
	a.timer.Reset(every)
}

func (a *alive) stop() {
	if a.timer != nil {
		a.timer.Stop()
	}
	a.running = false
}

// tick runs in the timer's goroutine.
func (c *conn) tick() {
	c.mu.Lock()
	defer c.mu.Unlock()
	a := &c.alive
	a.running = false
	if c.end != nil {
		return
	}
	if c.bye.asked && !c.bye.said {
		c.sayBye() // the peer does not answer: it has been told for a second
	}
	if c.streams.n == 0 {
		c.streams.shrink()
		c.flush()
		c.slim()
		return
	}
	t := now()
	switch {
	case a.asked != 0 && t-a.asked >= c.cfg.PingTimeout && t-a.read >= c.cfg.PingTimeout:
		c.fail(ErrSilent)
		return
	case a.asked == 0 && t-a.read >= c.cfg.PingEvery:
		a.asked = t
		a.number++
		c.out = appendPing(c.out, 0, binary.BigEndian.AppendUint64(nil, a.number))
	case a.asked != 0 && a.read > a.asked:
		a.asked = 0 // it speaks, if not to the point
	}
	c.stalls(t)
	c.relieve(nil)
	c.flush()
	a.start(c)
}

func (a *alive) answered(c *conn, p []byte) {
	if string(p) == string(drainPing) && c.bye.asked {
		c.sayBye()
		return
	}
	a.asked = 0
}

// scarceTime is how long a reader may take nothing while others are refused for it.
const scarceTime = 10 * time.Second

// stalls resets streams whose reader has not opened its windows for long, when what waits
// for such readers is more than the connection may hold; and as many of those that have not
// for a while as make room when new streams are refused.
func (c *conn) stalls(t time.Duration) {
	if c.greedy() {
		c.shed(c.enough()/3*2, ErrWindowStall, func(x *stream) bool { return x.since != 0 && t-x.since >= min(scarceTime, c.cfg.StallTime) })
	}
	waiting := 0
	c.streams.each(func(x *stream) {
		if x.since != 0 {
			waiting += len(x.down.b)
		}
	})
	if waiting <= c.cfg.StallBytes {
		return
	}
	c.streams.each(func(x *stream) {
		if x.since != 0 && t-x.since >= c.cfg.StallTime {
			x.refuse(ErrWindowStall)
		}
	})
}
