package control

import (
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
)

// TestScale is the largest cluster that the project was made for: 52 hosts, 5,000
// workloads, 500 services and one with everything behind it. It prints what that
// costs; ASSAY_SCALE=1 runs it.
func TestScale(t *testing.T) {
	if os.Getenv("ASSAY_SCALE") == "" {
		t.Skip("set ASSAY_SCALE=1")
	}
	const hostCount, perHost = 52, 96
	r := start(t, func(cfg *Config) { cfg.Log = slog.New(slog.DiscardHandler) })
	var agents []*agent
	var joined []*remoteHost
	for i := range hostCount {
		h := r.join(t, fmt.Sprint("node-", i), "*/*")
		joined = append(joined, h)
		agents = append(agents, syncHost(t, h.hosts, nil))
	}
	began := time.Now()
	var group sync.WaitGroup
	for i, a := range agents {
		group.Go(func() {
			for j := range perHost {
				w := a.workload(fmt.Sprint("w-", i, "-", j), "bank", fmt.Sprint("s", (i*perHost+j)%500), byte(j+1), 80)
				w.Labels = map[string]string{"pod-template-hash": fmt.Sprint(i * j), "app": w.Name}
				a.up(w)
			}
		})
	}
	group.Wait()
	want := hostCount*perHost + 500 + hostCount + 1
	for _, a := range agents {
		eventually(t, "everything everywhere", func() bool { return len(a.keys()) == want })
	}
	t.Logf("%d workloads to %d hosts in %v", hostCount*perHost, hostCount, time.Since(began).Round(time.Millisecond))

	var took []time.Duration
	for round := range 50 {
		w := agents[round%hostCount].workload(fmt.Sprint("w-", round%hostCount, "-0"), "bank", fmt.Sprint("s", (round%hostCount)*perHost%500), 1, 80)
		w.Draining = true
		began := time.Now()
		agents[round%hostCount].up(w)
		for _, a := range agents {
			eventually(t, "the change", func() bool { return a.get("workload/" + w.ID).GetWorkload().GetDraining() })
			took = append(took, time.Since(began))
		}
		w.Draining = false
		agents[round%hostCount].up(w)
		eventually(t, "the change back", func() bool { return !agents[0].get("workload/" + w.ID).GetWorkload().GetDraining() })
	}
	slices.Sort(took)
	t.Logf("one change to all hosts: p50 %v, p99 %v", took[len(took)/2], took[len(took)*99/100])

	for _, a := range agents {
		a.close()
		a.resources = nil
	}
	began = time.Now()
	again := make([]*agent, hostCount)
	for i, h := range joined {
		again[i] = dialSync(t, h.hosts, nil)
		again[i].ended.Go(again[i].read)
	}
	for _, a := range again {
		eventually(t, "everything again", func() bool { return len(a.keys()) == want })
	}
	t.Logf("everything to %d hosts at once, as after a restart: %v", hostCount, time.Since(began).Round(time.Millisecond))
	for _, a := range again {
		a.close()
		a.resources = nil
	}
	runtime.GC()
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	t.Logf("heap of control: %d MB", mem.HeapAlloc>>20)
}
