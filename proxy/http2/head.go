package http2

import (
	"strings"

	"golang.org/x/net/http2/hpack"
)

// Limits bound a message. Zero fields take the defaults in parentheses.
type Limits struct {
	Head   int // bytes of all names and values of a head, or of trailers (64 KiB)
	Fields int // (256)
}

// WithDefaults returns l with its zero fields filled in.
func (l Limits) WithDefaults() Limits {
	if l.Head <= 0 {
		l.Head = 64 << 10
	}
	if l.Fields <= 0 {
		l.Fields = 256
	}
	return l
}

// Field is one field line. Names of pseudo-header fields begin with a colon.
type Field = hpack.HeaderField

// Head is a request's head, as far as others want to know it. It and its strings are
// valid as long as the call that it is given to.
type Head struct {
	Method, Scheme, Authority, Path string
	Protocol                        string // of extended CONNECT (RFC 8441)
	GRPC                            bool   // by its content type
	Timeout                         string // grpc-timeout, as it is; "" without
	Fields                          []Field
}

// Lookup returns the value of the first field called name, in lower case.
func (h *Head) Lookup(name string) (string, bool) {
	for i := range h.Fields {
		if h.Fields[i].Name == name {
			return h.Fields[i].Value, true
		}
	}
	return "", false
}

// kind is what a list of fields is.
type kind uint8

const (
	request kind = iota
	response
	trailers
)

// facts are what framing and counting need to know of a checked list.
type facts struct {
	status   int   // of a response
	length   int64 // Content-Length, -1 without
	isHead   bool  // the method is HEAD
	connect  bool  // CONNECT of either kind
	extended bool  // the one of RFC 8441
	idem     bool  // the method may be repeated (RFC 9110 section 9.2.2)
	grpc     bool
	code     int // grpc-status, -1 without
}

// check decides whether the fields are a valid message of their kind (RFC 9113
// section 8). trusted says of which the bytes were looked at before; nil: of none.
func check(k kind, fields []Field, head *Head, trusted func(i int) bool) (f facts, bad *Refusal) {
	f.length, f.code = -1, -1
	var method, scheme, path, authority, protocol, status, host string
	var seen uint8
	const (
		hasMethod = 1 << iota
		hasScheme
		hasPath
		hasAuthority
		hasProtocol
		hasStatus
		hasHost
	)
	regular := false
	for i := range fields {
		name, value := fields[i].Name, fields[i].Value
		if len(name) == 0 {
			return f, ErrFieldName
		}
		if trusted == nil || !trusted(i) {
			if name[0] != ':' && !validName(name) {
				return f, ErrFieldName
			}
			if !validValue(value) {
				return f, ErrFieldValue
			}
		}
		if name[0] == ':' {
			if regular {
				return f, ErrPseudoOrder
			}
			var bit uint8
			switch name {
			case ":method":
				bit, method = hasMethod, value
			case ":scheme":
				bit, scheme = hasScheme, value
			case ":path":
				bit, path = hasPath, value
			case ":authority":
				bit, authority = hasAuthority, value
			case ":protocol":
				bit, protocol = hasProtocol, value
			case ":status":
				bit, status = hasStatus, value
			}
			switch {
			case k == trailers:
				return f, ErrTrailerPseudo
			case bit == 0, k == response && bit != hasStatus, k == request && bit == hasStatus:
				return f, ErrPseudoUnknown
			case seen&bit != 0:
				return f, ErrPseudoTwice
			}
			seen |= bit
			continue
		}
		regular = true
		// Few names matter; their lengths tell most others apart.
		switch len(name) {
		case 2:
			if name == "te" && value != "trailers" {
				return f, ErrTE
			}
		case 4:
			if name == "host" {
				switch {
				case k == trailers:
					return f, ErrTrailerField
				case k == request && seen&hasHost != 0:
					return f, ErrHostTwice
				}
				seen |= hasHost
				host = value
			}
		case 7:
			if name == "upgrade" {
				return f, ErrConnection
			}
		case 10:
			if name == "connection" || name == "keep-alive" {
				return f, ErrConnection
			}
		case 11:
			if name == "grpc-status" {
				f.code = parseStatusCode(value)
			}
		case 12:
			if name == "content-type" && strings.HasPrefix(value, "application/grpc") && (len(value) == 16 || value[16] == '+' || value[16] == ';') {
				f.grpc = true
			} else if name == "grpc-timeout" && head != nil {
				head.Timeout = value
			}
		case 14:
			if name == "content-length" {
				n, ok := parseLength(value)
				switch {
				case k == trailers:
					return f, ErrTrailerField
				case !ok || f.length >= 0: // also twice with the same value
					return f, ErrLength
				}
				f.length = n
			}
		case 16:
			if name == "proxy-connection" {
				return f, ErrConnection
			}
		case 17:
			if name == "transfer-encoding" {
				return f, ErrConnection
			}
		}
	}
	switch k {
	case response:
		return f, f.response(status)
	case trailers:
		return f, nil
	}
	if head != nil {
		head.Method, head.Scheme, head.Authority, head.Path, head.Protocol = method, scheme, authority, path, protocol
		head.GRPC, head.Fields = f.grpc, fields
		if head.Authority == "" {
			head.Authority = host
		}
	}
	if seen&hasMethod == 0 {
		return f, ErrPseudoMissing
	}
	if !validMethod(method) {
		return f, ErrMethod
	}
	switch method {
	case "GET", "OPTIONS", "TRACE", "PUT", "DELETE":
		f.idem = true
	case "HEAD":
		f.idem, f.isHead = true, true
	case "CONNECT":
		f.connect = true
	}
	f.extended = seen&hasProtocol != 0
	if f.extended && (!f.connect || !all(protocol, tokenByte) || protocol == "") {
		return f, ErrPseudoMissing
	}
	if f.connect && !f.extended {
		if seen&(hasScheme|hasPath) != 0 || seen&hasAuthority == 0 {
			return f, ErrPseudoMissing
		}
		if _, port, ok := splitAuthority(authority); !ok || port == "" {
			return f, ErrAuthority
		}
	} else {
		if seen&(hasScheme|hasPath) != hasScheme|hasPath {
			return f, ErrPseudoMissing
		}
		if !validScheme(scheme) {
			return f, ErrScheme
		}
		web := strings.EqualFold(scheme, "http") || strings.EqualFold(scheme, "https")
		switch {
		case path == "*" && method == "OPTIONS":
		case web && (path == "" || path[0] != '/'), !validPath(path):
			return f, ErrPath
		}
		if web && authority == "" && host == "" {
			return f, ErrAuthority
		}
		if authority != "" {
			if _, _, ok := splitAuthority(authority); !ok {
				return f, ErrAuthority
			}
		}
	}
	if host != "" && authority == "" {
		if _, _, ok := splitAuthority(host); !ok {
			return f, ErrAuthority
		}
	}
	if seen&hasHost != 0 && seen&hasAuthority != 0 && !sameAuthority(scheme, authority, host) {
		return f, ErrHostDiffers
	}
	return f, nil
}

func (f *facts) response(status string) *Refusal {
	if status == "" {
		return ErrPseudoMissing
	}
	if len(status) != 3 || status[0] < '1' || status[0] > '5' || !digit(status[1]) || !digit(status[2]) || status == "101" {
		return ErrStatus
	}
	f.status = int(status[0]-'0')*100 + int(status[1]-'0')*10 + int(status[2]-'0')
	return nil
}

func parseLength(s string) (n int64, ok bool) {
	if len(s) == 0 || len(s) > 18 {
		return 0, false
	}
	for i := range len(s) {
		if !digit(s[i]) {
			return 0, false
		}
		n = n*10 + int64(s[i]-'0')
	}
	return n, true
}

// message follows one direction of a stream.
type message struct {
	begun  bool // the final head has passed
	done   bool // its end has
	tunnel bool // its bytes are not a body: 2xx to CONNECT, and CONNECT itself
	length int64
	seen   int64
	grpc   bool
	count  messages
}

// begin notes the head of a message with a body of length, -1 when it does not say.
func (m *message) begin(f *facts, bodyless bool) {
	m.begun = true
	m.length = f.length
	if bodyless {
		m.length = 0
	}
	m.tunnel = f.connect
	m.grpc = f.grpc
	if m.grpc {
		m.count = messages{}
	}
}

// data counts p of the body.
func (m *message) data(p []byte) *Refusal {
	if !m.begun {
		return ErrNoHead
	}
	m.seen += int64(len(p))
	if m.length >= 0 && m.seen > m.length && !m.tunnel {
		return ErrLengthDiffers
	}
	if m.grpc {
		m.count.feed(p)
	}
	return nil
}

// end notes its end.
func (m *message) end() *Refusal {
	if !m.begun {
		return ErrNoHead
	}
	m.done = true
	if m.length >= 0 && m.seen != m.length && !m.tunnel {
		return ErrLengthDiffers
	}
	return nil
}
