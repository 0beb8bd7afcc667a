package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/agent/internal/lab"
	"assay.dev/agent/netns"
	"assay.dev/kube/cni"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// testerEnv is the process that runs the tests: whatever it started ends with it, also
// when it is killed or runs out of time.
const testerEnv = "ASSAY_TESTER"

func endWithTester() {
	pid, err := strconv.Atoi(os.Getenv(testerEnv))
	if err != nil {
		return
	}
	fd, err := unix.PidfdOpen(pid, 0)
	for err == nil || err == unix.EINTR {
		if _, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1); err == nil {
			break
		}
	}
	os.Exit(1)
}

func TestMain(m *testing.M) {
	if os.Getenv(testerEnv) == "" {
		os.Setenv(testerEnv, strconv.Itoa(os.Getpid())) // also of the one in namespaces: it is ended by us
	}
	lab.Contain()
	for _, role := range []string{"APP", "OWNER", "STRANGER", "AGENT"} {
		if os.Getenv("ASSAY_TEST_"+role) != "" {
			go endWithTester()
		}
	}
	switch {
	case filepath.Base(os.Args[0]) == cni.Type:
		runTestPlugin()
		return
	case strings.HasPrefix(os.Args[0], proxyName+" "):
		runTestProxy()
		return
	case os.Getenv("ASSAY_TEST_APP") != "":
		runTestApp()
		return
	case os.Getenv("ASSAY_TEST_OWNER") != "":
		runTestOwner()
		return
	case os.Getenv("ASSAY_TEST_STRANGER") != "":
		runTestStranger()
		return
	case os.Getenv("ASSAY_TEST_OWN") != "":
		runTestOwn()
		return
	case os.Getenv("ASSAY_TEST_AGENT") != "":
		runTestAgent()
		return
	}
	lab.Main(m)
}

// runTestApp is an application: it listens where it is told, tells each client whom
// it sees and echoes.
func runTestApp() {
	go followTest()
	l, err := net.Listen("tcp", os.Getenv("ASSAY_TEST_APP"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			fmt.Fprintf(c, "client %s\n", c.RemoteAddr())
			io.Copy(c, c)
			c.Close()
		}()
	}
}

// lifeline is the standard input of what a test starts: it ends with the test binary,
// however that ends, and so do they. They are in sessions and namespaces of their own.
var lifeline = sync.OnceValue(func() *os.File {
	r, w, err := os.Pipe()
	if err != nil {
		panic(err)
	}
	held = w
	return r
})

var held *os.File // the other end, never closed

// followTest ends the process with the test that started it.
func followTest() {
	io.Copy(io.Discard, os.Stdin)
	os.Exit(3)
}

// runTestAgent is an agent in a process of its own, to be killed.
func runTestAgent() {
	go followTest()
	c := &testControl{path: os.Getenv("ASSAY_TEST_AGENT")}
	t := &testing.T{}
	a, err := New(testConfig(os.Getenv("ASSAY_TEST_DIR"), os.Stderr))
	if err == nil {
		a.cfg.Hosts = c.client(t)
		err = a.Run(context.Background())
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func testConfig(dir string, log io.Writer) Config {
	for d := dir; d != "/"; d = filepath.Dir(d) {
		if st, err := os.Stat(d); err == nil && st.Mode().Perm()&0o001 == 0 {
			os.Chmod(d, 0o755) // proxies have users of their own
		}
	}
	exe, err := os.Executable()
	if err != nil {
		panic(err)
	}
	return Config{
		DataDir: filepath.Join(dir, "data"), RuntimeDir: filepath.Join(dir, "run"), Proxy: exe, Bridge: "asy-test", HostName: "test",
		Upstreams: []netip.AddrPort{}, Log: slog.New(slog.NewTextHandler(log, nil)), CertificateWait: time.Second,
	}
}

// running is an agent under test.
type running struct {
	*Agent
	stop func()
}

func (r *running) socket() string { return r.socketPath() }

func startAgent(t testing.TB, cfg Config) *running {
	t.Helper()
	a, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	var once sync.Once
	stop := func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error("agent:", err)
			}
		})
	}
	t.Cleanup(stop)
	select {
	case <-a.Ready():
	case err := <-done:
		done <- nil
		t.Fatal("agent:", err)
	case <-time.After(30 * time.Second):
		t.Fatal("the agent is not ready within 30 seconds")
	}
	return &running{a, stop}
}

// logs collects a log and shows it when the test fails.
func logs(t testing.TB) io.Writer {
	l := &logBuffer{}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(l.String())
		}
	})
	return l
}

type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// app is what `assay run` does, without the command line: a place with a command.
type app struct {
	*Placement
	cmd  *exec.Cmd
	stop func()
}

func startApp(t testing.TB, socket string, req RunRequest, listen string) *app {
	t.Helper()
	p, err := Place(t.Context(), socket, req)
	if err != nil {
		t.Fatal(err)
	}
	a := &app{Placement: p, cmd: exec.Command("/proc/self/exe")}
	a.cmd.Env = append(os.Environ(), "ASSAY_TEST_APP="+listen)
	a.cmd.Stdin, a.cmd.Stderr = lifeline(), os.Stderr
	pidfd := -1
	a.cmd.SysProcAttr = &syscall.SysProcAttr{PidFD: &pidfd}
	if err := p.Namespace.Do(a.cmd.Start); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); p.Run(ctx) }()
	if err := p.Started(os.NewFile(uintptr(pidfd), "pidfd")); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	a.stop = func() {
		once.Do(func() {
			a.cmd.Process.Kill()
			a.cmd.Wait()
			end, stop := context.WithTimeout(context.Background(), 30*time.Second)
			p.Ended(end)
			if end.Err() != nil {
				t.Error("the agent did not remove the workload within 30 seconds")
			}
			stop()
			cancel()
			<-done
		})
	}
	t.Cleanup(a.stop)
	return a
}

func (a *app) addr(i int, port string) string { return net.JoinHostPort(a.Addrs[i].String(), port) }

// talk dials from ns and returns the first line.
func talk(ns *netns.Namespace, addr string) (string, error) {
	c, err := lab.Dial(ns, addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return bufio.NewReader(c).ReadString('\n')
}

// leftovers are what a host may keep of workloads.
func leftovers(t testing.TB, cfg Config) string {
	t.Helper()
	var found []string
	h := netns.Host{Bridge: cfg.Bridge}
	ports, err := h.Ports()
	if err != nil {
		t.Fatal(err)
	}
	found = append(found, ports...)
	for _, dir := range []string{filepath.Join(cfg.DataDir, "workloads"), filepath.Join(cfg.RuntimeDir, "workloads")} {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			found = append(found, filepath.Join(dir, e.Name()))
		}
	}
	self, err := hostNamespace()
	if err != nil {
		t.Fatal(err)
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	exe, _ := os.Readlink("/proc/self/exe")
	for _, d := range dirs {
		var st unix.Stat_t
		if got, _ := os.Readlink(d + "/exe"); got == exe && unix.Stat(d+"/ns/net", &st) == nil && st.Ino != self && d != fmt.Sprintf("/proc/%d", os.Getppid()) {
			found = append(found, d)
		}
	}
	return strings.Join(found, "\n")
}

func TestPlacing(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts, cfg.EndWorkloads = c.client(t), true
	a := startAgent(t, cfg)

	began := time.Now()
	web := startApp(t, a.socket(), RunRequest{Service: "web", Ports: []uint16{8080}, Labels: map[string]string{"tier": "front"}}, ":8080")
	t.Logf("placed and started in %v", time.Since(began))
	client := startApp(t, a.socket(), RunRequest{Service: "client", Account: "robot", Namespace: "bank"}, ":9")

	if got, want := web.Identity.String(), "spiffe://bank.example/ns/default/sa/web"; got != want {
		t.Errorf("identity %s, want %s", got, want)
	}
	lab.Eventually(t, "control shows the port that listens", func() bool {
		w := c.workload("web-")
		return w != nil && len(w.GetListening()) == 1 && w.GetListening()[0] == 8080 && w.GetMeshedSince() != 0
	})
	if w := c.workload("client-"); w.GetIdentity() != "spiffe://bank.example/ns/bank/sa/robot" {
		t.Errorf("workload %v", w)
	}
	lab.Eventually(t, "the certificate is about what runs", func() bool {
		art := c.certified("web-")
		exe, err := os.ReadFile("/proc/self/exe")
		return err == nil && len(art) == 1 && art[0].GetDigest() == string(assay.DigestOf(exe)) && art[0].GetUnproven() == ""
	})

	// From outside, through the inbound listener, with the client's own address.
	outside := lab.Namespace(t)
	if err := a.hostNetwork().Attach(outside, a.hostNetwork().Port(9999), lab.Addrs("10.181.7.200", "fd5a:5a59::7:0:0:200")); err != nil {
		t.Fatal(err)
	}
	for i, from := range []string{"10.181.7.200", "fd5a:5a59::7:0:0:200"} {
		if line, err := talk(outside, web.addr(i, "8080")); err != nil || !strings.Contains(line, from) {
			t.Errorf("the application said %q (%v), want the address %s", line, err, from)
		}
	}
	// From the workload, through the outbound listener.
	if line, err := talk(client.Namespace, web.addr(0, "8080")); err != nil || line != "outbound "+web.addr(0, "8080")+"\n" {
		t.Errorf("the proxy said %q (%v)", line, err)
	}

	// A virtual address answers while there is an endpoint.
	vip := netip.MustParseAddr("10.182.0.5")
	svc := assay.Service{Namespace: "default", Name: "web", VIPs: []netip.Addr{vip}, Ports: []assay.Port{{Port: 80}},
		Endpoints: []assay.Endpoint{{Workload: web.Workload, Identity: web.Identity, Addrs: web.Addrs, Targets: []uint16{8080}}}}
	if _, err := lab.Dial(client.Namespace, "10.182.0.5:80"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a service that is not there: %v", err)
	}
	c.service(svc)
	lab.Eventually(t, "the service answers", func() bool {
		line, err := talk(client.Namespace, "10.182.0.5:80")
		return err == nil && line == "outbound 10.182.0.5:80\n"
	})
	svc.Endpoints[0].Targets = []uint16{0}
	c.service(svc)
	lab.Eventually(t, "the service refuses", func() bool {
		_, err := talk(client.Namespace, "10.182.0.5:80")
		return errors.Is(err, unix.ECONNREFUSED)
	})

	// Excluded ports change the rules of running workloads.
	c.namespace(assay.NamespaceConfig{Namespace: "bank", Mode: assay.Strict, ExcludedPorts: []uint16{8080}})
	lab.Eventually(t, "the excluded port is not captured", func() bool {
		line, err := talk(client.Namespace, web.addr(0, "8080"))
		return err == nil && strings.HasPrefix(line, "client ")
	})

	lab.Eventually(t, "reports and acknowledgements arrive", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		r := c.reports[web.Workload]
		return r.GetHandshakes() >= 2 && c.acks[web.Workload] == 3 && c.acks[""] == 3
	})

	id := web.Workload
	web.stop()
	lab.Eventually(t, "control forgets the workload", func() bool { return c.workload("web-") == nil })
	if left := leftovers(t, cfg); strings.Contains(left, id) {
		t.Errorf("left behind:\n%s", left)
	}
	client.stop()
	a.stop()
	if err := (&netns.Host{Bridge: cfg.Bridge}).Remove(); err != nil {
		t.Error(err)
	}
	if left := leftovers(t, cfg); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
	if _, err := netlink.LinkByName(cfg.Bridge); err == nil {
		t.Error("the bridge is left behind")
	}
}
