package agent

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/agent/internal/lab"
	"assay.dev/agent/netns"
	"golang.org/x/sys/unix"
)

const ownPod = "0c5c9a5e-own"

// runTestOwn is an agent in a container of its pod. It says when the pod is in the mesh.
func runTestOwn() {
	go followTest()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := serveOwn(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serveOwn(ctx context.Context) error {
	if err := netns.OnThread(func() error { return unix.Unshare(unix.CLONE_NEWNET) }); err != unix.EPERM {
		return fmt.Errorf("a container that makes namespaces: %v", err)
	}
	c := &testControl{path: os.Getenv("ASSAY_TEST_OWN")}
	cfg := testConfig(os.Getenv("ASSAY_TEST_DIR"), os.Stderr)
	cfg.Hosts = c.client(&testing.T{})
	cfg.Own, cfg.Last = &Own{Node: "node-0123456789abcdef", Addrs: lab.Addrs("192.0.2.7"), Memory: 64 << 20}, true
	a, err := New(cfg)
	if err != nil {
		return err
	}
	if err := a.TrackOwn(); err != nil {
		return err
	}
	running, end := context.WithCancel(context.Background())
	defer end()
	done := make(chan error, 1)
	go func() { done <- a.Run(running) }()
	err = a.MeshOwn(ctx, Pod{ID: ownPod, Namespace: "bank", Account: "robot", Addrs: lab.Addrs(podAddr), Ports: []uint16{8080}, Probes: []uint16{8080}})
	if err == nil {
		fmt.Println("ready")
		<-ctx.Done()
		err = a.PodEnded(running, ownPod)
	}
	end()
	return errors.Join(err, <-done)
}

// startOwn starts it and returns when it is ready.
func startOwn(t *testing.T, ns *netns.Namespace, dir string, c *testControl, log io.Writer) *exec.Cmd {
	t.Helper()
	cmd := child(t, log, "ASSAY_TEST_OWN="+c.path, "ASSAY_TEST_DIR="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	lab.StartContained(t, ns, cmd)
	ready := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(out).ReadString('\n')
		ready <- line
	}()
	select {
	case line := <-ready:
		if line != "ready\n" {
			t.Fatalf("it says %q", line)
		}
	case <-time.After(60 * time.Second):
		t.Fatal("it is not ready within 60 seconds")
	}
	return cmd
}

// TestOwnPod: an agent in a container of its pod, with few capabilities and no setting of the
// kernel's. The application is captured from its first moment, sees its clients, gets a
// certificate when the platform says what it runs, and another when that changes. Without the
// agent it reaches nobody, and nobody it; the next one goes on.
func TestOwnPod(t *testing.T) {
	c := newTestControl(t)
	c.pods = true
	c.start(t)
	dir, log := t.TempDir(), logs(t)
	host := testConfig(dir, log)
	bridge := &netns.Host{Bridge: host.Bridge, Prefixes: lab.Prefixes("10.181.7.0/24"), Mesh: lab.Prefixes("10.181.0.0/16")}
	if err := bridge.Setup(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { bridge.Remove() })
	p := &pod{ns: outsider(t, host.Bridge)}
	far := client(t, host)
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
	c.service(assay.Service{Namespace: "bank", Name: "robot", Ports: []assay.Port{{Port: 8080}}})
	agent := startOwn(t, p.ns, filepath.Join(dir, "pod"), c, log)

	app := exec.Command("/proc/self/exe")
	app.Env = append(os.Environ(), "ASSAY_TEST_APP=:8080")
	app.Stdin, app.Stderr = lifeline(), os.Stderr
	if err := p.ns.Do(app.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { kill(app) })
	captured := func(when string) {
		t.Helper()
		hold(t, far).ping(t, when)
		if line, err := talk(p.ns, "10.181.7.201:80"); line != "outbound 10.181.7.201:80\n" {
			t.Errorf("%s: what the pod dials: %q, %v", when, line, err)
		}
	}
	cut := func(when string) {
		t.Helper()
		if _, err := talk(far, podAddr+":8080"); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: who dials the pod: %v", when, err)
		}
		if _, err := talk(p.ns, "10.181.7.201:80"); !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: what the pod dials: %v", when, err)
		}
	}
	captured("at once")
	lab.Eventually(t, "control knows that it listens", func() bool {
		w := c.workload(ownPod)
		return w != nil && len(w.GetListening()) == 1 && w.GetListening()[0] == 8080
	})
	if c.certified(ownPod) != nil {
		t.Error("certified before what it runs was known")
	}
	for _, image := range []string{"1", "2"} {
		c.run(ownPod, image)
		lab.Eventually(t, "a certificate with image "+image, func() bool {
			got := c.certified(ownPod)
			return len(got) == 1 && got[0].GetName() == "image-"+image
		})
	}

	kill(agent)
	lab.Eventually(t, "its proxy ends with it", func() bool {
		_, err := talk(far, podAddr+":8080")
		return errors.Is(err, unix.ECONNREFUSED)
	})
	cut("without an agent")
	agent = startOwn(t, p.ns, filepath.Join(dir, "pod"), c, log)
	captured("with the next one")
	lab.Eventually(t, "control has it still", func() bool { return c.workload(ownPod) != nil })

	if err := agent.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := agent.Wait(); err != nil {
		t.Error("it ends with", err)
	}
	lab.Eventually(t, "control has forgotten it", func() bool { return c.workload(ownPod) == nil })
	cut("at the end")
	if left, _ := filepath.Glob(filepath.Join(dir, "pod", "data", "workloads", "*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	startOwn(t, p.ns, filepath.Join(dir, "pod"), c, log)
	captured("begun anew")
	for _, f := range c.foundSoFar() {
		if !strings.Contains(f.GetKind(), "certificate") {
			t.Errorf("finding %s: %s", f.GetKind(), f.GetDetail())
		}
	}
}
