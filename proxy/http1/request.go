package http1

import "bytes"

// Request is the head of a request. The zero value is ready to parse; its byte
// slices point into the buffer that completed it.
type Request struct {
	head
	Method []byte
	Target []byte
	// Host is the value of the Host field; nil when there is none.
	Host []byte
	// Authority is who the request is for: the target's authority, else Host.
	Authority []byte
	// Expect says that the client waits for 100 (Continue) before its body.
	Expect bool
	// Upgrade says that the client asks to leave HTTP (RFC 9110 section 7.8);
	// WebSocket that it asks for that.
	Upgrade, WebSocket bool
	// BoundAuth says that the request authenticates its connection and not itself:
	// NTLM and Negotiate (RFC 4559 section 6) bind every later request to it.
	BoundAuth bool

	// IsHead and IsConnect name methods that frame their responses; Idempotent says
	// that the method may be repeated (RFC 9110 section 9.2.2).
	IsHead, IsConnect, Idempotent bool

	raw                  []byte // the head, once it is complete
	method, target, host span
	hasHost              bool
	upgradeField         bool
}

type span struct{ from, to int }

func (s span) of(b []byte) []byte { return b[s.from:s.to:s.to] }

// Reset prepares r for the next head.
func (r *Request) Reset() { *r = Request{} }

// Begun reports whether a part of a head was parsed.
func (r *Request) Begun() bool { return r.at+r.scanned > 0 }

// Parse goes on with the head at the start of b, which holds what earlier calls
// were given and possibly more. It returns true when the head is complete: its
// length is r.Size. After a refusal r is useless until Reset.
func (r *Request) Parse(b []byte, lim *Limits) (bool, *Refusal) {
	for {
		from := r.at
		line, ok, err := r.nextLine(b, lim, maxMethod+lim.Target+len("  HTTP/1.1"))
		if !ok {
			return false, err
		}
		if !r.started {
			r.started = true
			err = r.requestLine(line, from, lim)
		} else if len(line) == 0 {
			r.Size = r.at
			err = r.complete(b)
			return err == nil, err
		} else {
			err = r.field(line, from, lim)
		}
		if err != nil {
			return false, err
		}
	}
}

func (r *Request) requestLine(line []byte, from int, lim *Limits) *Refusal {
	n := tokenLen(line)
	switch {
	case n > maxMethod:
		return ErrMethodLong
	case n == len(line):
		return ErrRequestLine
	case n == 0 || line[n] != ' ':
		return ErrMethod
	}
	rest := line[n+1:]
	sp := bytes.IndexByte(rest, ' ')
	switch {
	case sp > lim.Target || sp < 0 && len(rest) > lim.Target:
		return ErrTargetLong
	case sp <= 0 || bytes.IndexByte(rest[sp+1:], ' ') >= 0:
		return ErrRequestLine
	}
	if !all(rest[:sp], targetByte) {
		return ErrTarget
	}
	r.method = span{from, from + n}
	r.target = span{from + n + 1, from + n + 1 + sp}
	var err *Refusal
	r.Minor, err = version(rest[sp+1:], ErrRequestLine)
	return err
}

func (r *Request) field(line []byte, from int, lim *Limits) *Refusal {
	if r.fields++; r.fields > lim.Fields {
		return ErrFieldCount
	}
	name, value, err := splitField(line)
	if err != nil {
		return err
	}
	switch len(name) {
	case len("host"):
		if equalFold(name, "host") {
			if r.hasHost {
				return ErrHostTwice
			}
			r.hasHost = true
			at := from + offset(line, value)
			r.host = span{at, at + len(value)}
		}
	case len("expect"):
		if equalFold(name, "expect") {
			if !equalFold100(value) || r.Expect {
				return ErrExpectation
			}
			r.Expect = true
		}
	case len("upgrade"):
		if equalFold(name, "upgrade") {
			r.upgrade(value)
		} else if equalFold(name, "trailer") {
			return trailerNames(value)
		}
	case len("authorization"):
		if equalFold(name, "authorization") {
			r.BoundAuth = r.BoundAuth || boundScheme(value)
		}
	case len("proxy-authorization"):
		if equalFold(name, "proxy-authorization") {
			r.BoundAuth = r.BoundAuth || boundScheme(value)
		}
	default:
		return r.common(name, value)
	}
	return nil
}

// offset returns where part begins in whole, which it is a slice of.
func offset(whole, part []byte) int { return cap(whole) - cap(part) }

func equalFold100(value []byte) bool {
	const prefix = "100-"
	return len(value) > len(prefix) && string(value[:len(prefix)]) == prefix && equalFold(value[len(prefix):], "continue")
}

func (r *Request) upgrade(value []byte) {
	for len(value) > 0 {
		var item []byte
		item, value = nextItem(value)
		if len(item) > 0 {
			r.upgradeField = true
		}
		if equalFold(item, "websocket") {
			r.WebSocket = true
		}
	}
}

// trailerNames refuses to announce in Trailer what may not be a trailer.
func trailerNames(value []byte) *Refusal {
	for len(value) > 0 {
		var item []byte
		item, value = nextItem(value)
		if forbiddenTrailer(item) {
			return ErrTrailerNames
		}
	}
	return nil
}

// forbiddenTrailer reports whether a field of this name would frame or route the
// message (RFC 9110 section 6.5.1).
func forbiddenTrailer(name []byte) bool {
	return equalFold(name, "content-length") || equalFold(name, "transfer-encoding") ||
		equalFold(name, "trailer") || equalFold(name, "host") || equalFold(name, "connection") ||
		equalFold(name, "upgrade") || equalFold(name, "te") || equalFold(name, "expect")
}

func boundScheme(value []byte) bool {
	scheme := value[:tokenLen(value)]
	return equalFold(scheme, "ntlm") || equalFold(scheme, "negotiate")
}

// complete checks the parts of a head against each other.
func (r *Request) complete(b []byte) *Refusal {
	r.raw = b[:r.Size:r.Size]
	r.Method, r.Target = r.method.of(b), r.target.of(b)
	if r.hasHost {
		r.Host = r.host.of(b)
	} else if r.Minor == 1 {
		return ErrHostMissing
	}
	switch string(r.Method) {
	case "HEAD":
		r.IsHead, r.Idempotent = true, true
	case "GET", "OPTIONS", "TRACE", "PUT", "DELETE":
		r.Idempotent = true
	case "CONNECT":
		r.IsConnect = true
	}
	r.Upgrade = r.upgradeField && r.UpgradeOption && r.Minor == 1
	r.WebSocket = r.WebSocket && r.Upgrade
	if err := r.framed(); err != nil {
		return err
	}
	if r.IsConnect && (r.Chunked || r.Length > 0) {
		return ErrConnectBody
	}
	return r.route()
}

// Head returns the whole head, which is valid for as long as its parts are.
func (r *Request) Head() []byte { return r.raw }

// HasBody reports whether bytes follow the head.
func (r *Request) HasBody() bool { return r.Chunked || r.Length > 0 }

// Body returns the framing of what follows the head.
func (r *Request) Body(lim *Limits) Body {
	switch {
	case r.Chunked:
		return Body{Framing: Chunks, lim: lim}
	case r.Length > 0:
		return Body{Framing: Length, left: r.Length}
	}
	return Body{}
}

// ends reports whether all that the request says of connections is that the client's own
// ends with it: then nobody behind it needs to know (RFC 9110 section 7.6.1). HTTP/1.0
// says so by its version, which stays.
func (r *Request) ends() bool {
	return r.Close && r.options == 1 && r.Minor == 1 && !r.IsConnect && !r.BoundAuth
}

// Persistent reports whether the client lets its connection live.
func (r *Request) Persistent() bool { return r.persistent() }
