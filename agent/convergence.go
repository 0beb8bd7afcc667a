package agent

import (
	"sync"
	"time"

	"assay.dev"
)

// convergence is how long what control tells takes from its arrival on this host to a proxy
// that uses it: one observation for each proxy and each set of changes that it was sent.
type convergence struct {
	mu      sync.Mutex
	arrived time.Time       // the first change that is in no view
	views   [recent]arrival // the newest views, by their numbers
	took    assay.Latency
}

// arrival is when the first of a view's changes came.
type arrival struct {
	view uint64
	at   time.Time
}

// recent is how many views a proxy may be behind before its delay is measured from a later one.
const recent = 64

// changed notes that a change has come.
func (c *convergence) changed() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.arrived.IsZero() {
		c.arrived = time.Now()
	}
}

// published notes that what has come is in a view. It is called before the view is made: a
// change that comes meanwhile is of the next one.
func (c *convergence) published(view uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.views[view%recent], c.arrived = arrival{view, c.arrived}, time.Time{}
}

// since is when the first change came that is in a view up to last and was not in view told.
func (c *convergence) since(told, last uint64) (first time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for n := max(told+1, last-min(last, recent-1)); n <= last; n++ {
		if x := c.views[n%recent]; x.view == n && !x.at.IsZero() && (first.IsZero() || x.at.Before(first)) {
			first = x.at
		}
	}
	return first
}

// used counts that a proxy uses what has come since then.
func (c *convergence) used(since time.Time) {
	d := time.Since(since)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.took.Buckets[assay.LatencyBucket(d)]++
	c.took.Sum += d
}

// histogram returns a copy.
func (c *convergence) histogram() assay.Latency {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.took
}

// delta is what a proxy was sent and has not said to use.
type delta struct {
	version uint64
	since   time.Time
}
