package http1

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"assay.dev/proxy/mux"
	"assay.dev/proxy/nowait"
	"assay.dev/proxy/route"
)

// Origin says between whom a stream is.
type Origin struct {
	Client netip.AddrPort // whom the application shall see; port 0: any
	Target netip.AddrPort // the application
	// Observer is told of the stream's exchanges; nil for nobody.
	Observer Observer
	// Guard is asked for each of the stream's requests; nil takes all.
	Guard Guard
	// Edit changes the head of each request; nil does not. What it drops is refused in
	// trailers. A request that would leave HTTP, behind which nothing could be changed,
	// may then do so to WebSocket only.
	Edit *route.HeadEdit
}

// Backend connects to the application.
type Backend interface {
	// Dial connects to o.Target from o.Client's address. It gives up when ctx ends, and
	// bounds itself. An error means that the application refused or does not answer.
	Dial(ctx context.Context, o Origin) (*net.TCPConn, error)
}

// InboundConfig bounds an Inbound. Zero fields take the defaults in parentheses.
type InboundConfig struct {
	Limits   Limits
	Timeouts Timeouts
	// IdleTimeout is how long a connection to the application is kept without a
	// request (10 s). An application that closes earlier is noticed at once.
	IdleTimeout time.Duration
	MaxIdle     int // connections kept in all (1024)
	// MaxHeads bounds the bytes of heads that came in part, of all streams (16 MiB).
	// They come whole from a peer's proxy unless they are long.
	MaxHeads int
}

// Inbound serves the streams that peers open to the application: each request goes
// to a connection of the client's own address, kept alive between requests. A client
// connection that authenticates itself as a connection (NTLM, Negotiate) has one of
// its own from then on.
type Inbound struct {
	cfg     InboundConfig
	backend Backend
	direct  Outbound
	ctx     context.Context
	cancel  context.CancelFunc
	served  sync.Pool     // of *served
	tick    atomic.Uint32 // of sweep
	looked  []overdue     // sweep's own

	mu     sync.Mutex
	idle   map[poolKey]*idleList
	count  int // idle connections
	conns  map[*backend]struct{}
	heads  map[*served]uint32 // that came in part, with the tick of their first byte
	held   int                // bytes of them
	closed bool
	wg     sync.WaitGroup
}

// poolKey is what two requests must share to use one connection.
type poolKey struct {
	client netip.Addr
	target netip.AddrPort
}

// idleList holds the idle connections of one key, last used first.
type idleList struct {
	first, last *backend
	tick        uint32 // of the last use
}

// overdue is an exchange that sweep looks at.
type overdue struct {
	x *served
	b *backend // nil: the head may be late
}

// NewInbound makes an Inbound. Run must be called.
func NewInbound(b Backend, cfg InboundConfig) *Inbound {
	if cfg.MaxHeads <= 0 {
		cfg.MaxHeads = 16 << 20
	}
	cfg.Limits, cfg.Timeouts = cfg.Limits.WithDefaults(), cfg.Timeouts.WithDefaults()
	if cfg.IdleTimeout <= 0 {
		cfg.IdleTimeout = 10 * time.Second
	}
	if cfg.MaxIdle <= 0 {
		cfg.MaxIdle = 1024
	}
	in := &Inbound{cfg: cfg, backend: b, idle: map[poolKey]*idleList{}, conns: map[*backend]struct{}{}, heads: map[*served]uint32{}}
	in.direct.Limits, in.direct.Timeouts = cfg.Limits, cfg.Timeouts
	in.ctx, in.cancel = context.WithCancel(context.Background())
	in.served.New = func() any { return &served{in: in, wake: make(chan struct{}, 1)} }
	return in
}

// Run closes connections that have been idle for too long and resets exchanges that
// are overdue, until ctx ends; then it closes all of them and returns when their
// goroutines have.
func (in *Inbound) Run(ctx context.Context) error {
	t := time.NewTicker(in.cfg.IdleTimeout / 2)
	defer t.Stop()
	for {
		select {
		case <-t.C:
			in.sweep()
		case <-ctx.Done():
			in.close()
			return context.Cause(ctx)
		}
	}
}

func (in *Inbound) close() {
	in.mu.Lock()
	in.closed = true
	var all []*backend
	for b := range in.conns {
		all = append(all, b)
	}
	in.mu.Unlock()
	in.cancel()
	for _, b := range all {
		b.close()
	}
	in.wg.Wait()
}

// Accept returns the handler of a stream whose header says HTTP/1. The request is
// parsed again, as strictly as the peer claims to have done.
func (in *Inbound) Accept(st mux.Stream, o Origin) mux.Handler {
	return in.accept(o, stream{Stream: st})
}

func (in *Inbound) accept(o Origin, st stream) *served {
	x := in.served.Get().(*served)
	x.mu.Lock() // a late Shut may still look at it
	defer x.mu.Unlock()
	x.origin, x.st = o, st
	return x
}

// Serve carries the requests of a client outside the mesh, whose connection came in
// plaintext, to the application; first are the bytes that were read from it already.
// The contract is Outbound.Serve's.
func (in *Inbound) Serve(ctx context.Context, tcp nowait.Conn, first []byte, o Origin) error {
	c := &client{direct: in, origin: o}
	if err := c.init(ctx, &in.direct, tcp, first); err != nil {
		return err
	}
	return c.live(&in.direct)
}

// ServeRouted is Serve for requests that d may plan: what has no plan, or a local one,
// goes to the application here, and is told to o.Observer; all else is dispatched. d is
// told of every exchange.
func (in *Inbound) ServeRouted(ctx context.Context, tcp nowait.Conn, first []byte, o Origin, d Dispatcher) error {
	c := &client{direct: in, origin: o, d: d, observer: d}
	c.planner, _ = d.(Planner)
	if err := c.init(ctx, &in.direct, tcp, first); err != nil {
		return err
	}
	return c.live(&in.direct)
}

// Drain does for plaintext clients what Outbound.Drain does. Streams are drained by
// their sessions.
func (in *Inbound) Drain(give Give) { in.direct.Drain(give) }

// openDirect opens an exchange within the process.
func (c *client) openDirect(x *exchange, data []byte, fin bool) (int, error) {
	p := x.p
	if p == nil {
		p = &pipe{}
	}
	s := c.direct.accept(c.origin, stream{end: &p.ends[1]})
	p.init(x, s)
	c.mu.Lock()
	x.p, x.st.end = p, &p.ends[0]
	c.mu.Unlock()
	return x.st.tryWrite(data, fin)
}

var errStopped = errors.New("http1: the proxy stops")

// attach gives x a connection, a kept one if there is one and fresh is not asked for.
func (in *Inbound) attach(x *served, fresh bool) (b *backend, reused bool, err error) {
	key := poolKey{x.origin.Client.Addr(), x.origin.Target}
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		return nil, false, errStopped
	}
	if l := in.idle[key]; l != nil && l.first != nil && !fresh {
		b = l.first
		in.unlist(b)
		l.tick = in.tick.Load()
		b.x.Store(x)
		return b, true, nil
	}
	b = newBackend(in, key, x)
	in.conns[b] = struct{}{}
	in.wg.Add(1)
	go b.run()
	return b, false, nil
}

// put keeps a connection for the next request.
func (in *Inbound) put(b *backend) {
	in.mu.Lock()
	defer in.mu.Unlock()
	b.x.Store(nil)
	if in.closed || in.count >= in.cfg.MaxIdle {
		b.shut()
		return
	}
	l := in.idle[b.key]
	if l == nil {
		l = &idleList{}
		in.idle[b.key] = l
	}
	tick := in.tick.Load()
	b.listed, b.tick, l.tick = true, tick, tick
	b.next = l.first
	if l.first != nil {
		l.first.prev = b
	} else {
		l.last = b
	}
	l.first = b
	in.count++
}

// claim takes b out of the pool for good, if it is there. Otherwise it returns the
// exchange that took it, which is nil when that has given it up.
func (in *Inbound) claim(b *backend) *served {
	in.mu.Lock()
	defer in.mu.Unlock()
	if b.listed {
		in.unlist(b)
		return nil
	}
	return b.x.Load()
}

func (in *Inbound) unlist(b *backend) {
	l := in.idle[b.key]
	if b.prev != nil {
		b.prev.next = b.next
	} else {
		l.first = b.next
	}
	if b.next != nil {
		b.next.prev = b.prev
	} else {
		l.last = b.prev
	}
	b.prev, b.next, b.listed = nil, nil, false
	in.count--
}

// sweep runs twice in each IdleTimeout.
func (in *Inbound) sweep() {
	tick := in.tick.Add(1)
	in.mu.Lock()
	for key, l := range in.idle {
		for b := l.last; b != nil && tick-b.tick > 2; b = l.last {
			in.unlist(b)
			b.shut()
		}
		if l.first == nil && tick-l.tick > 2 {
			delete(in.idle, key)
		}
	}
	for b := range in.conns {
		if x := b.x.Load(); x != nil {
			in.looked = append(in.looked, overdue{x, b})
		}
	}
	for x, since := range in.heads {
		if in.older(since, tick, in.cfg.Timeouts.Head) {
			in.looked = append(in.looked, overdue{x, nil})
		}
	}
	in.mu.Unlock()
	for _, o := range in.looked {
		if o.b == nil {
			o.x.headOverdue()
		} else {
			o.x.overdue(o.b, tick)
		}
	}
	clear(in.looked)
	in.looked = in.looked[:0]
}

// older reports whether more than d has passed since a tick.
func (in *Inbound) older(since, tick uint32, d time.Duration) bool {
	return time.Duration(tick-since) > d/(in.cfg.IdleTimeout/2)
}

// expectHead notes that n bytes of a head came, and not all of it. It reports whether
// there is room for them.
func (in *Inbound) expectHead(x *served, n int) bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.held+n > in.cfg.MaxHeads {
		return false
	}
	if !x.headless {
		x.headless = true
		in.heads[x] = in.tick.Load()
	}
	x.part += n
	in.held += n
	return true
}

func (in *Inbound) forgetHead(x *served) {
	in.mu.Lock()
	defer in.mu.Unlock()
	delete(in.heads, x)
	in.held -= x.part
	x.part = 0
}

func (in *Inbound) forget(b *backend) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if b.listed {
		in.unlist(b)
	}
	delete(in.conns, b)
}
