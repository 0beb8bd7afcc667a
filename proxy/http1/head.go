package http1

import (
	"bytes"
	"time"
)

// Limits bound what is read before it is understood. Zero fields take the defaults
// in parentheses, which are above those of the usual servers: a program's own limit
// answers first.
type Limits struct {
	Head   int // bytes of a head with its empty line (64 KiB)
	Target int // bytes of a request target (32 KiB)
	Fields int // fields of a head or trailer section (256)
	Ext    int // bytes of chunk extensions that the data did not outweigh (4 KiB)
	// Interim responses to one request (1,000), and bytes of them (1 MiB).
	Interim, InterimBytes int
}

// Timeouts bound how long nothing may happen where something must. Zero fields take
// the defaults in parentheses. None of them bounds a tunnel, a response that its
// application is silent about, or anything that makes progress, however slow.
type Timeouts struct {
	// Head is how long a head may take from its first byte (60 s). A connection
	// without a request may stay idle for as long as both ends like.
	Head time.Duration
	// Body is how long the body of a request may bring no byte while none of a
	// response moves either (1 h).
	Body time.Duration
	// Stall is how long an end may take no byte of those that wait for it (10 min).
	Stall time.Duration
}

// WithDefaults returns t with its zero fields filled in.
func (t Timeouts) WithDefaults() Timeouts {
	set := func(v *time.Duration, to time.Duration) {
		if *v <= 0 {
			*v = to
		}
	}
	set(&t.Head, time.Minute)
	set(&t.Body, time.Hour)
	set(&t.Stall, 10*time.Minute)
	return t
}

// WithDefaults returns l with its zero fields filled in.
func (l Limits) WithDefaults() Limits {
	set := func(v *int, to int) {
		if *v <= 0 {
			*v = to
		}
	}
	set(&l.Head, 64<<10)
	set(&l.Target, 32<<10)
	set(&l.Fields, 256)
	set(&l.Ext, 4<<10)
	set(&l.Interim, 1000)
	set(&l.InterimBytes, 1<<20)
	return l
}

// maxMethod is longer than any registered method.
const maxMethod = 64

// head is what requests and responses share. A head is parsed line by line, each
// once, in a buffer that may grow or move between calls; so until it is complete
// only offsets are kept.
type head struct {
	// Size is the length of the head with its empty line.
	Size int
	// Minor is the x of HTTP/1.x: 0 or 1.
	Minor uint8
	// Close and KeepAlive are options of the Connection field.
	Close, KeepAlive bool
	// UpgradeOption is the upgrade option of the Connection field.
	UpgradeOption bool
	// Chunked is Transfer-Encoding: chunked.
	Chunked bool
	// HasLength says that there is a Content-Length; Length is its value.
	HasLength bool
	Length    int64

	options     int // of the Connection field, in all
	at, scanned int // start of the current line, and how much of it has no LF
	fields      int
	started     bool // the first line is done
	coding      bool // there was a Transfer-Encoding
}

// nextLine returns the next complete line without its CRLF, or ok false when more
// bytes are needed. first bounds the first line.
func (h *head) nextLine(b []byte, lim *Limits, first int) (line []byte, ok bool, err *Refusal) {
	i := bytes.IndexByte(b[h.at+h.scanned:], '\n')
	if i < 0 {
		h.scanned = len(b) - h.at
		if !h.started && h.scanned > first {
			return nil, false, ErrTargetLong
		}
		if len(b) >= lim.Head {
			return nil, false, ErrHeadLong
		}
		return nil, false, nil
	}
	end := h.at + h.scanned + i
	if end == h.at || b[end-1] != '\r' {
		return nil, false, ErrBareLF
	}
	line = b[h.at : end-1]
	h.at, h.scanned = end+1, 0
	if h.at > lim.Head {
		return nil, false, ErrHeadLong
	}
	return line, true, nil
}

// splitField checks a field line and returns its name and its value without the
// white space around it.
func splitField(line []byte) (name, value []byte, err *Refusal) {
	n := tokenLen(line)
	if n == len(line) {
		return nil, nil, ErrFieldName
	}
	if line[n] != ':' || n == 0 {
		switch c := line[n]; {
		case c != ' ' && c != '\t':
			return nil, nil, ErrFieldName
		case n == 0:
			return nil, nil, ErrFold
		case bytes.IndexByte(line, ':') < 0:
			return nil, nil, ErrFieldName
		}
		return nil, nil, ErrSpaceColon
	}
	value = line[n+1:]
	if !validValue(value) {
		return nil, nil, ErrFieldValue
	}
	return line[:n], trim(value), nil
}

// common handles the fields that frame a message in either direction.
func (h *head) common(name, value []byte) *Refusal {
	switch len(name) {
	case len("connection"):
		if equalFold(name, "connection") {
			h.connection(value)
		}
	case len("content-length"):
		if equalFold(name, "content-length") {
			return h.contentLength(value)
		}
	case len("transfer-encoding"):
		if equalFold(name, "transfer-encoding") {
			return h.transferEncoding(value)
		}
	}
	return nil
}

func (h *head) connection(value []byte) {
	for len(value) > 0 {
		var item []byte
		item, value = nextItem(value)
		if len(item) > 0 {
			h.options++
		}
		switch {
		case equalFold(item, "close"):
			h.Close = true
		case equalFold(item, "keep-alive"):
			h.KeepAlive = true
		case equalFold(item, "upgrade"):
			h.UpgradeOption = true
		}
	}
}

func (h *head) contentLength(value []byte) *Refusal {
	if h.HasLength {
		return ErrLengthTwice
	}
	if len(value) == 0 {
		return ErrLength
	}
	const most = 1<<63 - 1
	var n int64
	large := false
	for _, c := range value {
		if !isDigit(c) {
			return ErrLength
		}
		d := int64(c - '0')
		if large = large || n > (most-d)/10; !large {
			n = n*10 + d
		}
	}
	if large {
		return ErrLengthLarge
	}
	h.HasLength, h.Length = true, n
	return nil
}

func (h *head) transferEncoding(value []byte) *Refusal {
	if h.coding {
		return ErrCoding
	}
	h.coding = true
	if equalFold(value, "chunked") {
		h.Chunked = true
		return nil
	}
	last, others := value, false
	if i := bytes.LastIndexByte(value, ','); i >= 0 {
		last = trim(value[i+1:])
		for rest := value[:i]; len(rest) > 0; {
			var item []byte
			item, rest = nextItem(rest)
			if equalFold(item, "chunked") || len(item) == 0 {
				return ErrCoding
			}
			others = true
		}
	}
	if !equalFold(last, "chunked") || !others {
		return ErrCoding
	}
	return ErrCodingOther
}

// framed checks the fields that frame a message against each other.
func (h *head) framed() *Refusal {
	switch {
	case h.coding && h.HasLength:
		return ErrLengthCoding
	case h.coding && h.Minor == 0:
		return ErrCodingOld
	}
	return nil
}

// persistent reports whether the message lets its connection live (RFC 9112
// section 9.3).
func (h *head) persistent() bool {
	return !h.Close && (h.Minor == 1 || h.KeepAlive)
}

// version reads HTTP/1.x; what does not look like a version at all is malformed.
func version(b []byte, malformed *Refusal) (minor uint8, err *Refusal) {
	const form = "HTTP/1.1"
	switch {
	case len(b) != len(form) || string(b[:5]) != form[:5] || !isDigit(b[5]) || b[6] != '.' || !isDigit(b[7]):
		return 0, malformed
	case b[5] != '1' || b[7] > '1':
		return 0, ErrVersion
	}
	return b[7] - '0', nil
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }
