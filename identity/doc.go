// Package identity is the certificate authority of the mesh.
//
// One root (10 years) signs two intermediates (90 days, replaced at half-life):
// one for workloads and one for infrastructure, that is control, hosts and
// operators, whose certificates never depend on a verdict about a workload.
// Certificate policies keep the two apart. Leaves are short (24 hours for
// workloads), carry exactly one URI name, a SPIFFE ID, and never outlive what
// signed them.
//
// It refuses to decide who may have a certificate: the caller has checked that.
// It refuses to make, see or keep a workload's key: it gets certificate requests,
// of which only the public key is used. It uses no store and no network, so
// renewals go on when everything else is away.
//
// Invariants: a file with a private key is its owner's alone (0600 in a 0700
// folder) or the authority does not start; a root signs nothing before every live
// proxy has acknowledged the bundle that holds it, or an operator's deadline has
// passed; a root leaves the bundle only after the last leaf beneath it has ended;
// the version of the bundle only grows.
//
// Several processes share an authority through a Vault: all of it, keys too, is one document,
// sealed with AES-256-GCM under a key that the vault never sees, and each step of rotation replaces
// that document if it is still the one that the step follows from. So a step is taken once,
// whoever takes it. Each process signs by itself, and stops when it has not been able to look
// for Policy.Apart.
//
// It starts no goroutine. Its owner calls Step, with what happened, from time to
// time; Authority is safe for concurrent use.
//
// Tour: rotation.go (when to replace what: a pure function, tested by the
// transcripts in testdata), authority.go (the signers and their life), issue.go
// (leaves), request.go (what is taken from a certificate request), disk.go (keys
// on disk), seal.go (an authority that is shared), token.go (join tokens).
package identity
