// Package mux carries many streams over one connection between two proxies.
//
// Writes are group commits: whoever finds the connection's writer idle writes
// everything that all streams have queued, so that one TLS record and one system
// call serve many requests. Reads are direct: the session's one reader calls each
// stream's Handler, which writes into its own socket without blocking; there is no
// hand-off to another goroutine. Every stream has credit of its own, so one that
// nobody drains holds up no other, and memory is bounded by Config.Window for each.
//
// It refuses to know what it carries: the open payload and the data are bytes.
//
// Goroutines: the caller's, in Run (the reader), and whoever writes.
package mux

import (
	"errors"
	"net"
	"time"
)

// Code says why a stream ended early. Codes cross the wire; the list is append-only.
type Code uint16

const (
	Cancelled   Code = iota + 1 // the side that opened it lost interest
	Refused                     // not accepted and provably unread: safe to try elsewhere
	Unreachable                 // the application's connect() failed
	AppReset                    // the application reset its connection
	BadRequest                  // the payload is not what the stream's header says
	Overloaded                  // a limit was reached; unread
	Broken                      // the session died under it
	Denied                      // a rule forbids it; unread
)

// Config bounds a session. Zero fields take the defaults in parentheses.
type Config struct {
	Window      int           // bytes in flight on a stream without credit (256 KiB, at least 16 KiB)
	MaxStreams  int           // open streams that the peer may have (10,000)
	MaxQueued   int           // bytes waiting for the writer before Write blocks (1 MiB)
	MaxOpen     int           // bytes of an open payload (8 KiB)
	PingEvery   time.Duration // silence after which the peer is asked (10 s)
	PingTimeout time.Duration // silence after which it is dead (5 s more)
}

// Handler receives what the peer sends on one stream, in order and never
// concurrently for that stream. It is called by the session's reader (Writable
// also by another goroutine), so it must never block. It is given its stream
// because the first call may come before Session.Open has returned.
type Handler interface {
	// Received takes the next bytes, which are valid until it returns. fin is the
	// peer's half-close; it may come without bytes. Bytes count against the window
	// until Stream.Consumed.
	Received(st Stream, p []byte, fin bool)
	// Reset is the last call when the peer or the end of the session ended the
	// stream. It does not follow the holder's own Stream.Reset, nor an end by fin
	// in both directions.
	Reset(st Stream, code Code)
	// Writable follows a TryWrite or Open that took less than it was given.
	Writable(st Stream)
}

// Accept is called by the reader for each stream that the peer opens. It returns
// the stream's handler, or nil and the code that refuses it. open is valid until it
// returns. Data that came with the opening follows in Received.
type Accept func(st Stream, open []byte) (Handler, Code)

var (
	// ErrClosed is returned for what is asked of a session that ended.
	ErrClosed = errors.New("mux: session closed")
	// ErrDraining is returned by Open when either side drains the session: use or
	// dial another one.
	ErrDraining = errors.New("mux: session is draining")
	// ErrBusy is returned by Open when the peer's limit of streams or MaxQueued is
	// reached: use another session, or wait.
	ErrBusy = errors.New("mux: session is at its limit")
	// ErrEnded is returned for what is asked of a stream that ended, or that sent
	// its fin. Handler.Reset tells why.
	ErrEnded = errors.New("mux: stream ended")
)

// New makes a session over conn. The client side opens streams with odd numbers,
// the server side with even ones; both may open. accept may be nil.
//
// conn should be a TLS connection over a Socket: then no write blocks, whoever
// makes it. Over any other connection writes of the reader and of TryWrite go
// through a goroutine.
func New(conn net.Conn, client bool, cfg Config, accept Accept) *Session { panic("mux") }

// Session is one connection's state.
type Session struct{}

// Run reads until the connection ends, calls handlers, closes the connection and
// returns why it ended: nil after a drain, an *Error otherwise. All streams have been reset with
// Broken when it returns. It is called exactly once.
func (s *Session) Run() error { panic("mux") }

// Close ends the session at once with a reason for the peer's log.
func (s *Session) Close(reason error) {}

// Drain accepts and opens no further stream; Run returns when the last one ended.
func (s *Session) Drain() {}

// Open starts a stream. data and fin travel in the same frame as open when they
// fit: a small request costs one frame. The handler may be called before Open
// returns. It never blocks: n bytes of data were taken; when n < len(data), fin was
// not sent and Handler.Writable follows.
func (s *Session) Open(open, data []byte, fin bool, h Handler) (st Stream, n int, err error) {
	panic("mux")
}

// Streams returns how many streams are open, for balancing and pooling.
func (s *Session) Streams() int { panic("mux") }

// Usable reports whether Open may succeed: neither ended nor draining.
func (s *Session) Usable() bool { panic("mux") }

// Stream is one direction pair: a small comparable value. Its methods may be called
// by any goroutine, each direction by one at a time. All of them are harmless on a
// stream that ended, however long ago; the zero Stream has ended.
type Stream struct {
	c  *stream
	id uint32
}

type stream struct{}

// ID returns the stream's number in its session, for logs.
func (st Stream) ID() uint32 { return st.id }

// IsZero reports whether st is no stream at all.
func (st Stream) IsZero() bool { return st.c == nil }

// Write queues p, and fin after it, blocking for credit and for the writer's queue.
// A handler must not call it.
func (st Stream) Write(p []byte, fin bool) error { panic("mux") }

// TryWrite queues what fits now and never blocks. n == len(p) means that everything
// was taken, fin included; otherwise fin was not, and Handler.Writable follows.
func (st Stream) TryWrite(p []byte, fin bool) (n int, err error) { panic("mux") }

// Consumed gives the peer credit for n received bytes.
func (st Stream) Consumed(n int) { panic("mux") }

// Reset ends both directions at once. The handler is not called again, though a
// call that runs in another goroutine may still have to return.
func (st Stream) Reset(code Code) { panic("mux") }

// Error says why a session ended.
type Error struct {
	Reason string // one of a small fixed set, for metrics: "timeout", "protocol", "flood", "io", "closed", "peer-closed"
	Detail string
	Err    error // the cause, if there is one
}

func (e *Error) Error() string { panic("mux") }
func (e *Error) Unwrap() error { return e.Err }

// NewSocket prepares a TCP connection for tls.Client or tls.Server and New.
func NewSocket(c *net.TCPConn) *Socket { panic("mux") }

// Socket is a TCP connection whose writes stop blocking once a Session uses it.
type Socket struct{ *net.TCPConn }
