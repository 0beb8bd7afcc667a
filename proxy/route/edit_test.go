package route

import (
	"fmt"
	"reflect"
	"testing"
	"time"

	"assay.dev"
)

// TestReplacePrefix is the table of the Gateway API (HTTPPathModifier.replacePrefixMatch).
func TestReplacePrefix(t *testing.T) {
	for _, c := range [][4]string{
		{"/foo/bar", "/foo", "/xyz", "/xyz/bar"}, {"/foo/bar", "/foo", "/xyz/", "/xyz/bar"}, {"/foo/bar", "/foo/", "/xyz", "/xyz/bar"},
		{"/foo/bar", "/foo/", "/xyz/", "/xyz/bar"}, {"/foo", "/foo", "/xyz", "/xyz"}, {"/foo/", "/foo", "/xyz", "/xyz/"},
		{"/foo/bar", "/foo", "", "/bar"}, {"/foo/", "/foo", "", "/"}, {"/foo", "/foo", "", "/"}, {"/foo/", "/foo", "/", "/"}, {"/foo", "/foo", "/", "/"},
		{"/a/b", "/", "/x", "/x/a/b"}, {"/", "/", "/x", "/x/"}, {"/a", "/", "", "/a"},
	} {
		if got := string(AppendPath(nil, &assay.PathEdit{Match: c[1], With: c[2]}, []byte(c[0]))); got != c[3] {
			t.Errorf("%s with %q in place of %s: %s, want %s", c[0], c[2], c[1], got, c[3])
		}
	}
	if got := string(AppendPath(nil, &assay.PathEdit{Full: "/one"}, []byte("/a/b"))); got != "/one" {
		t.Error(got)
	}
}

// TestLocation follows the rules for a redirect's port.
func TestLocation(t *testing.T) {
	for _, c := range []struct {
		redirect assay.Redirect
		port     uint16
		want     string
	}{
		{assay.Redirect{}, 80, "http://web.example/a/b?q=1"},
		{assay.Redirect{}, 8080, "http://web.example:8080/a/b?q=1"},
		{assay.Redirect{Host: "other.example"}, 80, "http://other.example/a/b?q=1"},
		{assay.Redirect{Scheme: "https"}, 8080, "https://web.example/a/b?q=1"},
		{assay.Redirect{Scheme: "https", Port: 443}, 8080, "https://web.example/a/b?q=1"},
		{assay.Redirect{Scheme: "https", Port: 80}, 8080, "https://web.example:80/a/b?q=1"},
		{assay.Redirect{Scheme: "http"}, 8080, "http://web.example/a/b?q=1"},
		{assay.Redirect{Port: 8083}, 80, "http://web.example:8083/a/b?q=1"},
		{assay.Redirect{Path: &assay.PathEdit{Full: "/x"}}, 80, "http://web.example/x?q=1"},
		{assay.Redirect{Path: &assay.PathEdit{Match: "/a", With: "/x"}}, 80, "http://web.example/x/b?q=1"},
	} {
		if got := string(AppendLocation(nil, &c.redirect, request("GET /a/b?q=1"), "http", c.port)); got != c.want {
			t.Errorf("%+v at %d: %s, want %s", c.redirect, c.port, got, c.want)
		}
	}
	v := request("GET /")
	v.Authority = []byte("[fd00::1]:80")
	if got := string(AppendLocation(nil, &assay.Redirect{}, v, "http", 81)); got != "http://[fd00::1]:81/" {
		t.Error(got)
	}
}

func TestEditsFollowEachOther(t *testing.T) {
	e := newEdits(
		&assay.RouteEdits{Request: assay.HeaderEdit{Set: []assay.HeaderField{{Name: "X-A", Value: "1"}}, Add: []assay.HeaderField{{Name: "X-B", Value: "1"}}, Remove: []string{"x-c"}}},
		&assay.RouteEdits{Request: assay.HeaderEdit{Set: []assay.HeaderField{{Name: "x-a", Value: "2"}}, Add: []assay.HeaderField{{Name: "X-B", Value: "2"}}}, Host: "h"},
	)
	want := HeadEdit{Drop: []string{"x-c", "x-a"}, Append: []assay.HeaderField{{Name: "X-B", Value: "1"}, {Name: "x-a", Value: "2"}, {Name: "X-B", Value: "2"}}}
	if !reflect.DeepEqual(e.Request, want) || e.Host != "h" {
		t.Errorf("%+v", e)
	}
	if !e.Request.Drops([]byte("X-A")) || e.Request.Drops([]byte("X-B")) {
		t.Error("wrong fields go")
	}
	if newEdits(&assay.RouteEdits{}, &assay.RouteEdits{}) != nil {
		t.Error("nothing is something")
	}
}

func TestMirrorShare(t *testing.T) {
	m := Mirror{Numerator: 1, Denominator: 1000}
	n := 0
	for i := range uint64(100_000) {
		if m.Takes(i) {
			n++
		}
	}
	if n != 100 {
		t.Errorf("%d of 100000", n)
	}
}

func TestCORS(t *testing.T) {
	in := &assay.CORS{Origins: []string{"https://*.bank.example", "http://one.example:80", "http://port.example:8080"}, Credentials: true,
		Methods: []string{"GET", "PUT"}, Headers: []string{"*"}, ExposeHeaders: []string{"X-Id"}, MaxAge: 60}
	r := routeOf("r", assay.RouteRule{Name: "cors", Matches: []assay.RouteMatch{verb(prefix("/api"), "PUT")}, CORS: in}, rule("else", prefix("/")))
	tab := compile(t, r)
	const ask = "|Access-Control-Request-Method: PUT|Access-Control-Request-Headers: x-a,x-b"
	for origin, allowed := range map[string]bool{
		"https://www.bank.example": true, "https://a.b.bank.example": true, "https://bank.example": false, "http://www.bank.example": false,
		"http://one.example": true, "http://port.example:8080": true, "http://port.example": false, "https://www.bank.example:8443": false, "https://evil.example/.bank.example": false, "null": false,
	} {
		v := request("OPTIONS /api/x|Origin: " + origin + ask)
		one := tab.Match(v)
		if one == nil || one.CORS == nil {
			t.Fatalf("%s: taken by %v", origin, one)
		}
		got, ok := one.CORS.Preflight(v)
		if !ok {
			t.Fatal("no preflight")
		}
		text := fmt.Sprint(got)
		want := "[{Vary Origin}]"
		if allowed {
			want = "[{Vary Origin} {Access-Control-Allow-Origin " + origin + "} {Access-Control-Allow-Credentials true} {Access-Control-Allow-Methods GET, PUT} {Access-Control-Allow-Headers x-a,x-b} {Access-Control-Max-Age 60}]"
		}
		if text != want {
			t.Errorf("%s: %s, want %s", origin, text, want)
		}
		e := one.CORS.Response(request("PUT /api/x|Origin: " + origin))
		if !e.Drops([]byte("Access-Control-Allow-Origin")) || (len(e.Append) > 1) != allowed {
			t.Errorf("%s: %+v", origin, e)
		}
	}
	// What is no preflight goes its way.
	expect(t, tab, [][2]string{{"OPTIONS /api", "else"}, {"OPTIONS /api|Origin: https://www.bank.example", "else"}, {"PUT /api", "cors"}, {"OPTIONS /other|Origin: x" + ask, "else"}})
	any := newCORS(&assay.CORS{Origins: []string{"*"}})
	if e := any.Response(request("GET /|Origin: http://x")); e.Append[1].Value != "*" {
		t.Errorf("%+v", e)
	}
	if any.Response(request("GET /")) != nil {
		t.Error("a request of no page")
	}
}

func TestSession(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	b := &Backend{Service: "bank/web", Port: 80}
	token := TokenOf(b, "w1")
	if token == TokenOf(b, "w2") || token == TokenOf(&Backend{Service: "bank/web", Port: 81}, "w1") || token == 0 {
		t.Error("tokens are confused")
	}
	session := func(s assay.RouteSession) *Session {
		return newSession(&assay.RouteRule{Matches: []assay.RouteMatch{prefix("/cart")}, Session: &s})
	}
	cookie := session(assay.RouteSession{Name: "sticky"})
	f := cookie.Field(token, now)
	if want := fmt.Sprintf("sticky=%016x; Path=/cart; HttpOnly; SameSite=Strict", uint64(token)); f.Name != "Set-Cookie" || f.Value != want {
		t.Errorf("%+v, want %s", f, want)
	}
	back := fmt.Sprintf("%016x", uint64(token))
	for text, want := range map[string]Token{
		"GET /|Cookie: a=b; sticky=" + back + "; c=d": token, "GET /|Cookie: sticky=" + back: token, "GET /|Cookie: a=b|Cookie: sticky=" + back: token,
		"GET /|Cookie: xsticky=" + back: 0, "GET /|Cookie: sticky=zz": 0, "GET /|Cookie: sticky=" + back + "-99": 0, "GET /": 0, "GET /|sticky: " + back: 0,
	} {
		if got := cookie.Token(request(text), now); got != want {
			t.Errorf("%s: %x, want %x", text, got, want)
		}
	}
	header := session(assay.RouteSession{Header: true, Lifetime: time.Hour})
	f = header.Field(token, now)
	if f.Name != "Assay-Session" {
		t.Error(f)
	}
	v := request("GET /|assay-session: " + f.Value)
	for after, want := range map[time.Duration]Token{0: token, 59 * time.Minute: token, time.Hour: 0, -time.Hour: 0} {
		if got := header.Token(v, now.Add(after)); got != want {
			t.Errorf("after %v: %x", after, got)
		}
	}
	if f := session(assay.RouteSession{Lifetime: time.Minute, Permanent: true}).Field(token, now); f.Value[len(f.Value)-12:] != "; Max-Age=60" {
		t.Error(f)
	}
}

// TestUnsoundRules: a rule that control never sends (package assay's Validate refuses it)
// writes nothing of itself into a message.
func TestUnsoundRules(t *testing.T) {
	match := []assay.RouteMatch{{Path: assay.PathMatch{Type: assay.PathPrefix, Value: "/"}}}
	field := assay.HeaderEdit{Set: []assay.HeaderField{{Name: "X-A", Value: "a\r\nX-Evil: 1"}}}
	for name, rule := range map[string]assay.RouteRule{
		"request":  {Matches: match, RouteEdits: assay.RouteEdits{Request: field}},
		"response": {Matches: match, RouteEdits: assay.RouteEdits{Response: field}},
		"backend":  {Matches: match, Backends: []assay.RouteBackend{{Service: "n/s", Port: 80, Weight: 1, RouteEdits: assay.RouteEdits{Request: field}}}},
		"name":     {Matches: match, RouteEdits: assay.RouteEdits{Request: assay.HeaderEdit{Add: []assay.HeaderField{{Name: "X-A: 1\r\nX-Evil", Value: "1"}}}}},
		"framing":  {Matches: match, RouteEdits: assay.RouteEdits{Request: assay.HeaderEdit{Remove: []string{"content-length"}}}},
		"host":     {Matches: match, RouteEdits: assay.RouteEdits{Host: "h\r\nX-Evil: 1"}},
		"path":     {Matches: match, RouteEdits: assay.RouteEdits{Path: &assay.PathEdit{Full: "/a HTTP/1.1\r\n\r\n"}}},
		"redirect": {Matches: match, Redirect: &assay.Redirect{Status: 302, Host: "h\nX: y"}},
		"cors":     {Matches: match, CORS: &assay.CORS{Origins: []string{"https://a\r\nX: y"}}},
		"session":  {Matches: match, Session: &assay.RouteSession{Name: "a\r\nX"}},
	} {
		table := Compile("n/s", 80, "n", []*assay.Route{{
			Kind: assay.HTTPRoute, Namespace: "n", Name: "r", Parents: []assay.RouteParent{{Service: "n/s"}}, Rules: []assay.RouteRule{rule},
		}})
		got := table.Match(&View{Method: []byte("GET"), Path: []byte("/"), Fields: head{}})
		if got == nil || got.Refuse == "" || got.Redirect != nil || got.CORS != nil || got.Session != nil || len(got.Backends) > 0 {
			t.Errorf("%s: %+v", name, got)
		}
	}
}
