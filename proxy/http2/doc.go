// Package http2 carries HTTP/2, and so gRPC, between an application and the mesh. It
// ends the application's connection on either side, and carries each request as a
// stream of its own between the proxies, so that every request finds its own endpoint.
//
// It refuses to repair: a message that is malformed (RFC 9113 section 8.1.1) resets its
// stream, and what breaks the protocol ends its connection; docs/http2.md has the table.
// It refuses to be expensive: whatever costs us more than its sender is counted, and too
// much of it ends the connection with ENHANCE_YOUR_CALM and a reason of its own. It adds,
// strips and changes no field. It does not balance, authorise, dial or count: a
// Dispatcher, a Backend and an Observer do. It never pushes, and ignores priorities.
//
// Invariants.
//   - No stream holds up another. What the far side does not take waits in its own
//     stream; the connection's window is given back at once, the stream's once the far
//     side took the bytes. So memory is bounded by one window for each direction of each
//     stream, a bounded queue for each connection, and Memory for all of them.
//   - Header compression lasts one hop: what travels between the proxies are fields with
//     their lengths (docs/transport.md), never-indexed ones marked so.
//   - The end of a stream travels as what it was: END_STREAM as the end, RST_STREAM with
//     its code, in both directions. What nobody has read is said to be unread.
//   - Every message is checked again on the server's side: the peer's word is a hint.
//   - Reading, framing and forwarding allocate nothing in the steady state, but for field
//     values that their sender did not index.
//
// Locks: a stream's handler is called by mux with mux's own lock of the stream; then
// conn.mu; then whatever mux locks inside. Nobody calls a handler with conn.mu held.
// Observers and the first try of a Dispatcher are called with it: they must not wait.
//
// Goroutines: one for each connection reads it (Outbound.Serve, the caller's, or
// Inbound's). A connection has another one while its socket takes no more bytes, and one
// for each stream whose upstream must be dialled first. A timer of each connection runs
// while it has streams.
//
// Tour. Pure: frame.go, refusal.go (what is refused, with its rule), field.go and
// head.go (messages), carriage.go (what travels between the proxies), grpc.go, flood.go.
// A connection: conn.go (life), read.go and write.go (one file for each direction),
// settings.go, alive.go, memory.go. A stream: stream.go (states), up.go (from the application to the
// mesh), down.go (back). The two roles: outbound.go with answer.go (the application is
// the client), inbound.go (it is the server). Others see exchange.go.
//
//	application         client's proxy                     server's proxy           application
//	   socket --> conn.read --> stream.up --> mux --> stream.Received --> conn.out --> socket
//	   socket <-- conn.out <-- stream.Received <-- mux <-- stream.up <-- conn.read <-- socket
package http2
