package main

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"assay.dev"
	"assay.dev/agent"
)

type agentOptions struct {
	config    agent.Config
	remote    agent.RemoteConfig
	data      string
	tokenFile string
	metrics   string
	advertise string
	accessLog string
	node      nodeOptions
}

func agentCommand() *cobra.Command {
	var o agentOptions
	cmd := &cobra.Command{
		Use:   "agent --control ADDRESS [--token-file FILE | --node NAME]",
		Short: "Run the agent of this host",
		Long: `Agent joins this host to a mesh whose control runs on another machine, and places
the workloads that 'assay run' starts here. The token is needed once; make one with
'assay token create' where control runs.

Workloads and their proxies outlive the agent: the next one continues with them. At
SIGUSR2, and when it starts, it replaces the proxies that do not execute what
assay-proxy is now, without losing a connection (see 'assay up --help').

With --node it is the agent of a Kubernetes node: the pods of the node that are labelled
assay.dev/mesh: enabled, or whose namespace is, are in the mesh. It joins with its
service account's token, keeps a network plugin chained after the cluster's own, and
puts proxies where they outlive its container. It needs root, hostPID, hostNetwork and,
each at its own path, the node's /run, --data, --cni-conf, --cni-bin and --cgroup.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return runAgent(cmd.Context(), &o) },
	}
	f := cmd.Flags()
	f.StringVar(&o.remote.Address, "control", "", "control's address, HOST:PORT")
	f.StringVar(&o.remote.Token, "join", "", "a join token (better: --token-file, which other users cannot see)")
	f.StringVar(&o.tokenFile, "token-file", "", "a file with a join token")
	f.StringVar(&o.data, "data", "", "the folder for state that survives a restart (/var/lib/assay)")
	f.StringVar(&o.config.RuntimeDir, "runtime", "", "the folder for sockets (/run/assay)")
	f.StringVar(&o.config.HostName, "host-name", "", "this host's name, for people (the machine's)")
	f.StringVar(&o.config.Zone, "zone", "", "what the host fails together with and is near to, a room or an availability zone; endpoints in the same one are preferred")
	f.StringVar(&o.advertise, "advertise", "", "the address by which other hosts reach this one (that of the route to control)")
	f.StringVar(&o.config.Bridge, "bridge", "", "the name of this host's bridge (assay0)")
	f.StringVar(&o.config.Proxy, "proxy", "", "the path of assay-proxy (beside this command)")
	f.StringVar(&o.accessLog, "access-log", "", "the file for requests of namespaces that ask for it (access.log in --data)")
	f.StringVar(&o.config.OTLP, "otlp", "", "the URL of a collector of spans, as in http://127.0.0.1:4318")
	f.DurationVar(&o.config.ProxyDrain, "proxy-drain", agent.DefaultProxyDrain, "how long a proxy that was upgraded goes on with what cannot move")
	f.DurationVar(&o.config.OlderGrace, "older-grace", agent.DefaultOlderGrace, "how long connections that are older than a pod's capture, and plaintext of before, may go on in a strict namespace")
	f.StringVar(&o.metrics, "metrics", "127.0.0.1:9181", "where Prometheus finds metrics; \"\" for nowhere")
	cmd.MarkFlagRequired("control")
	o.node.flags(f)
	return cmd
}

func runAgent(ctx context.Context, o *agentOptions) error {
	if os.Geteuid() != 0 {
		return &assay.Error{Kind: assay.Denied, Op: "run the agent", Err: errors.New("it makes network namespaces, links and rules"), Remedy: "run as root; for a try-out without root: assay up"}
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if o.data == "" {
		o.data = defaultData()
	}
	o.config.DataDir = filepath.Join(o.data, "agent")
	if o.config.RuntimeDir == "" {
		o.config.RuntimeDir = defaultRuntime()
	}
	o.config.Hidden = []string{o.data, o.config.RuntimeDir} // control's are there too, if it runs here
	if o.node.release {
		return releaseNode(ctx, o, log)
	}
	if o.tokenFile != "" {
		b, err := os.ReadFile(o.tokenFile)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return &assay.Error{Kind: assay.Invalid, Op: "read the join token", Err: err}
		}
		o.remote.Token = strings.TrimSpace(string(b)) // a host that has joined needs none
	}
	o.remote.DataDir, o.remote.HostName, o.remote.Log = o.config.DataDir, o.config.HostName, log
	var err error
	if err := checkZone(o.config.Zone); err != nil {
		return err
	}
	var n *node
	if o.node.name != "" {
		if n, err = openNode(o, log); err != nil {
			return err
		}
		defer n.close()
	} else if o.config.Advertise, err = advertised(o.advertise, o.remote.Address); err != nil {
		return err
	}
	if o.metrics != "" {
		if o.config.Metrics, err = net.Listen("tcp", o.metrics); err != nil {
			return &assay.Error{Op: "serve metrics", Err: err, Remedy: "name another address with --metrics"}
		}
	}
	remote, err := agent.Connect(ctx, o.remote)
	if err != nil {
		return err
	}
	defer remote.Close()
	o.config.Hosts, o.config.Bundle, o.config.Log, o.config.Build = remote, remote.SetBundle, log, buildVersion()
	if o.config.AccessLog, err = openLogFile(cmp.Or(o.accessLog, filepath.Join(o.data, "access.log")), largestLog); err != nil {
		return err
	}
	a, err := agent.New(o.config)
	if err != nil {
		return err
	}
	defer upgradeOnSignal(ctx, a, log)()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return remote.Run(ctx) })
	group.Go(func() error { return a.Run(ctx) })
	if n != nil {
		n.host.agent = a
		group.Go(func() error { return n.run(ctx) })
	}
	return group.Wait()
}

// upgradeOnSignal upgrades proxies at SIGUSR2 until the function that it returns is
// called.
func upgradeOnSignal(ctx context.Context, a *agent.Agent, log *slog.Logger) (stop func()) {
	wanted, done := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(wanted, syscall.SIGUSR2)
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		defer close(done)
		for {
			select {
			case <-ctx.Done():
				return
			case <-wanted:
				if err := a.Upgrade(); err != nil {
					log.Error("proxies are not upgraded", "err", err)
				}
			}
		}
	}()
	return func() {
		signal.Stop(wanted)
		cancel()
		<-done
	}
}

func checkZone(zone string) error {
	if zone == "" || assay.ValidName(zone) {
		return nil
	}
	return &assay.Error{Kind: assay.Invalid, Op: "--zone " + zone, Err: errors.New("not a name"), Remedy: "a-z, 0-9 and '-', 63 characters at most"}
}

// advertised is the address that was given, or the one from which this host reaches
// control.
func advertised(given, control string) (netip.Addr, error) {
	if given != "" {
		a, err := netip.ParseAddr(given)
		if err != nil {
			return a, &assay.Error{Kind: assay.Invalid, Op: "--advertise", Err: err}
		}
		return a, nil
	}
	c, err := net.Dial("udp", control) // sends nothing; asks the routing table
	if err != nil {
		return netip.Addr{}, &assay.Error{Kind: assay.Invalid, Op: "--control " + control, Err: err, Remedy: "want HOST:PORT"}
	}
	defer c.Close()
	a := c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
	if a.IsLoopback() {
		return netip.Addr{}, nil // control is here; there may be no other host
	}
	return a, nil
}

// agentSocket is where `assay run` finds the agent.
func agentSocket() string { return filepath.Join(defaultRuntime(), agent.SocketName) }
