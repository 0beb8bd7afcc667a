package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"assay.dev"
)

// status reads numbers of /proc/PID/status, in its units.
func (m *workload) status(t testing.TB) map[string]int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]int{}
	for line := range strings.Lines(string(b)) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), ":")
		if f := strings.Fields(v); len(f) > 0 {
			base := 10
			if strings.HasPrefix(k, "Cap") {
				base = 16
			}
			if n, err := strconv.ParseInt(f[0], base, 64); err == nil {
				out[k] = int(n)
			}
		}
	}
	return out
}

// cpu is the processor time that the proxy has used, in clock ticks of 10 ms.
func (m *workload) cpu(t testing.TB) time.Duration {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", m.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	f := strings.Fields(rest) // from the third field on: utime and stime are 14 and 15
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return time.Duration(user+system) * 10 * time.Millisecond
}

func (m *workload) descriptors(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", m.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// TestConfined looks at the running proxy from outside.
func TestConfined(t *testing.T) {
	if raceEnabled {
		t.Skip("the proxy under the race detector has no sandbox")
	}
	w := newWorld(t)
	s := w.workload("alone").status(t)
	for key, want := range map[string]int{"NoNewPrivs": 1, "Seccomp": 2, "CapEff": 0x2000, "CapPrm": 0x2000, "CapInh": 0, "CapAmb": 0} {
		if s[key] != want {
			t.Errorf("%s is %x, want %x", key, s[key], want)
		}
	}
	if s["Uid"] < 900_000_000 {
		t.Errorf("uid %d", s["Uid"])
	}
}

// TestIdle measures a proxy that has been used and has nothing to do.
func TestIdle(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector takes memory of its own")
	}
	w := newWorld(t)
	client, server := w.workload("client"), w.workload("server")
	fresh := client.status(t)
	before := client.descriptors(t)
	vip := w.service("echo", 1, assay.Opaque, server.serve(0, echo), server)
	for range 100 {
		c := client.mustDial(vip)
		exchange(t, c, "hello")
		c.Close()
	}
	eventually(t, "every connection is closed", func() bool {
		return client.descriptors(t) <= before+1 // the session with the server
	})
	used := client.status(t)
	start := client.cpu(t)
	time.Sleep(time.Second) // nothing happens: that is what is measured
	busy := client.cpu(t) - start
	t.Logf("fresh: RSS %d kB, anonymous %d kB; used: RSS %d kB, anonymous %d kB; CPU in a second %v; threads %d",
		fresh["VmRSS"], fresh["RssAnon"], used["VmRSS"], used["RssAnon"], busy, used["Threads"])
	// The code's pages are shared by all proxies of a host.
	if used["VmRSS"] > 10<<10 || used["RssAnon"] > 3<<10 {
		t.Errorf("an idle proxy holds %d kB, %d of them its own", used["VmRSS"], used["RssAnon"])
	}
	if client.cpu(t) == 0 {
		t.Error("a hundred connections cost no processor time: this measures nothing")
	}
	if busy > 10*time.Millisecond {
		t.Errorf("an idle proxy uses %v in a second", busy)
	}

	// What a connection costs that says nothing.
	const n = 500
	var pool []interface{ Close() error }
	for range n {
		pool = append(pool, client.mustDial(vip))
	}
	eventually(t, "all are open", func() bool {
		return sum(client.report(), func(assay.SignalKey) bool { return true }).Open >= n
	})
	full := client.status(t)
	t.Logf("%d idle connections: %.1f kB each", n, float64(full["RssAnon"]-used["RssAnon"])/n)
	for _, c := range pool {
		c.Close()
	}
	eventually(t, "every connection is closed again", func() bool { return client.descriptors(t) <= before+2 }) // two sessions, for so many streams
}
