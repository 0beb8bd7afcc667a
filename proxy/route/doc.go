// Package route decides what becomes of a request: which rule of a service's routes
// takes it, which backend serves it, and what changes of it on the way. It is how the
// Gateway API's HTTPRoute and GRPCRoute are read by a proxy, with HTTP/1 and with HTTP/2.
//
// It refuses to know an engine: a request is a [View], and what a rule changes is plain
// data that the engine turns into bytes. It opens nothing, knows no endpoint and no
// clock. A [Table] is compiled once for each port of a service and snapshot, and never
// changes.
//
// Invariants. Match costs about as much as one look into a hash table for a path that no
// rule names, whatever the number of rules; it takes no lock and allocates nothing.
// Regular expressions are RE2's, so no request takes longer than its own length. The
// precedence is the specification's (docs/routes.md), whatever the order in which routes
// came.
//
// Goroutines: none; everything may be called by any.
//
// Tour: table.go (from routes to a table, and the way through it), match.go (one match,
// and which of two comes first), rule.go (a rule with its backends), edit.go (what changes
// of a head), redirect.go and cors.go (answers), session.go (which endpoint a client is
// kept at).
package route
