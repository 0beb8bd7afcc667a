package http2

import (
	"cmp"
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

// patience is how long a test waits for what must come: machines are busy.
const patience = time.Minute

// pooled says that pools hold what they are given.
var pooled = true

// world is an application behind the mesh: connections to addr reach app through
// Outbound, a session under TLS, and Inbound.
type world struct {
	t    testing.TB
	addr string
	app  netip.AddrPort
	out  *Outbound
	in   *Inbound

	mu         sync.Mutex
	sessions   [2]*mux.Session
	dials      int // to the application
	dispatch   int
	refuse     []mux.Code // what the next streams are refused with
	slow       bool       // the first try of each dispatch would have to wait
	elsewhere  bool       // requests go where their authority says
	policy     *guard.Request
	guard      *guard.Service
	noDial     error
	inbound    InboundConfig
	clients    record // of the outbound side
	servers    record // of the inbound side
	served     chan error
	plan       func(x *Exchange) *Plan
	hoarders   crowd
	dispatcher Dispatcher // in the world's place; nil: the world
}

// record is an Observer that keeps what it is told.
type record struct {
	mu      sync.Mutex
	began   int
	heads   []Head
	ended   []Exchange
	refused []*Refusal
	silent  bool
	change  chan struct{}
}

func (r *record) Begin(x *Exchange) {
	if r.silent {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.began++
	h := *x.Request
	h.Fields = append([]Field(nil), h.Fields...)
	r.heads = append(r.heads, h)
}

func (r *record) End(x *Exchange) {
	if r.silent {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = append(r.ended, *x)
	r.signal()
}

func (r *record) Refused(why *Refusal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refused = append(r.refused, why)
	r.signal()
}

func (r *record) signal() {
	select {
	case r.change <- struct{}{}:
	default:
	}
}

// wait returns what was recorded once n exchanges have ended.
func (r *record) wait(t testing.TB, n int) []Exchange {
	t.Helper()
	r.until(t, "exchanges", func() bool { return len(r.ended) >= n })
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Exchange(nil), r.ended...)
}

// waitRefused returns the reason of the first connection that was refused.
func (r *record) waitRefused(t testing.TB) string {
	t.Helper()
	r.until(t, "a refused connection", func() bool { return len(r.refused) > 0 })
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.refused[0].Reason
}

func (r *record) until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(patience)
	for {
		r.mu.Lock()
		done, n := ok(), len(r.ended)
		r.mu.Unlock()
		if done {
			return
		}
		select {
		case <-r.change:
		case <-deadline:
			t.Fatalf("waited for %s; %d exchanges ended", what, n)
		}
	}
}

type option func(*world)

func unencrypted(w *world) { w.sessions[0] = nil; w.served = nil }

func newWorld(t testing.TB, app string, options ...option) *world {
	w := &world{t: t, app: netip.MustParseAddrPort(app), out: &Outbound{}, served: make(chan error, 10000)}
	w.clients.change, w.servers.change = make(chan struct{}, 1), make(chan struct{}, 1)
	for _, o := range options {
		o(w)
	}
	plain := w.served == nil
	w.served = make(chan error, 10000)
	w.in = NewInbound(w, w.inbound)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { w.in.Run(ctx) })
	w.connect(&running, plain)
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
				err := w.out.Serve(ctx, c.(*net.TCPConn), cmp.Or[Dispatcher](w.dispatcher, w))
				select {
				case w.served <- err:
				default:
				}
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		cancel()
		w.mu.Lock()
		sessions := w.sessions
		w.mu.Unlock()
		for _, s := range sessions {
			s.Close(errors.New("test over"))
		}
		running.Wait()
	})
	return w
}

// connect makes the session between the two.
func (w *world) connect(running *sync.WaitGroup, plain bool) {
	c, s := pairtest.TCP(w.t)
	a, b := net.Conn(mux.NewSocket(c)), net.Conn(mux.NewSocket(s))
	if !plain {
		a, b = pairtest.TLS(w.t, a, b)
	}
	w.sessions[0] = mux.New(a, true, mux.Config{}, nil)
	w.sessions[1] = mux.New(b, false, mux.Config{}, w.accept)
	for _, s := range w.sessions {
		running.Go(func() { s.Run() })
	}
}

func (w *world) accept(st mux.Stream, open []byte) (mux.Handler, mux.Code) {
	w.mu.Lock()
	if len(w.refuse) > 0 {
		code := w.refuse[0]
		w.refuse = w.refuse[1:]
		w.mu.Unlock()
		return nil, code
	}
	w.mu.Unlock()
	target := w.app
	if w.elsewhere {
		target = netip.MustParseAddrPort(string(open))
	}
	return w.in.Accept(st, Origin{Client: netip.MustParseAddrPort("127.0.0.1:0"), Target: target, Observer: &w.servers})
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

func (w *world) Dispatch(ctx context.Context, x *Exchange, data []byte, fin bool, h mux.Handler, batch *mux.Batch, wait bool) (mux.Stream, int, error) {
	w.mu.Lock()
	w.dispatch++
	slow, no := w.slow, w.noDial
	x.Policy, x.Guard = w.policy, w.guard
	w.mu.Unlock()
	if x.Request.Method == "" || len(x.Request.Fields) == 0 {
		w.t.Error("Dispatch without a head")
	}
	if slow && !wait {
		return mux.Stream{}, 0, ErrWait
	}
	if no != nil {
		return mux.Stream{}, 0, no
	}
	if batch != nil {
		batch.Hold(w.sessions[0])
	}
	open := testHeader
	if w.elsewhere {
		open = []byte(x.Request.Authority)
	}
	return w.sessions[0].Open(open, data, fin, h)
}

func (w *world) Plan(x *Exchange) *Plan {
	if w.plan == nil {
		return nil
	}
	return w.plan(x)
}

func (w *world) Begin(x *Exchange)    { w.clients.Begin(x) }
func (w *world) End(x *Exchange)      { w.clients.End(x) }
func (w *world) Refused(why *Refusal) { w.clients.Refused(why) }

// dial connects a client.
func (w *world) dial() *net.TCPConn {
	w.t.Helper()
	c, err := net.Dial("tcp", w.addr)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}
