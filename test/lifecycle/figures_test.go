package lifecycle

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"assay.dev/test/lab"
)

// TestFigures holds what a person notices: that things start at once, and what they
// cost while nothing happens. How long a start takes is for the record, since that is the
// machine's affair, too; ten seconds mean that something waits.
func TestFigures(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent")
	w := lab.NewWorld(t, lab.Meshed)
	x := w.Workload(t, "idle", lab.Spec{})
	for _, f := range []struct {
		what      string
		got, most float64
		unit      string
	}{
		{"assay up until it is ready", w.Mesh.ReadyTime.Seconds(), 10, "s"},
		{"assay run until the command runs", x.RunTime.Seconds(), 10, "s"},
		{"assay up, idle", resident(t, w.Mesh.Up.PID, "VmRSS"), 120, "MB"},
		{"a proxy, idle", resident(t, w.Mesh.Proxy(x), "VmRSS"), 10, "MB"},
		{"a proxy's own memory, idle", resident(t, w.Mesh.Proxy(x), "RssAnon"), 4, "MB"},
	} {
		t.Logf("%-34s %6.2f %s", f.what, f.got, f.unit)
		if f.got > f.most {
			t.Errorf("%s: %.2f %s, want at most %g", f.what, f.got, f.unit, f.most)
		}
	}
	if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", w.Mesh.Proxy(x))); string(name) != "assay-proxy\n" {
		t.Errorf("ps and pgrep call a proxy %q (%v)", name, err)
	}
	// An idle proxy uses no CPU worth counting: less than a hundredth of one.
	const look = 3 * time.Second
	before := cpuTicks(t, w.Mesh.Proxy(x))
	time.Sleep(look) // the time is what is looked at
	if used := cpuTicks(t, w.Mesh.Proxy(x)) - before; used > 3 {
		t.Errorf("an idle proxy used %d ms of CPU in %s", used*10, look)
	}
}

// resident reads a line of /proc/PID/status, in MB.
func resident(t *testing.T, pid int, key string) float64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(text), key+":")
	var kb float64
	if n, _ := fmt.Sscan(rest, &kb); n != 1 || !ok {
		t.Fatalf("no %s of process %d", key, pid)
	}
	return kb / 1024
}

// cpuTicks is user plus system time in hundredths of a second.
func cpuTicks(t *testing.T, pid int) int {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	f := strings.Fields(rest)
	var user, system int
	fmt.Sscan(f[11], &user)
	fmt.Sscan(f[12], &system)
	return user + system
}
