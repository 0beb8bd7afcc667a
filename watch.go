package assay

import (
	"fmt"
	"strings"
	"time"
)

// Watch says which requests a proxy tells of. Empty fields match everything.
type Watch struct {
	ID        string    `json:"id"` // WatchLog, WatchTrace, or a tap's own
	Direction Direction `json:"direction,omitempty"`
	Service   string    `json:"service,omitempty"` // "NAMESPACE/NAME"
	Peer      Identity  `json:"peer,omitzero"`
	Method    string    `json:"method,omitempty"`
	Path      string    `json:"path,omitempty"` // how the path begins
	// MinStatus and MaxStatus bound the status; 0 is the one of requests without a
	// response. Both 0: any.
	MinStatus int `json:"minStatus,omitempty"`
	MaxStatus int `json:"maxStatus,omitempty"`
	// Share of the requests that match, in parts per million; 0 is all of them.
	Share int `json:"share,omitempty"`
	// Rate bounds the requests of one proxy per second; those above are counted only.
	Rate int `json:"rate"`
	// Fields asks for the request's header fields. Values that are secrets are left
	// out, but for the names in Reveal; "query" there stands for the query.
	Fields bool     `json:"fields,omitempty"`
	Reveal []string `json:"reveal,omitempty"`
	// Traced wants only requests that a trace context samples.
	Traced bool      `json:"traced,omitempty"`
	Until  time.Time `json:"until,omitzero"`
}

// The watches that a namespace's configuration makes.
const (
	WatchLog   = "log"
	WatchTrace = "trace"
)

// Bounds of watches and records.
const (
	MaxWatchRate   = 1000
	MaxWatches     = 16      // that are active in a mesh
	MaxRecordText  = 1 << 10 // of each text in a record
	MaxRecordField = 64      // header fields in a record
)

// Redacted stands for what is not told.
const Redacted = "(redacted)"

// Record is one request that somebody watches. It never holds a body.
type Record struct {
	Watches       []string      `json:"watches,omitempty"` // whose filters it met
	Time          time.Time     `json:"time"`              // when the head was read
	Duration      time.Duration `json:"duration"`          // to the last byte of the response, nanoseconds
	Workload      string        `json:"workload,omitempty"`
	Direction     Direction     `json:"direction"`
	Identity      Identity      `json:"identity,omitzero"` // the workload's
	Peer          Identity      `json:"peer,omitzero"`
	Service       string        `json:"service,omitempty"`
	Port          uint16        `json:"port,omitempty"`
	Protocol      Protocol      `json:"protocol"`
	Security      Security      `json:"security"`
	Method        string        `json:"method"`
	Authority     string        `json:"authority,omitempty"`
	Path          string        `json:"path"`
	Query         string        `json:"query,omitempty"`
	Fields        []HeaderField `json:"fields,omitempty"`
	Status        int           `json:"status"`
	Failure       string        `json:"failure,omitempty"` // why there is no whole response
	RequestBytes  int64         `json:"requestBytes"`
	ResponseBytes int64         `json:"responseBytes"`
	GRPC          *GRPC         `json:"grpc,omitempty"`
	Trace         TraceContext  `json:"trace,omitzero"` // that the request came with
}

// GRPC is what is known of a call.
type GRPC struct {
	Code             int    `json:"code"` // grpc-status, -1 when none was seen
	RequestMessages  uint64 `json:"requestMessages"`
	ResponseMessages uint64 `json:"responseMessages"`
}

// TraceContext is what a request says of the trace that it belongs to, as in W3C Trace
// Context, section 3.2.
type TraceContext struct {
	Trace   string `json:"traceID,omitempty"` // 32 hexadecimal digits
	Span    string `json:"spanID,omitempty"`  // 16, of who made the request
	Sampled bool   `json:"sampled,omitempty"`
}

// ParseTraceParent reads a traceparent field. A version that is not known is read as
// the one that is, as far as that goes; ff is none.
func ParseTraceParent(s string) (TraceContext, error) {
	bad := func(why string) (TraceContext, error) {
		return TraceContext{}, fmt.Errorf("traceparent: %s", why)
	}
	if len(s) < 55 || s[2] != '-' || s[35] != '-' || s[52] != '-' {
		return bad("want 00-TRACE-SPAN-FLAGS")
	}
	version, trace, span, flags := s[:2], s[3:35], s[36:52], s[53:55]
	for _, part := range []string{version, trace, span, flags} {
		if strings.Trim(part, "0123456789abcdef") != "" {
			return bad("a digit is not of 0-9, a-f")
		}
	}
	switch {
	case version == "ff":
		return bad("version ff")
	case version == "00" && len(s) != 55, len(s) > 55 && s[55] != '-':
		return bad("something follows the flags")
	case strings.Trim(trace, "0") == "" || strings.Trim(span, "0") == "":
		return bad("an identifier is zero")
	}
	return TraceContext{trace, span, strings.IndexByte("13579bdf", flags[1]) >= 0}, nil
}
