package http1

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"assay.dev/proxy/nowait"
)

// Outbound serves an application's own HTTP/1 connections: each request becomes a
// stream to an upstream that a Dispatcher chooses, and the reader of that stream's
// session writes the response straight into the application's socket.
type Outbound struct {
	Limits   Limits
	Timeouts Timeouts

	mu       sync.Mutex
	conns    map[*client]struct{}
	draining bool
	give     Give
}

// Give hands an application's connection to another process between two requests:
// first are the bytes that were read of the next one. It reports whether that one has
// it now; then it is not touched here any more.
type Give func(tcp nowait.Conn, first []byte) bool

// ErrStopped is returned by Serve when its context ended.
var ErrStopped = errors.New("http1: stopped")

// lingerTime bounds how long a connection that we shut down is read, so that its
// last answer is not destroyed by a reset for bytes that arrived late.
const lingerTime = 2 * time.Second

// Serve carries tcp's requests until it ends, and closes it. first are the bytes
// that were read from it already. It returns nil when the connection ended as HTTP
// lets it end, and otherwise why it did not: a *Refusal among others. The end of ctx resets it.
func (o *Outbound) Serve(ctx context.Context, tcp nowait.Conn, first []byte, d Dispatcher) error {
	c := &client{d: d, observer: d}
	c.planner, _ = d.(Planner)
	if err := c.init(ctx, o, tcp, first); err != nil {
		return err
	}
	return c.live(o)
}

// Drain lets every connection finish the request that it carries, and closes the idle
// ones; no new one lives beyond its first request. With give, which may be nil, they
// are given away instead; what cannot be goes on here. It returns at once.
func (o *Outbound) Drain(give Give) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.draining, o.give = true, give
	for c := range o.conns {
		c.drain(give)
	}
}

func (o *Outbound) add(c *client) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.conns == nil {
		o.conns = map[*client]struct{}{}
	}
	o.conns[c] = struct{}{}
	c.draining, c.fresh, c.give = o.draining, o.draining, o.give
}

func (o *Outbound) remove(c *client) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.conns, c)
}

// client is one application connection. Its goroutine reads and sends requests;
// responses are written by whoever receives them (answer.go).
type client struct {
	d        Dispatcher
	planner  Planner  // d, if it is one
	observer Observer // of exchanges, d's; nil when direct counts them
	direct   *Inbound // instead of d: the application is here
	origin   Origin
	ctx      context.Context
	tcp      nowait.Conn
	raw      syscall.RawConn
	lim      Limits
	timeouts Timeouts
	read     func(fd uintptr) bool // bound once
	wake     chan struct{}         // for the goroutine, while it does not read
	unwatch  func() bool           // of ctx

	// The goroutine's own.
	req      Request
	body     Body
	class    uint8 // of the next buffer
	uploaded bool  // bytes beyond the first ones were sent: no other upstream can get them

	w outlet

	mu       sync.Mutex
	in       *buffer // what was read; nil while there is nothing
	sent     int     // how much of it the upstream was given
	readErr  error
	x        *exchange
	timer    *time.Timer   // of the first exchange that had a limit
	armed    time.Duration // when it fires; 0: it does not
	deadline time.Time
	kicked   bool // the deadline is a signal to the goroutine
	waiting  bool // it waits on wake
	eof      bool // the application half-closed
	draining bool
	give     Give // instead of closing when drained
	fresh    bool // it came while draining: its first request is carried
	closing  bool // our side is shut down: only the end is waited for
	dead     bool // the socket is closed or useless
	stopped  bool // ctx ended
}

var (
	errKicked = errors.New("http1: woken")
	longAgo   = time.Unix(1, 0)
)

// live is the life of a connection after init.
func (c *client) live(o *Outbound) error {
	err := c.serve()
	c.unwatch()
	o.remove(c)
	c.close()
	return err
}

func (c *client) init(ctx context.Context, o *Outbound, tcp nowait.Conn, first []byte) (err error) {
	if c.raw, err = tcp.SyscallConn(); err != nil {
		tcp.Close()
		return err
	}
	c.ctx, c.tcp = ctx, tcp
	c.lim, c.timeouts = o.Limits.WithDefaults(), o.Timeouts.WithDefaults()
	c.read, c.wake = c.readFD, make(chan struct{}, 1)
	c.w.init(c.flushed, c.timeouts.Stall)
	c.w.open(tcp, c.raw)
	if len(first) > 0 {
		c.in = held(nil, first)
	}
	o.add(c)
	c.unwatch = context.AfterFunc(ctx, c.stop)
	return nil
}

// serve is the life of the connection.
func (c *client) serve() error {
	for {
		more, err := c.nextHead()
		if !more {
			return err
		}
		more, err = c.carry()
		if !more {
			return err
		}
	}
}

// nextHead waits for a request and parses its head. Without one it returns why the
// connection ends.
func (c *client) nextHead() (bool, error) {
	c.req.Reset()
	armed := false
	for {
		if c.given() {
			return false, nil
		}
		if c.in != nil {
			if !c.req.Begun() && len(c.in.b) >= 2 && string(c.in.b[:2]) == "\r\n" {
				// One empty line before a request is skipped (RFC 9112 section 2.2): old
				// clients end a body with it. It belongs to no message.
				c.discard(2)
				continue
			}
			if c.req.Begun() || string(c.in.b) != "\r" { // which may be half of such a line
				ok, refusal := c.req.Parse(c.in.b, &c.lim)
				if refusal != nil {
					c.refuse(refusal)
					return false, refusal
				}
				if ok {
					if armed {
						c.setDeadline(time.Time{})
					}
					return true, nil
				}
			}
			if c.in.full() {
				c.in = c.in.grown(len(c.in.b), max(c.lim.Head, len(c.in.b)+1))
			}
			if !armed {
				armed = true
				c.setDeadline(time.Now().Add(c.timeouts.Head))
			}
		}
		if more, err := c.idle(armed); !more {
			return false, err
		}
	}
}

// idle waits for bytes of a request.
func (c *client) idle(begun bool) (bool, error) {
	if more, err := c.wanted(begun); !more {
		return false, err
	}
	err := c.fill()
	switch {
	case err == nil || err == errKicked:
		return true, nil
	case err == errTimeout:
		c.refuse(ErrHeadSlow)
		return false, ErrHeadSlow
	case err == io.EOF || !begun:
		return false, nil
	}
	return false, err
}

// wanted reports whether another request is.
func (c *client) wanted(begun bool) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.stopped:
		return false, ErrStopped
	case c.eof || c.closing || c.dead:
		return false, nil
	case c.draining && c.give == nil && !c.fresh && !begun && c.in == nil:
		c.shutdown()
		return false, nil
	}
	return true, nil
}

// given gives the connection away, if it is drained and can be. Whoever has it reads
// the head again from its first byte. A connection that authenticated itself is bound
// to an upstream, and stays.
func (c *client) given() bool {
	c.mu.Lock()
	give := c.give
	if !c.draining || c.stopped || c.eof || c.closing || c.dead || c.x != nil && c.x.bound {
		give = nil
	}
	c.mu.Unlock()
	if give == nil {
		return false
	}
	var first []byte
	if c.in != nil {
		first = c.in.b
	}
	gone := give(c.tcp, first)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !gone {
		c.give = nil // it ends as drained connections do
		return false
	}
	c.dead = true
	return true
}

// discard drops n bytes of the input.
func (c *client) discard(n int) {
	if n == len(c.in.b) {
		c.in.release()
		c.in = nil
		return
	}
	c.in.drop(n)
}

var errTimeout = errors.New("http1: timeout")

// fill waits for bytes and appends them to c.in. There must be room. It and what
// calls it have small frames: they are what an idle connection's stack consists of.
func (c *client) fill() error {
	if err := c.raw.Read(c.read); err != nil {
		return c.notRead(err)
	}
	if c.readErr == io.EOF {
		c.halfClosed()
	}
	return c.readErr
}

func (c *client) halfClosed() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.eof = true
}

// notRead says why fill did not wait to its end.
func (c *client) notRead(err error) error {
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.kicked {
		return errTimeout
	}
	c.kicked = false
	c.tcp.SetReadDeadline(c.deadline)
	return errKicked
}

// readFD reads once the socket has something: no buffer is held before.
func (c *client) readFD(fd uintptr) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.in == nil {
		c.in = takeBuffer(c.class)
	}
	n, err := nowait.Read(fd, c.in.room())
	if n == 0 && err == nil {
		err = io.EOF
	}
	c.in.b = c.in.b[:len(c.in.b)+n]
	switch len(c.in.b) {
	case 0:
		c.in.release()
		c.in = nil
	case n:
		c.in = c.in.trimmed()
	}
	c.readErr = err
	return err != nowait.Again
}

// setDeadline bounds reads; the zero time unbounds them.
func (c *client) setDeadline(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.deadline = t
	if !c.kicked {
		c.tcp.SetReadDeadline(t)
	}
}

// kick calls the goroutine away from what it waits for.
func (c *client) kick() {
	if !c.waiting {
		c.kicked = true
		c.tcp.SetReadDeadline(longAgo)
	}
	c.signal()
}

func (c *client) signal() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *client) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = true
	c.kick()
}

func (c *client) drain(give Give) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.draining, c.give = true, give
	c.kick()
}

// shutdown half-closes our side once everything has been written, and bounds what
// is still waited for.
func (c *client) shutdown() {
	if c.closing {
		return
	}
	c.closing = true
	c.w.shutdown()
	c.deadline = time.Now().Add(lingerTime)
	if !c.kicked {
		c.tcp.SetReadDeadline(c.deadline)
	}
}

// abort has the goroutine reset the connection: what was cut short may not look
// complete. To close it here, under mu, would wait for calls that wait for mu.
func (c *client) abort() {
	if c.dead {
		return
	}
	c.dead = true
	c.tcp.SetLinger(0)
	c.kick()
}

// close ends the connection.
func (c *client) close() {
	c.mu.Lock()
	linger := c.closing && !c.eof && !c.dead
	x := c.x
	if c.timer != nil {
		c.timer.Stop()
	}
	c.mu.Unlock()
	if x != nil && x.bound && !x.gone {
		x.st.tryWrite(nil, true)
	}
	if linger {
		c.linger()
	}
	c.mu.Lock()
	c.dead = true
	if c.in != nil {
		c.in.release()
		c.in = nil
	}
	c.mu.Unlock()
	c.tcp.Close()
	c.w.close()
}

// linger reads and forgets what still comes.
func (c *client) linger() {
	for {
		if c.in != nil {
			c.discard(len(c.in.b))
		}
		switch err := c.fill(); {
		case err == nil:
		case err == errKicked:
			c.mu.Lock()
			stopped := c.stopped || c.dead
			c.mu.Unlock()
			if stopped {
				return
			}
		default:
			return
		}
	}
}
