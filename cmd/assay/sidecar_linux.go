package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"

	"assay.dev"
	"assay.dev/agent"
	knode "assay.dev/kube/node"
)

// Bounds of a sidecar.
const (
	// firstCertificate is how long connections wait for it: the API server hears of what a
	// container runs some moments after its start.
	firstCertificate = 15 * time.Second
	// sidecarEnds bounds the way out, within what the kubelet grants.
	sidecarEnds = 10 * time.Second
	// readyWithin bounds the question whether a sidecar is ready.
	readyWithin = 3 * time.Second
)

type sidecarOptions struct {
	state   string
	token   string
	proxy   string
	metrics string
	otlp    string
	ready   bool
}

func sidecarCommand() *cobra.Command {
	var o sidecarOptions
	cmd := &cobra.Command{
		Use:   "sidecar",
		Short: "Be the agent of one pod, in a container of it",
		Long: `Sidecar is the agent of the one pod that it is in, for clusters in which no privileged
DaemonSet may run. 'assay install --injector' has it put into pods that are labelled
assay.dev/mesh: sidecar, or whose namespace is; it is not started by hand.

It needs NET_ADMIN, NET_RAW, SETUID, SETGID and KILL, and no other privilege. What it has to
know is in its environment: ASSAY_CONTROL, ASSAY_TRUST, ASSAY_PROBES, ASSAY_PORTS, POD_NAMESPACE,
POD_NAME, POD_UID, POD_IPS, HOST_IPS, SERVICE_ACCOUNT and NODE_NAME.

It is ready when everything that the pod's containers will say goes through its proxy. It
ends at SIGTERM, which the kubelet sends when they have ended.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.ready {
				return sidecarReady(o.readySocket())
			}
			return runSidecar(cmd.Context(), &o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.state, "state", "/run/assay-sidecar", "the folder for state that a restart of the container goes on with")
	f.StringVar(&o.token, "token", "/var/run/secrets/assay/token", "the file with the service account's token, which is read at each join")
	f.StringVar(&o.proxy, "proxy", "", "the path of assay-proxy (beside this command)")
	f.StringVar(&o.metrics, "metrics", "", "where Prometheus finds metrics, as :9181; who is not in the mesh reads them in plaintext, in a strict namespace, too (nowhere)")
	f.StringVar(&o.otlp, "otlp", "", "the URL of a collector of spans, as in http://127.0.0.1:4318")
	f.BoolVar(&o.ready, "ready", false, "say whether the one that runs is ready, by the exit code, and end")
	return cmd
}

func (o *sidecarOptions) readySocket() string { return filepath.Join(o.state, "ready.sock") }

// sidecarReady asks the sidecar of this pod.
func sidecarReady(socket string) error {
	c, err := net.DialTimeout("unix", socket, readyWithin)
	if err != nil {
		return &assay.Error{Kind: assay.Unavailable, Op: "ask the sidecar", Err: errors.New("it is not ready"), Remedy: "its log says what it waits for"}
	}
	return c.Close()
}

// sidecarPod is what the environment says of the pod.
type sidecarPod struct {
	pod     agent.Pod
	name    string
	control string
	roots   []*x509.Certificate
	own     agent.Own
}

// readPod reads the environment of a sidecar.
func readPod(env func(string) string) (*sidecarPod, error) {
	var missing []string
	need := func(name string) string {
		v := env(name)
		if v == "" {
			missing = append(missing, name)
		}
		return v
	}
	p := &sidecarPod{
		pod:  agent.Pod{ID: need("POD_UID"), Namespace: need("POD_NAMESPACE"), Account: need("SERVICE_ACCOUNT")},
		name: need("POD_NAME"), control: need("ASSAY_CONTROL"), own: agent.Own{Node: nodeHostID(need("NODE_NAME"))},
	}
	trust, ips := need("ASSAY_TRUST"), need("POD_IPS")
	if len(missing) > 0 {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "read the sidecar's environment", Err: fmt.Errorf("without %s", strings.Join(missing, ", ")), Remedy: "have the injector make the container: label the namespace or the pod assay.dev/mesh: sidecar"}
	}
	var err error
	parse := func(name string, failed error) {
		if failed != nil && err == nil {
			err = &assay.Error{Kind: assay.Invalid, Op: "read the sidecar's environment: " + name, Err: failed}
		}
	}
	var failed error
	p.roots, failed = knode.ParseRoots([]byte(trust))
	parse("ASSAY_TRUST", failed)
	p.pod.Addrs, failed = listOf(ips, netip.ParseAddr)
	parse("POD_IPS", failed)
	p.own.Addrs, failed = listOf(env("HOST_IPS"), netip.ParseAddr)
	parse("HOST_IPS", failed)
	p.pod.Probes, failed = listOf(env("ASSAY_PROBES"), parsePort)
	parse("ASSAY_PROBES", failed)
	p.pod.Ports, failed = listOf(env("ASSAY_PORTS"), parsePort)
	parse("ASSAY_PORTS", failed)
	return p, err
}

// listOf reads what is separated by commas.
func listOf[T any](text string, read func(string) (T, error)) (list []T, err error) {
	for part := range strings.SplitSeq(text, ",") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}
		v, err := read(part)
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	return list, nil
}

func parsePort(text string) (uint16, error) {
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("port %q", text)
	}
	return uint16(n), nil
}

func runSidecar(ctx context.Context, o *sidecarOptions) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	p, err := readPod(os.Getenv)
	if err != nil {
		return err
	}
	if limit := memoryLimit(); limit > 0 { // of both processes together
		p.own.Memory = limit / 2
		debug.SetMemoryLimit(limit / 4)
	}
	if err := os.Remove(o.readySocket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return &assay.Error{Op: "open the sidecar's state", Err: err, Remedy: "give it a folder of its own with --state"}
	}
	host := p.pod.Namespace + "/" + p.name
	var remote *agent.Remote
	join := &agent.NodeJoin{
		Token: func() (string, error) { return readToken(o.token) },
		// Those of the time when the pod was made, and those that control has announced since.
		Roots: func(context.Context) ([]*x509.Certificate, error) { return append(remote.Roots(), p.roots...), nil },
	}
	data := filepath.Join(o.state, "agent")
	if remote, err = agent.Connect(ctx, agent.RemoteConfig{Address: p.control, DataDir: data, HostName: host, Node: join, Mark: agent.DefaultOwnMark, Log: log}); err != nil {
		return err
	}
	defer remote.Close()
	cfg := agent.Config{
		Hosts: remote, Bundle: remote.SetBundle, DataDir: data, RuntimeDir: filepath.Join(o.state, "run"), HostName: host,
		Proxy: o.proxy, OTLP: o.otlp, AccessLog: os.Stdout, CertificateWait: firstCertificate, Own: &p.own, Last: true, Build: buildVersion(), Log: log,
	}
	if o.metrics != "" {
		if cfg.Metrics, err = listenMetrics(o.metrics); err != nil {
			return err
		}
		p.own.Metrics = uint16(cfg.Metrics.Addr().(*net.TCPAddr).Port)
	}
	a, err := agent.New(cfg)
	if err != nil {
		return err
	}
	return serveSidecar(ctx, a, remote, p.pod, o.readySocket(), log)
}

// maxScrapes are the connections to a sidecar's metrics at once; others wait. Whoever reaches the pod may
// make one, and the pod's memory is small.
const maxScrapes = 16

func listenMetrics(address string) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, &assay.Error{Kind: assay.Conflict, Op: "serve metrics", Err: err, Remedy: "name another address with --metrics; injected pods have that of assay install --sidecar-metrics-port"}
	}
	return netutil.LimitListener(l, maxScrapes), nil
}

// serveSidecar runs an agent until ctx ends, which is when the pod's other containers have
// ended: then control is told, the proxy ends, and the agent after it.
func serveSidecar(ctx context.Context, a *agent.Agent, remote *agent.Remote, pod agent.Pod, ready string, log *slog.Logger) error {
	if err := a.TrackOwn(); err != nil {
		return err
	}
	serving, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	group, serving := errgroup.WithContext(serving)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(serving, cancel)() // what fails is the end, too
	group.Go(func() error { return remote.Run(serving) })
	group.Go(func() error { return a.Run(serving) })
	group.Go(func() error {
		defer stop()
		err := a.MeshOwn(ctx, pod)
		if err == nil {
			err = sayReady(ctx, ready, log)
		}
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), sidecarEnds)
		defer cancel()
		if ended := a.PodEnded(ending, pod.ID); ended != nil {
			log.Error("the pod's end takes too long", "err", ended)
		}
		if ctx.Err() != nil {
			return nil
		}
		return err
	})
	return group.Wait()
}

func readToken(file string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", &assay.Error{Kind: assay.Denied, Op: "read this pod's token", Err: err, Remedy: "project a service account's token with the audience \"assay\" into the container, and name it with --token"}
	}
	return strings.TrimSpace(string(b)), nil
}

// nodeHostID is what control calls the host that a node is, if it is one.
func nodeHostID(node string) string {
	sum := sha256.Sum256([]byte(node))
	return "node-" + hex.EncodeToString(sum[:8])
}

// sayReady answers on a socket until ctx ends.
func sayReady(ctx context.Context, socket string, log *slog.Logger) error {
	l, err := net.Listen("unix", socket)
	if err != nil {
		return &assay.Error{Op: "say that the sidecar is ready", Err: err}
	}
	log.Info("the pod is in the mesh")
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		c.Close()
	}
}

// memoryLimit is the container's own, in bytes; 0 when there is none, or it is not known.
func memoryLimit() int64 {
	for _, file := range []string{"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"} {
		b, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		if n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil && n < 1<<50 {
			return n
		}
	}
	return 0
}
