package agent

import (
	"net/netip"
	"slices"
	"testing"

	"assay.dev"
)

func TestRoutesGoToWhomTheyAreFor(t *testing.T) {
	r := &assay.Route{Kind: assay.HTTPRoute, Namespace: "shop", Name: "r",
		Parents: []assay.RouteParent{{Service: "bank/payments"}, {Service: "shop/cart", Port: 80}}}
	for namespace, want := range map[string][]assay.RouteParent{
		"shop": r.Parents,     // consumer of the one, producer of the other
		"bank": r.Parents[1:], // shop's own service has this route for all its clients
		"else": r.Parents[1:],
	} {
		got, ok := routeFor(r, namespace)
		if !ok || !slices.Equal(got.Parents, want) {
			t.Errorf("%s: %v, want %v", namespace, got.Parents, want)
		}
	}
	r.Parents = r.Parents[:1]
	if got, ok := routeFor(r, "else"); ok {
		t.Errorf("a consumer's route reaches another namespace: %v", got)
	}
}

// TestRoutedPortsAreOpen: a service without an endpoint takes connections where a rule may
// answer them, and nowhere else.
func TestRoutedPortsAreOpen(t *testing.T) {
	vip := netip.MustParseAddr("10.182.0.1")
	s := &assay.Service{VIPs: []netip.Addr{vip}, Ports: []assay.Port{
		{Port: 80}, {Port: 81, Protocol: assay.HTTP2}, {Port: 443, Protocol: assay.TLS}, {Port: 5432, Protocol: assay.Opaque}}}
	for _, c := range []struct {
		kind assay.RouteKind
		port uint16
		want []uint16
	}{
		{assay.HTTPRoute, 0, []uint16{80, 81}}, {assay.HTTPRoute, 80, []uint16{80}}, {assay.GRPCRoute, 443, nil}, {assay.HTTPRoute, 5432, nil}, {assay.HTTPRoute, 9, nil},
		{assay.TLSRoute, 0, []uint16{80, 443}}, {assay.TLSRoute, 443, []uint16{443}}, {assay.TLSRoute, 81, nil}, {assay.TLSRoute, 5432, nil},
	} {
		open := map[netip.AddrPort]bool{}
		openRouted(open, s, c.kind, c.port)
		if len(open) != len(c.want) {
			t.Errorf("%s at %d: %v, want %v", c.kind, c.port, open, c.want)
		}
		for _, p := range c.want {
			if !open[netip.AddrPortFrom(vip, p)] {
				t.Errorf("%s at %d: %v, want %v", c.kind, c.port, open, c.want)
			}
		}
	}
}
