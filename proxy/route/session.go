package route

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"time"

	"assay.dev"
)

// Session keeps a client at one endpoint: a token in a cookie or a field names it. The
// token is a digest, so it tells a client nothing about the mesh; a client that makes one
// up chooses an endpoint among those that its request may reach anyway.
type Session struct {
	name      string
	field     string // name in lower case, of a field
	header    bool
	lifetime  time.Duration
	permanent bool
	path      string
}

// DefaultSession is the name of a cookie or field that no route names.
const DefaultSession = "assay-session"

func newSession(in *assay.RouteRule) *Session {
	s := in.Session
	if s == nil {
		return nil
	}
	out := &Session{name: s.Name, header: s.Header, lifetime: s.Lifetime, permanent: s.Permanent, path: "/"}
	if out.name == "" {
		out.name = DefaultSession
		if out.header {
			out.name = "Assay-Session"
		}
	}
	out.field = strings.ToLower(out.name)
	if m := in.Matches; len(m) == 1 && (m[0].Path.Type == assay.PathExact || m[0].Path.Type == assay.PathPrefix) && !strings.Contains(m[0].Path.Value, ";") {
		out.path = m[0].Path.Value
	}
	return out
}

// Token is an endpoint as a session names it; 0 is none.
type Token uint64

// TokenOf returns the token of a workload as a backend.
func TokenOf(b *Backend, workload string) Token {
	const prime = 1099511628211 // FNV-1a
	h := uint64(14695981039346656037)
	add := func(s string) {
		for i := range len(s) {
			h = (h ^ uint64(s[i])) * prime
		}
		h = (h ^ 0xff) * prime
	}
	add(b.Service)
	h = (h ^ uint64(b.Port)) * prime
	add(workload)
	return Token(max(h, 1))
}

// Token returns what the request says; 0 when it says nothing that holds.
func (s *Session) Token(v *View, now time.Time) Token {
	var text []byte
	if s.header {
		text, _ = v.field(s.field)
	} else if cookies, ok := v.field("cookie"); ok {
		text = cookie(cookies, s.name)
	}
	// TOKEN, or TOKEN-EXPIRY in seconds since 1970, both hexadecimal.
	digest, expiry, bounded := bytes.Cut(text, []byte("-"))
	if len(digest) != 16 || bounded != (s.lifetime > 0) || len(expiry) > 16 {
		return 0
	}
	n, err := strconv.ParseUint(string(digest), 16, 64)
	if err != nil {
		return 0
	}
	if bounded {
		at, err := strconv.ParseInt(string(expiry), 16, 64)
		if err != nil || now.Unix() >= at || at > now.Add(s.lifetime).Unix() {
			return 0
		}
	}
	return Token(n)
}

// cookie returns the value of a cookie (RFC 6265 section 4.2.1).
func cookie(field []byte, name string) []byte {
	for len(field) > 0 {
		part := field
		if i := bytes.IndexAny(field, ";,"); i >= 0 {
			part, field = field[:i], field[i+1:]
		} else {
			field = nil
		}
		part = bytes.TrimSpace(part)
		if len(part) > len(name) && part[len(name)] == '=' && string(part[:len(name)]) == name {
			return part[len(name)+1:]
		}
	}
	return nil
}

// Field returns what the response says, so that the client comes back.
func (s *Session) Field(t Token, now time.Time) assay.HeaderField {
	value := fmt.Sprintf("%016x", uint64(t))
	if s.lifetime > 0 {
		value += "-" + strconv.FormatInt(now.Add(s.lifetime).Unix(), 16)
	}
	if s.header {
		return assay.HeaderField{Name: s.name, Value: value}
	}
	value = s.name + "=" + value + "; Path=" + s.path + "; HttpOnly; SameSite=Strict"
	if s.permanent {
		value += "; Max-Age=" + strconv.FormatInt(int64(s.lifetime/time.Second), 10)
	}
	return assay.HeaderField{Name: "Set-Cookie", Value: value}
}
