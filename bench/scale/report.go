package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"time"
)

// results are what a run has found.
type results struct {
	Time    time.Time `json:"time"`
	Machine string    `json:"machine"`
	Rate    int       `json:"changesPerSecond"`
	Peers   int       `json:"peers"`
	Steady  float64   `json:"steadySeconds"`
	Window  float64   `json:"windowSeconds"`
	Sizes   []size    `json:"sizes"`
}

func newResults(o options) *results {
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return &results{
		Time: time.Now().UTC(), Rate: o.rate, Peers: o.peers, Steady: o.steady.Seconds(), Window: o.window.Seconds(),
		Machine: fmt.Sprintf("%d CPUs, Linux %s, %s", runtime.NumCPU(), release[:max(0, len(release)-1)], runtime.Version()),
	}
}

func (r *results) writeJSON(file string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}

func median(list []float64) float64 {
	if len(list) == 0 {
		return 0
	}
	list = slices.Sorted(slices.Values(list))
	return list[len(list)/2]
}

// markdown prints the tables.
func (r *results) markdown(w io.Writer) {
	mb := func(bytes float64) string { return fmt.Sprintf("%.0f", bytes/(1<<20)) }
	ms := func(seconds float64) string { return fmt.Sprintf("%.0f", seconds*1000) }
	fmt.Fprintf(w, "One control, %d pod changes a second, each pod with traffic to %d others; %s; %s.\n\n", r.Rate, r.Peers, r.Time.Format(time.DateOnly), r.Machine)
	fmt.Fprintf(w, "| pods | services | nodes | cores | RSS MB | peak MB | heap in use MB | change to agent p50 ms | p99 ms | max ms | changes | lost | to agents KB/s | from the API server KB/s | certificates/s |\n|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for i := range r.Sizes {
		s := &r.Sizes[i]
		fmt.Fprintf(w, "| %d | %d | %d | %.3f | %s | %s | %s | %s | %s | %s | %d | %d | %.0f | %.0f | %.1f |\n", s.Pods, s.Services, s.Nodes, s.CPU, mb(s.RSS), mb(s.Peak), mb(s.Heap),
			ms(s.Delay.P50), ms(s.Delay.P99), ms(s.Delay.Max), s.Delay.Changes, s.Delay.Lost, s.Sent/1024, s.Watched/1024, s.Issued)
	}
	if r.Sizes[0].Last != nil {
		fmt.Fprint(w, "\nOne node more, with a real agent and a proxy for each of its pods:\n\n| pods | of the node | agent cores | agent RSS MB | all its proxies, cores | each, MB | change from agent to proxy p50 ms | p99 ms |\n|--:|--:|--:|--:|--:|--:|--:|--:|\n")
		for i := range r.Sizes {
			l := r.Sizes[i].Last
			fmt.Fprintf(w, "| %d | %d | %.3f | %s | %.3f | %.1f | %s | %s |\n", r.Sizes[i].Pods, l.Pods, l.CPU, mb(l.RSS), l.Proxies, l.Proxy/(1<<20), ms(l.P50), ms(l.P99))
		}
	}
	fmt.Fprintf(w, "\nAll hosts at once, over %g s from then on, with the changes going on:\n\n", r.Window)
	fmt.Fprint(w, "| pods | | all in sync after s | CPU s | ratio to steady | peak MB | change to agent p50 ms | p99 ms | max ms | lost |\n|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for i := range r.Sizes {
		s := &r.Sizes[i]
		for _, one := range []struct {
			name string
			t    *trouble
		}{{"all streams cut", &s.Reconnect}, {"control restarted", &s.Restart}} {
			t := one.t
			fmt.Fprintf(w, "| %d | %s | %.1f | %.1f | %.2f | %s | %s | %s | %s | %d |\n", s.Pods, one.name, t.InSync, t.CPU, t.Ratio, mb(t.Peak), ms(t.Delay.P50), ms(t.Delay.P99), ms(t.Delay.Max), t.Delay.Lost)
		}
	}
	fmt.Fprint(w, "\nA cluster that joins the mesh as a whole:\n\n| pods | first host in after s | all pods certified and known everywhere after s |\n|--:|--:|--:|\n")
	for i := range r.Sizes {
		fmt.Fprintf(w, "| %d | %.1f | %.1f |\n", r.Sizes[i].Pods, r.Sizes[i].Heard, r.Sizes[i].Meshed)
	}
	fmt.Fprint(w, "\n| goal at 5,000 pods | want at most | is |\n|---|--:|--:|\n")
	for _, g := range r.goals() {
		fmt.Fprintf(w, "| %s | %g | %.2f%s |\n", g.name, g.most, g.is, map[bool]string{false: " **missed**"}[g.met()])
	}
}

// goal is a number that must not be exceeded.
type goal struct {
	name     string
	most, is float64
}

func (g goal) met() bool { return g.is <= g.most }

// toProxy is at least how late the last proxy in a hundred is: both ways at their worst.
func (s *size) toProxy() float64 {
	if s.Last == nil {
		return s.Delay.P99
	}
	return s.Delay.P99 + s.Last.P99
}

// goals are those of the largest cluster that the mesh was made for.
func (r *results) goals() (list []goal) {
	for i := range r.Sizes {
		s := &r.Sizes[i]
		if s.Pods != 5000 {
			continue
		}
		list = append(list,
			goal{"memory of control, steady peak, MB", 200, s.Peak / (1 << 20)},
			goal{"processors, steady", 0.3, s.CPU},
			goal{"change to agent, p99, s", 1, s.Delay.P99},
			goal{"all streams cut: cost, times the steady", 2, s.Reconnect.Ratio},
			goal{"all streams cut: change to agent, p99, s", 1, s.Reconnect.Delay.P99},
			goal{"control restarted: cost, times the steady", 2, s.Restart.Ratio},
			goal{"control restarted: memory, peak, MB", 200, s.Restart.Peak / (1 << 20)},
			goal{"change to proxy, p99 of both ways added, s", 1, s.toProxy()},
			goal{"changes lost", 0, float64(s.Delay.Lost + s.Reconnect.Delay.Lost + s.Restart.Delay.Lost)})
	}
	return list
}
