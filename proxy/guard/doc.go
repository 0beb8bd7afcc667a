// Package guard decides what a request may cost: how long it may take, whether it may
// be sent again, whether it is taken at all. Both HTTP engines and opaque connections
// ask it, so that a limit means the same in each.
//
// It refuses to know a protocol, and no decision reads a clock: each is a function of
// what it remembers, what happened and the time that it is given; engines turn the
// answer into bytes. It never repeats what may have been acted upon: that a request is
// idempotent, or that provably nobody has read it, is the engine's to say, and a
// request of which a byte cannot be sent again is not asked about.
//
// Invariants: every decision is counted once, under one of the names in decision.go.
// What is asked of every request takes no lock and allocates nothing; locks are taken
// where something went wrong. All times are durations on one monotonic clock,
// which Now reads for those who ask.
// Goroutines: none; everything may be called by any.
//
// Tour: request.go (timeouts and what else a request is allowed), retry.go (may it be
// sent again, and when), budget.go (how many retries a service bears), grpctimeout.go
// (deadlines on gRPC's wire), breaker.go (is an endpoint fit), throttle.go (how much it is
// given at once), circuit.go (is the service whole to be asked), service.go (what requests
// to one port of a service share, on either side), rate.go, limiter.go (how much an
// application is given), decision.go (what is counted).
package guard
