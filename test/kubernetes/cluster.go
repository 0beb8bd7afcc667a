package kubernetes

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// MaxNodes is how many nodes a cluster can have.
const MaxNodes = 3

// Options are what a cluster is made of.
type Options struct {
	Name  string // "" is one that nobody else has
	Nodes int    // 1 to MaxNodes
	// Families are the IP versions of pods and services: 4, 6, or 46, which "" is. Machines
	// have addresses of both.
	Families string
	Proxy    string // kube-proxy's mode: iptables, or nftables, which "" is
	Log      func(format string, args ...any)
}

// Cluster is a running Kubernetes.
type Cluster struct {
	Control *Machine
	Nodes   []*Machine
	Figures Figures

	name   string
	kind   Options
	log    func(string, ...any)
	folder *folder
	parts  *parts
	ca     *authority
	sw     *os.File // the switch's network namespace
	relay  *relay
	client *http.Client
	began  time.Time

	mu sync.Mutex // for Figures
}

// Kubeconfig is the path of a configuration with which any client on this machine
// is the cluster's administrator.
func (c *Cluster) Kubeconfig() string { return filepath.Join(c.folder.path, "kubeconfig") }

// KubectlPath is the path of a kubectl of the cluster's version.
func (c *Cluster) KubectlPath() string { return c.parts.path("kubectl") }

// Name is the cluster's name.
func (c *Cluster) Name() string { return c.name }

// Version is Kubernetes' version, with the v.
func (c *Cluster) Version() string { return c.parts.version }

func (c *Cluster) server() string { return "https://" + c.relay.listener.Addr().String() }

// New brings a cluster up: when it returns, every node is Ready and DNS answers. A
// cluster that could not be brought up has been taken down again.
func New(ctx context.Context, o Options) (*Cluster, error) {
	if o.Nodes < 1 || o.Nodes > MaxNodes {
		return nil, fmt.Errorf("make a cluster of %d nodes: 1 to %d are possible", o.Nodes, MaxNodes)
	}
	if o.Name == "" {
		o.Name = "test-" + hex.EncodeToString(random(4))
	}
	if err := missing(); err != nil {
		return nil, err
	}
	o.Families, o.Proxy = cmp.Or(o.Families, "46"), cmp.Or(o.Proxy, "nftables")
	c := &Cluster{name: o.Name, kind: o, log: o.Log}
	if c.log == nil {
		c.log = func(string, ...any) {}
	}
	var err error
	if c.parts, err = buildParts(ctx, c.log); err != nil {
		return nil, err
	}
	c.began = time.Now()
	if c.folder, err = claim(ctx, o.Name); err != nil {
		return nil, err
	}
	if err := c.up(ctx, o.Nodes); err != nil {
		err = fmt.Errorf("bring up cluster %s: %w", o.Name, errors.Join(err, c.ended()))
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

func random(n int) []byte {
	b := make([]byte, n)
	rand.Read(b)
	return b
}

// missing says what this machine lacks.
func missing() error {
	if os.Geteuid() != 0 {
		return errors.New("a cluster needs root, to make namespaces and cgroups")
	}
	for _, file := range []string{cniFolder + "/bridge", "/usr/sbin/nft", "/usr/include/seccomp.h"} {
		if _, err := os.Stat(file); err != nil {
			return fmt.Errorf("a cluster needs %s: install containernetworking-plugins, nftables, libseccomp-dev, pkg-config and gcc (`make packages` does)", file)
		}
	}
	return nil
}

// up does what can be done at the same time at the same time.
func (c *Cluster) up(ctx context.Context, nodes int) error {
	var err error
	if c.ca, err = newAuthority(); err != nil {
		return err
	}
	if err := c.makeMachines(nodes); err != nil {
		return err
	}
	c.figure("machines")
	if err := c.openDoor(); err != nil {
		return err
	}
	work, both := errgroup.WithContext(ctx) // over for both when one fails
	work.Go(func() error {
		if err := errors.Join(c.equipControl(), c.startControl()); err != nil {
			return err
		}
		return c.setUpAPI(both)
	})
	work.Go(func() error { return c.setUpRuntimes(both) })
	if err := work.Wait(); err != nil {
		return err
	}
	c.figure("images, objects")
	return c.setUpNodes(ctx)
}

// makeMachines boots the control plane and the nodes, and connects them.
func (c *Cluster) makeMachines(nodes int) error {
	var err error
	if c.sw, err = newSwitch(); err != nil {
		return err
	}
	v4, v6 := address(1)
	c.Control = &Machine{Name: "control", IPv4: v4, IPv6: v6}
	for i := 1; i <= nodes; i++ {
		v4, v6 := address(10 + i)
		c.Nodes = append(c.Nodes, &Machine{Name: fmt.Sprintf("node-%d", i), IPv4: v4, IPv6: v6, Pods: c.kind.families(podRanges(i))})
	}
	for _, m := range c.machines() {
		m.dir = filepath.Join(c.folder.path, m.Name)
		if m.group, err = newCgroup(groupName(c.folder.path) + "/" + m.Name); err != nil {
			return err
		}
	}
	var work errgroup.Group
	for _, m := range c.machines() {
		work.Go(func() error { return c.boot(m) })
	}
	return work.Wait()
}

func (c *Cluster) machines() []*Machine {
	if c.Control == nil {
		return nil
	}
	return append([]*Machine{c.Control}, c.Nodes...)
}

// boot starts a machine and connects it with the others.
func (c *Cluster) boot(m *Machine) error {
	hosts := "127.0.0.1 localhost\n::1 localhost\n"
	for _, other := range c.machines() {
		hosts += fmt.Sprintf("%s %s\n%s %s\n", other.IPv4, other.Name, other.IPv6, other.Name)
	}
	if err := m.boot(seat{Name: m.Name, Dir: m.dir, Parts: c.parts.dir, Hosts: hosts}); err != nil {
		return err
	}
	if err := plugIn(c.sw, m); err != nil {
		return err
	}
	for _, node := range c.Nodes {
		if node != m {
			if err := m.route(node); err != nil {
				return err
			}
		}
	}
	if m != c.Control {
		return m.defaultRoute(c.Control)
	}
	return nil
}

// openDoor makes the API server reachable from this machine, and a client for it.
func (c *Cluster) openDoor() error {
	var err error
	if c.relay, err = newRelay(c.Control, netip.AddrPortFrom(c.Control.IPv4, apiPort)); err != nil {
		return err
	}
	text, err := c.ca.kubeconfig(c.name, c.server(), "administrator", "system:masters")
	if err != nil {
		return err
	}
	if err := os.WriteFile(c.Kubeconfig(), []byte(text), 0o600); err != nil {
		return err
	}
	admin, err := c.ca.issue("assay-test", "system:masters", nil)
	if err != nil {
		return err
	}
	cert, err := tls.X509KeyPair(admin.cert, admin.key)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AddCert(c.ca.cert)
	c.client = &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{cert}},
		IdleConnTimeout: 30 * time.Second,
	}}
	return c.folder.record(Record{
		Name: c.name, PID: os.Getpid(), Version: c.parts.version, Nodes: len(c.Nodes),
		Kubeconfig: c.Kubeconfig(), Kubectl: c.KubectlPath(), Server: c.server(), Began: c.began,
	})
}

// setUpAPI waits for the API server, makes the nodes' objects and applies DNS.
func (c *Cluster) setUpAPI(ctx context.Context) error {
	if err := c.await(ctx, 2*time.Minute, "the API server", func() error {
		return c.api(ctx, "GET", "/readyz", nil, nil)
	}); err != nil {
		return err
	}
	c.figure("API server")
	if err := c.startManagers(); err != nil {
		return err
	}
	for i, m := range c.Nodes {
		if err := c.register(ctx, i+1, m); err != nil {
			return err
		}
	}
	_, err := c.TryKubectl(ctx, addons(len(c.Nodes), c.kind.dns()), "apply", "--validate=false", "-f", "-")
	return err
}

// setUpRuntimes starts containerd on every node and gives it what every cluster needs.
func (c *Cluster) setUpRuntimes(ctx context.Context) error {
	var work errgroup.Group
	for _, m := range c.Nodes {
		work.Go(func() error {
			if err := c.equipNode(m); err != nil {
				return err
			}
			return c.startRuntime(m)
		})
	}
	if err := work.Wait(); err != nil {
		return err
	}
	for _, img := range []Image{
		{Name: pauseImage, Files: map[string]File{"/pause": {From: c.parts.path("pause")}}, Entrypoint: []string{"/pause"}, User: "65535:65535"},
		{Name: dnsImage, Files: map[string]File{"/coredns": {From: c.parts.path("coredns")}}, Entrypoint: []string{"/coredns"}},
	} {
		if _, err := c.TryImport(ctx, img); err != nil {
			return err
		}
	}
	return nil
}

// setUpNodes starts the kubelets and waits until pods can be used.
func (c *Cluster) setUpNodes(ctx context.Context) error {
	for _, m := range c.Nodes {
		if err := c.startNode(m); err != nil {
			return err
		}
	}
	for _, m := range c.Nodes {
		if err := c.await(ctx, 3*time.Minute, m.Name, func() error { return c.ready(ctx, m) }); err != nil {
			return err
		}
	}
	c.figure("nodes ready")
	if err := c.await(ctx, 3*time.Minute, "DNS", func() error { return c.deployed(ctx, "kube-system", "coredns") }); err != nil {
		return err
	}
	c.figure("DNS ready")
	return nil
}

// deployed reports why not all pods of a deployment are ready.
func (c *Cluster) deployed(ctx context.Context, namespace, name string) error {
	var d struct {
		Spec   struct{ Replicas int }
		Status struct{ ReadyReplicas int }
	}
	if err := c.api(ctx, "GET", "/apis/apps/v1/namespaces/"+namespace+"/deployments/"+name, nil, &d); err != nil {
		return err
	}
	if d.Status.ReadyReplicas < d.Spec.Replicas {
		return fmt.Errorf("%d of %d pods of %s are ready", d.Status.ReadyReplicas, d.Spec.Replicas, name)
	}
	return nil
}

// await tries until ok succeeds, the time is over, or a program of the cluster ends.
func (c *Cluster) await(ctx context.Context, within time.Duration, what string, ok func() error) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ok()
		if err == nil {
			return nil
		}
		if died := c.ended(); died != nil {
			return fmt.Errorf("wait for %s: %w", what, died)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return fmt.Errorf("wait for %s: not within %s: %w", what, within, err)
			}
			return fmt.Errorf("wait for %s: %w", what, context.Cause(ctx))
		}
	}
}

// ended says which of the cluster's programs have ended by themselves.
func (c *Cluster) ended() error {
	var errs error
	for _, m := range c.machines() {
		errs = errors.Join(errs, m.ended())
	}
	return errs
}

// api speaks with the API server as the administrator.
func (c *Cluster) api(ctx context.Context, method, path string, body, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	var send io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return err
		}
		send = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.server()+path, send)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, bytes.TrimSpace(text))
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(text, answer)
}

// TryKubectl runs kubectl as the administrator, with an input, and returns what it
// printed.
func (c *Cluster) TryKubectl(ctx context.Context, input string, args ...string) (string, error) {
	cmd := c.Command(ctx, args...)
	cmd.Stdin = strings.NewReader(input)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("kubectl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// Command is a kubectl that is yet to be started.
func (c *Cluster) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, c.KubectlPath(), append([]string{"--kubeconfig", c.Kubeconfig()}, args...)...)
	cmd.Env = append(os.Environ(), "HOME="+c.folder.path) // its cache goes with the cluster
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// TryImport makes an image and gives it to every node, as if it had been pulled: by
// its tag, and by the digest that the tag points to.
func (c *Cluster) TryImport(ctx context.Context, img Image) (Digests, error) {
	file, err := os.CreateTemp(c.folder.path, "image-*.tar")
	if err != nil {
		return Digests{}, err
	}
	defer os.Remove(file.Name())
	digests, err := img.Write(file)
	if err = errors.Join(err, file.Close()); err != nil {
		return Digests{}, err
	}
	work, ctx := errgroup.WithContext(ctx)
	for _, m := range c.Nodes {
		work.Go(func() error {
			if err := c.load(ctx, m, file.Name(), img.Name, digests); err != nil {
				return fmt.Errorf("image %s: %w", img.Name, err)
			}
			return nil
		})
	}
	return digests, work.Wait()
}

// load gives an image to a node's containerd, which may be starting.
func (c *Cluster) load(ctx context.Context, m *Machine, file, name string, d Digests) error {
	ctr := func(args ...string) error {
		_, err := m.run(ctx, append([]string{at("ctr"), "--address", runtimeSock, "-n", "k8s.io"}, args...)...)
		return err
	}
	if err := c.await(ctx, time.Minute, "containerd on "+m.Name, func() error { return ctr("version") }); err != nil {
		return err
	}
	inside := filepath.Join("/var/lib/assay", filepath.Base(file))
	outside := filepath.Join(m.dir, "disk", inside)
	if err := os.Link(file, outside); err != nil {
		return err
	}
	defer os.Remove(outside)
	repository, _, _ := strings.Cut(name, ":")
	if err := ctr("images", "import", inside); err != nil {
		return err
	}
	return ctr("images", "tag", "--force", name, repository+"@"+d.Named())
}

// Close takes the cluster down and leaves nothing of it.
func (c *Cluster) Close() error {
	if c.client != nil {
		c.client.CloseIdleConnections()
	}
	if c.relay != nil {
		c.relay.Close()
	}
	var all sync.WaitGroup
	for _, m := range c.machines() {
		all.Go(m.shutDown)
	}
	all.Wait()
	if c.sw != nil {
		c.sw.Close()
	}
	if err := c.folder.release(); err != nil {
		return fmt.Errorf("take down cluster %s: %w", c.name, err)
	}
	return nil
}

// Reboot pulls a machine's plug, as far as its memory, programs and connections are
// concerned, and starts it again with its disk. It does not wait until a node is Ready.
func (c *Cluster) Reboot(m *Machine) error {
	if err := c.unplug(m); err != nil {
		return err
	}
	if err := c.boot(m); err != nil {
		return fmt.Errorf("reboot %s: %w", m.Name, err)
	}
	if m == c.Control {
		return errors.Join(c.startControl(), c.startManagers())
	}
	return errors.Join(c.startRuntime(m), c.startNode(m))
}

// unplug ends a machine, and with it what a kernel forgets.
func (c *Cluster) unplug(m *Machine) (err error) {
	m.shutDown()
	// A kubelet that finds groups of containers that are gone looks for each of them for seconds.
	if err := m.group.remove(time.Minute); err != nil {
		return fmt.Errorf("shut %s down: %w", m.Name, err)
	}
	m.group, err = newCgroup(groupName(c.folder.path) + "/" + m.Name)
	return err
}

// ColdStart pulls every machine's plug at once, and starts all of them again with their
// disks. It does not wait until anything is ready.
func (c *Cluster) ColdStart() error {
	var all errgroup.Group
	for _, m := range c.machines() {
		all.Go(func() error { return c.unplug(m) })
	}
	if err := all.Wait(); err != nil {
		return err
	}
	for _, m := range c.machines() {
		if err := c.boot(m); err != nil {
			return fmt.Errorf("cold start of %s: %w", m.Name, err)
		}
	}
	errs := errors.Join(c.startControl(), c.startManagers())
	for _, m := range c.Nodes {
		errs = errors.Join(errs, c.startRuntime(m), c.startNode(m))
	}
	return errs
}

// Start starts one of a machine's programs again that Stop has ended.
func (c *Cluster) Start(m *Machine, name string) error {
	switch {
	case m == c.Control:
		return c.startProgram(name)
	case name == "containerd":
		return c.startRuntime(m)
	case name == "kubelet":
		return c.startKubelet(m)
	case name == "kube-proxy":
		return c.startProxy(m)
	}
	return fmt.Errorf("start %s on %s: a node has containerd, kubelet and kube-proxy", name, m.Name)
}
