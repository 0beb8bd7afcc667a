package kube

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"

	gateway "sigs.k8s.io/gateway-api/apis/v1"

	"assay.dev"
)

// tlsRoute reads a TLSRoute: connections of TLS, which stays closed, by the name that
// their clients ask for.
func (d *document) tlsRoute() {
	var in struct {
		Spec gateway.TLSRouteSpec `json:"spec"`
	}
	if err := json.Unmarshal(d.value, &in); err != nil {
		d.at("spec", "%v", err)
		return
	}
	r := d.newRoute(assay.TLSRoute, &in.Spec.CommonRouteSpec)
	if n := len(in.Spec.Hostnames); n == 0 || n > assay.MaxRouteHostnames {
		d.missing("spec.hostnames", fmt.Sprintf("want 1 to %d names that clients ask for", assay.MaxRouteHostnames))
		return
	}
	for i, h := range in.Spec.Hostnames {
		path, name := fmt.Sprintf("spec.hostnames[%d]", i), string(h)
		_, err := netip.ParseAddr(name)
		switch {
		case err == nil:
			d.at(path, "%s is an address; clients of TLS ask for names", name)
		case !assay.ValidRouteHostname(name):
			d.at(path, "%q is not a name of DNS in lower case, with \"*.\" before it or without", name)
		case !slices.Contains(r.out.Hostnames, name):
			r.out.Hostnames = append(r.out.Hostnames, name)
		}
	}
	if len(in.Spec.Rules) != 1 {
		d.missing("spec.rules", "want one rule: nothing but the name tells connections apart")
		return
	}
	r.tlsRule(&in.Spec.Rules[0])
	r.finish(1, in.Spec)
}

func (r *routeReader) tlsRule(in *gateway.TLSRouteRule) {
	r.begin(0, in.Name)
	rule := &assay.RouteRule{Name: string(value(in.Name))}
	if n := len(in.BackendRefs); n == 0 || n > 16 {
		r.missing(r.path+".backendRefs", "want 1 to 16 services")
		return
	}
	for j := range in.BackendRefs {
		r.backend(fmt.Sprintf("%s.backendRefs[%d]", r.path, j), &in.BackendRefs[j], nil, rule)
	}
	r.add(rule)
}
