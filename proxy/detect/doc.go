// Package detect decides what is spoken on a connection from who speaks first and
// what the first bytes are.
//
// Decide is a pure function: of what was declared, what has been learned about the
// port, the bytes seen so far in both directions and the time. It says to wait, to
// open the connection to the server although nothing is settled, or what it is. Its
// caller does the reading and the waiting. The rules, in order:
//
//   - A declared protocol wins.
//   - The client's first bytes decide: a complete HTTP/1 request line, the HTTP/2
//     preface, a TLS ClientHello; anything else is opaque.
//   - A client that is silent (or stops within a request line) for Patience gets its
//     connection to the server opened at the same time. From then on the first to
//     speak decides: a server that does makes the connection opaque.
//   - Except: server bytes that begin an HTTP/2 SETTINGS frame or with "HTTP/" are
//     what HTTP servers send on their own (a preface, a 408 before closing). They are
//     held, and the client's bytes still decide.
//   - So HTTP that comes late is recognised until a server byte was forwarded.
//   - A client that dribbles has Dribble to finish its first line.
//
// What Memory has learned about a port removes only the waiting. A wrong memory
// costs a connection to the server that is closed unused, never a wrong decision.
//
// The package parses bytes from unauthenticated peers: it allocates nothing that
// grows with them, and every function is fuzzed.
//
// Tour: client.go and server.go (first bytes), hello.go (the TLS ClientHello),
// decide.go (the rules), memory.go (what is learned).
package detect
