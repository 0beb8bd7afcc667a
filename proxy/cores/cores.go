// Package cores decides how many processors the proxy's goroutines run on at once, and when
// memory is tidied up.
//
// One, until one is not enough. With more, the Go scheduler answers each burst of
// events by waking another thread to look for work, which on small requests costs
// more than the work itself, and which takes apart what group commit puts together
// (docs/decisions/0011). One that is busy all the time is a reason for a second one;
// so a proxy under bulk data still uses the machine.
//
// It refuses to look at anything but the process's own CPU time: on a machine that
// others keep busy, a further thread would not run more. Goroutines: the caller's, in
// Run.
package cores

import (
	"context"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

const (
	busyEvery = 200 * time.Millisecond // between looks at a process that does something
	idleEvery = 2 * time.Second        // at one that does not

	full  = 0.85 // of its processors is a process that has too few
	roomy = 0.60 // of one less is one that has too many

	growAfter   = 2  // looks in a row
	shrinkAfter = 25 // looks in a row
)

// governor holds what was seen.
type governor struct {
	most int // processors that there are
	now  int // that are used
	high int // looks in a row that found too few
	low  int // that found too many
}

// look takes how many processors were busy since the last look, and returns how
// many shall be used and when to look again.
func (g *governor) look(busy float64) (use int, again time.Duration) {
	switch {
	case busy > full*float64(g.now) && g.now < g.most:
		g.low = 0
		if g.high++; g.high >= growAfter {
			g.now, g.high = g.now+1, 0
		}
	case busy < roomy*float64(g.now-1):
		g.high = 0
		if g.low++; g.low >= shrinkAfter {
			g.now, g.low = g.now-1, 0
		}
	default:
		g.high, g.low = 0, 0
	}
	if g.now == 1 && busy < 0.1 {
		return 1, idleEvery
	}
	return g.now, busyEvery
}

// Run sets GOMAXPROCS as the load wants it, and gives back memory that a burst has left
// (tidy.go), until ctx ends.
func Run(ctx context.Context) {
	g := governor{most: runtime.GOMAXPROCS(0), now: 1}
	set := g.now
	if g.most > 1 {
		runtime.GOMAXPROCS(set)
	}
	tidy := newTidier()
	before, used := time.Now(), processTime()
	t := time.NewTimer(busyEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		now, total := time.Now(), processTime()
		tidy.look(now.Sub(before))
		use, again := g.look(float64(total-used) / float64(max(now.Sub(before), 1)))
		before, used = now, total
		if use != set { // to set it stops the world, even to the same
			runtime.GOMAXPROCS(use)
			set = use
		}
		t.Reset(again)
	}
}

// processTime is the CPU time of all threads.
func processTime() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}
