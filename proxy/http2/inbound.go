package http2

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"assay.dev/proxy/mux"
	"assay.dev/proxy/route"
)

// Origin says between whom a stream is.
type Origin struct {
	Client netip.AddrPort // whom the application shall see; port 0: any
	Target netip.AddrPort // the application
	// Observer is told of the stream's exchanges; nil for nobody.
	Observer Observer
	// Guard protects the application; nil admits everything.
	Guard Guard
	// Edit changes the head of each request; nil does not. What it drops is refused in
	// trailers, and so is a tunnel, in which nothing could be changed, but for WebSocket's.
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
	Config
	// IdleTimeout is how long a connection to the application is kept without a stream
	// (30 s).
	IdleTimeout time.Duration
	// Spread is how many streams a connection has before another is made, as an
	// application may serve each connection with one thread (100); MaxConns is how many
	// there may be for one client address (8).
	Spread, MaxConns int
}

// Inbound serves the streams that peers open to the application: those of one client
// address share a few connections from that address.
type Inbound struct {
	cfg     InboundConfig
	backend Backend
	ctx     context.Context
	cancel  context.CancelFunc

	mu     sync.Mutex
	pool   map[poolKey][]*conn
	all    map[*conn]struct{}
	closed bool
	wg     sync.WaitGroup
}

// poolKey is what two requests must share to use one connection.
type poolKey struct {
	client netip.Addr
	target netip.AddrPort
}

// NewInbound makes an Inbound. Run must be called.
func NewInbound(b Backend, cfg InboundConfig) *Inbound {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	if cfg.IdleTimeout <= 0 {
		cfg.IdleTimeout = 30 * time.Second
	}
	def(&cfg.Spread, 100)
	def(&cfg.MaxConns, 8)
	in := &Inbound{cfg: cfg, backend: b, pool: map[poolKey][]*conn{}, all: map[*conn]struct{}{}}
	in.ctx, in.cancel = context.WithCancel(context.Background())
	return in
}

// Run closes connections that have been idle for too long, until ctx ends; then it closes
// all of them and returns when their goroutines have. Exchanges that still run are reset.
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
	var all []*conn
	for c := range in.all {
		all = append(all, c)
	}
	in.mu.Unlock()
	in.cancel()
	for _, c := range all {
		c.stop()
	}
	in.wg.Wait()
}

// Accept returns the handler of a stream whose header says HTTP/2. The request is checked
// again, as strictly as the peer claims to have done.
func (in *Inbound) Accept(st mux.Stream, o Origin) (mux.Handler, mux.Code) {
	c := in.conn(o)
	switch {
	case c == nil:
		return nil, mux.Refused
	case c.greedy():
		c.load.Add(-1)
		if o.Observer != nil {
			o.Observer.Refused(ErrScarce)
		}
		return nil, mux.Overloaded
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	x := c.newStream()
	x.loaded = true
	x.st, x.opened, x.observer, x.guard, x.edit = st, true, o.Observer, o.Guard, o.Edit
	return x, 0
}

// conn chooses a connection, or makes one, and counts the stream in.
func (in *Inbound) conn(o Origin) *conn {
	key := poolKey{o.Client.Addr(), o.Target}
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		return nil
	}
	var best *conn
	list, n := in.pool[key], 0
	for _, c := range list {
		if c.shy.Load() {
			continue
		}
		n++
		if best == nil || c.load.Load() < best.load.Load() {
			best = c
		}
	}
	if best == nil || n < in.cfg.MaxConns && best.load.Load() >= min(int32(in.cfg.Spread), best.limit.Load()) {
		if n < len(list) {
			list = slices.DeleteFunc(list, func(c *conn) bool { return c.shy.Load() })
		}
		best = newConn(in.ctx, false, in.cfg.Config)
		best.in, best.key, best.faults = in, key, o.Observer
		in.pool[key] = append(list, best)
		in.all[best] = struct{}{}
		in.wg.Add(1)
		go best.run(o)
	}
	best.load.Add(1)
	return best
}

// run is the life of a connection to the application.
func (c *conn) run(o Origin) {
	defer c.in.wg.Done()
	defer c.in.forget(c)
	o.Observer, o.Guard = nil, nil
	tcp, err := c.in.backend.Dial(c.ctx, o)
	if err == nil {
		if err = c.open(tcp); err != nil {
			tcp.Close()
		}
	}
	if err != nil {
		c.mu.Lock()
		c.shy.Store(true)
		c.end = err
		c.breakStreams()
		c.leave()
		c.mu.Unlock()
		c.cancel()
		return
	}
	c.serve()
}

func (in *Inbound) forget(c *conn) {
	in.mu.Lock()
	defer in.mu.Unlock()
	delete(in.all, c)
	list := slices.DeleteFunc(in.pool[c.key], func(x *conn) bool { return x == c })
	if len(list) == 0 {
		delete(in.pool, c.key)
	} else {
		in.pool[c.key] = list
	}
}

// sweep runs twice in each IdleTimeout.
func (in *Inbound) sweep() {
	in.mu.Lock()
	defer in.mu.Unlock()
	for c := range in.all {
		if c.load.Load() > 0 {
			c.idle = 0
			continue
		}
		if c.idle++; c.idle > 2 {
			c.mu.Lock()
			if c.streams.n == 0 && c.raw != nil {
				c.fail(errIdle)
			}
			c.mu.Unlock()
		}
	}
}
