// Assay is every role of the mesh but the data plane, and the command line.
//
// This package is wiring: it parses flags, opens what has to be open before a role
// starts, connects roles that do not know each other, and prints. What a role does
// is in its own package. It refuses to hold state or to decide anything.
//
// Conventions:
//
//   - One file per command, named for it, with one function that returns it; the
//     list is in main.go. What needs Linux has the suffix _linux.go and is listed in
//     host_linux.go; host_other.go says on other systems what is missing.
//   - Results go to standard output (cmd.OutOrStdout), everything else to standard
//     error. -o json is stable and documented.
//   - Exit codes: 0 ok, 1 error, 2 findings. A command that stands for another
//     process returns its code with exit.
//   - Flags are read once, checked as a whole, and passed on as a struct. No global
//     variables but version.
//   - The command's context ends at the first SIGINT or SIGTERM; a second one kills.
//
// Tour: main.go (root, exit codes), control_linux.go (control alone), up_linux.go
// (control and agent in one process), demo_linux.go (the bank); operator.go (how a
// command reaches control), plugin.go (how it does as a plugin of kubectl), kinds.go and output.go (tables), and a file for each
// command: apply.go, get.go, describe.go, stat.go, edges.go, check.go, token.go,
// operators.go.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
)

// version is set by the build (-X main.version).
var version = ""

// ownSignals is the annotation of a command that handles signals itself. Until it
// does, they have their default action.
const ownSignals = "own-signals"

func main() {
	if pluginMain(os.Args[0]) {
		return
	}
	root := rootCommand()
	ctx := context.Background()
	if cmd, _, err := root.Find(os.Args[1:]); err != nil || cmd.Annotations[ownSignals] == "" {
		var stop context.CancelFunc
		ctx, stop = signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
		// The first signal ends the context, the second has its default action.
		context.AfterFunc(ctx, stop)
	}
	os.Exit(execute(ctx, root, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run executes one command and returns its exit code.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	return execute(ctx, rootCommand(), args, stdin, stdout, stderr)
}

func execute(ctx context.Context, root *cobra.Command, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	code := 1
	if e, ok := errors.AsType[*exitError](err); ok {
		code, err = e.code, e.err
	}
	if err != nil {
		fmt.Fprintln(stderr, "assay:", err)
	}
	return code
}

// Exit codes with a meaning of their own; 1 is an error.
const exitFindings = 2

// exitError ends the process with a code. err is printed unless it is nil.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// exit is an error that ends the process with code and prints err, if there is one.
func exit(code int, err error) error { return &exitError{code, err} }

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "assay",
		Short: "A service mesh for people who must be able to prove what they run",
		Long: `Assay puts every connection between workloads under mutual TLS, with an identity at
each end that says which artifact runs there.

Begin with:
  assay demo                                    a meshed bank on this machine
  assay up                                      control and agent on this host
  assay run --service web --port 80 -- nginx    a workload`,
		SilenceErrors: true, // run prints them
		SilenceUsage:  true, // a runtime error is not a misuse
		Args:          cobra.NoArgs,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	if isPlugin() {
		root.Annotations = map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl assay"}
	}
	root.AddCommand(hostCommands()...)
	root.AddCommand(operatorCommands()...)
	root.AddCommand(versionCommand())
	return root
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print version, commit and platform",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "assay %s %s %s/%s\n", buildVersion(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
}

// buildVersion is what the build set, or the commit that Go recorded.
func buildVersion() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "dev"
	}
	rev, dirty := "dev", ""
	for _, s := range info.Settings {
		switch {
		case s.Key == "vcs.revision" && len(s.Value) >= 12:
			rev = s.Value[:12]
		case s.Key == "vcs.modified" && s.Value == "true":
			dirty = "-dirty"
		}
	}
	return rev + dirty
}
