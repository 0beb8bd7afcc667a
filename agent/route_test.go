package agent

import (
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
