package http1

import (
	"testing"

	"assay.dev"
	"assay.dev/proxy/route"
)

// FuzzEdit changes a head as a route may: what comes out is one head, of a message that
// is framed as before, and has what the edit says.
func FuzzEdit(f *testing.F) {
	f.Add([]byte("GET /a HTTP/1.1\r\nHost: h\r\nX-A: 1\r\n\r\n"), "X-A", "2", "new.example", "/b")
	f.Add([]byte("POST http://h/a?b=/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nx-a:\t\r\n\r\n0\r\n\r\n"), "x-b", "", "", "")
	f.Add([]byte("PUT /a/%41 HTTP/1.0\r\nContent-Length: 3\r\n\r\nabc"), "X-A", "a, b", "h:81", "/%41")
	f.Add([]byte("CONNECT h:1 HTTP/1.1\r\nHost: h:1\r\n\r\n"), "X-A", "1", "other", "/x")
	f.Add([]byte("OPTIONS * HTTP/1.1\r\nHost: h\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"), "X-A", "1", "other", "/x")
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
	})
}

func lowered(s string) string {
	b := []byte(s)
	for i := range b {
		b[i] = lower(b[i])
	}
	return string(b)
}
