// Package proxy is one workload's proxy: it takes every TCP connection that the
// workload's network namespace redirects to it, and carries it to the peer's proxy
// under mutual TLS, or refuses it.
//
// A connection's life is a list of steps, one method each: accept, original
// destination, detect (who speaks first), route (who lives there), balance (which
// endpoint), forward. outbound.go reads so for what the application dials, inbound.go
// for what is dialled to it.
//
// An endpoint of a service that is not meshed (its identity is nobody's) is reached in
// plaintext, and counted as an exception, by the same steps.
//
// What it refuses to do: dial a meshed address in plaintext, whatever has failed;
// dial an address of the mesh's own networks that the table does not know, or take
// plaintext from one; believe a client who is not who the table has at its address; take
// configuration from anywhere but its link; talk to control; write its key anywhere;
// turn a peer's reset or refusal into a clean close.
//
// Invariants:
//   - What it knows (services, address table, settings) is one immutable snapshot
//     behind an atomic pointer. A connection loads it once and keeps it.
//   - It serves what it knows when the agent is gone, and dials the agent's socket
//     until there is one again.
//   - A request takes no lock shared with other connections and allocates nothing in
//     the steady state; what allocates is per connection.
//   - An address that the newest table has somebody at is never dialled in plaintext,
//     whatever services say of it; sockets are dialled in plain.go (dialPlain), which asks the
//     table, outside.go, for what is in none, and toward the application.
//   - The server's proxy believes the table and the certificate, never the stream
//     header: that is a hint (see Header).
//
// Goroutines: one for each accepted connection, one for each session with a peer
// (its reader), one for each opaque stream on the server's side, and a fixed few: the
// link's reader, certificate renewal, the janitor of idle sessions, DNS. Proxy.Run
// starts them and waits for all of them.
//
// Tour: proxy.go (life), agent.go (the link), credentials.go (certificates),
// snapshot.go (what it knows), index.go (where that is looked up), watch.go (requests that are told), drain.go (its end, and what its successor gets), outbound.go, inbound.go (the steps), sniff.go
// (waiting for whoever speaks first), peers.go and session.go (sessions with other
// proxies), pipe.go and splice.go (bytes), http.go (the HTTP/1 engine's two sides),
// tables.go, decision.go, routed.go and routed2.go (rules of routes, what they say of a request,
// and what HTTP/1 and HTTP/2 make of that), byname.go (those for TLS), mirror.go
// (copies), guests.go and guests2.go (rules for clients that have no proxy), announce.go and xfcc.go
// (telling applications who their client is), refusals.go (what the log has of them), outside.go
// (what is outside the mesh), plain.go (endpoints of services that are not meshed), socket.go (marks, source addresses, original
// destinations), header.go (the
// per-stream header).
package proxy
