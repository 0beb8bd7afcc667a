package control

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/discovery"
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

// TestClusterScale is the same as a cluster: 5,000 pods of 1,000 services, of which twenty a
// second become ready or cease to be. It prints what that costs control and the 52 streams of
// the test together; ASSAY_SCALE=1 runs it.
func TestClusterScale(t *testing.T) {
	if os.Getenv("ASSAY_SCALE") == "" {
		t.Skip("set ASSAY_SCALE=1")
	}
	const nodes, perNode, services = 52, 96, 1000
	r := startCluster(t, func(cfg *Config) { cfg.Log = slog.New(slog.DiscardHandler) })
	var ch ClusterChanges
	placed := make([]Placed, services)
	for i := range placed {
		placed[i].DeclaredService = discovery.DeclaredService{
			Namespace: "shop", Name: fmt.Sprint("s", i), ClusterIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})},
			Ports: []discovery.DeclaredPort{{Port: assay.Port{Port: 80}}},
		}
	}
	addr := func(node, i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 244, byte(node), byte(i + 1)}) }
	uid := func(node, i int) string { return fmt.Sprintf("00000000-0000-4000-8000-%06d%06d", node, i) }
	for n := range nodes {
		ch.Nodes = append(ch.Nodes, Node{Name: fmt.Sprint("node-", n)})
		for i := range perNode {
			p := pod(uid(n, i), fmt.Sprint("node-", n), addr(n, i).String())
			p.Labels = map[string]string{"pod-template-hash": fmt.Sprint(n * i), "app": fmt.Sprint("s", (n*perNode+i)%services)}
			ch.Pods = append(ch.Pods, p)
			s := &placed[(n*perNode+i)%services]
			s.Places = append(s.Places, discovery.Place{Workload: p.UID, Addrs: p.Addrs, Targets: []uint16{8080}, Ready: true, Serving: true})
		}
	}
	ch.Services = placed
	began := time.Now()
	r.follow(t, ch)
	t.Logf("%d pods and %d services are taken in within %v", len(ch.Pods), services, time.Since(began).Round(time.Millisecond))
	began = time.Now()
	var agents []*agent
	for n := range nodes {
		h := r.joinNode(t, fmt.Sprint("node-", n))
		a := syncHost(t, h.hosts, nil)
		agents = append(agents, a)
		for i := range perNode {
			a.up(r.meshed(h, uid(n, i), addr(n, i).String()))
		}
	}
	for _, a := range agents {
		eventually(t, "everything everywhere", func() bool { return len(a.keys()) == nodes*perNode+services+nodes+1 })
	}
	t.Logf("%d workloads of %d nodes are everywhere after %v", nodes*perNode, nodes, time.Since(began).Round(time.Millisecond))
	var before, after syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &before)
	began = time.Now()
	var took []time.Duration
	every := time.NewTicker(time.Second / 20)
	defer every.Stop()
	const changes = 200
	for round := range changes {
		s := &placed[round%services]
		next := Placed{DeclaredService: s.DeclaredService, Places: slices.Clone(s.Places)}
		next.Places[0].Ready, next.Places[0].Serving = false, false
		<-every.C
		at := time.Now()
		r.follow(t, ClusterChanges{Services: []Placed{next}})
		last := agents[len(agents)-1]
		eventually(t, "the change", func() bool {
			list := last.get("service/" + s.Key()).GetService().GetEndpoints()
			return len(list) == len(s.Places) && slices.ContainsFunc(list, func(e *api.Endpoint) bool { return e.Targets[0] == 0 })
		})
		took = append(took, time.Since(at))
	}
	spent := time.Since(began)
	syscall.Getrusage(syscall.RUSAGE_SELF, &after)
	slices.Sort(took)
	cpu := time.Duration(after.Utime.Nano() + after.Stime.Nano() - before.Utime.Nano() - before.Stime.Nano())
	var memory runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&memory)
	t.Logf("%d changes in %v: half reach the last node within %v, 99 %% within %v; %.2f processors, %d MB of heap",
		changes, spent.Round(time.Millisecond), took[len(took)/2], took[len(took)*99/100], cpu.Seconds()/spent.Seconds(), memory.HeapAlloc>>20)
}
