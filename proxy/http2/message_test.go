package http2

import (
	"net/http"
	"strings"
	"testing"
)

// TestMalformedRequests sends what RFC 9113 section 8 forbids: each resets its stream,
// and the connection and the application's view of it live on.
func TestMalformedRequests(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		t.Errorf("the application saw %s %s %v", r.Method, r.URL, r.Header)
	})
	w := newWorld(t, app)
	base := []string{":method", "GET", ":scheme", "http", ":path", "/", ":authority", "a.test"}
	with := func(extra ...string) []string { return append(append([]string(nil), base...), extra...) }
	set := func(name, value string) []string {
		list := with()
		for i := 0; i < len(list); i += 2 {
			if list[i] == name {
				list[i+1] = value
			}
		}
		return list
	}
	without := func(name string, extra ...string) (list []string) {
		for i := 0; i < len(base); i += 2 {
			if base[i] != name {
				list = append(list, base[i], base[i+1])
			}
		}
		return append(list, extra...)
	}
	for _, c := range []struct {
		name   string
		fields []string
		why    *Refusal
	}{
		{"upper case", with("X-Upper", "1"), ErrFieldName},
		{"empty name", with("", "1"), ErrFieldName},
		{"space in name", with("x y", "1"), ErrFieldName},
		{"colon in name", with("x:y", "1"), ErrFieldName},
		{"high byte in name", with("x\x80", "1"), ErrFieldName},
		{"CR LF in name", with("x\r\ny", "1"), ErrFieldName},
		{"CR LF in value", with("x", "1\r\nhost: b"), ErrFieldValue},
		{"NUL in value", with("x", "a\x00b"), ErrFieldValue},
		{"LF in path", set(":path", "/a\nb"), ErrFieldValue},
		{"space before value", with("x", " 1"), ErrFieldValue},
		{"tab after value", with("x", "1\t"), ErrFieldValue},
		{"DEL in value", with("x", "a\x7f"), ErrFieldValue},
		{"connection", with("connection", "close"), ErrConnection},
		{"keep-alive", with("keep-alive", "5"), ErrConnection},
		{"proxy-connection", with("proxy-connection", "close"), ErrConnection},
		{"transfer-encoding", with("transfer-encoding", "chunked"), ErrConnection},
		{"upgrade", with("upgrade", "websocket"), ErrConnection},
		{"te", with("te", "gzip"), ErrTE},
		{"unknown pseudo", with(":x", "1"), ErrPseudoUnknown},
		{"response's pseudo", with(":status", "200"), ErrPseudoUnknown},
		{"late pseudo", without(":path", "x", "1", ":path", "/"), ErrPseudoOrder},
		{"two methods", with(":method", "GET"), ErrPseudoTwice},
		{"two paths", with(":path", "/"), ErrPseudoTwice},
		{"two authorities", with(":authority", "a.test"), ErrPseudoTwice},
		{"no method", without(":method"), ErrPseudoMissing},
		{"no scheme", without(":scheme"), ErrPseudoMissing},
		{"no path", without(":path"), ErrPseudoMissing},
		{"no authority", without(":authority"), ErrAuthority},
		{"empty path", set(":path", ""), ErrPath},
		{"relative path", set(":path", "a"), ErrPath},
		{"absolute path", set(":path", "http://a.test/"), ErrPath},
		{"star with GET", set(":path", "*"), ErrPath},
		{"fragment", set(":path", "/a#b"), ErrPath},
		{"space in path", set(":path", "/a b"), ErrPath},
		{"request line in path", set(":path", "/ HTTP/1.1"), ErrPath},
		{"percent", set(":path", "/%zz"), ErrPath},
		{"percent cut", set(":path", "/%2"), ErrPath},
		{"method", set(":method", "GE T"), ErrMethod},
		{"empty method", set(":method", ""), ErrMethod},
		{"scheme", set(":scheme", "ht tp"), ErrScheme},
		{"scheme with request line", set(":scheme", "http://b/?"), ErrScheme},
		{"credentials", set(":authority", "u@a.test"), ErrAuthority},
		{"authority with path", set(":authority", "a.test/x"), ErrAuthority},
		{"port", set(":authority", "a.test:99999"), ErrAuthority},
		{"no IPv6 address", set(":authority", "[00]"), ErrAuthority},
		{"IPv4 in brackets", set(":authority", "[10.0.0.1]"), ErrAuthority},
		{"two gaps", set(":authority", "[1::2::3]"), ErrAuthority},
		{"a zone", set(":authority", "[fe80::1%25eth0]"), ErrAuthority},
		{"two hosts", with("host", "a.test", "host", "a.test"), ErrHostTwice},
		{"other host", with("host", "b.test"), ErrHostDiffers},
		{"other port", with("host", "a.test:81"), ErrHostDiffers},
		{"host alone is wrong", without(":authority", "host", "a b"), ErrAuthority},
		{"length", with("content-length", "+1"), ErrLength},
		{"empty length", with("content-length", ""), ErrLength},
		{"two lengths", with("content-length", "0", "content-length", "0"), ErrLength},
		{"length without body", with("content-length", "1"), ErrLengthDiffers},
		{"CONNECT with a path", set(":method", "CONNECT"), ErrPseudoMissing},
		{"CONNECT without a port", []string{":method", "CONNECT", ":authority", "a.test"}, ErrAuthority},
		{"protocol without CONNECT", with(":protocol", "websocket"), ErrPseudoMissing},
	} {
		t.Run(c.name, func(t *testing.T) {
			w.clients.mu.Lock()
			n := len(w.clients.ended)
			w.clients.mu.Unlock()
			r := w.client()
			r.headers(1, true, c.fields...)
			r.flush()
			if code := r.awaitReset(1); code != c.why.Code {
				t.Errorf("code %d, want %d", code, c.why.Code)
			}
			r.ping()
			if x := w.clients.wait(t, n+1)[n]; x.Failure != c.why.Reason || !x.Refused {
				t.Errorf("counted as %q, want %q", x.Failure, c.why.Reason)
			}
			r.c.Close()
		})
	}
	if w.dialled() != 0 {
		t.Error("the application was dialled")
	}
}

// TestCarriedRequests sends what may look odd and is valid.
func TestCarriedRequests(t *testing.T) {
	var got *http.Request
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) { got = r; w.Header().Set("x-answer", "\xe9") })
	w := newWorld(t, app)
	for name, extra := range map[string][]string{
		"host as authority":    {"host", "a.test"},
		"host with the port":   {"host", "A.test:80"},
		"te trailers":          {"te", "trailers"},
		"cookies apart":        {"cookie", "a=1", "cookie", "b=2"},
		"empty value":          {"x", ""},
		"bytes over ASCII":     {"x", "caf\xe9"},
		"tab within a value":   {"x", "a\tb"},
		"underscore in a name": {"x_y", "1"},
	} {
		t.Run(name, func(t *testing.T) {
			r := w.client()
			r.get(1, extra...)
			r.flush()
			if f := r.awaitHead(1); f.field(":status") != "200" || f.field("x-answer") != "\xe9" {
				t.Errorf("%v", f.fields)
			}
			if extra[0] == "x" && got.Header.Get("x") != extra[1] {
				t.Errorf("%q", got.Header)
			}
			r.c.Close()
		})
	}
}

// TestMalformedResponses has the application say what it may not.
func TestMalformedResponses(t *testing.T) {
	for _, c := range []struct {
		name string
		say  func(r *raw)
		why  *Refusal
	}{
		{"no status", func(r *raw) { r.headers(1, true, "x", "1") }, ErrPseudoMissing},
		{"bad status", func(r *raw) { r.headers(1, true, ":status", "20") }, ErrStatus},
		{"status 600", func(r *raw) { r.headers(1, true, ":status", "600") }, ErrStatus},
		{"101", func(r *raw) { r.headers(1, false, ":status", "101") }, ErrStatus},
		{"interim end", func(r *raw) { r.headers(1, true, ":status", "103") }, ErrInterimEnd},
		{"request's pseudo", func(r *raw) { r.headers(1, true, ":status", "200", ":path", "/") }, ErrPseudoUnknown},
		{"connection", func(r *raw) { r.headers(1, true, ":status", "200", "connection", "close") }, ErrConnection},
		{"CR LF", func(r *raw) { r.headers(1, true, ":status", "200", "x", "1\r\nset-cookie: a=1") }, ErrFieldValue},
		{"body first", func(r *raw) { r.data(1, false, []byte("x")) }, ErrNoHead},
		{"too little", func(r *raw) { r.headers(1, true, ":status", "200", "content-length", "5") }, ErrLengthDiffers},
		{"too long a head", func(r *raw) {
			r.headers(1, true, ":status", "200", "x", strings.Repeat("y", 15000), "x1", strings.Repeat("y", 15000), "x2", strings.Repeat("y", 15000), "x3", strings.Repeat("y", 15000), "x4", strings.Repeat("y", 15000))
		}, ErrHeadLong},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := newApp(t)
			w := newWorld(t, a.addr)
			r := w.client()
			r.get(1)
			r.flush()
			s := a.accept()
			s.awaitHead(1)
			c.say(s)
			if c.why == ErrHeadLong { // a frame has its limit, too
				s.out = splitHeaders(s.out)
			}
			s.flush()
			if c.why == ErrLengthDiffers {
				// Both have ended the stream: there is nothing left to reset.
			} else if code := s.awaitReset(1); code != c.why.Code {
				t.Errorf("the application was told %d, want %d", code, c.why.Code)
			}
			f := r.awaitHead(1)
			if f.field(":status") != "502" || f.field("assay-error") != "bad-request" {
				t.Errorf("the client was told %v", f.fields)
			}
			if x := w.servers.wait(t, 1)[0]; x.Failure != c.why.Reason || !x.Refused {
				t.Errorf("counted as %q, want %q", x.Failure, c.why.Reason)
			}
			s.ping()
		})
	}
}

// splitHeaders makes a HEADERS frame that is too long one with CONTINUATIONs.
func splitHeaders(b []byte) (out []byte) {
	h := parseHeader(b)
	p := b[frameHeader:]
	out = appendHeader(nil, maxFrame, frameHeaders, h.flags&^flagEndHeaders, h.stream)
	out = append(out, p[:maxFrame]...)
	for p = p[maxFrame:]; len(p) > 0; {
		n := min(len(p), maxFrame)
		flags := byte(0)
		if n == len(p) {
			flags = flagEndHeaders
		}
		out = appendHeader(out, n, frameContinuation, flags, h.stream)
		out = append(out, p[:n]...)
		p = p[n:]
	}
	return out
}

func TestLongHeads(t *testing.T) {
	var got http.Header
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		got = r.Header
		w.Header().Set("x-long", strings.Repeat("z", 40000))
	})
	w := newWorld(t, app)
	r := w.client()
	r.get(1, "x-long", strings.Repeat("y", 40000))
	r.out = append(r.out[:0], splitHeaders(r.out)...)
	r.flush()
	if f := r.awaitHead(1); f.field(":status") != "200" || len(f.field("x-long")) != 40000 || len(got.Get("x-long")) != 40000 {
		t.Errorf("%.100v", f.fields)
	}
	// Too long: it is answered, and the connection, with its compression, goes on.
	r.get(3, "x-long", strings.Repeat("y", 70000))
	r.out = append(r.out[:0], splitHeaders(r.out)...)
	r.flush()
	if f := r.awaitHead(3); f.field(":status") != "431" || f.field("assay-error") != "head-length" {
		t.Errorf("%v", f.fields)
	}
	many := []string{}
	for range 300 {
		many = append(many, "x", "1")
	}
	r.get(5, many...)
	r.flush()
	if f := r.awaitHead(5); f.field(":status") != "431" || f.field("assay-error") != "field-count" {
		t.Errorf("%v", f.fields)
	}
	r.get(7)
	r.flush()
	if f := r.awaitHead(7); f.field(":status") != "200" {
		t.Errorf("%v", f.fields)
	}
}
