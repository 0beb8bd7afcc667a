package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"

	"assay.dev"
)

// Watcher watches one API server.
type Watcher struct {
	client kubernetes.Interface
	log    *slog.Logger

	mu    sync.Mutex
	model *model
	wake  chan struct{} // holds a token while something is touched
}

// Open returns a Watcher for the API server that a kubeconfig names; with "" it is the
// one of the cluster in whose pod this process runs. It does not connect yet.
func Open(kubeconfig string, log *slog.Logger) (*Watcher, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, &assay.Error{
			Op: "read how to reach the API server " + kubeconfig, Err: err,
			Remedy: "give a kubeconfig file, or run in a pod with a service account",
		}
	}
	config.UserAgent = "assay-control"
	// Each list and watch is one request for minutes; there is nothing to hold back.
	config.QPS = -1
	return open(config, log)
}

func open(config *rest.Config, log *slog.Logger) (*Watcher, error) {
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("client of the API server %s: %w", config.Host, err)
	}
	return &Watcher{client: client, log: log, model: newModel(), wake: make(chan struct{}, 1)}, nil
}

// Run calls changed with everything there is as soon as all of it has come, and then
// with every change, never twice at once; an error of changed ends Run. It returns when
// ctx ends. A Watcher runs once.
func (w *Watcher) Run(ctx context.Context, changed func(Changes) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	factory := informers.NewSharedInformerFactoryWithOptions(w.client, 0, informers.WithTransform(trim))
	defer factory.Shutdown() // waits for the informers, which end with ctx
	defer cancel(nil)

	var synced []cache.InformerSynced
	for name, watched := range map[string]struct {
		informer cache.SharedIndexInformer
		set      func(object any)
		remove   func(object any)
	}{
		"services": {factory.Core().V1().Services().Informer(),
			func(o any) { w.model.setService(o.(*corev1.Service)) },
			func(o any) { s := o.(*corev1.Service); w.model.removeService(s.Namespace, s.Name) }},
		"endpointslices": {factory.Discovery().V1().EndpointSlices().Informer(),
			func(o any) { w.model.setSlice(o.(*discoveryv1.EndpointSlice)) },
			func(o any) { s := o.(*discoveryv1.EndpointSlice); w.model.removeSlice(s.Namespace, s.Name) }},
		"pods": {factory.Core().V1().Pods().Informer(),
			func(o any) { w.model.setPod(o.(*corev1.Pod)) },
			func(o any) { w.model.removePod(string(o.(*corev1.Pod).UID)) }},
	} {
		if err := watched.informer.SetWatchErrorHandlerWithContext(w.watchFailed(name)); err != nil {
			return err
		}
		registration, err := watched.informer.AddEventHandler(w.events(watched.set, watched.remove))
		if err != nil {
			return err
		}
		synced = append(synced, registration.HasSynced)
	}
	factory.StartWithContext(ctx)
	if !cache.WaitForCacheSync(ctx.Done(), synced...) {
		return context.Cause(ctx)
	}
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

// events are the handlers of one kind of object.
func (w *Watcher) events(set, remove func(object any)) cache.ResourceEventHandler {
	under := func(do func(any), object any) {
		w.mu.Lock()
		do(object)
		w.mu.Unlock()
		select {
		case w.wake <- struct{}{}:
		default: // there is a token
		}
	}
	return cache.ResourceEventHandlerFuncs{
		AddFunc:    func(object any) { under(set, object) },
		UpdateFunc: func(_, object any) { under(set, object) },
		DeleteFunc: func(object any) {
			if last, ok := object.(cache.DeletedFinalStateUnknown); ok {
				object = last.Obj
			}
			under(remove, object)
		},
	}
}

// watchFailed says once in a while that the API server does not answer; client-go goes
// on trying, and until then the last state stands.
func (w *Watcher) watchFailed(what string) cache.WatchErrorHandlerWithContext {
	var mu sync.Mutex
	var last time.Time
	return func(ctx context.Context, _ *cache.Reflector, err error) {
		mu.Lock()
		defer mu.Unlock()
		if ctx.Err() != nil || errors.Is(err, context.Canceled) || time.Since(last) < time.Minute {
			return
		}
		last = time.Now()
		w.log.Warn("the API server cannot be watched; the last state stands", "what", what, "error", err)
	}
}
