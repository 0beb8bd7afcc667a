package http1

import (
	"sync"

	"assay.dev/proxy/mux"
)

// stream carries one exchange: over a session, or within the process when an
// application outside the mesh speaks to ours.
type stream struct {
	mux.Stream
	end *pipeEnd
}

func (s stream) tryWrite(p []byte, fin bool) (int, error) {
	if s.end != nil {
		return s.end.tryWrite(p, fin)
	}
	return s.Stream.TryWrite(p, fin)
}

func (s stream) consumed(n int) {
	if s.end != nil {
		s.end.consumed(n)
		return
	}
	s.Stream.Consumed(n)
}

// shut tells the other end that the client half-closed.
func (s stream) shut() {
	if s.end != nil {
		s.end.shut()
		return
	}
	s.Stream.Shut()
}

func (s stream) reset(code mux.Code) {
	if s.end != nil {
		s.end.reset(code)
		return
	}
	s.Stream.Reset(code)
}

// pipe is a stream within the process. It keeps mux.Stream's contract, but calls the
// other end's handler in the goroutine that writes; so nobody may hold a lock that
// the handler at the other end takes.
type pipe struct {
	mu    sync.Mutex
	ended bool // reset by either end
	ends  [2]pipeEnd
}

type pipeEnd struct {
	p       *pipe
	other   *pipeEnd
	h       mux.Handler
	credit  int  // bytes that this end may still write
	short   bool // and it wanted to write more
	sentFin bool
}

const pipeWindow = 256 << 10

// init makes p a fresh pipe between two handlers. Nobody may still write or reset the
// pipe that it was: both ends have sent fin.
func (p *pipe) init(a, b mux.Handler) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ended = false
	p.ends[0] = pipeEnd{p: p, other: &p.ends[1], h: a, credit: pipeWindow}
	p.ends[1] = pipeEnd{p: p, other: &p.ends[0], h: b, credit: pipeWindow}
}

func (e *pipeEnd) tryWrite(b []byte, fin bool) (int, error) {
	e.p.mu.Lock()
	if e.p.ended || e.sentFin {
		e.p.mu.Unlock()
		return 0, mux.ErrEnded
	}
	n := min(len(b), e.credit)
	e.credit -= n
	e.short = n < len(b)
	fin = fin && n == len(b)
	e.sentFin = fin
	h := e.other.h
	e.p.mu.Unlock()
	if n > 0 || fin {
		h.Received(mux.Stream{}, b[:n], fin)
	}
	return n, nil
}

func (e *pipeEnd) consumed(n int) {
	e.p.mu.Lock()
	o := e.other
	o.credit += n
	tell := o.short && !e.p.ended
	o.short = false
	h := o.h
	e.p.mu.Unlock()
	if tell {
		h.Writable(mux.Stream{})
	}
}

func (e *pipeEnd) shut() {
	if x, ok := e.other.h.(*served); ok {
		x.shutBy(stream{end: e.other})
	}
}

func (e *pipeEnd) reset(code mux.Code) {
	e.p.mu.Lock()
	tell := !e.p.ended && !(e.sentFin && e.other.sentFin)
	e.p.ended = true
	h := e.other.h
	e.p.mu.Unlock()
	if tell {
		h.Reset(mux.Stream{}, code)
	}
}
