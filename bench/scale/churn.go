package main

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/proto"

	"assay.dev/api"
)

// churn changes pods at a steady rate and measures when each host has heard. Of ten
// changes five make a pod ready or unready, and five are of pods that come or go: two of
// those are one replacement, with a report of the node's agent and a certificate.
type churn struct {
	w       *world
	hosts   []*host
	rate    int // changes per second
	tracked tracker
}

// tracker knows which changes hosts are to be asked for.
type tracker struct {
	mu   sync.RWMutex
	open map[string]*expected // by resource key
	took []time.Duration
	// changes and lost count what was begun, and what some host had not heard in time.
	changes, lost int
	since         time.Time // changes before that do not count
}

// expected is a change that not all hosts have heard of.
type expected struct {
	key  string
	at   time.Time
	done func(*api.Service) bool
	over func()
	mu   sync.Mutex
	by   map[*host]bool
	left int
}

// giveUp is how long a change may take before it counts as lost.
const giveUp = 30 * time.Second

// run goes on until ctx ends.
func (c *churn) run(ctx context.Context) {
	tick := time.NewTicker(time.Second * 4 / time.Duration(3*c.rate))
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		// Two of three steps are one change, the third is two.
		if i%3 == 2 {
			c.replace()
		} else {
			c.flip()
		}
		c.tracked.expire()
	}
}

// flip makes a pod ready, or not.
func (c *churn) flip() {
	c.w.mu.Lock()
	old := c.w.pick()
	if old == nil {
		c.w.mu.Unlock()
		return
	}
	old.ready = !old.ready
	object, slice := old.object(), old.service.slice()
	id, ready, s := old.uid, old.ready, old.service
	c.w.mu.Unlock()
	c.w.api.put(object)
	c.tracked.expect(s, c.hosts, 1, func() { c.w.done(s) }, func(m *api.Service) bool {
		return slices.ContainsFunc(m.GetEndpoints(), func(e *api.Endpoint) bool { return e.GetWorkload() == id && (e.GetTargets()[0] != 0) == ready })
	})
	c.w.api.put(slice)
}

// replace has a pod take the place of another, as a rolling update does.
func (c *churn) replace() {
	c.w.mu.Lock()
	old := c.w.pick()
	if old == nil {
		c.w.mu.Unlock()
		return
	}
	s := old.service
	next := c.w.newPod(s, c.w.nodes[c.w.random.IntN(len(c.w.nodes))])
	pending := next.object()
	next.started, next.ready = true, true
	old.ending = true
	running, ending := next.object(), old.object()
	s.replace(old, next)
	peers := c.w.peers()
	slice := s.slice()
	c.w.mu.Unlock()

	c.w.api.put(pending)
	next.node.host.up(next, peers)
	c.w.api.put(running)
	c.w.api.put(ending)
	gone, came := old.uid, next.uid
	c.tracked.expect(s, c.hosts, 2, func() { c.w.done(s) }, func(m *api.Service) bool {
		there := false
		for _, e := range m.GetEndpoints() {
			if e.GetWorkload() == gone {
				return false
			}
			there = there || e.GetWorkload() == came && e.GetIdentity() != "" && e.GetTargets()[0] != 0
		}
		return there
	})
	c.w.api.put(slice)
	c.w.api.remove(ending)
	old.node.host.gone(old)
}

// expect has every host look for a change of a service; over is called when all have it, or
// it is given up.
func (t *tracker) expect(s *service, hosts []*host, changes int, over func(), done func(*api.Service) bool) {
	e := &expected{key: "service/" + s.namespace + "/" + s.name, done: done, over: over, by: map[*host]bool{}, left: len(hosts)}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.changes += changes
	e.at = time.Now()
	t.open[e.key] = e
}

// heard takes a resource that a host was sent.
func (t *tracker) heard(h *host, key, raw []byte) {
	t.mu.RLock()
	e := t.open[string(key)]
	t.mu.RUnlock()
	if e == nil {
		return
	}
	now := time.Now()
	var r api.Resource
	if proto.Unmarshal(raw, &r) != nil || !e.done(r.GetService()) {
		return
	}
	e.mu.Lock()
	if e.by[h] {
		e.mu.Unlock()
		return
	}
	e.by[h] = true
	e.left--
	last := e.left == 0
	e.mu.Unlock()
	t.mu.Lock()
	if e.at.After(t.since) {
		t.took = append(t.took, now.Sub(e.at))
	}
	if last && t.open[e.key] == e {
		delete(t.open, e.key)
	}
	t.mu.Unlock()
	if last {
		e.over()
	}
}

// expire gives up what has taken too long.
func (t *tracker) expire() {
	var over []*expected
	t.mu.Lock()
	for key, e := range t.open {
		if time.Since(e.at) > giveUp {
			delete(t.open, key)
			over = append(over, e)
			t.lost++
		}
	}
	t.mu.Unlock()
	for _, e := range over {
		e.over()
	}
}

// begin forgets what was measured.
func (t *tracker) begin() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.took, t.changes, t.lost, t.since = nil, 0, 0, time.Now()
}

// delays are how long changes took to hosts, in seconds.
type delays struct {
	P50     float64 `json:"p50"`
	P99     float64 `json:"p99"`
	Max     float64 `json:"max"`
	Changes int     `json:"changes"`
	Lost    int     `json:"lost"` // not heard by some host within 30 s
}

// end waits for what is under way, and sums up.
func (t *tracker) end(ctx context.Context) delays {
	until := time.Now()
	for ctx.Err() == nil && time.Since(until) < giveUp && t.waiting(until) {
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Millisecond):
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	d := delays{Changes: t.changes, Lost: t.lost}
	if n := len(t.took); n > 0 {
		slices.Sort(t.took)
		d.P50, d.P99, d.Max = t.took[n/2].Seconds(), t.took[min(n-1, n*99/100)].Seconds(), t.took[n-1].Seconds()
	}
	return d
}

// waiting reports whether a change from before until is under way.
func (t *tracker) waiting(until time.Time) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, e := range t.open {
		if e.at.Before(until) {
			return true
		}
	}
	return false
}

// bytesIn counts what hosts were sent.
var bytesIn atomic.Int64
