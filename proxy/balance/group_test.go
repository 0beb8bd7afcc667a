package balance

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/proxy/guard"
)

// group makes n endpoints, the first near of them in our zone, that have been there
// for a while.
func group(n, near int, p *assay.TrafficPolicy) (*Set, *Group, time.Time) {
	want := wants(n)
	for i := range near {
		want[i].Near = true
	}
	s, g, now := New(nil, want, nil), NewGroup(new(guard.Counts)), time.Now()
	g.Configure(p)
	g.Consist(now, s)
	return s, g, now.Add(time.Minute)
}

func fail(e *Endpoint, n int, now time.Time) {
	for range n {
		e.Failed(now)
	}
}

// picked counts who is chosen; all answer in a millisecond.
func picked(s *Set, n int, now time.Time) map[*Endpoint]int {
	count := map[*Endpoint]int{}
	for range n {
		count[s.Pick(now, nil)]++
	}
	return count
}

func counted(g *Group) string {
	var list []string
	g.Counts.Each(func(name string, n uint64) { list = append(list, fmt.Sprint(name, "=", n)) })
	return strings.Join(list, " ")
}

func TestEjection(t *testing.T) {
	s, g, now := group(4, 0, nil)
	bad := s.list[1]
	fail(bad, 4, now)
	if bad.Ejected() {
		t.Fatal("ejected after four failures")
	}
	fail(bad, 1, now)
	now = now.Add(5 * time.Second) // its mark in the average has decayed
	if got := picked(s, 1000, now); !bad.Ejected() || got[bad] != 0 || len(got) != 3 {
		t.Fatalf("ejected: %v, got %d of 1000", bad.Ejected(), got[bad])
	}
	// When its time is over one request probes; it is fit again, and comes back slowly.
	now = now.Add(7 * time.Second)
	if got := picked(s, 100, now); got[bad] != 1 {
		t.Fatalf("%d requests probed", got[bad])
	}
	bad.Answered(time.Millisecond, now)
	now = now.Add(500 * time.Millisecond)
	if got := picked(s, 4000, now); bad.Ejected() || got[bad] < 20 || got[bad] > 250 {
		t.Errorf("after half a second it got %d of 4000, want about a tenth of a quarter", got[bad])
	}
	now = now.Add(20 * time.Second)
	if got := picked(s, 4000, now); got[bad] < 700 {
		t.Errorf("after twenty seconds it got %d of 4000, want a quarter", got[bad])
	}
	if got := counted(g); got != "eject=1 probe=1 restore=1" {
		t.Error(got)
	}
}

func TestEjectionFloorAndPanic(t *testing.T) {
	s, g, now := group(4, 0, nil)
	fail(s.list[0], 5, now)
	fail(s.list[1], 5, now)
	later := now.Add(8 * time.Second)
	if got := picked(s, 1000, later); len(got) != 2 || got[s.list[0]]+got[s.list[1]] > 0 {
		t.Fatalf("with two ejected of four: %v", got)
	}
	// A third one may not be ejected: and now all are used, since most are unfit.
	fail(s.list[2], 5, now)
	if s.list[2].Ejected() {
		t.Error("three of four were ejected")
	}
	if got := picked(s, 1000, later); len(got) != 4 {
		t.Errorf("in panic %d were used", len(got))
	}
	if got := counted(g); got != "eject=2 eject-floor=1 panic=1000" {
		t.Error(got)
	}
	// Only one: never ejected.
	s, g, now = group(1, 0, nil)
	fail(s.list[0], 50, now)
	if s.list[0].Ejected() || s.Pick(now, nil) != s.list[0] {
		t.Error("the only endpoint was ejected")
	}
	if got := counted(g); got != "eject-floor=1" {
		t.Error(got)
	}
}

func TestRetryAvoidsTheEjected(t *testing.T) {
	s, _, now := group(3, 0, nil)
	fail(s.list[0], 5, now)
	for range 100 {
		if s.Pick(now, []*Endpoint{s.list[1]}) != s.list[2] {
			t.Fatal("a retry went to an ejected endpoint")
		}
	}
	if s.Pick(now, s.list[1:]) != s.list[0] {
		t.Error("and where nothing else is left it may")
	}
}

func TestEjectionOutlivesTheSet(t *testing.T) {
	s, g, now := group(4, 0, nil)
	fail(s.list[0], 5, now)
	fail(s.list[1], 5, now)
	next := New(s, wants(3), nil) // one of the good ones went
	g.Consist(now, next)
	if !next.list[0].Ejected() || len(picked(next, 500, now)) != 3 {
		t.Error("of three, two are unfit: all are used")
	}
	again := New(next, wants(8), nil)
	g.Consist(now, again)
	if got := picked(again, 2000, now); got[again.list[0]]+got[again.list[1]] > 0 {
		t.Error("with six fit ones, unfit ones were used")
	}
	gone := New(again, wants(8)[2:], nil)
	g.Consist(now, gone)
	if g.unfit != 0 {
		t.Error("endpoints that are gone count")
	}
}

func TestSlowStart(t *testing.T) {
	s, g, now := group(3, 0, nil)
	next := New(s, wants(4), nil)
	g.Consist(now, next)
	fresh := next.list[3]
	for _, c := range []struct {
		after     time.Duration
		low, high int // of 4000
	}{{0, 30, 220}, {5 * time.Second, 300, 700}, {10 * time.Second, 800, 1200}} {
		if got := picked(next, 4000, now.Add(c.after))[fresh]; got < c.low || got > c.high {
			t.Errorf("%v after it came it got %d of 4000, want %d to %d", c.after, got, c.low, c.high)
		}
	}
	if g.busy.Load() > int64(since(now.Add(10*time.Second))) {
		t.Error("there is still something to look at")
	}
	// Where all have just come nobody starts slowly.
	s, g, now = New(nil, wants(1), nil), NewGroup(nil), time.Now()
	g.Consist(now, s)
	next = New(s, wants(2), nil)
	g.Consist(now.Add(time.Second), next)
	if got := picked(next, 1000, now.Add(time.Second))[next.list[1]]; got < 400 {
		t.Errorf("the second of two new ones got %d of 1000", got)
	}
	// And nowhere when it is switched off.
	s, g, now = group(1, 0, &assay.TrafficPolicy{SlowStart: -1})
	next = New(s, wants(2), nil)
	g.Consist(now, next)
	if got := picked(next, 1000, now)[next.list[1]]; got < 400 {
		t.Errorf("without slow start the new one got %d of 1000", got)
	}
}

func TestNearIsPreferred(t *testing.T) {
	s, g, now := group(8, 2, nil)
	far := func(got map[*Endpoint]int) (n int) {
		for e, k := range got {
			if !slices.Contains(s.list[:2], e) {
				n += k
			}
		}
		return n
	}
	if n := far(picked(s, 1000, now)); n != 0 {
		t.Fatalf("%d of 1000 left the zone while nothing is busy", n)
	}
	// As the near ones get busier, more and more leaves.
	for _, e := range s.list {
		e.Answered(2*time.Millisecond, now)
	}
	last := 0
	for _, busy := range []int64{2, 12} {
		for _, e := range s.list[:2] {
			e.inFlight.Store(busy)
		}
		n := far(picked(s, 1000, now))
		if n < last {
			t.Errorf("with %d in flight %d of 1000 left, less than before", busy, n)
		}
		last = n
	}
	if last == 0 {
		t.Error("nothing left the zone although its endpoints are busy")
	}
	if !strings.Contains(counted(g), "failover=") {
		t.Error("not counted")
	}
	// One of two near ones is ejected: a part goes elsewhere.
	s, _, now = group(8, 2, nil)
	fail(s.list[0], 5, now)
	now = now.Add(6 * time.Second)
	if n := far(picked(s, 7000, now)); n < 1500 || n > 2600 {
		t.Errorf("%d of 7000 left when one of two near ones was ejected, want two in seven", n)
	}
	// All of them are.
	s, _, now = group(8, 2, nil)
	fail(s.list[0], 5, now)
	fail(s.list[1], 5, now)
	now = now.Add(6 * time.Second)
	if n := far(picked(s, 1000, now)); n != 1000 {
		t.Errorf("%d of 1000 left when all near ones were ejected", n)
	}
}

func TestSlowAnswersEject(t *testing.T) {
	s, _, now := group(4, 0, &assay.TrafficPolicy{Ejection: assay.EjectionPolicy{BreakerPolicy: assay.BreakerPolicy{SlowerThan: 100 * time.Millisecond}}})
	for range 20 {
		s.list[0].Answered(time.Second, now)
		s.list[1].Answered(time.Millisecond, now)
	}
	if !s.list[0].Ejected() || s.list[1].Ejected() {
		t.Error("the slow one is not ejected, or the other is")
	}
}

func TestGroupAllocatesNothing(t *testing.T) {
	s, _, now := group(8, 3, nil)
	use := func() {
		e := s.Pick(now, nil)
		e.Begin()
		e.Answered(time.Millisecond, now)
		e.Done()
	}
	if n := testing.AllocsPerRun(1000, use); n != 0 {
		t.Errorf("%v allocations per pick", n)
	}
	fail(s.list[0], 5, now)
	if n := testing.AllocsPerRun(1000, use); n != 0 {
		t.Errorf("%v allocations per pick with one ejected", n)
	}
}

func BenchmarkPickOfGroup(b *testing.B) {
	for name, c := range map[string]struct {
		near, bad int
	}{"fit": {0, 0}, "near": {4, 0}, "ejected": {0, 1}} {
		b.Run(name, func(b *testing.B) {
			s, _, now := group(8, c.near, nil)
			for i := range c.bad {
				fail(s.list[i], 5, now)
			}
			b.ReportAllocs()
			for b.Loop() {
				e := s.Pick(now, nil)
				e.Begin()
				e.Answered(time.Millisecond, now)
				e.Done()
			}
		})
	}
}

// TestThrottled: an endpoint that says it has too much is given less at once, and when
// all have as much as they take there is none to choose, but for one request now and then.
func TestThrottled(t *testing.T) {
	for _, n := range []int{1, 2, 4} {
		s, g, now := group(n, n/2, nil)
		for _, e := range s.list {
			for range 10 {
				e.Begin()
			}
		}
		for _, e := range s.list {
			e.Overloaded(now) // the eleventh
		}
		got := 0
		for range 100 {
			if s.Pick(now, nil) != nil {
				got++
			}
		}
		if got != 1 {
			t.Errorf("%d endpoints: %d requests were given to endpoints that have enough, want 1", n, got)
		}
		if s.PickConnection(now, nil) == nil || s.PickConnection(now, s.list) != nil {
			t.Errorf("%d endpoints: a connection is bounded as requests are, or goes where it was", n)
		}
		if e := s.Pick(now, s.list[:n-1]); n > 1 && e != nil {
			t.Errorf("%d endpoints: another try was given to one that has enough", n)
		}
		// One has room again.
		free := s.list[n-1]
		for range 5 {
			free.Done()
		}
		for range 20 {
			if e := s.Pick(now, nil); e != free {
				t.Fatalf("%d endpoints: %v was chosen", n, e)
			}
		}
		// A bound that is met stays.
		now = now.Add(9 * time.Second)
		for _, e := range s.list {
			for e.InFlight() < 10 {
				e.Begin()
			}
			if !e.full(now) {
				t.Errorf("%d endpoints: not bounded any more", n)
			}
		}
		now = now.Add(9 * time.Second)
		if !free.full(now) {
			t.Errorf("%d endpoints: a bound that was met ended", n)
		}
		// One that nobody meets is forgotten.
		now = now.Add(11 * time.Second)
		for range 20 {
			if s.Pick(now, nil) == nil {
				t.Fatalf("%d endpoints: still bounded", n)
			}
		}
		free.Answered(time.Millisecond, now)
		if free.room.Load() != 0 {
			t.Error("still bounded after an answer")
		}
		var counts []string
		g.Counts.Each(func(name string, n uint64) { counts = append(counts, fmt.Sprint(name, "=", n)) })
		if want := fmt.Sprint("throttle=", n); !slices.Contains(counts, want) {
			t.Errorf("counted %v, want %s", counts, want)
		}
	}
}
