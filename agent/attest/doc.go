// Package attest reads what the kernel knows about a process: which file it
// executes, when it started, in which namespaces, as whom. A workload can forge none
// of it without being root on the host.
//
// A process is held by a pidfd, and every set of facts is followed by a check that
// the process is still there, so that no fact can be about another process that came
// to have the same number.
//
// It refuses to guess: an interpreter's digest says nothing about the program that it
// interprets, and is marked so (Unproven) unless a tree is attested with it.
//
// What it does not see: shared libraries and what a process maps or reads later.
// --artifact names a tree for that.
//
// It starts no goroutine that outlives a call.
//
// Tour: process.go (Process and Facts), digest.go (digests by descriptor, cached),
// interpreter.go (what proves nothing), tree.go (the tree digest and its
// specification).
package attest
