package http2

// Refusal says why a message, or the whole connection, is not carried. All refusals
// are the variables below: they can be compared, and refusing allocates nothing.
type Refusal struct {
	Code    ErrCode // of RST_STREAM, or of GOAWAY when Conn
	Conn    bool    // the connection ends
	Status  int     // the stream is answered with it and not reset; 0: it is reset
	Reason  string  // a short stable word: the metric's label
	Text    string  // a sentence: what was refused and why
	Section string  // where the rule is
}

// Error returns the sentence with its section.
func (r *Refusal) Error() string { return r.Text + " (" + r.Section + ")" }

// Refusals holds every refusal, in the order of docs/http2.md.
var Refusals []*Refusal

func add(r Refusal) *Refusal {
	Refusals = append(Refusals, &r)
	return &r
}

func malformed(reason, section, text string) *Refusal {
	return add(Refusal{Code: ProtocolError, Reason: reason, Section: "RFC 9113 section " + section, Text: text})
}

func broken(code ErrCode, reason, section, text string) *Refusal {
	return add(Refusal{Code: code, Conn: true, Reason: reason, Section: "RFC 9113 section " + section, Text: text})
}

func flooded(reason, text string) *Refusal {
	return add(Refusal{Code: EnhanceYourCalm, Conn: true, Reason: reason, Section: "RFC 9113 section 10.5", Text: text})
}

// Messages that are malformed (RFC 9113 section 8.1.1): the stream is reset.
var (
	ErrFieldName     = malformed("field-name", "8.2.1", "a field name is empty, has an upper-case letter, or has a byte that no name may have")
	ErrFieldValue    = malformed("field-value", "8.2.1", "a field value has a control byte, such as NUL, CR or LF, or white space at an end")
	ErrConnection    = malformed("connection-field", "8.2.2", "a field belongs to the connections of HTTP/1 (Connection, Keep-Alive, Proxy-Connection, Transfer-Encoding, Upgrade)")
	ErrTE            = malformed("te", "8.2.2", "TE says something other than trailers")
	ErrPseudoUnknown = malformed("pseudo-unknown", "8.3", "a pseudo-header field is not defined for this kind of message")
	ErrPseudoOrder   = malformed("pseudo-order", "8.3", "a pseudo-header field follows a regular field")
	ErrPseudoTwice   = malformed("pseudo-duplicate", "8.3", "a pseudo-header field is there twice")
	ErrPseudoMissing = malformed("pseudo-missing", "8.3.1", "a mandatory pseudo-header field is missing, or there is one that the method forbids")
	ErrMethod        = malformed("method", "8.3.1", "the method is not a token, or longer than any known one")
	ErrScheme        = malformed("scheme", "8.3.1", "the scheme is not a scheme")
	ErrPath          = malformed("path", "8.3.1", "the path is empty, does not begin with a slash, or has a byte or percent-encoding that no path may have")
	ErrAuthority     = malformed("authority", "8.3.1", "the authority is missing, is not a host with an optional port, or has credentials")
	ErrHostTwice     = malformed("host-duplicate", "8.3.1", "the request has more than one Host field")
	ErrHostDiffers   = malformed("host-conflict", "8.3.1", "the authority and the Host field name different hosts")
	ErrStatus        = malformed("status", "8.3.2", "the status is not three digits from 100 to 599, or is 101, which HTTP/2 does not have")
	ErrInterimEnd    = malformed("interim-end", "8.1", "an interim response ends the stream")
	ErrLength        = malformed("content-length", "8.1.1", "Content-Length is not one plain decimal number")
	ErrLengthDiffers = malformed("length-mismatch", "8.1.1", "the body is longer or shorter than Content-Length says")
	ErrNoHead        = malformed("body-before-head", "8.1", "a body precedes the head of its message")
	ErrTrailerEnd    = malformed("trailer-end", "8.1", "fields that follow a body do not end the stream")
	ErrTrailerPseudo = malformed("trailer-pseudo", "8.1", "a trailer is a pseudo-header field")
	ErrTrailerField  = malformed("trailer-field", "8.1", "a trailer carries a field that frames or routes the message (Content-Length, Host), or that only the proxy may write")
	ErrDependency    = malformed("self-dependency", "5.3.1", "a stream depends on itself")
)

// Messages that are answered.
var (
	ErrHeadLong   = add(Refusal{Code: EnhanceYourCalm, Status: 431, Reason: "head-length", Section: "RFC 6585 section 5", Text: "the head, or the trailers, are longer than the limit"})
	ErrFieldCount = add(Refusal{Code: EnhanceYourCalm, Status: 431, Reason: "field-count", Section: "RFC 6585 section 5", Text: "the message has more fields than the limit"})
	ErrTunnel     = add(Refusal{Code: ProtocolError, Status: 501, Reason: "tunnel", Section: "RFC 9110 section 9.3.6", Text: "a tunnel would go to an application that is told of its clients' certificates, and nothing in it could be checked"})
	ErrConnect    = add(Refusal{Code: ProtocolError, Status: 501, Reason: "connect-protocol", Section: "RFC 8441 section 3", Text: "the application does not take extended CONNECT"})
)

// Streams that break another rule.
var (
	ErrStreamWindow = add(Refusal{Code: FlowControlError, Reason: "stream-window", Section: "RFC 9113 section 6.9.1", Text: "a WINDOW_UPDATE takes a stream's window over its maximum"})
	ErrStreamZero   = malformed("stream-window-zero", "6.9", "a WINDOW_UPDATE of a stream is of nothing")
	ErrStreamData   = add(Refusal{Code: FlowControlError, Reason: "stream-flow", Section: "RFC 9113 section 6.9.1", Text: "a stream has more data than its window"})
	ErrHalfClosed   = add(Refusal{Code: StreamClosed, Reason: "half-closed", Section: "RFC 9113 section 5.1", Text: "a frame follows the end of its stream's direction"})
	ErrPriorityForm = add(Refusal{Code: FrameSizeError, Reason: "priority-size", Section: "RFC 9113 section 6.3", Text: "a PRIORITY frame has not five bytes"})
	ErrBusy         = add(Refusal{Code: RefusedStream, Reason: "max-streams", Section: "RFC 9113 section 5.1.2", Text: "there are more streams than we allowed"})
	ErrScarce       = add(Refusal{Code: RefusedStream, Reason: "memory-scarce", Section: "RFC 9113 section 10.5", Text: "little memory is left, and what this connection sent and nobody took holds more than its share; nobody has read the request"})
	ErrMemory       = add(Refusal{Code: EnhanceYourCalm, Reason: "memory", Section: "RFC 9113 section 10.5", Text: "nobody takes what was sent, and no memory is left to hold it"})
	ErrWindowStall  = add(Refusal{Code: EnhanceYourCalm, Reason: "window-stall", Section: "RFC 9113 section 10.5", Text: "a reader has not opened its window for long, with many others that do not either"})
)

// Connections that break the protocol.
var (
	ErrPreface      = broken(ProtocolError, "preface", "3.4", "the connection does not begin with the preface and SETTINGS")
	ErrFrameSize    = broken(FrameSizeError, "frame-size", "4.2", "a frame is longer than we allowed, or has not the length of its type")
	ErrPadding      = broken(ProtocolError, "padding", "6.1", "a frame's padding is as long as the frame")
	ErrStreamID     = broken(ProtocolError, "stream-id", "5.1.1", "a frame is on a stream that its type, or its sender, may not use")
	ErrIdle         = broken(ProtocolError, "idle-stream", "5.1", "a frame is on a stream that was never opened")
	ErrClosed       = broken(StreamClosed, "closed-stream", "5.1", "a frame follows the end of its stream")
	ErrContinuation = broken(ProtocolError, "continuation", "6.10", "a header block is interrupted, or continued where there is none")
	ErrCompression  = broken(CompressionError, "compression", "4.3", "a header block cannot be decompressed")
	ErrSetting      = broken(ProtocolError, "setting", "6.5.2", "a setting has a value that it may not have")
	ErrSettingWin   = broken(FlowControlError, "setting-window", "6.5.2", "SETTINGS_INITIAL_WINDOW_SIZE is, or takes a window, over the maximum")
	ErrPush         = broken(ProtocolError, "push", "8.4", "a push that we did not allow")
	ErrWindow       = broken(FlowControlError, "window", "6.9.1", "a WINDOW_UPDATE takes the connection's window over its maximum")
	ErrWindowZero   = broken(ProtocolError, "window-zero", "6.9", "a WINDOW_UPDATE of the connection is of nothing")
	ErrFlow         = broken(FlowControlError, "flow", "6.9.1", "there is more data than the connection's window")
	ErrGoawayLast   = broken(ProtocolError, "goaway", "6.8", "a GOAWAY names a higher stream than the one before")
)

// Connections that cost more than they carry.
var (
	ErrRapidReset    = flooded("rapid-reset", "streams are opened and reset at once, over and over (CVE-2023-44487)")
	ErrPingFlood     = flooded("ping-flood", "there are more PINGs than the data explains (CVE-2019-9512)")
	ErrSettingsFlood = flooded("settings-flood", "SETTINGS come over and over (CVE-2019-9515)")
	ErrPriorityFlood = flooded("priority-flood", "PRIORITY comes over and over (CVE-2019-9513)")
	ErrEmptyFlood    = flooded("empty-flood", "DATA frames without data come over and over (CVE-2019-9518)")
	ErrDribble       = flooded("window-dribble", "windows are opened by a few bytes at a time (CVE-2019-9511)")
	ErrUnknownFlood  = flooded("unknown-flood", "frames of unknown types come over and over")
	ErrMalformFlood  = flooded("malformed-flood", "malformed messages come over and over (CVE-2019-9514)")
	ErrContFlood     = flooded("continuation-flood", "a header block comes in too many CONTINUATION frames, or is far too long (CVE-2024-27316)")
	ErrBomb          = flooded("header-bomb", "a header block decompresses to far more than the limit")
	ErrHeadSlow      = flooded("head-timeout", "a header block was not complete in time")
	ErrUnread        = flooded("unread", "answers to the peer's frames are not read")
	ErrSilent        = flooded("ping-timeout", "the peer does not answer a PING")
	ErrPrefaceSlow   = flooded("preface-timeout", "the preface was not complete in time")
)
