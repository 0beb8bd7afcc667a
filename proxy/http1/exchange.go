package http1

import (
	"context"
	"errors"
	"time"

	"assay.dev/proxy/guard"
	"assay.dev/proxy/mux"
)

// Exchange is what is known of one request and its response. It is reused for the
// next one: nobody may keep a pointer beyond End.
type Exchange struct {
	// Request is the request's head. It is valid in Dispatch and Begin only.
	Request *Request
	// Policy and Guard are Dispatch's to set, before it opens anything, with every
	// attempt: what the request is allowed, and what it shares with others. Nil are
	// the defaults, and no budget.
	Policy *guard.Request
	Guard  *guard.Service
	// Attempt counts what Dispatch tried before. Cause is why the last one came to
	// nothing, and Last the code when its stream was reset.
	Attempt int
	Cause   guard.Cause
	Last    mux.Code
	// Plan is what a Planner made of the request; nil: it goes as it came.
	Plan *Plan
	// Note is whatever an observer's Begin wants to find again in its End.
	Note any
	// Tag is whatever Dispatch or Begin wants to find again in End.
	Tag any

	Start         time.Duration // when the head was read, on a monotonic clock of this package
	Duration      time.Duration // from then to the last byte of the response
	Status        int           // of the final response, 0 when there was none; also of an answer of our own
	RequestBytes  int64         // head and body, as far as they were carried
	ResponseBytes int64
	Tunnel        bool // it became an opaque connection: the duration is that one's
	// Failure is a stable short reason, a metric's label: "" when the response was
	// carried whole, whatever its status.
	Failure string
	// Refused says that Failure is a Refusal's reason: a message, of whichever side,
	// was not HTTP/1 as it must be.
	Refused bool
}

// Remaining returns what is left of the request's time, if that is limited.
func (x *Exchange) Remaining() (time.Duration, bool) {
	return guard.Remaining(x.Policy.Expires(x.Start, 0), now())
}

// Late reports whether the request's time is over.
func (x *Exchange) Late() bool {
	left, ok := x.Remaining()
	return ok && left == 0
}

// Observer is told of each exchange. Both calls are made on the path of the bytes
// and may hold locks: they must neither wait nor call back. End follows every Begin.
type Observer interface {
	Begin(x *Exchange)
	End(x *Exchange)
}

// Guard protects an application from its clients.
type Guard interface {
	// Admit is asked before anything of a request reaches the application. Any code
	// but 0 refuses it, unread. Times are guard.Now's.
	Admit(now time.Duration) mux.Code
	// Answered is called once for what was admitted: with how long after the request
	// its response began; when there will be none, with the negative of how long that
	// was waited for.
	Answered(took, now time.Duration)
}

// Dispatcher finds an upstream for each request of one application connection.
type Dispatcher interface {
	// Dispatch chooses an upstream and passes data, fin and h to its session's Open,
	// whose results it returns. It may dial and wait, within bounds of its own, until
	// ctx ends. When it returns an error, nothing was opened; a *Failure says what
	// the application is told, anything else is answered 503. When x.Attempt is over
	// 0 the last upstream failed (x.Cause, x.Last): it should choose another, and
	// returns ErrNoOther when there is none.
	Dispatch(ctx context.Context, x *Exchange, data []byte, fin bool, h mux.Handler) (mux.Stream, int, error)
	Observer
}

// ErrNoOther is returned by Dispatch when there is no upstream to try after the last
// one: the application is told what came of that.
var ErrNoOther = errors.New("http1: no other upstream")

// ErrTimeout is returned by Dispatch when the request's time ended before an upstream
// was found.
var ErrTimeout error = failTimeout

// Failure says how the application is told that there is no response.
type Failure struct {
	Status int
	Reason string // a stable short word, for the metric and Assay-Error
	Text   string // what was refused, why, and what would allow it
	// Reset resets the connection instead of answering: the application at the far
	// end refused or reset it, and without the mesh the client would see that.
	Reset bool
	// RetryAfter is when the client may come again, in seconds; 0 for not saying.
	RetryAfter int
}

func (f *Failure) Error() string { return f.Text }

// Failures by how the stream ended. Reasons are stable.
var (
	failRefused     = &Failure{Status: 503, Reason: "refused", Text: "no upstream accepted the request, and none has read it; it can be sent again when one is ready"}
	failOverloaded  = &Failure{Status: 503, Reason: "overloaded", Text: "the upstream is at its limit and has not read the request; it can be sent again later", RetryAfter: 1}
	failLimited     = &Failure{Status: 429, Reason: "rate-limited", Text: "the upstream takes no more requests in a second and has not read this one; a higher rateLimit in its TrafficPolicy would allow it", RetryAfter: 1}
	failDenied      = &Failure{Status: 403, Reason: "denied", Text: "a rule at the upstream forbids this client; a rule that names its identity would allow it"}
	failBroken      = &Failure{Status: 502, Reason: "broken", Text: "the connection to the upstream's proxy broke before a response; the request may have been acted on"}
	failBadRequest  = &Failure{Status: 502, Reason: "bad-request", Text: "the upstream's proxy read the request as malformed; the two proxies differ and should run the same version"}
	failUnreachable = &Failure{Reset: true, Reason: "unreachable", Text: "the application refused the connection"}
	failAppReset    = &Failure{Reset: true, Reason: "app-reset", Text: "the application reset the connection"}
	failDispatch    = &Failure{Status: 503, Reason: "unavailable", Text: "no upstream is available; it can be sent again when one is ready"}
	failTimeout     = &Failure{Status: 504, Reason: "timeout", Text: "there was no whole response within the request's time; the request may have been acted on; a longer timeout in its route or TrafficPolicy would allow it"}
	failTryTimeout  = &Failure{Status: 504, Reason: "try-timeout", Text: "no upstream began to answer within the time of one try; the request may have been acted on; a longer tryTimeout in its route or TrafficPolicy would allow it"}
	failStalled     = &Failure{Status: 504, Reason: "stalled", Text: "the application or its proxy took no byte of the request for too long; it may have been acted on"}
	failUnknown     = &Failure{Status: 502, Reason: "unknown", Text: "the upstream's proxy ended the request for a reason that this version does not know"}
)

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
	ClientGone = "client-gone" // the client reset, closed or half-closed before it had its response
	Aborted    = "aborted"     // the proxy stopped
)

// Reasons of exchanges that ended early otherwise.
const (
	failTruncated  = "truncated"   // the application closed before the end of its response
	failNoResponse = "no-response" // it closed before the beginning
	failUnasked    = "unasked"     // bytes followed a complete response
)

// now is one reading of the monotonic clock that all guards share.
func now() time.Duration { return guard.Now() }
