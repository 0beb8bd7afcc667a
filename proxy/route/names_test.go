package route

import (
	"testing"
	"time"

	"assay.dev"
)

func tlsRoute(namespace, name string, created int64, backend string, hostnames ...string) *assay.Route {
	r := &assay.Route{
		Kind: assay.TLSRoute, Namespace: namespace, Name: name, Created: time.Unix(created, 0), Hostnames: hostnames,
		Parents: []assay.RouteParent{{Service: "bank/gate"}},
		Rules:   []assay.RouteRule{{Backends: []assay.RouteBackend{{Service: "bank/" + backend, Port: 443, Weight: 1}}}},
	}
	if err := r.Validate(); err != nil {
		panic(err)
	}
	return r
}

func TestNames(t *testing.T) {
	routes := []*assay.Route{
		tlsRoute("bank", "young", 9, "young", "a.example", "b.example"),
		tlsRoute("bank", "old", 1, "old", "a.example", "*.example"),
		tlsRoute("bank", "long", 5, "long", "*.west.example"),
		tlsRoute("shop", "consumer", 1, "consumer", "a.example"),
		{Kind: assay.HTTPRoute, Namespace: "bank", Name: "http", Parents: []assay.RouteParent{{Service: "bank/gate"}}, Rules: []assay.RouteRule{{}}},
	}
	for _, c := range []struct{ namespace, name, want string }{
		{"bank", "a.example", "bank/old"},
		{"bank", "A.Example.", "bank/old"},
		{"bank", "b.example", "bank/young"},
		{"bank", "c.example", "bank/old"},
		{"bank", "d.c.example", "bank/old"},
		{"bank", "x.west.example", "bank/long"},
		{"bank", "west.example", "bank/old"},
		{"bank", "example", ""},
		{"bank", "", ""},
		{"bank", "xexample", ""},
		{"shop", "a.example", "bank/consumer"},
		{"shop", "b.example", ""},
		{"other", "b.example", "bank/young"},
	} {
		n := CompileNames("bank/gate", 443, c.namespace, routes)
		got := ""
		if r := n.Match(c.name); r != nil {
			got = r.Pick(0).Service
		}
		if got != c.want {
			t.Errorf("from %s, %q goes to %q, want %q", c.namespace, c.name, got, c.want)
		}
	}
	if n := CompileNames("bank/other", 443, "bank", routes); n != nil {
		t.Error("a service without routes has a table")
	}
	if table := Compile("bank/gate", 443, "bank", routes[:3]); table != nil {
		t.Error("routes for TLS are rules for requests")
	}
}
