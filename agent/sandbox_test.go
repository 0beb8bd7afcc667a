package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/agent/internal/lab"
	"assay.dev/agent/netns"
	"assay.dev/kube/cni"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
)

// pluginDir is where Debian has the plugins of containernetworking-plugins.
const pluginDir = "/usr/lib/cni"

// runTestPlugin is this binary as a network plugin, as cmd/assay is.
func runTestPlugin() {
	cni.Main(func(path string) cni.Agent { return plugged{Sandboxes{Socket: path}} })
}

type plugged struct{ s Sandboxes }

func (p plugged) Add(ctx context.Context, x cni.Sandbox) error   { return p.s.Add(ctx, Sandbox(x)) }
func (p plugged) Check(ctx context.Context, x cni.Sandbox) error { return p.s.Check(ctx, Sandbox(x)) }
func (p plugged) Del(ctx context.Context, x cni.Sandbox) error   { return p.s.Del(ctx, Sandbox(x)) }
func (p plugged) Ready(ctx context.Context) error                { return p.s.Ready(ctx) }

// listedPods is a source of pods, by name.
type listedPods map[string]Pod

func (l listedPods) Unmeshed() []Unmeshed { return nil }

func (l listedPods) Unchained() error { return nil }

func (l listedPods) Pod(_ context.Context, namespace, name, uid string) (Pod, bool, error) {
	if name == "unknown" {
		return Pod{}, false, &assay.Error{Kind: assay.Unavailable, Op: "find pod " + name, Err: errors.New("the API server is away")}
	}
	p, ok := l[namespace+"/"+name]
	return p, ok && p.ID == uid, nil
}

// runtime is what a container runtime does with network plugins, by the library that they
// use.
type containers struct {
	t     *testing.T
	conf  string
	path  []string
	cache string
}

func (c *containers) config() *libcni.NetworkConfigList {
	c.t.Helper()
	list, err := libcni.ConfListFromFile(filepath.Join(c.conf, "10-net.conflist"))
	if err != nil {
		c.t.Fatal(err)
	}
	return list
}

func (c *containers) cni() *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir(c.path, c.cache, nil)
}

func (c *containers) sandbox(ns *netns.Namespace, name string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID: "sandbox-" + name, NetNS: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.FD()), IfName: "eth0",
		Args: [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "bank"}, {"K8S_POD_NAME", name}, {"K8S_POD_UID", "uid-" + name}, {"K8S_POD_INFRA_CONTAINER_ID", "x"}},
	}
}

// add makes a pod's network and returns its addresses.
func (c *containers) add(ns *netns.Namespace, name string) ([]netip.Addr, error) {
	c.t.Helper()
	rt := c.sandbox(ns, name)
	c.t.Cleanup(func() { c.cni().DelNetworkList(context.Background(), c.config(), rt) })
	got, err := c.cni().AddNetworkList(c.t.Context(), c.config(), rt)
	if err != nil {
		return nil, err
	}
	r, err := current.NewResultFromResult(got)
	if err != nil {
		c.t.Fatal(err)
	}
	var list []netip.Addr
	for _, ip := range r.IPs {
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		list = append(list, a.Unmap())
	}
	return list, nil
}

// TestNetworkPlugin: a runtime makes pods by the cluster's own plugins, with ours after
// them. A meshed one is captured before anything runs in it, the others are left alone.
func TestNetworkPlugin(t *testing.T) {
	for _, name := range []string{"bridge", "host-local"} {
		if _, err := os.Stat(filepath.Join(pluginDir, name)); err != nil {
			t.Skipf("needs the network plugin %s (Debian: containernetworking-plugins)", name)
		}
	}
	control := newTestControl(t)
	control.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts = control.client(t)
	cfg.Pods = listedPods{"bank/web": {ID: "uid-web", Namespace: "bank", Account: "robot", Ports: []uint16{8080}}}
	a := startAgent(t, cfg)

	ours, c := t.TempDir(), &containers{t: t, conf: t.TempDir(), cache: t.TempDir()}
	c.path = []string{pluginDir, ours}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(exe, filepath.Join(ours, cni.Type)); err != nil {
		t.Fatal(err)
	}
	primary := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "net", "plugins": [
		{"type": "bridge", "bridge": "asy-cni", "isGateway": true, "ipMasq": false,
		 "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.244.9.0/24"}], [{"subnet": "fd5a:244:9::/64"}]]}}]}`, t.TempDir())
	file := filepath.Join(c.conf, "10-net.conflist")
	rewrite := func() {
		t.Helper()
		if err := os.WriteFile(file, []byte(primary), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	rewrite()
	t.Cleanup(func() { exec.Command("ip", "link", "del", "asy-cni").Run() })
	ctx, stop := context.WithCancel(t.Context())
	var keeping sync.WaitGroup
	defer keeping.Wait()
	defer stop()
	keeping.Go(func() { cni.Keep(ctx, c.conf, a.socket(), func(string, error) {}) })
	chained := func() bool { files, err := cni.Ours(c.conf); return err == nil && len(files) == 1 }
	lab.Eventually(t, "the plugin is chained", chained)
	rewrite()
	lab.Eventually(t, "the plugin is chained again", chained)
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the configuration's mode: %v, %v", st.Mode(), err)
	}

	plain, meshed := lab.Namespace(t), lab.Namespace(t)
	if _, err := c.add(plain, "plain"); err != nil {
		t.Fatal(err)
	}
	addrs, err := c.add(meshed, "web")
	if err != nil {
		t.Fatal(err)
	}
	if len(addrs) != 2 {
		t.Fatalf("addresses %v", addrs)
	}
	if got := a.Pods(); len(got) != 1 || got[0] != "uid-web" {
		t.Fatalf("meshed are %v", got)
	}
	for ns, want := range map[*netns.Namespace]bool{plain: false, meshed: true} {
		tables := lab.In(t, ns, func() ([]byte, error) { return exec.Command("nft", "list", "tables").Output() })
		if strings.Contains(string(tables), "inet assay") != want {
			t.Errorf("tables: %s, want captured: %v", tables, want)
		}
	}
	p := &pod{ns: meshed, app: exec.Command("/proc/self/exe")}
	p.app.Env = append(os.Environ(), "ASSAY_TEST_APP=:8080")
	p.app.Stdin, p.app.Stderr = lifeline(), os.Stderr
	if err := meshed.Do(p.app.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.app.Process.Kill(); p.app.Wait() })
	for _, addr := range addrs {
		to := netip.AddrPortFrom(addr, 8080).String()
		lab.Eventually(t, to+" answers", func() bool {
			line, err := talk(plain, to)
			return err == nil && strings.HasPrefix(line, "client ")
		})
	}
	lab.Eventually(t, "the proxy tells of both", func() bool { return control.carried("uid-web") >= 2 })
	if line, err := talk(meshed, "10.244.9.1:80"); line != "outbound 10.244.9.1:80\n" {
		t.Errorf("what it dials: %q, %v", line, err)
	}

	list := c.config()
	if err := c.cni().CheckNetworkList(t.Context(), list, c.sandbox(meshed, "web")); err != nil {
		t.Errorf("check: %v", err)
	}
	lab.Eventually(t, "a check finds a pod whose rules are gone, before the agent mends them", func() bool {
		lab.In(t, meshed, func() (int, error) { return 0, exec.Command("nft", "flush", "table", "inet", "assay").Run() })
		err := c.cni().CheckNetworkList(t.Context(), list, c.sandbox(meshed, "web"))
		if err != nil && !strings.Contains(err.Error(), "rules were changed") {
			t.Fatalf("check of a pod whose rules are gone: %v", err)
		}
		return err != nil
	})

	// What cannot be known does not start, and is tried again.
	var failed *types.Error
	if _, err := c.add(lab.Namespace(t), "unknown"); !errors.As(err, &failed) || failed.Code != types.ErrTryAgainLater || !strings.Contains(failed.Details, "API server is away") {
		t.Errorf("a pod that is not known: %v", err)
	}

	// The pod's sandbox dies and another one is made. The end of the first one is told late,
	// and more than once.
	again := lab.Namespace(t)
	second := c.sandbox(again, "web")
	second.ContainerID = "sandbox-web-2"
	t.Cleanup(func() { c.cni().DelNetworkList(context.Background(), list, second) })
	if _, err := c.cni().AddNetworkList(t.Context(), list, second); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := c.cni().DelNetworkList(t.Context(), list, c.sandbox(meshed, "web")); err != nil {
			t.Errorf("delete: %v", err)
		}
	}
	if got := a.Pods(); len(got) != 1 {
		t.Errorf("after the end of an older sandbox there are %v", got)
	}
	if err := c.cni().CheckNetworkList(t.Context(), list, second); err != nil {
		t.Errorf("check of the second sandbox: %v", err)
	}

	if err := c.cni().DelNetworkList(t.Context(), list, second); err != nil {
		t.Errorf("delete: %v", err)
	}
	if got := a.Pods(); len(got) != 0 {
		t.Errorf("after the end there are %v", got)
	}
	if err := c.cni().DelNetworkList(t.Context(), list, second); err != nil {
		t.Errorf("delete again: %v", err)
	}

	a.stop()
	if _, err := c.add(lab.Namespace(t), "web"); !errors.As(err, &failed) || failed.Code != types.ErrTryAgainLater {
		t.Errorf("without an agent: %v", err)
	}
	if err := c.cni().DelNetworkList(t.Context(), list, c.sandbox(plain, "plain")); err != nil {
		t.Errorf("delete without an agent: %v", err)
	}

	stop()
	keeping.Wait()
	if err := cni.Remove(c.conf); err != nil {
		t.Error(err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var was, is map[string]any
	if err := errors.Join(json.Unmarshal([]byte(primary), &was), json.Unmarshal(b, &is)); err != nil || !maps.EqualFunc(was, is, func(a, b any) bool { return fmt.Sprint(a) == fmt.Sprint(b) }) {
		t.Errorf("afterwards the configuration is %s (%v)", b, err)
	}
}

// TestTellings: a pod that is not meshed is told when it has not been for a while, and again
// while control would forget it; one that nobody tries, more rarely.
func TestTellings(t *testing.T) {
	began := time.Unix(1_700_000_000, 0)
	failing := &assay.Error{Kind: assay.Denied, Op: "mesh pod bank/odd", Err: errors.New("its account has no name"), Remedy: "give it one"}
	list := []Unmeshed{{Pod: "odd", Namespace: "bank", Name: "odd", Since: began, Err: failing}, {Pod: "host", Namespace: "bank", Name: "host", Err: errors.New("it has its node's network")},
		{Name: "node-1", Err: errors.New("there is no network configuration yet")}}
	told := map[string][]time.Duration{}
	x := tellings{}
	for d := time.Duration(0); d < time.Hour; d += unmeshedLook {
		for _, u := range x.due(list, began.Add(d)) {
			told[u.Pod] = append(told[u.Pod], d)
		}
	}
	if got := fmt.Sprint(told["odd"]); got != "[10s 10m10s 20m10s 30m10s 40m10s 50m10s]" {
		t.Errorf("one that is tried on: %s", got)
	}
	if got := fmt.Sprint(told["host"]); got != "[10s 30m10s]" {
		t.Errorf("one that is not: %s", got)
	}
	if got := fmt.Sprint(told[""]); got != "[1m10s 31m10s]" {
		t.Errorf("a node whose plugin is not chained: %s", got)
	}
	if f := list[2].finding(began); f.Kind != "plugin-not-chained" || f.Subject != "node node-1" || f.Workload != "" {
		t.Errorf("its finding: %+v", f)
	}
	x.due(list[1:2], began.Add(time.Hour))
	if len(x) != 1 {
		t.Errorf("one that is meshed now is remembered: %v", x)
	}
	if f := list[0].finding(began); f.Detail != "mesh pod bank/odd: its account has no name" || f.Remedy != "give it one" || f.Workload != "odd" || f.Subject != "bank/odd" {
		t.Errorf("the finding: %+v", f)
	}
}
