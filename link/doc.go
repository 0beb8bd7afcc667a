// Package link is the private wire between an agent and its proxies, and between
// an agent and `assay run` on the same host: messages in JSON over a
// SOCK_SEQPACKET unix socket, with file descriptors beside them, and the address
// table that all proxies of a host share as one read-only mapping.
//
// It is the only thing that agent and proxy have in common. No workload key ever
// crosses it: a proxy sends certificate requests and gets certificates.
//
// Each message is one packet, so a reader never sees half of one, and its
// descriptors arrive with it. A body over MaxInline travels in a sealed memfd.
//
// Order on a proxy's socket: the proxy sends Hello; the agent answers Configure
// with the listeners, then Table, Services and Bundle; the proxy sends Ready once
// it accepts, then CSR; from then on each side speaks when it has something. The
// socket pair is made at spawn. A proxy whose socket closes goes on serving what
// it knows and dials the agent's path (Configure.AgentSocket) every 200 ms until
// an agent answers: then it sends Hello again, with its listeners, and is adopted. So does
// one that is sent a patch of a service that it does not know so: what it knows is as it was.
package link
