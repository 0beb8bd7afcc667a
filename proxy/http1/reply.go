package http1

// reply follows the responses to one request: any number of interim ones, then the
// final one.
type reply struct {
	resp    Response
	body    Body
	inBody  bool // the final head is complete
	interim bool // there was an interim one
	// How many interim ones there were, and their bytes.
	interims, interimBytes int
	held                   *buffer
	// own says that what frame is given next is held, so its bytes have been
	// acknowledged.
	own bool
	// headDone says that frame has just completed the final head, at headAt.
	headDone bool
	headAt   int
}

// take returns what to frame: p, or p behind the part of a head that is held.
func (r *reply) take(p []byte) []byte {
	r.own = r.held != nil
	if r.own {
		r.held = held(r.held, p)
		return r.held.b
	}
	return p
}

// keep holds back what follows end: a part of a head. It returns how many bytes were
// newly held.
func (r *reply) keep(p []byte, end int) int {
	switch {
	case r.inBody:
		r.held.release()
		r.held = nil
	case r.own:
		r.held.drop(end)
	case end < len(p):
		r.held = held(nil, p[end:])
		return len(p) - end
	}
	return 0
}

// frame returns how many bytes of p are responses to req. It stops after a head that
// makes a tunnel.
func (r *reply) frame(p []byte, req *Request, lim *Limits) (end int, refusal *Refusal) {
	r.headDone = false
	for end < len(p) {
		if r.inBody {
			n, refusal := r.body.Advance(p[end:])
			if refusal != nil || n == 0 {
				return end, refusal
			}
			end += n
			continue
		}
		ok, refusal := r.resp.Parse(p[end:], lim)
		if refusal != nil || !ok {
			return end, refusal
		}
		end += r.resp.Size
		if r.resp.Interim() {
			r.interim = true
			r.interims++
			r.interimBytes += r.resp.Size
			if r.interims > lim.Interim || r.interimBytes > lim.InterimBytes {
				return end - r.resp.Size, ErrInterim
			}
			r.resp.Reset()
			continue
		}
		r.inBody = true
		r.headDone, r.headAt = true, end-r.resp.Size
		r.body = r.resp.Body(req.IsHead, req.IsConnect, lim)
	}
	return end, nil
}

// tunnel checks a response that leaves HTTP: the request must have asked for it, and
// be complete.
func (r *reply) tunnel(req *Request, reqDone bool) *Refusal {
	switch {
	case !req.Upgrade && !req.IsConnect:
		return ErrSwitch
	case !reqDone:
		return ErrSwitchEarly
	}
	return nil
}

// whole reports whether the final response is complete by its own framing.
func (r *reply) whole() bool { return r.inBody && r.body.Done() }

// begun reports whether the application has said anything.
func (r *reply) begun() bool { return r.inBody || r.interim || r.held != nil }
