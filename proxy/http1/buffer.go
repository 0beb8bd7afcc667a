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

// Sizes of buffers: what is read at first, a body, the largest head by default; and what
// is waited with, since most requests are far shorter than what they are read into.
var classes = [...]int{4 << 10, 16 << 10, 64 << 10, 1 << 10}

const (
	small = iota
	medium
	large
	tiny
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
	if n <= classes[tiny] {
		return takeBuffer(tiny)
	}
	for class, size := range classes[:tiny] {
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

// trimmed returns a request without a body, as far as can be told by its last bytes, in
// a buffer of its size: it waits there for its response.
func (b *buffer) trimmed() *buffer {
	if b.class != small || len(b.b) > classes[tiny]*3/4 || string(b.b[max(0, len(b.b)-4):]) != "\r\n\r\n" {
		return b
	}
	t := takeBuffer(tiny)
	t.b = append(t.b, b.b...)
	b.release()
	return t
}

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
