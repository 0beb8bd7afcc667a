package wire

import (
	"encoding/binary"
	"slices"
)

// TLS record types (RFC 8446 section 5.1).
const (
	recordCCS         = 20
	recordAlert       = 21
	recordHandshake   = 22
	recordApplication = 23
)

const (
	maxRecord = 16384 + 256 // RFC 8446 section 5.2
	maxHello  = 64 << 10
)

// recordReader follows the framing of TLS records and reads the one hello that is
// in clear. Its zero value is ready.
type recordReader struct {
	header  [5]byte
	have    int // bytes of header
	left    int // bytes of the record's body to come
	broken  bool
	lost    bool // bytes were missing: the framing cannot be followed any more
	records [4]uint64
	hello   []byte // handshake bytes until the first message is whole
	done    bool   // it is, or will never be
	Hello   Hello
}

// Hello is what a ClientHello offers or a ServerHello chooses, in clear.
type Hello struct {
	Client   bool     `json:"-"`
	Seen     bool     `json:"-"`
	Name     string   `json:"name,omitempty"`     // server_name
	ALPN     []string `json:"alpn,omitempty"`     // offered
	Versions []uint16 `json:"versions,omitempty"` // offered or chosen (supported_versions)
}

func (r *recordReader) write(p []byte) {
	for len(p) > 0 && !r.broken && !r.lost {
		if r.left > 0 {
			n := min(r.left, len(p))
			if r.header[0] == recordHandshake {
				r.handshake(p[:n])
			}
			r.left -= n
			p = p[n:]
			continue
		}
		n := copy(r.header[r.have:], p)
		r.have += n
		p = p[n:]
		if r.have < len(r.header) {
			return
		}
		r.have = 0
		kind, size := r.header[0], int(binary.BigEndian.Uint16(r.header[3:]))
		if kind < recordCCS || kind > recordApplication || r.header[1] != 3 || r.header[2] > 4 || size == 0 || size > maxRecord {
			r.broken = true
			return
		}
		r.records[kind-recordCCS]++
		if kind != recordHandshake {
			r.done = true // TLS 1.3: everything after the hello is application data
		}
		r.left = size
	}
}

// tls reports whether every byte so far was in a TLS record.
func (r *recordReader) tls() bool {
	return !r.broken && !r.lost && r.records != [4]uint64{}
}

func (r *recordReader) count(kind int) uint64 { return r.records[kind-recordCCS] }

func (r *recordReader) handshake(p []byte) {
	if r.done {
		return
	}
	r.hello = append(r.hello, p...)
	if len(r.hello) < 4 {
		return
	}
	size := int(r.hello[1])<<16 | int(r.hello[2])<<8 | int(r.hello[3])
	if size > maxHello {
		r.done, r.hello = true, nil
		return
	}
	if len(r.hello) < 4+size {
		return
	}
	r.Hello = parseHello(r.hello[0], r.hello[4:4+size])
	r.done, r.hello = true, nil
}

// parseHello reads a ClientHello (type 1) or ServerHello (type 2), RFC 8446 section
// 4.1. What is malformed yields what was read before it.
func parseHello(kind byte, p []byte) (h Hello) {
	b := bytesReader(p)
	h.Client = kind == 1
	if kind != 1 && kind != 2 {
		return h
	}
	b.skip(2 + 32) // legacy_version, random
	b.vector8()    // session id
	if h.Client {
		b.vector16() // cipher suites
		b.vector8()  // compression methods
	} else {
		b.skip(3)
	}
	ext := bytesReader(b.vector16())
	h.Seen = b != nil
	for len(ext) > 0 {
		kind := ext.uint16()
		body := bytesReader(ext.vector16())
		switch {
		case kind == 0 && h.Client: // server_name, RFC 6066 section 3
			list := bytesReader(body.vector16())
			list.skip(1)
			h.Name = string(list.vector16())
		case kind == 16 && h.Client: // ALPN, RFC 7301 section 3.1
			for list := bytesReader(body.vector16()); len(list) > 0; {
				h.ALPN = append(h.ALPN, string(list.vector8()))
			}
		case kind == 43 && h.Client: // supported_versions
			for list := bytesReader(body.vector8()); len(list) > 0; {
				h.Versions = append(h.Versions, list.uint16())
			}
		case kind == 43:
			h.Versions = append(h.Versions, body.uint16())
		}
	}
	return h
}

// bytesReader reads TLS vectors; reading past the end leaves it nil.
type bytesReader []byte

func (b *bytesReader) skip(n int) []byte {
	if len(*b) < n {
		*b = nil
		return nil
	}
	p := (*b)[:n:n]
	*b = (*b)[n:]
	return p
}

func (b *bytesReader) uint16() uint16 {
	if p := b.skip(2); p != nil {
		return binary.BigEndian.Uint16(p)
	}
	return 0
}

func (b *bytesReader) vector8() []byte {
	if p := b.skip(1); p != nil {
		return b.skip(int(p[0]))
	}
	return nil
}

func (b *bytesReader) vector16() []byte { return b.skip(int(b.uint16())) }

// Offers reports whether the hello offers a protocol.
func (h *Hello) Offers(alpn string) bool { return slices.Contains(h.ALPN, alpn) }
