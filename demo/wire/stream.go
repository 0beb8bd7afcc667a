package wire

import "bytes"

// maxHeld bounds the segments that wait for one that was seen late: packets of one
// connection can reach the capture over several processors.
const maxHeld = 256

// stream is one direction of a connection, put together as far as is needed to
// search across segments and to follow TLS records.
type stream struct {
	started bool
	first   uint32 // sequence number of the first byte
	next    uint32 // of the next one
	held    map[uint32][]byte
	bytes   uint64
	holes   uint64 // times that bytes were missing for good
	tail    []byte // the last bytes, for texts that two segments share
	head    []byte // the first bytes, to tell what is spoken
	records recordReader
}

const headSize = 64

// segment takes one segment in any order and calls found for each text in what it
// completes.
func (st *stream) segment(s *segment, texts [][]byte, found func(text int)) {
	if s.flags&flagSYN != 0 {
		st.start(s.seq + 1)
		return
	}
	if len(s.payload) == 0 {
		return
	}
	if !st.started { // the capture began in the middle of the connection
		st.start(s.seq)
		st.holes++
		st.records.lost = true
	}
	st.insert(s.seq, s.payload, texts, found)
	for len(st.held) > 0 {
		p, ok := st.held[st.next]
		if !ok {
			if len(st.held) < maxHeld {
				return
			}
			st.skip()
			continue
		}
		delete(st.held, st.next)
		st.take(p, texts, found)
	}
}

// start begins a stream, once: SYNs are repeated.
func (st *stream) start(next uint32) {
	if !st.started {
		st.started, st.first, st.next = true, next, next
	}
}

func (st *stream) insert(seq uint32, p []byte, texts [][]byte, found func(int)) {
	switch ahead := int32(seq - st.next); {
	case ahead == 0:
		st.take(p, texts, found)
	case ahead > 0:
		if st.held == nil {
			st.held = map[uint32][]byte{}
		}
		if len(st.held[seq]) < len(p) {
			st.held[seq] = bytes.Clone(p)
		}
	case -int(ahead) < len(p): // partly seen before
		st.take(p[-ahead:], texts, found)
	}
}

// skip gives up on what is missing and goes on at the first byte that is held.
func (st *stream) skip() {
	first, best := st.next, int32(-1)
	for seq := range st.held {
		if ahead := int32(seq - st.next); ahead > 0 && (best < 0 || ahead < best) {
			first, best = seq, ahead
		}
	}
	if best < 0 { // everything held was overtaken
		clear(st.held)
		return
	}
	st.holes++
	st.records.lost = true
	st.tail = st.tail[:0]
	st.next = first
	for seq := range st.held {
		if int32(seq-first) < 0 {
			delete(st.held, seq)
		}
	}
}

// finish takes what is still held, holes and all.
func (st *stream) finish(texts [][]byte, found func(int)) {
	for len(st.held) > 0 {
		p, ok := st.held[st.next]
		if !ok {
			st.skip()
			continue
		}
		delete(st.held, st.next)
		st.take(p, texts, found)
	}
}

// take consumes the next bytes of the stream.
func (st *stream) take(p []byte, texts [][]byte, found func(int)) {
	st.next += uint32(len(p))
	st.bytes += uint64(len(p))
	if n := headSize - len(st.head); n > 0 {
		st.head = append(st.head, p[:min(n, len(p))]...)
	}
	st.records.write(p)

	longest := 0
	for _, t := range texts {
		longest = max(longest, len(t))
	}
	if longest == 0 {
		return
	}
	// A text may begin in one segment and end in the next.
	border := append(st.tail, p[:min(len(p), longest-1)]...)
	for i, t := range texts {
		if bytes.Contains(border, t) || bytes.Contains(p, t) {
			found(i)
		}
	}
	if len(p) >= longest-1 {
		border = p
	}
	st.tail = append(st.tail[:0], border[max(0, len(border)-(longest-1)):]...)
}
