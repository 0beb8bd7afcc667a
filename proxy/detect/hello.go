package detect

import "encoding/binary"

const (
	recordHandshake = 22 // RFC 8446 section 5.1
	typeClientHello = 1
	maxRecord       = 1 << 14
)

// MaxHello bounds a ClientHello with its record headers. Post-quantum key shares
// make it a few kilobytes; nobody needs more than this.
const MaxHello = 32 << 10

// Hello is what a TLS client's first message says.
type Hello uint8

const (
	HelloMore    Hello = iota // not yet complete
	HelloNone                 // not a TLS ClientHello
	HelloForeign              // a ClientHello that does not offer the protocol
	HelloOurs                 // one that offers it
)

// ClientHello looks in p, which starts with the first record of a connection, for a
// ClientHello that offers alpn. It reads the message to its end and strictly, across
// records, and copies nothing.
func ClientHello(p []byte, alpn string) Hello {
	body, state := helloBody(p)
	if state != HelloOurs {
		return state
	}
	found, ok := offers(body, alpn)
	switch {
	case !ok:
		return HelloNone
	case found:
		return HelloOurs
	}
	return HelloForeign
}

// ServerName looks in p, as ClientHello does, for the name that the client asks for (RFC
// 6066 section 3). The state is HelloMore while the hello is not complete, HelloNone
// when it is none, else HelloForeign; the name is "" when there is none.
func ServerName(p []byte) (string, Hello) {
	body, state := helloBody(p)
	if state != HelloOurs {
		return "", state
	}
	name, ok := serverName(body)
	if !ok {
		return "", HelloNone
	}
	return string(name), HelloForeign
}

// helloBody returns a ClientHello's content, and HelloOurs when it is complete.
func helloBody(p []byte) ([]byte, Hello) {
	if len(p) == 0 {
		return nil, HelloMore
	}
	if len(p) > MaxHello {
		p = p[:MaxHello]
	}
	// A message that fits one record, which all but the strangest do, is read in place.
	r := records{p: p}
	var fixed [4]byte
	for i := range fixed {
		b, state := r.next()
		if state != HelloOurs {
			return nil, state
		}
		fixed[i] = b
	}
	if fixed[0] != typeClientHello {
		return nil, HelloNone
	}
	n := int(fixed[1])<<16 | int(fixed[2])<<8 | int(fixed[3])
	if n > MaxHello {
		return nil, HelloNone
	}
	return r.take(n)
}

// records walks the payload of handshake records.
type records struct {
	p    []byte
	left int // of the current record
}

// enter makes sure that the current record has a byte left.
func (r *records) enter() Hello {
	for r.left == 0 {
		p := r.p
		if len(p) > 0 && p[0] != recordHandshake || len(p) > 1 && p[1] != 3 || len(p) > 2 && p[2] > 4 {
			return HelloNone
		}
		if len(p) < 5 {
			return HelloMore
		}
		r.left = int(binary.BigEndian.Uint16(p[3:]))
		if r.left == 0 || r.left > maxRecord {
			return HelloNone // an empty handshake record is forbidden (section 5.1)
		}
		r.p = p[5:]
	}
	if len(r.p) == 0 {
		return HelloMore
	}
	return HelloOurs
}

func (r *records) next() (byte, Hello) {
	if state := r.enter(); state != HelloOurs {
		return 0, state
	}
	b := r.p[0]
	r.p, r.left = r.p[1:], r.left-1
	return b, HelloOurs
}

// take returns n bytes; in place when they are in one record.
func (r *records) take(n int) ([]byte, Hello) {
	var out []byte
	for n > 0 {
		if state := r.enter(); state != HelloOurs {
			return nil, state
		}
		k := min(n, r.left, len(r.p))
		piece := r.p[:k]
		r.p, r.left, n = r.p[k:], r.left-k, n-k
		if out == nil && n == 0 {
			return piece, HelloOurs
		}
		out = append(out, piece...)
	}
	return out, HelloOurs
}

// offers reads a ClientHello (RFC 8446 section 4.1.2) for an ALPN extension (RFC
// 7301) that names alpn.
func offers(m []byte, alpn string) (found, ok bool) {
	ext, ok := extensions(m)
	if !ok || ext.b == nil {
		return false, ok
	}
	seen := false
	for len(ext.b) > 0 {
		kind := ext.uint16()
		body := ext.vector16()
		if ext.b == nil {
			return false, false
		}
		if kind != 16 {
			continue
		}
		list := cursor{body}
		names := cursor{list.vector16()}
		if seen || list.b == nil || len(list.b) != 0 || len(names.b) == 0 {
			return false, false
		}
		seen = true
		for len(names.b) > 0 {
			name := names.vector8()
			if names.b == nil || len(name) == 0 {
				return false, false
			}
			found = found || string(name) == alpn
		}
	}
	return found, ext.b != nil
}

// extensions skips to them; without any the cursor is nil.
func extensions(m []byte) (ext cursor, ok bool) {
	c := cursor{m}
	c.skip(2 + 32) // legacy_version, random
	c.vector8()    // legacy_session_id
	c.vector16()   // cipher_suites
	c.vector8()    // legacy_compression_methods
	if c.b == nil {
		return cursor{}, false
	}
	if len(c.b) == 0 {
		return cursor{}, true // before extensions were invented
	}
	ext = cursor{c.vector16()}
	return ext, c.b != nil && len(c.b) == 0
}

// serverName reads a ClientHello for the server_name extension.
func serverName(m []byte) (name []byte, ok bool) {
	ext, ok := extensions(m)
	if !ok || ext.b == nil {
		return nil, ok
	}
	seen := false
	for len(ext.b) > 0 {
		kind := ext.uint16()
		body := ext.vector16()
		if ext.b == nil {
			return nil, false
		}
		if kind != 0 {
			continue
		}
		list := cursor{body}
		names := cursor{list.vector16()}
		if seen || list.b == nil || len(list.b) != 0 || len(names.b) == 0 {
			return nil, false
		}
		seen = true
		for len(names.b) > 0 {
			kind := names.skip(1)
			one := names.vector16()
			if names.b == nil || len(one) == 0 {
				return nil, false
			}
			if kind[0] == 0 { // host_name; there is no other kind
				if name != nil {
					return nil, false
				}
				name = one
			}
		}
	}
	return name, true
}

// cursor reads from the front; b is nil once it read past the end.
type cursor struct{ b []byte }

func (c *cursor) skip(n int) []byte {
	if c.b == nil || len(c.b) < n {
		c.b = nil
		return nil
	}
	p := c.b[:n:n]
	c.b = c.b[n:]
	return p
}

func (c *cursor) uint16() int {
	if p := c.skip(2); p != nil {
		return int(p[0])<<8 | int(p[1])
	}
	return 0
}

func (c *cursor) vector8() []byte {
	if p := c.skip(1); p != nil {
		return c.skip(int(p[0]))
	}
	return nil
}

func (c *cursor) vector16() []byte { return c.skip(c.uint16()) }
