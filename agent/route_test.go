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
	s := &assay.Service{VIPs: []netip.Addr{vip}, Ports: []assay.Port{{Port: 80}, {Port: 81, Protocol: assay.HTTP2}, {Port: 5432, Protocol: assay.Opaque}}}
	for port, want := range map[uint16][]uint16{0: {80, 81}, 80: {80}, 5432: nil, 9: nil} {
		open := map[netip.AddrPort]bool{}
		openRouted(open, s, port)
		if len(open) != len(want) {
			t.Errorf("%d: %v, want %v", port, open, want)
		}
		for _, p := range want {
			if !open[netip.AddrPortFrom(vip, p)] {
				t.Errorf("%d: %v, want %v", port, open, want)
			}
		}
	}
}
