package proxy

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"assay.dev"
	"assay.dev/proxy/balance"
	"assay.dev/proxy/mtls"
	"assay.dev/proxy/mux"
)

const (
	dialTimeout = 5 * time.Second // of one session, TCP and TLS
	// maxSessions to one peer. One carries thousands of streams; a second one is
	// dialled when the first is busy, so that their cryptography can run in parallel.
	maxSessions = 2
	busyStreams = 128
	// A session without streams is closed after two or three sweeps, an old one
	// replaced: its peer's certificate was looked at when it began.
	sweepEvery = 30 * time.Second
	maxAge     = time.Hour
	// maxIdlePeers is how many peers without a session are remembered.
	maxIdlePeers = 4096
)

type peerKey struct {
	addr netip.AddrPort
	id   assay.Identity
}

// peers pools sessions by address, port and the identity that is expected there.
// Sessions under an older certificate or bundle of ours are drained as soon as there
// is a newer one, so they take nothing new.
type peers struct {
	p      *Proxy
	mu     sync.Mutex
	known  map[peerKey]*peer
	active map[*peer]struct{} // that have sessions, known or not
	stir   chan struct{}      // tells the janitor that there is something to look after
}

func newPeers(p *Proxy) *peers {
	return &peers{p: p, known: map[peerKey]*peer{}, active: map[*peer]struct{}{}, stir: make(chan struct{}, 1)}
}

// peer is one address with an identity. Reading sessions takes no lock.
type peer struct {
	p        *Proxy
	key      peerKey
	local    bool // it is this workload itself
	sessions atomic.Pointer[[]*session]
	opens    atomic.Uint32

	mu   sync.Mutex
	call *dialCall
}

// plain reports whether nobody of the mesh is there.
func (pe *peer) plain() bool { return pe.key.id.IsZero() }

// within reports whether sessions with it stay within this process.
func (pe *peer) within() bool { return pe.local || pe.plain() }

// deadline is a context that ends at a time, for whoever asks: most find a session
// and never do.
type deadline struct {
	context.Context
	at time.Time
}

// dialCall is one dial that all who need a session wait for.
type dialCall struct {
	done chan struct{}
	s    *session
	err  error
}

// get returns the peer for key.
func (ps *peers) get(key peerKey) *peer {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	pe := ps.known[key]
	if pe == nil {
		if len(ps.known) >= maxIdlePeers {
			ps.forgetIdle()
		}
		snap := ps.p.snap.Load()
		pe = &peer{p: ps.p, key: key, local: key.id == snap.Identity && snap.own(key.addr.Addr())}
		ps.known[key] = pe
	}
	return pe
}

// forgetIdle drops peers without sessions. Whoever holds one can go on using it.
func (ps *peers) forgetIdle() {
	for key, pe := range ps.known {
		if len(pe.list()) == 0 {
			delete(ps.known, key)
		}
	}
}

// value makes Endpoint.Value.
func (ps *peers) value(w balance.Want) any {
	return ps.get(peerKey{w.Addr, w.Identity})
}

func (pe *peer) list() []*session {
	if l := pe.sessions.Load(); l != nil {
		return *l
	}
	return nil
}

// session returns one that takes streams, dialling it when there is none. Only one
// dial runs at a time, whoever waits for it.
func (pe *peer) session(ctx context.Context) (*session, error) {
	if s := pe.pick(); s != nil {
		return s, nil
	}
	call := pe.dial()
	if call == nil {
		return pe.pick(), nil
	}
	if d, ok := ctx.(*deadline); ok {
		bound, cancel := context.WithDeadline(d.Context, d.at)
		defer cancel()
		ctx = bound
	}
	select {
	case <-call.done:
		return call.s, call.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// pick returns the session with the fewest streams, and sees now and then whether
// there should be one more.
func (pe *peer) pick() *session {
	list := pe.list()
	if len(list) == 0 {
		return nil
	}
	best := list[0]
	if len(list) > 1 || pe.opens.Add(1)%32 == 0 {
		n := best.mux.Streams()
		for _, s := range list[1:] {
			if k := s.mux.Streams(); k < n {
				best, n = s, k
			}
		}
		if n >= busyStreams && len(list) < maxSessions && !pe.within() {
			pe.dial()
		}
	}
	return best
}

// dial starts a dial, or joins the one that runs. It returns nil when a session has
// appeared meanwhile and another is not wanted.
func (pe *peer) dial() *dialCall {
	pe.mu.Lock()
	defer pe.mu.Unlock()
	if pe.call != nil {
		return pe.call
	}
	call := &dialCall{done: make(chan struct{})}
	pe.call = call
	pe.p.wg.Go(func() {
		s, err := pe.connect(pe.p.ctx)
		pe.mu.Lock()
		pe.call = nil
		if err == nil {
			pe.add(s)
		}
		pe.mu.Unlock()
		call.s, call.err = s, err
		close(call.done)
		if err == nil {
			pe.run(s)
		}
	})
	return call
}

// add and drop change the list; pe.mu is held.
func (pe *peer) add(s *session) {
	list := append([]*session{s}, pe.list()...)
	pe.sessions.Store(&list)
	pe.p.peers.setActive(pe, true)
}

func (pe *peer) drop(s *session) {
	var list []*session
	for _, x := range pe.list() {
		if x != s {
			list = append(list, x)
		}
	}
	pe.sessions.Store(&list)
	pe.p.peers.setActive(pe, len(list) > 0)
}

func (ps *peers) setActive(pe *peer, active bool) {
	ps.mu.Lock()
	defer ps.mu.Unlock()
	if !active {
		delete(ps.active, pe)
		return
	}
	ps.active[pe] = struct{}{}
	select {
	case ps.stir <- struct{}{}:
	default:
	}
}

// run reads s until it ends.
func (pe *peer) run(s *session) {
	if s.generation != pe.p.creds.generation() && !pe.within() { // a newer identity came during the dial
		pe.retire(s)
		s.mux.Drain()
	}
	err := s.run()
	pe.retire(s)
	if err == nil {
		return
	}
	if reason := mtls.ReasonOf(err); reason == mtls.PeerRefused || reason == mtls.BadALPN {
		pe.p.handshakeFailed(pe.key.addr, err) // it looked at our certificate only now
	}
	pe.p.log.Debug("session ended", "peer", pe.key.id.String(), "address", pe.key.addr.String(), "error", err)
}

// retire takes s out of use; what runs on it goes on.
func (pe *peer) retire(s *session) {
	pe.mu.Lock()
	pe.drop(s)
	pe.mu.Unlock()
}

// open starts a stream on a session that takes it. A session that ends or drains
// just now is passed over: it has seen nothing of the stream.
func (pe *peer) open(ctx context.Context, payload, data []byte, fin bool, h mux.Handler) (s *session, st mux.Stream, n int, err error) {
	for range 4 {
		s, err = pe.session(ctx)
		if err != nil {
			return nil, st, 0, err
		}
		if s == nil {
			continue
		}
		st, n, err = s.mux.Open(payload, data, fin, h)
		switch {
		case err == nil:
			return s, st, n, nil
		case errors.Is(err, mux.ErrClosed), errors.Is(err, mux.ErrDraining):
			pe.retire(s)
		default:
			return nil, st, 0, err
		}
	}
	return nil, st, 0, err
}

// rotate drains the sessions of every peer that are not under our newest identity.
func (ps *peers) rotate() {
	generation := ps.p.creds.generation()
	ps.each(func(pe *peer, s *session) {
		if s.generation != generation && !pe.within() {
			pe.retire(s)
			s.mux.Drain()
		}
	})
}

func (ps *peers) each(f func(*peer, *session)) (n int) {
	ps.mu.Lock()
	list := make([]*peer, 0, len(ps.active))
	for pe := range ps.active {
		list = append(list, pe)
	}
	ps.mu.Unlock()
	for _, pe := range list {
		for _, s := range pe.list() {
			n++
			f(pe, s)
		}
	}
	return n
}

// janitor closes idle and old sessions. Without sessions it sleeps.
func (ps *peers) janitor(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-ps.stir:
		}
		for ps.sweep(time.Now()) > 0 {
			select {
			case <-ctx.Done():
				return
			case <-time.After(sweepEvery):
			}
		}
	}
}

func (ps *peers) sweep(now time.Time) int {
	return ps.each(func(pe *peer, s *session) {
		if s.mux.Streams() > 0 {
			s.idle = 0
		} else {
			s.idle++
		}
		if s.idle > 2 || now.Sub(s.born) > s.life {
			pe.retire(s)
			s.mux.Drain()
		}
	})
}

// lifetime is maxAge with a tenth of jitter, so that sessions do not all end at once.
func lifetime() time.Duration {
	return maxAge - time.Duration(rand.Int64N(int64(maxAge/10)))
}
