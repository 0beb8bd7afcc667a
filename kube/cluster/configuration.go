package cluster

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/tools/cache"

	"assay.dev"
	"assay.dev/discovery"
	"assay.dev/kube"
	"assay.dev/kube/v1alpha1"
)

// Configuration is what people declared beside services: routes, grants, policies, the
// configuration of namespaces.
type Configuration struct {
	Intent   discovery.Intent // without services
	Objects  []Object         // all of them, sorted
	Problems []Problem        // sorted
	// Missing are the kinds that the API server does not have: their definitions are
	// not installed there.
	Missing []string
}

// Object is one object as somebody declared it.
type Object struct {
	Kind, Namespace, Name string
	Generation            int64
	Created               time.Time
	Manifest              json.RawMessage // apiVersion, kind, metadata, spec
}

// Problem is an object that has no effect. It breaks no other.
type Problem struct {
	Kind, Namespace, Name string
	Generation            int64
	Reason                string // one of v1alpha1's
	Text                  string
}

// definition is a kind of configuration, with the versions that are understood, the
// preferred first.
type definition struct {
	group    string
	versions []string
	resource string
	kind     string
}

var definitions = []definition{
	{"gateway.networking.k8s.io", []string{"v1"}, "httproutes", "HTTPRoute"},
	{"gateway.networking.k8s.io", []string{"v1"}, "grpcroutes", "GRPCRoute"},
	{"gateway.networking.k8s.io", []string{"v1"}, "tlsroutes", "TLSRoute"},
	{"gateway.networking.k8s.io", []string{"v1", "v1beta1"}, "referencegrants", "ReferenceGrant"},
	{"assay.dev", []string{"v1alpha1"}, "meshconfigs", "MeshConfig"},
	{"assay.dev", []string{"v1alpha1"}, "egresses", "Egress"},
	{"assay.dev", []string{"v1alpha1"}, "trafficpolicies", "TrafficPolicy"},
}

// configured is one object of configuration and what it means.
type configured struct {
	kind, namespace, name string
	uid                   types.UID
	version               string // metadata.resourceVersion
	generation            int64
	created               time.Time
	manifest              json.RawMessage
	intent                discovery.Intent
	err                   error
	status                []assay.RouteParentStatus // of a route: what we have written there
	accepted              *metav1.Condition         // of our own kinds: the same
}

// problem says why an object has no effect.
func (c *configured) problem(reason string, err error) Problem {
	text := err.Error()
	if known, ok := errors.AsType[*assay.Error](err); ok {
		text = known.Err.Error() // "read intent" is known by now
	}
	if list, ok := errors.AsType[kube.Problems](err); ok {
		text = list.Texts() // its file and line are the object itself
	}
	return Problem{c.kind, c.namespace, c.name, c.generation, reason, text}
}

func configurationKey(kind, namespace, name string) string {
	return kind + " " + namespace + "/" + name
}

func (m *model) setConfiguration(o *unstructured.Unstructured) {
	c := &configured{
		kind: o.GetKind(), namespace: o.GetNamespace(), name: o.GetName(), uid: o.GetUID(), version: o.GetResourceVersion(), generation: o.GetGeneration(),
		created: o.GetCreationTimestamp().Time, status: writtenStatus(o), accepted: writtenCondition(o),
	}
	key := configurationKey(c.kind, c.namespace, c.name)
	old := m.configured[key]
	if old != nil && (old.uid != c.uid || old.generation != c.generation || !old.created.Equal(c.created) || c.generation == 0) {
		old = nil
	}
	if old != nil && old.isRoute() {
		c.stays(m, key, old)
		return
	}
	c.intent, c.manifest, c.err = kube.Configuration(o.Object)
	if old != nil && bytes.Equal(old.manifest, c.manifest) {
		c.stays(m, key, old)
		return
	}
	for i := range c.intent.Routes {
		c.intent.Routes[i].Created, c.intent.Routes[i].Generation = c.created.UTC(), c.generation
	}
	m.configured[key] = c
	m.touchedConfiguration = true
}

// stays puts c in the place of old, which means the same: somebody has written its status.
func (c *configured) stays(m *model, key string, old *configured) {
	c.intent, c.manifest, c.err = old.intent, old.manifest, old.err
	m.configured[key] = c
}

func (m *model) removeConfiguration(kind, namespace, name string) {
	delete(m.configured, configurationKey(kind, namespace, name))
	m.touchedConfiguration = true
}

func (m *model) retainConfiguration(kind string, list []any) {
	there := map[string]bool{}
	for _, o := range list {
		u := o.(*unstructured.Unstructured)
		there[configurationKey(kind, u.GetNamespace(), u.GetName())] = true
	}
	for key, c := range m.configured {
		if c.kind == kind && !there[key] {
			m.removeConfiguration(kind, c.namespace, c.name)
		}
	}
}

// setMissing says which kinds cannot be watched.
func (m *model) setMissing(kinds []string) {
	if !slices.Equal(m.missing, kinds) {
		m.missing = kinds
		m.touchedConfiguration = true
	}
}

// configuration puts together what all objects mean. Where two contradict each other the
// older one stands, as with routes of the Gateway API.
func (m *model) configuration() *Configuration {
	var list []*configured
	for _, c := range m.configured {
		list = append(list, c)
	}
	slices.SortFunc(list, func(a, b *configured) int {
		return cmp.Or(a.created.Compare(b.created), cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.name, b.name), cmp.Compare(a.kind, b.kind))
	})
	out := &Configuration{Missing: m.missing}
	taken := map[string]string{} // what only one may say -> who does
	rules := map[string]int{}    // of egress, by namespace
	for _, c := range list {
		out.Objects = append(out.Objects, Object{c.kind, c.namespace, c.name, c.generation, c.created, c.manifest})
		reason, err := v1alpha1.ReasonInvalid, c.err
		if err == nil {
			reason, err = v1alpha1.ReasonConflicted, take(taken, c)
		}
		if n := rules[c.namespace] + len(c.intent.Egress); err == nil && n > discovery.MaxEgress {
			reason, err = v1alpha1.ReasonLimitExceeded, fmt.Errorf("namespace %s has %d Egress already, which are older", c.namespace, discovery.MaxEgress)
		} else if err == nil {
			rules[c.namespace] = n
		}
		if err != nil {
			out.Problems = append(out.Problems, c.problem(reason, err))
			if c.err != nil { // what holds all the same
				out.Intent.Namespaces = append(out.Intent.Namespaces, c.intent.Namespaces...)
			}
			continue
		}
		in := &out.Intent
		in.Namespaces = append(in.Namespaces, c.intent.Namespaces...)
		in.Routes = append(in.Routes, c.intent.Routes...)
		in.Grants = append(in.Grants, c.intent.Grants...)
		in.Policies = append(in.Policies, c.intent.Policies...)
		in.Egress = append(in.Egress, c.intent.Egress...)
	}
	slices.SortFunc(out.Objects, func(a, b Object) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	slices.SortFunc(out.Problems, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return out
}

// take notes what only one object may say, or says which one does already.
func take(taken map[string]string, c *configured) error {
	var claims []string
	for _, n := range c.intent.Namespaces {
		claims = append(claims, "the configuration of namespace "+n.Namespace)
	}
	for _, p := range c.intent.Policies {
		for _, service := range p.Services {
			claims = append(claims, "the policy of service "+p.Namespace+"/"+service)
		}
	}
	for _, claim := range claims {
		if by := taken[claim]; by != "" {
			return fmt.Errorf("%s is %s, which is older", claim, by)
		}
	}
	for _, claim := range claims {
		taken[claim] = configurationKey(c.kind, c.namespace, c.name)
	}
	return nil
}

// served returns the version of a definition that the API server has, "" when it has
// none that is understood.
func (w *Watcher) served(ctx context.Context, d definition) (string, error) {
	client, err := w.client(schema.GroupVersion{Version: "v1"})
	if err != nil {
		return "", err
	}
	for _, version := range d.versions {
		text, err := client.Get().AbsPath("/apis", d.group, version).SetHeader("Accept", runtime.ContentTypeJSON).DoRaw(ctx)
		if apierrors.IsNotFound(err) {
			continue
		}
		var list metav1.APIResourceList
		if err == nil {
			err = json.Unmarshal(text, &list)
		}
		if err != nil {
			return "", fmt.Errorf("ask the API server for %s %s: %w", d.group, version, err)
		}
		if slices.ContainsFunc(list.APIResources, func(r metav1.APIResource) bool { return r.Name == d.resource }) {
			return version, nil
		}
	}
	return "", nil
}

// definitionKind is how a definition is watched.
func (w *Watcher) definitionKind(client dynamic.Interface, d definition, version string) *kind {
	example := &unstructured.Unstructured{}
	example.SetGroupVersionKind(schema.GroupVersionKind{Group: d.group, Version: version, Kind: d.kind})
	resource := client.Resource(schema.GroupVersionResource{Group: d.group, Version: version, Resource: d.resource})
	m := w.model
	return &kind{
		w: w, name: d.resource, example: example, synced: make(chan struct{}),
		source: &cache.ListWatch{
			ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return resource.List(ctx, o) },
			WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
				return resource.Watch(ctx, o)
			},
		},
		set: func(o any) { m.setConfiguration(o.(*unstructured.Unstructured)) },
		remove: func(o any) {
			u := o.(*unstructured.Unstructured)
			m.removeConfiguration(d.kind, u.GetNamespace(), u.GetName())
		},
		retain: func(list []any) { m.retainConfiguration(d.kind, list) },
	}
}
