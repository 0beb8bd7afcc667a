// Package meter counts what passes a workload's link beside its proxy, in the
// workload's own network namespace, and says where every byte on the link belongs.
//
// A capture leads TCP through the proxy, which counts and encrypts it. What it leaves
// alone (UDP and other transports, excluded ports, connections older than the
// capture) nobody would see. The meter asks the kernel to count it: nftables counters
// by class, and bounded sets with a counter for each remote address and port. It adds
// nothing to a packet's way but these counts, drops none and changes none.
//
//	link counters (the host's end, which the workload cannot reach; a pod's own end)
//	  = the proxy's own packets          by mark, by ct mark, by ct status dnat
//	  + exceptions                       by class, address and port
//	  + control traffic                  ARP, neighbour discovery, ICMP errors, IGMP, …
//	  + unexplained                      what passed neither: 0
//
// All numbers are of Ethernet frames without their check sequence, as the kernel
// counts them on a link: a segment that the link cuts into frames later (GSO) is one
// frame. The rules see packets; the 14 bytes of each frame's header are added here.
//
// What is counted is exact as long as packets take the kernel's way. What it can tell
// apart is not for ever: a process that holds CAP_NET_RAW in the namespace (one that
// `assay run` started does not) may send frames that no rule sees, which is what the
// difference shows, or give them the proxy's mark and be counted as the proxy. The
// meter is a book, not a wall; the wall is the peer's proxy.
//
// The table is not the capture's: rules of capture are replaced whole when settings
// change, and counts must outlive that, and the agent. Install may be called again at
// any time, by another process too: counts stay.
//
// It starts no goroutine.
//
// Tour: meter.go (Meter: Install, Read, Verify), rules.go (the chains), reading.go
// (what was read and what it means), older.go (connections that exist already, and their end).
package meter
