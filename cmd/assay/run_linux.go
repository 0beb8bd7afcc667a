package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"assay.dev"
	"assay.dev/agent"
)

// Exit codes of `assay run` when the command could not be run; those of env(1).
const (
	exitNotExecutable = 126
	exitNotFound      = 127
)

type runOptions struct {
	request agent.RunRequest
	socket  string
	folder  string
	user    string
	ports   []uint
	labels  []string
	command []string
}

func runCommand() *cobra.Command {
	var o runOptions
	cmd := &cobra.Command{
		Use:   "run --service NAME [flags] -- COMMAND [ARGS]",
		Short: "Run a command as a mesh workload",
		Long: `Run starts COMMAND in a network namespace of its own, with its proxy in front of
it before it starts. The command is a child of this process: it has this terminal,
gets the signals that this process gets, and its exit code is ours (128 + N when
signal N ended it). When either ends, the workload does, and nothing of it is left.

Other workloads reach it as NAME or NAME.NAMESPACE on the ports given.`,
		Example: `  assay run --service web --port 80 -- nginx -g 'daemon off;'
  assay run --service client -- curl http://web/
  assay run --service api --port 8080 --artifact ./app --user www-data -- python3 app/main.py`,
		Args:        cobra.MinimumNArgs(1),
		Annotations: map[string]string{ownSignals: "yes"},
		RunE: func(cmd *cobra.Command, args []string) error {
			o.command = args
			return run1(context.WithoutCancel(cmd.Context()), &o)
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false) // flags after COMMAND are its own
	f.StringVar(&o.request.Service, "service", "", "the service that this is an instance of")
	f.StringVarP(&o.request.Namespace, "namespace", "n", "default", "its namespace")
	f.StringVar(&o.request.Account, "account", "", "its account, the last part of its identity (the service's name)")
	f.UintSliceVarP(&o.ports, "port", "p", nil, "a port on which the command will listen; may be repeated")
	f.StringArrayVarP(&o.labels, "label", "l", nil, "a label KEY=VALUE; may be repeated")
	f.StringVar(&o.request.Artifact, "artifact", "", "a file or folder that the command runs; proven with it and read-only to it")
	f.StringVarP(&o.user, "user", "u", "", "the user that the command runs as (NAME, UID or UID:GID)")
	f.StringVar(&o.socket, "socket", "", "the agent's socket")
	f.StringVar(&o.folder, "folder", "", "")
	f.MarkHidden("folder")
	cmd.MarkFlagRequired("service")
	return cmd
}

// run1 is one `assay run`: locate the agent, enter its namespaces if it lives in its
// own, take a place, start the command in it, and follow both to their ends.
func run1(ctx context.Context, o *runOptions) error {
	if o.folder != "" { // we come from enter
		if err := os.Chdir(o.folder); err != nil {
			return &assay.Error{Op: "run " + o.request.Service, Err: err, Remedy: "start it in another folder: this one is not there where the mesh lives, which keeps the mounts of its start"}
		}
	}
	if err := o.complete(); err != nil {
		return err
	}
	where, err := agent.Locate(o.socket)
	if err != nil {
		return err
	}
	if where.Rootless {
		if err := enter(where.PID, o.socket); err != nil {
			return err
		}
	} else if os.Geteuid() != 0 {
		return &assay.Error{Kind: assay.Denied, Op: "run " + o.request.Service, Err: errors.New("the agent belongs to root, and so does making network namespaces"),
			Remedy: "run as root (--user runs the command as somebody else), or start a mesh of your own: assay up"}
	}
	// Signals are ours from here on: a command that is being placed is not lost. What
	// is ignored stays so, for the command too: that is what nohup means.
	signals := make(chan os.Signal, 16)
	for _, s := range forwarded {
		if !signal.Ignored(s) {
			signal.Notify(signals, s)
		}
	}
	defer signal.Stop(signals)

	placing, cancel := context.WithCancel(ctx)
	defer cancel()
	p, err := place(placing, cancel, o, signals)
	if err != nil {
		return err
	}
	if p.Warning != "" {
		fmt.Fprintln(os.Stderr, "assay:", p.Warning)
	}
	return follow(ctx, p, o, signals)
}

// place waits for a place; a signal gives up.
func place(ctx context.Context, cancel func(), o *runOptions, signals <-chan os.Signal) (*agent.Placement, error) {
	type result struct {
		p   *agent.Placement
		err error
	}
	done := make(chan result, 1)
	go func() {
		p, err := agent.Place(ctx, o.socket, o.request)
		done <- result{p, err}
	}()
	for {
		select {
		case r := <-done:
			return r.p, r.err
		case sig := <-signals:
			if sig == syscall.SIGINT || sig == syscall.SIGTERM || sig == syscall.SIGHUP || sig == syscall.SIGQUIT {
				cancel()
				if r := <-done; r.p != nil {
					end(r.p)
				}
				return nil, exit(128+int(sig.(syscall.Signal)), nil)
			}
		}
	}
}

// endWithin is how long a command that has lost its workload may take to end.
const endWithin = 5 * time.Second

// follow starts the command, passes signals on, and returns its exit code.
func follow(ctx context.Context, p *agent.Placement, o *runOptions, signals <-chan os.Signal) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	lost := make(chan error, 1) // nil: the agent has removed the workload
	go func() { lost <- p.Run(ctx) }()
	c := &child{options: o, place: p, started: make(chan error, 1), ended: make(chan error, 1)}
	go c.run()
	if err := <-c.started; err != nil {
		end(p)
		return err
	}
	var insist <-chan time.Time
	for {
		select {
		case err := <-lost:
			lost = nil
			if err != nil {
				fmt.Fprintln(os.Stderr, "assay: the workload is cut off and its command is asked to end:", err)
			}
			// Also when the agent has ended what ran in it: a command that we started just
			// then it did not see.
			c.signal(syscall.SIGTERM)
			insist = time.After(endWithin)
		case <-insist:
			c.signal(syscall.SIGKILL)
		case sig := <-signals:
			s := sig.(syscall.Signal)
			if s == syscall.SIGTERM || s == syscall.SIGINT || s == syscall.SIGQUIT {
				p.Draining()
			}
			if !fromTerminal(s) {
				c.signal(s)
			}
		case err := <-c.ended:
			end(p)
			return exitOfCommand(err)
		}
	}
}

// end tells the agent that the command has ended, and waits a little for it to
// clean up. An agent that is gone does it when it is back.
func end(p *agent.Placement) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	p.Ended(ctx)
}

// complete checks what was given.
func (o *runOptions) complete() error {
	invalid := func(err error, remedy string) error {
		return &assay.Error{Kind: assay.Invalid, Op: "run " + o.request.Service, Err: err, Remedy: remedy}
	}
	if !assay.ValidName(o.request.Service) || !assay.ValidName(o.request.Namespace) || o.request.Account != "" && !assay.ValidName(o.request.Account) {
		return invalid(errors.New("service, namespace and account may hold a-z, 0-9 and '-', 63 characters at most"), "")
	}
	for _, p := range o.ports {
		if p == 0 || p > 65535 {
			return invalid(fmt.Errorf("port %d", p), "1 to 65535")
		}
		o.request.Ports = append(o.request.Ports, uint16(p))
	}
	for _, l := range o.labels {
		k, v, ok := strings.Cut(l, "=")
		if !ok || k == "" {
			return invalid(fmt.Errorf("label %q", l), "KEY=VALUE")
		}
		if o.request.Labels == nil {
			o.request.Labels = map[string]string{}
		}
		o.request.Labels[k] = v
	}
	if o.request.Artifact != "" {
		path, err := filepath.Abs(o.request.Artifact)
		if err == nil {
			path, err = filepath.EvalSymlinks(path)
		}
		if err != nil {
			return invalid(err, "")
		}
		o.request.Artifact = path
	}
	if o.socket == "" {
		o.socket = agentSocket()
	}
	return nil
}

// forwarded are the signals that the command gets from us.
var forwarded = []os.Signal{
	syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH, syscall.SIGALRM,
}

// fromTerminal reports whether the terminal has sent the signal to the command
// already: it goes to the whole foreground group, which is ours and the command's.
// A person who sends SIGINT with kill(1) to a foreground `assay run` is taken for the
// terminal; SIGTERM never is.
func fromTerminal(s syscall.Signal) bool {
	if s != syscall.SIGINT && s != syscall.SIGQUIT && s != syscall.SIGWINCH {
		return false
	}
	tty, err := os.Open("/dev/tty")
	if err != nil {
		return false
	}
	defer tty.Close()
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// enter runs this command again inside a rootless agent's namespaces, unless it is
// there already. Only util-linux' nsenter can do that: a program with several threads
// cannot enter a user namespace.
func enter(pid int, socket string) error {
	same := func(kind string) bool {
		a, err := os.Stat(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
		if err != nil {
			return false
		}
		b, err := os.Stat("/proc/self/ns/" + kind)
		return err == nil && os.SameFile(a, b)
	}
	if same("user") && same("net") {
		return nil
	}
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		return &assay.Error{Kind: assay.Unavailable, Op: "enter the agent's namespaces", Err: err, Remedy: "install util-linux"}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	wd, err := os.Getwd()
	if err != nil {
		return err
	}
	// The folder by its name: the one that we are in has none there. And the socket:
	// inside we look like root, who has another.
	argv := []string{"nsenter", "--user", "--preserve-credentials", "--net", "--mount", "--target", strconv.Itoa(pid), "--",
		self, os.Args[1], "--folder=" + wd, "--socket=" + socket}
	return syscall.Exec(nsenter, append(argv, os.Args[2:]...), os.Environ())
}

// child is what runs in the place. It is started by a thread that ends with it,
// because the thread is in the workload's namespaces.
type child struct {
	options *runOptions
	place   *agent.Placement
	process *os.Process
	started chan error // once
	ended   chan error // once, after a start that succeeded
}

func (c *child) signal(s syscall.Signal) { c.process.Signal(s) }

// run holds its thread until the command has ended: the kernel sends the command
// SIGKILL when the thread that started it ends, so nothing outlives this process.
func (c *child) run() {
	runtime.LockOSThread() // for ever
	if unix.Gettid() == os.Getpid() {
		// The main thread is what /proc shows of this process: it stays on the host.
		other := make(chan struct{})
		go func() { defer close(other); c.run() }()
		<-other
		runtime.UnlockOSThread()
		return
	}
	cmd, err := c.start()
	c.started <- err
	if err == nil {
		c.ended <- cmd.Wait()
	}
}

func (c *child) start() (*exec.Cmd, error) {
	o := c.options
	op := "run " + o.command[0]
	if err := c.place.Namespace.Enter(); err != nil {
		return nil, &assay.Error{Op: op, Err: err}
	}
	wd, err := os.Getwd()
	if err != nil {
		return nil, &assay.Error{Op: op, Err: err}
	}
	if err := mounts(c.place.ResolvConf, o.request.Artifact, c.place.Hidden); err != nil {
		return nil, &assay.Error{Op: op, Err: err}
	}
	if err := scopeSignals(); err != nil {
		return nil, &assay.Error{Op: op, Err: err}
	}
	cmd := exec.Command(o.command[0], o.command[1:]...)
	if err := lookedUp(op, cmd); err != nil {
		return nil, err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.Dir = os.Stdin, os.Stdout, os.Stderr, wd
	cmd.Env = append(os.Environ(), "ASSAY_WORKLOAD="+c.place.Workload, "ASSAY_IDENTITY="+c.place.Identity.String())
	pidfd := -1
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, PidFD: &pidfd}
	if err := as(cmd, o.user); err != nil {
		return nil, &assay.Error{Kind: assay.Invalid, Op: op, Err: err}
	}
	if err := boundCapabilities(); err != nil {
		return nil, &assay.Error{Op: op, Err: err}
	}
	err = cmd.Start()
	if errors.Is(err, os.ErrNotExist) {
		return nil, exit(exitNotFound, &assay.Error{Kind: assay.NotFound, Op: op, Err: err, Remedy: "see that the file exists, and the interpreter that its first line names"})
	}
	if err != nil {
		return nil, exit(exitNotExecutable, &assay.Error{Op: op, Err: err, Remedy: "see that the file may be executed by its user"})
	}
	c.process = cmd.Process
	if err := c.place.Started(os.NewFile(uintptr(pidfd), "pidfd")); err != nil {
		cmd.Process.Kill()
		cmd.Wait()
		return nil, &assay.Error{Op: op, Err: err}
	}
	return cmd, nil
}

func lookedUp(op string, cmd *exec.Cmd) error {
	switch err := cmd.Err; {
	case err == nil:
		return nil
	case errors.Is(err, exec.ErrDot):
		return exit(exitNotFound, &assay.Error{Kind: assay.NotFound, Op: op, Err: err, Remedy: "write ./" + cmd.Args[0]})
	case errors.Is(err, os.ErrPermission):
		return exit(exitNotExecutable, &assay.Error{Kind: assay.Denied, Op: op, Err: err})
	default:
		return exit(exitNotFound, &assay.Error{Kind: assay.NotFound, Op: op, Err: err, Remedy: "give its path, or see PATH"})
	}
}

// as sets the user. In a rootless agent's namespace the command is who called us,
// through a namespace of its own, in which it has no power over the network.
func as(cmd *exec.Cmd, name string) error {
	uid, gid, err := agent.OuterIDs()
	if err != nil {
		return err
	}
	if uid != 0 {
		if name != "" && name != strconv.Itoa(uid) {
			return fmt.Errorf("--user %s: without root a command runs as the user who calls", name)
		}
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: uid, HostID: 0, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: gid, HostID: 0, Size: 1}}
		return nil
	}
	if name == "" {
		return nil
	}
	u, err := findUser(name)
	if err != nil {
		return err
	}
	cmd.SysProcAttr.Credential = &u.Credential
	if u.home != "" {
		cmd.Env = append(cmd.Env, "HOME="+u.home, "USER="+u.name, "LOGNAME="+u.name)
	}
	return nil
}

type runAs struct {
	syscall.Credential
	name, home string
}

// findUser reads NAME, UID or UID:GID; a number needs no entry in the user database.
func findUser(s string) (runAs, error) {
	number, group, withGroup := strings.Cut(s, ":")
	u, err := user.Lookup(number)
	if err != nil {
		u, err = user.LookupId(number)
	}
	if err != nil {
		uid, bad := strconv.ParseUint(number, 10, 32)
		if bad != nil {
			return runAs{}, fmt.Errorf("--user %s: %w", s, err)
		}
		u = &user.User{Uid: number, Gid: strconv.FormatUint(uid, 10)}
	}
	var r runAs
	r.name, r.home = u.Username, u.HomeDir
	if withGroup {
		if g, err := user.LookupGroup(group); err == nil {
			group = g.Gid
		}
		u.Gid = group
	} else if ids, err := u.GroupIds(); err == nil && u.Username != "" {
		for _, id := range ids {
			if n, err := strconv.ParseUint(id, 10, 32); err == nil {
				r.Groups = append(r.Groups, uint32(n))
			}
		}
	}
	for _, x := range []struct {
		text string
		to   *uint32
	}{{u.Uid, &r.Uid}, {u.Gid, &r.Gid}} {
		n, err := strconv.ParseUint(x.text, 10, 32)
		if err != nil {
			return runAs{}, fmt.Errorf("--user %s: %q is no number", s, x.text)
		}
		*x.to = uint32(n)
	}
	return r, nil
}

// kept are the capabilities that a root command may still have: what services need to
// become somebody else and to own files. Everything that could change the network,
// other processes or the kernel is gone for good.
var kept = []uintptr{
	unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_DAC_READ_SEARCH, unix.CAP_FOWNER, unix.CAP_FSETID, unix.CAP_KILL, unix.CAP_SETGID,
	unix.CAP_SETUID, unix.CAP_SETPCAP, unix.CAP_NET_BIND_SERVICE, unix.CAP_IPC_LOCK, unix.CAP_SYS_CHROOT, unix.CAP_SYS_NICE,
	unix.CAP_SYS_RESOURCE, unix.CAP_SYS_TTY_CONFIG, unix.CAP_LEASE, unix.CAP_AUDIT_WRITE, unix.CAP_SETFCAP,
}

// boundCapabilities takes all others out of the calling thread's bounding set.
func boundCapabilities() error {
	keep := map[uintptr]bool{}
	for _, c := range kept {
		keep[c] = true
	}
	for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
		if keep[c] {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil && err != unix.EINVAL {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	return nil
}

// exitOfCommand turns how the command ended into our exit code.
func exitOfCommand(err error) error {
	ended, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		return err
	}
	if st, ok := ended.Sys().(syscall.WaitStatus); ok && st.Signaled() {
		return exit(128+int(st.Signal()), nil)
	}
	return exit(ended.ExitCode(), nil)
}
