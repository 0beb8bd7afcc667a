// Package node is one node's view of a Kubernetes cluster: which of its pods are wanted
// in the mesh, and what is done about it.
//
//	API server ---pods of this node, labels of namespaces---> Source --+
//	                                                                   +--> Reconciler --> Host (the agent)
//	container runtime ---sandboxes, images that really run-------------+
//
// A pod is wanted when it, or its namespace, says assay.dev/mesh: enabled; the pod's own
// word wins. Pods that share the node's network, have ended, are static (a file of the
// node's, which the API server only mirrors) or are of Assay's own namespace never are;
// those of kube-system only by their own word.
//
// [Source] answers a network plugin from memory, or with one question to the API server.
// What cannot be known is an error, so that the runtime tries again: a pod that starts
// uncaptured is a hole that nobody sees. Where nothing depends on the answer it is given
// without asking: control and the cluster's own pods start when the API server is away.
//
// [Reconciler] brings what is into line with what is wanted: pods that run already are
// meshed in place, those that are not wanted any more released, what each pod runs is
// attested whenever the runtime says that it changed, and what is kept of pods that are
// gone is removed. The runtime's word decides what runs, the API server's who it is. A
// pod that cannot be meshed is tried again, ever less often, holds up no other, and is
// named with the reason (Unmeshed); so is one that is labelled and can never be.
//
// A label of Assay's own namespace takes the whole mesh out ([LeavingLabel]): every agent
// hears of it, without control, and with no further right.
//
// It refuses to guess: a pod is released when the API server says that it is not wanted,
// never because nothing is known of it; its end is the end of its sandbox, and of its
// object.
//
// Goroutines: Run of each; a Source has one of client-go's reflectors for each of two
// kinds, a Reconciler one for each pod that is worked on (workers at most) and one that
// hears the runtime's events. All have ended when Run returns.
//
// Tour: pod.go (what is wanted), source.go (the API server), plan.go (what is to be done:
// pure), reconcile.go (doing it), trust.go (control's roots).
package node
