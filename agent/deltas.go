package agent

import (
	"sync"
	"weak"

	"assay.dev/link"
)

// deltas are what proxies are sent to come to the newest view, each encoded once: most of a
// host's are at the same view and in few namespaces, and all of them begin at once. They live
// as long as somebody sends them. The zero value is ready.
type deltas struct {
	encoding sync.Mutex // one at a time: what is large is so several times until it is encoded
	mu       sync.Mutex
	to       uint64 // the view
	list     map[deltaKey]weak.Pointer[sharedDelta]
}

// deltaKey is which view a proxy was told of, its namespace where that matters, and whether
// it knows patches.
type deltaKey struct {
	full      bool // of none
	from      uint64
	namespace string
	patches   bool
}

type sharedDelta struct {
	once sync.Once
	body *link.Encoded // nil: nothing
	err  error
}

// between returns what a proxy in a namespace that was told of one view, or of none, is sent
// to know another. The body is nil when that is nothing.
func (d *deltas) between(from, to *view, namespace string, patches bool) *sharedDelta {
	if from == nil {
		return d.encoded(to.number, deltaKey{full: true, namespace: namespace}, func() (link.Services, bool) { return to.full(namespace), true })
	}
	if from.number == to.number {
		return &sharedDelta{}
	}
	c, known := to.since(from.number)
	if !known {
		c = to.compared(from)
	}
	key := deltaKey{from: from.number, patches: patches}
	if c.settings || len(c.routes) > 0 {
		key.namespace = namespace
	}
	return d.encoded(to.number, key, func() (link.Services, bool) { return to.delta(from, c, namespace, patches) })
}

func (d *deltas) encoded(to uint64, key deltaKey, say func() (link.Services, bool)) *sharedDelta {
	shared := d.of(to, key)
	shared.once.Do(func() {
		d.encoding.Lock()
		defer d.encoding.Unlock()
		if s, news := say(); news {
			shared.body, shared.err = link.Encode(s)
		}
	})
	return shared
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
		d.to, d.list = to, map[deltaKey]weak.Pointer[sharedDelta]{}
	}
	shared := d.list[key].Value()
	if shared == nil {
		shared = &sharedDelta{}
		d.list[key] = weak.Make(shared)
	}
	return shared
}
