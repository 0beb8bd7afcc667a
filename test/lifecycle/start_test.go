package lifecycle

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"assay.dev/test/lab"
)

// TestTwoOnOneFolder: the second refuses and says why; the first does not notice.
func TestTwoOnOneFolder(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent")
	w := lab.NewWorld(t, lab.Meshed)
	client, _ := pair(t, w)
	began := time.Now()
	r := w.Mesh.CLI(t, "up", "--data", w.Mesh.Data)
	if r.Code != 1 || !strings.Contains(r.Stderr+r.Stdout, w.Mesh.Data) || strings.Contains(r.Stderr, "panic") {
		t.Errorf("the second assay up: exit code %d, want 1 and the folder's name:\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("it took %s to refuse", took)
	}
	must(t, "after the second was refused", everything(t, client))
	if w.Mesh.Up.Ended() {
		t.Errorf("the first has ended: %s", w.Mesh.Up.Output())
	}
}

// TestSweep kills everything of the mesh at once; the next start removes what is left.
func TestSweep(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent")
	w := lab.NewWorld(t, lab.Meshed)
	client, server := pair(t, w)
	w.Mesh.Up.Kill()
	for _, x := range []*lab.Workload{client, server} {
		syscall.Kill(w.Mesh.Proxy(x), syscall.SIGKILL)
		syscall.Kill(x.PID, syscall.SIGKILL)
		x.Main.Kill()
	}
	w.Mesh.Start(t)
	var list []any
	w.Mesh.Get(t, "workloads", &list)
	if len(list) > 0 {
		t.Errorf("workloads of dead processes are listed: %v", list)
	}
	// The same names can be used again at once.
	client, server = pairAgain(t, w)
	must(t, "after the sweep", everything(t, client))
	for _, x := range []*lab.Workload{client, server} {
		x.Main.Stop(5 * time.Second)
	}
	// NewWorld's cleanup asserts that nothing of the first start is left either.
}

func pairAgain(t *testing.T, w *lab.World) (client, server *lab.Workload) { return pair(t, w) }

// TestComingAndGoing starts and ends workloads again and again: each leaves
// nothing, and the agent grows by nothing.
func TestComingAndGoing(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent")
	w := lab.NewWorld(t, lab.Meshed)
	rounds := 12
	var first int
	for i := range rounds {
		x := w.Workload(t, "visitor", lab.Spec{Ports: []int{portHTTP}})
		if i%3 == 2 {
			x.Main.Kill() // the agent sees it by the pidfd
			syscall.Kill(x.PID, syscall.SIGKILL)
		} else if code, _ := x.Main.Stop(5 * time.Second); code != 128+int(syscall.SIGTERM) && code != -1 {
			t.Errorf("assay run ended with %d after SIGTERM, want 143", code)
		}
		gone(t, w, x)
		x.Space.Close()
		if i == 2 {
			first = descriptors(w.Mesh.Up.PID)
		}
	}
	lab.Eventually(t, 30*time.Second, "the agent has as many descriptors as before", func() error {
		if now := descriptors(w.Mesh.Up.PID); now > first+2 {
			return fmt.Errorf("%d after 3 workloads, %d after %d", first, now, rounds)
		}
		return nil
	})
	for _, c := range []struct {
		argv []string
		code int
	}{{[]string{"true"}, 0}, {[]string{"sh", "-c", "exit 7"}, 7}, {[]string{"sh", "-c", "kill -KILL $$"}, 137}, {[]string{"/no/such/program"}, 127}} {
		r := w.Mesh.CLI(t, append([]string{"run", "--service", "once", "--"}, c.argv...)...)
		if r.Code != c.code {
			t.Errorf("%v: exit code %d, want %d\n%s", c.argv, r.Code, c.code, r.Stderr)
		}
	}
}
