// Package egress knows what connections to outside the mesh are called, and decides
// which are allowed.
//
// A name has up to two sources. Names remembers which name the workload looked up when
// it got an address: that is the resolver's word. The client's first bytes may claim
// one: the server name of TLS, the host of an HTTP/1 request. A workload can claim
// whatever it likes, so a claim counts only together with the resolver: the claimed
// name has the address that was dialled. What is proven then is where the bytes go,
// as far as the host's resolver is right; who answers there is between the
// application and its server, in TLS.
//
// What this cannot see and does not pretend to: what is asked for inside TLS (a server
// that holds an allowed name and others may be asked for the others), names behind a
// forward proxy (CONNECT), an encrypted ClientHello (its outer name is judged), and
// requests after the first on a plain HTTP connection.
//
// It refuses to do I/O, to wait, and to remember without bound. No goroutines.
//
// Invariants: Claim reads bytes from the workload: it allocates nothing that grows
// with them, and is fuzzed. A Policy is immutable.
//
// Tour: names.go (Names), claim.go (the first bytes), policy.go (the decision).
package egress
