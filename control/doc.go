// Package control is the role that knows the whole mesh: it holds what people
// declared and what hosts report, serves every host the snapshot that follows, and
// signs certificates after checking what it can check.
//
// It refuses to read the store to serve a request: everything is loaded once, at
// the start. Facts that hosts report (workloads, certificates issued, findings)
// are stored behind the request, bounded; what people ask for (intent, tokens,
// hosts that join) is stored before it is answered, and fails with Unavailable
// when the store is away. So with the store lost nothing new is taken from
// people, and serving, renewals and discovery go on.
//
// Several serve on one store if the authority is in it: each has the streams of some hosts and
// speaks for those in the store; of the rest it hears there what the others store (hear.go).
// Which of them live it sees by whether their beats grow, and one that alone has lost the store
// leaves its hosts to the others (several.go). Nobody leads. Without the authority in the store
// one control has it at a time, and one that was taken for dead cannot write (holder.go).
//
// It trusts a host with the host's own workloads and nothing else: a host's
// certificate names the host, its join token says which namespaces and services
// it may run, its prefixes say which addresses, and what is outside is refused
// and recorded. In a cluster it trusts a node with the pods that the platform says run
// there, as the platform has them.
//
// Invariants: an address belongs to one workload at a time; a resource in the
// snapshot is never changed, only replaced under a higher version; what is queued
// for a stream is the difference between two versions and nothing else, so a slow
// stream costs no memory and skips to the newest; a workload of a host that does
// not come back stays in the address table (its address is meshed, not plaintext)
// and is ready nowhere; a method without a line in the access table is denied.
//
// Goroutines: Run owns the writer to the store, the clock's tick, rotation, what follows
// other controls, the watcher of
// the intent folder, the end of nodes and the server of the local host. Each Sync stream has two:
// gRPC's own, which sends, and one that receives, which ends with the stream.
// Serve functions block until their context ends.
//
// One mutex guards the model; under it there is no I/O. The order of locks is
// intent, model.
//
// Tour: control.go (the role), model.go (what is known: admit.go, idle.go,
// remembered.go, reports.go), publish.go, snapshot.go and delta.go (versions, and what leads to them), sync.go (a host's
// stream), hosts.go (join, renew, issue), cluster.go, nodes.go and waiting.go (nodes and pods of a platform, and what comes too early), access.go, peers.go and refuse.go (who calls
// and may), operator.go (what people call), apply.go and folder.go (intent), verdict.go (what became of it, for a platform), list.go
// (what people see; package api has the documents), edges.go, check.go, found.go, rotate.go
// and ended.go (certificates over time), authority.go (where it is kept), several.go, hear.go and ask.go (other controls on the
// store), claim.go (pods in between), persist.go (the store behind), holder.go (one control for a
// store), lease.go (when a host's workloads stop being ready), network.go (addresses).
package control
