package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"assay.dev"
	"assay.dev/kube"

	"assay.dev/kube/apiserver"
)

// Rules is what a Source must be allowed in every namespace: the API server knows no
// "pods of one node" for anybody but kubelets.
func Rules() []rbacv1.PolicyRule {
	return []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"pods", "namespaces"}, Verbs: []string{"get", "list", "watch"}},
	}
}

// Config says what a Source watches.
type Config struct {
	Kubeconfig string // "": the service account of the pod that this process is in
	Node       string
	System     string // Assay's own namespace (DefaultSystem)
	Log        *slog.Logger
}

// Source knows the pods of a node. It is safe for concurrent use.
type Source struct {
	cfg    Config
	client rest.Interface
	labels apiserver.Metadata // of namespaces
	memory int64

	mu         sync.Mutex
	pods       map[string]*Pod              // by UID
	names      map[string]string            // NAMESPACE/NAME -> UID
	asked      map[string]*Pod              // by UID: that a watch has not brought yet
	namespaces map[string]map[string]string // labels
	synced     [2]bool                      // pods, namespaces
	changed    chan struct{}                // holds a token while something is new
}

// answerWithin bounds a question to the API server while a runtime waits.
const answerWithin = 5 * time.Second

// Open returns a Source. It does not connect yet.
func Open(cfg Config) (*Source, error) {
	if cfg.System == "" {
		cfg.System = DefaultSystem
	}
	config, err := apiserver.Config(cfg.Kubeconfig, "assay-agent")
	if err != nil {
		return nil, err
	}
	config.QPS = -1 // two watches, and a question now and then
	client, err := apiserver.Client(config, corev1.SchemeGroupVersion, apiserver.Protobuf, corev1.AddToScheme)
	if err != nil {
		return nil, err
	}
	labels, err := apiserver.OpenMetadata(config, corev1.SchemeGroupVersion.WithResource("namespaces"))
	if err != nil {
		return nil, err
	}
	return &Source{
		cfg: cfg, client: client, labels: labels, memory: memoryOfNode(), pods: map[string]*Pod{}, names: map[string]string{}, asked: map[string]*Pod{},
		namespaces: map[string]map[string]string{}, changed: make(chan struct{}, 1),
	}, nil
}

// memoryOfNode is what the machine has, in bytes; 0 when it does not say.
func memoryOfNode() int64 {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		var kib int64
		if _, err := fmt.Sscanf(line, "MemTotal: %d kB", &kib); err == nil {
			return kib << 10
		}
	}
	return 0
}

// Run watches until ctx ends. While the API server is away the last state stands.
func (s *Source) Run(ctx context.Context) error {
	quiet := logr.FromSlogHandler(warnings{s.cfg.Log.Handler()})
	inner := klog.NewContext(ctx, quiet)
	var all sync.WaitGroup
	ofNode := fields.OneTermEqualSelector("spec.nodeName", s.cfg.Node)
	for i, k := range []*kind{
		{name: "pods", source: cache.NewListWatchFromClient(s.client, "pods", corev1.NamespaceAll, ofNode), example: &corev1.Pod{},
			set: s.setPod, remove: s.removePod, clear: s.clearPods},
		{name: "namespaces", source: s.labels.Watched(), example: &metav1.PartialObjectMetadata{},
			set: s.setNamespace, remove: s.removeNamespace, clear: func() { clear(s.namespaces) }},
	} {
		k.s, k.index = s, i
		reflector := cache.NewReflectorWithOptions(k.source, k.example, k, cache.ReflectorOptions{Name: k.name, Logger: &quiet})
		all.Go(func() { reflector.RunWithContext(inner) })
	}
	all.Wait()
	return context.Cause(ctx)
}

// Pod returns what is known of a pod whose network is being made, and whether it is to be
// meshed. uid may be empty. An error means that this cannot be known now.
func (s *Source) Pod(ctx context.Context, namespace, name, uid string) (p Pod, wanted bool, err error) {
	if namespace == s.cfg.System || isStatic(uid) {
		return Pod{}, false, nil
	}
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	found, labels, err := s.find(ctx, namespace, name, uid)
	switch {
	case err == nil:
		return *found, found.wanted(s.cfg.System, labels) && s.Leaving() != LeavingRelease, nil
	case namespace == kube.ClusterSystem && assay.KindOf(err) == assay.Unavailable:
		// The API server may need it to come back. If it is labelled itself, it is meshed
		// as soon as that is known.
		return Pod{}, false, nil
	}
	return Pod{}, false, err
}

func (s *Source) find(ctx context.Context, namespace, name, uid string) (*Pod, map[string]string, error) {
	s.mu.Lock()
	p := s.pods[s.names[namespace+"/"+name]]
	labels, known := s.namespaces[namespace]
	s.mu.Unlock()
	op := fmt.Sprintf("find pod %s/%s", namespace, name)
	if p == nil || uid != "" && p.UID != uid {
		object := &corev1.Pod{}
		if err := s.client.Get().Namespace(namespace).Resource("pods").Name(name).Do(ctx).Into(object); err != nil {
			return nil, nil, s.failed(op, err)
		}
		if uid != "" && string(object.UID) != uid {
			return nil, nil, &assay.Error{Kind: assay.NotFound, Op: op, Err: fmt.Errorf("the API server has another pod of that name: %s, not %s", object.UID, uid)}
		}
		p = translate(object, s.memory)
		s.mu.Lock()
		if s.pods[p.UID] == nil {
			s.asked[p.UID] = p
		}
		s.mu.Unlock()
	}
	if !known {
		object, err := s.labels.Get(ctx, namespace, metav1.GetOptions{})
		if err != nil {
			return nil, nil, s.failed(op, err)
		}
		labels = object.Labels
	}
	return p, labels, nil
}

func (s *Source) failed(op string, err error) error {
	e := &assay.Error{Kind: assay.Unavailable, Op: op, Err: err, Remedy: "it is asked again by itself; see whether this node reaches the API server"}
	switch {
	case apierrors.IsNotFound(err):
		e.Kind, e.Remedy = assay.NotFound, "the pod was deleted, or is not this cluster's"
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		e.Kind, e.Remedy = assay.Denied, "the agent's service account needs get, list and watch of pods and namespaces"
	case errors.Is(err, context.DeadlineExceeded):
		e.Err = fmt.Errorf("the API server does not answer within %v", answerWithin)
	}
	return e
}

// Known is what the API server said of a pod.
type Known struct {
	Pod
	Wanted bool
	Ended  bool
	// Barred pods are labelled as if they were wanted, and can never be.
	Barred bool
}

// Pods are the pods of the node, by UID; false while not everything has come yet.
func (s *Source) Pods() (map[string]Known, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make(map[string]Known, len(s.pods))
	stays := leaving(s.namespaces[s.cfg.System]) != LeavingRelease
	for _, from := range []map[string]*Pod{s.asked, s.pods} {
		for uid, p := range from {
			labelled := stays && p.labelled(s.cfg.System, s.namespaces[p.Namespace])
			out[uid] = Known{Pod: *p, Wanted: labelled && p.bar() == "", Ended: p.ended, Barred: labelled && p.bar() != ""}
		}
	}
	return out, s.synced[0] && s.synced[1]
}

// Leaving is the step that a mesh has come to which is taken out of the cluster
// (LeavingServe …); "" when it stays, and while nothing is known.
func (s *Source) Leaving() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return leaving(s.namespaces[s.cfg.System])
}

// Changed has a token whenever Pods may say something else than before.
func (s *Source) Changed() <-chan struct{} { return s.changed }

func (s *Source) setPod(object any) {
	p := translate(object.(*corev1.Pod), s.memory)
	s.pods[p.UID], s.names[p.Namespace+"/"+p.Name] = p, p.UID
	delete(s.asked, p.UID)
}

func (s *Source) removePod(object any) {
	p := object.(*corev1.Pod)
	delete(s.pods, string(p.UID))
	delete(s.asked, string(p.UID))
	if key := p.Namespace + "/" + p.Name; s.names[key] == string(p.UID) {
		delete(s.names, key)
	}
}

// clearPods forgets what is not in a new list, which is newer than any question before.
func (s *Source) clearPods() {
	clear(s.pods)
	clear(s.names)
	clear(s.asked)
}

func (s *Source) setNamespace(object any) {
	n := object.(*metav1.PartialObjectMetadata)
	s.namespaces[n.Name] = n.Labels
}

func (s *Source) removeNamespace(object any) {
	delete(s.namespaces, object.(*metav1.PartialObjectMetadata).Name)
}

// kind is one kind of object that is watched; the Source is its reflector's store.
type kind struct {
	s           *Source
	index       int // in Source.synced
	name        string
	source      cache.ListerWatcher
	example     runtime.Object
	set, remove func(object any)
	clear       func()
}

func (k *kind) do(change func()) error {
	k.s.mu.Lock()
	change()
	k.s.mu.Unlock()
	select {
	case k.s.changed <- struct{}{}:
	default: // there is a token
	}
	return nil
}

// Add is called by the reflector, as are the others.
func (k *kind) Add(object any) error    { return k.do(func() { k.set(object) }) }
func (k *kind) Update(object any) error { return k.do(func() { k.set(object) }) }
func (k *kind) Delete(object any) error { return k.do(func() { k.remove(object) }) }
func (k *kind) Resync() error           { return nil }

// Replace takes a new list: the first one, and after the API server was away for longer
// than it remembers.
func (k *kind) Replace(list []any, _ string) error {
	return k.do(func() {
		k.clear()
		for _, object := range list {
			k.set(object)
		}
		k.s.synced[k.index] = true
	})
}

// warnings is a handler for what a person should know: client-go tells much.
type warnings struct{ slog.Handler }

func (h warnings) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelWarn && h.Handler.Enabled(ctx, level)
}
func (h warnings) WithAttrs(attrs []slog.Attr) slog.Handler {
	return warnings{h.Handler.WithAttrs(attrs)}
}
func (h warnings) WithGroup(name string) slog.Handler { return warnings{h.Handler.WithGroup(name)} }
