// Package cri asks a node's container runtime what its pods really run, over the
// Container Runtime Interface, and containerd's own interface for what that one does not
// tell.
//
// What runs is the platform's manifest. It is told apart from the index that a tag or a
// registry's digest usually names, which contains manifests of other platforms, and from
// the configuration, which runtimes call the image's ID: the runtime's word is the
// configuration; index and manifest are read from its store, their digests are computed
// here, and the manifest is the one that has that configuration. So neither a tag nor a
// field of the pod's decides what is attested.
//
// It refuses to pull, to start and to end anything, and to guess: an image whose manifest
// is not in the store is told with its configuration alone, and why.
//
// It starts no goroutine.
//
// Tour: cri.go (Runtime, Sandboxes), image.go (digests).
package cri
