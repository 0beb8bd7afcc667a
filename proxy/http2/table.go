package http2

// table finds streams by number, as mux's does: a chained hash on their low bits, which
// unlike a map never allocates between growths.
type table struct {
	bucket []*stream
	n      int
}

const minBuckets = 8

func (t *table) slot(id uint32) **stream { return &t.bucket[int(id>>1)&(len(t.bucket)-1)] }

func (t *table) get(id uint32) *stream {
	if t.n == 0 {
		return nil
	}
	x := *t.slot(id)
	for x != nil && x.id != id {
		x = x.chain
	}
	return x
}

func (t *table) put(x *stream) {
	if t.n >= len(t.bucket) {
		t.resize(max(2*len(t.bucket), minBuckets))
	}
	p := t.slot(x.id)
	x.chain, *p = *p, x
	t.n++
}

func (t *table) remove(x *stream) bool {
	if t.n == 0 {
		return false
	}
	for p := t.slot(x.id); *p != nil; p = &(*p).chain {
		if *p == x {
			*p, x.chain = x.chain, nil
			t.n--
			return true
		}
	}
	return false
}

func (t *table) resize(size int) {
	old := t.bucket
	t.bucket = make([]*stream, size)
	for _, x := range old {
		for x != nil {
			next := x.chain
			p := t.slot(x.id)
			x.chain, *p = *p, x
			x = next
		}
	}
}

// any returns a stream, nil when there is none.
func (t *table) any() *stream {
	if t.n > 0 {
		for _, x := range t.bucket {
			if x != nil {
				return x
			}
		}
	}
	return nil
}

// each calls f for every stream; f may remove it.
func (t *table) each(f func(*stream)) {
	for _, x := range t.bucket {
		for x != nil {
			next := x.chain
			f(x)
			x = next
		}
	}
}

// shrink gives memory back after a burst.
func (t *table) shrink() {
	if t.n == 0 && len(t.bucket) > minBuckets {
		t.bucket = nil
	}
}

// queue is a list of streams, first in first out. A stream is in one queue at most.
type queue struct{ head, tail *stream }

func (q *queue) push(x *stream) {
	if x.listed {
		return
	}
	x.listed, x.next = true, nil
	if q.tail == nil {
		q.head = x
	} else {
		q.tail.next = x
	}
	q.tail = x
}

// each calls f, which changes no queue, for every stream.
func (q *queue) each(f func(*stream)) {
	for x := q.head; x != nil; x = x.next {
		f(x)
	}
}

func (q *queue) pop() *stream {
	x := q.head
	if x == nil {
		return nil
	}
	if q.head = x.next; q.head == nil {
		q.tail = nil
	}
	x.next, x.listed = nil, false
	return x
}
