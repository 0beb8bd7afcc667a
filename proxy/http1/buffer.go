package http1

import "sync"

// buffer is a piece of memory that is taken when there are bytes and given back when
// there are none.
type buffer struct {
	b     []byte // the filled part
	class uint8
	next  *buffer // in an outlet's queue
	from  int     // what the outlet has written of it
}

// Sizes of buffers: a request, a body, the largest head by default.
var classes = [...]int{4 << 10, 16 << 10, 64 << 10}

const (
	small = iota
	medium
	large
	outsize // of a configured limit over the largest class; not pooled
)

var buffers [len(classes)]sync.Pool

func takeBuffer(class uint8) *buffer {
	if b, ok := buffers[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{b: make([]byte, 0, classes[class]), class: class}
}

// bufferFor returns a buffer with room for n bytes.
func bufferFor(n int) *buffer {
	for class, size := range classes {
		if n <= size {
			return takeBuffer(uint8(class))
		}
	}
	return &buffer{b: make([]byte, 0, n), class: outsize}
}

func (b *buffer) release() {
	if b == nil || b.class == outsize {
		return
	}
	b.b, b.next, b.from = b.b[:0], nil, 0
	buffers[b.class].Put(b)
}

func (b *buffer) full() bool   { return len(b.b) == cap(b.b) }
func (b *buffer) room() []byte { return b.b[len(b.b):cap(b.b)] }

// drop removes the first n bytes.
func (b *buffer) drop(n int) { b.b = b.b[:copy(b.b, b.b[n:])] }

// grown returns a buffer with the same bytes and room for more of them, at most max
// in all, and releases b.
func (b *buffer) grown(more, max int) *buffer {
	g := bufferFor(min(len(b.b)+more, max))
	g.b = append(g.b, b.b...)
	b.release()
	return g
}

// held appends p to b, which may be nil, for a head that comes in pieces.
func held(b *buffer, p []byte) *buffer {
	switch {
	case b == nil:
		b = bufferFor(len(p))
	case len(b.b)+len(p) > cap(b.b):
		b = b.grown(max(len(p), len(b.b)), 1<<30)
	}
	b.b = append(b.b, p...)
	return b
}
