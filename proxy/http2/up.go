package http2

// From the application to the mesh: conn.read -> onData, upResponse, upTrailers -> up ->
// push, at the end of the batch, so that head, body and trailers that came together
// travel together. Large data goes straight from the read buffer.

const (
	// directData is how much data is worth a write of its own.
	directData = 4 << 10
	// maxReplay is how much of a request is kept to be sent to another upstream.
	maxReplay = 16 << 10
)

// touch has the stream's bytes pushed at the end of the batch.
func (x *stream) touch() {
	if !x.dirty && !x.fresh {
		x.dirty = true
		x.c.dirty = append(x.c.dirty, x)
	}
}

// count adds bytes that the application sent.
func (x *stream) count(n int64) {
	if x.c.server {
		x.RequestBytes += n
	} else {
		x.ResponseBytes += n
	}
}

// upData takes the data of a frame, the last n bytes of b, before which there is room for
// a block's header.
func (x *stream) upData(b []byte, n int, end bool) {
	x.upFin = x.upFin || end
	if n == 0 {
		if end {
			x.copyOut(nil, true)
			x.touch()
		}
		return
	}
	x.count(int64(n))
	if x.dead || x.rst {
		x.giveBack(n) // nobody wants it
		return
	}
	if x.Plan != nil && x.Plan.Copy != nil {
		q := b[len(b)-n-blockHeader:]
		putBlock(q, blockData, n)
		x.copyOut(q, end)
	}
	x.debt += n
	if n < directData || !x.opened || x.keep || x.stuck || len(x.up.b) > 0 {
		x.up.appendData(b[len(b)-n:])
		if x.keep && len(x.up.b) > maxReplay {
			x.unkeep()
		}
		x.touch()
		return
	}
	q := b[len(b)-n-blockHeader:]
	putBlock(q, blockData, n)
	x.c.batch.Hold(x.st.Session())
	took, err := x.st.TryWrite(q, end)
	if err != nil {
		return // its Reset tells why
	}
	if took < len(q) {
		x.up.append(q[took:])
		x.stuck = true
	} else {
		x.finSent = end
	}
	x.paid(took)
	x.touch()
}

// unkeep gives up the chance to send everything again.
func (x *stream) unkeep() {
	x.keep = false
	if x.sent > 0 {
		x.up.drop(x.sent)
		x.sent = 0
	}
}

// push gives the mesh what it takes of up.
func (x *stream) push() {
	if !x.opened || x.dead || x.stuck {
		return
	}
	p := x.up.b[x.sent:]
	if !x.finSent && (len(p) > 0 || x.upFin) {
		x.c.hold(x)
		n, err := x.st.TryWrite(p, x.upFin)
		if err != nil {
			return // its Reset tells why
		}
		x.took(n, len(p))
	}
	if x.finSent && x.hasRest {
		x.resetMesh(toMux(x.rest))
	}
}

// took notes that the mesh took n of p bytes of up.
func (x *stream) took(n, p int) {
	x.sent += n
	x.paid(n)
	if n < p {
		x.stuck = true
	} else {
		x.finSent = x.upFin
	}
	if !x.keep && x.sent > 0 {
		x.up.drop(x.sent)
		x.sent = 0
	}
}

// paid opens the application's window for what the mesh took.
func (x *stream) paid(n int) {
	if len(x.up.b) > x.sent || x.stuck {
		n = min(n, x.debt)
	} else {
		n = x.debt
	}
	x.debt -= n
	x.giveBack(n)
}

func (x *stream) giveBack(n int) {
	x.credit += n
	if x.credit < max(x.c.window/2, 1) || x.gotEnd || x.rst {
		return
	}
	x.c.out = appendWindow(x.c.out, x.id, x.credit)
	x.recvWin += x.credit
	x.credit = 0
}

// upTrailers takes the fields that end what the application says.
func (x *stream) upTrailers(fields []Field, end bool) *Refusal {
	if !end {
		return x.refuse(ErrTrailerEnd)
	}
	f, why := check(trailers, fields, nil, nil)
	if why == nil {
		why = x.app.end()
	}
	if why != nil {
		return x.refuse(why)
	}
	if !x.c.server && f.code >= 0 {
		x.Code = f.code
	}
	x.gotEnd, x.upFin = true, true
	x.count(sizeOf(fields))
	if !x.dead {
		at := len(x.up.b)
		x.up.appendFields(blockTrailers, fields)
		x.copyOut(x.up.b[at:], true)
	}
	x.touch()
	x.closed()
	return nil
}

// upResponse takes the head of a response.
func (x *stream) upResponse(fields []Field, end bool) *Refusal {
	f, why := check(response, fields, nil, nil)
	if why == nil && f.status < 200 && end {
		why = ErrInterimEnd
	}
	if why != nil {
		return x.refuse(why)
	}
	x.count(sizeOf(fields))
	if f.status < 200 {
		x.up.appendFields(blockInterim, fields)
		x.touch()
		return nil
	}
	x.Status, x.passed, x.First = f.status, true, now()-x.Start
	x.answered(x.First)
	f.connect = x.connect && f.status < 300
	x.Tunnel = f.connect
	x.app.begin(&f, x.isHead || f.status == 204 || f.status == 304)
	if f.code >= 0 {
		x.Code = f.code
	}
	if end {
		x.gotEnd, x.upFin = true, true
		if why := x.app.end(); why != nil {
			return x.refuse(why)
		}
	}
	if !x.dead {
		x.up.appendFields(blockHead, fields)
	}
	x.touch()
	x.closed()
	return nil
}
