// Package demo runs a meshed bank on one machine, shows it, and verifies it.
//
// It drives what a user drives: the processes `assay up` and `assay run`, and the
// operator's API. It has no door of its own into control, agent or proxy, and the
// check (check.go) believes as little as it can: encryption is judged from packets
// (package wire), identities from certificates that it reads from the workloads
// itself, artifacts from digests that it computes itself. What the mesh reports must
// agree with that.
//
// It refuses to touch the host: everything runs in the network namespace of the
// calling process, which the command made for it, and below one temporary folder.
//
// Goroutines: those of Stage.Run and of the processes that it starts; all have ended
// when it returns.
//
// Tour: cast.go (the bank's workloads and who may talk to whom), process.go and
// stage.go (starting and ending them), operator.go (what control tells), view.go
// (the live table), check.go (the acts of the check), evidence.go and judge.go (what
// they found, and the verdict: a pure function), peer.go (a certificate as a peer
// sees it), summary.go (the table at the end).
package demo
