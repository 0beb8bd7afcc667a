package http1

// Refusal says why a message is not carried. All refusals are the variables below:
// they can be compared, and refusing allocates nothing.
type Refusal struct {
	Status  int    // the answer to a request; a bad response is always answered 502
	Reason  string // a short stable word: the metric's label and the Assay-Error field
	Text    string // a sentence: what was refused and why
	Section string // where the rule is
}

// Error returns the sentence with its section.
func (r *Refusal) Error() string { return r.Text + " (" + r.Section + ")" }

// Refusals holds every refusal, in the order of docs/http1.md.
var Refusals []*Refusal

func refusal(status int, reason, section, text string) *Refusal {
	r := &Refusal{Status: status, Reason: reason, Section: section, Text: text}
	Refusals = append(Refusals, r)
	return r
}

// Lines.
var (
	ErrBareLF      = refusal(400, "bare-lf", "RFC 9112 section 2.2", "a line ends in LF without CR, which some readers take for the end of a line and others do not")
	ErrRequestLine = refusal(400, "request-line", "RFC 9112 section 3", "the request line is not METHOD SP TARGET SP VERSION")
	ErrStatusLine  = refusal(502, "status-line", "RFC 9112 section 4", "the status line is not VERSION SP three digits SP reason")
	ErrMethod      = refusal(400, "method", "RFC 9110 section 9.1", "the method is not a token")
	ErrMethodLong  = refusal(501, "method-length", "RFC 9112 section 3", "the method is longer than any known one")
	ErrVersion     = refusal(505, "version", "RFC 9112 section 2.3", "the version is neither HTTP/1.1 nor HTTP/1.0")
)

// Targets and Host.
var (
	ErrTargetLong   = refusal(414, "target-length", "RFC 9112 section 3", "the request target is longer than the limit")
	ErrTarget       = refusal(400, "target", "RFC 9112 section 3.2", "the request target has none of the four forms, or a byte or percent-encoding that no target may have")
	ErrHostMissing  = refusal(400, "host-missing", "RFC 9112 section 3.2", "an HTTP/1.1 request has no Host field")
	ErrHostTwice    = refusal(400, "host-duplicate", "RFC 9112 section 3.2", "the request has more than one Host field")
	ErrHost         = refusal(400, "host", "RFC 9110 section 7.2", "the Host field is not a host with an optional port")
	ErrHostDiffers  = refusal(400, "host-conflict", "RFC 9112 section 3.2.2", "the authority in the request target and the Host field name different hosts")
	ErrExpectation  = refusal(417, "expect", "RFC 9110 section 10.1.1", "the expectation is not 100-continue")
	ErrConnectBody  = refusal(400, "connect-body", "RFC 9110 section 9.3.6", "a CONNECT request announces a body, which has no meaning and hides bytes of the tunnel")
	ErrTrailerNames = refusal(400, "trailer-names", "RFC 9110 section 6.5.1", "the Trailer field announces a field that frames the message")
)

// Fields.
var (
	ErrHeadLong   = refusal(431, "head-length", "RFC 6585 section 5", "the head is longer than the limit")
	ErrFieldCount = refusal(431, "field-count", "RFC 6585 section 5", "the head has more fields than the limit")
	ErrFold       = refusal(400, "obs-fold", "RFC 9112 section 5.2", "a field line begins with white space, which folds it into the line before for some readers only")
	ErrSpaceColon = refusal(400, "space-before-colon", "RFC 9112 section 5.1", "there is white space between a field name and its colon")
	ErrFieldName  = refusal(400, "field-name", "RFC 9110 section 5.1", "a field name is empty, has a byte that no name may have, or lacks its colon")
	ErrFieldValue = refusal(400, "field-value", "RFC 9110 section 5.5", "a field value has a control byte, such as NUL or a bare CR")
)

// Lengths.
var (
	ErrLength       = refusal(400, "content-length", "RFC 9110 section 8.6", "Content-Length is not one plain decimal number")
	ErrLengthTwice  = refusal(400, "content-length-duplicate", "RFC 9112 section 6.3", "there is more than one Content-Length field")
	ErrLengthLarge  = refusal(413, "content-length-overflow", "RFC 9110 section 8.6", "Content-Length does not fit 63 bits")
	ErrLengthCoding = refusal(400, "length-and-coding", "RFC 9112 section 6.1", "the message has both Content-Length and Transfer-Encoding")
	ErrCoding       = refusal(400, "transfer-encoding", "RFC 9112 section 6.3", "Transfer-Encoding does not end in chunked, or is there twice, so the length cannot be known")
	ErrCodingOther  = refusal(501, "transfer-coding", "RFC 9112 section 6.1", "Transfer-Encoding names a coding other than chunked")
	ErrCodingOld    = refusal(400, "transfer-encoding-version", "RFC 9112 section 6.1", "an HTTP/1.0 message has Transfer-Encoding, which HTTP/1.0 readers ignore")
	ErrNoBody       = refusal(502, "body-forbidden", "RFC 9112 section 6.3", "a response that cannot have a body (1xx, 204) announces one")
)

// Order of events.
var (
	ErrHeadSlow    = refusal(408, "head-timeout", "RFC 9110 section 15.5.9", "the head of the request was not complete in time")
	ErrBodySlow    = refusal(408, "body-timeout", "RFC 9110 section 15.5.9", "the body of the request brought no byte for too long")
	ErrInterim     = refusal(502, "interim-limit", "RFC 9110 section 15.2", "there are more interim responses than the limit, or they are longer")
	ErrSwitch      = refusal(502, "switch-unasked", "RFC 9110 section 7.8", "the response leaves HTTP, which the request did not ask for")
	ErrSwitchEarly = refusal(502, "switch-early", "RFC 9110 section 7.8", "the response leaves HTTP before the request is complete")
)

// Chunks.
var (
	ErrChunkSize     = refusal(400, "chunk-size", "RFC 9112 section 7.1", "a chunk size is not hexadecimal digits followed by CRLF or an extension")
	ErrChunkLarge    = refusal(413, "chunk-size-overflow", "RFC 9112 section 7.1", "a chunk size has more than 16 digits or does not fit 62 bits")
	ErrChunkExt      = refusal(400, "chunk-extension", "RFC 9112 section 7.1.1", "a chunk extension has a control byte or is longer than the limit")
	ErrChunkEnd      = refusal(400, "chunk-end", "RFC 9112 section 7.1", "the data of a chunk is not followed by CRLF")
	ErrTrailer       = refusal(400, "trailer", "RFC 9112 section 7.1.2", "a trailer field is malformed")
	ErrTrailerField  = refusal(400, "trailer-field", "RFC 9110 section 6.5.1", "a trailer carries a field that frames or routes the message, or that only the proxy may write")
	ErrTrailerLength = refusal(431, "trailer-length", "RFC 6585 section 5", "the trailers are longer than the limit")
)
