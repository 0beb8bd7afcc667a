package lifecycle

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"assay.dev/test/lab"
)

// outage is a time in which requests that rely on a workload's proxy may fail:
// those in flight when it was killed, and, when no agent was there to start
// another one, those until it was back.
type outage struct {
	workload string
	from, to time.Time
}

// chaosEnv is how long TestChaos runs; `make chaos` lets it run for two minutes.
const chaosEnv = "ASSAY_CHAOS"

// TestChaos kills control, the agent and proxies at random while a load runs. Only
// what was in flight through a killed proxy may fail.
func TestChaos(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent")
	length := 20 * time.Second
	if s := os.Getenv(chaosEnv); s != "" {
		d, err := time.ParseDuration(s)
		if err != nil {
			t.Fatalf("%s: %v", chaosEnv, err)
		}
		length = d
	}
	seed := uint64(time.Now().UnixNano())
	rnd := rand.New(rand.NewPCG(seed, 1))
	t.Logf("seed %d", seed)

	w := lab.NewRoles(t)
	var all []*lab.Workload
	for i := range 2 {
		s := w.Workload(t, fmt.Sprintf("shop%d", i), lab.Spec{Ports: []int{portHTTP, portEcho}})
		serve(t, s)
		all = append(all, s)
	}
	var callers []caller
	for i := range 2 {
		c := w.Workload(t, fmt.Sprintf("buyer%d", i), lab.Spec{})
		all = append(all, c)
		for j := range 2 {
			name := fmt.Sprintf("shop%d", j)
			w.AwaitService(t, c, name, portHTTP)
			w.AwaitService(t, c, name, portEcho)
			to := c.Target(t, name, portHTTP)
			callers = append(callers, caller{c, name, func() (netip.AddrPort, error) { return to, nil }, 50})
		}
	}
	before := [2]int{descriptors(w.Mesh.Control.PID), descriptors(w.Mesh.Agent.PID)}
	l := startLoad(t, callers...)
	var outages []outage
	kills := map[string]int{}
	for end := time.Now().Add(length); time.Now().Before(end) && !t.Failed(); {
		switch what := rnd.IntN(10); {
		case what < 2:
			kills["control"]++
			w.Mesh.Control.Kill()
			wait(t, rnd, time.Second)
			w.Mesh.StartControl(t)
		case what < 5:
			kills["agent"]++
			w.Mesh.Agent.Kill()
			var victim *lab.Workload
			if rnd.IntN(2) == 0 {
				victim = all[rnd.IntN(len(all))]
			}
			var out outage
			if victim != nil {
				kills["proxy without agent"]++
				out = outage{workload: victim.Name, from: time.Now()}
				syscall.Kill(w.Mesh.Proxy(victim), syscall.SIGKILL)
			}
			wait(t, rnd, time.Second)
			w.Mesh.StartAgent(t)
			if victim != nil {
				awaitListeners(t, w, victim, callers)
				out.to = time.Now()
				outages = append(outages, out)
			}
		default:
			kills["proxy"]++
			victim := all[rnd.IntN(len(all))]
			old := w.Mesh.Proxy(victim)
			out := outage{workload: victim.Name, from: time.Now()}
			syscall.Kill(old, syscall.SIGKILL)
			out.to = time.Now()
			awaitProxy(t, w, victim, old)
			outages = append(outages, out)
		}
		wait(t, rnd, 1500*time.Millisecond)
	}
	// What began before the end may still fail for a reason of before it.
	settle := time.Now()
	lab.Eventually(t, 30*time.Second, "the load runs without failures again", func() error {
		done, failed := l.soFar()
		time.Sleep(300 * time.Millisecond) // a while of load is what is looked at
		if d, f := l.soFar(); f > failed || d == done {
			return fmt.Errorf("%d done and %d failed in 300 ms", d-done, f-failed)
		}
		return nil
	})
	done, failures := l.finish()
	t.Logf("killed %v; %d requests, %d failed; quiet %s after the last kill", kills, done, len(failures), time.Since(settle).Round(time.Millisecond))
	shown := 0
	for _, f := range failures {
		if !slices.ContainsFunc(outages, f.excusedBy) {
			if shown++; shown <= 20 {
				t.Errorf("failed without a reason: %s", f)
			}
		}
	}
	if done < 1000 {
		t.Errorf("only %d requests were done", done)
	}
	// Consistent, and not grown.
	for _, x := range all {
		must(t, "afterwards", w.Mesh.Listed(t, x.Name))
		if w.Mesh.Proxy(x) == 0 {
			t.Errorf("%s has no proxy", x.Name)
		}
	}
	if r := w.Mesh.CLI(t, "check"); r.Code == 1 {
		t.Errorf("assay check: %s%s", r.Stdout, r.Stderr)
	}
	lab.Eventually(t, 30*time.Second, "no descriptors were lost", func() error {
		now := [2]int{descriptors(w.Mesh.Control.PID), descriptors(w.Mesh.Agent.PID)}
		if now[0] > before[0]+10 || now[1] > before[1]+10 {
			return fmt.Errorf("control and agent had %v, have %v", before, now)
		}
		return nil
	})
}

// excusedBy: the request's connection was there in the outage of one of its proxies, which
// breaks it; when that is noticed is the machine's affair. The grace is what a proxy needs to
// be gone.
func (f failure) excusedBy(o outage) bool {
	const grace = 250 * time.Millisecond
	return (o.workload == f.client || o.workload == f.server) && f.dialed.Before(o.to.Add(grace)) && f.ended.After(o.from.Add(-grace))
}

func wait(t *testing.T, rnd *rand.Rand, most time.Duration) {
	select {
	case <-time.After(time.Duration(rnd.Int64N(int64(most)))):
	case <-t.Context().Done():
	}
}

// awaitListeners waits until the kernel takes connections for a workload again that had
// neither proxy nor agent: a server's from the host, a client's of its own.
func awaitListeners(t *testing.T, w *lab.World, x *lab.Workload, callers []caller) {
	t.Helper()
	lab.Eventually(t, 30*time.Second, x.Name+" takes connections", func() error {
		from, to := w.Space, addrPort(x, portHTTP)
		for _, c := range callers {
			if c.client == x {
				from = x.Space
				to, _ = c.to()
			}
		}
		c, err := from.Dial(to)
		if err == nil {
			c.Close()
		}
		return err
	})
}

func awaitProxy(t *testing.T, w *lab.World, x *lab.Workload, old int) {
	t.Helper()
	lab.Eventually(t, 30*time.Second, "another proxy for "+x.Name, func() error {
		if now := w.Mesh.Proxy(x); now == 0 || now == old {
			return fmt.Errorf("%d", now)
		}
		return nil
	})
}
