package http1

import (
	"bufio"
	"bytes"
	"net/http"
	"strings"
	"testing"

	"assay.dev"
	"assay.dev/proxy/route"
)

// FuzzEdit changes a head as a route may: what comes out is one head, of a message that
// is framed as before, and has what the edit says; net/http reads it as we do.
func FuzzEdit(f *testing.F) {
	f.Add([]byte("GET /a HTTP/1.1\r\nHost: h\r\nX-A: 1\r\n\r\n"), "X-A", "2", "new.example", "/b")
	f.Add([]byte("POST http://h/a?b=/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nx-a:\t\r\n\r\n0\r\n\r\n"), "x-b", "", "", "")
	f.Add([]byte("PUT /a/%41 HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc"), "X-A", "a, b", "h:81", "/%41")
	f.Add([]byte("CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n\r\n"), "X-A", "1", "other", "/x")
	f.Add([]byte("OPTIONS * HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"), "X-A", "1", "other", "/x")
	const post = "POST /a/x HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx"
	for _, v := range hostileValues {
		f.Add([]byte(post), "X-A", v, "", "")
		f.Add([]byte(post), v, "1", "", "")
		f.Add([]byte(post), "X-A", "1", v, "")
		f.Add([]byte(post), "X-A", "1", "", v)
	}
	lim := Limits{}.WithDefaults()
	f.Fuzz(func(t *testing.T, b []byte, name, value, host, with string) {
		edits := assay.RouteEdits{Request: assay.HeaderEdit{Set: []assay.HeaderField{{Name: name, Value: value}}}, Host: host, Path: &assay.PathEdit{Match: "/a", With: with}}
		rule := assay.Route{Kind: assay.HTTPRoute, Namespace: "n", Name: "r", Rules: []assay.RouteRule{{
			Matches: []assay.RouteMatch{{Path: assay.PathMatch{Type: assay.PathPrefix, Value: "/a"}}}, RouteEdits: edits,
		}}}
		var req Request
		if ok, err := req.Parse(b, &lim); !ok || err != nil || rule.Validate() != nil {
			return
		}
		if path, _ := req.Path(); len(path) < 2 || string(path[:2]) != "/a" || len(path) > 2 && path[2] != '/' {
			edits.Path = nil // the rule would not take it
		}
		head := NewHead(b, req.Size)
		edit := &route.HeadEdit{Drop: []string{lowered(name)}, Append: edits.Request.Set}
		var target, to []byte
		if host != "" {
			to = []byte(host)
		}
		if edits.Path != nil || to != nil {
			target = req.AppendTarget(nil, to, edits.Path)
		}
		out := head.AppendRequest(nil, target, to, edit)
		var again Request
		if ok, err := again.Parse(out, &Limits{Head: 1 << 20, Target: 1 << 20, Fields: 1 << 20, Ext: 1 << 20}); err != nil || !ok || again.Size != len(out) {
			if req.IsConnect && to != nil {
				return // the far end refuses a host that its target contradicts
			}
			t.Fatalf("%q became %q: %v", b[:req.Size], out, err)
		}
		if again.Chunked != req.Chunked || again.HasLength != req.HasLength || again.Length != req.Length || string(again.Method) != string(req.Method) ||
			again.Minor != req.Minor || again.Close != req.Close || again.Upgrade != req.Upgrade || again.Expect != req.Expect {
			t.Fatalf("%q became %q, which is framed in another way", b[:req.Size], out)
		}
		edited := NewHead(out, again.Size)
		if got, ok := edited.Field(lowered(name), nil); !ok || string(got) != value {
			t.Fatalf("%q became %q: %s is %q, want %q", b[:req.Size], out, name, got, value)
		}
		if to != nil && string(again.Host) != host {
			t.Fatalf("%q became %q: the host is not %q", b[:req.Size], out, host)
		}
		sameAsReference(t, out, &again, 0, !again.HasBody())
	})
}

// hostileValues are what a manifest may hold in a filter to have two readers disagree:
// the smuggler's alphabet, and what some readers take for it.
var hostileValues = []string{
	"a\r\nX-Evil: 1", "a\nX-Evil: 1", "a\rX-Evil: 1", "a\r\n\r\nGET /evil HTTP/1.1\r\nHost: h\r\n\r\n", "a\x00b", "\x00", "\r\n", "\n", "\r", "a\r\n", "\ra",
	"a\x0bb", "a\x0cb", "a\x7fb", "a\x1fb", " a", "a ", "\ta", "a\t", "a\u0085b", "a\u2028b", "a\xffb", "/a\r\n", "/a b", "/a#b", "/a?b", "/a%", "/a%0", "/a%zz",
	"//evil.example/a", "/\\evil.example", "/a HTTP/1.1\r\nHost: evil\r\n\r\n", "h:80\r\nX: y", "h@evil", "h/evil", "h,evil", "h evil", "[::1]", "h:", "h:0", "h:99999",
	"X-A: 1\r\nX-Evil", "x a", "x:", "", "content-length", "Transfer-Encoding", "TRAILER", "Connection", "host", "Content-Length ", "transfer_encoding",
}

// FuzzEditResponse is FuzzEdit for responses.
func FuzzEditResponse(f *testing.F) {
	for _, v := range append(hostileValues, "fine") {
		f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Length: 1\r\nX-A: 0\r\n\r\nx"), "X-A", v)
		f.Add([]byte("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), v, "1")
		f.Add([]byte("HTTP/1.0 304 \r\nx-a: 1\r\n\r\n"), "x-a", v)
	}
	f.Fuzz(func(t *testing.T, b []byte, name, value string) {
		edits := assay.RouteEdits{Response: assay.HeaderEdit{Set: []assay.HeaderField{{Name: name, Value: value}}}}
		rule := assay.Route{Kind: assay.HTTPRoute, Namespace: "n", Name: "r", Rules: []assay.RouteRule{{
			Matches: []assay.RouteMatch{{Path: assay.PathMatch{Type: assay.PathPrefix, Value: "/"}}}, RouteEdits: edits,
		}}}
		var was Response
		if ok, err := was.Parse(b, &limits); !ok || err != nil || rule.Validate() != nil {
			return
		}
		head := NewHead(b, was.Size)
		out := head.AppendResponse(nil, &route.HeadEdit{Drop: []string{lowered(name)}, Append: edits.Response.Set})
		var again Response
		if ok, err := again.Parse(out, &wideLimits); !ok || err != nil || again.Size != len(out) {
			t.Fatalf("%q became %q: %v", b[:was.Size], out, err)
		}
		one, two := was.Body(false, false, &limits), again.Body(false, false, &limits)
		if again.Status != was.Status || one.Framing != two.Framing || again.Length != was.Length || again.Chunked != was.Chunked {
			t.Fatalf("%q became %q, which is framed in another way", b[:was.Size], out)
		}
		edited := NewHead(out, again.Size)
		if got, ok := edited.Field(lowered(name), nil); !ok || string(got) != value {
			t.Fatalf("%q became %q: %s is %q, want %q", b[:was.Size], out, name, got, value)
		}
		if was.Status != 101 {
			readsAs(t, out, &again, name, value)
		}
	})
}

// readsAs holds net/http's reading of a head against ours.
func readsAs(t *testing.T, head []byte, r *Response, name, value string) {
	t.Helper()
	left := bytes.NewReader(head)
	in := bufio.NewReaderSize(left, 1<<20)
	ref, err := http.ReadResponse(in, &http.Request{Method: "GET"})
	if err != nil {
		t.Fatalf("carried, but net/http refuses: %v\n%q", err, head)
	}
	if ref.StatusCode != r.Status || left.Len()+in.Buffered() != 0 {
		t.Fatalf("net/http reads status %d and leaves %d bytes of %q", ref.StatusCode, left.Len()+in.Buffered(), head)
	}
	if got := ref.Header.Values(name); len(got) != 1 || got[0] != value {
		t.Fatalf("net/http reads %s as %q, want %q\n%q", name, got, value, head)
	}
}

var wideLimits = Limits{Head: 1 << 20, Target: 1 << 20, Fields: 1 << 20, Ext: 1 << 20}

// FuzzLocation: what a redirect says, whatever its manifest and the request hold, is one
// field of one response.
func FuzzLocation(f *testing.F) {
	const get = "GET /a/x?q=1 HTTP/1.1\r\nHost: h\r\n\r\n"
	for _, v := range append(hostileValues, "fine", "/fine") {
		f.Add([]byte(get), v, "")
		f.Add([]byte(get), "", v)
		f.Add([]byte("GET http://[::1]:8/a HTTP/1.1\r\nHost: [::1]:8\r\n\r\n"), v, v)
	}
	lim := Limits{}.WithDefaults()
	f.Fuzz(func(t *testing.T, b []byte, host, path string) {
		to := assay.Redirect{Host: host, Path: &assay.PathEdit{Match: "/a", With: path}, Status: 302}
		rule := assay.Route{Kind: assay.HTTPRoute, Namespace: "n", Name: "r", Rules: []assay.RouteRule{{
			Matches: []assay.RouteMatch{{Path: assay.PathMatch{Type: assay.PathPrefix, Value: "/a"}}}, Redirect: &to,
		}}}
		var req Request
		if ok, err := req.Parse(b, &lim); !ok || err != nil || rule.Validate() != nil {
			return
		}
		v := route.View{Method: req.Method, Authority: req.Authority}
		v.Path, v.Query = req.Path()
		if len(v.Path) < 2 || string(v.Path[:2]) != "/a" || len(v.Path) > 2 && v.Path[2] != '/' {
			return
		}
		location := string(route.AppendLocation(nil, &to, &v, "http", 80))
		a := Answer{Status: 302, Fields: []assay.HeaderField{{Name: "Location", Value: location}}}
		out := a.append(nil, true)
		var again Response
		if ok, err := again.Parse(out, &wideLimits); !ok || err != nil || again.Size != len(out) {
			t.Fatalf("%q and %q made %q: %v", b, location, out, err)
		}
		readsAs(t, out, &again, "Location", location)
		if !strings.HasPrefix(location, "http://"+host) {
			t.Fatalf("%q leads to %s", host, location)
		}
	})
}

func lowered(s string) string {
	b := []byte(s)
	for i := range b {
		b[i] = lower(b[i])
	}
	return string(b)
}
