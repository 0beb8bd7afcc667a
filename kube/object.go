package kube

import (
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
func Service(s *corev1.Service) (out discovery.DeclaredService, notes []string, ok bool) {
	var n notebook
	out, _ = reading{teller: &n, cluster: true}.service(s.Namespace, &s.ObjectMeta, &s.Spec)
	for _, text := range s.Spec.ClusterIPs {
		if addr, err := netip.ParseAddr(text); err == nil { // "None" is none
			out.ClusterIPs = append(out.ClusterIPs, addr.Unmap())
		}
	}
	slices.SortStableFunc(out.ClusterIPs, func(a, b netip.Addr) int { return a.BitLen() - b.BitLen() })
	return out, n, len(out.Ports) > 0
}

// notebook is a teller of notes.
type notebook []string

func (n *notebook) at(path, format string, args ...any) {
	*n = append(*n, path+": "+fmt.Sprintf(format, args...))
}

func (n *notebook) missing(path, text string) { n.at(path, "%s", text) }

// Configuration is [Translate] for one object as an API server has it, in JSON: a route,
// a grant, or one of ours. What the API server adds to it is left out before: its age and
// generation are for the caller to add where they count. An error is the object's alone;
// manifest is what was read, whether it can be understood or not.
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
	intent, _, err = Translate([]discovery.File{{Name: name, YAML: manifest}})
	return intent, manifest, err
}
