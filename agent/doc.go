// Package agent is one host of the mesh: it gives workloads their place in the
// network, starts and keeps one proxy for each, attests what they run by kernel
// facts, and carries everything between them and control over one stream.
//
// It refuses to hold a workload's key (a proxy makes its own and sends a request), to
// decide who may be whom (control does), and to touch what it did not make.
//
//	assay run --agent.sock--> Agent --Sync, Issue--> control
//	                            |  one workload: namespace, port, capture, listeners
//	                            +--link--> assay-proxy, in the workload's namespace
//
// # Invariants
//
//   - What exists in the kernel is on disk first: a record of each workload is
//     written before its proxy is configured. An agent that starts adopts what is
//     recorded and alive and sweeps the rest, so SIGKILL at any point leaks nothing.
//   - A namespace is held only by processes and descriptors, never by a mount.
//   - A process is believed to be who it was only by pidfd, start time, digest of its
//     executable and network namespace together.
//   - Listeners belong to the agent; a proxy that dies is replaced within a second
//     and finds in them whoever tried meanwhile. With agent and proxy both dead the
//     kernel refuses connections: nothing ever falls back to plaintext.
//   - "Meshed" is told to control after the proxy accepts and taken back before
//     anything is removed; of a pod that ends, after: nothing may be sent to it in plaintext.
//
// # Goroutines
//
// Agent.Run owns all of them and waits for them: the accept loop of agent.sock and
// one goroutine for each connection, the stream to control (a sender, a receiver),
// the publisher that turns the snapshot into what proxies get, the writer of the
// snapshot, the metrics server, and for each workload one that supervises its proxy,
// one that watches its owner, one that watches its listening ports, and one that
// distributes. Queues are bounded: what is to be sent is kept as sets of what
// changed, so a slow reader gets the newest state and not every one.
//
// # Tour
//
// config.go; agent.go (Run); state.go (what is on disk); workload.go (a workload's
// life), distribute.go (what its kernel is told), latch.go (facts that others wait
// for); place.go and adopt.go (its two beginnings); pod.go (workloads in namespaces
// that somebody else makes: how they join and leave), leaving.go (all of them at once), own.go (an
// agent in its one pod), sandbox.go (what network plugins ask); proxy.go (spawn), generation.go
// (a proxy's life), upgrade.go (its successor), session.go (what is said on the link),
// push.go (down it), certify.go (certificates); owner.go (whose workload it is);
// server.go (agent.sock); suspect.go (what a proxy may cost); runner.go and protocol.go
// (`assay run`); control.go, outbox.go, snapshot.go (the stream); publish.go, publisher.go
// (views for proxies, each from the one before), view.go, deltas.go (what they are told of
// them), owners.go (whose an address is); beside.go (what passes beside the proxy); ready.go (sockets that listen);
// resolv.go, relay.go (names); metrics.go; watch.go, accesslog.go, spans.go (single
// requests); join.go (a host certificate); rootless.go. Sub-packages: netns, capture,
// meter, attest.
package agent
