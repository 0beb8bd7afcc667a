// Package dns answers a workload's name queries: service names from what the proxy
// knows, everything else from the host's resolvers.
//
// Names of a service NAME in namespace NS with domain DOMAIN, longest first:
//
//	NAME.NS.svc.DOMAIN   NAME.NS.svc   NAME.NS   NAME (in the workload's own namespace)
//
// A service has its virtual addresses, a headless one those of its ready endpoints
// (A, AAAA). _PORT._tcp before a name asks for SRV. Virtual addresses have PTR records.
// Under svc and svc.DOMAIN the answer is ours in any case: NXDOMAIN for a name that
// is no service, no data for a type that it has not. The two short forms are ours
// only while there is such a service.
//
// It refuses to cache and to follow names itself: it is a stub in front of resolvers
// that do. What it cannot ask anybody is answered SERVFAIL at once, so that a program
// need not wait for a timeout. It binds nothing: sockets are given to it.
//
// Goroutines: the callers of ServeUDP and ServeTCP, and one for each forwarded query
// over UDP, at most maxForwards. ServeUDP waits for its own.
//
// Tour: zone.go (names to answers, pure), server.go (sockets), forward.go (upstreams).
package dns
