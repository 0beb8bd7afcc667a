package http2

import (
	"context"
	"errors"
	"time"

	"assay.dev/proxy/guard"
	"assay.dev/proxy/mux"
)

// Exchange is what is known of one request and its response. It is reused for another
// one: nobody may keep a pointer beyond End.
type Exchange struct {
	// Request is the request's head. It is valid in Dispatch and Begin only.
	Request *Head
	// Policy and Guard are Dispatch's to set, before it opens anything, with every
	// attempt: what the request is allowed, and what it shares with others. Nil are the
	// defaults, and no budget.
	Policy *guard.Request
	Guard  *guard.Service
	// Entered is Dispatch's own: what it counted the request into.
	Entered *guard.Service
	// Plan is what the Planner made of the request; nil: it goes on as it came.
	Plan *Plan
	// Attempt counts what Dispatch tried before. Cause is why the last one came to
	// nothing, and Last the code when its stream was reset.
	Attempt int
	Cause   guard.Cause
	Last    mux.Code
	// Note is whatever an observer's Begin wants to find again in its End.
	Note any
	// Tag is whatever Dispatch or Begin wants to find again in End.
	Tag any

	Start         time.Duration // when the head was read, on a monotonic clock of this package
	First         time.Duration // from then to the head of the final response
	Duration      time.Duration // from then to the last byte of the response
	Status        int           // of the final response, 0 when there was none; also of an answer of our own
	RequestBytes  int64         // fields and body, as far as they were carried
	ResponseBytes int64
	Tunnel        bool // CONNECT that succeeded: the duration is the tunnel's
	// Of gRPC, recognised by the request's content type.
	GRPC             bool
	Code             int    // grpc-status, -1 when none was seen
	RequestMessages  uint64 // messages in both directions
	ResponseMessages uint64
	// Failure is a stable short reason, a metric's label: "" when the response was
	// carried whole, whatever its status.
	Failure string
	// Refused says that Failure is a Refusal's reason: a message, of whichever side,
	// was not HTTP/2 as it must be.
	Refused bool
}

// Remaining returns what is left of the request's time at t, if its policy limits it.
func (x *Exchange) Remaining() (time.Duration, bool) {
	return guard.Remaining(x.Policy.Expires(x.Start, 0), now())
}

// Observer is told of each exchange. The calls are made on the path of the bytes and with
// locks held: they must neither wait nor call back. End follows every Begin.
type Observer interface {
	Begin(x *Exchange)
	End(x *Exchange)
	// Refused is told of a connection that ended for breaking a rule, and of a stream that
	// was refused before it was looked at.
	Refused(why *Refusal)
}

// Guard protects an application from its clients.
type Guard interface {
	// Admit is asked before anything of a request reaches the application. Any code but 0
	// refuses it, unread. Times are guard.Now's.
	Admit(now time.Duration) mux.Code
	// Answered is called once for what was admitted: when the response began, so many after
	// the request, or with a negative time when there will be none.
	Answered(took, now time.Duration)
}

// Dispatcher finds an upstream for each request of one application connection.
type Dispatcher interface {
	// Dispatch chooses an upstream, gives its session to batch.Hold, and passes data, fin
	// and h to the session's Open, whose results it returns. Unless wait is set it may not
	// wait, and returns ErrWait when it would have to, having done nothing; it is then
	// called again with wait, in a goroutine of its own, with other requests' calls at the
	// same time, and may dial and wait, within bounds of its own, until ctx ends; batch is
	// nil then. When it returns an error, nothing was opened; a *Failure says what the
	// application is told, anything else is answered 503. When x.Attempt is over 0 the last
	// upstream failed (x.Cause, x.Last): it should choose another, and returns ErrNoOther
	// when there is none.
	Dispatch(ctx context.Context, x *Exchange, data []byte, fin bool, h mux.Handler, batch *mux.Batch, wait bool) (mux.Stream, int, error)
	Observer
}

// ErrWait says that Dispatch would have to wait.
var ErrWait error = &Failure{Status: 503, Code: 14, Reason: "unavailable", Text: "no upstream is connected"}

// ErrNoOther is returned by Dispatch when there is no upstream to try after the last one:
// the application is told what came of that.
var ErrNoOther = errors.New("http2: no other upstream")

// ErrTimeout is returned by Dispatch when the request's time ended before an upstream was
// found.
var ErrTimeout error = failTimeout

// Failure says how the application is told that there is no response.
type Failure struct {
	Status int
	Code   int    // grpc-status of the same
	Reason string // a stable short word, for the metric and Assay-Error
	Text   string // what was refused, why, and what would allow it
	// RetryAfter is when the client may come again, in seconds; 0 for not saying.
	RetryAfter int
}

func (f *Failure) Error() string { return f.Text }

// Failures by how the stream ended. Reasons are stable.
var (
	failRefused     = &Failure{Status: 503, Code: 14, Reason: "refused", Text: "no upstream accepted the request, and none has read it; it can be sent again when one is ready"}
	failOverloaded  = &Failure{Status: 503, Code: 14, Reason: "overloaded", Text: "the upstream is at its limit and has not read the request; it can be sent again later", RetryAfter: 1}
	failLimited     = &Failure{Status: 429, Code: 14, Reason: "rate-limited", Text: "the upstream takes no more requests in a second and has not read this one; a higher rateLimit in its TrafficPolicy would allow it", RetryAfter: 1}
	failDenied      = &Failure{Status: 403, Code: 7, Reason: "denied", Text: "a rule at the upstream forbids this client; a rule that names its identity would allow it"}
	failBroken      = &Failure{Status: 502, Code: 14, Reason: "broken", Text: "the connection to the upstream's proxy broke before a response; the request may have been acted on"}
	failBadRequest  = &Failure{Status: 502, Code: 13, Reason: "bad-request", Text: "the upstream's proxy, or the application, read the exchange as malformed; the proxies differ, or the application does not speak HTTP/2"}
	failUnreachable = &Failure{Status: 503, Code: 14, Reason: "unreachable", Text: "the application refused the connection; it can be sent again when the application listens"}
	failAppReset    = &Failure{Status: 502, Code: 14, Reason: "app-reset", Text: "the application ended its connection before a response; the request may have been acted on"}
	failDispatch    = &Failure{Status: 503, Code: 14, Reason: "unavailable", Text: "no upstream is available; it can be sent again when one is ready"}
	failTimeout     = &Failure{Status: 504, Code: 4, Reason: "timeout", Text: "there was no whole response within the request's time; the request may have been acted on; a longer timeout in its route or TrafficPolicy would allow it"}
	failTryTimeout  = &Failure{Status: 504, Code: 14, Reason: "try-timeout", Text: "no upstream began to answer within the time of one try; the request may have been acted on; a longer tryTimeout in its route or TrafficPolicy would allow it"}
	failStalled     = &Failure{Status: 504, Code: 14, Reason: "stalled", Text: "the application or its proxy took no byte of the request for too long; it may have been acted on"}
	failUnknown     = &Failure{Status: 502, Code: 2, Reason: "unknown", Text: "the upstream's proxy ended the request for a reason that this version does not know"}
)

// failures are in the order of docs/http2.md.
var failures = []*Failure{failDispatch, failRefused, failOverloaded, failLimited, failDenied, failUnreachable, failAppReset, failBroken, failBadRequest, failTimeout, failTryTimeout, failStalled, failUnknown}

func failureOf(code mux.Code) *Failure {
	switch code {
	case mux.Refused:
		return failRefused
	case mux.Overloaded:
		return failOverloaded
	case mux.Denied:
		return failDenied
	case mux.Limited:
		return failLimited
	case mux.Broken, mux.Cancelled:
		return failBroken
	case mux.BadRequest:
		return failBadRequest
	case mux.Unreachable:
		return failUnreachable
	case mux.AppReset:
		return failAppReset
	case mux.Stalled:
		return failStalled
	}
	return failUnknown
}

// Failures that say nothing about the application.
const (
	ClientGone = "client-gone" // the client reset its stream, or its connection ended
	Aborted    = "aborted"     // the proxy stopped
)

// Reasons of exchanges that ended early otherwise.
const (
	failReset      = "stream-reset" // the application reset the stream with a code, which was passed on
	failNoResponse = "no-response"  // the upstream ended its direction without a head
)

// A code of RST_STREAM crosses the mesh as itself; 256 and more are read as INTERNAL_ERROR,
// which RFC 9113 section 7 allows for unknown ones.
const carriedCode mux.Code = 0x100

// toMux is the code that a stream between the proxies is reset with.
func toMux(code ErrCode) mux.Code {
	switch {
	case code == RefusedStream:
		return mux.Refused
	case code > 0xff:
		code = InternalError
	}
	return carriedCode + mux.Code(code)
}

// fromMux returns the code of RST_STREAM that crossed the mesh.
func fromMux(code mux.Code) (ErrCode, bool) {
	if code >= carriedCode && code <= carriedCode+0xff {
		return ErrCode(code - carriedCode), true
	}
	return 0, false
}

// now is one reading of the monotonic clock that all guards share.
func now() time.Duration { return guard.Now() }
