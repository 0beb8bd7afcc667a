package kube

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"assay.dev/discovery"
)

// Service is [Translate] for a Service as an API server has it: the same meaning, with
// what a cluster adds (its addresses, types, ports by name). Nothing in it is an
// error, since it works already: what the mesh does not do for it is a note. ok is false
// for a service without a TCP port, of which the mesh knows nothing but that.
func Service(s *corev1.Service) (out discovery.DeclaredService, ok bool) {
	var n notebook
	r := reading{teller: &n, cluster: true}
	out, _ = r.service(s.Namespace, &s.ObjectMeta, &s.Spec)
	for _, text := range s.Spec.ClusterIPs {
		if addr, err := netip.ParseAddr(text); err == nil { // "None" is none
			out.ClusterIPs = append(out.ClusterIPs, addr.Unmap())
		}
	}
	slices.SortStableFunc(out.ClusterIPs, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
	r.externals(&out, s)
	out.Notes = append(n, out.Notes...)
	return out, len(out.Ports) > 0
}

// externals reads the addresses at which a service is reached from outside and, without
// leaving the cluster, from within.
func (r reading) externals(out *discovery.DeclaredService, s *corev1.Service) {
	add := func(text string) {
		if a, err := netip.ParseAddr(text); err == nil && !slices.Contains(out.Externals, a.Unmap()) {
			out.Externals = append(out.Externals, a.Unmap())
		}
	}
	for _, text := range s.Spec.ExternalIPs {
		add(text)
	}
	for _, in := range s.Status.LoadBalancer.Ingress {
		// What a balancer itself passes on must go there.
		if in.IPMode == nil || *in.IPMode == corev1.LoadBalancerIPModeVIP {
			add(in.IP)
		}
	}
	slices.SortFunc(out.Externals, func(a, b netip.Addr) int { return cmp.Or(a.BitLen()-b.BitLen(), a.Compare(b)) })
	if len(out.Externals) == 0 && !slices.ContainsFunc(out.Ports, func(p discovery.DeclaredPort) bool { return p.NodePort != 0 }) {
		return
	}
	const beside = "meshed clients at its load balancer's addresses and node ports leave the mesh, as to any address outside"
	switch {
	case out.Local:
		r.note(out, "spec.internalTrafficPolicy", "Local holds at the service's own addresses; "+beside)
		keepInside(out)
	case len(s.Spec.LoadBalancerSourceRanges) > 0:
		r.note(out, "spec.loadBalancerSourceRanges", "is the cluster's to keep; "+beside)
		keepInside(out)
	case s.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal:
		r.note(out, "spec.externalTrafficPolicy", "Local is about clients outside the cluster; meshed ones go to any endpoint from there too, as pods do without a mesh")
	}
	if n := len(out.Externals); n > maxExternals {
		r.note(out, "status.loadBalancer", "of %d addresses outside, %d are followed", n, maxExternals)
		out.Externals = out.Externals[:maxExternals]
	}
}

// keepInside has the mesh follow nothing but a service's own addresses.
func keepInside(s *discovery.DeclaredService) {
	s.Externals = nil
	for i := range s.Ports {
		s.Ports[i].NodePort = 0
	}
}

// maxExternals bounds the addresses of one service.
const maxExternals = 16

// notebook is a teller of notes.
type notebook []string

func (n *notebook) at(path, format string, args ...any) {
	*n = append(*n, path+": "+fmt.Sprintf(format, args...))
}

func (n *notebook) missing(path, text string) { n.at(path, "%s", text) }

// Configuration is [Translate] for one object as an API server has it, in JSON: a route,
// a grant, or one of ours. What the API server adds to it is left out before: its age and
// generation are for the caller to add where they count. An error is the object's alone;
// manifest is what was read, whether it can be understood or not, and intent what holds
// all the same: the modes of a MeshConfig.
func Configuration(object map[string]any) (intent discovery.Intent, manifest json.RawMessage, err error) {
	known := map[string]any{"apiVersion": object["apiVersion"], "kind": object["kind"], "spec": object["spec"]}
	if known["spec"] == nil {
		delete(known, "spec")
	}
	metadata := map[string]any{}
	if given, ok := object["metadata"].(map[string]any); ok {
		for _, field := range []string{"name", "namespace", "labels", "annotations"} {
			if v, ok := given[field]; ok {
				metadata[field] = v
			}
		}
	}
	known["metadata"] = metadata
	if manifest, err = json.Marshal(known); err != nil {
		return intent, nil, err
	}
	name := fmt.Sprintf("%v %v/%v", object["kind"], metadata["namespace"], metadata["name"])
	if intent, _, err = Translate([]discovery.File{{Name: name, YAML: manifest}}); err != nil {
		intent.Namespaces = heldModes(known)
	}
	return intent, manifest, err
}
