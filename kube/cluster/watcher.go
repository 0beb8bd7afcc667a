package cluster

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"assay.dev/kube/apiserver"
)

// Watcher watches one API server.
type Watcher struct {
	config *rest.Config
	log    *slog.Logger

	sidecars bool

	mu    sync.Mutex
	model *model
	wake  chan struct{} // holds a token while something is touched
}

// New returns a Watcher of an API server. It does not connect yet.
func New(config *rest.Config, log *slog.Logger) *Watcher {
	config = rest.CopyConfig(config)
	// Each list and watch is one request for minutes; there is nothing to hold back.
	config.QPS = -1
	return &Watcher{config: config, log: log, model: newModel(), wake: make(chan struct{}, 1)}
}

// Sidecars has it watch namespaces, too, for which pods ask for a sidecar. image is the one that is
// put into them. It comes before Run.
func (w *Watcher) Sidecars(image string) { w.sidecars, w.model.injects = true, repository(image) }

// Pod returns what is known of a pod now, by its UID, and whether there is one.
func (w *Watcher) Pod(uid string) (Pod, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p, ok := w.model.pods[uid]
	if !ok {
		return Pod{}, false
	}
	return *p, true
}

// kind is one kind of object that is watched. Its store is the model: nothing is kept
// twice.
type kind struct {
	w       *Watcher
	name    string              // the resource
	version schema.GroupVersion // of those that source is made for
	source  cache.ListerWatcher
	example runtime.Object
	set     func(object any)
	remove  func(object any)
	// retain removes what is not among the objects of a new list.
	retain func(list []any)

	once   sync.Once
	synced chan struct{} // closed when the first list is in the model
}

// kinds are what is watched.
func (w *Watcher) kinds() []*kind {
	m := w.model
	list := []*kind{
		{
			name: "services", version: corev1.SchemeGroupVersion, example: &corev1.Service{},
			set:    func(o any) { m.setService(o.(*corev1.Service)) },
			remove: func(o any) { s := o.(*corev1.Service); m.removeService(s.Namespace, s.Name) },
			retain: m.retainServices,
		},
		{
			name: "endpointslices", version: discoveryv1.SchemeGroupVersion, example: &discoveryv1.EndpointSlice{},
			set:    func(o any) { m.setSlice(o.(*discoveryv1.EndpointSlice)) },
			remove: func(o any) { s := o.(*discoveryv1.EndpointSlice); m.removeSlice(s.Namespace, s.Name) },
			retain: m.retainSlices,
		},
		{
			name: "pods", version: corev1.SchemeGroupVersion, example: &corev1.Pod{},
			set:    func(o any) { m.setPod(o.(*corev1.Pod)) },
			remove: func(o any) { m.removePod(string(o.(*corev1.Pod).UID)) },
			retain: m.retainPods,
		},
		{
			name: "nodes", version: corev1.SchemeGroupVersion, example: &corev1.Node{},
			set:    func(o any) { m.setNode(o.(*corev1.Node)) },
			remove: func(o any) { m.removeNode(o.(*corev1.Node).Name) },
			retain: m.retainNodes,
		},
	}
	if w.sidecars {
		list = append(list, &kind{
			name: "namespaces", version: corev1.SchemeGroupVersion, example: &metav1.PartialObjectMetadata{},
			set:    func(o any) { m.setNamespace(o.(*metav1.PartialObjectMetadata)) },
			remove: func(o any) { m.removeNamespace(o.(*metav1.PartialObjectMetadata).Name) },
			retain: m.retainNamespaces,
		})
	}
	for _, k := range list {
		k.w, k.synced = w, make(chan struct{})
	}
	return list
}

// Run calls changed with everything there is as soon as all of it has come, and then
// with every change, never twice at once; an error of changed ends Run. It returns when
// ctx ends. A Watcher runs once.
func (w *Watcher) Run(ctx context.Context, changed func(Changes) error) error {
	var all sync.WaitGroup
	defer all.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	quiet := logr.FromSlogHandler(atLeast{w.log.Handler(), slog.LevelWarn})
	inner := klog.NewContext(ctx, quiet)
	start := func(k *kind) {
		reflector := cache.NewReflectorWithOptions(k.source, k.example, k, cache.ReflectorOptions{Name: k.name, Logger: &quiet})
		all.Go(func() { reflector.RunWithContext(inner) })
	}
	kinds := w.kinds()
	for _, k := range kinds {
		if _, labels := k.example.(*metav1.PartialObjectMetadata); labels {
			client, err := apiserver.OpenMetadata(w.config, k.version.WithResource(k.name))
			if err != nil {
				return err
			}
			k.source = client.Watched()
			continue
		}
		client, err := w.client(k.version)
		if err != nil {
			return err
		}
		k.source = cache.NewListWatchFromClient(client, k.name, corev1.NamespaceAll, fields.Everything())
	}
	search, err := w.newSearch()
	if err != nil {
		return err
	}
	found, err := search.begin(ctx)
	if err != nil {
		return err
	}
	kinds = append(kinds, found...)
	for _, k := range kinds {
		start(k)
	}
	for _, k := range kinds {
		select {
		case <-k.synced:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	all.Go(func() { search.goOn(ctx, start) })
	for first := true; ; first = false {
		w.mu.Lock()
		c := w.model.changes()
		w.mu.Unlock()
		if first || !c.Empty() {
			if err := changed(c); err != nil {
				return err
			}
		}
		if err := w.next(ctx); err != nil {
			return err
		}
	}
}

// client returns a client for one group of the API.
func (w *Watcher) client(version schema.GroupVersion) (rest.Interface, error) {
	return apiserver.Client(w.config, version, apiserver.Protobuf, corev1.AddToScheme, discoveryv1.AddToScheme)
}

// next waits until something is touched that was not before.
func (w *Watcher) next(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-w.wake:
	}
	// What belongs together comes one after the other: a pod, its slices of two
	// families. A moment later it is one change instead of three.
	settle := time.NewTimer(settleTime)
	defer settle.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-settle.C:
		return nil
	}
}

const settleTime = 10 * time.Millisecond

// change changes the model and says so.
func (w *Watcher) change(do func()) {
	w.mu.Lock()
	do()
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default: // there is a token
	}
}

// Add is called by the reflector, as are the others.
func (k *kind) Add(object any) error { return k.Update(object) }

func (k *kind) Update(object any) error {
	kept, err := trim(object)
	if err == nil {
		k.w.change(func() { k.set(kept) })
	}
	return err
}

func (k *kind) Delete(object any) error {
	k.w.change(func() { k.remove(object) })
	return nil
}

// Replace takes a new list: the first one, and after the API server was away for longer
// than it remembers.
func (k *kind) Replace(list []any, _ string) error {
	for i := range list {
		var err error
		if list[i], err = trim(list[i]); err != nil {
			return err
		}
	}
	k.w.change(func() {
		k.retain(list)
		for _, object := range list {
			k.set(object)
		}
	})
	k.once.Do(func() { close(k.synced) })
	return nil
}

func (k *kind) Resync() error { return nil }

// Transformer has the reflector trim what it collects for a first list.
func (k *kind) Transformer() cache.TransformFunc { return trim }

// atLeast is a handler for what is as bad as level: client-go tells much.
type atLeast struct {
	slog.Handler
	level slog.Level
}

func (h atLeast) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= h.level && h.Handler.Enabled(ctx, level)
}

func (h atLeast) WithAttrs(attrs []slog.Attr) slog.Handler {
	return atLeast{h.Handler.WithAttrs(attrs), h.level}
}
func (h atLeast) WithGroup(name string) slog.Handler {
	return atLeast{h.Handler.WithGroup(name), h.level}
}
