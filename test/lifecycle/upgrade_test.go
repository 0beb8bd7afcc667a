package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"assay.dev/test/lab"
)

// Where the proxies of an upgrade lie: each in a folder of its own, and a link to the
// one that is installed. Seen from the host a process tells by its path which it is.
const (
	proxyLink   = "/tmp/assay-proxy"
	proxyFolder = "/tmp/proxies"
)

// upgradeable is a mesh whose proxies can be replaced.
type upgradeable struct {
	*lab.World
	n int // of the executable that is installed
}

func newUpgradeable(t *testing.T, args ...string) *upgradeable {
	t.Helper()
	u := &upgradeable{World: &lab.World{Lab: lab.New(t), Mode: lab.Meshed}}
	u.install(t)
	u.Mesh = u.StartMesh(t, append([]string{"--proxy", proxyLink, "--metrics", "127.0.0.1:9181"}, args...)...)
	t.Cleanup(func() { u.Mesh.Finish(t) })
	t.Cleanup(func() {
		os.RemoveAll(u.Path(proxyFolder))
		os.Remove(u.Path(proxyLink))
	})
	return u
}

// install puts another executable in the place of the last one. It differs by a byte
// that nobody reads.
func (u *upgradeable) install(t *testing.T) {
	t.Helper()
	assay, err := lab.BuildAssay()
	if err != nil {
		t.Fatal(err)
	}
	exe, err := os.ReadFile(u.Path(filepath.Join(filepath.Dir(assay), "assay-proxy")))
	if err != nil {
		t.Fatal(err)
	}
	old := u.n
	u.n++
	dir := u.Path(fmt.Sprintf("%s/%d", proxyFolder, u.n))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(u.Path(proxyFolder), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/assay-proxy", append(exe, byte(u.n)), 0o755); err != nil {
		t.Fatal(err)
	}
	next := u.Path(proxyLink + ".new")
	if err := os.Symlink(fmt.Sprintf("%s/%d/assay-proxy", proxyFolder, u.n), next); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, u.Path(proxyLink)); err != nil {
		t.Fatal(err)
	}
	if old > 0 && len(u.generations(t, old)) == 0 {
		os.RemoveAll(u.Path(fmt.Sprintf("%s/%d", proxyFolder, old)))
	}
}

// generations lists the proxies that execute installation n; 0 stands for any.
func (u *upgradeable) generations(t *testing.T, n int) (list []lab.ProcessInfo) {
	t.Helper()
	want := fmt.Sprintf("%s/%d/", proxyFolder, n)
	if n == 0 {
		want = proxyFolder + "/"
	}
	for _, p := range u.Processes() {
		if strings.Contains(p.Exe, want) {
			list = append(list, p)
		}
	}
	return list
}

// upgrade installs another proxy and waits until every workload's current one is that.
func (u *upgradeable) upgrade(t *testing.T, workloads int) {
	t.Helper()
	u.install(t)
	if err := u.Mesh.Agent.Signal(syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, 60*time.Second, fmt.Sprintf("upgrade %d", u.n), func() error {
		out := u.metrics(t)
		current := map[string]bool{}
		for _, line := range strings.Split(out, "\n") {
			if strings.HasPrefix(line, "assay_proxy_connections{") && strings.Contains(line, `state="current"`) {
				_, pid, _ := strings.Cut(line, `pid="`)
				pid, _, _ = strings.Cut(pid, `"`)
				current[pid] = true
			}
		}
		done := 0
		for _, p := range u.generations(t, u.n) {
			if current[u.inside(t, p.PID)] {
				done++
			}
		}
		if done != workloads {
			return fmt.Errorf("%d of %d workloads have the new proxy\n%s", done, workloads, out)
		}
		return nil
	})
}

func (u *upgradeable) metrics(t *testing.T) string {
	t.Helper()
	return u.MustExec(t, "curl", "-sS", "http://127.0.0.1:9181/metrics")
}

// inside is a process's number in the lab.
func (u *upgradeable) inside(t *testing.T, pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "NSpid:"); ok {
			f := strings.Fields(rest)
			return f[len(f)-1]
		}
	}
	return ""
}

const portGRPC = 9000

// serveGRPC gives a workload a gRPC service.
func serveGRPC(t *testing.T, w *lab.Workload) {
	t.Helper()
	server := grpc.NewServer()
	healthpb.RegisterHealthServer(server, health.NewServer())
	l := w.Listen(t, portGRPC)
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	t.Cleanup(func() { server.Stop(); <-done })
}

// calls makes unary calls on one client connection, which follows GOAWAY.
func (l *load) calls(ctx context.Context, client *lab.Workload, to netip.AddrPort) {
	defer l.ended.Done()
	conn, err := grpc.NewClient("passthrough:///"+to.String(),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return client.Dial(to) }))
	if err != nil {
		l.count(time.Now(), time.Now(), caller{client: client, server: "grpc"}, err)
		return
	}
	defer conn.Close()
	check := healthpb.NewHealthClient(conn)
	for ctx.Err() == nil {
		began := time.Now()
		one, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		_, err := check.Check(one, &healthpb.HealthCheckRequest{})
		cancel()
		l.count(began, began, caller{client: client, server: "grpc"}, err)
		pause(ctx)
	}
}

// TestUpgrades replaces all proxies fifty times while requests, calls and long
// conversations run. None may be lost, and a conversation that began before the first
// upgrade goes on in the proxy that it began with, as a database session of a day does.
func TestUpgrades(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent", "curl")
	u := newUpgradeable(t)
	server := u.Workload(t, "shop", lab.Spec{Ports: []int{portHTTP, portEcho, portGRPC}})
	client := u.Workload(t, "buyer", lab.Spec{})
	serve(t, server)
	serveGRPC(t, server)
	for _, port := range []int{portHTTP, portEcho, portGRPC} {
		u.AwaitService(t, client, "shop", port)
	}
	session := mustConverse(t, client, "shop") // in the first proxies
	must(t, "the session", session.say())
	to := client.Target(t, "shop", portHTTP)
	fixed := func() (netip.AddrPort, error) { return to, nil }
	ctx, stop := context.WithCancel(t.Context())
	l := &load{stop: stop}
	t.Cleanup(func() { l.finish() })
	for _, c := range []caller{{client, "shop", fixed, 1 << 30}, {client, "shop", fixed, 20}, {client, "shop", fixed, 1}} {
		l.ended.Add(1)
		go l.web(ctx, c)
	}
	l.ended.Add(1)
	go l.calls(ctx, client, client.Target(t, "shop", portGRPC))

	most := 0
	for range 50 {
		u.upgrade(t, 2)
		most = max(most, len(u.generations(t, 0)))
		must(t, fmt.Sprintf("the session after upgrade %d", u.n-1), session.say())
		if _, failed := l.soFar(); failed > 0 || t.Failed() {
			break
		}
	}
	done, failures := l.finish()
	for i, f := range failures {
		if i < 10 {
			t.Errorf("lost: %s", f)
		}
	}
	t.Logf("%d requests and calls over %d upgrades, %d lost; at most %d proxies of 2 workloads at once", done, u.n-1, len(failures), most)
	if len(failures) > 0 || done < 1000 {
		t.Errorf("%d requests done, %d lost", done, len(failures))
	}
	if first := u.generations(t, 1); len(first) != 2 {
		t.Errorf("the session began in 2 proxies, %d of which are left", len(first))
	}
	if most > 2*3 {
		t.Errorf("%d proxies of 2 workloads at once, at most 3 each are allowed", most)
	}
	session.c.Close()
	lab.Eventually(t, 20*time.Second, "the first proxies have ended", func() error {
		if n := len(u.generations(t, 1)); n > 0 {
			return fmt.Errorf("%d are left", n)
		}
		return nil
	})
}

// TestDrainDeadline holds a session beyond the drain of the proxy that it is in: it is
// reset then, and until then the metrics show what is waited for.
func TestDrainDeadline(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent", "curl")
	u := newUpgradeable(t, "--proxy-drain", "3s")
	client, server := pair(t, u.World)
	session := mustConverse(t, client, "shop")
	must(t, "the session", session.say())
	began := time.Now()
	u.upgrade(t, 2)
	must(t, "the session after an upgrade", session.say())
	if out := u.metrics(t); !strings.Contains(out, `state="draining"`) || !strings.Contains(out, "assay_proxy_drain_deadline_seconds{") {
		t.Errorf("the metrics show no drain:\n%s", out)
	}
	session.c.SetDeadline(time.Now().Add(20 * time.Second))
	_, err := session.r.ReadString('\n')
	if took := time.Since(began); err == nil || errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded) || took < 2*time.Second {
		t.Errorf("the session ended with %v after %s, want a reset after 3 s", err, took)
	}
	lab.Eventually(t, 20*time.Second, "the old proxies have ended", func() error {
		if n := len(u.generations(t, 1)); n > 0 {
			return fmt.Errorf("%d are left\n%s", n, u.Mesh.ProxyLogs(t, client, server))
		}
		return nil
	})
	must(t, "everything anew", everything(t, client))
}

// TestBrokenProxyIsNotInstalled upgrades to something that is no proxy: the workloads
// keep what they have.
func TestBrokenProxyIsNotInstalled(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent", "curl")
	u := newUpgradeable(t)
	client, _ := pair(t, u.World)
	session := mustConverse(t, client, "shop")
	u.n++
	u.Write(t, fmt.Sprintf("%s/%d/assay-proxy", proxyFolder, u.n), "#!/bin/sh\nexit 3\n")
	if err := os.Chmod(u.Path(fmt.Sprintf("%s/%d/assay-proxy", proxyFolder, u.n)), 0o755); err != nil {
		t.Fatal(err)
	}
	os.Remove(u.Path(proxyLink))
	if err := os.Symlink(fmt.Sprintf("%s/%d/assay-proxy", proxyFolder, u.n), u.Path(proxyLink)); err != nil {
		t.Fatal(err)
	}
	if err := u.Mesh.Agent.Signal(syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, 30*time.Second, "the failure is told", func() error {
		if out := u.Mesh.CLI(t, "check"); !strings.Contains(out.Stdout, "upgrade-failed") {
			return fmt.Errorf("assay check says:\n%s", out.Stdout)
		}
		return nil
	})
	must(t, "the session", session.say())
	must(t, "everything anew", everything(t, client))
	if n := len(u.generations(t, 1)); n != 2 {
		t.Errorf("%d of 2 old proxies are left", n)
	}
}
