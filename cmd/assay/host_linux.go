package main

import "github.com/spf13/cobra"

// hostCommands are the commands that need Linux.
func hostCommands() []*cobra.Command {
	return []*cobra.Command{
		controlCommand(),
		upCommand(),
		demoCommand(),
		spaceCommand(),
		agentCommand(),
		sidecarCommand(),
		runCommand(),
	}
}
