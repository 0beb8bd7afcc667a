package http2

import (
	"encoding/binary"
	"errors"
	"time"

	"assay.dev/proxy/guard"
	"golang.org/x/net/http2/hpack"
)

// The way in: the socket -> a buffer -> whole frames -> streams -> what they have for the
// mesh. Whatever one read brought is handled in one go: streams that began are dispatched
// at its end, and what they have for the mesh is written once for all of them.

// process handles the whole frames of the buffer. It reports whether the connection goes
// on.
func (c *conn) process() bool {
	c.mu.Lock()
	c.alive.read = now()
	c.batching = true
	for c.end == nil {
		n := c.step(c.item.mem[c.r:c.w])
		if n == 0 {
			break
		}
		c.r += n
	}
	c.endBatch()
	c.batching = false
	c.relieve(nil)
	c.mu.Unlock()
	c.batch.Flush()
	c.mu.Lock()
	if c.end == nil && len(c.out) > headQueued+slack {
		c.out = c.out[:0]
		c.fail(ErrUnread)
	}
	if len(c.out) > 0 {
		c.flush()
	}
	on := c.end == nil
	c.mu.Unlock()
	c.makeRoom()
	return on
}

// makeRoom prepares the buffer for the next read.
func (c *conn) makeRoom() {
	if c.item == nil {
		return
	}
	size := len(c.item.mem)
	need := frameHeader
	if b := c.item.mem[c.r:c.w]; c.prefaced && len(b) >= frameHeader {
		need += parseHeader(b).length
	}
	switch {
	case c.r == c.w:
		c.big = c.w == size || c.big && c.w > size/16
		c.item.release()
		c.item, c.r, c.w = nil, 0, 0
	case need > size:
		item := take(classes[3])
		c.w = copy(item.mem, c.item.mem[c.r:c.w])
		c.r = 0
		c.item.release()
		c.item, c.big = item, true
	case c.r > 0:
		c.w = copy(c.item.mem, c.item.mem[c.r:c.w])
		c.r = 0
	}
}

// step handles the first frame of b and returns its length, 0 when b has no whole one.
func (c *conn) step(b []byte) int {
	if !c.prefaced {
		n := min(len(b), len(preface))
		if string(b[:n]) != preface[:n] {
			c.fail(ErrPreface)
			return 0
		}
		if n < len(preface) {
			return 0
		}
		c.prefaced = true
		return n
	}
	if len(b) < frameHeader {
		return 0
	}
	h := parseHeader(b)
	switch {
	case !c.settled && (h.kind != frameSettings || h.flags&flagAck != 0):
		c.fail(ErrPreface)
		return 0
	case h.length > maxFrame:
		c.fail(ErrFrameSize)
		return 0
	case c.block.active && (h.kind != frameContinuation || h.stream != c.block.stream):
		c.fail(ErrContinuation)
		return 0
	}
	size := frameHeader + h.length
	if len(b) < size {
		return 0
	}
	if why := c.frame(h, b[:size]); why != nil {
		c.fail(why)
	}
	return size
}

// frame handles a frame; b is all of it.
func (c *conn) frame(h header, b []byte) *Refusal {
	p := b[frameHeader:]
	switch h.kind {
	case frameData:
		return c.onData(h, b)
	case frameHeaders:
		return c.onHeaders(h, p)
	case framePriority:
		return c.onPriority(h, p)
	case frameReset:
		return c.onReset(h, p)
	case frameSettings:
		return c.onSettings(h, p)
	case framePush:
		return ErrPush
	case framePing:
		return c.onPing(h, p)
	case frameGoaway:
		return c.onGoaway(h, p)
	case frameWindow:
		return c.onWindow(h, p)
	case frameContinuation:
		if !c.block.active {
			return ErrContinuation
		}
		return c.fragment(p, h.flags&flagEndHeaders != 0)
	}
	return c.flood.count(floodUnknown)
}

// lookup finds the stream of a frame. It is nil when the frame is to be ignored.
func (c *conn) lookup(id uint32) (*stream, *Refusal) {
	if id == 0 {
		return nil, ErrStreamID
	}
	if x := c.streams.get(id); x != nil {
		return x, nil
	}
	if id%2 == 0 || id > c.lastID {
		return nil, ErrIdle
	}
	if c.resets.has(id) || c.bye.said && id > c.bye.last {
		return nil, nil
	}
	return nil, ErrClosed
}

func (c *conn) onData(h header, b []byte) *Refusal {
	if h.stream == 0 {
		return ErrStreamID
	}
	p, ok := unpad(h, b[frameHeader:])
	if !ok {
		return ErrPadding
	}
	if c.recvWin -= h.length; c.recvWin < 0 {
		return ErrFlow
	}
	if c.recvOwed += h.length; c.recvOwed >= connWindow/4 {
		c.out = appendWindow(c.out, 0, c.recvOwed)
		c.recvWin += c.recvOwed
		c.recvOwed = 0
	}
	x, why := c.lookup(h.stream)
	if x == nil {
		return why
	}
	end := h.flags&flagEndStream != 0
	if len(p) == 0 && !end {
		if why := c.flood.count(floodEmpty); why != nil {
			return why
		}
	} else {
		c.flood.carried++
	}
	if x.gotEnd {
		return x.refuse(ErrHalfClosed)
	}
	if x.recvWin -= h.length; x.recvWin < 0 && h.length > 0 {
		return x.refuse(ErrStreamData)
	}
	x.giveBack(h.length - len(p))
	if why := x.app.data(p); why != nil {
		return x.refuse(why)
	}
	if end {
		x.gotEnd = true
		if why := x.app.end(); why != nil {
			return x.refuse(why)
		}
	}
	// What precedes the payload was read: a block's header fits there.
	x.upData(b[:len(b)-(h.length-len(p))+c.padBefore(h)], len(p), end)
	x.closed()
	return nil
}

// padBefore is how much of a frame's padding lies before its payload.
func (c *conn) padBefore(h header) int {
	if h.flags&flagPadded != 0 {
		return 1
	}
	return 0
}

func (c *conn) onHeaders(h header, p []byte) *Refusal {
	if h.stream == 0 || h.stream%2 == 0 {
		return ErrStreamID
	}
	p, ok := unpad(h, p)
	if !ok {
		return ErrPadding
	}
	self := false
	if h.flags&flagPriority != 0 {
		if len(p) < 5 {
			return ErrFrameSize
		}
		self = binary.BigEndian.Uint32(p)&^(1<<31) == h.stream
		p = p[5:]
	}
	c.block = block{active: true, stream: h.stream, end: h.flags&flagEndStream != 0, self: self, start: len(c.fields)}
	c.head = 0
	return c.fragment(p, h.flags&flagEndHeaders != 0)
}

// fragment decompresses a piece of a header block.
func (c *conn) fragment(p []byte, last bool) *Refusal {
	k := &c.block
	k.bytes += len(p)
	k.frames++
	if k.bytes > 2*c.cfg.Limits.Head || k.frames > 16+k.bytes/1024 {
		return ErrContFlood
	}
	if _, err := c.dec.Write(p); err != nil {
		if errors.Is(err, hpack.ErrStringLength) {
			return ErrContFlood
		}
		return ErrCompression
	}
	if c.head > 16*c.cfg.Limits.Head {
		return ErrBomb
	}
	if !last {
		return nil
	}
	k.active = false
	if err := c.dec.Close(); err != nil {
		return ErrCompression
	}
	return c.message(k)
}

// emit takes one field from the decoder.
func (c *conn) emit(f hpack.HeaderField) {
	k := &c.block
	c.head += len(f.Name) + len(f.Value)
	switch {
	case len(c.fields)-k.start >= c.cfg.Limits.Fields:
		k.bad = ErrFieldCount
		c.head += 32
	case c.head > c.cfg.Limits.Head:
		k.bad = ErrHeadLong
	default:
		c.fields = append(c.fields, f)
	}
}

// message handles a complete header block.
func (c *conn) message(k *block) *Refusal {
	x := c.streams.get(k.stream)
	if x != nil {
		fields := c.fields[k.start:]
		switch {
		case x.gotEnd:
			return x.refuse(ErrHalfClosed)
		case k.self:
			return x.refuse(ErrDependency)
		case k.bad != nil:
			return x.refuse(k.bad)
		case c.server || x.app.begun:
			return x.upTrailers(fields, k.end)
		}
		return x.upResponse(fields, k.end)
	}
	if !c.server || k.stream <= c.lastID {
		_, why := c.lookup(k.stream)
		return why
	}
	return c.begin(k)
}

// begin opens a stream of the application.
func (c *conn) begin(k *block) *Refusal {
	c.lastID = k.stream
	if c.bye.said {
		return nil // it was told that we will not look at it
	}
	if c.streams.n == 0 {
		c.alive.start(c)
	}
	x := c.newStream()
	x.id = k.stream
	x.gotEnd = k.end
	c.streams.put(x)
	x.Start = now()
	fields := c.fields[k.start:]
	why := k.bad
	if why == nil && c.streams.n > c.cfg.MaxStreams {
		why = ErrBusy
	}
	if why == nil && k.self {
		why = ErrDependency
	}
	if why == nil && c.greedy() {
		why = ErrScarce
	}
	var f facts
	if why == nil {
		f, why = check(request, fields, &x.head, nil)
	}
	x.app.begin(&f, false)
	x.isHead, x.idempotent, x.GRPC = f.isHead, f.idem, f.grpc
	x.connect, x.Code = f.connect, -1
	x.wire, _ = guard.ParseGRPCTimeout(x.head.Timeout)
	x.mesh.grpc = f.grpc
	if why == nil && k.end {
		why = x.app.end()
	}
	x.Request = &x.head
	c.d.Begin(&x.Exchange)
	x.Request, x.head.Fields = nil, nil
	if why != nil {
		return x.refuse(why)
	}
	x.RequestBytes = sizeOf(fields)
	x.keep = true
	x.from, x.to = k.start, len(c.fields)
	x.up.appendFields(blockHead, fields)
	x.upFin = k.end
	x.fresh = true
	c.fresh = append(c.fresh, x)
	return nil
}

func sizeOf(fields []Field) (n int64) {
	for i := range fields {
		n += int64(len(fields[i].Name) + len(fields[i].Value))
	}
	return n
}

func (c *conn) onReset(h header, p []byte) *Refusal {
	if len(p) != 4 {
		return ErrFrameSize
	}
	x, why := c.lookup(h.stream)
	if x == nil {
		if why == ErrClosed {
			return nil // it crossed our end of the stream
		}
		return why
	}
	if why := c.flood.count(floodReset); why != nil && c.server {
		return why
	}
	x.resetByApp(ErrCode(binary.BigEndian.Uint32(p)))
	return nil
}

func (c *conn) onPriority(h header, p []byte) *Refusal {
	if h.stream == 0 {
		return ErrStreamID
	}
	x := c.streams.get(h.stream)
	switch {
	case len(p) != 5:
		if x != nil {
			return x.refuse(ErrPriorityForm)
		}
		return ErrFrameSize
	case binary.BigEndian.Uint32(p)&^(1<<31) == h.stream:
		if x != nil {
			return x.refuse(ErrDependency)
		}
		c.out = appendReset(c.out, h.stream, ProtocolError)
		c.resets.add(h.stream)
	}
	return c.flood.count(floodPriority)
}

func (c *conn) onPing(h header, p []byte) *Refusal {
	switch {
	case h.stream != 0:
		return ErrStreamID
	case len(p) != 8:
		return ErrFrameSize
	case h.flags&flagAck != 0:
		c.alive.answered(c, p)
		return nil
	}
	if why := c.flood.count(floodPing); why != nil {
		return why
	}
	c.out = appendPing(c.out, flagAck, p)
	return nil
}

func (c *conn) onGoaway(h header, p []byte) *Refusal {
	switch {
	case h.stream != 0:
		return ErrStreamID
	case len(p) < 8:
		return ErrFrameSize
	}
	last := binary.BigEndian.Uint32(p) &^ (1 << 31)
	if last > c.bye.peer {
		return ErrGoawayLast
	}
	c.bye.heard, c.bye.peer = true, last
	c.shy.Store(true)
	if c.server {
		return nil
	}
	// Streams over the last one were not read.
	c.streams.each(func(x *stream) {
		if x.id > last {
			c.remove(x)
			x.unread()
		}
	})
	for x := c.pending.pop(); x != nil; x = c.pending.pop() {
		x.unread()
	}
	c.maybeIdle()
	return nil
}

func (c *conn) onWindow(h header, p []byte) *Refusal {
	if len(p) != 4 {
		return ErrFrameSize
	}
	n := int(binary.BigEndian.Uint32(p) &^ (1 << 31))
	if why := c.flood.count(floodWindow); why != nil {
		return why
	}
	if h.stream == 0 {
		switch {
		case n == 0:
			return ErrWindowZero
		case c.sendWin+n > maxWindow:
			return ErrWindow
		}
		c.sendWin += n
		c.unstarve()
		return nil
	}
	x, why := c.lookup(h.stream)
	if x == nil {
		if why == ErrClosed {
			return nil // it crossed the end of the stream
		}
		return why
	}
	switch {
	case n == 0:
		return x.refuse(ErrStreamZero)
	case x.sendWin+n > maxWindow:
		return x.refuse(ErrStreamWindow)
	}
	x.sendWin += n
	x.unblock()
	return nil
}

// endBatch gives the mesh what this batch brought; mu is held.
func (c *conn) endBatch() {
	for i, x := range c.fresh {
		c.fresh[i] = nil
		x.fresh = false
		if !x.rst && c.end == nil {
			x.dispatch(c.fields[x.from:x.to])
		}
		x.settle()
	}
	c.fresh = c.fresh[:0]
	for i, x := range c.dirty {
		c.dirty[i] = nil
		x.dirty = false
		x.push()
		x.settle()
	}
	c.dirty = c.dirty[:0]
	if !c.block.active {
		clear(c.fields)
		c.fields = c.fields[:0]
		return
	}
	n := copy(c.fields, c.fields[c.block.start:])
	clear(c.fields[n:])
	c.fields, c.block.start = c.fields[:n], 0
	if c.deadline.IsZero() {
		c.setDeadline(time.Now().Add(c.cfg.HeadTimeout))
	}
}
