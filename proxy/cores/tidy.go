package cores

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// tidier gives memory back that a burst has left. Requests make next to no garbage, so the
// collector has no reason of its own to look for minutes, while stacks that grew once stay
// large and what was freed stays ours.
type tidier struct {
	sample [4]metrics.Sample
	cycles uint64        // of the collector, at the last look
	since  time.Duration // that they have stayed so
}

const (
	// tidyEvery is the least time between two collections of ours; a larger heap is looked
	// through less often, so that it costs about three thousandths of a processor.
	tidyEvery = 2 * time.Second
	tidyPerMB = 300 * time.Millisecond
	// litter is how many bytes are worth the trouble.
	litter = 1 << 20
	// unused is how many freed bytes are worth asking the kernel to take at once.
	unused = 4 << 20
)

func newTidier() *tidier {
	t := &tidier{}
	for i, name := range []string{
		"/gc/cycles/total:gc-cycles",
		"/gc/heap/live:bytes",
		"/memory/classes/heap/objects:bytes",
		"/memory/classes/heap/free:bytes",
	} {
		t.sample[i].Name = name
	}
	return t
}

// state is what the runtime says of itself, in bytes.
type state struct{ live, objects, free uint64 }

type errand int

const (
	nothing errand = iota
	collect
	giveBack // collect, and return what is free to the kernel
)

// look takes how long ago the last one was, and does what is due.
func (t *tidier) look(passed time.Duration) {
	metrics.Read(t.sample[:])
	s := state{t.sample[1].Value.Uint64(), t.sample[2].Value.Uint64(), t.sample[3].Value.Uint64()}
	if n := t.sample[0].Value.Uint64(); n != t.cycles {
		t.cycles, t.since = n, 0
		if s.free < unused {
			return
		}
	}
	t.since += passed
	switch due(s, t.since) {
	case collect:
		runtime.GC()
	case giveBack:
		debug.FreeOSMemory()
		t.since = 0
	}
}

// due decides what to do so long after the last collection.
func due(s state, since time.Duration) errand {
	if since < max(tidyEvery, time.Duration(s.live>>20)*tidyPerMB) {
		return nothing
	}
	switch {
	case s.free >= unused && s.free > (s.objects)/4:
		return giveBack
	case s.objects >= s.live+litter && s.objects > s.live+s.live/8:
		return collect
	}
	return nothing
}
