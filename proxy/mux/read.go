package mux

import (
	"encoding/binary"
	"sync"
	"time"
)

// The way in: conn.Read -> buffer -> whole frames -> state (mu) -> Handler. Handlers
// get slices of the buffer. A frame waits until it is whole: the sender wrote it in
// one go, so the rest is on its way, and the application then gets one write for each
// frame. Only of long DATA frames what is there is passed on, as if it were a frame of
// its own: a slow link would make its receiver wait, and hold memory.
//
// TLS gives one record at a time. When a record was large, those that TLS has beside
// it are taken, too, before any is handled.

const (
	smallRead = 2 << 10  // while little arrives, also while idle
	largeRead = 80 << 10 // five records: a long frame and what follows
	// bulkRead is how much one read must give for more to be looked for.
	bulkRead = 8 << 10
)

var largeReads = sync.Pool{New: func() any { b := make([]byte, largeRead); return &b }}

// read is the reader: it returns why the session ends.
func (s *Session) read() *Error {
	var (
		buf   = s.small[:]
		large *[]byte // buf's owner while it is large
		r, w  int     // unread bytes are buf[r:w]
		greet = true  // the preface has not arrived
	)
	shrink := func() {
		if large != nil {
			largeReads.Put(large)
			large, buf = nil, s.small[:]
		}
	}
	defer shrink()
	enlarge := func() {
		large = largeReads.Get().(*[]byte)
		w = copy(*large, buf[r:w])
		buf, r = *large, 0
	}
	for {
		n, dry, err := s.take(buf[w:])
		if n > 0 {
			s.lastRead.Store(int64(time.Since(s.born)))
			filled := w+n == len(buf)
			w += n
			if greet && w-r >= len(preface) {
				if string(buf[r:r+len(preface)]) != preface {
					return broken("preface")
				}
				r, greet = r+len(preface), false
			}
			var need int // length of the frame that is not whole yet
			if !greet {
				used, want, end := s.dispatch(buf[r:w])
				if end != nil {
					return end
				}
				r, need = r+used, want
			}
			if r == w {
				r, w = 0, 0
			}
			switch {
			case large == nil && (filled || need > len(buf)):
				enlarge()
			case w == 0 && (dry || n < smallRead):
				shrink()
			case r > 0 && (r+need > len(buf) || len(buf)-w < smallRead):
				w = copy(buf, buf[r:w])
				r = 0
			}
		}
		if err == nil && dry && s.sock.bulk {
			// Much is coming: it is waited for without a buffer.
			if err = s.sock.wait(); large == nil {
				enlarge()
			}
		}
		if err != nil {
			return readEnd(err)
		}
	}
}

// take reads once, and goes on without waiting when there may be more. dry says that
// nothing is left that could be had without waiting.
func (s *Session) take(p []byte) (n int, dry bool, err error) {
	n, err = s.conn.Read(p)
	if s.sock == nil || err != nil || n < bulkRead && !s.sock.bulk {
		return n, false, err
	}
	s.sock.only = true
	for err == nil && n < len(p) {
		var m int
		m, err = s.conn.Read(p[n:])
		n += m
	}
	s.sock.only = false
	if err == errNothing {
		return n, true, nil
	}
	return n, false, err
}

// rest is what is still to come of a long DATA frame.
type rest struct {
	stream uint32
	left   int
	fin    bool
}

// part passes on what is there of a long DATA frame.
func (s *Session) part(b []byte) (used int, end *Error) {
	r := &s.rest
	used = min(len(b), r.left)
	r.left -= used
	return used, s.onData(r.stream, b[:used], r.fin && r.left == 0)
}

// dispatch handles the whole frames of b. It returns how many bytes it used and how
// long the next frame is, as far as known.
func (s *Session) dispatch(b []byte) (used, need int, end *Error) {
	s.mu.Lock()
	if s.end != nil {
		s.mu.Unlock()
		return 0, 0, s.end
	}
	s.dispatching = true
	s.mu.Unlock()
	for end == nil {
		need = 0
		if s.rest.left > 0 {
			if used == len(b) {
				break
			}
			n, e := s.part(b[used:])
			used, end = used+n, e
			continue
		}
		if len(b)-used < headerSize {
			need = headerSize
			break
		}
		h := parseHeader(b[used:])
		if end = checkHeader(h); end != nil {
			break
		}
		need = headerSize + h.length
		if h.length > maxWhole {
			s.rest = rest{h.stream, h.length, h.flags&flagFin != 0}
			used += headerSize
			continue
		}
		if len(b)-used < need {
			break
		}
		end = s.frame(h, b[used+headerSize:used+need])
		used += need
	}
	s.mu.Lock()
	s.dispatching = false
	var after []Flusher
	if len(s.after) > 0 {
		after, s.after = s.after, nil
	}
	s.kick()
	s.mu.Unlock()
	if after != nil {
		s.runAfter(after)
	}
	return used, need, end
}

// checkHeader refuses what no state makes valid, before the payload is waited for.
func checkHeader(h header) *Error {
	ok, flagged := false, byte(0)
	switch h.kind {
	case frameSettings:
		ok = h.length >= 2 && h.length <= 256 && h.stream == 0
	case frameOpen:
		ok, flagged = h.length >= 2 && h.length <= maxWhole && h.stream != 0, flagFin
	case frameData:
		ok, flagged = h.length <= maxPayload && h.stream != 0 && (h.length > 0 || h.flags == flagFin), flagFin
	case frameReset:
		ok = h.length == 2 && h.stream != 0
	case frameCredit:
		ok = h.length == 4 && h.stream != 0
	case frameShut:
		ok = h.length == 0 && h.stream != 0
	case framePing, framePong:
		ok = h.length == 8 && h.stream == 0
	case frameGoaway:
		ok, flagged = h.length >= 4 && h.length <= 4+maxGoodbye && h.stream == 0, flagFin
	default:
		return broken("frame-type")
	}
	if h.flags&^flagged != 0 {
		return broken("frame-flags")
	}
	if !ok {
		return broken("frame-form")
	}
	return nil
}

// frame handles one frame of the peer.
func (s *Session) frame(h header, p []byte) *Error {
	if h.kind == frameData {
		return s.onData(h.stream, p, h.flags&flagFin != 0)
	}
	if s.settled == (h.kind == frameSettings) {
		return broken("settings-first")
	}
	switch h.kind {
	case frameSettings:
		return s.onSettings(p)
	case frameOpen:
		return s.onOpen(h.stream, p, h.flags&flagFin != 0)
	case frameReset:
		return s.onReset(h.stream, Code(binary.BigEndian.Uint16(p)))
	case frameCredit:
		return s.onCredit(h.stream, int(binary.BigEndian.Uint32(p)))
	case frameShut:
		return s.onShut(h.stream)
	case framePing, framePong:
		return s.onPing(h.kind, binary.BigEndian.Uint64(p))
	default:
		return s.onGoaway(binary.BigEndian.Uint32(p), p[4:], h.flags&flagFin != 0)
	}
}

func (s *Session) onSettings(p []byte) *Error {
	set, end := parseSettings(p)
	if end != nil {
		return end
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.settled = true
	more := set.window - s.peer.window
	s.peer = set
	if more > 0 {
		s.streams.each(func(c *stream) {
			c.credit += more
			c.wakeWriter()
			if c.flags&flagShort != 0 {
				c.flags &^= flagShort
				s.tellWritable(c)
			}
		})
	}
	return nil
}

func (s *Session) onOpen(id uint32, p []byte, fin bool) *Error {
	n := int(binary.BigEndian.Uint16(p))
	if n > len(p)-2 {
		return broken("open-length")
	}
	if n > s.cfg.MaxOpen {
		return broken("open-too-long")
	}
	open, data := p[2:2+n], p[2+n:]
	s.mu.Lock()
	if id != s.nextPeer {
		s.mu.Unlock()
		return broken("open-order")
	}
	if s.heardBye {
		s.mu.Unlock()
		return broken("open-after-goaway")
	}
	if s.zombies > s.maxZombies() {
		s.mu.Unlock()
		return &Error{Reason: ReasonFlood, Detail: "zombies"}
	}
	s.nextPeer += 2
	full := s.theirs >= s.cfg.MaxStreams
	c := s.newStream(id)
	s.theirs++
	c.recv -= len(data)
	c.held += len(data)
	if fin {
		c.flags |= flagGotEnd
		c.pins++
	}
	if s.saidBye || full || s.accept == nil {
		code := Refused
		if full {
			code = Overloaded
		}
		end := s.refuse(c, code)
		if fin {
			s.unpin(c)
		}
		s.mu.Unlock()
		return end
	}
	c.live.Store(id)
	s.mu.Unlock()

	st := Stream{c, id}
	c.call.Lock()
	h, code := s.accept(st, open)
	if h == nil {
		c.call.Unlock()
		s.mu.Lock()
		defer s.mu.Unlock()
		var end *Error
		if c.flags&flagDead == 0 && s.end == nil {
			if code == 0 {
				code = Refused
			}
			end = s.refuse(c, code)
		}
		if fin {
			s.unpin(c)
		}
		return end
	}
	c.h = h
	if (len(data) > 0 || fin) && c.live.Load() == id {
		h.Received(st, data, fin)
	}
	c.call.Unlock()
	if fin {
		s.finish(c)
	}
	return nil
}

// refuse resets a stream that the peer opened; too many of them are a flood.
func (s *Session) refuse(c *stream, code Code) *Error {
	s.reset(c, code)
	return s.flood.reset(s)
}

// finish ends the reader's hold on a stream whose FIN was handled.
func (s *Session) finish(c *stream) {
	s.mu.Lock()
	s.settle(c)
	s.unpin(c)
	s.mu.Unlock()
}

func (s *Session) onData(id uint32, p []byte, fin bool) *Error {
	s.mu.Lock()
	c := s.streams.get(id)
	switch {
	case c == nil && !s.known(id):
		s.mu.Unlock()
		return broken("data-before-open")
	case c == nil || c.flags&flagGotEnd != 0:
		s.mu.Unlock()
		return broken("data-after-end")
	case len(p) > c.recv:
		s.mu.Unlock()
		return broken("credit-exceeded")
	}
	c.recv -= len(p)
	c.held += len(p)
	if c.flags&flagDead != 0 {
		if fin {
			c.flags |= flagGotEnd
			s.settle(c)
		}
		s.mu.Unlock()
		return nil
	}
	if fin {
		// Only now can another goroutine's FIN end the stream under us.
		c.flags |= flagGotEnd
		c.pins++
	}
	h := c.h
	s.mu.Unlock()

	c.call.Lock()
	if c.live.Load() == id {
		h.Received(Stream{c, id}, p, fin)
	}
	c.call.Unlock()
	if fin {
		s.finish(c)
	}
	return nil
}

// known reports whether a stream with this number was ever opened.
func (s *Session) known(id uint32) bool {
	if id%2 == s.next%2 {
		return id < s.next
	}
	return id < s.nextPeer
}

func (s *Session) onReset(id uint32, code Code) *Error {
	if code == 0 {
		return broken("reset-code")
	}
	s.mu.Lock()
	if !s.known(id) {
		s.mu.Unlock()
		return broken("reset-before-open")
	}
	end := s.flood.reset(s)
	c := s.streams.get(id)
	if c == nil || end != nil { // it crossed our end of the stream
		s.mu.Unlock()
		return end
	}
	if c.flags&flagDead != 0 {
		// The answer to our RESET, or one that crossed it.
		c.flags |= flagGotEnd
		s.settle(c)
		s.mu.Unlock()
		return nil
	}
	if c.flags&flagSentEnd == 0 {
		s.out = appendReset(s.out, id, code)
	}
	h := c.h
	c.live.Store(0)
	c.pins++
	c.flags |= flagDead | flagSentEnd | flagGotEnd
	c.wakeWriter()
	s.settle(c)
	s.mu.Unlock()

	c.call.Lock()
	h.Reset(Stream{c, id}, code)
	c.call.Unlock()

	s.mu.Lock()
	s.unpin(c)
	s.mu.Unlock()
	return nil
}

func (s *Session) onCredit(id uint32, n int) *Error {
	if n < minCredit {
		return broken("credit-small")
	}
	s.mu.Lock()
	c := s.streams.get(id)
	if c == nil {
		known := s.known(id)
		s.mu.Unlock()
		if !known {
			return broken("credit-before-open")
		}
		return s.floodStale()
	}
	if c.credit+n > maxWindow {
		s.mu.Unlock()
		return broken("credit-overflow")
	}
	c.credit += n
	c.wakeWriter()
	short := c.flags&flagShort != 0
	c.flags &^= flagShort
	h := c.h
	s.mu.Unlock()
	if short {
		c.call.Lock()
		if c.live.Load() == id {
			h.Writable(Stream{c, id})
		}
		c.call.Unlock()
	}
	return nil
}

func (s *Session) onShut(id uint32) *Error {
	s.mu.Lock()
	c := s.streams.get(id)
	switch {
	case c == nil && !s.known(id):
		s.mu.Unlock()
		return broken("shut-before-open")
	case c == nil || c.flags&flagDead != 0: // it crossed our end of the stream
		s.mu.Unlock()
		return s.floodStale()
	case c.flags&flagShut != 0:
		s.mu.Unlock()
		return broken("shut-twice")
	}
	c.flags |= flagShut
	c.pins++ // another goroutine's FIN can end the stream under us
	h, ok := c.h.(Shutter)
	s.mu.Unlock()

	c.call.Lock()
	if ok && c.live.Load() == id {
		h.Shut(Stream{c, id})
	}
	c.call.Unlock()
	s.mu.Lock()
	s.unpin(c)
	s.mu.Unlock()
	return nil
}

func (s *Session) floodStale() *Error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.flood.stale(s)
}

func (s *Session) onGoaway(last uint32, text []byte, final bool) *Error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if last >= s.next || last != 0 && last%2 != s.next%2 {
		return broken("goaway-last")
	}
	if final {
		s.lastWord, s.peerLast = true, last
		if s.saidBye && s.heardBye && s.streams.n == 0 {
			s.drained = true
		}
		return &Error{Reason: ReasonPeerClosed, Detail: printable(text)}
	}
	if s.heardBye {
		return broken("goaway-twice")
	}
	s.heardBye = true
	s.sayBye()
	s.maybeDrained()
	return nil
}

// printable makes the peer's words fit for a log.
func printable(b []byte) string {
	out := make([]byte, len(b))
	for i, c := range b {
		if c < ' ' || c > '~' {
			c = '?'
		}
		out[i] = c
	}
	return string(out)
}
