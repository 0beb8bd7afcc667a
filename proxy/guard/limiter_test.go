package guard

import (
	"container/heap"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"assay.dev"
)

// app is an application with so many workers, behind a Limiter, on a clock of its own.
// Requests that no worker has yet wait in order.
type app struct {
	l       *Limiter
	now     time.Duration
	workers int
	busy    int
	queue   []request
	events  events
	rnd     *rand.Rand
	took    []time.Duration // of what was answered
	refused int
	late    int // answered after the client had lost interest
	patient time.Duration
	giveUp  bool // clients leave when they have lost patience, and the application goes on
}

type request struct {
	came, work time.Duration
	free       bool  // it waits without a worker: a long poll
	again      bool  // its client sends another one at once
	left       *bool // nobody waits for it any more
}

type event struct {
	at time.Duration
	do func()
}

type events []event

func (e events) Len() int           { return len(e) }
func (e events) Less(i, j int) bool { return e[i].at < e[j].at }
func (e events) Swap(i, j int)      { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)        { *e = append(*e, x.(event)) }
func (e *events) Pop() any          { x := (*e)[len(*e)-1]; *e = (*e)[:len(*e)-1]; return x }

func newApp(workers int, limited bool) *app {
	a := &app{l: new(Limiter), now: time.Second, workers: workers, patient: 2 * time.Second, rnd: rand.New(rand.NewPCG(1, 2))}
	rules := (*assay.TrafficPolicy)(nil).WithDefaults().Inbound
	if !limited {
		rules.MaxDelay = -1
	}
	a.l.Set(rules)
	return a
}

func (a *app) after(d time.Duration, do func()) { heap.Push(&a.events, event{a.now + d, do}) }

func (a *app) send(r request) {
	r.came = a.now
	r.left = new(bool)
	switch {
	case !a.l.Admit(a.now):
		a.refused++
		if r.again {
			a.after(10*time.Millisecond, func() { a.send(r) })
		}
	case r.free:
		a.after(r.work, func() { a.answer(r) })
	default:
		a.queue = append(a.queue, r)
		if a.giveUp {
			a.after(a.patient, func() {
				if !*r.left { // the application does not notice
					*r.left = true
					a.late++
					a.l.Done(-a.patient, a.now)
				}
			})
		}
		a.start()
	}
}

func (a *app) start() {
	for a.busy < a.workers && len(a.queue) > 0 {
		r := a.queue[0]
		a.queue = a.queue[1:]
		a.busy++
		a.after(r.work, func() { a.busy--; a.answer(r); a.start() })
	}
}

func (a *app) answer(r request) {
	took := a.now - r.came
	if *r.left {
		return
	}
	*r.left = true
	a.l.Done(took, a.now)
	a.took = append(a.took, took)
	if took > a.patient && !a.giveUp {
		a.late++
	}
	if r.again {
		a.send(r)
	}
}

// load sends so many requests a second for d, each of some work.
func (a *app) load(perSecond float64, d time.Duration, work func() time.Duration) {
	end := a.now + d
	var next func()
	next = func() {
		if a.now < end {
			a.send(request{work: work()})
			a.after(time.Duration(a.rnd.ExpFloat64()/perSecond*float64(time.Second)), next)
		}
	}
	next()
}

func (a *app) run(d time.Duration) {
	end := a.now + d
	for len(a.events) > 0 && a.events[0].at <= end {
		e := heap.Pop(&a.events).(event)
		a.now = e.at
		e.do()
	}
	a.now = end
}

// good returns answers in time per second since the last call, and the 99th
// percentile of how long they took.
func (a *app) good(d time.Duration) (float64, time.Duration) {
	n := len(a.took)
	if n == 0 {
		return 0, 0
	}
	slices.Sort(a.took)
	p99, inTime := a.took[n*99/100], n-a.late
	if a.giveUp {
		inTime = n
	}
	a.took, a.refused, a.late = a.took[:0], 0, 0
	return float64(inTime) / d.Seconds(), p99
}

func (a *app) around(mean time.Duration) func() time.Duration {
	return func() time.Duration { return mean/2 + time.Duration(a.rnd.Int64N(int64(mean))) }
}

// overload loads an application to its capacity, then with ten times that.
func overload(t *testing.T, workers int, work time.Duration, limited, giveUp bool) (ratio float64, p99 time.Duration) {
	a := newApp(workers, limited)
	a.patient, a.giveUp = max(a.patient, 8*work), giveUp
	capacity := float64(workers) / work.Seconds()
	a.load(0.2*capacity, 5*time.Second, a.around(work))
	a.run(5 * time.Second)
	a.good(1)
	a.load(0.95*capacity, 20*time.Second, a.around(work))
	a.run(20 * time.Second)
	if a.refused > 0 {
		t.Errorf("%d requests were refused below capacity", a.refused)
	}
	peak, _ := a.good(20 * time.Second)
	all := 60*time.Second + 120*work
	a.load(10*capacity, all, a.around(work))
	find := 8*time.Second + 30*work // in which the limit is found, and what waits already is answered
	a.run(find)
	first, _ := a.good(find)
	a.run(all - find)
	good, p99 := a.good(all - find)
	good = (find.Seconds()*first + (all-find).Seconds()*good) / all.Seconds()
	t.Logf("%d workers of %v: peak %.0f/s, under ten times that %.0f/s, p99 %v, limit %d", workers, work, peak, good, p99, a.l.Limit())
	// Afterwards everything is as before.
	a.run(20 * time.Second)
	a.good(1)
	a.load(0.5*capacity, 20*time.Second, a.around(work))
	a.run(20 * time.Second)
	if limited && (a.refused > 0 || a.l.Limit() != 0) {
		t.Errorf("after the overload %d were refused, limit %d", a.refused, a.l.Limit())
	}
	return good / peak, p99
}

func TestOverload(t *testing.T) {
	for _, c := range []struct {
		workers int
		work    time.Duration
	}{{4, 20 * time.Millisecond}, {1, 10 * time.Millisecond}, {64, 100 * time.Millisecond}, {4, 4 * time.Millisecond}, {8, 500 * time.Millisecond}} {
		for _, giveUp := range []bool{false, true} {
			if ratio, p99 := overload(t, c.workers, c.work, true, giveUp); ratio < 0.8 || p99 > max(time.Second, 7*c.work) {
				t.Errorf("%d workers of %v, clients that give up %v: %.2f of the peak, p99 %v", c.workers, c.work, giveUp, ratio, p99)
			}
		}
	}
	// What would be without: nearly every answer comes too late.
	if ratio, _ := overload(t, 4, 20*time.Millisecond, false, true); ratio > 0.3 {
		t.Errorf("without a limit %.2f of the peak: this shows nothing", ratio)
	}
}

// TestNothingWaits: what is slow by itself is never refused.
func TestNothingWaits(t *testing.T) {
	t.Run("many clients of a busy application", func(t *testing.T) {
		a := newApp(4, true) // 4,000 a second
		for range 1000 {     // who wait a quarter of a second each
			a.send(request{work: time.Millisecond, again: true})
		}
		a.run(30 * time.Second)
		if a.refused > 0 {
			t.Errorf("%d were refused", a.refused)
		}
	})
	t.Run("long polls among others", func(t *testing.T) {
		a := newApp(4, true)
		for range 5000 {
			a.send(request{work: 30 * time.Second, free: true, again: true})
		}
		a.load(500, 100*time.Second, a.around(2*time.Millisecond))
		a.run(100 * time.Second)
		if a.refused > 0 {
			t.Errorf("%d were refused", a.refused)
		}
	})
	t.Run("long polls in an overload", func(t *testing.T) {
		a := newApp(4, true)
		for range 2000 {
			a.send(request{work: 60 * time.Second, free: true, again: true})
		}
		a.load(500, 10*time.Second, a.around(2*time.Millisecond))
		a.run(10 * time.Second)
		a.took = a.took[:0]
		a.load(8000, 60*time.Second, a.around(2*time.Millisecond)) // four times what it can do
		a.run(60 * time.Second)
		good, _ := a.good(60 * time.Second)
		t.Logf("%.0f/s of 2000/s", good)
		if good < 500 {
			t.Errorf("%.0f good answers a second: the polls hold the limit", good)
		}
	})
	t.Run("a pause", func(t *testing.T) {
		a := newApp(4, true)
		a.load(500, 20*time.Second, a.around(2*time.Millisecond))
		a.run(10 * time.Second)
		a.workers = 0 // a garbage collection
		a.run(300 * time.Millisecond)
		a.workers = 4
		a.start()
		a.run(10 * time.Second)
		if a.refused > 0 || a.l.Limit() != 0 {
			t.Errorf("%d were refused, limit %d", a.refused, a.l.Limit())
		}
	})
}

// TestSlowerApplication: one whose answers become slower without waiting for one
// another is limited by mistake, and not for long.
func TestSlowerApplication(t *testing.T) {
	a := newApp(10_000, true)
	a.load(400, 10*time.Second, a.around(time.Millisecond))
	a.run(10 * time.Second)
	a.load(400, 60*time.Second, a.around(3*time.Second)) // 1,200 in flight
	a.run(30 * time.Second)
	t.Logf("%d of 12,000 were refused", a.refused)
	a.refused = 0
	a.run(30 * time.Second)
	if a.refused > 0 || a.l.Limit() != 0 {
		t.Errorf("still refused after half a minute: %d, limit %d", a.refused, a.l.Limit())
	}
}

// TestChangingCapacity: an overloaded application that can do less for a while, and then
// as much as before, is not mistaken for one whose answers merely take longer.
func TestChangingCapacity(t *testing.T) {
	for _, c := range []struct {
		workers int
		work    time.Duration
	}{{4, 20 * time.Millisecond}, {4, 4 * time.Millisecond}, {64, 100 * time.Millisecond}} {
		a := newApp(c.workers, true)
		a.giveUp = true
		capacity := float64(c.workers) / c.work.Seconds()
		slow := 1.0
		work := a.around(c.work)
		a.load(0.5*capacity, 10*time.Second, work)
		a.run(10 * time.Second)
		a.load(10*capacity, 200*time.Second, func() time.Duration { return time.Duration(slow * float64(work())) })
		a.run(10 * time.Second)
		var done, could float64
		for i := range 19 {
			slow = []float64{1, 2, 4, 3}[i%4] // of what is admitted from now on
			a.good(1)
			a.run(10 * time.Second)
			good, _ := a.good(10 * time.Second)
			done, could = done+good, could+capacity/slow
		}
		t.Logf("%d workers of %v: %.2f of what it could do, limit %d", c.workers, c.work, done/could, a.l.Limit())
		if done < 0.8*could {
			t.Errorf("%d workers of %v: %.2f of what it could do", c.workers, c.work, done/could)
		}
	}
}

func TestMaxConcurrency(t *testing.T) {
	var l Limiter
	rules := (*assay.TrafficPolicy)(nil).WithDefaults().Inbound
	rules.MaxConcurrency = 2
	l.Set(rules)
	for i, want := range []bool{true, true, false} {
		if l.Admit(1) != want {
			t.Errorf("request %d at once: admitted %v, want %v", i+1, !want, want)
		}
	}
	l.Done(1, 1)
	if !l.Admit(1) || l.InFlight() != 2 {
		t.Error("one left, so one may come")
	}
}

func TestRateLimit(t *testing.T) {
	var r RateLimit
	take := func(now time.Duration, n int) (taken int) {
		for range n {
			if r.Take(now) {
				taken++
			}
		}
		return taken
	}
	if take(0, 1000) != 1000 {
		t.Error("no limit, and some were refused")
	}
	r.Set(10, 5)
	for _, c := range []struct {
		now  time.Duration
		want int
	}{{time.Second, 5}, {1050 * time.Millisecond, 0}, {1100 * time.Millisecond, 1}, {1300 * time.Millisecond, 2}, {time.Minute, 5}} {
		if got := take(c.now, 100); got != c.want {
			t.Errorf("at %v: %d, want %d", c.now, got, c.want)
		}
	}
	r.Set(0.5, 0)
	if got := take(time.Hour, 10); got != 1 {
		t.Errorf("one in two seconds: %d", got)
	}
}

func TestAdmittingAllocatesNothing(t *testing.T) {
	var in Inbound
	p := (*assay.TrafficPolicy)(nil).WithDefaults()
	in.Set(&p.Inbound)
	now := time.Duration(1)
	if n := testing.AllocsPerRun(10000, func() {
		now += 50 * time.Microsecond
		in.Admit(now)
		in.Limiter.Done(time.Millisecond, now)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkAdmit(b *testing.B) {
	var in Inbound
	p := (*assay.TrafficPolicy)(nil).WithDefaults()
	in.Set(&p.Inbound)
	now := time.Duration(1)
	b.ReportAllocs()
	for b.Loop() {
		now += 30 * time.Microsecond
		in.Admit(now)
		in.Limiter.Done(time.Millisecond, now)
	}
}
