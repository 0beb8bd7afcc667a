// Package cluster is what a Kubernetes API server says of services and pods, as the
// mesh needs it. [Watcher] watches Services, EndpointSlices, Pods and Nodes, and what people
// declare beside them (routes, grants, policies, the configuration of namespaces), and
// hands out what changes, in values that never change afterwards.
//
// It says where the clients of a service may be sent: addresses, the port on each of
// them (a targetPort by name differs from pod to pod), readiness, zone and hints, of
// both address families as one place. It refuses to say who is there. Anybody who may
// write an EndpointSlice can put any address into it; who is at an address is a fact of
// the pod, attested by its node's agent and checked against [Pod], and a place that
// names a pod is believed only where that pod has the address.
//
// The meaning of every object is that of package kube, so that a manifest says the same
// in a folder and in a cluster. What the mesh does not do for a service is a note and breaks
// nothing: services in a cluster work already. Any other object that cannot be
// understood, or contradicts an older one, has no effect, is named with the reason, and
// breaks no other. Kinds whose definitions are not installed are looked for
// until they are; nothing is ever installed from here.
//
// What it takes from the API server is held once, without what nobody asks for
// (specifications of containers, managed fields): under 4 KB for a pod with its share of
// services and slices. A change of a pod costs what its services cost, whatever the
// size of the cluster. While the API server is away the last state stands. Rules is all
// that it must be allowed.
//
// Invariants: a place has an address; a target is a port number that an EndpointSlice
// gives for that place, or 0; places of pods that have ended, or have no address yet,
// are not handed out; the
// same objects give the same values, in whatever order they came.
//
// Goroutines: Run, one of client-go's reflectors for each kind, and the search for
// definitions, all ended when Run returns. Their events mark what is to be computed anew; Run computes, and calls
// back. Nothing is queued: a slow callback makes fewer and larger changes.
//
// Tour: nouns.go, model.go and configuration.go (the pure computation), trim.go (what is
// kept of an object), routestatus.go and objectstatus.go (what we have written there), watcher.go, search.go (which definitions are there).
package cluster
