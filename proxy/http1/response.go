package http1

// Response is the head of a response. The zero value is ready to parse.
type Response struct {
	head
	Status int
}

// Reset prepares r for the next head.
func (r *Response) Reset() { *r = Response{} }

// Begun reports whether a part of a head was parsed.
func (r *Response) Begun() bool { return r.at+r.scanned > 0 }

// Parse goes on with the head at the start of b, as Request.Parse does.
func (r *Response) Parse(b []byte, lim *Limits) (bool, *Refusal) {
	for {
		line, ok, err := r.nextLine(b, lim, lim.Head)
		if !ok {
			return false, err
		}
		if !r.started {
			r.started = true
			err = r.statusLine(line)
		} else if len(line) == 0 {
			r.Size = r.at
			err = r.complete()
			return err == nil, err
		} else {
			err = r.field(line, lim)
		}
		if err != nil {
			return false, err
		}
	}
}

// statusLine reads "HTTP/1.x SP 3DIGIT SP [reason]". The second space may be
// missing with the reason: servers do that, and nothing depends on it.
func (r *Response) statusLine(line []byte) *Refusal {
	const form = "HTTP/1.1 200"
	if len(line) < len(form) || line[8] != ' ' || len(line) > len(form) && line[len(form)] != ' ' {
		return ErrStatusLine
	}
	var err *Refusal
	if r.Minor, err = version(line[:8], ErrStatusLine); err != nil {
		return err
	}
	for _, c := range line[9:12] {
		if !isDigit(c) {
			return ErrStatusLine
		}
		r.Status = r.Status*10 + int(c-'0')
	}
	if r.Status < 100 || !validValue(line[12:]) {
		return ErrStatusLine
	}
	return nil
}

func (r *Response) field(line []byte, lim *Limits) *Refusal {
	if r.fields++; r.fields > lim.Fields {
		return ErrFieldCount
	}
	name, value, err := splitField(line)
	if err != nil {
		return err
	}
	return r.common(name, value)
}

func (r *Response) complete() *Refusal {
	if err := r.framed(); err != nil {
		return err
	}
	if (r.Status < 200 || r.Status == 204) && (r.coding || r.Length > 0) {
		return ErrNoBody
	}
	return nil
}

// Interim reports whether another response to the same request follows: every 1xx
// but 101 (Switching Protocols).
func (r *Response) Interim() bool { return r.Status < 200 && r.Status != 101 }

// Body returns the framing of what follows the head in answer to a request with
// method HEAD or CONNECT or neither (RFC 9112 section 6.3).
func (r *Response) Body(head, connect bool, lim *Limits) Body {
	switch {
	case r.Status == 101, connect && r.Status/100 == 2:
		return Body{Framing: Tunnel}
	case head, r.Status < 200, r.Status == 204, r.Status == 304:
		return Body{}
	case r.Chunked:
		return Body{Framing: Chunks, lim: lim}
	case r.HasLength:
		if r.Length == 0 {
			return Body{}
		}
		return Body{Framing: Length, left: r.Length}
	}
	return Body{Framing: UntilClose}
}

// Persistent reports whether the connection lives on after this response to req
// (RFC 9112 section 9.3). An HTTP/1.0 client gave no leave to guess: for it the
// response must say keep-alive.
func (r *Response) Persistent(req *Request) bool {
	return r.persistent() && req.persistent() && (req.Minor == 1 || r.KeepAlive)
}
