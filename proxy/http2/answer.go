package http2

import (
	"strconv"
	"time"

	"assay.dev/proxy/mux"
)

// dispatch gives a new stream to an upstream, or to a goroutine that waits for one; mu is
// held.
func (x *stream) dispatch(fields []Field) {
	c := x.c
	x.head.Fields = fields
	x.Request = &x.head
	if !x.plan() {
		x.Request, x.head.Fields = nil, nil
		return
	}
	if x.Plan != nil && x.Plan.Fields != nil {
		x.head.Fields = x.Plan.Fields
	}
	st, n, err := c.d.Dispatch(c.ctx, &x.Exchange, x.up.b, x.upFin, x, &c.batch, false)
	x.Request, x.head.Fields = nil, nil
	if err == ErrWait {
		x.wait()
		return
	}
	if err != nil {
		x.fail(asFailure(err))
		return
	}
	x.st, x.opened = st, true
	x.took(n, len(x.up.b))
	x.limit()
}

func asFailure(err error) *Failure {
	if f, ok := err.(*Failure); ok {
		return f
	}
	f := *failDispatch
	f.Text += " (" + err.Error() + ")"
	return &f
}

// wait dispatches in a goroutine; mu is held.
func (x *stream) wait() {
	x.waiting = true
	x.c.start(x.await)
}

func (x *stream) await() {
	c := x.c
	c.mu.Lock()
	fields, pause := x.headFields(), x.pause
	x.head.Fields = fields
	x.Request = &x.head
	c.mu.Unlock()
	st, err := mux.Stream{}, error(nil)
	if pause > 0 {
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-c.ctx.Done():
			t.Stop()
		}
	}
	st, _, err = c.d.Dispatch(c.ctx, &x.Exchange, nil, false, x, nil, true)
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.done()
	x.waiting = false
	x.Request, x.head.Fields = nil, nil
	switch {
	case err != nil && !x.rst && !x.sentEnd:
		if err == ErrNoOther {
			x.Guard.GiveBack(x.Cause)
			err = x.lastFailure()
		}
		x.fail(asFailure(err))
	case err != nil:
	case x.early != 0:
		code := x.early
		x.st, x.opened, x.early = st, true, 0
		x.arrived()
		if !x.waiting {
			x.meshReset(code)
		}
	case x.rst || x.dead:
		x.st, x.opened, x.dead = st, true, true
		st.Reset(mux.Cancelled)
	default:
		x.retime(fields)
		x.st, x.opened = st, true
		x.push()
		x.limit()
		x.arrived()
	}
	if !x.waiting {
		x.settle()
	}
	c.flush()
}

// headFields reads the head that is kept.
func (x *stream) headFields() (fields []Field) {
	if len(x.up.b) < blockHeader {
		return nil // the client is gone
	}
	_, n := parseBlock(x.up.b)
	for list := x.up.b[blockHeader : blockHeader+n]; len(list) > 0; {
		name, value, sensitive, rest, _ := cutField(list)
		fields = append(fields, Field{Name: string(name), Value: string(value), Sensitive: sensitive})
		list = rest
	}
	return fields
}

// fail tells the application that there is no response.
func (x *stream) fail(f *Failure) {
	x.failure(f.Reason)
	x.resetMesh(mux.Cancelled)
	x.answer(f)
}

// cut ends a response that has begun. A gRPC client is told so in its own way, unless a
// message is cut.
func (x *stream) cut(f *Failure) {
	x.failure(f.Reason)
	x.resetMesh(mux.Cancelled)
	if !x.GRPC || !x.mesh.grpc || !x.mesh.count.between() || len(x.down.b) > 0 || x.left > 0 {
		code := InternalError
		if f == failTimeout {
			code = Cancel
		}
		x.resetApp(code)
		return
	}
	x.Code = f.Code
	x.c.appendFields(x.id, []Field{
		{Name: "grpc-status", Value: strconv.Itoa(f.Code)},
		{Name: "grpc-message", Value: percent("assay: " + f.Text)},
		{Name: "assay-error", Value: f.Reason},
	}, nil, true)
	x.close()
}

// answer sends a response of our own, and takes no more of the request.
func (x *stream) answer(f *Failure) {
	c := x.c
	if x.sentEnd || x.rst {
		return
	}
	text := "assay: " + f.Text
	x.Status = f.Status
	switch {
	case x.GRPC:
		x.Status, x.Code = 200, f.Code
		c.appendFields(x.id, []Field{
			{Name: ":status", Value: "200"},
			{Name: "content-type", Value: "application/grpc"},
			{Name: "grpc-status", Value: strconv.Itoa(f.Code)},
			{Name: "grpc-message", Value: percent(text)},
			{Name: "assay-error", Value: f.Reason},
		}, nil, true)
	default:
		text += "\n"
		body := !x.isHead && min(x.sendWin, c.sendWin) >= len(text)
		fields := []Field{
			{Name: ":status", Value: status(f.Status)},
			{Name: "assay-error", Value: f.Reason},
			{Name: "content-type", Value: "text/plain; charset=utf-8"},
			{Name: "content-length", Value: strconv.Itoa(len(text))},
		}
		if !body && !x.isHead {
			fields = fields[:2]
		}
		if f.RetryAfter > 0 {
			fields = append(fields, Field{Name: "retry-after", Value: strconv.Itoa(f.RetryAfter)})
		}
		c.appendFields(x.id, fields, nil, !body)
		if body {
			c.out = appendHeader(c.out, len(text), frameData, flagEndStream, x.id)
			c.out = append(c.out, text...)
			x.sendWin -= len(text)
			c.sendWin -= len(text)
		}
	}
	x.close()
}

// close ends the application's side after our own last words.
func (x *stream) close() {
	x.sentEnd = true
	x.down.release()
	x.off, x.left = 0, 0
	if !x.gotEnd {
		x.resetApp(NoError) // RFC 9113 section 8.1: the rest of the request is not needed
	}
}

func status(code int) string {
	switch code {
	case 431:
		return "431"
	case 501:
		return "501"
	case 502:
		return "502"
	case 503:
		return "503"
	case 504:
		return "504"
	}
	return strconv.Itoa(code)
}

// percent encodes a grpc-message: everything but printable ASCII, and the percent sign.
func percent(s string) string {
	const hex = "0123456789ABCDEF"
	clean := true
	for i := range len(s) {
		clean = clean && s[i] >= ' ' && s[i] <= '~' && s[i] != '%'
	}
	if clean {
		return s
	}
	b := make([]byte, 0, len(s)+16)
	for i := range len(s) {
		if c := s[i]; c >= ' ' && c <= '~' && c != '%' {
			b = append(b, c)
		} else {
			b = append(b, '%', hex[c>>4], hex[c&15])
		}
	}
	return string(b)
}
