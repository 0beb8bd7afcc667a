package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"assay.dev"
	"assay.dev/demo"
)

// demoRun is `assay demo`: this process makes a folder and a network namespace, and
// in it runs itself again as the stage.
type demoRun struct {
	check bool
	bank  string
	proxy string
	rate  float64
}

func demoCommand() *cobra.Command {
	d := &demoRun{}
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "A meshed bank on this machine; Ctrl-C ends it",
		Long: `Demo runs a small bank of unmodified programs (HTTP, gRPC, and NATS, whose server
speaks first) as mesh workloads in a network namespace of its own, drives it with a
bounded load, and shows who talks to whom. The host's network is not touched; Ctrl-C
ends everything and leaves nothing behind.

With --check it runs unattended, looks at every packet, kills control and agent under
load, and prints what held: exit code 0 if everything did, 1 if not.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return d.run(cmd) },
	}
	f := cmd.Flags()
	f.BoolVar(&d.check, "check", false, "verify unattended and print a summary")
	f.StringVar(&d.bank, "bank", "", "`path` of the bank (beside this binary)")
	f.StringVar(&d.proxy, "proxy", "", "`path` of assay-proxy (beside this binary)")
	f.Float64Var(&d.rate, "rate", 60, "requests per second of the load generator")
	cmd.AddCommand(stageCommand())
	return cmd
}

func (d *demoRun) run(cmd *cobra.Command) (err error) {
	if d.rate <= 0 || d.rate > 10_000 {
		return &assay.Error{Kind: assay.Invalid, Op: "demo --rate", Err: fmt.Errorf("%v is not between 0 and 10000", d.rate), Remedy: "60 is a good start"}
	}
	for _, b := range []struct {
		path *string
		name string
	}{{&d.bank, "bank"}, {&d.proxy, "assay-proxy"}} {
		if *b.path == "" {
			if *b.path, err = beside(b.name); err != nil {
				return err
			}
		}
		if *b.path, err = filepath.Abs(*b.path); err != nil {
			return err
		}
		if _, err := os.Stat(*b.path); err != nil {
			return &assay.Error{Kind: assay.NotFound, Op: "demo", Err: err, Remedy: "make build, and use bin/assay; or name it with --" + filepath.Base(b.name)}
		}
	}
	dir, err := demoFolder()
	if err != nil {
		return &assay.Error{Op: "demo", Err: err}
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir.Name()), dir.Close()) }()
	args := []string{"demo", "stage", "--dir", dir.Name(), "--bank", d.bank, "--proxy", d.proxy, "--rate", fmt.Sprint(d.rate)}
	s := &space{pids: true, dir: dir.Name()}
	if d.check {
		args = append(args, "--check")
	} else {
		// What a browser and Prometheus reach is opened here, outside.
		for _, name := range []string{"page", "metrics"} {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			defer l.Close()
			f, err := l.(*net.TCPListener).File()
			if err != nil {
				return err
			}
			defer f.Close()
			args = append(args, "--"+name, fmt.Sprintf("fd:%d", 3+len(s.files)))
			s.files = append(s.files, f)
		}
	}
	s.args = args
	return s.run(cmd.Context())
}

const demoPrefix = "assay-demo-"

// demoFolder makes a folder, which is locked as long as it is open, and removes those
// that demos left that were killed. For root it is in /run, where no folder on the way
// keeps other users out: proxies are such.
func demoFolder() (*os.File, error) {
	base := os.TempDir()
	if os.Geteuid() == 0 {
		base = "/run"
	}
	old, err := filepath.Glob(filepath.Join(base, demoPrefix+"[0-9]*"))
	if err != nil {
		return nil, err
	}
	for _, path := range old {
		if st, err := os.Lstat(path); err != nil || !st.IsDir() || st.Sys().(*syscall.Stat_t).Uid != uint32(os.Geteuid()) {
			continue // somebody else's
		}
		f, err := lockedFolder(path)
		if err != nil {
			continue // a demo that runs
		}
		err = os.RemoveAll(path)
		f.Close()
		if err != nil {
			return nil, err
		}
	}
	path, err := os.MkdirTemp(base, demoPrefix)
	if err != nil {
		return nil, err
	}
	return lockedFolder(path)
}

func lockedFolder(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}

// stageCommand is the demo inside its network namespace.
func stageCommand() *cobra.Command {
	var (
		stage         demo.Stage
		check         bool
		page, metrics string
	)
	cmd := &cobra.Command{
		Use:    "stage",
		Short:  "The demo inside its network namespace",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if stage.Assay, err = os.Executable(); err != nil {
				return err
			}
			if check {
				return runCheck(cmd, &stage)
			}
			if page != "" {
				if stage.Page, err = listenTCP(page); err != nil {
					return err
				}
			}
			if metrics != "" {
				l, err := listenTCP(metrics)
				if err != nil {
					return err
				}
				defer l.Close()
				if stage.Metrics, err = l.(*net.TCPListener).File(); err != nil {
					return err
				}
				defer stage.Metrics.Close()
				metrics = l.Addr().String()
			}
			return runLive(cmd, &stage, metrics)
		},
	}
	f := cmd.Flags()
	f.StringVar(&stage.Dir, "dir", "", "empty `folder`")
	f.StringVar(&stage.Bank, "bank", "", "`path` of the bank")
	f.StringVar(&stage.Proxy, "proxy", "", "`path` of assay-proxy")
	f.Float64Var(&stage.Rate, "rate", 60, "requests per second")
	f.BoolVar(&check, "check", false, "verify")
	f.StringVar(&page, "page", "", "fd:N")
	f.StringVar(&metrics, "metrics", "", "fd:N")
	return cmd
}

// checkWithin bounds the whole check.
const checkWithin = 3 * time.Minute

func runCheck(cmd *cobra.Command, stage *demo.Stage) error {
	ctx, cancel := context.WithTimeoutCause(cmd.Context(), checkWithin, fmt.Errorf("not finished after %s", checkWithin))
	defer cancel()
	begun := time.Now()
	out := cmd.OutOrStdout()
	verdicts, err := stage.Check(ctx, out)
	if err != nil {
		fmt.Fprintln(out, "\nthe last words of each process:")
		stage.Tails(out)
		return &assay.Error{Op: "demo --check", Err: err}
	}
	fmt.Fprintln(out)
	ok, err := demo.WriteSummary(out, verdicts, time.Since(begun))
	if err != nil {
		return err
	}
	if !ok {
		return exit(1, nil)
	}
	return nil
}

func runLive(cmd *cobra.Command, stage *demo.Stage, metrics string) error {
	view := &demo.View{Out: cmd.OutOrStdout(), Every: 5 * time.Second, Header: []string{
		"assay demo: a bank of unmodified programs, meshed, in a network of its own. Ctrl-C ends it.",
		"",
		fmt.Sprintf("  the bank     http://%s/  (you are outside the mesh: watch the exception appear)", stage.Page.Addr()),
		fmt.Sprintf("  Prometheus   http://%s/metrics", metrics),
		fmt.Sprintf("  in a shell   export %s=%s; then: assay edges, assay stat, assay get certificates", runtimeEnv, filepath.Dir(stage.ControlSocket())),
	}}
	if f, ok := cmd.OutOrStdout().(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		view.Terminal = true
		view.Size = func() (int, int) {
			columns, rows, err := term.GetSize(int(f.Fd()))
			if err != nil {
				return 80, 24
			}
			return columns, rows
		}
	}
	err := stage.Live(cmd.Context(), view)
	if err != nil {
		fmt.Fprintln(cmd.ErrOrStderr(), "\nthe last words of each process:")
		stage.Tails(cmd.ErrOrStderr())
		return &assay.Error{Op: "demo", Err: err}
	}
	return nil
}
