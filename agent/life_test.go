package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/agent/attest"
	"assay.dev/agent/internal/lab"
	"assay.dev/agent/netns"
	"assay.dev/api"
	"assay.dev/link"
	"golang.org/x/sys/unix"
)

// runTestOwner is an `assay run` in a process of its own, to be killed: it takes a
// place, starts the application in it, and says its workload's ID.
func runTestOwner() {
	go followTest()
	t := &testing.T{}
	p, err := Place(context.Background(), os.Getenv("ASSAY_TEST_OWNER"), RunRequest{Service: "owned", Ports: []uint16{8080}})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "ASSAY_TEST_APP=:8080")
	cmd.Stdin = os.Stdin // it lives on without this process, not without the test
	pidfd := -1
	cmd.SysProcAttr = &syscall.SysProcAttr{PidFD: &pidfd}
	if err := p.Namespace.Do(cmd.Start); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if err := p.Started(os.NewFile(uintptr(pidfd), "pidfd")); err != nil {
		t.Fatal(err)
	}
	fmt.Println(p.Workload, p.Addrs[0])
	fmt.Fprintln(os.Stderr, p.Run(context.Background()))
}

// child starts this test binary in a role; it is killed with the test.
func child(t *testing.T, log io.Writer, env ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdin, cmd.Stderr = lifeline(), log
	return cmd
}

func begin(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(cmd) })
}

// kill is SIGKILL, and the end.
func kill(cmd *exec.Cmd) {
	cmd.Process.Kill()
	cmd.Wait()
}

// startAgentProcess starts an agent to be killed and waits until it answers.
func startAgentProcess(t *testing.T, dir string, c *testControl, log io.Writer) *exec.Cmd {
	t.Helper()
	cmd := child(t, log, "ASSAY_TEST_AGENT="+c.path, "ASSAY_TEST_DIR="+dir)
	begin(t, cmd)
	lab.Eventually(t, "the agent answers", func() bool {
		_, err := Locate(filepath.Join(dir, "run", SocketName))
		return err == nil
	})
	return cmd
}

// outsider is a namespace on the host's bridge that is no workload.
func outsider(t *testing.T, bridge string) *netns.Namespace {
	t.Helper()
	h := &netns.Host{Bridge: bridge, Prefixes: lab.Prefixes("10.181.7.0/24", "fd5a:5a59:0:0:7::/80")}
	ns := lab.Namespace(t)
	// Not a port that an agent would sweep.
	h2 := *h
	if err := h2.Attach(ns, "outsider0", lab.Addrs("10.181.7.200")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h2.Detach("outsider0") })
	return ns
}

func proxyOf(t *testing.T, a *Agent, id string) processRef {
	t.Helper()
	var rec record
	if err := readJSON(filepath.Join(a.cfg.DataDir, "workloads", id+".json"), &rec); err != nil {
		t.Fatal(err)
	}
	return rec.Proxy
}

func TestProxyIsReplaced(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts, cfg.EndWorkloads = c.client(t), true
	a := startAgent(t, cfg)
	web := startApp(t, a.socket(), RunRequest{Service: "web"}, ":8080")
	far := outsider(t, cfg.Bridge)
	lab.Eventually(t, "the application answers", func() bool {
		_, err := talk(far, web.addr(0, "8080"))
		return err == nil
	})
	fastest := time.Hour // the machine may be busy with something else
	for range 3 {
		before := proxyOf(t, a.Agent, web.Workload)
		if err := syscall.Kill(before.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		// Nobody is refused meanwhile: the listener is the agent's.
		began := time.Now()
		if line, err := talk(far, web.addr(0, "8080")); err != nil || !strings.Contains(line, "10.181.7.200") {
			t.Fatalf("a connection while there was no proxy: %q, %v", line, err)
		}
		fastest = min(fastest, time.Since(began))
		if after := proxyOf(t, a.Agent, web.Workload); after == before {
			t.Error("the record names the dead proxy")
		}
	}
	if fastest > time.Second {
		t.Errorf("the proxy was back after %v at best", fastest)
	}
}

func TestAgentIsKilledAndTheNextAdopts(t *testing.T) {
	log := logs(t)
	c := newTestControl(t)
	c.start(t)
	dir := t.TempDir()
	first := startAgentProcess(t, dir, c, log)
	cfg := testConfig(dir, log)
	cfg.Hosts, cfg.EndWorkloads = c.client(t), true
	socket := filepath.Join(cfg.RuntimeDir, SocketName)
	web := startApp(t, socket, RunRequest{Service: "web", Ports: []uint16{8080}}, ":8080")
	lab.Eventually(t, "a certificate", func() bool { return c.certified("web-") != nil })
	far := outsider(t, cfg.Bridge)
	lab.Eventually(t, "the application answers", func() bool {
		_, err := talk(far, web.addr(0, "8080"))
		return err == nil
	})
	held, err := lab.Dial(far, web.addr(0, "8080"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	reader := bufio.NewReader(held)
	if _, err := reader.ReadString('\n'); err != nil {
		t.Fatal(err)
	}

	kill(first)
	// Old and new connections go on without an agent.
	ping := func(when string) {
		t.Helper()
		held.SetDeadline(time.Now().Add(5 * time.Second))
		fmt.Fprintln(held, "ping")
		if line, err := reader.ReadString('\n'); line != "ping\n" {
			t.Errorf("%s: the old connection: %q, %v", when, line, err)
		}
		if _, err := talk(far, web.addr(0, "8080")); err != nil {
			t.Errorf("%s: a new connection: %v", when, err)
		}
	}
	ping("without an agent")

	var before record
	if err := readJSON(filepath.Join(cfg.DataDir, "workloads", web.Workload+".json"), &before); err != nil {
		t.Fatal(err)
	}
	a := startAgent(t, cfg)
	w := a.workload(web.Workload)
	if w == nil {
		t.Fatal("the workload was not adopted")
	}
	lab.Eventually(t, "the proxy is adopted with its listeners", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.session != nil && w.listeners.complete(w.rec.roles())
	})
	if now := proxyOf(t, a.Agent, web.Workload); now != before.Proxy {
		t.Errorf("the proxy is %v, was %v", now, before.Proxy)
	}
	ping("with the next agent")
	// The next agent does everything for it: a service, a dead proxy, its end.
	c.service(assay.Service{Namespace: "default", Name: "web", VIPs: lab.Addrs("10.182.0.5"), Ports: []assay.Port{{Port: 80}},
		Endpoints: []assay.Endpoint{{Workload: web.Workload, Identity: web.Identity, Addrs: web.Addrs, Targets: []uint16{8080}}}})
	lab.Eventually(t, "the service answers", func() bool {
		line, err := talk(web.Namespace, "10.182.0.5:80")
		return err == nil && strings.HasPrefix(line, "outbound 10.182.0.5:80")
	})
	syscall.Kill(before.Proxy.PID, syscall.SIGKILL)
	if _, err := talk(far, web.addr(0, "8080")); err != nil {
		t.Errorf("after the adopted proxy died: %v", err)
	}
	web.stop()
	if left := leftovers(t, cfg); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
}

// An agent that ends and leaves its workloads says nothing of an end: whoever runs a
// command stays with it, and finds the next agent.
func TestAgentEndsAndTheNextIsFound(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts = c.client(t)
	a := startAgent(t, cfg)
	web := startApp(t, a.socket(), RunRequest{Service: "web", Ports: []uint16{8080}}, ":8080")
	lab.Eventually(t, "a certificate", func() bool { return c.certified("web-") != nil })
	a.stop()
	select {
	case <-web.over:
		t.Fatal("the workload is over, it is said")
	default:
	}
	cfg.EndWorkloads = true
	a = startAgent(t, cfg)
	lab.Eventually(t, "the next agent hears of the command", func() bool {
		web.Draining()
		w := c.workload("web-")
		return w != nil && w.GetDraining()
	})
	// This one ends it, and says so.
	a.stop()
	select {
	case <-web.over:
	case <-time.After(5 * time.Second):
		t.Error("nobody said that the workload is over")
	}
}

// A control that was started again counts its resources anew: the same number may be
// another content.
func TestControlCountsAnew(t *testing.T) {
	near, far, err := link.Pair()
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	proxy, err := link.FileConn(far)
	if err != nil {
		t.Fatal(err)
	}
	defer proxy.Close()
	a := &Agent{log: slog.New(slog.DiscardHandler), outbox: newOutbox()}
	s := newSession(a.newWorkload(record{Workload: assay.Workload{ID: "web-1", Namespace: "default"}}, nil), newGeneration(nil, "", ""), near)
	for epoch, port := range []uint16{80, 80, 81} {
		service := &assay.Service{Namespace: "default", Name: "web", Ports: []assay.Port{{Port: port}}}
		of := version{epoch: uint64(epoch / 2), number: 3} // the second is the first again
		v := &view{number: uint64(epoch + 1), services: map[string]versioned{service.Key(): {service, of}}}
		if err := s.updateServices(v, epoch == 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []uint16{80, 81} {
		proxy.Socket().SetReadDeadline(time.Now().Add(time.Second))
		m, err := proxy.Receive()
		if err != nil {
			t.Fatalf("port %d: %v", want, err)
		}
		var d link.Services
		if err := m.Decode(&d); err != nil || len(d.Upsert) != 1 || d.Upsert[0].Ports[0].Port != want {
			t.Errorf("want port %d: %+v, %v", want, d, err)
		}
	}
}

// What has nobody any more is swept by the next agent, whatever else was killed.
func TestNothingIsLeftAfterEverythingWasKilled(t *testing.T) {
	for _, kills := range []string{"agent owner", "agent owner proxy", "agent owner app", "agent proxy app owner", "agent app", "owner", "app"} {
		t.Run(kills, func(t *testing.T) {
			log := logs(t)
			c := newTestControl(t)
			c.start(t)
			dir := t.TempDir()
			first := startAgentProcess(t, dir, c, log)
			cfg := testConfig(dir, log)
			owner := child(t, log, "ASSAY_TEST_OWNER="+filepath.Join(cfg.RuntimeDir, SocketName))
			out, err := owner.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			begin(t, owner)
			line, err := bufio.NewReader(out).ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			id := strings.Fields(line)[0]
			var rec record
			lab.Eventually(t, "the command is on record", func() bool {
				return readJSON(filepath.Join(cfg.DataDir, "workloads", id+".json"), &rec) == nil && rec.Command.PID != 0
			})
			app, err := rec.Command.open()
			if err != nil {
				t.Fatal(err)
			}
			defer app.Close()
			for _, who := range strings.Fields(kills) {
				switch who {
				case "agent":
					kill(first)
				case "owner":
					kill(owner)
				case "proxy":
					syscall.Kill(rec.Proxy.PID, syscall.SIGKILL)
				case "app":
					app.Signal(syscall.SIGKILL)
				}
			}
			if strings.Contains(kills, "agent") {
				cfg.Hosts, cfg.EndWorkloads = c.client(t), true
				a := startAgent(t, cfg)
				defer a.stop()
			}
			lab.Eventually(t, "the application has ended", func() bool { return !app.Alive() })
			kill(owner)
			lab.Eventually(t, "nothing is left", func() bool {
				left := leftovers(t, cfg)
				// An agent that still runs is this binary too, but on the host.
				return left == ""
			})
			lab.Eventually(t, "control has forgotten it", func() bool { return c.workload("owned-") == nil })
		})
	}
}

func TestTwoAgentsOnOneFolder(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts, cfg.EndWorkloads = c.client(t), true
	startAgent(t, cfg)
	second, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Run(t.Context()); assay.KindOf(err) != assay.Conflict {
		t.Errorf("the second agent: %v, want a conflict", err)
	}
}

func TestControlRefuses(t *testing.T) {
	c := newTestControl(t)
	c.covers = func(namespace, service string) bool { return service == "allowed" }
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts, cfg.EndWorkloads = c.client(t), true
	a := startAgent(t, cfg)
	_, err := Place(t.Context(), a.socket(), RunRequest{Service: "secret"})
	var e *assay.Error
	if !errors.As(err, &e) || e.Kind != assay.Denied || e.Remedy != "join with another token" {
		t.Errorf("placement: %v", err)
	}
	app := startApp(t, a.socket(), RunRequest{Service: "allowed"}, ":8080")
	ended := a.workload(app.Workload)
	app.stop()
	if err := ended.save(); err != nil { // as the one does who attests it meanwhile
		t.Error(err)
	}
	if left := leftovers(t, cfg); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
	for _, bad := range []RunRequest{{}, {Service: "Upper"}, {Service: "allowed", Namespace: "a/b"}, {Service: "allowed", Artifact: "/no/such"}, {Service: "allowed", Artifact: "relative"}} {
		if _, err := Place(t.Context(), a.socket(), bad); assay.KindOf(err) != assay.Invalid {
			t.Errorf("%+v: %v, want invalid", bad, err)
		}
	}
}

func TestControlIsAway(t *testing.T) {
	log := logs(t)
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), log)
	cfg.Hosts = c.client(t)
	a := startAgent(t, cfg)
	c.service(assay.Service{Namespace: "default", Name: "old", VIPs: lab.Addrs("10.182.0.9"), Ports: []assay.Port{{Port: 80}},
		Endpoints: []assay.Endpoint{{Workload: "elsewhere", Identity: assay.Identity{TrustDomain: "bank.example", Namespace: "default", Account: "old"}, Addrs: lab.Addrs("10.181.9.2"), Targets: []uint16{80}}}})
	snapshot := filepath.Join(cfg.DataDir, "snapshot")
	lab.Eventually(t, "the snapshot is on disk", func() bool {
		s, err := loadSnapshot(snapshot)
		return err == nil && s.resources["service/default/old"] != nil && s.bundle != nil
	})
	if st, err := os.Stat(snapshot); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("snapshot: %v, %v", st.Mode(), err)
	}
	a.stop()
	c.stop()

	// An agent that starts without control knows what the last one knew.
	cfg.EndWorkloads = true
	a = startAgent(t, cfg)
	web := startApp(t, a.socket(), RunRequest{Service: "web"}, ":8080")
	if web.Warning == "" {
		t.Error("nobody was told that control is away")
	}
	if line, err := talk(web.Namespace, "10.182.0.9:80"); err != nil || line != "outbound 10.182.0.9:80\n" {
		t.Errorf("a service of the snapshot: %q, %v", line, err)
	}
	c.start(t)
	lab.Eventually(t, "the certificate comes with control", func() bool { return c.certified("web-") != nil })
	c.mu.Lock()
	last := c.hellos[len(c.hellos)-1]
	c.mu.Unlock()
	if last.GetEpoch() != 7 || last.GetKnown()["service/default/old"] == 0 {
		t.Errorf("the greeting did not say what is known: %v", last)
	}
}

func TestAnotherExecutableIsAttestedAgain(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts, cfg.EndWorkloads = c.client(t), true
	a := startAgent(t, cfg)
	p, err := Place(t.Context(), a.socket(), RunRequest{Service: "changing"})
	if err != nil {
		t.Fatal(err)
	}
	go p.Run(t.Context())
	cmd := exec.Command("sh", "-c", "read line; exec sleep 60")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	pidfd := -1
	cmd.SysProcAttr = &syscall.SysProcAttr{PidFD: &pidfd}
	if err := p.Namespace.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	defer func() { kill(cmd); p.Ended(t.Context()) }()
	if err := p.Started(os.NewFile(uintptr(pidfd), "pidfd")); err != nil {
		t.Fatal(err)
	}
	certified := func(name string, unproven bool) func() bool {
		return func() bool {
			art := c.certified("changing-")
			return len(art) == 1 && strings.Contains(filepath.Base(art[0].GetName()), name) && (art[0].GetUnproven() != "") == unproven
		}
	}
	lab.Eventually(t, "the shell is certified as an interpreter", certified("sh", true))
	io.WriteString(in, "go\n")
	lab.Eventually(t, "what it executes then is certified", certified("sleep", false))
}

func TestWhoMayRun(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts, cfg.EndWorkloads = c.client(t), true
	a := startAgent(t, cfg)
	web := startApp(t, a.socket(), RunRequest{Service: "web"}, ":8080")
	// From inside a workload, as root.
	owner := child(t, io.Discard, "ASSAY_TEST_OWNER="+a.socket())
	var errs strings.Builder
	owner.Stderr = &errs
	if err := web.Namespace.Do(owner.Start); err != nil {
		t.Fatal(err)
	}
	owner.Wait()
	if !strings.Contains(errs.String(), "a workload cannot start workloads") {
		t.Errorf("run inside a workload: %s", errs.String())
	}
	// As somebody else.
	owner = child(t, io.Discard, "ASSAY_TEST_OWNER="+a.socket())
	errs.Reset()
	owner.Stderr = &errs
	owner.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 12345}}
	if err := owner.Run(); err == nil || !strings.Contains(errs.String(), "user 12345 may not") {
		t.Errorf("run as an ordinary user: %v, %s", err, errs.String())
	}
	if n := len(a.all()); n != 1 {
		t.Errorf("%d workloads, want one", n)
	}
}

// A proxy has one capability, no way to more, and nothing open but its link.
func TestProxyIsConfined(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts, cfg.EndWorkloads = c.client(t), true
	a := startAgent(t, cfg)
	web := startApp(t, a.socket(), RunRequest{Service: "web"}, ":8080")
	ref := proxyOf(t, a.Agent, web.Workload)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", ref.PID))
	if err != nil {
		t.Fatal(err)
	}
	raw := fmt.Sprintf("%016x", uint64(1)<<unix.CAP_NET_RAW)
	uid := strconv.Itoa(900000001)
	for name, want := range map[string]string{
		"CapPrm": raw, "CapEff": raw, "CapBnd": raw, "CapAmb": raw, "NoNewPrivs": "1", "Uid": strings.Join([]string{uid, uid, uid, uid}, " "), "Groups": "",
	} {
		for line := range strings.Lines(string(status)) {
			if v, ok := strings.CutPrefix(line, name+":"); ok && strings.Join(strings.Fields(v), " ") != want {
				t.Errorf("%s is %q, want %q", name, strings.TrimSpace(v), want)
			}
		}
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", ref.PID))
	if err != nil {
		t.Fatal(err)
	}
	if f := strings.Fields(string(stat)); f[len(f)-52+5] == "" {
		t.Error("no session")
	}
	environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", ref.PID))
	if err != nil || string(environ) != proxyEnv[0]+"\x00" {
		t.Errorf("its environment is %q, %v", environ, err)
	}
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", ref.PID))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		target, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", ref.PID, e.Name()))
		ok := strings.HasPrefix(target, "socket:") || strings.HasPrefix(target, "anon_inode:") || target == os.DevNull ||
			strings.HasSuffix(target, web.Workload+".log") || strings.HasPrefix(target, "/memfd:") || strings.HasPrefix(target, "/sys/fs/cgroup/") // Go's own
		if !ok {
			t.Errorf("descriptor %s is open: %s", e.Name(), target)
		}
	}
	// It cannot be mistaken for another process with its number.
	if _, err := (processRef{ref.PID, ref.Start + 1}).open(); !errors.Is(err, attest.ErrGone) {
		t.Errorf("another start time: %v", err)
	}
}

func TestArtifactTree(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts, cfg.EndWorkloads = c.client(t), true
	a := startAgent(t, cfg)
	tree := t.TempDir()
	if err := os.WriteFile(filepath.Join(tree, "main.py"), []byte("print(1)"), 0o644); err != nil {
		t.Fatal(err)
	}
	startApp(t, a.socket(), RunRequest{Service: "scripted", Artifact: tree}, ":8080")
	want, err := a.digester.TreeDigest(tree)
	if err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, "executable and tree are certified", func() bool {
		var kinds []string
		for _, x := range c.certified("scripted-") {
			kinds = append(kinds, x.GetKind())
			if x.GetKind() == string(assay.Tree) && x.GetDigest() != string(want) {
				return false
			}
		}
		return strings.Join(kinds, " ") == "executable tree"
	})
}

var _ api.HostsClient = (*Remote)(nil)

func TestMetrics(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Hosts, cfg.EndWorkloads, cfg.Metrics = c.client(t), true, l
	a := startAgent(t, cfg)
	web := startApp(t, a.socket(), RunRequest{Service: "web"}, ":8080")
	far := outsider(t, cfg.Bridge)
	lab.Eventually(t, "the application answers", func() bool {
		_, err := talk(far, web.addr(0, "8080"))
		return err == nil
	})
	lab.Eventually(t, "a certificate", func() bool { return c.certified("web-") != nil })
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	read := func() string {
		r, err := client.Get("http://" + l.Addr().String() + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	c.service(assay.Service{Namespace: "default", Name: "other", Ports: []assay.Port{{Name: "http", Port: 80}}})
	lab.Eventually(t, "the proxy uses what control has changed", func() bool {
		return !strings.Contains(read(), "\nassay_proxy_convergence_seconds_count 0\n")
	})
	text := read()
	who := `workload="` + web.Workload + `",namespace="default",name="web"`
	series := `{` + who + `,direction="inbound",service="default/web",protocol="opaque",security="plaintext"}`
	for _, want := range []string{
		"assay_control_connected 1\n", "assay_workloads 1\n", "assay_requests_total" + series + " 1\n",
		"assay_tls_handshakes_total{" + who + "} 1\n", "assay_certificate_expiry_timestamp_seconds{" + who + "} ",
		`le="+Inf"} 0`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("metrics lack %q", want)
		}
	}
	if t.Failed() {
		t.Log(text)
	}
	// Every line is a comment or a sample, and no family is there twice.
	families := map[string]bool{}
	for line := range strings.Lines(text) {
		if name, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name = strings.Fields(name)[0]
			if families[name] {
				t.Errorf("family %s twice", name)
			}
			families[name] = true
			continue
		}
		if strings.HasPrefix(line, "#") {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		if _, err := strconv.ParseFloat(strings.TrimSpace(line[i+1:]), 64); i < 0 || err != nil {
			t.Errorf("not a sample: %q", line)
		}
	}
}
