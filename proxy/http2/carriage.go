package http2

// What a stream between the proxies carries (docs/transport.md): blocks of a type, three
// bytes of length, big endian, and so many bytes. A field list is, for each field, the
// length of its name, doubled, plus one when it may never be indexed, the length of its
// value, and both; lengths are base 128, low digits first, in as few bytes as can be.

const (
	blockHead     = 1 // the head of a request, or a final response's
	blockInterim  = 2 // the head of a 1xx response
	blockData     = 3
	blockTrailers = 4 // the end of the direction follows
)

const blockHeader = 4

// putBlock writes a block's header.
func putBlock(b []byte, kind byte, n int) {
	_ = b[3]
	b[0], b[1], b[2], b[3] = kind, byte(n>>16), byte(n>>8), byte(n)
}

func parseBlock(b []byte) (kind byte, n int) {
	_ = b[3]
	return b[0], int(b[1])<<16 | int(b[2])<<8 | int(b[3])
}

func appendLength(b []byte, n uint) []byte {
	for n >= 0x80 {
		b = append(b, byte(n)|0x80)
		n >>= 7
	}
	return append(b, byte(n))
}

// cutLength reads a length of at most three bytes.
func cutLength(p []byte) (n uint, rest []byte, ok bool) {
	for i := 0; i < 3 && i < len(p); i++ {
		n |= uint(p[i]&0x7f) << (7 * i)
		if p[i] < 0x80 {
			return n, p[i+1:], i == 0 || p[i] != 0
		}
	}
	return 0, nil, false
}

// appendFields writes a block of fields.
func (b *buffer) appendFields(kind byte, fields []Field) {
	size := blockHeader
	for i := range fields {
		size += len(fields[i].Name) + len(fields[i].Value) + 6
	}
	b.grow(size)
	at := len(b.b)
	out := append(b.b, 0, 0, 0, 0)
	for i := range fields {
		f := &fields[i]
		n := uint(len(f.Name)) << 1
		if f.Sensitive {
			n |= 1
		}
		out = appendLength(out, n)
		out = appendLength(out, uint(len(f.Value)))
		out = append(out, f.Name...)
		out = append(out, f.Value...)
	}
	putBlock(out[at:], kind, len(out)-at-blockHeader)
	b.b = out
}

// appendData writes a block of data.
func (b *buffer) appendData(p []byte) {
	b.grow(blockHeader + len(p))
	at := len(b.b)
	b.b = append(b.b, 0, 0, 0, 0)
	putBlock(b.b[at:], blockData, len(p))
	b.b = append(b.b, p...)
}

// cutField reads the first field of a list.
func cutField(p []byte) (name, value []byte, sensitive bool, rest []byte, ok bool) {
	n, p, ok := cutLength(p)
	if !ok {
		return nil, nil, false, nil, false
	}
	v, p, ok := cutLength(p)
	if sensitive = n&1 == 1; !ok {
		return nil, nil, false, nil, false
	}
	n >>= 1
	if uint(len(p)) < n || uint(len(p))-n < v {
		return nil, nil, false, nil, false
	}
	return p[:n], p[n : n+v], sensitive, p[n+v:], true
}
