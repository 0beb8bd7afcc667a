package agent

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"assay.dev"
	"assay.dev/agent/attest"
	"assay.dev/agent/internal/lab"
	"golang.org/x/sys/unix"
)

// TestOutside: a pod's proxy has the mounts of the runtime, a control group of its own
// with a limit, and the pod's score, also when another agent starts it; and the group
// goes with the pod.
func TestOutside(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "runtime.sock")
	l, err := net.Listen("unix", socket) // the runtime is this process
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	random := make([]byte, 4)
	rand.Read(random)
	outside := func() *Outside {
		return &Outside{Runtime: socket, Cgroup: "/sys/fs/cgroup", Memory: 128 << 20, folder: "assay-test-" + hex.EncodeToString(random)}
	}
	o := outside()
	g, limited, err := o.group("probe")
	if err != nil || limited != nil {
		t.Skipf("no control groups can be made here: %v %v", err, limited)
	}
	t.Cleanup(func() {
		for _, h := range g.list {
			os.Remove(filepath.Join(h.dir, o.folder))
		}
	})
	if got := o.groups(); len(got) == 0 || got[0] != "probe" {
		t.Errorf("groups are %v", got)
	}

	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts, cfg.Outside = c.client(t), o
	a := startAgent(t, cfg)
	if got := o.groups(); len(got) > 0 {
		t.Errorf("an agent that begins leaves groups of nobody's: %v", got)
	}
	p, far := newPod(t, cfg), client(t, cfg)
	spec := p.spec()
	spec.OOMScore = 777
	if err := a.Mesh(t.Context(), spec); err != nil {
		t.Fatal(err)
	}
	if err := a.Attest(spec.ID, assay.ArtifactSet{{Kind: assay.Image, Digest: assay.DigestOf(nil), Name: "web"}}); err != nil {
		t.Fatal(err)
	}
	proxy := func() *attest.Process {
		t.Helper()
		var rec record
		if err := readJSON(a.store.path("workloads", spec.ID+".json"), &rec); err != nil {
			t.Fatal(err)
		}
		proc, err := rec.Proxy.open()
		if err != nil {
			return nil
		}
		return proc
	}
	confined := func() {
		t.Helper()
		proc := proxy()
		if proc == nil {
			t.Fatal("there is no proxy")
		}
		defer proc.Close()
		read := func(name string) string {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", proc.PID(), name))
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
		for _, h := range g.list {
			lab.Eventually(t, "the proxy is alone in its group of "+h.dir, func() bool { // the thread that started it ends soon
				b, err := os.ReadFile(filepath.Join(h.dir, o.folder, spec.ID, "cgroup.procs"))
				return err == nil && strings.TrimSpace(string(b)) == fmt.Sprint(proc.PID())
			})
		}
		if got := strings.TrimSpace(read("oom_score_adj")); got != "777" {
			t.Errorf("oom_score_adj is %s", got)
		}
		if env := read("environ"); !strings.Contains(env, fmt.Sprint("GOMEMLIMIT=", 96<<20)) {
			t.Errorf("its environment is %q", env)
		}
	}
	confined()
	hold(t, far)

	a.stop()
	cfg.Outside = outside()
	a = startAgent(t, cfg)
	old := proxy()
	if old == nil {
		t.Fatal("the proxy ended with the agent")
	}
	defer old.Close()
	if err := old.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, "another proxy follows", func() bool {
		now := proxy()
		if now == nil {
			return false
		}
		defer now.Close()
		return now.PID() != old.PID()
	})
	hold(t, far)
	confined()
	if err := a.PodEnded(t.Context(), spec.ID); err != nil {
		t.Fatal(err)
	}
	if got := o.groups(); len(got) > 0 {
		t.Errorf("left are %v", got)
	}
}

// TestOutsideAway: without the runtime nothing can be placed, and that is said.
func TestOutsideAway(t *testing.T) {
	o := &Outside{Runtime: filepath.Join(t.TempDir(), "none.sock"), Cgroup: t.TempDir()}
	if err := o.in(func() error { return nil }); assay.KindOf(err) != assay.Unavailable || !strings.Contains(err.Error(), "none.sock") {
		t.Errorf("a runtime that is away: %v", err)
	}
	if _, _, err := o.group("x"); assay.KindOf(err) != assay.NotFound || !strings.Contains(err.Error(), "--cgroup") {
		t.Errorf("no control groups: %v", err)
	}
}
