package cluster

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"assay.dev"
	"assay.dev/discovery"
	"assay.dev/kube"
	"assay.dev/kube/v1alpha1"
)

// declared is configuration as an API server has it, with all that it and others add.
const declared = `apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata:
  name: web
  namespace: shop
  uid: "1"
  resourceVersion: "17"
  generation: 3
  creationTimestamp: "2026-01-02T00:00:00Z"
  finalizers: [example.com/keep]
  ownerReferences: [{apiVersion: v1, kind: ConfigMap, name: x, uid: "2"}]
  managedFields: [{manager: kubectl, operation: Apply}]
  annotations:
    kubectl.kubernetes.io/last-applied-configuration: |
      {"apiVersion":"gateway.networking.k8s.io/v1","kind":"HTTPRoute"}
spec:
  parentRefs: [{group: "", kind: Service, name: web, port: 80}]
  rules:
  - matches: [{path: {type: PathPrefix, value: /v2}}]
    backendRefs: [{group: "", kind: Service, name: web-2, port: 80, weight: 1}]
status: {parents: []}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: newer, namespace: shop, generation: 2, creationTimestamp: "2026-01-03T00:00:00Z"}
spec:
  parentRefs: [{group: "", kind: Service, name: web}]
  rules: [{invention: {ofAnotherYear: true}}]
---
apiVersion: assay.dev/v1alpha1
kind: MeshConfig
metadata: {name: default, namespace: shop, creationTimestamp: "2026-01-01T00:00:00Z"}
spec: {mode: strict}
---
apiVersion: assay.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: second, namespace: shop, generation: 1, creationTimestamp: "2026-01-09T00:00:00Z"}
spec: {targetRefs: [{name: web}], timeouts: {request: 9s}}
---
apiVersion: assay.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: zeroth, namespace: shop, generation: 1, creationTimestamp: "2026-01-05T00:00:00Z"}
spec: {targetRefs: [{name: web}], timeouts: {request: 5s}}
`

func readConfiguration(t *testing.T, text string) []*unstructured.Unstructured {
	t.Helper()
	var list []*unstructured.Unstructured
	for _, one := range strings.Split(text, "---\n") {
		u := &unstructured.Unstructured{}
		text, err := yaml.YAMLToJSON([]byte(one))
		if err == nil {
			err = u.UnmarshalJSON(text) // numbers as the client has them
		}
		if err != nil {
			t.Fatal(err)
		}
		kept, err := trim(u)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, kept.(*unstructured.Unstructured))
	}
	return list
}

// TestConfiguration: every object by itself, in every order; the older of two that
// contradict each other stands.
func TestConfiguration(t *testing.T) {
	objects := readConfiguration(t, declared)
	var first *Configuration
	for n := range 50 {
		random := rand.New(rand.NewPCG(uint64(n), 3))
		random.Shuffle(len(objects), func(i, j int) { objects[i], objects[j] = objects[j], objects[i] })
		m := newModel()
		for _, o := range objects {
			m.setConfiguration(o)
			if random.IntN(3) == 0 {
				m.changes()
			}
		}
		m.setMissing([]string{"GRPCRoute"})
		got := m.changes().Configuration
		if first == nil {
			first = got
		}
		same(t, fmt.Sprintf("order %d", n), got, first)
		if again := m.changes(); !again.Empty() {
			t.Errorf("nothing has changed, but %+v", again)
		}
	}
	in := first.Intent
	if len(in.Routes) != 1 || in.Routes[0].Created.Day() != 2 || in.Routes[0].Generation != 3 || len(in.Routes[0].Rules) != 1 {
		t.Errorf("the route: %+v", in.Routes)
	}
	if len(in.Namespaces) != 1 || in.Namespaces[0].Mode != assay.Strict {
		t.Errorf("the namespace: %+v", in.Namespaces)
	}
	if len(in.Policies) != 1 || in.Policies[0].Name != "zeroth" {
		t.Errorf("the policy: %+v", in.Policies)
	}
	if err := in.Validate(); err != nil {
		t.Error(err)
	}
	if len(first.Problems) != 2 || !slices.Equal(first.Missing, []string{"GRPCRoute"}) {
		t.Fatalf("problems %+v, missing %v", first.Problems, first.Missing)
	}
	if p := first.Problems[0]; p.Name != "newer" || p.Generation != 2 || p.Reason != v1alpha1.ReasonInvalid || p.Text != "unknown field spec.rules[0].invention" {
		t.Errorf("an unknown field: %+v", p)
	}
	if p := first.Problems[1]; p.Name != "second" || p.Reason != v1alpha1.ReasonConflicted || p.Text != "the policy of service shop/web is TrafficPolicy shop/zeroth, which is older" {
		t.Errorf("a contradiction: %+v", p)
	}
}

// TestConfigurationGoes: what is removed has no effect any more, and what it stood
// in the way of has.
func TestConfigurationGoes(t *testing.T) {
	m := newModel()
	for _, o := range readConfiguration(t, declared) {
		m.setConfiguration(o)
	}
	m.changes()
	m.removeConfiguration("TrafficPolicy", "shop", "zeroth")
	m.retainConfiguration("HTTPRoute", nil)
	c := m.changes().Configuration
	if c == nil || len(c.Problems) > 0 || len(c.Intent.Routes) > 0 || len(c.Intent.Policies) != 1 || c.Intent.Policies[0].Name != "second" || len(c.Intent.Namespaces) != 1 {
		t.Errorf("%+v", c)
	}
	for _, kind := range []string{"TrafficPolicy", "MeshConfig"} {
		m.retainConfiguration(kind, nil)
	}
	c = m.changes().Configuration
	if c == nil || !reflect.DeepEqual(*c, Configuration{}) || len(m.configured) > 0 {
		t.Errorf("%+v", c)
	}
}

// TestModesHold: a MeshConfig that cannot be understood does not open its namespace.
func TestModesHold(t *testing.T) {
	for spec, want := range map[string][2]assay.Mode{
		`{mode: strict, egress: strict, accessLog: 10O%}`:   {assay.Strict, assay.Strict},
		`{mode: strict, excludedPorts: [80, 80]}`:           {assay.Strict, assay.Observe},
		`{mode: strict, later: true}`:                       {assay.Strict, assay.Observe},
		`{mode: Strict}`:                                    {assay.Strict, assay.Observe},
		`{mode: [strict], egress: observe}`:                 {assay.Strict, assay.Observe},
		`{mode: observe, egress: refuse}`:                   {assay.Observe, assay.Strict},
		`{egress: "", later: true}`:                         {assay.Observe, assay.Observe},
		`[strict]`:                                          {assay.Strict, assay.Strict},
		`{mode: observe, excludedPorts: [22], later: true}`: {assay.Observe, assay.Observe},
	} {
		m := newModel()
		m.setConfiguration(readConfiguration(t, "apiVersion: assay.dev/v1alpha1\nkind: MeshConfig\nmetadata: {namespace: shop, name: default, uid: u, generation: 2}\nspec: "+spec+"\n")[0])
		c := m.changes().Configuration
		if len(c.Problems) != 1 || c.Problems[0].Reason != v1alpha1.ReasonInvalid {
			t.Errorf("%s: %+v", spec, c.Problems)
		}
		if !reflect.DeepEqual(c.Intent.Namespaces, []assay.NamespaceConfig{{Namespace: "shop", Mode: want[0], Egress: want[1]}}) {
			t.Errorf("%s: %+v", spec, c.Intent.Namespaces)
		}
		if err := c.Intent.Validate(); err != nil {
			t.Errorf("%s: %v", spec, err)
		}
	}
}

// TestStatusIsNoConfiguration: who writes a route's status changes nothing of what it means,
// and of the status only what is ours is kept.
func TestStatusIsNoConfiguration(t *testing.T) {
	w := New(&rest.Config{}, slog.New(slog.DiscardHandler))
	m := w.model
	m.setConfiguration(readConfiguration(t, declared)[0])
	m.changes()
	written := strings.Replace(strings.Split(declared, "---\n")[0], "status: {parents: []}", `status:
  parents:
  - {parentRef: {name: edge}, controllerName: example.com/edge, conditions: []}
  - parentRef: {group: "", kind: Service, name: web, port: 80}
    controllerName: assay.dev/mesh
    conditions: [{type: Accepted, status: "True", reason: Accepted, message: fine, lastTransitionTime: "2022-01-01T00:00:00Z", observedGeneration: 3}]
`, 1)
	m.setConfiguration(readConfiguration(t, written)[0])
	if c := m.changes(); !c.Empty() {
		t.Errorf("a status is a change: %+v", c)
	}
	same(t, "the status", w.RouteStatuses(), []RouteStatus{{assay.HTTPRoute, "shop", "web", []assay.RouteParentStatus{{
		ParentRef:      assay.RouteParentRef{Kind: "Service", Namespace: "shop", Name: "web", Port: 80},
		ControllerName: "assay.dev/mesh",
		Conditions:     []assay.RouteCondition{{Type: "Accepted", Status: "True", ObservedGeneration: 3, LastTransitionTime: time.Date(2022, 1, 1, 0, 0, 0, 0, time.UTC), Reason: "Accepted", Message: "fine"}},
	}}}})
	m.setConfiguration(readConfiguration(t, strings.Replace(written, "generation: 3", "generation: 4", 1))[0])
	if c := m.changes().Configuration; c == nil || c.Intent.Routes[0].Generation != 4 {
		t.Errorf("a new generation: %+v", c)
	}
	m.retainConfiguration("HTTPRoute", nil)
	if list := w.RouteStatuses(); len(list) != 0 {
		t.Errorf("of a route that is gone: %+v", list)
	}
}

// TestConditionIsNoConfiguration: who writes the condition of an object of ours changes nothing of
// what it means, and only that condition is kept.
func TestConditionIsNoConfiguration(t *testing.T) {
	w := New(&rest.Config{}, slog.New(slog.DiscardHandler))
	m := w.model
	const object = `apiVersion: assay.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: p, namespace: shop, uid: u, resourceVersion: "1", generation: 1, creationTimestamp: "2026-01-09T00:00:00Z"}
spec: {targetRefs: [{name: web}], timeouts: {request: 9s}}
`
	set := func(text string) *Configuration {
		m.setConfiguration(readConfiguration(t, text)[0])
		return m.changes().Configuration
	}
	if c := set(object); c == nil || len(c.Problems) > 0 {
		t.Fatalf("%+v", c)
	}
	want := ObjectStatus{Kind: "TrafficPolicy", Namespace: "shop", Name: "p", Resource: "trafficpolicies", UID: "u", Version: "1", Generation: 1}
	same(t, "without a status", w.ObjectStatuses(), []ObjectStatus{want})
	written := strings.Replace(object, `"1"`, `"2"`, 1) + `status:
  more: of another year
  conditions:
  - {type: Audited, status: "True", reason: Audited, message: "", lastTransitionTime: "2021-01-01T00:00:00Z"}
  - {type: Accepted, status: "True", reason: Accepted, message: fine, lastTransitionTime: "2022-01-01T00:00:00Z", observedGeneration: 1}
`
	if c := set(written); c != nil {
		t.Errorf("a status is a change: %+v", c)
	}
	want.Version, want.Accepted = "2", &metav1.Condition{Type: "Accepted", Status: "True", Reason: "Accepted", Message: "fine", ObservedGeneration: 1,
		LastTransitionTime: metav1.NewTime(time.Date(2022, 1, 1, 0, 0, 0, 0, time.UTC).Local())}
	same(t, "with one", w.ObjectStatuses(), []ObjectStatus{want})
	if c := set(strings.Replace(written, "metadata: {", "metadata: {labels: {a: b}, ", 1)); c == nil || !strings.Contains(string(c.Objects[0].Manifest), `"a":"b"`) {
		t.Errorf("a label is no change: %+v", c)
	}
	if c := set(strings.Replace(strings.Replace(written, "generation: 1", "generation: 2", 1), "9s", "8s", 1)); c == nil || c.Intent.Policies[0].Timeout != 8*time.Second {
		t.Errorf("a new generation: %+v", c)
	}
	m.setConfiguration(readConfiguration(t, declared)[0])
	if list := w.ObjectStatuses(); len(list) != 1 {
		t.Errorf("others' kinds: %+v", list)
	}
	m.retainConfiguration("TrafficPolicy", nil)
	if list := w.ObjectStatuses(); len(list) != 0 {
		t.Errorf("of what is gone: %+v", list)
	}
}

// TestTooManyRules: what is more than a namespace may have has no effect, the newest first,
// and breaks no other.
func TestTooManyRules(t *testing.T) {
	var text []string
	for i := range discovery.MaxEgress + 2 {
		text = append(text, fmt.Sprintf(`apiVersion: assay.dev/v1alpha1
kind: Egress
metadata: {name: e%d, namespace: shop, creationTimestamp: "2026-01-01T00:%02d:%02dZ"}
spec: {hosts: [example.com], ports: [443]}
`, i, i/60, i%60))
	}
	m := newModel()
	for _, o := range readConfiguration(t, strings.Join(text, "---\n")+"---\n"+declared) {
		m.setConfiguration(o)
	}
	c := m.changes().Configuration
	if err := c.Intent.Validate(); err != nil || len(c.Intent.Egress) != discovery.MaxEgress || len(c.Intent.Routes) != 1 {
		t.Errorf("%v, %d rules, %d routes", err, len(c.Intent.Egress), len(c.Intent.Routes))
	}
	if p := c.Problems[0]; p.Kind != "Egress" || p.Name != fmt.Sprint("e", discovery.MaxEgress) || p.Reason != v1alpha1.ReasonLimitExceeded || !strings.Contains(p.Text, "256") {
		t.Errorf("the problem: %+v", p)
	}
}

// TestConfigurationMeansTheSame: in a folder and in a cluster.
func TestConfigurationMeansTheSame(t *testing.T) {
	for _, o := range readConfiguration(t, declared) {
		got, _, clusterErr := kube.Configuration(o.Object)
		delete(o.Object["metadata"].(map[string]any), "finalizers")
		delete(o.Object["metadata"].(map[string]any), "ownerReferences")
		text, err := yaml.Marshal(o.Object)
		if err != nil {
			t.Fatal(err)
		}
		want, _, folderErr := kube.Translate([]discovery.File{{Name: "f.yaml", YAML: text}})
		if (clusterErr == nil) != (folderErr == nil) {
			t.Errorf("%s: %v in a cluster, %v in a folder", o.GetName(), clusterErr, folderErr)
		}
		same(t, o.GetName(), got, want)
	}
}
