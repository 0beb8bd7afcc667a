package agent

import (
	"sync"

	"assay.dev/link"
)

// deltas are what proxies are sent to come to the newest view, each encoded once: most of a
// host's are at the same view and in few namespaces. The zero value is ready.
type deltas struct {
	mu   sync.Mutex
	to   uint64 // the view
	list map[deltaKey]*sharedDelta
}

// deltaKey is which view a proxy was told of, its namespace where that matters, and whether
// it knows patches.
type deltaKey struct {
	from      uint64
	namespace string
	patches   bool
}

type sharedDelta struct {
	once sync.Once
	body *link.Encoded // nil: nothing
	err  error
}

// between returns what a proxy in a namespace that was told of one view is sent to know
// another, or nil when that is nothing.
func (d *deltas) between(from, to *view, namespace string, patches bool) (*link.Encoded, error) {
	if from.number == to.number {
		return nil, nil
	}
	c, known := to.since(from.number)
	if !known {
		c = to.compared(from)
	}
	key := deltaKey{from: from.number, patches: patches}
	if c.settings || len(c.routes) > 0 {
		key.namespace = namespace
	}
	shared := d.of(to.number, key)
	shared.once.Do(func() {
		if s, news := to.delta(from, c, namespace, patches); news {
			shared.body, shared.err = link.Encode(s)
		}
	})
	return shared.body, shared.err
}

// of returns the place of a delta. Those of older views are nobody's any more, but for who
// is about to send one.
func (d *deltas) of(to uint64, key deltaKey) *sharedDelta {
	d.mu.Lock()
	defer d.mu.Unlock()
	if to < d.to {
		return &sharedDelta{}
	}
	if to > d.to {
		d.to, d.list = to, map[deltaKey]*sharedDelta{}
	}
	shared := d.list[key]
	if shared == nil {
		shared = &sharedDelta{}
		d.list[key] = shared
	}
	return shared
}
