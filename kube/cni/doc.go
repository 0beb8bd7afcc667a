// Package cni is how a container runtime tells the node's agent of pods: a plugin that
// is chained after the cluster's own network plugin (Container Network Interface 1.1),
// and what keeps it chained.
//
//	runtime --ADD--> the network's plugins --> assay-cni --agent.sock--> agent
//
// When ADD returns, the rules of a meshed pod are installed and its proxy accepts: no
// process of the pod ever ran uncaptured. The plugin has no state and decides nothing.
// It refuses to make or change a network, to be the first of a chain, and to let a pod
// start when the agent says that it should be meshed and cannot be.
//
// Without an agent, ADD fails and the runtime tries again: it cannot be known whether
// the pod should be meshed. DEL never fails for want of an agent, which finds out by
// itself what is gone when it is back.
//
// Invariants: what the earlier plugins returned is passed on unchanged; a configuration
// that is written is the one that was read, plus or minus the plugin.
//
// Goroutines: Keep's caller is one; nothing outlives a call.
//
// Tour: plugin.go (the commands), chain.go (the configuration), keep.go (the folder).
package cni
