package proxy

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/link"
	"assay.dev/proxy/http1"
	"assay.dev/proxy/mux"
)

// routedServices is a dispatcher for bank/web with routes, where bank/web and the other
// services each have an endpoint with a session.
func routedServices(t testing.TB, dst string, routes []assay.Route, others ...string) *dispatcher {
	conn, far, err := link.Pair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); far.Close() })
	p := New(conn, Options{})
	first := *p.snap.Load()
	first.Identity = assay.Identity{TrustDomain: "bank.test", Namespace: "shop", Account: "client"}
	first.MeshPrefixes = []netip.Prefix{netip.MustParsePrefix("10.181.0.0/16")}
	p.snap.Store(&first)
	d := link.Services{Version: 1, Full: true, Routes: routes}
	for i, key := range append([]string{"bank/web"}, others...) {
		ns, name, _ := strings.Cut(key, "/")
		d.Upsert = append(d.Upsert, assay.Service{
			Namespace: ns, Name: name, VIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 182, 0, byte(i + 1)})}, Ports: []assay.Port{{Port: 80}},
			Endpoints: []assay.Endpoint{{
				Workload: "w-" + name, Identity: assay.Identity{TrustDomain: "bank.test", Namespace: ns, Account: name},
				Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 181, 7, byte(i + 1)})}, Targets: []uint16{8080},
			}},
		})
	}
	for i := range routes {
		if err := routes[i].Validate(); err != nil {
			t.Fatal(err)
		}
	}
	p.snap.Store(p.snap.Load().withServices(d, p))
	for _, svc := range p.snap.Load().services.All() {
		for _, e := range svc.ports[0].v4.Endpoints() {
			s := &session{p: p, mux: sessions(t, mux.Config{}), security: assay.MutualTLS, born: time.Now(), life: time.Hour}
			e.Value.(*peer).sessions.Store(&[]*session{s})
		}
	}
	o := &outbound{p: p, ctx: t.Context(), snap: p.snap.Load(), src: netip.MustParseAddrPort("10.181.7.200:40000"), dst: netip.MustParseAddrPort(dst), protocol: assay.HTTP1}
	if err := o.route(); err != nil {
		t.Fatal(err)
	}
	return &dispatcher{o: o, payload: o.header(assay.HTTP1).AppendTo(nil)}
}

func webRoute(rules ...assay.RouteRule) []assay.Route {
	for i := range rules {
		if len(rules[i].Matches) == 0 {
			rules[i].Matches = []assay.RouteMatch{{Path: assay.PathMatch{Type: assay.PathPrefix, Value: "/"}}}
		}
	}
	return []assay.Route{{Kind: assay.HTTPRoute, Namespace: "bank", Name: "r", Parents: []assay.RouteParent{{Service: "bank/web"}}, Rules: rules}}
}

func to(service string, weight uint32) assay.RouteBackend {
	return assay.RouteBackend{Service: service, Port: 80, Weight: weight}
}

// parsed is a request as the engine hands it over.
func parsed(t testing.TB, head string) *http1.Request {
	r := &http1.Request{}
	lim := http1.Limits{}.WithDefaults()
	if ok, err := r.Parse([]byte(head), &lim); !ok {
		t.Fatal(err)
	}
	return r
}

// ask does what the engine does for one request, and returns its plan and what came of
// the dispatch.
func ask(t testing.TB, d *dispatcher, head string, done ended) (*http1.Plan, error) {
	x := &http1.Exchange{Request: parsed(t, head)}
	d.Begin(x)
	x.Plan = d.Plan(x, []byte(head))
	var err error
	if p := x.Plan; p != nil && p.Failure != nil {
		err, x.Status, x.Failure = p.Failure, p.Failure.Status, p.Failure.Reason
	} else if p == nil || p.Answer == nil {
		if _, _, err = d.Dispatch(context.Background(), x, []byte(head), true, done); err == nil {
			<-done
			x.Status = 200
		}
	} else {
		x.Status = p.Answer.Status
	}
	d.End(x)
	return x.Plan, err
}

const getRoot = "GET / HTTP/1.1\r\nHost: web\r\n\r\n"

func requestsTo(p *Proxy) map[string]uint64 {
	out := map[string]uint64{}
	for _, s := range p.rec.Signals() {
		out[strings.TrimSuffix(fmt.Sprintf("%s:%d %s", s.Service, s.Port, s.Reason), " ")] += s.Requests
	}
	return out
}

func TestWeightsAmongServices(t *testing.T) {
	d := routedServices(t, "10.182.0.1:80", webRoute(assay.RouteRule{Backends: []assay.RouteBackend{to("bank/v1", 9), to("bank/v2", 1), to("bank/v3", 0)}}), "bank/v1", "bank/v2", "bank/v3")
	done := make(ended, 1)
	const n = 2000
	for range n {
		if _, err := ask(t, d, getRoot, done); err != nil {
			t.Fatal(err)
		}
	}
	got := requestsTo(d.o.p)
	if v2 := got["bank/v2:80"]; v2 < 130 || v2 > 270 || got["bank/v1:80"]+v2 != n || len(got) != 2 { // 200, deviation 13
		t.Errorf("%v", got)
	}
	for _, svc := range d.o.snap.services.All() {
		if e := svc.ports[0].v4.Endpoints()[0]; e.InFlight() != 0 {
			t.Errorf("%s: %d in flight", svc.Key(), e.InFlight())
		}
	}
}

func TestRoutedRequestAllocatesNothing(t *testing.T) {
	d := routedServices(t, "10.182.0.1:80", webRoute(assay.RouteRule{
		Matches:    []assay.RouteMatch{{Path: assay.PathMatch{Type: assay.PathPrefix, Value: "/"}, Headers: []assay.ValueMatch{{Name: "x-a", Value: "1"}}}},
		Backends:   []assay.RouteBackend{to("bank/v1", 1), to("bank/v2", 1)},
		RouteEdits: assay.RouteEdits{Request: assay.HeaderEdit{Set: []assay.HeaderField{{Name: "X-B", Value: "2"}}}, Path: &assay.PathEdit{Full: "/x"}},
	}), "bank/v1", "bank/v2")
	head := []byte("GET /a HTTP/1.1\r\nHost: web\r\nX-A: 1\r\n\r\n")
	req, x, done := parsed(t, string(head)), &http1.Exchange{}, make(ended, 1)
	one := func() {
		*x = http1.Exchange{Request: req}
		d.Begin(x)
		x.Plan = d.Plan(x, head)
		if _, _, err := d.Dispatch(context.Background(), x, x.Plan.Head, true, done); err != nil {
			t.Fatal(err)
		}
		<-done
		d.End(x)
	}
	if n := testing.AllocsPerRun(2000, one); n >= 0.5 && !raceEnabled {
		t.Errorf("%v allocations for each request", n)
	}
	if got, want := string(x.Plan.Head), "GET /x HTTP/1.1\r\nHost: web\r\nX-A: 1\r\nX-B: 2\r\n\r\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestRuleOutcomes(t *testing.T) {
	match := func(path string) []assay.RouteMatch {
		return []assay.RouteMatch{{Path: assay.PathMatch{Type: assay.PathPrefix, Value: path}}}
	}
	invalid := to("bank/missing", 1)
	invalid.Invalid = "BackendNotFound: there is no service bank/missing"
	d := routedServices(t, "10.182.0.1:80", webRoute(
		assay.RouteRule{Matches: match("/self")},
		assay.RouteRule{Matches: match("/bad"), Backends: []assay.RouteBackend{invalid}},
		assay.RouteRule{Matches: match("/off"), Backends: []assay.RouteBackend{to("bank/v1", 0)}},
		assay.RouteRule{Matches: match("/gone"), Backends: []assay.RouteBackend{to("bank/went", 1)}},
		assay.RouteRule{Matches: match("/refuse"), Refuse: "InvalidKind: filter ExtensionRef"},
		assay.RouteRule{Matches: match("/moved"), Redirect: &assay.Redirect{Status: 301, Host: "new.example"}},
	), "bank/v1")
	done := make(ended, 1)
	for path, want := range map[string]string{
		"/self": "", "/bad": "500 invalid-rule", "/off": "500 invalid-rule", "/gone": "500 invalid-rule", "/refuse": "500 invalid-rule", "/none": "404 no-rule",
	} {
		_, err := ask(t, d, "GET "+path+" HTTP/1.1\r\nHost: web\r\n\r\n", done)
		got := ""
		if f, ok := err.(*http1.Failure); ok {
			got = fmt.Sprint(f.Status, " ", f.Reason)
		}
		if got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
	plan, err := ask(t, d, "GET /moved?a=b HTTP/1.1\r\nHost: web:8080\r\n\r\n", done)
	if err != nil || plan.Answer.Status != 301 || plan.Answer.Fields[0].Value != "http://new.example/moved?a=b" {
		t.Errorf("%+v, %v", plan.Answer, err)
	}
	if got := requestsTo(d.o.p); got["bank/web:80"] != 1 || got["bank/web:80 answered-by-rule"] != 1 || got["bank/web:80 refused"] != 5 {
		t.Errorf("%v", got)
	}
	refusals := d.o.p.rec.Counters().Refusals
	if refusals[refusedRule] != 4 || refusals[refusedNoRule] != 1 {
		t.Errorf("%v", refusals)
	}
}

// TestAddressMeansItsService: who dials an endpoint's address does not pass the routes of
// its service by, if it can only mean that one.
func TestAddressMeansItsService(t *testing.T) {
	routes := webRoute(assay.RouteRule{Backends: []assay.RouteBackend{to("bank/v1", 1)}})
	d := routedServices(t, "10.181.7.1:8080", routes, "bank/v1")
	if _, err := ask(t, d, getRoot, make(ended, 1)); err != nil {
		t.Fatal(err)
	}
	if got := requestsTo(d.o.p); got["bank/v1:80"] != 1 || len(got) != 1 {
		t.Errorf("%v", got)
	}
	// The same endpoint in a second service: nobody knows which is meant.
	snap := d.o.snap
	twin := snap.services.At("bank/web").Service
	twin.Name, twin.VIPs = "twin", nil
	next := snap.withServices(link.Services{Version: 2, Upsert: []assay.Service{twin}}, d.o.p)
	at := d.o.dst
	if sp := next.sole(at); sp != nil {
		t.Errorf("%v", sp.key())
	}
	// A headless one is never meant.
	twin.Headless = true
	if next = next.withServices(link.Services{Version: 3, Upsert: []assay.Service{twin}}, d.o.p); next.sole(at) == nil {
		t.Error("a headless service hides another")
	}
	// Without routes an address is an address.
	if next = next.withServices(link.Services{Version: 4, RemoveRoutes: []string{routes[0].Key()}}, d.o.p); next.sole(at) != nil || len(next.tables) != 0 {
		t.Error("routes that are gone still count")
	}
}

// TestRoutesChange: a connection follows the newest routes, and an endpoint that comes or
// goes compiles nothing.
func TestRoutesChange(t *testing.T) {
	d := routedServices(t, "10.182.0.1:80", nil, "bank/v1")
	p, done := d.o.p, make(ended, 1)
	next := func(s link.Services) {
		p.snap.Store(p.snap.Load().withServices(s, p))
		if _, err := ask(t, d, getRoot, done); err != nil {
			t.Error(err)
		}
	}
	next(link.Services{Version: 2})
	next(link.Services{Version: 3, Routes: webRoute(assay.RouteRule{Backends: []assay.RouteBackend{to("bank/v1", 1)}})})
	table := p.snap.Load().rules(d.routed.dialled.port)
	svc := p.snap.Load().services.At("bank/v1").Service
	svc.Endpoints = append(svc.Endpoints, assay.Endpoint{Workload: "x", Identity: svc.Endpoints[0].Identity, Addrs: []netip.Addr{netip.MustParseAddr("10.181.7.99")}, Targets: []uint16{0}})
	next(link.Services{Version: 4, Upsert: []assay.Service{svc}})
	if p.snap.Load().rules(d.routed.dialled.port) != table {
		t.Error("an endpoint's change compiled the routes again")
	}
	next(link.Services{Version: 5, RemoveRoutes: []string{"HTTPRoute/bank/r"}})
	if got := requestsTo(p); got["bank/web:80"] != 2 || got["bank/v1:80"] != 2 {
		t.Errorf("%v", got)
	}
}

// TestSessionIsKept: the cookie of the first response brings the client back, whatever the
// weights, until its endpoint is gone.
func TestSessionIsKept(t *testing.T) {
	d := routedServices(t, "10.182.0.1:80", webRoute(assay.RouteRule{
		Backends: []assay.RouteBackend{to("bank/v1", 1), to("bank/v2", 1)}, Session: &assay.RouteSession{Name: "s"},
	}), "bank/v1", "bank/v2")
	done := make(ended, 1)
	plan, err := ask(t, d, getRoot, done)
	if err != nil || plan.Response[2] == nil {
		t.Fatalf("%+v, %v", plan, err)
	}
	cookie, _, _ := strings.Cut(plan.Response[2].Append[0].Value, ";")
	first := ""
	for name := range requestsTo(d.o.p) {
		first = name
	}
	for range 50 {
		plan, err := ask(t, d, "GET / HTTP/1.1\r\nHost: web\r\nCookie: "+cookie+"\r\n\r\n", done)
		if err != nil || plan.Response[2] != nil {
			t.Fatalf("%+v, %v", plan.Response[2], err)
		}
	}
	if got := requestsTo(d.o.p); got[first] != 51 || len(got) != 1 {
		t.Errorf("%v", got)
	}
	key, _, _ := strings.Cut(first, ":")
	svc := d.o.snap.services.At(key).Service
	svc.Endpoints[0].Targets = []uint16{0}
	d.o.p.snap.Store(d.o.snap.withServices(link.Services{Version: 2, Upsert: []assay.Service{svc}, Routes: webRoute(assay.RouteRule{
		Backends: []assay.RouteBackend{to("bank/v1", 1), to("bank/v2", 1)}, Session: &assay.RouteSession{Name: "s"}}),
	}, d.o.p))
	for range 20 {
		if plan, err = ask(t, d, "GET / HTTP/1.1\r\nHost: web\r\nCookie: "+cookie+"\r\n\r\n", done); err == nil {
			break
		}
	}
	if err != nil || plan.Response[2] == nil {
		t.Errorf("%+v, %v: the client hears of nobody else", plan, err)
	}
}

// TestGuestsFollowRoutes: what rules leave here goes to the application, and the rest on.
func TestGuestsFollowRoutes(t *testing.T) {
	d := routedServices(t, "10.181.7.1:8080", webRoute(
		assay.RouteRule{Matches: []assay.RouteMatch{{Path: assay.PathMatch{Type: assay.PathPrefix, Value: "/moved"}}}, Redirect: &assay.Redirect{Status: 302}},
		assay.RouteRule{Backends: []assay.RouteBackend{to("bank/web", 9), to("bank/v1", 1)}},
	), "bank/v1")
	snap := *d.o.snap
	snap.Addrs = []netip.Addr{netip.MustParseAddr("10.181.7.1")}
	d.o.p.snap.Store(&snap)
	i := &inbound{p: d.o.p, ctx: t.Context(), snap: &snap, remote: netip.MustParseAddrPort("192.0.2.1:5000"), dst: netip.MustParseAddrPort("10.181.7.1:8080")}
	g := i.guests()
	if g == nil {
		t.Fatal("no rule is for guests")
	}
	done, here, there := make(ended, 1), 0, 0
	ask := func(path string) *http1.Plan {
		head := []byte("GET " + path + " HTTP/1.1\r\nHost: web\r\n\r\n")
		x := &http1.Exchange{Request: parsed(t, string(head))}
		g.Begin(x)
		x.Plan = g.Plan(x, head)
		switch {
		case x.Plan == nil || x.Plan.Local:
			here++
		case x.Plan.Answer != nil:
			x.Status = x.Plan.Answer.Status
		default:
			if _, _, err := g.Dispatch(t.Context(), x, head, true, done); err != nil {
				t.Fatal(err)
			}
			<-done
			there++
		}
		g.End(x)
		return x.Plan
	}
	for range 1000 {
		ask("/")
	}
	if there < 60 || there > 140 { // 100, deviation 9.5
		t.Errorf("%d stayed, %d went on", here, there)
	}
	if p := ask("/moved"); p.Answer == nil || p.Answer.Fields[0].Value != "http://web:80/moved" && p.Answer.Fields[0].Value != "http://web/moved" {
		t.Errorf("%+v", p.Answer)
	}
	if got := requestsTo(d.o.p); got["bank/v1:80 "+reasonHanded] != uint64(there) || len(got) != 2 {
		t.Errorf("%v", got)
	}
	// A client of HTTP/2 gets the same, and hears of routes that come later.
	o := i.asOutbound(assay.HTTP2)
	g2 := &guests2{streams: streams{dispatcher: dispatcher{o: o, astray: o.route(), payload: o.header(assay.HTTP2).AppendTo(nil)}}, session: sessions(t, mux.Config{}), series: d.o.p.rec.Series(assay.SignalKey{Service: "here"})}
	here, there = 0, 0
	for range 1000 {
		p, err := ask2(g2, "/", done)
		if err != nil {
			t.Fatal(err)
		}
		if planned(p) == nil || planned(p).local {
			here++
		} else {
			there++
		}
	}
	if there < 60 || there > 140 {
		t.Errorf("%d stayed, %d went on", here, there)
	}
	if p, err := ask2(g2, "/moved", done); err != nil || p.Answer == nil {
		t.Errorf("%+v, %v", p, err)
	}
	counts := map[string]uint64{}
	for _, s := range d.o.p.rec.Signals() {
		if s.Protocol == assay.HTTP2 {
			counts[fmt.Sprintf("%s:%d %s", s.Service, s.Port, s.Reason)] += s.Requests
		}
	}
	if counts["bank/v1:80 "+reasonHanded] != uint64(there) || counts["bank/web:80 "+reasonRule] != 1 || len(counts) != 2 {
		t.Errorf("%v", counts)
	}
	without := snap.withServices(link.Services{Version: 9, RemoveRoutes: []string{"HTTPRoute/bank/r"}}, d.o.p)
	d.o.p.snap.Store(without)
	for range 50 {
		if p, err := ask2(g2, "/moved", done); err != nil || p != nil {
			t.Fatalf("%+v, %v", p, err)
		}
	}
	i.dst = netip.MustParseAddrPort("10.181.7.1:9")
	if i.guests() != nil {
		t.Error("rules for a port that has none")
	}
}
