// Package mux carries many streams over one connection between two proxies.
//
// Writes are group commits: whoever finds the connection's writer idle writes, or has
// written, everything that all streams have queued, so that one TLS record and one system
// call serve many requests. Reads are direct: the session's one reader calls each
// stream's Handler, which writes into its own socket without blocking; there is no
// hand-off to another goroutine. Every stream has credit of its own, so one that
// nobody drains holds up no other, and memory is bounded by Config.Window for each.
// The wire format is in docs/transport.md.
//
// It refuses to know what it carries: the open payload and the data are bytes. It
// refuses a peer that breaks a rule: the session ends and the Error names the rule.
//
// Invariants:
//   - The reader never waits for a writer. Over a Socket no write waits at all; over
//     another connection the reader's frames are written by the flusher. So two
//     peers that both write with full buffers go on reading, and both get on.
//   - A stream's number is never used twice in a session, and a direction ends
//     exactly once, by FIN or RESET. After both, DATA on it is an error.
//   - Everything is bounded: open streams, bytes received and not consumed, bytes
//     queued, frames that cost the receiver work without carrying data.
//   - A frame costs no allocation, a stream none in the steady state.
//
// Goroutines: the caller's, in Run (the reader), and whoever writes. Two more exist
// only while they are needed: the flusher, while many streams are open or the connection
// accepts no more bytes, and the notifier, while streams that waited for the queue are told of
// room. A timer keeps the session alive. Run ends them all before it returns.
//
// Tour: frame.go (bytes on the wire), session.go (life of a session), read.go and
// write.go (one file for each direction), stream.go (a stream and its states),
// keepalive.go, socket.go (writes that never block, under TLS), table.go.
package mux

import (
	"errors"
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
	Stalled                     // no byte has moved for too long
	Limited                     // more in a second than the other end takes; unread
)

var codeNames = [...]string{"", "cancelled", "refused", "unreachable", "app-reset", "bad-request", "overloaded", "broken", "denied", "stalled", "limited"}

// String returns a name that is fit for a metric label; codes of a newer peer are
// all "unknown".
func (c Code) String() string {
	if c == 0 || int(c) >= len(codeNames) {
		return "unknown"
	}
	return codeNames[c]
}

// Unread reports whether the code promises that nobody has acted on the stream, so
// that it may be tried elsewhere.
func (c Code) Unread() bool { return c == Refused || c == Overloaded || c == Denied || c == Limited }

// Config bounds a session. Zero fields take the defaults in parentheses; smaller
// values than the protocol's minimum take the minimum.
type Config struct {
	Window      int           // bytes in flight on a stream without credit (256 KiB; 16 KiB to 16 MiB)
	MaxWindow   int           // to which that grows while they are consumed as they come (4 x Window; Window to 16 MiB)
	MaxGrowth   int           // bytes that all streams' windows grow by at once (8 MiB)
	MaxStreams  int           // open streams that the peer may have (10,000; at least 1)
	MaxQueued   int           // bytes waiting for the writer before Write blocks (1 MiB; at least 64 KiB)
	MaxOpen     int           // bytes of an open payload (8 KiB; 4 KiB to 15 KiB)
	PingEvery   time.Duration // silence after which the peer is asked (10 s)
	PingTimeout time.Duration // silence after which it is dead (5 s more)
}

func (c Config) withDefaults() Config {
	def := func(v *int, def, low, high int) {
		if *v == 0 {
			*v = def
		}
		*v = min(max(*v, low), high)
	}
	def(&c.Window, 256<<10, initialWindow, maxWindow)
	def(&c.MaxWindow, 4*c.Window, c.Window, maxWindow)
	def(&c.MaxGrowth, 8<<20, 0, 1<<30)
	def(&c.MaxStreams, 10_000, 1, 1<<20)
	def(&c.MaxQueued, 1<<20, bulkQueued, 64<<20)
	def(&c.MaxOpen, 8<<10, initialOpen, 15<<10)
	if c.PingEvery <= 0 {
		c.PingEvery = 10 * time.Second
	}
	if c.PingTimeout <= 0 {
		c.PingTimeout = 5 * time.Second
	}
	return c
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

// Shutter is a Handler that also wants to know when the connection behind the peer's
// end of its stream was half-closed by its owner (Stream.Shut). Like the other calls,
// Shut must not block; it may follow the fin, and comes once at most.
type Shutter interface {
	Handler
	Shut(st Stream)
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
	// ErrOpenTooLong is returned by Open for a payload that the peer does not take.
	ErrOpenTooLong = errors.New("mux: open payload is longer than the peer allows")
)

// Error says why a session ended.
type Error struct {
	Reason string // one of the Reason constants, for metrics
	Detail string // what exactly; for a broken rule, its name in docs/transport.md
	Err    error  // the cause, if there is one
}

// Reasons of an Error.
const (
	ReasonClosed     = "closed"      // Session.Close
	ReasonPeerClosed = "peer-closed" // the peer said goodbye, or just went
	ReasonProtocol   = "protocol"    // the peer broke a rule
	ReasonFlood      = "flood"       // the peer sent too much of what only costs
	ReasonTimeout    = "timeout"     // the peer fell silent or stopped reading
	ReasonIO         = "io"          // the connection failed
)

func (e *Error) Error() string {
	s := "mux: session ended: " + e.Reason
	if e.Detail != "" {
		s += ": " + e.Detail
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

func (e *Error) Unwrap() error { return e.Err }

func broken(rule string) *Error { return &Error{Reason: ReasonProtocol, Detail: rule} }
