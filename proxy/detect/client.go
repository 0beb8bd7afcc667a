package detect

import (
	"bytes"
	"slices"
	"strings"

	"assay.dev"
)

// MaxFirst is how many of the client's first bytes are ever looked at: a request
// line longer than this is for the HTTP engine to refuse.
const MaxFirst = 8 << 10

const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" // RFC 9113 section 3.4

// Client looks at the first bytes of a client. done is false while more bytes could
// change the answer; proto is then what it will be if none come.
func Client(p []byte) (proto assay.Protocol, done bool) {
	if len(p) == 0 {
		return assay.Opaque, false
	}
	if p[0] == recordHandshake {
		return clientTLS(p)
	}
	if n := min(len(p), len(preface)); string(p[:n]) == preface[:n] && n > 1 {
		return assay.HTTP2, n == len(preface)
	}
	return clientHTTP1(p)
}

// clientTLS accepts a record header and the type of the first handshake message.
func clientTLS(p []byte) (assay.Protocol, bool) {
	if len(p) > 1 && p[1] != 3 || len(p) > 2 && p[2] > 4 || len(p) > 5 && p[5] != typeClientHello {
		return assay.Opaque, true
	}
	if len(p) < 6 {
		return assay.Opaque, false
	}
	if n := int(p[3])<<8 | int(p[4]); n < 4 || n > maxRecord {
		return assay.Opaque, true
	}
	return assay.TLS, true
}

// clientHTTP1 wants METHOD SP TARGET SP HTTP/1.x CRLF (RFC 9112 section 3). Other
// protocols have upper-case verbs too (NATS even a CONNECT), so nothing less than
// the version settles it, but for a method with a path or URI behind it, which
// nobody else says and which may be as long as the client likes. Only what may still
// become a registered method is waited for: whoever says anything else without ending
// a line must not be held up. So a request of a method that nobody has registered is
// opaque when its first line comes in pieces.
func clientHTTP1(p []byte) (assay.Protocol, bool) {
	sp := bytes.IndexByte(p[:min(len(p), maxMethod+1)], ' ')
	method := p
	if sp >= 0 {
		method = p[:sp]
	}
	if sp < 0 {
		return assay.Opaque, !methodPrefix(method)
	}
	line := p[sp+1:]
	if i := bytes.IndexByte(line, '\n'); i >= 0 {
		line = bytes.TrimSuffix(line[:i], []byte{'\r'})
		i := bytes.LastIndexByte(line, ' ')
		if token(method) && i > 0 && len(line)-i == len(" HTTP/1.1") && string(line[i:i+8]) == " HTTP/1." {
			return assay.HTTP1, true
		}
		return assay.Opaque, true
	}
	if _, ok := slices.BinarySearchFunc(methods, method, compareMethod); !ok {
		return assay.Opaque, true
	}
	if len(line) > 0 && line[0] == '/' || len(line) > 4 && string(line[:4]) == "http" {
		return assay.HTTP1, len(p) >= MaxFirst
	}
	return assay.Opaque, len(p) >= MaxFirst
}

// methods are IANA's registry of HTTP methods, sorted.
var methods = []string{
	"ACL", "BASELINE-CONTROL", "BIND", "CHECKIN", "CHECKOUT", "CONNECT", "COPY", "DELETE", "GET", "HEAD", "LABEL",
	"LINK", "LOCK", "MERGE", "MKACTIVITY", "MKCALENDAR", "MKCOL", "MKREDIRECTREF", "MKWORKSPACE", "MOVE", "OPTIONS",
	"ORDERPATCH", "PATCH", "POST", "PRI", "PROPFIND", "PROPPATCH", "PUT", "QUERY", "REBIND", "REPORT", "SEARCH", "TRACE",
	"UNBIND", "UNCHECKOUT", "UNLINK", "UNLOCK", "UPDATE", "UPDATEREDIRECTREF", "VERSION-CONTROL",
}

const maxMethod = len("UPDATEREDIRECTREF")

func compareMethod(m string, p []byte) int { return strings.Compare(m, string(p)) }

// methodPrefix reports whether p may become a method.
func methodPrefix(p []byte) bool {
	i, _ := slices.BinarySearchFunc(methods, p, compareMethod)
	return i < len(methods) && len(p) <= len(methods[i]) && methods[i][:len(p)] == string(p)
}

func token(p []byte) bool {
	for _, c := range p {
		if !tokenByte(c) {
			return false
		}
	}
	return len(p) > 0
}

// tokenByte is RFC 9110 section 5.6.2.
func tokenByte(c byte) bool {
	if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' {
		return true
	}
	switch c {
	case '!', '#', '$', '%', '&', '\'', '*', '+', '-', '.', '^', '_', '`', '|', '~':
		return true
	}
	return false
}
