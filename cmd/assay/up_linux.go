package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"assay.dev"
	"assay.dev/agent"
	"assay.dev/control"
	"assay.dev/identity"
	"assay.dev/kube"
)

// up is control and agent in one process: `assay up`.
type up struct {
	data        string
	runtime     string
	config      string
	trustDomain string
	metrics     string
	listen      string
	advertise   string
	zone        string
	proxy       string
	proxyDrain  time.Duration
	accessLog   string
	otlp        string
	keep        bool
	leafLife    time.Duration
	verbose     bool
	inherit     string // sockets from outside of our network namespace

	sockets  sockets
	out      io.Writer
	log      *slog.Logger
	rootless bool
	ready    bool // once
}

func upCommand() *cobra.Command {
	u := &up{}
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Run control and agent on this host",
		Long: `Up runs the whole mesh of one host in this process: control with its state in --data,
and the agent that meshes what is started with 'assay run'. It is ready in less than
three seconds and says so, to a service manager too (sd_notify).

At SIGINT or SIGTERM it ends all workloads and removes what it made; with --keep they
go on, and the next 'assay up' on the same folders takes them over. After SIGKILL that
is what happens in any case.

At SIGUSR2, and when it starts, it replaces the proxies that do not execute what
assay-proxy is now: a successor is started beside each, connections move to it between
two requests, and what cannot move goes on in the old one for at most --proxy-drain.

Without root it works where the kernel allows unprivileged user namespaces, in a
network of its own.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			u.out = cmd.OutOrStdout()
			level := slog.LevelInfo
			if u.verbose {
				level = slog.LevelDebug
			}
			u.log = slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
			err := u.run(cmd.Context())
			if !u.ready {
				err = unlessStopped(cmd.Context(), err)
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&u.data, "data", defaultData(), "`folder` for state that survives a restart")
	f.StringVar(&u.runtime, "runtime", defaultRuntime(), "`folder` for sockets ($ASSAY_RUNTIME)")
	f.StringVar(&u.config, "config", "", "`folder` with intent in YAML, watched")
	f.StringVar(&u.trustDomain, "trust-domain", "", "`name` of a new mesh (assay.local)")
	f.StringVar(&u.metrics, "metrics", "", "`address` for Prometheus, or fd:N for an inherited socket")
	f.StringVar(&u.listen, "listen", "", "`address` for agents of other hosts and remote operators, or fd:N")
	f.StringVar(&u.zone, "zone", "", "`name` of what the host fails together with and is near to")
	f.StringVar(&u.advertise, "advertise", "", "`address` where other hosts route this host's workloads to")
	f.StringVar(&u.proxy, "proxy", "", "`path` of assay-proxy (beside this binary)")
	f.DurationVar(&u.proxyDrain, "proxy-drain", agent.DefaultProxyDrain, "how long a proxy that was upgraded goes on with what cannot move")
	f.StringVar(&u.accessLog, "access-log", "", "`file` for requests of namespaces that ask for it (access.log in --data)")
	f.StringVar(&u.otlp, "otlp", "", "`URL` of a collector of spans, as in http://127.0.0.1:4318")
	f.DurationVar(&u.leafLife, "leaf-life", identity.WorkloadLife, "how long workloads' certificates live; renewed at half of it")
	f.BoolVar(&u.keep, "keep", false, "leave workloads running at the end")
	f.BoolVarP(&u.verbose, "verbose", "v", false, "log more")
	f.StringVar(&u.inherit, "inherit", "", "")
	f.MarkHidden("inherit")
	return cmd
}

func (u *up) run(ctx context.Context) error {
	if err := u.check(); err != nil {
		return err
	}
	if u.inherit != "" { // we are in the network that reenter made
		u.rootless = true
		if err := u.sockets.inherit(u.inherit); err != nil {
			return err
		}
		return u.serve(ctx)
	}
	for _, folder := range []struct {
		flag, dir string
		mode      os.FileMode
	}{{"--data", u.data, 0o700}, {"--runtime", u.runtime, 0o755}} {
		lock, err := lockFolder(folder.flag, folder.dir, folder.mode)
		if err != nil {
			return err
		}
		defer lock.Close()
	}
	if os.Geteuid() != 0 {
		return u.reenter(ctx)
	}
	return u.serve(ctx)
}

// check finds what is wrong before anything is touched, and makes paths absolute.
func (u *up) check() error {
	bad := func(flag string, err error, remedy string) error {
		return &assay.Error{Kind: assay.Invalid, Op: "up " + flag, Err: err, Remedy: remedy}
	}
	for _, path := range []*string{&u.data, &u.runtime, &u.config, &u.proxy, &u.accessLog} {
		if *path == "" {
			continue
		}
		abs, err := filepath.Abs(*path)
		if err != nil {
			return err
		}
		*path = abs
	}
	if u.config != "" {
		if st, err := os.Stat(u.config); err != nil {
			return bad("--config "+u.config, err, "name a folder that exists")
		} else if !st.IsDir() {
			return bad("--config "+u.config, errors.New("not a folder"), "name the folder of the files; 'assay apply -f' takes single ones")
		}
	}
	if u.trustDomain != "" && !assay.ValidTrustDomain(u.trustDomain) {
		return bad("--trust-domain "+u.trustDomain, errors.New("not a trust domain"), "use a-z, 0-9, '.', '-' and '_'")
	}
	if err := checkZone(u.zone); err != nil {
		return err
	}
	if u.advertise != "" {
		if _, err := netip.ParseAddr(u.advertise); err != nil {
			return bad("--advertise "+u.advertise, err, "name one IP address")
		}
	}
	if os.Geteuid() == 0 && u.inherit == "" {
		if err := reachable(u.runtime); err != nil {
			return bad("--runtime "+u.runtime, err, "proxies are users of their own and must find the agent there: chmod o+x, or name another folder")
		}
	}
	if u.keep && os.Geteuid() != 0 {
		return bad("--keep", errors.New("without root the network ends with this process"), "leave the flag out, or run as root")
	}
	return nil
}

// reachable reports which folder on the way to path keeps other users out.
func reachable(path string) error {
	for dir := path; ; dir = filepath.Dir(dir) {
		st, err := os.Stat(dir)
		switch {
		case errors.Is(err, os.ErrNotExist): // made later, open to others
		case err != nil:
			return err
		case st.Mode().Perm()&1 == 0:
			return fmt.Errorf("%s is closed to other users (mode %04o)", dir, st.Mode().Perm())
		}
		if dir == filepath.Dir(dir) {
			return nil
		}
	}
}

// reenter runs us again in a user and network namespace of our own. What people
// connect to is opened here, where they are.
func (u *up) reenter(ctx context.Context) error {
	defer u.sockets.close()
	if err := u.sockets.open(u.runtime, u.metrics, u.listen); err != nil {
		return &assay.Error{Op: "up", Err: err}
	}
	files, names, err := u.sockets.bequeath()
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if err != nil {
		return &assay.Error{Op: "up", Err: err}
	}
	args := []string{"up", "--data", u.data, "--runtime", u.runtime, "--leaf-life", u.leafLife.String(), "--proxy-drain", u.proxyDrain.String(), "--inherit", names}
	for _, opt := range [][2]string{{"--config", u.config}, {"--trust-domain", u.trustDomain}, {"--advertise", u.advertise}, {"--zone", u.zone}, {"--proxy", u.proxy}, {"--access-log", u.accessLog}, {"--otlp", u.otlp}} {
		if opt[1] != "" {
			args = append(args, opt[0], opt[1])
		}
	}
	if u.verbose {
		args = append(args, "--verbose")
	}
	signal.Ignore(syscall.SIGUSR2) // it is for the agent in there; we would end by it
	return (&space{args: args, files: files, dir: u.runtime}).run(ctx)
}

// serve is the mesh. Control starts first and stops last: the agent tells it what
// ended.
func (u *up) serve(ctx context.Context) (err error) {
	begun := time.Now()
	proxy := u.proxy
	if proxy == "" {
		if proxy, err = beside("assay-proxy"); err != nil {
			return err
		}
	}
	if _, err := os.Stat(proxy); err != nil {
		return &assay.Error{Kind: assay.NotFound, Op: "up", Err: err, Remedy: "install assay-proxy beside assay (make build), or name it with --proxy"}
	}
	ctl, err := control.Open(ctx, control.Config{
		Data: filepath.Join(u.data, "control"), TrustDomain: u.trustDomain, Intent: u.config, Translate: kube.Translate, LeafLife: u.leafLife,
		Log: u.log.With("role", "control"),
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ctl.Close()) }()
	defer u.sockets.close()
	if err := u.sockets.open(u.runtime, u.metrics, u.listen); err != nil {
		return &assay.Error{Op: "up", Err: err}
	}

	serving, stopControl := context.WithCancel(context.WithoutCancel(ctx))
	defer stopControl()
	group, failed := errgroup.WithContext(serving)
	group.Go(func() error { return ctl.Run(failed) })
	group.Go(func() error { return ctl.ServeOperators(failed, u.sockets.control) })
	if u.sockets.remote != nil {
		group.Go(func() error { return ctl.ServeRemote(failed, u.sockets.remote) })
	}
	agentErr := u.agent(ctx, failed, ctl, proxy, begun)
	notify("STOPPING=1")
	stopControl()
	return errors.Join(agentErr, group.Wait())
}

// agent runs the agent until ctx ends, or until control has failed.
func (u *up) agent(ctx, control context.Context, ctl *control.Control, proxy string, begun time.Time) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(control, cancel)()
	hosts, err := ctl.LocalHost(ctx)
	if err != nil {
		return err
	}
	access, err := openLogFile(cmp.Or(u.accessLog, filepath.Join(u.data, "access.log")), largestLog)
	if err != nil {
		return err
	}
	cfg := agent.Config{
		AccessLog: access, OTLP: u.otlp,
		Hosts: hosts, DataDir: filepath.Join(u.data, "agent"), RuntimeDir: u.runtime, Listener: u.sockets.agent, Metrics: u.sockets.metrics,
		Hidden: []string{u.data, u.runtime}, Proxy: proxy, ProxyDrain: u.proxyDrain, EndWorkloads: !u.keep, Last: u.rootless, Build: buildVersion(), Log: u.log.With("role", "agent"),
	}
	cfg.Zone = u.zone
	if u.advertise != "" {
		cfg.Advertise = netip.MustParseAddr(u.advertise)
	}
	a, err := agent.New(cfg)
	if err != nil {
		return err
	}
	defer upgradeOnSignal(ctx, a, u.log)()
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	select {
	case err := <-done:
		return err
	case <-a.Ready():
	}
	u.ready = true
	u.announce(ctl.TrustDomain(), time.Since(begun), ctl.IntentProblem())
	notify("READY=1")
	return <-done
}

// announce says that we are ready, and what to do next.
func (u *up) announce(trustDomain string, took time.Duration, intent error) {
	fmt.Fprintf(u.out, "assay is ready after %s: trust domain %s, state in %s\n", took.Round(time.Millisecond), trustDomain, u.data)
	env := ""
	if u.runtime != usualRuntime() {
		env = runtimeEnv + "=" + u.runtime + " "
	}
	fmt.Fprintf(u.out, "  a workload:      %sassay run --service NAME --port PORT -- COMMAND\n", env)
	fmt.Fprintf(u.out, "  who talks:       %sassay edges\n", env)
	fmt.Fprintf(u.out, "  golden signals:  %sassay stat\n", env)
	if u.sockets.metrics != nil {
		fmt.Fprintf(u.out, "  Prometheus:      http://%s/metrics\n", u.sockets.metrics.Addr())
	}
	if intent != nil {
		fmt.Fprintf(u.out, "  %s is not in effect: %v\n", u.config, intent)
	}
	if u.rootless {
		for _, line := range agent.Missing() {
			fmt.Fprintf(u.out, "  without root:    %s\n", line)
		}
	}
}
