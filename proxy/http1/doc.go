// Package http1 carries HTTP/1.0 and HTTP/1.1 between an application and the mesh:
// it reads heads and body framing (RFC 9110, RFC 9112), and passes every byte on
// exactly as it came.
//
// It refuses to repair. A message that two readers could frame differently is
// refused with an answer of its own (docs/http1.md has the table), because a mesh
// that normalises is one more reader to disagree with. It rewrites, adds and strips no field on its own
// account, also not hop-by-hop ones, but one (a Plan is the word of the service's owner, and changes
// the bytes of the fields that it names alone): a client's bare "Connection: close" is about the
// client's own connection, stays there, and is said in its response (Request.ends). An application's
// "Connection: close" travels on. It does
// not balance, authorise, dial or count: a Dispatcher, a Backend and an Observer do.
//
// Invariants. A byte is acknowledged to the peer's proxy only once the kernel took
// it, so memory is bounded by one window for each direction of each exchange. What
// the peer reset is reset here, never closed cleanly. Every message is parsed again
// on the server's side: the peer's word is a hint. Reading, framing and forwarding
// allocate nothing in the steady state.
//
// Goroutines: one for each application connection (Outbound.Serve, the caller's),
// one for each backend connection, and for as long as an application reads slower
// than its peer writes, one that drains what is queued for it.
//
// Tour. Parsing is pure: refusal.go (what is refused, with status and section),
// syntax.go (byte classes), head.go and field.go (the lines that both heads share),
// request.go, response.go, target.go (request targets and authorities), body.go and
// chunked.go (which bytes belong to a message), reply.go (the responses to one
// request). The client's side: outbound.go (a connection's life), carry.go (the way of
// a request), answer.go (the way of its response). The application's side: inbound.go
// (the pool), backend.go (a connection to the application), served.go and respond.go
// (the two ways). Between them: exchange.go (what others see of it), plan.go and edit.go (what a route makes of it), stream.go (a mux
// stream, or a pipe in the process), outlet.go (writes that never wait), buffer.go.
//
//	application            client's proxy                 server's proxy            application
//	   socket --> client goroutine: carry --> mux --> reader: served.Received --> socket
//	   socket <-- reader: exchange.Received <-- mux <-- backend goroutine: respond <-- socket
package http1
