// Package wire looks at the packets on a network namespace's links and says what
// somebody who taps them can read: which TCP connections were TLS from the first
// byte to the last, what their hello offered, and whether given texts were ever
// there in clear.
//
// It trusts nothing that the mesh says about itself. It never decrypts, never
// sends a packet, and never stores one. What it could not see (packets that the
// kernel dropped, holes in a stream) it counts, so that silence is not taken for
// proof.
//
// Inspector is pure: packets in, a report out. Capture feeds one from AF_PACKET.
//
// Goroutines: the caller's, in Capture.Run.
//
// Tour: packet.go (IP and TCP headers), stream.go (one direction of a connection),
// tls.go (records and hellos), inspector.go (connections and the report),
// capture_linux.go (the kernel's packet ring).
package wire
