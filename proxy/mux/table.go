package mux

// table finds streams by number. Numbers are handed out in order, so a chained hash
// on their low bits spreads them evenly, and unlike a map it never allocates for an
// insertion between growths.
type table struct {
	bucket []*stream
	n      int
}

const minBuckets = 16

func (t *table) slot(id uint32) **stream { return &t.bucket[int(id)&(len(t.bucket)-1)] }

func (t *table) get(id uint32) *stream {
	if t.n == 0 {
		return nil
	}
	c := *t.slot(id)
	for c != nil && c.id != id {
		c = c.next
	}
	return c
}

func (t *table) put(c *stream) {
	if t.n >= len(t.bucket) {
		t.resize(max(2*len(t.bucket), minBuckets))
	}
	p := t.slot(c.id)
	c.next, *p = *p, c
	t.n++
}

func (t *table) remove(c *stream) {
	for p := t.slot(c.id); *p != nil; p = &(*p).next {
		if *p == c {
			*p, c.next = c.next, nil
			t.n--
			return
		}
	}
}

func (t *table) resize(size int) {
	old := t.bucket
	t.bucket = make([]*stream, size)
	for _, c := range old {
		for c != nil {
			next := c.next
			p := t.slot(c.id)
			c.next, *p = *p, c
			c = next
		}
	}
}

// shrink gives memory back after a burst.
func (t *table) shrink() {
	switch {
	case t.n == 0:
		t.bucket = nil
	case len(t.bucket) > minBuckets && t.n*8 < len(t.bucket):
		size := len(t.bucket)
		for size > minBuckets && size > 2*t.n {
			size /= 2
		}
		t.resize(size)
	}
}

// each calls f for every stream; f may remove it.
func (t *table) each(f func(*stream)) {
	for _, c := range t.bucket {
		for c != nil {
			next := c.next
			f(c)
			c = next
		}
	}
}
