package agent

import (
	"testing"
	"time"
)

// A proxy that missed views is as late as the first change in them; what it was told before
// does not count, nor do views without changes.
func TestConvergenceSince(t *testing.T) {
	var c convergence
	change := func(view uint64) time.Time {
		c.changed()
		at := c.arrived
		c.changed() // in the same view: the first one counts
		if !c.arrived.Equal(at) {
			t.Fatal("the later change is taken for the first")
		}
		c.published(view)
		return at
	}
	c.published(1)
	first, second := change(2), change(3)
	c.published(4)
	for _, x := range []struct {
		told, last uint64
		want       time.Time
	}{
		{0, 1, time.Time{}}, {1, 2, first}, {1, 4, first}, {2, 4, second}, {3, 4, time.Time{}}, {4, 4, time.Time{}},
	} {
		if got := c.since(x.told, x.last); !got.Equal(x.want) {
			t.Errorf("since(%d, %d) = %v, want %v", x.told, x.last, got, x.want)
		}
	}
	var newest time.Time
	for n := uint64(5); n < 5+2*recent; n++ {
		newest = change(n)
	}
	last := uint64(4 + 2*recent)
	if got := c.since(2, last); got.IsZero() || got.Before(second) {
		t.Errorf("a proxy that is far behind: %v", got)
	}
	if got := c.since(last-1, last); !got.Equal(newest) {
		t.Errorf("the newest: %v, want %v", got, newest)
	}
	c.used(time.Now().Add(-time.Second))
	if h := c.histogram(); h.Count() != 1 || h.Sum < time.Second {
		t.Errorf("histogram: %d, %s", h.Count(), h.Sum)
	}
}
