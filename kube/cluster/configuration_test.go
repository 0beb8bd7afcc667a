package cluster

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"assay.dev"
	"assay.dev/discovery"
	"assay.dev/kube"
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
	if p := first.Problems[0]; p.Name != "newer" || p.Generation != 2 || !strings.Contains(p.Text, "invention") {
		t.Errorf("an unknown field: %+v", p)
	}
	if p := first.Problems[1]; p.Name != "second" || p.Text != "the policy of service shop/web is TrafficPolicy shop/zeroth, which is older" {
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
