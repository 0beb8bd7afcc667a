package http2

import "sync"

// buffer is a piece of memory that is taken when there are bytes and given back when
// there are none. The zero value is empty.
type buffer struct {
	b    []byte
	pool *poolItem // what b is part of; nil: nobody's
	of   *conn     // which holds it, and counts so; nil: nobody does
}

// poolItem is what pools hold: a pointer, so that putting it back allocates nothing.
type poolItem struct {
	class int
	mem   []byte
}

var classes = [...]int{1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10}

var pools [len(classes)]sync.Pool

func take(n int) *poolItem {
	for class, size := range classes {
		if n <= size {
			if item, ok := pools[class].Get().(*poolItem); ok {
				return item
			}
			return &poolItem{class, make([]byte, size)}
		}
	}
	return &poolItem{-1, make([]byte, n)}
}

func (i *poolItem) release() {
	if i != nil && i.class >= 0 {
		pools[i.class].Put(i)
	}
}

// grow makes room for n more bytes.
func (b *buffer) grow(n int) {
	if len(b.b)+n <= cap(b.b) {
		return
	}
	item := take(max(len(b.b)+n, min(2*len(b.b), classes[len(classes)-1])))
	mem := append(item.mem[:0], b.b...)
	if b.of != nil {
		b.of.holds(cap(mem) - cap(b.b))
	}
	b.pool.release()
	b.b, b.pool = mem, item
}

func (b *buffer) append(p []byte) {
	b.grow(len(p))
	b.b = append(b.b, p...)
}

// drop forgets the first n bytes, and the memory with the last.
func (b *buffer) drop(n int) {
	if n == len(b.b) {
		b.release()
		return
	}
	b.b = b.b[:copy(b.b, b.b[n:])]
}

func (b *buffer) release() {
	if b.of != nil && b.b != nil {
		b.of.holds(-cap(b.b))
	}
	b.pool.release()
	b.b, b.pool = nil, nil
}
