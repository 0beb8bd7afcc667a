// Package capture writes the nftables rules and the policy routes that lead a
// workload's TCP connections through its proxy, in the workload's own network
// namespace, for IPv4 and IPv6.
//
//	application --SYN--> output --redirect--> proxy's outbound listener
//	eth0        --SYN--> prerouting --redirect--> proxy's inbound listener
//	proxy (own mark) ------------------------------------------> eth0, untouched
//	proxy (own mark, client's address) --lo--> application --answer, return mark--> lo --> proxy
//
// Only packets that are SYN and nothing else are redirected, so a connection that is
// older than the rules lives on. It is not tracked, as nothing is of which the kernel
// has not seen the beginning: no later connection can pass for it. What the application says to itself (lo, its own
// addresses) is never captured. A SYN to a virtual address and port without a ready
// endpoint is answered with a reset before any of that, so connect() fails as it
// would without a mesh: at once, with ECONNREFUSED.
//
// The last line of the drawing is how the application sees its real client: the
// proxy dials it from the client's address (IP_TRANSPARENT), so the answers must not
// leave through eth0. The rules turn the proxy's mark into the return mark on lo;
// tcp_fwmark_accept gives that mark to the application's accepted socket and
// fwmark_reflect to resets that no socket sends; a policy route delivers what carries
// it on lo. The local leg is exempt from connection tracking: the proxy may use the
// client's own source port, and then both legs have the same addresses and ports,
// which one table of connections could not hold. No state, no lookup, nothing to
// expire.
//
// Where nobody may make the two settings, which is in a container that is not privileged, that
// leg is tracked (Rules.Tracked): its first direction in a zone of its own, so that it may look
// like the client's, and its answers are known by the connection that they belong to. What the
// kernel no longer tracks ends then: a connection that is half closed and silent for an hour, for
// instance.
//
// What the kernel refuses by itself (nobody listens any more, or nothing is ready) no
// process sees. The rules count it, in counters that live as long as the namespace.
//
// It refuses to run outside programs and to change a rule without changing all: an
// update is one transaction, and Verify reads everything back.
//
// Capture is a convenience for the application, not the boundary: what escapes it
// meets the peer's proxy.
//
// It starts no goroutine that outlives a call.
//
// Tour: capture.go (Capture: Install, SetOpen, Verify, Refused, Remove), rules.go (the chains),
// routes.go (policy routing and settings), tracked.go and zone.go (without settings).
package capture
