// Package netns gives workloads network namespaces of their own and joins them to
// the host: one bridge, a veth pair for each workload, addresses, routes,
// translation for what leaves the mesh, and rules that keep a workload from
// speaking with another one's address.
//
// It refuses to know what a workload is, to run external programs, and to touch a
// link, a route or a table that does not carry the name of its own bridge.
//
// Invariants: a namespace lives only as long as a process or a descriptor holds
// it, so nothing of it can leak; everything on the host's side is found again by
// name, so whoever starts next can sweep it. Work inside a namespace happens on a
// thread that ends with it (OnThread), so no other goroutine can ever run there by
// accident.
//
// It starts no goroutine that outlives a call.
//
// Tour: netns.go (namespaces and threads), host.go (bridge, peers, forwarding),
// attach.go (veth pairs), filter.go (nftables on the host's side), alloc.go
// (addresses), sysctl.go.
package netns
