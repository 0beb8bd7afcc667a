package http1

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"assay.dev/proxy/guard"
	"assay.dev/proxy/mux"
	"assay.dev/proxy/pairtest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is an application behind the mesh: connections to addr reach app through
// Outbound, a session under TLS, and Inbound; or through Inbound alone.
type world struct {
	t     testing.TB
	addr  string
	app   netip.AddrPort
	out   *Outbound
	in    *Inbound
	first []byte // of each connection, as if read before

	mu       sync.Mutex
	sessions [2]*mux.Session
	dials    int // to the application
	refuse   []mux.Code
	clients  record // of the outbound side
	servers  record // of the inbound side
	served   chan error
	noDial   error
	policy   *guard.Request
	guard    *guard.Service
	plan     func(x *Exchange, head []byte) *Plan
}

// record is an Observer that keeps what it is told.
type record struct {
	mu     sync.Mutex
	began  int
	ended  []Exchange
	silent bool
	change chan struct{}
}

func (r *record) Begin(x *Exchange) {
	if r.silent {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.began++
}

func (r *record) End(x *Exchange) {
	if r.silent {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = append(r.ended, *x)
	select {
	case r.change <- struct{}{}:
	default:
	}
}

// wait returns what was recorded once n exchanges have ended.
func (r *record) wait(t testing.TB, n int) []Exchange {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		r.mu.Lock()
		got := append([]Exchange(nil), r.ended...)
		r.mu.Unlock()
		if len(got) >= n {
			return got
		}
		select {
		case <-r.change:
		case <-deadline:
			t.Fatalf("%d exchanges ended, want %d", len(got), n)
		}
	}
}

const (
	meshed      = "meshed"
	plain       = "plaintext"
	unencrypted = "unencrypted" // meshed without TLS, for measurements
)

type option func(*world)

func newWorld(t testing.TB, mode string, app string, options ...option) *world {
	w := &world{t: t, app: netip.MustParseAddrPort(app), out: &Outbound{}, served: make(chan error, 10000)}
	w.clients.change, w.servers.change = make(chan struct{}, 1), make(chan struct{}, 1)
	w.in = NewInbound(w, InboundConfig{})
	for _, o := range options {
		o(w)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { w.in.Run(ctx) })
	if mode != plain {
		c, s := pairtest.TCP(t)
		a, b := net.Conn(mux.NewSocket(c)), net.Conn(mux.NewSocket(s))
		if mode == meshed {
			a, b = pairtest.TLS(t, a, b)
		}
		w.sessions[0] = mux.New(a, true, mux.Config{}, nil)
		w.sessions[1] = mux.New(b, false, mux.Config{}, w.accept)
		for _, s := range w.sessions {
			running.Go(func() { s.Run() })
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.addr = l.Addr().String()
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				if mode != plain {
					w.served <- w.out.Serve(ctx, c.(*net.TCPConn), w.first, w)
				} else {
					w.served <- w.in.Serve(ctx, c.(*net.TCPConn), w.first, w.origin())
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		cancel()
		for _, s := range w.sessions {
			if s != nil {
				s.Close(errors.New("test over"))
			}
		}
		running.Wait()
	})
	return w
}

func (w *world) origin() Origin {
	return Origin{Client: netip.MustParseAddrPort("127.0.0.1:0"), Target: w.app, Observer: &w.servers}
}

func (w *world) accept(st mux.Stream, open []byte) (mux.Handler, mux.Code) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.refuse) > 0 {
		code := w.refuse[0]
		w.refuse = w.refuse[1:]
		return nil, code
	}
	return w.in.Accept(st, w.origin()), 0
}

func (w *world) Dial(ctx context.Context, o Origin) (*net.TCPConn, error) {
	w.mu.Lock()
	w.dials++
	w.mu.Unlock()
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", o.Target.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

func (w *world) dialled() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.dials
}

var testHeader = make([]byte, 40)

func (w *world) Dispatch(ctx context.Context, x *Exchange, data []byte, fin bool, h mux.Handler) (mux.Stream, int, error) {
	x.Policy, x.Guard = w.policy, w.guard
	if w.noDial != nil {
		return mux.Stream{}, 0, w.noDial
	}
	return w.sessions[0].Open(testHeader, data, fin, h)
}

func (w *world) Plan(x *Exchange, head []byte) *Plan {
	if w.plan == nil {
		return nil
	}
	return w.plan(x, head)
}

func (w *world) Begin(x *Exchange) { w.clients.Begin(x) }
func (w *world) End(x *Exchange)   { w.clients.End(x) }

// dial connects a client.
func (w *world) dial() *net.TCPConn {
	w.t.Helper()
	c, err := net.Dial("tcp", w.addr)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(*net.TCPConn)
}
