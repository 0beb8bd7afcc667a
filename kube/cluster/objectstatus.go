package cluster

import (
	"cmp"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"

	"assay.dev/kube/v1alpha1"
)

// ObjectStatus is what an object of our own kinds says that we have written there.
type ObjectStatus struct {
	Kind, Namespace, Name string
	Resource              string // the kind's, as in a path
	UID                   string
	Version               string // metadata.resourceVersion
	Generation            int64
	Accepted              *metav1.Condition // nil: nothing, or nothing that we would write
}

// ObjectStatuses returns the status of every object of our own kinds, as it was seen last;
// sorted.
func (w *Watcher) ObjectStatuses() []ObjectStatus {
	own := map[string]string{} // resource by kind
	for _, d := range definitions {
		if d.group == v1alpha1.Group {
			own[d.kind] = d.resource
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []ObjectStatus
	for _, c := range w.model.configured {
		if resource, ok := own[c.kind]; ok {
			out = append(out, ObjectStatus{c.kind, c.namespace, c.name, resource, string(c.uid), c.version, c.generation, c.accepted})
		}
	}
	slices.SortFunc(out, func(a, b ObjectStatus) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return out
}

// acceptedCondition is the one condition of an object that is ours to write, nil without.
func acceptedCondition(o *unstructured.Unstructured) map[string]any {
	list, _, _ := unstructured.NestedSlice(o.Object, "status", "conditions")
	for _, c := range list {
		if m, ok := c.(map[string]any); ok && m["type"] == v1alpha1.ConditionAccepted {
			return m
		}
	}
	return nil
}

func writtenCondition(o *unstructured.Unstructured) *metav1.Condition {
	m := acceptedCondition(o)
	c := new(metav1.Condition)
	if m == nil || o.GetAPIVersion() != v1alpha1.APIVersion || runtime.DefaultUnstructuredConverter.FromUnstructured(m, c) != nil {
		return nil
	}
	return c
}
