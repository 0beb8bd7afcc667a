//go:build !linux

package main

import (
	"errors"
	"runtime"

	"github.com/spf13/cobra"

	"assay.dev"
)

// pluginMain: there are no network plugins.
func pluginMain(string) bool { return false }

// hostCommands are the commands that put workloads into a mesh. They exist on every
// system so that whoever tries one is told what is missing.
func hostCommands() []*cobra.Command {
	var list []*cobra.Command
	for _, c := range []struct{ use, short string }{
		{"control", "Run the control of a mesh (Linux)"},
		{"up", "Run control and agent on this host (Linux)"},
		{"agent", "Run the agent of this host (Linux)"},
		{"sidecar", "Be the agent of one pod, in a container of it (Linux)"},
		{"run", "Run a command as a mesh workload (Linux)"},
		{"demo", "A meshed bank on this machine (Linux)"},
	} {
		list = append(list, &cobra.Command{
			Use:                c.use,
			Short:              c.short,
			DisableFlagParsing: true, // whatever the flags, the answer is the same
			RunE: func(*cobra.Command, []string) error {
				return &assay.Error{
					Kind: assay.Unavailable,
					Op:   c.use,
					Err: errors.New(runtime.GOOS + " has no network namespaces, veth links, nftables and transparent sockets, " +
						"by which a workload is meshed"),
					Remedy: "use a Linux machine or virtual machine; commands that only talk to control work here",
				}
			},
		})
	}
	return list
}
