package mux

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Session is one connection's state.
type Session struct {
	conn   net.Conn
	sock   *Socket // below conn; nil: writes may block
	cfg    Config
	accept Accept
	born   time.Time

	lastRead atomic.Int64 // nanoseconds since born

	mu      sync.Mutex
	end     *Error // why the session ended; nil while it lives
	drained bool   // it ended because the drain was complete

	streams table
	free    *stream // pooled streams
	nfree   int
	mine    int // open streams that we opened
	theirs  int
	zombies int // streams that we reset and whose peer has not answered yet

	next     uint32 // number of the next stream that we open
	nextPeer uint32
	peer     peerSettings
	settled  bool // the peer's settings were read
	saidBye  bool // we sent GOAWAY
	heardBye bool
	peerLast uint32 // of the peer's last word: streams of ours above it are unread
	lastWord bool   // the peer ended the session itself

	out, spare  []byte // queued by all; being written, or kept for the next turn
	writing     bool   // somebody writes out, or the flusher waits to
	written     sync.Cond
	parked      bool // a flusher waits for the writer
	given       bool // and has it now
	work        sync.Cond
	writes      uint64    // finished, for the keepalive
	dispatching bool      // the reader calls handlers and will write what they queue
	holds       int       // batches that will write what is queued
	after       []Flusher // to be called when the reader has called its handlers
	room        queue     // streams that wait for room in out
	notify      queue     // streams whose Writable the notifier will call
	notifying   bool
	flusherFn   func() // bound once: `go s.flusher()` would allocate
	notifierFn  func()
	tasks       sync.WaitGroup

	alive keepalive
	flood flood
	grown int  // by what windows exceed cfg.Window
	rest  rest // of a DATA frame that is being received; the reader's

	small [smallRead]byte // the reader's buffer while little arrives
}

// New makes a session over conn. The client side opens streams with odd numbers,
// the server side with even ones; both may open. accept may be nil. Run must be
// called, once, whatever happens.
//
// conn should be a TLS connection over a Socket: then no write blocks, whoever
// makes it. Over any other connection writes of the reader and of TryWrite go
// through a goroutine.
func New(conn net.Conn, client bool, cfg Config, accept Accept) *Session {
	s := &Session{
		conn:   conn,
		sock:   socketUnder(conn),
		cfg:    cfg.withDefaults(),
		accept: accept,
		born:   time.Now(),
		peer:   peerSettings{initialWindow, initialStreams, initialOpen},
		next:   2, nextPeer: 1,
	}
	if client {
		s.next, s.nextPeer = 1, 2
	}
	if s.sock != nil {
		s.sock.nonblocking.Store(true)
	}
	s.written.L, s.work.L = &s.mu, &s.mu
	s.flusherFn, s.notifierFn = s.flusher, s.notifier
	s.out = appendPreface(make([]byte, 0, 512), &s.cfg)
	return s
}

// Run reads until the connection ends, calls handlers, closes the connection and
// returns why it ended: nil after a drain, an *Error otherwise. All streams have
// been reset when it returns, with Broken, or with Refused when the peer said that
// it had not looked at them.
func (s *Session) Run() error {
	s.mu.Lock()
	if s.end == nil {
		s.startKeepalive()
		s.kick()
	}
	s.mu.Unlock()

	err := s.read()

	s.mu.Lock()
	s.failLocked(err)
	end, drained := s.end, s.drained
	s.mu.Unlock()
	s.breakStreams()
	s.farewell(end)
	s.conn.Close()
	s.stopKeepalive()
	s.tasks.Wait()
	if drained {
		return nil
	}
	return end
}

// Close ends the session at once with a reason for the peer's log, and Run returns.
func (s *Session) Close(reason error) {
	s.mu.Lock()
	s.failLocked(&Error{Reason: ReasonClosed, Err: reason})
	s.mu.Unlock()
}

// Err returns why the session ended, nil while it lives or after a drain.
func (s *Session) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.end == nil || s.drained {
		return nil
	}
	return s.end
}

// Drain accepts and opens no further stream; Run returns when the last one ended.
// The peer drains too, so that no stream is lost between the two.
func (s *Session) Drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.end != nil {
		return
	}
	s.sayBye()
	s.maybeDrained()
	s.kick()
}

func (s *Session) sayBye() {
	if !s.saidBye {
		s.saidBye = true
		s.out = appendGoaway(s.out, 0, s.lastPeer(), "draining")
	}
}

// lastPeer is the highest stream of the peer that accept has been asked about.
func (s *Session) lastPeer() uint32 {
	if s.nextPeer <= 2 {
		return 0
	}
	return s.nextPeer - 2
}

// maybeDrained ends a session that both sides drained: the peer's GOAWAY follows
// everything that it opened, so nothing can still be on its way.
func (s *Session) maybeDrained() {
	if s.saidBye && s.heardBye && s.streams.n == 0 && s.end == nil {
		s.drained = true
		s.failLocked(&Error{Reason: ReasonClosed, Detail: "drained"})
	}
}

// Streams returns how many streams are open, for balancing and pooling.
func (s *Session) Streams() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mine + s.theirs
}

// Usable reports whether Open may succeed: neither ended nor draining.
func (s *Session) Usable() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.end == nil && !s.saidBye && !s.heardBye
}

// Open starts a stream. data and fin travel in the same frame as open when they
// fit: a small request costs one frame. The handler may be called before Open
// returns. It never blocks: n bytes of data were taken; when n < len(data), fin was
// not sent and Handler.Writable follows.
func (s *Session) Open(open, data []byte, fin bool, h Handler) (st Stream, n int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.end != nil:
		return st, 0, ErrClosed
	case s.saidBye || s.heardBye:
		return st, 0, ErrDraining
	case len(open) > s.peer.maxOpen:
		return st, 0, ErrOpenTooLong
	case s.mine >= s.peer.maxStreams || len(s.out) >= s.cfg.MaxQueued || s.zombies > s.maxZombies():
		return st, 0, ErrBusy
	case s.next >= lastNumber: // hours of very small requests; the pool dials another
		s.sayBye()
		s.kick()
		return st, 0, ErrDraining
	}
	c := s.newStream(s.next)
	s.next += 2
	s.mine++
	c.h = h
	c.live.Store(c.id)
	st = Stream{c, c.id}

	n = min(len(data), maxWhole-2-len(open), c.credit)
	if !s.hasRoom(n) {
		n = 0
	}
	c.credit -= n
	if fin && n == len(data) {
		s.out = appendOpen(s.out, flagFin, c.id, open, data[:n])
		s.sentFin(c)
	} else {
		s.out = appendOpen(s.out, 0, c.id, open, data[:n])
		n += s.queue(c, data[n:], fin)
		s.await(c, n < len(data))
	}
	s.kick()
	return st, n, nil
}

const lastNumber = 1<<32 - 4

// failLocked ends the session for err, unless it has ended. The reader notices by
// its deadline, writers by theirs.
func (s *Session) failLocked(err *Error) {
	if s.end != nil {
		return
	}
	s.end = err
	s.unpark()
	s.conn.SetReadDeadline(longAgo)
	s.conn.SetWriteDeadline(time.Now().Add(goodbyeTime))
	s.streams.each(func(c *stream) { c.wakeWriter() })
}

var longAgo = time.Unix(1, 0)

// goodbyeTime bounds what is written, and linger what is read, after the end.
const (
	goodbyeTime = time.Second
	linger      = 250 * time.Millisecond
)

// breakStreams tells every handler that its stream is over. Only Run calls it, after
// the reader stopped.
func (s *Session) breakStreams() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.room, s.notify = queue{}, queue{}
	for i := range s.streams.bucket { // no stream is added any more
		for s.streams.bucket[i] != nil {
			c := s.streams.bucket[i]
			id, h, code := c.id, c.h, Broken
			if s.lastWord && id%2 == s.next%2 && id > s.peerLast {
				code = Refused
			}
			tell := c.flags&flagDead == 0 && h != nil
			c.live.Store(0)
			c.flags |= flagDead
			c.pins++
			s.streams.remove(c)
			s.mu.Unlock()

			c.call.Lock()
			if tell {
				h.Reset(Stream{c, id}, code)
			}
			c.call.Unlock()
			s.mu.Lock()
		}
	}
	s.mine, s.theirs = 0, 0
}

// farewell sends what is queued and why we end, when the peer may still listen,
// and gives it a moment to read that: closing a socket with unread bytes in it would
// make the kernel discard what is on its way to the peer.
func (s *Session) farewell(end *Error) {
	s.mu.Lock()
	for s.writing {
		s.written.Wait()
	}
	if s.lastWord || end.Reason == ReasonIO || end.Reason == ReasonTimeout || end.Reason == ReasonPeerClosed {
		s.mu.Unlock()
		return
	}
	buf := s.out
	if !s.drained { // after a drain both sides know that it is over
		text := end.Reason
		if end.Detail != "" {
			text = end.Detail
		} else if end.Err != nil {
			text = end.Err.Error()
		}
		buf = appendGoaway(buf, flagFin, s.lastPeer(), text)
	}
	s.out, s.writing = nil, true
	s.mu.Unlock()

	if err := s.writeAll(buf); err == nil {
		s.lingerOn()
	}
	s.mu.Lock()
	s.writing = false
	s.mu.Unlock()
}

// writeAll writes buf and waits until the kernel has all of it.
func (s *Session) writeAll(buf []byte) error {
	if len(buf) == 0 && !s.full() {
		return nil
	}
	if s.sock == nil {
		_, err := s.conn.Write(buf)
		return err
	}
	if err := s.sock.drain(); err != nil {
		return err
	}
	if _, err := s.conn.Write(buf); err != nil {
		return err
	}
	return s.sock.drain()
}

func (s *Session) lingerOn() {
	half, ok := s.conn.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		return
	}
	s.conn.SetReadDeadline(time.Now().Add(linger))
	for total := 0; total < 1<<20; {
		n, err := s.conn.Read(s.small[:])
		if err != nil {
			return
		}
		total += n
	}
}

// readEnd turns the reader's error into an Error.
func readEnd(err error) *Error {
	if errors.Is(err, io.EOF) {
		return &Error{Reason: ReasonPeerClosed, Detail: "without a goodbye"}
	}
	return &Error{Reason: ReasonIO, Err: err}
}
