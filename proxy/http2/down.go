package http2

import (
	"slices"
	"strings"

	"assay.dev/proxy/guard"
	"assay.dev/proxy/mux"
)

// From the mesh to the application: Received -> feed -> conn.out. What the application's
// windows, or the connection's queue, do not take waits in down, and the mesh gets credit
// for it only when it left from there.

// Received implements mux.Handler.
func (x *stream) Received(st mux.Stream, p []byte, fin bool) {
	c := x.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if !x.current(st) {
		return
	}
	x.finGot = x.finGot || fin
	switch {
	case x.waiting:
		x.down.append(p) // Dispatch will return in a moment
		return
	case x.rst || x.sentEnd:
		st.Consumed(len(p)) // nobody wants it
		if len(p) > 0 && x.sentEnd && !x.rst {
			x.badMesh()
		}
	case len(x.down.b) > 0:
		x.down.append(p)
		if !x.listed && !x.blocked {
			x.feedDown()
		}
	default:
		n := x.feed(p)
		st.Consumed(n)
		if n < len(p) {
			x.down.append(p[n:])
		}
	}
	x.downEnd()
	x.settle()
	c.relieve(x)
	c.later(st)
}

// current reports whether a call about st is about the attempt that runs: one of an
// attempt before may still have waited for the lock.
func (x *stream) current(st mux.Stream) bool {
	if x.waiting {
		return !slices.Contains(x.past, st)
	}
	return !x.over && x.st == st
}

// arrived takes what came before Dispatch had returned.
func (x *stream) arrived() {
	if len(x.down.b) > 0 {
		x.feedDown()
	}
	if !x.waiting {
		x.downEnd()
	}
}

// feedDown feeds what waits.
func (x *stream) feedDown() {
	n := x.feed(x.down.b[x.off:])
	if x.rst || x.waiting { // it is over, or another attempt began
		return
	}
	x.st.Consumed(n)
	x.off += n
	if x.off == len(x.down.b) || x.off > 64<<10 {
		x.down.drop(x.off)
		x.off = 0
	}
}

// resume goes on with a stream that waited; mu is held.
func (x *stream) resume() {
	if x.rst || x.over {
		return
	}
	if len(x.down.b) > 0 {
		x.feedDown()
	}
	x.downEnd()
	x.settle()
}

// unblock goes on with a stream whose window was opened; mu is held.
func (x *stream) unblock() {
	if x.blocked && x.sendWin > 0 {
		x.blocked = false
		if x.c.room(maxFrame) {
			x.resume()
		} else {
			x.c.ready.push(x)
		}
	}
}

// feed gives the application what can be given now of p, and returns how much that was.
// Unless the stream ends, p is everything that has come and was not given yet.
func (x *stream) feed(p []byte) (used int) {
	for used < len(p) {
		q := p[used:]
		if x.left > 0 {
			k := min(x.left, len(q))
			n, ok := x.downData(q[:k], x.finGot && k == len(q) && k == x.left)
			if !ok {
				return len(p)
			}
			used += n
			if x.left -= n; n < k {
				return used
			}
			continue
		}
		if len(q) < blockHeader {
			return used
		}
		kind, n := parseBlock(q)
		if kind == blockData {
			x.left = n
			used += blockHeader
			continue
		}
		if n > x.c.cfg.Limits.Head+6*x.c.cfg.Limits.Fields {
			x.badMesh()
			return len(p)
		}
		if len(q) < blockHeader+n {
			return used
		}
		if !x.c.room(n) {
			x.c.ready.push(x)
			return used
		}
		switch x.downFields(kind, q[blockHeader:blockHeader+n], x.finGot && len(q) == blockHeader+n) {
		case laterOn:
			return used
		case ended:
			return len(p)
		}
		used += blockHeader + n
	}
	return used
}

// downData sends data as the windows and the queue allow.
func (x *stream) downData(p []byte, end bool) (n int, ok bool) {
	c := x.c
	for n < len(p) {
		k := min(len(p)-n, maxFrame, x.sendWin, c.sendWin)
		switch {
		case x.sendWin <= 0:
			x.blocked = true
			x.stalled()
			return n, true
		case k <= 0:
			c.starved.push(x)
			x.stalled()
			return n, true
		case !c.room(k):
			c.ready.push(x)
			return n, true
		}
		why := x.mesh.data(p[n : n+k])
		last := end && n+k == len(p)
		if why == nil && last {
			why = x.mesh.end()
		}
		if why != nil {
			x.badMesh()
			return n, false
		}
		flags := byte(0)
		if last {
			flags = flagEndStream
		}
		c.out = appendHeader(c.out, k, frameData, flags, x.id)
		c.out = append(c.out, p[n:n+k]...)
		x.sendWin -= k
		c.sendWin -= k
		x.since = 0
		n += k
		c.flood.carried++
		x.countDown(int64(k))
		if last {
			x.ended()
		}
	}
	return n, true
}

// stalled notes since when the application takes nothing of the stream.
func (x *stream) stalled() {
	if x.since == 0 {
		x.since = now()
	}
}

// countDown adds bytes that the mesh sent.
func (x *stream) countDown(n int64) {
	if x.c.server {
		x.ResponseBytes += n
	} else {
		x.RequestBytes += n
	}
}

type outcome int

const (
	passed outcome = iota
	laterOn
	ended // the stream has: whatever follows is forgotten
)

// downFields sends a head or trailers.
func (x *stream) downFields(kind byte, list []byte, last bool) outcome {
	c := x.c
	fields, ok := c.decode(list)
	if !ok {
		x.badMesh()
		return ended
	}
	var f facts
	var why *Refusal
	switch {
	case kind == blockTrailers:
		f, why = check(trailers, fields, nil, c.trusted)
		if why == nil {
			why = x.mesh.end()
		}
		if !last {
			why = ErrTrailerEnd
		}
		if c.server && f.code >= 0 {
			x.Code = f.code
		}
		if x.edit != nil && slices.ContainsFunc(fields, func(f Field) bool { return x.edit.Drops([]byte(f.Name)) }) {
			why = ErrTrailerField
		}
	case kind == blockHead && !c.server:
		return x.downRequest(fields, last)
	case (kind == blockHead || kind == blockInterim) && c.server && !x.mesh.begun:
		f, why = check(response, fields, nil, c.trusted)
		if why == nil && (f.status < 200) != (kind == blockInterim) {
			why = ErrStatus
		}
		if why != nil || kind == blockInterim {
			break
		}
		if x.Policy.HasCode(f.status) && x.tryAgain(guard.Answered, f.status) {
			x.again(0)
			return ended
		}
		x.Status, x.passed, x.First = f.status, true, now()-x.Start
		x.unkeep()
		f.connect = x.connect && f.status < 300
		x.Tunnel = f.connect
		x.mesh.begin(&f, x.isHead || f.status == 204 || f.status == 304)
		if f.code >= 0 {
			x.Code = f.code
		}
		if last {
			why = x.mesh.end()
		}
	default:
		why = ErrNoHead
	}
	if why != nil {
		c.distrust()
		x.badMesh()
		return ended
	}
	if kind == blockInterim {
		x.unkeep()
		last = false
	}
	x.countDown(sizeOf(fields))
	known := c.known
	if x.Plan != nil && kind == blockHead {
		for _, e := range x.Plan.Response {
			if e != nil {
				fields, known = Edit(fields, e), nil
			}
		}
	}
	c.appendFields(x.id, fields, known, last)
	if last {
		x.ended()
	}
	return passed
}

// downRequest opens a stream of the application with a request's head.
func (x *stream) downRequest(fields []Field, last bool) outcome {
	c := x.c
	if x.id != 0 {
		x.badMesh()
		return ended
	}
	switch {
	case c.end != nil && c.raw == nil:
		x.broken(c.end)
		return ended
	case c.end != nil || c.bye.heard || c.lastID > maxWindow-2:
		c.shy.Store(true)
		x.unread()
		return ended
	}
	if c.streams.n >= c.peerMax {
		c.pending.push(x)
		return laterOn
	}
	f, why := check(request, fields, &x.head, c.trusted)
	if why == nil && f.extended && !c.peerConnect {
		if !c.settled {
			c.pending.push(x)
			return laterOn
		}
		why = ErrConnect
	}
	x.Start, x.Code = now(), -1
	x.isHead, x.idempotent, x.connect, x.GRPC = f.isHead, f.idem, f.connect, f.grpc
	x.RequestBytes = sizeOf(fields)
	x.mesh.begin(&f, false)
	if why == nil && last {
		why = x.mesh.end()
	}
	if why == nil && x.edit != nil && f.connect && !strings.EqualFold(x.head.Protocol, "websocket") {
		why = ErrTunnel
	}
	x.head.Fields = fields
	if x.observer != nil {
		x.Request = &x.head
		x.observer.Begin(&x.Exchange)
		x.Request = nil
	}
	x.head = Head{}
	if why == nil && x.guard != nil {
		if code := x.guard.Admit(x.Start); code != 0 {
			x.failure(failureOf(code).Reason)
			x.rst = true
			x.resetMesh(code)
			return ended
		}
		x.admitted = true
	}
	if why == ErrConnect || why == ErrTunnel {
		x.sayNo(why)
		return ended
	}
	if why != nil {
		c.distrust()
		x.failure(why.Reason)
		x.Refused = true
		x.resetMesh(mux.BadRequest)
		x.rst = true
		return ended
	}
	if c.streams.n == 0 {
		c.alive.start(c)
	}
	if c.lastID == 0 {
		c.lastID = 1
	} else {
		c.lastID += 2
	}
	x.id = c.lastID
	x.sendWin, x.recvWin = c.peerWindow, c.window // which may have changed while it waited
	c.streams.put(x)
	if x.edit != nil {
		fields = c.edit(fields, x.edit)
	}
	c.appendFields(x.id, fields, c.known, last)
	if last {
		x.ended()
	}
	return passed
}

// sayNo answers a request in the application's place.
func (x *stream) sayNo(why *Refusal) {
	x.failure(why.Reason)
	x.Refused, x.Status = true, why.Status
	x.rst, x.upFin = true, true
	x.down.release()
	x.off = 0
	x.up.appendFields(blockHead, []Field{{Name: ":status", Value: status(why.Status)}, {Name: "assay-error", Value: why.Reason}})
	x.rest, x.hasRest = NoError, true
	x.push()
}

// ended notes that the application was sent the end.
func (x *stream) ended() {
	x.sentEnd = true
	if x.hasPending {
		x.resetApp(x.pending)
	}
	x.closed()
}

// downEnd passes the end of the mesh's direction on when nothing is before it.
func (x *stream) downEnd() {
	if !x.finGot || x.sentEnd || x.rst || x.over {
		return
	}
	if len(x.down.b) > 0 {
		// It waits for a window or room; if not, a block was cut.
		if !x.blocked && !x.listed {
			x.badMesh()
		}
		return
	}
	switch {
	case x.left > 0:
		x.badMesh()
	case !x.mesh.begun && x.c.server:
		x.fail(&Failure{Status: 502, Code: 14, Reason: failNoResponse, Text: "the upstream ended the stream without a response"})
	case !x.mesh.begun:
		x.badMesh()
	default:
		if x.mesh.end() != nil {
			x.badMesh()
			return
		}
		x.c.out = appendHeader(x.c.out, 0, frameData, flagEndStream, x.id)
		x.ended()
	}
}

// badMesh ends a stream whose far side does not say what it should.
func (x *stream) badMesh() {
	x.resetMesh(mux.BadRequest)
	if x.c.server && !x.passed && !x.sentEnd {
		x.fail(failBadRequest)
		return
	}
	x.failure(failBadRequest.Reason)
	x.resetApp(InternalError)
}

// decode reads a list of fields. Strings that were seen before are used again.
func (c *conn) decode(list []byte) ([]Field, bool) {
	c.scratch, c.known = c.scratch[:0], c.known[:0]
	size := 0
	for len(list) > 0 {
		name, value, sensitive, rest, ok := cutField(list)
		size += len(name) + len(value)
		if !ok || len(c.scratch) >= c.cfg.Limits.Fields || size > c.cfg.Limits.Head {
			return nil, false
		}
		list = rest
		n, seen := c.names.get(name)
		v, also := c.values.get(value)
		c.scratch = append(c.scratch, Field{Name: n, Value: v, Sensitive: sensitive})
		c.known = append(c.known, seen && also)
	}
	return c.scratch, true
}

// trusted reports whether the bytes of a field were checked when they were first seen.
func (c *conn) trusted(i int) bool { return c.known[i] }

// distrust forgets what was seen: something in it was refused.
func (c *conn) distrust() { c.names, c.values = interner{}, interner{} }
