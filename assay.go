// Package assay holds the nouns of the mesh: who a workload is, which artifact
// it runs, where a service can be reached, and what was seen on the wire.
//
// It imports only the standard library, starts no goroutine and does no I/O, so
// every other part can share its vocabulary without sharing code. A value of a
// type in this package is immutable once it has been published in a snapshot;
// whoever wants to change one makes a copy.
//
// Tour: identity.go (SPIFFE IDs), artifact.go (what runs, and the certificate
// extension that says so), workload.go and service.go (what a snapshot is made
// of), route.go (rules for requests), signals.go (golden signals), edge.go (who talks to whom), error.go (errors
// for the person who reads them).
package assay
