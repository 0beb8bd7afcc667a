package route

import (
	"fmt"
	"math/rand/v2"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"assay.dev"
)

// head is Fields of name, value pairs.
type head []string

func (h head) Field(name string, scratch []byte) ([]byte, bool) {
	found := false
	for i := 0; i < len(h); i += 2 {
		if strings.ToLower(h[i]) == name {
			if found {
				scratch = append(scratch, ", "...)
			}
			scratch, found = append(scratch, h[i+1]...), true
		}
	}
	return scratch, found
}

// request is "METHOD TARGET [name: value]…".
func request(text string) *View {
	part := strings.Split(text, "|")
	words := strings.Fields(part[0])
	path, query, _ := strings.Cut(words[1], "?")
	v := &View{Method: []byte(words[0]), Authority: []byte("web.example:8080"), Path: []byte(path), Query: []byte(query)}
	var h head
	for _, f := range part[1:] {
		name, value, _ := strings.Cut(f, ":")
		h = append(h, strings.TrimSpace(name), strings.TrimSpace(value))
	}
	v.Fields = h
	return v
}

func rule(name string, matches ...assay.RouteMatch) assay.RouteRule {
	return assay.RouteRule{Name: name, Matches: matches}
}

func exact(p string) assay.RouteMatch {
	return assay.RouteMatch{Path: assay.PathMatch{Type: assay.PathExact, Value: p}}
}
func prefix(p string) assay.RouteMatch {
	return assay.RouteMatch{Path: assay.PathMatch{Type: assay.PathPrefix, Value: p}}
}
func pattern(p string) assay.RouteMatch {
	return assay.RouteMatch{Path: assay.PathMatch{Type: assay.PathRegex, Value: p}}
}
func verb(m assay.RouteMatch, method string) assay.RouteMatch { m.Method = method; return m }
func fields(m assay.RouteMatch, pairs ...string) assay.RouteMatch {
	m.Headers = conditions(pairs)
	return m
}
func query(m assay.RouteMatch, pairs ...string) assay.RouteMatch {
	m.Query = conditions(pairs)
	return m
}
func conditions(pairs []string) (out []assay.ValueMatch) {
	for i := 0; i < len(pairs); i += 2 {
		value, regex := strings.CutPrefix(pairs[i+1], "~")
		out = append(out, assay.ValueMatch{Name: pairs[i], Value: value, Regex: regex})
	}
	return out
}

func routeOf(name string, rules ...assay.RouteRule) *assay.Route {
	return &assay.Route{Kind: assay.HTTPRoute, Namespace: "bank", Name: name, Parents: []assay.RouteParent{{Service: "bank/web"}}, Rules: rules}
}

func compile(t testing.TB, routes ...*assay.Route) *Table {
	for _, r := range routes {
		if err := r.Validate(); err != nil {
			t.Fatal(err)
		}
	}
	return Compile("bank/web", 80, "bank", routes)
}

// expect checks which rule takes each request; "-" is none.
func expect(t *testing.T, tab *Table, want [][2]string) {
	t.Helper()
	for _, w := range want {
		got := "-"
		if r := tab.Match(request(w[0])); r != nil {
			got = r.Name
		}
		if got != w[1] {
			t.Errorf("%s: taken by %s, want %s", w[0], got, w[1])
		}
	}
}

// The cases follow those of the Gateway API's conformance suite for meshes.
func TestMatching(t *testing.T) {
	tab := compile(t, routeOf("r",
		rule("v1", prefix("/"), fields(prefix("/"), "version", "one")),
		rule("v2", prefix("/v2"), fields(prefix("/"), "version", "two")),
	))
	expect(t, tab, [][2]string{
		{"GET /", "v1"}, {"GET /example", "v1"}, {"GET /|Version: one", "v1"}, {"GET /v2", "v2"}, {"GET /v2/", "v2"},
		{"GET /v2/example", "v2"}, {"GET /|Version: two", "v2"}, {"GET /v2example", "v1"}, {"GET /foo/v2/example", "v1"}, {"GET /V2", "v1"},
	})
}

func TestPathMatchOrder(t *testing.T) {
	tab := compile(t, routeOf("r",
		rule("a", prefix("/match")), rule("b", prefix("/match/prefix/one/any")), rule("c", prefix("/match/prefix/")),
		rule("d", prefix("/match/prefix/one")), rule("e", exact("/match/exact/one")), rule("f", exact("/match/exact")), rule("g", pattern("/match/[a-z]+/\\d+")),
		rule("h", exact("/match/exact/")),
	))
	expect(t, tab, [][2]string{
		{"GET /match/exact/one", "e"}, {"GET /match/exact", "f"}, {"GET /match", "a"}, {"GET /match/prefix/one/any", "b"}, {"GET /match/prefix/one/any/more", "b"},
		{"GET /match/prefix/one", "d"}, {"GET /match/prefix", "c"}, {"GET /match/prefix/any", "c"}, {"GET /match/any", "a"}, {"GET /", "-"}, {"GET /matching", "-"},
		{"GET /match/prefix/12", "g"}, {"GET /match/prefix/12/3", "c"}, {"GET /match/exact/", "h"}, {"GET /match/exact/onemore", "a"},
	})
}

func TestHeaderMatching(t *testing.T) {
	tab := compile(t, routeOf("r",
		rule("one", fields(prefix("/"), "version", "one")), rule("two", fields(prefix("/"), "version", "two")),
		rule("orange", fields(prefix("/"), "version", "two", "color", "orange")),
		rule("blue", fields(prefix("/"), "color", "blue"), fields(prefix("/"), "color", "green")),
		rule("many", fields(prefix("/"), "list", "a, b")),
		rule("regex", fields(prefix("/"), "user", "~[0-9]{3}")),
	))
	expect(t, tab, [][2]string{
		{"GET /|version: one", "one"}, {"GET /|VERSION: two", "two"}, {"GET /|version: two|color: orange", "orange"}, {"GET /|color: blue", "blue"},
		{"GET /|color: green", "blue"}, {"GET /|color: orange", "-"}, {"GET /|version: One", "-"}, {"GET /", "-"}, {"GET /|list: a|list: b", "many"},
		{"GET /|user: 123", "regex"}, {"GET /|user: 1234", "-"},
	})
}

func TestQueryMatching(t *testing.T) {
	tab := compile(t, routeOf("r",
		rule("whale", query(prefix("/"), "animal", "whale")), rule("dolphin", query(prefix("/"), "animal", "dolphin")),
		rule("blue", query(prefix("/"), "animal", "dolphin", "color", "blue")), rule("yellow", query(prefix("/"), "color", "yellow")),
		rule("space", query(prefix("/"), "na me", "a b")),
	))
	expect(t, tab, [][2]string{
		{"GET /?animal=whale", "whale"}, {"GET /?animal=dolphin", "dolphin"}, {"GET /?animal=dolphin&color=blue", "blue"}, {"GET /?color=blue&animal=dolphin", "blue"},
		{"GET /?animal=dolphin&color=yellow", "dolphin"}, {"GET /?color=yellow", "yellow"}, {"GET /?color=blue", "-"}, {"GET /?animal=dog", "-"},
		{"GET /?animal=whaledolphin", "-"}, {"GET /", "-"}, {"GET /?animal=whale&animal=dolphin", "whale"}, {"GET /?a%6eimal=wh%61le", "whale"},
		{"GET /?na+me=a%20b", "space"}, {"GET /?animal", "-"}, {"GET /?animal=whal%", "-"}, {"GET /?&&=&animal=whale", "whale"},
	})
}

func TestMethodMatching(t *testing.T) {
	tab := compile(t, routeOf("r",
		rule("post", verb(prefix("/"), "POST")), rule("get", verb(prefix("/"), "GET")),
		rule("path", prefix("/path1")), rule("header", fields(prefix("/"), "version", "three")),
		rule("method wins", verb(prefix("/path5"), "PATCH")), rule("header loses", fields(prefix("/path5"), "version", "four")),
		rule("more headers", fields(prefix("/path6"), "a", "1", "b", "2")), rule("query loses", query(fields(prefix("/path6"), "a", "1"), "x", "1", "y", "2", "z", "3")),
	))
	expect(t, tab, [][2]string{
		{"POST /", "post"}, {"GET /", "get"}, {"HEAD /", "-"}, {"GET /path1", "path"}, {"POST /|version: three", "post"}, {"HEAD /|version: three", "header"},
		{"PATCH /path5|version: four", "method wins"}, {"PUT /path5|version: four", "header loses"}, {"GET /path6?x=1&y=2&z=3|a: 1|b: 2", "more headers"}, {"GET /path6?x=1&y=2&z=3|a: 1", "query loses"},
	})
}

func TestGRPCMatching(t *testing.T) {
	grpc := func(kind assay.PathMatchType, value string) assay.RouteMatch {
		return assay.RouteMatch{Path: assay.PathMatch{Type: kind, Value: value}}
	}
	r := routeOf("r",
		rule("all", prefix("/")), rule("method", grpc(assay.GRPCMethod, "Check")), rule("service", prefix("/bank.Ledger")), rule("both", exact("/bank.Ledger/Post")),
		rule("header", fields(exact("/bank.Ledger/Post"), "x-canary", "yes")), rule("regex", grpc(assay.GRPCMethodRegex, "Get.*")), rule("longer", pattern("/(?:bank\\..*)/[^/]+")),
	)
	r.Kind = assay.GRPCRoute
	tab := compile(t, r)
	const grpcs = "|Content-Type: application/grpc+proto"
	expect(t, tab, [][2]string{
		{"POST /bank.Ledger/Post" + grpcs, "both"}, {"POST /bank.Ledger/Post|x-canary: yes" + grpcs, "header"}, {"POST /shop.Cart/Check" + grpcs, "method"},
		{"POST /shop.Cart/GetAll" + grpcs, "regex"}, {"POST /shop.Cart/Put" + grpcs, "all"}, {"POST /bank.Other/Check" + grpcs, "longer"},
		{"POST /bank.Ledger/Post", "-"}, {"GET /|Content-Type: text/html", "-"}, {"POST /bank.Ledger2/Put" + grpcs, "longer"},
	})
}

// TestOlderWins: among matches that are equal, the older route counts, then the name, then
// the order of the rules.
func TestOlderWins(t *testing.T) {
	older := routeOf("z", rule("older", prefix("/a"), prefix("/c")))
	newer := routeOf("a", rule("newer", prefix("/a"), prefix("/b")), rule("second", prefix("/b")))
	other := routeOf("b", rule("other", prefix("/b"), prefix("/c")))
	older.Created, newer.Created, other.Created = time.Unix(1, 0), time.Unix(2, 0), time.Unix(2, 0)
	list := []*assay.Route{older, newer, other}
	for range 6 {
		rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
		expect(t, compile(t, list...), [][2]string{{"GET /a", "older"}, {"GET /b", "newer"}, {"GET /c", "older"}})
	}
}

// TestConsumerRoutes: a client's own namespace may say something else about a service, to
// its own clients alone.
func TestConsumerRoutes(t *testing.T) {
	producer := routeOf("r", rule("producer", prefix("/")))
	consumer := routeOf("r", rule("consumer", prefix("/only")))
	consumer.Namespace = "shop"
	elsewhere := routeOf("else", rule("else", prefix("/")))
	elsewhere.Parents = []assay.RouteParent{{Service: "bank/web", Port: 81}}
	routes := []*assay.Route{producer, consumer, elsewhere}
	expect(t, Compile("bank/web", 80, "bank", routes), [][2]string{{"GET /only", "producer"}})
	expect(t, Compile("bank/web", 80, "shop", routes), [][2]string{{"GET /only", "consumer"}, {"GET /", "-"}})
	if tab := Compile("bank/web", 81, "bank", []*assay.Route{consumer}); tab != nil {
		t.Error("a consumer's route reaches another namespace")
	}
	if tab := Compile("bank/api", 80, "bank", routes); tab != nil {
		t.Error("a service without routes has a table")
	}
}

func TestNoPath(t *testing.T) {
	tab := compile(t, routeOf("r", rule("root", prefix("/")), rule("exact", exact("/x"))))
	for _, path := range []string{"", "*"} {
		v := request("OPTIONS /")
		v.Path = []byte(path)
		if r := tab.Match(v); r == nil || r.Name != "root" {
			t.Errorf("%q: %v", path, r)
		}
	}
}

// TestAgainstOneByOne compares the table with the plainest way to do it.
func TestAgainstOneByOne(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	pick := func(list ...string) string { return list[rng.IntN(len(list))] }
	path := func() string {
		s := ""
		for range rng.IntN(4) {
			s += "/" + pick("a", "b", "ab", "")
		}
		return "/" + strings.TrimPrefix(s, "/")
	}
	for range 300 {
		var routes []*assay.Route
		for i := range 1 + rng.IntN(3) {
			r := routeOf(fmt.Sprint(i))
			r.Created = time.Unix(int64(rng.IntN(2)), 0)
			for j := range 1 + rng.IntN(6) {
				m := prefix(strings.ReplaceAll(strings.ReplaceAll(path(), "//", "/"), "//", "/"))
				switch rng.IntN(4) {
				case 0:
					m.Path.Type = assay.PathExact
				case 1:
					m = pattern(pick("/a.*", "/[ab]/?", ".*b"))
				}
				if rng.IntN(3) == 0 {
					m.Method = pick("GET", "POST")
				}
				if rng.IntN(3) == 0 {
					m = fields(m, "x", pick("1", "2"))
				}
				if rng.IntN(3) == 0 {
					m = query(m, "q", pick("1", "2"))
				}
				r.Rules = append(r.Rules, rule(fmt.Sprintf("%d.%d", i, j), m))
			}
			routes = append(routes, r)
		}
		tab := compile(t, routes...)
		for range 30 {
			v := request(pick("GET", "POST", "PUT") + " " + path() + pick("", "?q=1", "?q=2") + pick("", "|x: 1", "|x: 2"))
			want, got := oneByOne(routes, v), "-"
			if r := tab.Match(v); r != nil {
				got = r.Name
			}
			if got != want {
				t.Fatalf("%s %s?%s: %s, want %s", v.Method, v.Path, v.Query, got, want)
			}
		}
	}
}

func oneByOne(routes []*assay.Route, v *View) string {
	best := "-"
	var bestKey []int64
	values, _ := url.ParseQuery(string(v.Query))
	for _, r := range routes {
		for _, rl := range r.Rules {
			m := rl.Matches[0]
			class, length, ok := int64(0), int64(len(m.Path.Value)), false
			p := string(v.Path)
			switch m.Path.Type {
			case assay.PathExact:
				class, ok = 2, p == m.Path.Value
			case assay.PathRegex:
				re, _ := compilePattern(m.Path.Value)
				class, ok = 1, re.MatchString(p)
			case assay.PathPrefix:
				want := strings.Trim(m.Path.Value, "/")
				length = int64(len(want)) + 1
				ok = want == "" || p == "/"+want || strings.HasPrefix(p, "/"+want+"/")
			}
			method := int64(0)
			if m.Method != "" {
				method = 1
				ok = ok && m.Method == string(v.Method)
			}
			for _, h := range m.Headers {
				value, there := v.field(h.Name)
				ok = ok && there && string(value) == h.Value
			}
			for _, q := range m.Query {
				ok = ok && values.Get(q.Name) == q.Value
			}
			key := []int64{class, length, method, int64(len(m.Headers)), int64(len(m.Query)), -r.Created.Unix()}
			if ok && (bestKey == nil || slices.Compare(key, bestKey) > 0) {
				best, bestKey = rl.Name, key
			}
		}
	}
	return best
}

func manyRoutes(n int) []*assay.Route {
	var routes []*assay.Route
	for i := range n {
		m := []assay.RouteMatch{prefix(fmt.Sprintf("/api/v%d/things", i)), exact(fmt.Sprintf("/exact/%d", i)), fields(prefix(fmt.Sprintf("/api/v%d/things", i)), "x-canary", "yes")}
		routes = append(routes, routeOf(fmt.Sprint("r", i), assay.RouteRule{Matches: m, Backends: []assay.RouteBackend{{Service: "bank/a", Port: 80, Weight: 9}, {Service: "bank/b", Port: 80, Weight: 1}}}))
	}
	return routes
}

func TestMatchAllocatesNothing(t *testing.T) {
	tab := compile(t, manyRoutes(1000)...)
	list := []*View{request("GET /api/v500/things/5?a=b|x-canary: no"), request("GET /exact/999"), request("GET /nothing/here")}
	if n := testing.AllocsPerRun(1000, func() {
		for _, v := range list {
			if r := tab.Match(v); r != nil {
				r.Pick(rand.Uint64())
			}
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkMatch(b *testing.B) {
	for _, n := range []int{1, 1000} {
		tab := Compile("bank/web", 80, "bank", manyRoutes(n))
		for _, v := range []*View{request(fmt.Sprintf("GET /api/v%d/things/5?a=b|x-canary: no", n/2)), request(fmt.Sprintf("GET /exact/%d", n-1)), request("GET /nothing/here")} {
			b.Run(fmt.Sprintf("%d routes%s", n, strings.Replace(string(v.Path), fmt.Sprint(n/2), "N", 1)), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					tab.Match(v)
				}
			})
		}
	}
}

// TestWeights: the grain of 0.01 % holds.
func TestWeights(t *testing.T) {
	r := routeOf("r", assay.RouteRule{Matches: []assay.RouteMatch{prefix("/")}, Backends: []assay.RouteBackend{
		{Service: "bank/a", Port: 80, Weight: 9999}, {Service: "bank/off", Port: 80, Weight: 0}, {Service: "bank/b", Port: 80, Weight: 1},
	}})
	one := compile(t, r).Match(request("GET /"))
	got := map[string]int{}
	for n := range uint64(10000) {
		got[one.Pick(n).Service]++
	}
	if got["bank/a"] != 9999 || got["bank/b"] != 1 || got["bank/off"] != 0 {
		t.Errorf("of every 10000: %v", got)
	}
	rng := rand.New(rand.NewPCG(3, 4))
	clear(got)
	for range 1_000_000 {
		got[one.Pick(rng.Uint64()).Service]++
	}
	if n := got["bank/b"]; n < 60 || n > 140 { // 100 expected, deviation 10
		t.Errorf("%d of a million went to 1 of 10000", n)
	}
	r.Rules[0].Backends = r.Rules[0].Backends[1:2]
	if b := compile(t, r).Match(request("GET /")).Pick(5); b != nil {
		t.Errorf("nobody has weight, and %v was chosen", b)
	}
}
