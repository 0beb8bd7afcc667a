package proxy

import (
	"context"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/proxy/mux"
	"assay.dev/proxy/route"
)

const (
	maxMirrors   = 64        // copies that are on their way at once; more are left out
	mirrorBuffer = 256 << 10 // of a copy that its receiver is slower to take than the request
	mirrorTime   = 30 * time.Second
)

// mirror is a copy of one request, sent to somebody whose answer nobody reads. The request
// never waits for it: what finds no room is dropped, and counted.
type mirror struct {
	o      *outbound // of its own
	header []byte
	wake   chan struct{}

	mu    sync.Mutex
	b     []byte // what is yet to be sent
	fin   bool   // and nothing follows
	ended bool   // nothing follows, and it is not whole
	over  bool   // the answer is, or nobody will give one
}

// mirror begins a copy; nil when there is nobody to send it to, or no room.
func (o *outbound) mirror(to *route.Mirror, proto assay.Protocol) *mirror {
	sp := o.snap.backend(to.Service, to.Port)
	if sp == nil || sp.endpoints(o.dst.Addr()).Len() == 0 {
		o.p.rec.Refusals.Inc(refusedMirror)
		return nil
	}
	select {
	case o.p.mirrors <- struct{}{}:
	default:
		o.p.rec.Refusals.Inc(refusedMirror)
		return nil
	}
	own := &outbound{p: o.p, ctx: o.ctx, snap: o.snap, src: o.src, dst: o.dst, accepted: time.Now(), protocol: proto, rules: o.rules}
	own.target = target{port: sp, set: sp.endpoints(o.dst.Addr())}
	h := own.header(proto)
	h.Port = sp.port
	m := &mirror{o: own, header: h.AppendTo(make([]byte, 0, maxHeader)), wake: make(chan struct{}, 1)}
	o.p.wg.Go(m.run)
	return m
}

func (m *mirror) signal() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// write adds to the copy.
func (m *mirror) write(b []byte, fin bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ended || m.over {
		return
	}
	if len(m.b)+len(b) > mirrorBuffer {
		m.ended = true
	} else {
		m.b, m.fin = append(m.b, b...), fin
	}
	m.signal()
}

// end says that nothing follows.
func (m *mirror) end() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ended = m.ended || !m.fin
	m.signal()
}

// take returns what is to be sent, and whether something may follow.
func (m *mirror) take() (b []byte, fin, ended, over bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, m.b = m.b, nil
	return b, m.fin, m.ended, m.over
}

// run sends the copy and waits for the end of its answer.
func (m *mirror) run() {
	defer func() { <-m.o.p.mirrors }()
	ctx, cancel := context.WithTimeout(m.o.ctx, mirrorTime)
	defer cancel()
	if !m.send(ctx) {
		m.o.p.rec.Refusals.Inc(refusedMirror)
	}
	m.mu.Lock()
	m.over = true
	m.mu.Unlock()
}

func (m *mirror) send(ctx context.Context) bool {
	var st mux.Stream
	var rest []byte
	sent := false // with fin
	for {
		b, fin, ended, over := m.take()
		rest = append(rest, b...)
		if over || ended || ctx.Err() != nil {
			if !st.IsZero() && !(over && sent) {
				st.Reset(mux.Cancelled)
			}
			return over
		}
		if st.IsZero() && len(rest) > 0 {
			e, s, opened, n, err := m.o.openAny(ctx, m.header, rest, fin, (*mirrorAnswer)(m))
			if err != nil {
				return false
			}
			if e != nil {
				defer e.Done()
			}
			m.o.session = s
			series := m.o.series()
			series.Begin()
			series.Out(len(rest))
			defer func() { series.End(time.Since(m.o.accepted), false, time.Now()) }()
			st, sent, rest = opened, fin && n == len(rest), rest[n:]
		} else if !st.IsZero() && !sent && (len(rest) > 0 || fin) {
			n, err := st.TryWrite(rest, fin)
			if err != nil {
				return false
			}
			sent, rest = fin && n == len(rest), rest[n:]
		}
		select {
		case <-m.wake:
		case <-ctx.Done():
		}
	}
}

// mirrorAnswer drops what a mirror is answered.
type mirrorAnswer mirror

func (a *mirrorAnswer) Received(st mux.Stream, p []byte, fin bool) {
	st.Consumed(len(p))
	if fin {
		a.Reset(st, 0)
	}
}

func (a *mirrorAnswer) Reset(mux.Stream, mux.Code) {
	m := (*mirror)(a)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.over = true
	m.signal()
}

func (a *mirrorAnswer) Writable(mux.Stream) { (*mirror)(a).signal() }
