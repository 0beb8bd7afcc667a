// Package install puts the mesh into a Kubernetes cluster and takes it out again. It is
// every object of an installation as Go values, what applies them, waits and verifies
// ([Installer]), and what looks at a cluster before ([Survey]).
//
//	Options --Objects--> typed objects --server-side apply--> cluster
//	                          \--YAML--> assay install --dry-run, the chart's test
//
// An installation is what [Options] say and nothing else: the same options make the same
// objects, in the order in which they are applied. What an account may do is what the
// packages that use it say in their Rules.
//
// It refuses to touch what it did not make: the Gateway API's definitions, labels of
// namespaces, pods of applications. It deletes by name, never by label, and neither
// definitions nor the authority's data unless it is told to purge. It takes no
// installation over from Helm.
//
// Invariants: taking out leaves running pods talking: their proxies are released on every
// node before control goes, and a node that could not be cleaned is named. Every wait
// has an end, and says what it waits for.
//
// Goroutines: none; everything ends with its context.
//
// Tour: options.go, objects.go (which, in which order), control.go, agent.go, injector.go, rbac.go,
// definitions.go (crds/ is written by `go generate`, from package kube/v1alpha1);
// installer.go, wait.go, verify.go, uninstall.go; survey.go and judge.go.
package install

//go:generate go test -run "TestGenerated|TestObjects" . -update
