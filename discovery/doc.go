// Package discovery turns what people declared and what runs into what a snapshot
// holds: services with their virtual addresses and endpoints, the routes that they
// take, and the effective configuration of every namespace.
//
// It is pure: no clock, no I/O, no goroutine, no lock. The same inputs give the
// same output, byte for byte, whatever the order in which they came. It refuses
// to know where intent comes from (files or the API server) and where virtual
// addresses are kept.
//
// A service has its endpoints from workloads, which it selects or which were started
// with its name, or from places: somebody who watches what runs, as an API server
// does, says where its clients may be sent.
//
// Invariants: an endpoint with an identity is always a workload that is meshed, and its
// identity is the workload's, whatever a place says; an endpoint without one has an
// address that no workload has; a target is never a port that the kernel does not show
// as listening, or that a place does not call ready; a service that cannot have its
// virtual address yet is withheld, never published without one.
//
// Tour: intent.go (what people declare), catalog.go (the incremental computation),
// service.go (one service from its declaration and workloads), place.go (endpoints from
// places), route.go (which parents take a route, which backends it can use, and what
// people are told).
package discovery
