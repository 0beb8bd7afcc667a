package main

import (
	"context"
	"log/slog"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"assay.dev/control"
	"assay.dev/identity"
	"assay.dev/kube/apiserver"
	"assay.dev/kube/cluster"
	"assay.dev/kube/publish"
	"assay.dev/kube/review"
	"assay.dev/store"
)

// What agents are in a cluster.
const (
	agentAccount  = "assay-agent"
	agentAudience = "assay"
)

// kubernetes is what control has of an API server: it translates between the words of
// package kube and those of package control, which do not know each other.
type kubernetes struct {
	watcher  *cluster.Watcher
	reviewer *review.Reviewer
	trust    *publish.Trust
	routes   *publish.Routes
	objects  *publish.Objects
	events   *publish.Events
	injector *publish.Injector // nil: pods have no sidecars
	log      *slog.Logger
	sealing  func(ctx context.Context, secret string) ([]byte, error)
	missing  []string // kinds of configuration that the API server does not have
}

func openKubernetes(kubeconfig, namespace, image string, log *slog.Logger) (*kubernetes, error) {
	config, err := apiserver.Config(kubeconfig, "assay-control")
	if err != nil {
		return nil, err
	}
	reviewer, err := review.New(config, agentAudience, namespace, agentAccount)
	if err != nil {
		return nil, err
	}
	trust, err := publish.NewTrust(config, namespace, log)
	if err != nil {
		return nil, err
	}
	routes, err := publish.NewRoutes(config, log)
	if err != nil {
		return nil, err
	}
	objects, err := publish.NewObjects(config, log)
	if err != nil {
		return nil, err
	}
	events, err := publish.NewEvents(config, log)
	if err != nil {
		return nil, err
	}
	k := &kubernetes{watcher: cluster.New(config, log), reviewer: reviewer, trust: trust, routes: routes, objects: objects, events: events, log: log,
		sealing: func(ctx context.Context, secret string) ([]byte, error) {
			return publish.SealingKey(ctx, config, namespace, secret, identity.NewSealingKey)
		}}
	if image != "" {
		k.reviewer.Others()
		k.watcher.Sidecars(image)
		k.injector, err = publish.NewInjector(config, log)
	}
	return k, err
}

// sealingKeys are those in a Secret of the mesh's own namespace.
func (k *kubernetes) sealingKeys(ctx context.Context, name string) (*identity.SealingKeys, error) {
	text, err := k.sealing(ctx, name)
	if err != nil {
		return nil, err
	}
	return identity.ParseSealingKeys(text)
}

// bearer is control.Cluster's.
func (k *kubernetes) bearer(ctx context.Context, token string) (control.Bearer, error) {
	h, err := k.reviewer.Review(ctx, token)
	return control.Bearer(h), err
}

// run tells control what the API server says, and the API server what control knows, until
// ctx ends.
func (k *kubernetes) run(ctx context.Context, c *control.Control) error {
	group, ctx := errgroup.WithContext(ctx)
	heard := make(chan struct{})
	group.Go(func() error {
		first := sync.OnceFunc(func() { close(heard) })
		err := k.watcher.Run(ctx, func(ch cluster.Changes) error {
			defer first()
			return c.Follow(k.changes(&ch))
		})
		if ctx.Err() != nil {
			return nil
		}
		return err
	})
	group.Go(func() error { return k.trust.Run(ctx, c.Roots) })
	if k.injector != nil {
		group.Go(func() error { return k.injector.Run(ctx, c.Roots) })
	}
	group.Go(func() error {
		select {
		case <-heard: // before that, control knows of no route
			return k.routes.Run(ctx, c.RouteStatus, k.watcher.RouteStatuses)
		case <-ctx.Done():
			return nil
		}
	})
	group.Go(func() error {
		select {
		case <-heard:
			return k.objects.Run(ctx, verdict(c), k.watcher.ObjectStatuses)
		case <-ctx.Done():
			return nil
		}
	})
	group.Go(func() error { return k.events.Run(ctx, found(c), k.pod) })
	return group.Wait()
}

// verdict returns what became of objects, in the words of package publish.
func verdict(c *control.Control) func(kind, namespace, name string) (publish.Verdict, bool) {
	return func(kind, namespace, name string) (publish.Verdict, bool) {
		v, ok := c.Verdict(store.Key{Kind: kind, Namespace: namespace, Name: name})
		return publish.Verdict(v), ok
	}
}

// found returns what was found about workloads, in the words of package publish; nil when
// that is what it was.
func found(c *control.Control) func() []publish.Found {
	last := ^uint64(0) // so that what was found before control started is told
	return func() []publish.Found {
		list, number := c.Found(last)
		if number == last {
			return nil
		}
		last = number
		out := make([]publish.Found, len(list))
		for i := range list {
			out[i] = publish.Found(list[i])
		}
		return out
	}
}

func (k *kubernetes) pod(uid string) (namespace, name string, ok bool) {
	p, ok := k.watcher.Pod(uid)
	return p.Namespace, p.Name, ok
}

func (k *kubernetes) changes(ch *cluster.Changes) control.ClusterChanges {
	out := control.ClusterChanges{
		RemovedServices: ch.RemovedServices, RemovedPods: ch.RemovedPods, RemovedNodes: ch.RemovedNodes,
	}
	for _, n := range ch.Nodes {
		out.Nodes = append(out.Nodes, control.Node(n))
	}
	for i := range ch.Services {
		s := &ch.Services[i]
		if s.ExternalName != "" {
			out.Externals = append(out.Externals, control.External{Namespace: s.Namespace, Name: s.Name, ExternalName: s.ExternalName, Notes: s.Notes})
			continue
		}
		out.Services = append(out.Services, control.Placed{DeclaredService: s.DeclaredService, Places: s.Places})
	}
	for i := range ch.Pods {
		p := &ch.Pods[i]
		out.Pods = append(out.Pods, control.Pod{
			UID: p.UID, Namespace: p.Namespace, Name: p.Name, Account: p.Account, Node: p.Node, Addrs: p.Addrs, Labels: p.Labels, HostNetwork: p.HostNetwork,
			Sidecar: p.Sidecar, Asks: p.Asks, Wants: p.Wants, Artifacts: p.Artifacts,
		})
	}
	if ch.Configuration != nil {
		out.Declared = k.declared(ch.Configuration)
	}
	return out
}

func (k *kubernetes) declared(g *cluster.Configuration) *control.Declared {
	if !slices.Equal(g.Missing, k.missing) {
		k.missing = g.Missing
		k.log.Info("the API server does not have all kinds of configuration", "missing", g.Missing)
	}
	out := &control.Declared{Intent: g.Intent, Problems: map[store.Key]control.Unsound{}, Missing: g.Missing}
	for i := range g.Objects {
		o := &g.Objects[i]
		out.Objects = append(out.Objects, store.Object{
			Kind: o.Kind, Namespace: o.Namespace, Name: o.Name, Spec: o.Manifest, Generation: o.Generation, Created: o.Created.UTC(),
		})
	}
	for _, p := range g.Problems {
		out.Problems[store.Key{Kind: p.Kind, Namespace: p.Namespace, Name: p.Name}] = control.Unsound{Reason: p.Reason, Text: p.Text}
	}
	return out
}
