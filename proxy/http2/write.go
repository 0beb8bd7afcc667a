package http2

import (
	"assay.dev/proxy/mux"
	"assay.dev/proxy/nowait"
)

// The way out: everybody appends frames to conn.out (mu), and whoever finds the writer
// idle writes all of it. mux's reader does so once for everything that it received for
// the connection (Flush). What the kernel does not take waits in left for the flusher,
// a goroutine that exists only meanwhile.

const (
	// bulkQueued is how many queued bytes stop data from being queued, and headQueued
	// what stops small data and heads.
	bulkQueued = 64 << 10
	headQueued = 256 << 10
	smallData  = 2 << 10
	// slack is how far answers to the peer's own frames may exceed that.
	slack = 1 << 20
	// keepBuffer is the largest buffer that is used again; keepIdle that of a
	// connection without streams.
	keepBuffer = 128 << 10
	keepIdle   = 1 << 10
)

// outWriter is where hpack writes.
type outWriter conn

func (w *outWriter) Write(p []byte) (int, error) {
	w.out = append(w.out, p...)
	return len(p), nil
}

// room reports whether n bytes of data, or of a head, may be queued; mu is held.
func (c *conn) room(n int) bool {
	if n <= smallData {
		return len(c.out) < headQueued
	}
	return len(c.out) < bulkQueued
}

// later sees to it that what is queued is written: by mux's reader when it is done, if it
// is the caller; mu is held.
func (c *conn) later(st mux.Stream) {
	if c.queued || len(c.out) == 0 {
		return
	}
	if st.Later(c) {
		c.queued = true
		return
	}
	c.flush()
}

// Flush implements mux.Flusher.
func (c *conn) Flush() {
	c.mu.Lock()
	c.queued = false
	c.flush()
	c.mu.Unlock()
}

// flush writes what is queued, without waiting. mu is held, and released meanwhile.
func (c *conn) flush() {
	if c.writing || c.closed || c.raw == nil || len(c.out) == 0 {
		return
	}
	c.writing = true
	defer c.weigh()
	for turn := 0; len(c.out) > 0; turn++ {
		if turn == 2 { // what others queue without end is not the caller's to write
			c.startFlusher()
			return
		}
		if !c.writeOut() {
			return
		}
	}
	c.writing = false
}

// writeOut swaps the two buffers and writes the full one. It reports whether the caller
// still has the writer.
func (c *conn) writeOut() bool {
	buf := c.out
	c.out, c.spare = c.spare[:0], nil
	c.pump()
	c.mu.Unlock()
	c.p, c.n, c.tryErr = buf, 0, nil
	err := c.raw.Write(c.tryFn)
	c.mu.Lock()
	n := c.n
	c.p = nil
	if err == nil {
		err = c.tryErr
	}
	if err != nil {
		c.writeFailed(err)
		c.recycle(buf)
		return true
	}
	if n < len(buf) {
		c.left = buf[n:]
		c.startFlusher()
		return false
	}
	c.recycle(buf)
	return true
}

func (c *conn) recycle(buf []byte) {
	if cap(buf) <= keepBuffer && (c.streams.n > 0 || cap(buf) <= keepIdle) {
		c.spare = buf[:0]
	}
}

// slim gives up buffers that nothing is in; mu is held.
func (c *conn) slim() {
	if c.writing || len(c.out) > 0 {
		return
	}
	if cap(c.out) > keepIdle {
		c.out = nil
	}
	if cap(c.spare) > keepIdle {
		c.spare = nil
	}
	c.weigh()
}

// writeFailed forgets what is queued: the reader will say how the connection ended.
func (c *conn) writeFailed(err error) {
	c.out = c.out[:0]
	c.fail(err)
}

func (c *conn) tryFD(fd uintptr) bool {
	c.n, c.tryErr = nowait.Write(fd, c.p)
	return true
}

func (c *conn) startFlusher() { c.start(c.flushFn) }

// flusher owns the writer until everything is written.
func (c *conn) flusher() {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.done()
	for {
		if len(c.left) > 0 {
			c.p, c.tryErr = c.left, nil
			c.mu.Unlock()
			err := c.raw.Write(c.dripFn)
			c.mu.Lock()
			c.p, c.left = nil, nil
			if err == nil {
				err = c.tryErr
			}
			if err != nil {
				c.writeFailed(err)
			}
		}
		c.pump()
		c.weigh()
		if len(c.out) == 0 {
			c.writing = false
			return
		}
		c.left, c.out = c.out, nil
	}
}

// dripFD writes what is left and asks to be called again until nothing is.
func (c *conn) dripFD(fd uintptr) bool {
	n, err := nowait.Write(fd, c.p)
	c.p = c.p[n:]
	c.tryErr = err
	return err != nil || len(c.p) == 0
}

// pump lets streams queue that waited for room, first come first served; mu is held.
func (c *conn) pump() {
	if c.end != nil {
		return
	}
	for c.ready.head != nil && len(c.out) < bulkQueued {
		c.ready.pop().resume()
	}
}

// unstarve lets streams go on that waited for the connection's window; mu is held.
func (c *conn) unstarve() {
	for c.sendWin > 0 && c.starved.head != nil {
		c.ready.push(c.starved.pop())
	}
	c.pump()
}

// appendFields queues a head or trailers for a stream; mu is held. known tells which
// values were seen before on this connection: only those are worth a place in the
// compression's table, which a value that never comes again would cost another.
func (c *conn) appendFields(id uint32, fields []Field, known []bool, end bool) {
	at := len(c.out)
	c.out = append(c.out, 0, 0, 0, 0, 0, 0, 0, 0, 0)
	for i := range fields {
		f := &fields[i]
		if i > 0 && known != nil && !known[i] && !f.Sensitive {
			if index := nameIndex(f.Name); index > 0 {
				c.out = appendLiteral(c.out, index, f.Value)
				continue
			}
		}
		c.enc.WriteField(*f)
	}
	flags := byte(flagEndHeaders)
	if end {
		flags |= flagEndStream
	}
	size := len(c.out) - at - frameHeader
	if size <= maxFrame {
		appendHeader(c.out[:at], size, frameHeaders, flags, id)
		return
	}
	rest := append([]byte(nil), c.out[at+frameHeader+maxFrame:]...)
	appendHeader(c.out[:at], maxFrame, frameHeaders, flags&^flagEndHeaders, id)
	c.out = c.out[:at+frameHeader+maxFrame]
	for len(rest) > 0 {
		n := min(len(rest), maxFrame)
		flags = 0
		if n == len(rest) {
			flags = flagEndHeaders
		}
		c.out = appendHeader(c.out, n, frameContinuation, flags, id)
		c.out = append(c.out, rest[:n]...)
		rest = rest[n:]
	}
}

// nameIndex is the place in HPACK's static table of a name whose values often differ.
func nameIndex(name string) byte {
	switch name {
	case ":path":
		return 4
	case "content-length":
		return 28
	case "date":
		return 33
	case "etag":
		return 34
	case "if-modified-since":
		return 40
	case "if-none-match":
		return 41
	case "last-modified":
		return 44
	case "location":
		return 46
	case "set-cookie":
		return 55
	case "cookie":
		return 32
	case "authorization":
		return 23
	}
	return 0
}

// appendLiteral writes a field with an indexed name that is not to be indexed (RFC 7541
// section 6.2.2).
func appendLiteral(b []byte, index byte, value string) []byte {
	if index < 15 {
		b = append(b, index)
	} else {
		b = append(b, 15, index-15)
	}
	n := uint(len(value))
	if n < 127 {
		return append(append(b, byte(n)), value...)
	}
	b = appendLength(append(b, 127), n-127)
	return append(b, value...)
}
