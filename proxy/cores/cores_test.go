package cores

import (
	"context"
	"runtime"
	"runtime/debug"
	"sync"
	"testing"
	"time"
)

func TestGovernor(t *testing.T) {
	g := governor{most: 3, now: 1}
	look := func(times int, busy float64, want int) {
		t.Helper()
		for i := range times {
			if use, _ := g.look(busy); i == times-1 && use != want {
				t.Fatalf("%d looks at %.2f: %d processors, want %d", times, busy, use, want)
			}
		}
	}
	look(100, 0.7, 1)  // one is enough
	look(1, 0.95, 1)   // a moment is no reason
	look(1, 0.5, 1)    // it was one
	look(1, 0.95, 1)   // the count began anew
	look(1, 0.95, 2)   // one is not enough
	look(2, 1.9, 3)    // nor are two
	look(100, 3, 3)    // there are no more
	look(100, 1.4, 3)  // too much for two
	look(24, 1.1, 3)   // a pause is no reason
	look(1, 1.1, 2)    // two are enough
	look(100, 0.61, 2) // one would be nearly full
	look(25, 0.1, 1)

	if _, again := g.look(0.01); again != idleEvery {
		t.Errorf("an idle process is looked at again in %v, want %v", again, idleEvery)
	}
	if _, again := g.look(0.5); again != busyEvery {
		t.Errorf("a busy process is looked at again in %v, want %v", again, busyEvery)
	}
}

// TestRun burns one processor and waits for a second one to be used.
func TestRun(t *testing.T) {
	most := runtime.GOMAXPROCS(0)
	if most < 2 {
		t.Skip("needs two processors")
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer func() {
		cancel()
		wg.Wait()
		runtime.GOMAXPROCS(most)
	}()
	wg.Go(func() { Run(ctx) })
	// Whether there is a second processor to be had is the machine's affair.
	start, used := time.Now(), processTime()
	await := func(want int, what string) {
		t.Helper()
		for runtime.GOMAXPROCS(0) != want {
			runtime.Gosched() // burns it, too
			if took := time.Since(start); took > 2*time.Second {
				if busy := float64(processTime()-used) / float64(took); busy < full {
					t.Skipf("%s: the machine is too busy, we had %.2f processors", what, busy)
				}
				t.Fatalf("%s: %d processors, want %d", what, runtime.GOMAXPROCS(0), want)
			}
		}
	}
	await(1, "at first")
	await(2, "under load")
}

func TestDue(t *testing.T) {
	const mb = 1 << 20
	for name, c := range map[string]struct {
		s     state
		since time.Duration
		want  errand
	}{
		"nothing to gain":              {state{live: 6 * mb, objects: 6*mb + litter/2, free: mb}, time.Hour, nothing},
		"garbage":                      {state{live: 6 * mb, objects: 8 * mb, free: mb}, 2 * time.Second, collect},
		"garbage, too soon":            {state{live: 6 * mb, objects: 8 * mb, free: mb}, time.Second, nothing},
		"much that lives takes longer": {state{live: 100 * mb, objects: 180 * mb}, 20 * time.Second, nothing},
		"but not for ever":             {state{live: 100 * mb, objects: 180 * mb}, 30 * time.Second, collect},
		"little of much":               {state{live: 100 * mb, objects: 105 * mb}, time.Hour, nothing},
		"freed":                        {state{live: 6 * mb, objects: 6 * mb, free: 5 * mb}, 2 * time.Second, giveBack},
		"freed, of much":               {state{live: 60 * mb, objects: 60 * mb, free: 5 * mb}, time.Hour, nothing},
	} {
		if got := due(c.s, c.since); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

// TestTidies: what a burst leaves is collected without anybody asking for memory.
func TestTidies(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // nobody else collects
	runtime.GC()
	tidy := newTidier()
	tidy.look(0)
	burst := make([][]byte, 1000)
	for i := range burst {
		burst[i] = make([]byte, 16<<10)
	}
	clear(burst)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	tidy.look(time.Hour)
	tidy.look(time.Hour)
	runtime.ReadMemStats(&after)
	runtime.KeepAlive(burst)
	if after.HeapAlloc+8<<20 > before.HeapAlloc {
		t.Errorf("%d bytes in use, %d before", after.HeapAlloc, before.HeapAlloc)
	}
	if left := after.HeapIdle - after.HeapReleased; left > unused {
		t.Errorf("%d free bytes were not given back", left)
	}
}
