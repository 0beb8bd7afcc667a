package mux

import (
	"crypto/tls"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"assay.dev/proxy/pairtest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pair is two sessions that talk to each other, and their ends.
type pair struct {
	client, server *Session
	ended          [2]chan error
	wg             sync.WaitGroup
}

// transports are the connections that every test of behaviour runs over.
var transports = map[string]func(t testing.TB) (client, server net.Conn){
	"pipe":   func(testing.TB) (net.Conn, net.Conn) { a, b := net.Pipe(); return a, b },
	"tcp":    func(t testing.TB) (net.Conn, net.Conn) { a, b := pairtest.TCP(t); return plain{a}, plain{b} },
	"socket": func(t testing.TB) (net.Conn, net.Conn) { a, b := pairtest.TCP(t); return NewSocket(a), NewSocket(b) },
	"tls":    func(t testing.TB) (net.Conn, net.Conn) { return secure(t) },
}

// plain hides that a connection is TCP, so that writes may block.
type plain struct{ net.Conn }

// secure is TLS over a Socket, as between two proxies.
func secure(t testing.TB) (client, server *tls.Conn) {
	a, b := pairtest.TCP(t)
	return pairtest.TLS(t, NewSocket(a), NewSocket(b))
}

func overAll(t *testing.T, f func(t *testing.T, client, server net.Conn)) {
	for name, dial := range transports {
		t.Run(name, func(t *testing.T) {
			c, s := dial(t)
			f(t, c, s)
		})
	}
}

func start(t testing.TB, c, s net.Conn, ccfg, scfg Config, accept, clientAccept Accept) *pair {
	t.Helper()
	p := &pair{client: New(c, true, ccfg, clientAccept), server: New(s, false, scfg, accept)}
	for i, x := range []*Session{p.client, p.server} {
		p.ended[i] = make(chan error, 1)
		p.wg.Go(func() { p.ended[i] <- x.Run() })
	}
	t.Cleanup(func() {
		p.client.Close(nil) // the server hears of it: over a pipe two that say goodbye do not listen
		p.wg.Wait()
	})
	return p
}

// call is a handler that gathers what arrives. It consumes at once unless hold.
type call struct {
	mu       sync.Mutex
	cond     *sync.Cond
	got      []byte
	fin      bool
	reset    Code
	writable int
	hold     bool
	inside   bool
	bad      string // a broken promise of the session
	onData   func(st Stream, p []byte, fin bool)
}

func newCall() *call { h := &call{}; h.cond = sync.NewCond(&h.mu); return h }

func (h *call) enter() {
	h.mu.Lock()
	if h.inside {
		h.bad = "handler called concurrently"
	}
	if h.reset != 0 {
		h.bad = "handler called after Reset"
	}
	h.inside = true
	h.mu.Unlock()
}

func (h *call) leave() {
	h.inside = false
	h.cond.Broadcast()
	h.mu.Unlock()
}

func (h *call) Received(st Stream, p []byte, fin bool) {
	h.enter()
	if h.onData != nil {
		h.onData(st, p, fin)
	}
	h.mu.Lock()
	if h.fin {
		h.bad = "Received after fin"
	}
	h.got = append(h.got, p...)
	h.fin = fin
	if !h.hold {
		st.Consumed(len(p))
	}
	h.leave()
}

func (h *call) Reset(st Stream, code Code) {
	h.enter()
	h.mu.Lock()
	h.reset = code
	h.leave()
}

func (h *call) Writable(st Stream) {
	h.enter()
	h.mu.Lock()
	h.writable++
	h.leave()
}

// until waits for a condition on h, which is locked meanwhile.
func (h *call) until(t testing.TB, what string, ok func() bool) {
	t.Helper()
	stop := time.AfterFunc(10*time.Second, h.cond.Broadcast)
	defer stop.Stop()
	deadline := time.Now().Add(10 * time.Second)
	h.mu.Lock()
	defer h.mu.Unlock()
	for !ok() && h.bad == "" {
		if !time.Now().Before(deadline) {
			t.Fatalf("waited 10 s for %s; have %d bytes, fin %v, reset %v, writable %d", what, len(h.got), h.fin, h.reset, h.writable)
		}
		h.cond.Wait()
	}
	if h.bad != "" {
		t.Fatal(h.bad)
	}
}

func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(200 * time.Microsecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited 10 s for %s", what)
		}
	}
}
