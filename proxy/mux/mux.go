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
	Window      int           // bytes in flight on a stream without credit (256 KiB)
	MaxStreams  int           // open streams that the peer may have (10,000)
	MaxQueued   int           // bytes waiting for the writer before Write blocks (1 MiB)
	MaxOpen     int           // bytes of an open payload (8 KiB)
	PingEvery   time.Duration // silence after which the peer is asked (10 s)
	PingTimeout time.Duration // silence after which it is dead (5 s more)
}

// Handler receives what the peer sends on one stream. The session's reader calls
// it in order and must never be blocked by it.
type Handler interface {
	// Received takes the next bytes, which are valid until it returns. fin is the
	// peer's half-close. Bytes count against the window until Stream.Consumed.
	Received(p []byte, fin bool)
	// Reset is the last call when the stream did not end by fin in both directions.
	Reset(code Code)
	// Writable follows a TryWrite that took less than it was given.
	Writable()
}

// Accept is called by the reader for each stream that the peer opens. It returns
// the stream's handler, or a code that refuses it. open is valid until it returns.
// Data that came with the opening follows in Received.
type Accept func(st *Stream, open []byte) (Handler, Code)

// ErrClosed is returned for what is asked of a session that ended.
var ErrClosed = errors.New("mux: session closed")

// New makes a session over conn. The client side opens streams with odd numbers,
// the server side with even ones; both may open. accept may be nil.
func New(conn net.Conn, client bool, cfg Config, accept Accept) *Session { panic("mux") }

// Session is one connection's state.
type Session struct{}

// Run reads until the connection ends, calls handlers, and returns why it ended.
// All streams have been reset with Broken when it returns.
func (s *Session) Run() error { panic("mux") }

// Close ends the session at once with a reason for the peer's log.
func (s *Session) Close(reason error) {}

// Drain accepts and opens no further stream; Run returns when the last one ended.
func (s *Session) Drain() {}

// Open starts a stream. data and fin travel in the same frame as open when they
// fit: a small request costs one frame. The handler may be called before Open
// returns. It never blocks for the peer; what does not fit the window is not taken:
// n bytes of data were.
func (s *Session) Open(open, data []byte, fin bool, h Handler) (st *Stream, n int, err error) {
	panic("mux")
}

// Streams returns how many streams are open, for balancing and pooling.
func (s *Session) Streams() int { panic("mux") }

// Stream is one direction pair. Its methods may be called by any goroutine, each
// direction by one at a time.
type Stream struct{}

// Write queues p, and fin after it, blocking for credit and for the writer's queue.
func (st *Stream) Write(p []byte, fin bool) error { panic("mux") }

// TryWrite queues what fits now and never blocks. When n < len(p) (or fin could
// not be queued: n == len(p) and err == ErrAgain), Handler.Writable follows.
func (st *Stream) TryWrite(p []byte, fin bool) (n int, err error) { panic("mux") }

// ErrAgain says that TryWrite could not queue everything now.
var ErrAgain = errors.New("mux: no credit now")

// Consumed gives the peer credit for n received bytes.
func (st *Stream) Consumed(n int) { panic("mux") }

// Reset ends both directions at once. It is a no-op on an ended stream.
func (st *Stream) Reset(code Code) { panic("mux") }
