package http2

import (
	"fmt"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"
)

func quiet(w *world) { w.clients.silent, w.servers.silent = true, true }

// load makes n calls over conns connections, depth at a time on each.
func load(t testing.TB, callers []*caller, depth, n int) {
	var running sync.WaitGroup
	for i, k := range callers {
		mine := n / len(callers)
		if i < n%len(callers) {
			mine++
		}
		running.Go(func() {
			if done, err := k.run(mine, depth); err != nil {
				t.Errorf("%d of %d calls: %v", done, mine, err)
			}
		})
	}
	running.Wait()
}

func callers(w *world, n int) (list []*caller) {
	for range n {
		list = append(list, w.caller())
	}
	return list
}

func BenchmarkPair(b *testing.B) {
	for _, c := range []struct{ conns, depth int }{{1, 1}, {1, 64}, {64, 1}} {
		b.Run(fmt.Sprintf("conns=%d/streams=%d", c.conns, c.depth), func(b *testing.B) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
			w := newWorld(b, answers(b), quiet)
			list := callers(w, c.conns)
			load(b, list, c.depth, 2000)
			b.ReportAllocs()
			cpu := cpuTime()
			b.ResetTimer()
			load(b, list, c.depth, b.N)
			b.ReportMetric(float64((cpuTime()-cpu).Microseconds())/float64(b.N), "cpu-us/op")
		})
	}
}

func cpuTime() time.Duration {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TestSteadyStateAllocations holds both sides to no allocation for a call.
func TestSteadyStateAllocations(t *testing.T) {
	if !pooled {
		t.Skip("pools do not hold what they are given")
	}
	w := newWorld(t, answers(t), quiet, unencrypted) // crypto/tls allocates for each read
	list := callers(w, 2)
	load(t, list, 8, 4000)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	const n = 20000
	load(t, list, 8, n)
	runtime.ReadMemStats(&after)
	if perCall := float64(after.Mallocs-before.Mallocs) / n; perCall > 0.1 {
		t.Errorf("%.2f allocations for a call of the whole process, want none", perCall)
	}
}
