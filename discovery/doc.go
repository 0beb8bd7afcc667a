// Package discovery turns what people declared and what runs into what a snapshot
// holds: services with their virtual addresses and endpoints, the routes that they
// take, and the effective configuration of every namespace.
//
// It is pure: no clock, no I/O, no goroutine, no lock. The same inputs give the
// same output, byte for byte, whatever the order in which they came. It refuses
// to know where intent comes from (files or the API server) and where virtual
// addresses are kept.
//
// Invariants: an endpoint is always a workload that is meshed; a target is never
// a port that the kernel does not show as listening; a service that cannot have
// its virtual address yet is withheld, never published without one.
//
// Tour: intent.go (what people declare), catalog.go (the incremental
// computation), service.go (one service from its declaration and workloads), route.go
// (which parents take a route, which backends it can use, and what people are told).
package discovery
