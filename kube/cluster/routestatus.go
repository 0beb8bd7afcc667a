package cluster

import (
	"cmp"
	"encoding/json"
	"slices"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	gateway "sigs.k8s.io/gateway-api/apis/v1"

	"assay.dev"
	"assay.dev/kube"
)

// RouteStatus is what a route's status says that we have written there.
type RouteStatus struct {
	Kind      assay.RouteKind
	Namespace string
	Name      string
	Parents   []assay.RouteParentStatus
}

// RouteStatuses returns the status of every route, also of those without one of ours, as
// it was seen last; sorted.
func (w *Watcher) RouteStatuses() []RouteStatus {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []RouteStatus
	for _, c := range w.model.configured {
		if c.isRoute() {
			out = append(out, RouteStatus{assay.RouteKind(c.kind), c.namespace, c.name, c.status})
		}
	}
	slices.SortFunc(out, func(a, b RouteStatus) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return out
}

func (c *configured) isRoute() bool {
	switch assay.RouteKind(c.kind) {
	case assay.HTTPRoute, assay.GRPCRoute, assay.TLSRoute:
		return true
	}
	return false
}

// writtenStatus reads the status of a route that trim has left.
func writtenStatus(o *unstructured.Unstructured) []assay.RouteParentStatus {
	raw, err := json.Marshal(o.Object["status"])
	var status gateway.RouteStatus
	if err == nil {
		err = json.Unmarshal(raw, &status)
	}
	if err != nil {
		return nil // whatever it is, it is not what we would write
	}
	var out []assay.RouteParentStatus
	for i := range status.Parents {
		p := &status.Parents[i]
		s := assay.RouteParentStatus{ParentRef: kube.ParentRef(o.GetNamespace(), &p.ParentRef), ControllerName: string(p.ControllerName)}
		for _, c := range p.Conditions {
			s.Conditions = append(s.Conditions, assay.RouteCondition{
				Type: c.Type, Status: string(c.Status), ObservedGeneration: c.ObservedGeneration, LastTransitionTime: c.LastTransitionTime.UTC(),
				Reason: c.Reason, Message: c.Message,
			})
		}
		out = append(out, s)
	}
	return out
}
