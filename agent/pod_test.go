package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/agent/capture"
	"assay.dev/agent/internal/lab"
	"assay.dev/agent/netns"
	"assay.dev/api"
)

// pod is what a container runtime leaves to an agent: a namespace with a link, and
// processes that nobody asked.
type pod struct {
	ns  *netns.Namespace
	app *exec.Cmd
}

const podAddr = "10.181.7.200"

// newPod makes a pod on the host's bridge whose application runs already. Its kernel
// checks the way back of every packet, as some distributions have it.
func newPod(t *testing.T, cfg Config) *pod {
	t.Helper()
	p := &pod{ns: outsider(t, cfg.Bridge), app: exec.Command("/proc/self/exe")}
	lab.In(t, p.ns, func() (int, error) {
		return 0, os.WriteFile("/proc/sys/net/ipv4/conf/all/rp_filter", []byte("1"), 0)
	})
	p.app.Env = append(os.Environ(), "ASSAY_TEST_APP=:8080")
	p.app.Stdin, p.app.Stderr = lifeline(), os.Stderr
	if err := p.ns.Do(p.app.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.app.Process.Kill(); p.app.Wait() })
	return p
}

func (p *pod) spec() Pod {
	return Pod{
		ID: "0c5c9a5e-pod", Namespace: "bank", Account: "robot", Addrs: lab.Addrs(podAddr), Ports: []uint16{8080},
		NetNS: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), p.ns.FD()),
	}
}

// ruleset is everything of the capture's that is in the pod.
func (p *pod) ruleset(t *testing.T) string {
	t.Helper()
	return string(lab.In(t, p.ns, func() ([]byte, error) {
		return exec.Command("sh", "-c", "nft list tables; ip rule | grep fwmark; ip route show table 100 2>/dev/null; exit 0").Output()
	}))
}

// session is a connection to the pod's application that stays open.
type heldOpen struct {
	c net.Conn
	r *bufio.Reader
}

func hold(t *testing.T, from *netns.Namespace) *heldOpen {
	t.Helper()
	var h *heldOpen
	lab.Eventually(t, "the application answers", func() bool {
		c, err := lab.Dial(from, podAddr+":8080")
		if err != nil {
			return false
		}
		h = &heldOpen{c, bufio.NewReader(c)}
		c.SetReadDeadline(time.Now().Add(20 * time.Second))
		line, err := h.r.ReadString('\n')
		if err != nil {
			c.Close()
			return false
		}
		if want := "client " + c.LocalAddr().String() + "\n"; line != want {
			t.Errorf("the application says %q, want %q", line, want)
		}
		return true
	})
	t.Cleanup(func() { h.c.Close() })
	return h
}

func (h *heldOpen) ping(t *testing.T, when string) {
	t.Helper()
	h.c.SetDeadline(time.Now().Add(20 * time.Second))
	io.WriteString(h.c, "ping\n")
	if line, err := h.r.ReadString('\n'); line != "ping\n" {
		t.Fatalf("%s: %q, %v", when, line, err)
	}
}

// carried is how many connections the pod's proxy has taken.
func (c *testControl) carried(id string) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := uint64(0)
	for _, s := range c.reports[id].GetSignals() {
		n += s.GetRequests()
	}
	return n
}

func client(t *testing.T, cfg Config) *netns.Namespace {
	t.Helper()
	h := netns.Host{Bridge: cfg.Bridge, Prefixes: lab.Prefixes("10.181.7.0/24", "fd5a:5a59:0:0:7::/80")}
	ns := lab.Namespace(t)
	if err := h.Attach(ns, "outsider1", lab.Addrs("10.181.7.201")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Detach("outsider1") })
	return ns
}

// TestPodInAnotherMesh: a pod that an agent adopts after its host has joined another mesh gets an
// identity there, by a proxy that begins anew; what is open goes on.
func TestPodInAnotherMesh(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts, cfg.ProxyDrain = c.client(t), time.Hour
	a := startAgent(t, cfg)
	p, far := newPod(t, cfg), client(t, cfg)
	id := p.spec().ID
	if err := a.Mesh(t.Context(), p.spec()); err != nil {
		t.Fatal(err)
	}
	set := assay.ArtifactSet{{Kind: assay.Image, Digest: assay.Digest("sha256:" + strings.Repeat("1", 64)), Name: "web"}}
	if err := a.Attest(id, set); err != nil {
		t.Fatal(err)
	}
	through := hold(t, far)
	lab.Eventually(t, "it is certified", func() bool { return c.certified(id) != nil })
	a.stop()

	c.mu.Lock()
	c.domain = "other.example"
	c.removeLocked("workload/" + id)
	delete(c.issued, id)
	c.mu.Unlock()
	a = startAgent(t, cfg)
	defer func() { a.PodEnded(context.Background(), id) }()
	if err := a.Attest(id, set); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, "its identity is of the other mesh", func() bool {
		w := c.workload(id)
		return w != nil && w.GetIdentity() == "spiffe://other.example/ns/bank/sa/robot"
	})
	lab.Eventually(t, "a proxy of that identity accepts", func() bool {
		w := a.workload(id)
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.current != nil && w.current.domain == "other.example" && w.session != nil
	})
	lab.Eventually(t, "it is certified there", func() bool { return c.certified(id) != nil })
	through.ping(t, "in another mesh")
	hold(t, far).c.Close()
}

// TestPod: a pod that runs joins the mesh and leaves it again. Nothing that is open
// notices, an agent comes and goes in between, and afterwards nothing is left.
func TestPod(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts, cfg.ProxyDrain = c.client(t), time.Hour
	a := startAgent(t, cfg)
	p, far := newPod(t, cfg), client(t, cfg)
	id := p.spec().ID
	elsewhere := lab.Listen(t, far, "tcp", "10.181.7.201:80")
	go func() {
		for {
			conn, err := elsewhere.Accept()
			if err != nil {
				return
			}
			io.WriteString(conn, "elsewhere\n")
			conn.Close()
		}
	}()
	older := hold(t, far)

	if err := a.Mesh(t.Context(), p.spec()); err != nil {
		t.Fatal(err)
	}
	if err := a.Mesh(t.Context(), p.spec()); err != nil {
		t.Errorf("again: %v", err)
	}
	older.ping(t, "older than the capture")
	through := hold(t, far)
	lab.Eventually(t, "the proxy tells of it", func() bool { return c.carried(id) > 0 })
	if line, err := talk(p.ns, "10.181.7.201:80"); line != "outbound 10.181.7.201:80\n" {
		t.Errorf("what the pod dials: %q, %v", line, err)
	}
	if got := c.workload(id); got == nil || got.GetIdentity() == "" || len(got.GetArtifacts()) > 0 {
		t.Errorf("control has %v", got)
	}
	if c.certified(id) != nil {
		t.Error("certified before its artifacts were known")
	}
	image := assay.Artifact{Kind: assay.Image, Digest: assay.Digest("sha256:" + strings.Repeat("1", 64)), Name: "web"}
	if err := a.Attest(id, assay.ArtifactSet{image}); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, "a certificate with the image", func() bool {
		got := c.certified(id)
		return len(got) == 1 && got[0].GetDigest() == string(image.Digest)
	})
	image.Config, image.Index = assay.DigestOf([]byte("config")), assay.DigestOf([]byte("index"))
	if err := a.Attest(id, assay.ArtifactSet{image}); err != nil { // as the agent of a later release, which asks for more
		t.Fatal(err)
	}
	lab.Eventually(t, "control hears what contains the manifest", func() bool {
		got := c.workload(id).GetArtifacts()
		return len(got) == 1 && got[0].GetConfig() == string(image.Config) && got[0].GetIndex() == string(image.Index)
	})
	if got := c.certified(id); got[0].GetIndex() != "" {
		t.Error("another certificate was asked for, and the same runs")
	}

	a.stop()
	older.ping(t, "without an agent")
	through.ping(t, "without an agent")
	hold(t, far).c.Close()
	a = startAgent(t, cfg)
	if got := a.Pods(); len(got) != 1 || got[0] != id {
		t.Fatalf("the next agent has %v", got)
	}
	older.ping(t, "with the next agent")
	through.ping(t, "with the next agent")

	if err := a.Release(id); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, "what the pod dials goes direct", func() bool {
		line, err := talk(p.ns, "10.181.7.201:80")
		return err == nil && line == "elsewhere\n"
	})
	lab.Eventually(t, "control has forgotten it", func() bool { return c.workload(id) == nil })
	if err := a.Mesh(t.Context(), p.spec()); assay.KindOf(err) != assay.Unavailable {
		t.Errorf("while it leaves: %v", err)
	}
	a.stop() // in the middle of it
	a = startAgent(t, cfg)
	older.ping(t, "released")
	through.ping(t, "released")
	fresh := hold(t, far)
	if got := p.ruleset(t); got == "" {
		t.Error("the rules are gone before the last connection")
	}
	through.c.Close()
	lab.Eventually(t, "nothing is left in the pod", func() bool { return len(a.Pods()) == 0 && p.ruleset(t) == "" })
	older.ping(t, "afterwards")
	fresh.ping(t, "afterwards")

	// And once more, until the pod ends.
	if err := a.Mesh(t.Context(), p.spec()); err != nil {
		t.Fatal(err)
	}
	hold(t, far)
	p.app.Process.Kill()
	p.app.Wait()
	if err := a.PodEnded(t.Context(), id); err != nil {
		t.Error(err)
	}
	if err := a.PodEnded(t.Context(), id); err != nil {
		t.Errorf("a second time: %v", err)
	}
	lab.Eventually(t, "control has forgotten it again", func() bool { return c.workload(id) == nil })
	if left := leftovers(t, cfg); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
	if err := a.Release(id); assay.KindOf(err) != assay.NotFound {
		t.Errorf("one that is not there: %v", err)
	}
}

// TestPodIsSwept: agent and proxy were killed, and the pod's record is of no use: the pod
// goes on without the mesh, and without a trace of it.
func TestPodIsSwept(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts = c.client(t)
	a := startAgent(t, cfg)
	p, far := newPod(t, cfg), client(t, cfg)
	if err := a.Mesh(t.Context(), p.spec()); err != nil {
		t.Fatal(err)
	}
	hold(t, far)
	a.stop()
	path := a.store.path("workloads", p.spec().ID+".json")
	var rec record
	if err := readJSON(path, &rec); err != nil {
		t.Fatal(err)
	}
	proxy, err := rec.Proxy.open()
	if err != nil {
		t.Fatal(err)
	}
	defer proxy.Close()
	rec.Boot = a.boot
	a = startAgent(t, cfg)
	a.stop()
	if !proxy.Alive() {
		t.Fatal("an agent that adopts ended the proxy")
	}
	if err := a.sweepPod(rec); err != nil {
		t.Error(err)
	}
	if proxy.Alive() || p.ruleset(t) != "" {
		t.Errorf("the proxy lives: %v; rules: %s", proxy.Alive(), p.ruleset(t))
	}
	hold(t, far)
	a.store.forget(rec.Workload.ID)
}

// TestStrictWhileItJoins: a namespace that becomes strict stays so for a pod whose proxy is told
// other things later: that everybody has heard of the pod, for instance.
func TestStrictWhileItJoins(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts = c.client(t)
	a := startAgent(t, cfg)
	p := newPod(t, cfg)
	spec := p.spec()
	spec.Running = true
	if err := a.Mesh(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	image := assay.Artifact{Kind: assay.Image, Digest: assay.Digest("sha256:" + strings.Repeat("1", 64)), Name: "web"}
	if err := a.Attest(spec.ID, assay.ArtifactSet{image}); err != nil {
		t.Fatal(err)
	}
	says := func(what string) func() bool {
		return func() bool {
			c.mu.Lock()
			defer c.mu.Unlock()
			return c.reports[spec.ID].GetRefusals()[what] > 0
		}
	}
	lab.Eventually(t, "its proxy serves who has not heard", says("transition true"))
	c.namespace(assay.NamespaceConfig{Namespace: "bank", Mode: assay.Strict})
	lab.Eventually(t, "its proxy is strict", says("mode strict"))
	lab.Eventually(t, "everybody has heard", says("transition false"))
	if !says("mode strict")() {
		t.Error("its proxy is not strict any more")
	}
}

// TestCaptureWithoutLoopback: whoever takes lo down and the rules away has taken the capture away
// for a moment, and is told of; it is not the pod's end.
func TestCaptureWithoutLoopback(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts = c.client(t)
	a := startAgent(t, cfg)
	p, far := newPod(t, cfg), client(t, cfg)
	id := p.spec().ID
	if err := a.Mesh(t.Context(), p.spec()); err != nil {
		t.Fatal(err)
	}
	hold(t, far).c.Close()
	lab.Eventually(t, "the proxy tells of it", func() bool { return c.carried(id) == 1 })
	lab.In(t, p.ns, func() ([]byte, error) {
		return exec.Command("sh", "-ec", "ip link set lo down; nft delete table inet "+capture.Table).CombinedOutput()
	})
	w := a.workload(id)
	lab.Eventually(t, "it is told", func() bool {
		return slices.ContainsFunc(c.foundSoFar(), func(f *api.Finding) bool {
			return f.GetKind() == "capture-changed" && f.GetWorkload() == id && strings.Contains(f.GetDetail(), "lo is down")
		})
	})
	lab.Eventually(t, "it is whole again", func() bool { return w.capture.Verify() == nil && !p.ns.LoopbackDown() })
	before := c.carried(id)
	hold(t, far).c.Close()
	lab.Eventually(t, "the proxy tells of one more", func() bool { return c.carried(id) == before+1 })
}

// TestOlderConnections: what a pod had open before it was captured goes on, is told when the
// namespace is strict, and is closed when its time is over; nothing else is.
func TestOlderConnections(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts, cfg.OlderGrace = c.client(t), time.Millisecond
	a := startAgent(t, cfg)
	p, far := newPod(t, cfg), client(t, cfg)
	id := p.spec().ID
	older := hold(t, far)
	if err := a.Mesh(t.Context(), p.spec()); err != nil {
		t.Fatal(err)
	}
	through := hold(t, far)
	w := a.workload(id)
	lab.Eventually(t, "one is counted", func() bool { return w.olderLeft() == 1 })
	older.ping(t, "observed")
	c.namespace(assay.NamespaceConfig{Namespace: "bank", Mode: assay.Strict})
	lab.Eventually(t, "it is closed", func() bool { return w.olderLeft() == 0 })
	older.c.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := older.r.ReadString('\n'); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("its client reads %v", err)
	}
	through.ping(t, "the other one")
	for _, kind := range []string{"older-connections", "older-connections-closed"} {
		lab.Eventually(t, "control is told: "+kind, func() bool {
			return slices.ContainsFunc(c.foundSoFar(), func(f *api.Finding) bool {
				return f.GetKind() == kind && f.GetWorkload() == id && strings.Contains(f.GetDetail(), older.c.LocalAddr().String()+" -> "+podAddr+":8080")
			})
		})
	}
}

func TestPodsThatCannotBeMeshed(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts = c.client(t)
	a := startAgent(t, cfg)
	p := newPod(t, cfg)
	own := "/proc/sys/net/ipv4/tcp_fwmark_accept" // as somebody else needs it on this host
	if err := os.WriteFile(own, []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.WriteFile(own, []byte("0"), 0) })
	for what, change := range map[string]func(*Pod){
		"shares the host's network": func(s *Pod) { s.NetNS = "/proc/self/ns/net" },
		"no such file":              func(s *Pod) { s.NetNS = "/run/netns/none" },
		"not a network namespace":   func(s *Pod) { s.NetNS = "/proc/self/ns/mnt" },
		"has no address of its own": func(s *Pod) { s.Addrs = nil },
		"name \"../x\"":             func(s *Pod) { s.ID = "../x" },
		"account \"\"":              func(s *Pod) { s.Account = "" },
	} {
		s := p.spec()
		change(&s)
		if err := a.Mesh(t.Context(), s); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%v, want %s", err, what)
		}
		if left, _ := filepath.Glob(filepath.Join(cfg.DataDir, "workloads", "*")); len(left) > 0 || len(a.Pods()) > 0 {
			t.Errorf("%s: left behind: %v %v", what, left, a.Pods())
		}
	}
	if b, err := os.ReadFile(own); string(b) != "1\n" {
		t.Errorf("the host's own setting is %q, %v", b, err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("nobody waits"))
	if err := a.Mesh(ctx, p.spec()); err == nil {
		t.Error("meshed though nobody waits")
	}
	if got := p.ruleset(t); got != "" {
		t.Errorf("rules are left: %s", got)
	}
}

// TestPodThatControlRefuses: control does not take a pod that it took before, as one does
// that knows nothing yet. The pod stays as it is, and is taken when control does.
func TestPodThatControlRefuses(t *testing.T) {
	c := newTestControl(t)
	var takes atomic.Bool
	takes.Store(true)
	c.covers = func(string, string) bool { return takes.Load() }
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts = c.client(t)
	a := startAgent(t, cfg)
	p, far := newPod(t, cfg), client(t, cfg)
	if err := a.Mesh(t.Context(), p.spec()); err != nil {
		t.Fatal(err)
	}
	through := hold(t, far)
	a.stop()
	takes.Store(false)
	a = startAgent(t, cfg)
	lab.Eventually(t, "the next agent is told that control refuses", func() bool { return a.Mesh(t.Context(), p.spec()) != nil })
	through.ping(t, "though control refuses the pod")
	if got := a.Pods(); len(got) != 1 {
		t.Errorf("meshed are %v", got)
	}
	takes.Store(true)
	lab.Eventually(t, "control takes it again", func() bool { return a.Mesh(t.Context(), p.spec()) == nil })
	through.ping(t, "afterwards")
}

// meshed reports whether anybody is known to be.
func meshed(a *Agent) bool {
	of := a.publisher.owners
	of.mu.RLock()
	defer of.mu.RUnlock()
	return len(of.of) > 0
}

// TestLeave: a mesh that is taken out serves plaintext before it dials nothing else, before
// anything is released; and it can be taken back.
func TestLeave(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	c.namespace(assay.NamespaceConfig{Namespace: "bank", Mode: assay.Strict, Egress: assay.Strict})
	id := assay.Identity{TrustDomain: "test", Namespace: "bank", Account: "other"}
	c.service(assay.Service{
		Namespace: "bank", Name: "other", VIPs: lab.Addrs("10.182.0.9"), Ports: []assay.Port{{Port: 80}},
		Endpoints: []assay.Endpoint{{Workload: "other-1", Identity: id, Addrs: lab.Addrs("10.181.7.150"), Targets: []uint16{8080}}},
	})
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts = c.client(t)
	a := startAgent(t, cfg)
	p, far := newPod(t, cfg), client(t, cfg)
	if err := a.Mesh(t.Context(), p.spec()); err != nil {
		t.Fatal(err)
	}
	through := hold(t, far)
	type told struct {
		mode, egress assay.Mode
		endpoint     assay.Identity
		pods         bool
		lingering    lingering
	}
	look := func() told {
		v := a.view.Load()
		s := v.services["bank/other"].service
		if s == nil {
			return told{}
		}
		out := told{v.config("bank").Mode, v.config("bank").Egress, s.Endpoints[0].Identity, meshed(a.Agent), lingering{-1, -1, -1}}
		if l := a.lingering(); l != nil {
			out.lingering = *l
		}
		return out
	}
	stays := told{assay.Strict, assay.Strict, id, true, lingering{-1, -1, -1}}
	for _, s := range []struct {
		step Leaving
		want told
	}{
		{Leaving{}, stays},
		{Leaving{Serve: true}, told{assay.Observe, assay.Observe, id, true, lingering{0, 1, 1}}},
		{Leaving{Serve: true, Dial: true}, told{assay.Observe, assay.Observe, assay.Identity{}, false, lingering{0, 0, 1}}},
		{Leaving{}, stays},
		{Leaving{Serve: true, Dial: true}, told{assay.Observe, assay.Observe, assay.Identity{}, false, lingering{0, 0, 1}}},
	} {
		a.Leave(s.step)
		lab.Eventually(t, fmt.Sprintf("%+v is taken", s.step), func() bool { return look() == s.want })
		through.ping(t, fmt.Sprint(s.step))
		hold(t, far).c.Close()
	}
	if err := a.Release(p.spec().ID); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, "the pod is released", func() bool { return a.lingering().release == 0 })
	through.c.Close()
}

// TestLeaveIsTaken: nobody is told that a step is taken before it is published, nor while a proxy
// that drains has not taken it.
func TestLeaveIsTaken(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts = c.client(t)
	a := startAgent(t, cfg)
	p := newPod(t, cfg)
	if err := a.Mesh(t.Context(), p.spec()); err != nil {
		t.Fatal(err)
	}
	serve, all := Leaving{Serve: true}, Leaving{Serve: true, Dial: true}
	a.Leave(serve)
	lab.Eventually(t, "the first step is taken", func() bool { return *a.lingering() == lingering{0, 1, 1} })

	a.publishing.Lock()
	done := make(chan struct{})
	go func() { a.Leave(all); close(done) }()
	lab.Eventually(t, "the second step is begun", func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.leaving == all
	})
	if l := *a.lingering(); l != (lingering{1, 1, 1}) {
		t.Errorf("before it is published: %+v", l)
	}
	a.publishing.Unlock()
	<-done
	lab.Eventually(t, "the second step is taken", func() bool { return *a.lingering() == lingering{0, 0, 1} })

	w := a.workload(p.spec().ID)
	w.mu.Lock()
	w.older = append(slices.Clone(w.older), newGeneration(w.current.proc, w.current.exe, w.current.domain))
	w.mu.Unlock()
	if l := *a.lingering(); l != (lingering{1, 1, 1}) {
		t.Errorf("with one that drains and has not said: %+v", l)
	}
	w.mu.Lock()
	w.older = w.older[:len(w.older)-1]
	w.mu.Unlock()
}
