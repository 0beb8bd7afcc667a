package mux

import (
	"sync"
	"sync/atomic"
)

// Stream is one direction pair: a small comparable value. Its methods may be called
// by any goroutine, each direction by one at a time. All of them are harmless on a
// stream that ended, however long ago; the zero Stream has ended.
type Stream struct {
	c  *stream
	id uint32 // of the stream that c was when this value was made
}

// stream is what a Stream points to. Session.mu guards it, except where noted. It is
// pooled by its session: numbers are never used twice, so a Stream whose number is
// not c.id is a stale one.
//
// Each direction ends once, by FIN or RESET. A stream leaves the table when both
// have. After our RESET it stays there as a zombie (flagDead) until the peer has
// ended its direction too: what it sent meanwhile is dropped.
type stream struct {
	s     *Session
	id    uint32
	live  atomic.Uint32 // id while the handler may be called
	call  sync.Mutex    // held while the handler is called; taken before Session.mu
	h     Handler       // written before the first call, or under call
	next  *stream       // in the table or the free list
	queue *stream       // in room or notify
	flags flags
	pins  int // who still looks at it after it ended: it is not pooled meanwhile

	window  int // what recv began with, and grew by
	recv    int // bytes that the peer may still send
	held    int // bytes received and not consumed
	granted int // bytes consumed and not yet credited
	credit  int // bytes that we may still send

	wake chan struct{} // for the one blocked Write
}

type flags uint16

const (
	flagSentEnd flags = 1 << iota // we sent FIN or RESET
	flagGotEnd                    // the peer did
	flagDead                      // reset by either side: the API does nothing any more
	flagQueued                    // in room or notify
	flagBlocked                   // a Write waits on wake
	flagShort                     // a TryWrite waits for credit
	flagCounted                   // in mine or theirs
	flagGone                      // out of the table
	flagShut                      // the peer has sent SHUT
)

// newStream takes a stream from the pool and puts it into the table.
func (s *Session) newStream(id uint32) *stream {
	c := s.free
	if c == nil {
		c = &stream{s: s, wake: make(chan struct{}, 1)}
	} else {
		s.free = c.next
		s.nfree--
		select {
		case <-c.wake:
		default:
		}
	}
	c.id, c.flags = id, flagCounted
	c.window = s.cfg.Window
	c.recv, c.held, c.granted, c.credit = c.window, 0, 0, s.peer.window
	s.streams.put(c)
	return c
}

// uncount takes c out of the numbers of open streams.
func (s *Session) uncount(c *stream) {
	if c.flags&flagCounted == 0 {
		return
	}
	c.flags &^= flagCounted
	if c.id%2 == s.next%2 {
		s.mine--
	} else {
		s.theirs--
	}
}

// settle takes c out of the table once both directions have ended.
func (s *Session) settle(c *stream) {
	if c.flags&(flagSentEnd|flagGotEnd) != flagSentEnd|flagGotEnd || c.flags&flagGone != 0 || s.end != nil {
		return
	}
	if c.flags&flagCounted == 0 {
		s.zombies--
	}
	s.uncount(c)
	s.streams.remove(c)
	s.grown -= c.window - s.cfg.Window
	c.flags |= flagGone
	s.release(c)
	s.maybeDrained()
}

// release pools c when nobody looks at it any more.
func (s *Session) release(c *stream) {
	if c.pins > 0 || c.flags&flagGone == 0 {
		return
	}
	c.live.Store(0)
	c.id, c.h = 0, nil
	c.next, s.free = s.free, c
	s.nfree++
}

func (s *Session) unpin(c *stream) {
	c.pins--
	s.release(c)
}

// lock locks the session when st is a stream that can still be used.
func (st Stream) lock() (*Session, *stream, error) {
	if st.c == nil {
		return nil, nil, ErrEnded
	}
	s := st.c.s
	s.mu.Lock()
	if s.end != nil {
		s.mu.Unlock()
		return nil, nil, ErrClosed
	}
	if st.c.id != st.id || st.c.flags&(flagDead|flagGone) != 0 {
		s.mu.Unlock()
		return nil, nil, ErrEnded
	}
	return s, st.c, nil
}

// ID returns the stream's number in its session, for logs.
func (st Stream) ID() uint32 { return st.id }

// IsZero reports whether st is no stream at all.
func (st Stream) IsZero() bool { return st.c == nil }

// Session returns the stream's session, nil for the zero Stream.
func (st Stream) Session() *Session {
	if st.c == nil {
		return nil
	}
	return st.c.s
}

// Write queues p, and fin after it, blocking for credit and for the writer's queue.
// A handler must not call it.
func (st Stream) Write(p []byte, fin bool) error {
	s, c, err := st.lock()
	if err != nil {
		return err
	}
	defer s.mu.Unlock()
	if c.flags&flagSentEnd != 0 {
		return ErrEnded
	}
	c.pins++
	defer s.unpin(c)
	for {
		n := s.queue(c, p, fin)
		p = p[n:]
		if len(p) == 0 {
			s.wakeRoom()
			s.flushOwn()
			return nil
		}
		if c.credit == 0 {
			s.wakeRoom() // the room that we may have been woken for is another's
		}
		// What is queued goes out before we wait; that may make the room we need.
		s.flushOwn()
		if s.end == nil && c.flags&flagDead == 0 && (c.credit == 0 || !s.hasRoom(min(len(p), c.credit, maxPayload))) {
			s.block(c)
		}
		switch {
		case s.end != nil:
			return ErrClosed
		case c.flags&flagDead != 0:
			s.wakeRoom() // the room that we were woken for is another's
			return ErrEnded
		}
	}
}

// block waits for a wake-up. The caller checks what it waits for again.
func (s *Session) block(c *stream) {
	c.flags |= flagBlocked
	if c.credit > 0 {
		s.room.push(c)
	}
	s.mu.Unlock()
	<-c.wake
	s.mu.Lock()
	c.flags &^= flagBlocked
}

func (c *stream) wakeWriter() {
	if c.flags&flagBlocked != 0 {
		select {
		case c.wake <- struct{}{}:
		default:
		}
	}
}

// TryWrite queues what fits now and never blocks. n == len(p) means that everything
// was taken, fin included; otherwise fin was not, and Handler.Writable follows.
func (st Stream) TryWrite(p []byte, fin bool) (n int, err error) {
	s, c, err := st.lock()
	if err != nil {
		return 0, err
	}
	defer s.mu.Unlock()
	if c.flags&flagSentEnd != 0 {
		return 0, ErrEnded
	}
	n = s.queue(c, p, fin)
	s.await(c, n < len(p))
	s.kick()
	return n, nil
}

// await arranges for Writable when a TryWrite took less than it was given.
func (s *Session) await(c *stream, short bool) {
	switch {
	case !short:
	case c.credit == 0:
		c.flags |= flagShort
	default:
		s.room.push(c)
	}
}

// Consumed gives the peer credit for n received bytes.
func (st Stream) Consumed(n int) {
	s, c, err := st.lock()
	if err != nil {
		return
	}
	defer s.mu.Unlock()
	n = min(n, c.held) // more would let the peer exceed the window
	c.held -= n
	c.granted += n
	if c.granted >= c.window/4 && c.flags&flagGotEnd == 0 {
		s.grow(c)
		s.out = appendCredit(s.out, c.id, c.granted)
		c.recv += c.granted
		c.granted = 0
		s.kick()
	}
}

// grow widens the window of a stream whose bytes are consumed as they come: bulk then
// needs less credit, and a long way between the proxies is filled.
func (s *Session) grow(c *stream) {
	more := min(c.window, s.cfg.MaxWindow-c.window, s.cfg.MaxGrowth-s.grown)
	if more <= 0 || c.held > c.window/4 {
		return
	}
	c.window += more
	c.granted += more
	s.grown += more
}

// Shut tells the peer that the connection whose bytes this stream carries was
// half-closed by its owner: a stream that ends with a message has sent its fin long
// before. It ends nothing. It is called once at most.
func (st Stream) Shut() {
	s, c, err := st.lock()
	if err != nil {
		return
	}
	defer s.mu.Unlock()
	s.out = appendShut(s.out, c.id)
	s.kick()
}

// Reset ends both directions at once. The handler is not called again, though a
// call that runs in another goroutine may still have to return.
func (st Stream) Reset(code Code) {
	s, c, err := st.lock()
	if err != nil {
		return
	}
	defer s.mu.Unlock()
	s.reset(c, code)
	s.kick()
}

// reset sends RESET and makes c a zombie, or ends it when the peer has ended its
// direction already.
func (s *Session) reset(c *stream, code Code) {
	if code == 0 {
		code = Cancelled
	}
	s.out = appendReset(s.out, c.id, code)
	s.uncount(c)
	s.zombies++
	c.live.Store(0)
	c.flags |= flagDead | flagSentEnd
	c.wakeWriter()
	s.settle(c)
}

// sentFin notes that FIN was queued.
func (s *Session) sentFin(c *stream) {
	c.flags |= flagSentEnd
	s.settle(c)
}

// queue is a list of streams, first in first out, each at most once in all.
type queue struct{ head, tail *stream }

func (q *queue) push(c *stream) {
	if c.flags&flagQueued != 0 {
		return
	}
	c.flags |= flagQueued
	c.pins++
	if q.tail == nil {
		q.head = c
	} else {
		q.tail.queue = c
	}
	q.tail = c
}

// pop takes the first one, which stays pinned.
func (q *queue) pop() *stream {
	c := q.head
	q.head, c.queue = c.queue, nil
	if q.head == nil {
		q.tail = nil
	}
	c.flags &^= flagQueued
	return c
}
