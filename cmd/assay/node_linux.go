package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"

	"assay.dev"
	"assay.dev/agent"
	"assay.dev/kube/cni"
	"assay.dev/kube/cri"
	knode "assay.dev/kube/node"
)

// nodeOptions are those of the agent of a Kubernetes node.
type nodeOptions struct {
	name       string
	kubeconfig string
	namespace  string
	cri        string
	cniConf    string
	cniBin     string
	token      string
	trust      string
	cgroup     string
	memory     string
	kubelet    uint16
	release    bool
}

func (o *nodeOptions) flags(f *pflag.FlagSet) {
	f.StringVar(&o.name, "node", "", "be the agent of this Kubernetes node")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "how to reach the API server (the pod's service account)")
	f.StringVar(&o.namespace, "namespace", "", "with --node: Assay's own namespace (the pod's; "+knode.DefaultSystem+")")
	f.StringVar(&o.cri, "cri", "", "the container runtime's socket (containerd's or CRI-O's, whichever there is)")
	f.StringVar(&o.cniConf, "cni-conf", "/etc/cni/net.d", "the folder of network configurations")
	f.StringVar(&o.cniBin, "cni-bin", "/opt/cni/bin", "the folder of network plugins")
	f.StringVar(&o.token, "node-token", "/var/run/secrets/assay/token", "the file with the service account's token, which is read at each join")
	f.StringVar(&o.trust, "trust", "", "a file with control's roots in PEM (ConfigMap "+knode.TrustMap+")")
	f.StringVar(&o.cgroup, "cgroup", "/sys/fs/cgroup", "where the node's control groups are mounted; \"\": proxies stay in the agent's")
	f.StringVar(&o.memory, "proxy-memory", "256Mi", "what the proxies of one pod may use; 0 for no limit")
	f.Uint16Var(&o.kubelet, "kubelet-port", 10250, "where the node's kubelet listens: its probes reach pods though they are no mesh traffic")
	f.BoolVar(&o.release, "release", false, "with --node: unchain and remove the network plugin, release every pod, and end")
}

// runtimeSockets are where container runtimes usually are.
var runtimeSockets = []string{"/run/containerd/containerd.sock", "/run/crio/crio.sock", "/run/k3s/containerd/containerd.sock"}

// socket is the runtime's: the one that was given, or that there is.
func (o *nodeOptions) socket() (string, error) {
	if o.cri != "" {
		return strings.TrimPrefix(o.cri, "unix://"), nil
	}
	for _, path := range runtimeSockets {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", &assay.Error{Kind: assay.NotFound, Op: "find the container runtime", Err: fmt.Errorf("none of %s is there", strings.Join(runtimeSockets, ", ")), Remedy: "name its socket with --cri; in a pod, the node's /run must be at /run"}
}

// system is the namespace that Assay runs in.
func (o *nodeOptions) system() string {
	own, _ := os.ReadFile("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
	return cmp.Or(o.namespace, strings.TrimSpace(string(own)), knode.DefaultSystem)
}

// node is what the agent of a Kubernetes node has beside itself.
type node struct {
	options    *nodeOptions
	log        *slog.Logger
	socket     string // the agent's
	source     *knode.Source
	runtime    *cri.Runtime
	reconciler *knode.Reconciler
	host       *nodeHost
	chained    *chained
}

// chained is whether new pods wait for the agent.
type chained struct {
	mu  sync.Mutex
	err error // nil: they do
}

func (c *chained) set(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
}

func (c *chained) problem() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// openNode fills in what an agent needs to know of its node. Nothing is started.
func openNode(o *agentOptions, log *slog.Logger) (_ *node, err error) {
	n := &node{options: &o.node, log: log, socket: filepath.Join(o.config.RuntimeDir, agent.SocketName), host: &nodeHost{}}
	limit, err := knode.ParseMemory(o.node.memory)
	if err != nil {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "--proxy-memory " + o.node.memory, Err: err, Remedy: "want for instance 256Mi"}
	}
	socket, err := o.node.socket()
	if err != nil {
		return nil, err
	}
	if n.source, err = knode.Open(knode.Config{Kubeconfig: o.node.kubeconfig, Node: o.node.name, System: o.node.system(), Log: log}); err != nil {
		return nil, err
	}
	if n.runtime, err = cri.Open(socket); err != nil {
		return nil, err
	}
	if err := installPlugin(o.node.cniBin); err != nil {
		return nil, errors.Join(err, n.runtime.Close())
	}
	if o.config.Proxy == "" {
		if o.config.Proxy, err = beside("assay-proxy"); err != nil {
			return nil, err
		}
	}
	if o.config.Proxy, err = lodge(o.config.Proxy, filepath.Join(o.data, "bin")); err != nil {
		return nil, errors.Join(err, n.runtime.Close())
	}
	n.reconciler = knode.NewReconciler(n.source, n.runtime, n.host, log)
	n.chained = &chained{}
	o.config.Pods = nodePods{n.source, n.reconciler, n.chained}
	o.config.Kubelet = o.node.kubelet
	o.config.Outside = &agent.Outside{Runtime: socket, Cgroup: o.node.cgroup, Memory: limit}
	o.config.HostName = cmp.Or(o.config.HostName, o.node.name)
	o.remote.HostName = o.config.HostName
	if o.remote.Token == "" {
		o.remote.Node = &agent.NodeJoin{Token: n.token, Roots: n.roots}
	}
	return n, nil
}

func (n *node) close() { n.runtime.Close() }

func (n *node) token() (string, error) {
	b, err := os.ReadFile(n.options.token)
	if err != nil {
		return "", &assay.Error{Kind: assay.Denied, Op: "read this node's token", Err: err, Remedy: "project a service account's token with the audience \"assay\" into the agent's pod, and name it with --node-token"}
	}
	return strings.TrimSpace(string(b)), nil
}

func (n *node) roots(ctx context.Context) ([]*x509.Certificate, error) {
	if n.options.trust == "" {
		return n.source.Roots(ctx)
	}
	b, err := os.ReadFile(n.options.trust)
	if err != nil {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "read control's roots", Err: err}
	}
	roots, err := knode.ParseRoots(b)
	if err != nil {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "read control's roots from " + n.options.trust, Err: err}
	}
	return roots, nil
}

// run looks after the node's pods until ctx ends. The plugin is chained once the agent
// answers it; it stays when the agent ends, since another one follows.
func (n *node) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	ended := func(err error) error {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	group.Go(func() error { return ended(n.source.Run(ctx)) })
	group.Go(func() error {
		select {
		case <-n.host.agent.Ready():
		case <-ctx.Done():
			return nil
		}
		group.Go(func() error { return ended(n.reconciler.Run(ctx)) })
		cni.Keep(ctx, n.options.cniConf, n.socket, func(file string, err error) {
			n.chained.set(err)
			if err != nil {
				n.log.Error("the network plugin is not chained: new pods are captured only when they run", "err", err)
				return
			}
			n.log.Info("the network plugin is chained", "file", filepath.Join(n.options.cniConf, file))
		})
		return nil
	})
	return group.Wait()
}

// releaseNode undoes what agents made on a node, while its pods go on. It needs neither
// control nor the API server.
func releaseNode(ctx context.Context, o *agentOptions, log *slog.Logger) error {
	const op = "release the node"
	if o.node.name == "" {
		return &assay.Error{Kind: assay.Invalid, Op: op, Err: errors.New("--release is for the agent of a node"), Remedy: "name the node with --node"}
	}
	// First, so that no new pod waits for an agent.
	if err := cni.Remove(o.node.cniConf); err != nil {
		return &assay.Error{Op: "take the network plugin out of " + o.node.cniConf, Err: err}
	}
	if err := os.Remove(filepath.Join(o.node.cniBin, cni.Type)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return &assay.Error{Op: "remove the network plugin", Err: err}
	}
	socket, err := o.node.socket()
	if err != nil {
		return err
	}
	o.config.Outside, o.config.Log = &agent.Outside{Runtime: socket, Cgroup: o.node.cgroup}, log
	a, err := agent.New(o.config)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return a.Run(ctx) })
	group.Go(func() error {
		defer cancel()
		return releaseAll(ctx, a)
	})
	if err := group.Wait(); err != nil {
		return &assay.Error{Op: op, Err: err}
	}
	log.Info("nothing of the mesh is left on this node")
	return errors.Join(os.RemoveAll(o.config.DataDir), os.RemoveAll(filepath.Join(o.data, "bin")), os.RemoveAll(o.config.RuntimeDir), removeGroups(o.node.cgroup))
}

// removeGroups removes the folders of the pods' control groups, of which none is left.
func removeGroups(root string) error {
	if root == "" {
		return nil
	}
	groups, err := filepath.Glob(filepath.Join(root, "*", "assay")) // version 1
	for _, dir := range append(groups, filepath.Join(root, "assay")) {
		if e := os.Remove(dir); !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}

// releaseAll releases every pod and waits for the last connection through a proxy, which
// the agent ends when its time is over.
func releaseAll(ctx context.Context, a *agent.Agent) error {
	select {
	case <-a.Ready():
	case <-ctx.Done():
		return nil // Run says why
	}
	for _, id := range a.Pods() {
		if err := a.Release(id); err != nil && assay.KindOf(err) != assay.NotFound {
			return err
		}
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for len(a.Pods()) > 0 {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errors.New("it was asked to end while connections still went through proxies")
		}
	}
	return nil
}

// installPlugin puts this program where the runtime looks for network plugins.
func installPlugin(dir string) error {
	if err := install("/proc/self/exe", dir, cni.Type); err != nil {
		return &assay.Error{Op: "install the network plugin in " + dir, Err: err, Remedy: "in a pod, the node's folder must be there, writable; name another one with --cni-bin"}
	}
	return nil
}

// lodge copies the proxy out of the agent's container to a folder of the node, under a
// name that says its content, and removes those of before: a process keeps what it
// executes.
func lodge(proxy, dir string) (path string, err error) {
	digest, err := digestOf(proxy)
	name := "assay-proxy-"
	if err == nil {
		name += digest[:16]
		err = os.MkdirAll(dir, 0o755)
	}
	if err == nil {
		err = install(proxy, dir, name)
	}
	if err != nil {
		return "", &assay.Error{Op: "put " + proxy + " on the node", Err: err, Remedy: "see that --data is a folder of the node's, writable"}
	}
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if e.Name() != name {
			err = errors.Join(err, os.Remove(filepath.Join(dir, e.Name())))
		}
	}
	return filepath.Join(dir, name), err
}

// digestOf returns the beginning of a file's digest, enough for a name.
func digestOf(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// install makes dir/name a copy of a program, whole at every moment, unless it is one.
func install(from, dir, name string) (err error) {
	to := filepath.Join(dir, name)
	want, err := digestOf(from)
	if err != nil {
		return err
	}
	if have, err := digestOf(to); err == nil && have == want {
		return os.Chmod(to, 0o755)
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.CreateTemp(dir, ".assay-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(out.Name())
		}
	}()
	_, err = io.Copy(out, in)
	if err = errors.Join(err, out.Chmod(0o755), out.Sync(), out.Close()); err != nil {
		return err
	}
	return os.Rename(out.Name(), to)
}

// nodeHost is the agent, as package kube/node needs it.
type nodeHost struct{ agent *agent.Agent }

func (h *nodeHost) Meshed() []string { return h.agent.Pods() }

func (h *nodeHost) Mesh(ctx context.Context, p knode.Placed) error {
	x := podOf(&p.Pod)
	x.Sandbox, x.NetNS, x.Link, x.Addrs, x.Running = p.Sandbox, p.NetNS, p.Link, p.Addrs, true
	return h.agent.Mesh(ctx, x)
}

func (h *nodeHost) Release(uid string) error { return h.agent.Release(uid) }

func (h *nodeHost) Attest(uid string, set assay.ArtifactSet) error { return h.agent.Attest(uid, set) }

func (h *nodeHost) End(ctx context.Context, uid string) error { return h.agent.PodEnded(ctx, uid) }

func (h *nodeHost) Leave(step string) {
	dial := step == knode.LeavingDial || step == knode.LeavingRelease
	h.agent.Leave(agent.Leaving{Serve: dial || step == knode.LeavingServe, Dial: dial})
}

// nodePods is package kube/node, as the agent needs it.
type nodePods struct {
	source     *knode.Source
	reconciler *knode.Reconciler
	chained    *chained
}

func (s nodePods) Unchained() error { return s.chained.problem() }

func (s nodePods) Pod(ctx context.Context, namespace, name, uid string) (agent.Pod, bool, error) {
	p, wanted, err := s.source.Pod(ctx, namespace, name, uid)
	return podOf(&p), wanted, err
}

func (s nodePods) Unmeshed() []agent.Unmeshed {
	var list []agent.Unmeshed
	for _, u := range s.reconciler.Unmeshed() {
		list = append(list, agent.Unmeshed{Pod: u.UID, Namespace: u.Namespace, Name: u.Name, Reason: string(u.Reason), Since: u.Since, Err: u.Err})
	}
	return list
}

func podOf(p *knode.Pod) agent.Pod {
	return agent.Pod{ID: p.UID, Namespace: p.Namespace, Account: p.Account, Labels: p.Labels, Ports: p.Ports, Probes: p.Probes, OOMScore: p.OOMScore}
}
