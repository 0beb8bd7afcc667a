// Package kube is everything that knows the shapes of Kubernetes. Its heart is
// [Translate]: manifests in YAML, as a folder or `assay apply` has them where there
// is no Kubernetes, into the intent that package discovery works from. [Service] gives
// the same meaning to a Service of an API server; package kube/cluster watches one.
//
// The manifests are Kubernetes' own, taken strictly. What would be accepted and do
// nothing is an error: an unknown field or kind, a key or an object that is there
// twice, a feature of Service that needs a cluster. So is what two readers of YAML
// would read differently: an unquoted yes or on, a number with a leading zero, an
// alias. Every problem of a set of files is reported at once, each with file and
// line.
//
// Known kinds:
//
//   - v1 Service: metadata (name, namespace, labels, annotations), spec.ports (name,
//     port, targetPort as a number, protocol TCP, appProtocol), spec.selector,
//     spec.clusterIP None. What the API server adds on its own (status, uid,
//     resourceVersion, creationTimestamp, generation, managedFields) is passed over,
//     so that `kubectl get -o yaml` can be the source.
//   - assay.dev/v1alpha1 MeshConfig and TrafficPolicy (package kube/v1alpha1).
//   - gateway.networking.k8s.io/v1 HTTPRoute, GRPCRoute and TLSRoute, attached to services, and
//     ReferenceGrant (v1beta1 of them too). What the API server would refuse is a problem
//     with a line; what a controller judges (a value that is not supported, filters that
//     do not go together, a reference to nothing) becomes a condition of the route, and
//     breaks nothing else.
//   - v1 List, and ServiceList and so on, whose items are taken one by one.
//
// A namespace that is not given is "default". Only Kubernetes' types are used here,
// never its client: nothing in this package opens a connection or starts a
// goroutine. Everything is a pure function.
//
// Tour: translate.go (files to objects), tree.go (YAML checked against a Go type,
// with lines), service.go, meshconfig.go, protocol.go, route.go, tlsroute.go
// and filter.go (what the kinds mean), object.go (what an API server has), pod.go (what pods say).
package kube
