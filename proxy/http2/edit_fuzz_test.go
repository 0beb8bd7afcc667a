package http2

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/proxy/route"
	refhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// Edits against a reference. A request goes to an application of net/http twice, straight
// and through the pair with a rule of a route in effect. What the application reads of the
// second must be what it reads of the first, edited by net/http's own means; the same for
// its response, as golang.org/x/net/http2 reads it.

// reading is a head as a reference reads it. The zero value is none: it was refused.
type reading struct {
	Status                    int
	Method, Host, Path, Query string
	Header                    http.Header
	Length                    int64
	Redirect                  string // of a redirect of the rule's
}

func (r reading) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d %s %q %q ?%q %d", r.Status, r.Method, r.Host, r.Path, r.Query, r.Length)
	for _, name := range slices.Sorted(maps.Keys(r.Header)) {
		fmt.Fprintf(&b, " %s:%q", name, r.Header[name])
	}
	return b.String()
}

// mirrored is an application that remembers what it read, and answers with one field.
type mirrored struct {
	mu          sync.Mutex
	last        reading
	name, value string
}

func (m *mirrored) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	path, query, _ := strings.Cut(r.RequestURI, "?")
	m.last = reading{Method: r.Method, Host: r.Host, Path: path, Query: query, Header: r.Header.Clone(), Length: r.ContentLength}
	w.Header()["Date"] = nil
	if m.name != "" {
		w.Header().Set(m.name, m.value)
	}
	w.WriteHeader(200)
}

func (m *mirrored) answer(name, value string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.name, m.value, m.last = name, value, reading{}
}

// took returns what was read since the last call.
func (m *mirrored) took() reading {
	m.mu.Lock()
	defer m.mu.Unlock()
	r := m.last
	m.last = reading{}
	return r
}

// requests sends heads on a connection, a new one after each that was refused.
type requests struct {
	t     testing.TB
	addr  string
	c     net.Conn
	fr    *refhttp2.Framer
	id    uint32
	block bytes.Buffer
	enc   *hpack.Encoder
}

func (q *requests) connect() {
	c, err := net.Dial("tcp", q.addr)
	if err != nil {
		q.t.Fatal(err)
	}
	q.c, q.id = c, 1
	q.fr = refhttp2.NewFramer(c, c)
	q.fr.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	q.enc = hpack.NewEncoder(&q.block)
	if _, err := io.WriteString(c, preface); err != nil {
		q.t.Fatal(err)
	}
	q.fr.WriteSettings()
}

func (q *requests) close() {
	if q.c != nil {
		q.c.Close()
		q.c = nil
	}
}

// send returns the response, the zero reading when the stream or the connection was reset.
func (q *requests) send(fields []Field) (r reading) {
	if q.c == nil || q.id > 1<<20 {
		q.close()
		q.connect()
	}
	q.c.SetDeadline(time.Now().Add(patience))
	id := q.id
	q.id += 2
	q.block.Reset()
	for _, f := range fields {
		q.enc.WriteField(f)
	}
	q.fr.WriteHeaders(refhttp2.HeadersFrameParam{StreamID: id, BlockFragment: q.block.Bytes(), EndHeaders: true, EndStream: true})
	for {
		f, err := q.fr.ReadFrame()
		if err != nil {
			if isTimeout(err) {
				q.t.Fatalf("no answer to %q", fields)
			}
			q.close()
			return reading{}
		}
		switch f := f.(type) {
		case *refhttp2.SettingsFrame:
			if !f.IsAck() {
				q.fr.WriteSettingsAck()
			}
		case *refhttp2.PingFrame:
			if !f.IsAck() {
				q.fr.WritePing(true, f.Data)
			}
		case *refhttp2.GoAwayFrame:
			q.close()
			return reading{}
		case *refhttp2.RSTStreamFrame:
			if f.StreamID == id {
				return reading{}
			}
		case *refhttp2.MetaHeadersFrame:
			if f.StreamID != id {
				continue
			}
			r.Header = http.Header{}
			fmt.Sscan(f.PseudoValue("status"), &r.Status)
			for _, x := range f.RegularFields() {
				r.Header.Add(x.Name, x.Value)
			}
			if f.StreamEnded() {
				return r
			}
		case *refhttp2.DataFrame:
			if f.StreamID == id && f.StreamEnded() {
				return r
			}
		}
	}
}

// edited is what a reference makes of its reading with a rule's edits.
func edited(r reading, e *assay.RouteEdits) reading {
	r.Header = r.Header.Clone()
	edit(r.Header, &e.Request)
	if e.Host != "" {
		r.Host = e.Host
	}
	if e.Path != nil {
		r.Path = replaced(r.Path, e.Path)
	}
	return r
}

func edit(h http.Header, e *assay.HeaderEdit) {
	for _, name := range e.Remove {
		h.Del(name)
	}
	for _, f := range e.Set {
		h.Set(f.Name, f.Value)
	}
	for _, f := range e.Add {
		h.Add(f.Name, f.Value)
	}
	// A server of HTTP/2 reads cookies as one field (RFC 9113 section 8.2.3).
	if c := h["Cookie"]; len(c) > 1 {
		h["Cookie"] = []string{strings.Join(c, "; ")}
	}
}

// replaced is ReplaceFullPath, or ReplacePrefixMatch of "/a", as the Gateway API has it.
func replaced(path string, e *assay.PathEdit) string {
	if e.Full != "" {
		return e.Full
	}
	with := strings.TrimSuffix(e.With, "/")
	if with != "" && with[0] != '/' {
		with = "/" + with
	}
	if path = with + strings.TrimPrefix(path, "/a"); path == "" {
		return "/"
	}
	return path
}

// underA reports whether the rule with the prefix "/a" takes a request.
func underA(path string) bool {
	path, _, _ = strings.Cut(path, "?")
	return path == "/a" || strings.HasPrefix(path, "/a/")
}

// hostile are what a client or a manifest may say to have two readers disagree.
var hostile = []string{
	"a\r\nX-Evil: 1", "a\nb", "\x00", "\r", " a", "a ", "\ta", "a\tb", "a\x7fb", "a\u0085b", "a\u2028b", "a\xffb", "/a b", "/a#b", "/a?b", "/a%", "/a%0", "/a%zz", "/a%2f..",
	"//evil.example/a", "/\\evil.example", "h:80", "h:0", "h@evil", "h/evil", "h,evil", "[::1]", "h:", "x a", "x:", ":path", ":authority", "", "content-length", "Transfer-Encoding",
	"TE", "trailers", "TRAILER", "Connection", "host", "Host", "cookie", "Cookie", "set-cookie", "transfer_encoding", "x_a", "grpc-timeout", "X-A", "accept-encoding", "a=b; c=d",
}

// FuzzEdit: what a rule changes of a request and of its response is what a reference
// changes of its own reading of them, and nothing else.
func FuzzEdit(f *testing.F) {
	f.Add("GET", "/a/x?q=/a", "h.test", "x-a", "1", "X-A", "2", "new.example", "/b", byte(0))
	f.Add("GET", "/b", "h.test", "x-a", "1", "X-A", "2", "new.example", "/b", byte(0))
	f.Add("DELETE", "/a", "h.test:81", "cookie", "a=b", "Cookie", "c=d", "", "/", byte(1))
	f.Add("OPTIONS", "/a//", "h.test", "x-a", "", "x-a", "", "h:81", "", byte(2))
	for i, v := range hostile {
		f.Add("GET", "/a", "h.test", "x-a", "1", "X-A", v, "", "", byte(i))
		f.Add("GET", "/a", "h.test", "x-a", "1", v, "1", "", "", byte(i))
		f.Add("GET", "/a", "h.test", "x-a", v, "x-b", "1", v, "", byte(i))
		f.Add("GET", "/a/x", "h.test", v, "1", "x-b", "1", "", v, byte(i))
		f.Add("GET", v, v, "x-a", "1", "x-b", "1", "new.example", "/b", byte(i))
	}
	app := &mirrored{}
	addr := serveHTTP(f, app.ServeHTTP)
	var mu sync.Mutex
	var table *route.Table
	w := newWorld(f, addr, quiet, func(w *world) {
		w.plan = func(x *Exchange) *Plan {
			mu.Lock()
			defer mu.Unlock()
			rule := table.Match(x.Request.View())
			if rule == nil {
				return nil
			}
			e := rule.Pick(0).Edits
			if e == nil {
				return nil
			}
			return &Plan{Fields: x.Request.Edited(e), Response: [3]*route.HeadEdit{&e.Response}}
		}
	})
	straight, meshed := &requests{t: f, addr: addr}, &requests{t: f, addr: w.addr}
	f.Cleanup(func() { straight.close(); meshed.close() })
	f.Fuzz(func(t *testing.T, method, path, authority, name, value, editName, editValue, host, with string, how byte) {
		straight.t, meshed.t = t, t
		fields := []Field{{Name: ":method", Value: method}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: path}, {Name: ":authority", Value: authority}, {Name: name, Value: value}}
		edits := assay.RouteEdits{Host: host}
		switch change := (assay.HeaderField{Name: editName, Value: editValue}); how % 3 {
		case 0:
			edits.Request.Set, edits.Response.Set = []assay.HeaderField{change}, []assay.HeaderField{change}
		case 1:
			edits.Request.Add, edits.Response.Add = []assay.HeaderField{change}, []assay.HeaderField{change}
		default:
			edits.Request.Remove, edits.Response.Remove = []string{strings.ToLower(editName)}, []string{strings.ToLower(editName)}
		}
		if edits.Path = (&assay.PathEdit{Match: "/a", With: with}); how&4 != 0 {
			edits.Path = &assay.PathEdit{Full: with}
			if with == "" {
				edits.Path = nil
			}
		}
		rule := assay.Route{Kind: assay.HTTPRoute, Namespace: "n", Name: "r", Parents: []assay.RouteParent{{Service: "n/s"}}, Rules: []assay.RouteRule{{
			Matches: []assay.RouteMatch{{Path: assay.PathMatch{Type: assay.PathPrefix, Value: "/a"}}}, RouteEdits: edits,
		}}}
		var head Head
		if _, why := check(request, fields, &head, nil); why != nil || rule.Validate() != nil {
			return
		}
		switch {
		case name == "grpc-timeout" || name == "content-length" || name == "expect": // of these the pair does more than to pass them on
			return
		case strings.EqualFold(editName, "content-type"), strings.EqualFold(editName, "trailer"), strings.EqualFold(editName, "date"):
			return // net/http says them by itself
		}
		app.answer("X-A", "0")
		direct := straight.send(fields)
		want := app.took()
		if direct.Status != 200 || want.Method == "" {
			return // the reference refuses it
		}
		if underA(path) {
			want = edited(want, &edits)
			edit(direct.Header, &edits.Response)
		}
		mu.Lock()
		table = route.Compile("n/s", 80, "n", []*assay.Route{&rule})
		mu.Unlock()
		answer := meshed.send(fields)
		if got := app.took(); got.String() != want.String() {
			t.Fatalf("%q with %+v: the application reads\n%s, want\n%s (%d)", fields, edits, got, want, answer.Status)
		}
		if answer.String() != direct.String() {
			t.Fatalf("%q with %+v: the client reads\n%s, want\n%s", fields, edits, answer, direct)
		}
	})
}

// FuzzRedirect: where a rule sends a client is where a reference finds that its reading of
// the request, changed by the rule, leads.
func FuzzRedirect(f *testing.F) {
	f.Add("/a/x?q=/a", "h.test:8080", "", "/b", "", uint16(0), byte(0))
	f.Add("/a", "[::1]:81", "new.example", "", "https", uint16(8443), byte(0))
	f.Add("/a?", "h.test", "", "/", "http", uint16(80), byte(1))
	f.Add("/a", "[00]", "0", "", "", uint16(8443), byte(0))
	for i, v := range hostile {
		f.Add("/a/x", "h.test", v, "", "", uint16(i), byte(i))
		f.Add("/a/x", "h.test", "", v, "https", uint16(0), byte(i))
		f.Add("/a"+v, v, "", "/b", v, uint16(443), byte(i))
	}
	app := &mirrored{}
	addr := serveHTTP(f, app.ServeHTTP)
	var mu sync.Mutex
	var table *route.Table
	w := newWorld(f, addr, quiet, func(w *world) {
		w.plan = func(x *Exchange) *Plan {
			mu.Lock()
			defer mu.Unlock()
			v := x.Request.View()
			rule := table.Match(v)
			if rule == nil {
				return nil
			}
			to := string(route.AppendLocation(nil, rule.Redirect, v, "http", 80))
			return &Plan{Answer: &Answer{Status: rule.Redirect.Status, Fields: []assay.HeaderField{{Name: "Location", Value: to}}}}
		}
	})
	straight, meshed := &requests{t: f, addr: addr}, &requests{t: f, addr: w.addr}
	f.Cleanup(func() { straight.close(); meshed.close() })
	f.Fuzz(func(t *testing.T, path, authority, host, with, scheme string, port uint16, how byte) {
		straight.t, meshed.t = t, t
		fields := []Field{{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: path}, {Name: ":authority", Value: authority}}
		to := assay.Redirect{Scheme: scheme, Host: host, Port: port, Status: 302}
		if to.Path = (&assay.PathEdit{Match: "/a", With: with}); how&1 != 0 {
			if to.Path = (&assay.PathEdit{Full: with}); with == "" {
				to.Path = nil
			}
		}
		rule := assay.Route{Kind: assay.HTTPRoute, Namespace: "n", Name: "r", Parents: []assay.RouteParent{{Service: "n/s"}}, Rules: []assay.RouteRule{{
			Matches: []assay.RouteMatch{{Path: assay.PathMatch{Type: assay.PathPrefix, Value: "/a"}}}, Redirect: &to,
		}}}
		var head Head
		if _, why := check(request, fields, &head, nil); why != nil || !underA(path) || rule.Validate() != nil {
			return
		}
		app.answer("", "")
		straight.send(fields)
		read := app.took()
		if read.Method == "" {
			return // the reference refuses it
		}
		mu.Lock()
		table = route.Compile("n/s", 80, "n", []*assay.Route{&rule})
		mu.Unlock()
		answer := meshed.send(fields)
		location := answer.Header.Get("Location")
		got, err := url.Parse(location)
		if answer.Status != 302 || len(answer.Header[textproto.CanonicalMIMEHeaderKey("location")]) != 1 || err != nil {
			t.Fatalf("%q with %+v: %s: %v", fields, to, answer, err)
		}
		if want := leadsTo(read, &to); got.Scheme != want.Scheme || got.Host != want.Host || got.RequestURI() != want.RequestURI() || got.User != nil || got.Fragment != "" {
			t.Fatalf("%q with %+v: %s leads to %v, want %v", fields, to, location, got, want)
		}
	})
}

// leadsTo is where a redirect of a rule leads whoever made a request (Gateway API,
// HTTPRequestRedirectFilter).
func leadsTo(r reading, to *assay.Redirect) *url.URL {
	at, err := url.Parse("http://" + r.Host)
	if err != nil {
		return &url.URL{}
	}
	host := to.Host
	if host == "" {
		if host = at.Hostname(); strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
	}
	scheme, port := "http", 80 // the parent's
	if to.Scheme != "" {
		scheme, port = to.Scheme, map[string]int{"http": 80, "https": 443}[to.Scheme]
	}
	if to.Port != 0 {
		port = int(to.Port)
	}
	if port != map[string]int{"http": 80, "https": 443}[scheme] {
		host = fmt.Sprintf("%s:%d", host, port)
	}
	path := r.Path
	if to.Path != nil {
		path = replaced(path, to.Path)
	}
	if r.Query != "" {
		path += "?" + r.Query
	}
	u, err := url.Parse(scheme + "://" + host + path)
	if err != nil {
		return &url.URL{}
	}
	return u
}

// TestCookieInPieces: rules see the pieces that clients make of a cookie as one.
func TestCookieInPieces(t *testing.T) {
	h := Head{Fields: []Field{{Name: "cookie", Value: "a=b"}, {Name: "x", Value: "1"}, {Name: "cookie", Value: "c=d"}, {Name: "x", Value: "2"}}}
	v := h.View()
	for name, want := range map[string]string{"cookie": "a=b; c=d", "x": "1, 2"} {
		if got, _ := v.Fields.Field(name, nil); string(got) != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}
