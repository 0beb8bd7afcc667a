package proxy

import (
	"context"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/link"
	"assay.dev/proxy/http1"
	"assay.dev/proxy/mux"
	"golang.org/x/sys/unix"
)

// drain ends every stream at once, as a server does that answers nothing.
type drain struct{}

func (drain) Received(st mux.Stream, p []byte, fin bool) {
	st.Consumed(len(p))
	if fin {
		st.TryWrite(nil, true)
	}
}
func (drain) Reset(mux.Stream, mux.Code) {}
func (drain) Writable(mux.Stream)        {}

// ended tells that a stream's answer is complete.
type ended chan struct{}

func (e ended) Received(_ mux.Stream, _ []byte, fin bool) {
	if fin {
		e <- struct{}{}
	}
}
func (ended) Reset(mux.Stream, mux.Code) {}
func (ended) Writable(mux.Stream)        {}

// sessions makes two ends of a session that run until the test ends.
func sessions(t testing.TB, server mux.Config) (client *mux.Session) {
	fd, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i := range ends {
		f := os.NewFile(uintptr(fd[i]), "session")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	client = mux.New(ends[0], true, mux.Config{}, nil)
	far := mux.New(ends[1], false, server, func(mux.Stream, []byte) (mux.Handler, mux.Code) { return drain{}, 0 })
	var wg sync.WaitGroup
	wg.Go(func() { client.Run() })
	wg.Go(func() { far.Run() })
	t.Cleanup(func() { client.Close(nil); far.Close(nil); wg.Wait() })
	return client
}

// oneService is a dispatcher for a service whose one endpoint has a session.
func oneService(t testing.TB) *dispatcher {
	conn, far, err := link.Pair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); far.Close() })
	p := New(conn, Options{})
	svc := assay.Service{
		Namespace: "bank", Name: "web", VIPs: []netip.Addr{netip.MustParseAddr("10.182.0.1")}, Ports: []assay.Port{{Port: 80}},
		Endpoints: []assay.Endpoint{{
			Workload: "w", Identity: assay.Identity{TrustDomain: "bank.test", Namespace: "bank", Account: "web"},
			Addrs: []netip.Addr{netip.MustParseAddr("10.181.7.3")}, Targets: []uint16{8080},
		}},
	}
	p.snap.Store(p.snap.Load().withServices(link.Services{Version: 1, Full: true, Upsert: []assay.Service{svc}}, p))
	s := &session{p: p, mux: sessions(t, mux.Config{}), security: assay.MutualTLS, born: time.Now(), life: time.Hour}
	e := p.snap.Load().services.At("bank/web").ports[0].v4.Endpoints()[0]
	e.Value.(*peer).sessions.Store(&[]*session{s})
	o := &outbound{p: p, snap: p.snap.Load(), src: netip.MustParseAddrPort("10.181.7.2:40000"), dst: netip.MustParseAddrPort("10.182.0.1:80"), protocol: assay.HTTP1}
	if err := o.route(); err != nil {
		t.Fatal(err)
	}
	return &dispatcher{o: o, payload: o.header(assay.HTTP1).AppendTo(nil)}
}

// request does what the engine does for one request.
func request(t testing.TB, d *dispatcher, x *http1.Exchange, done ended) {
	x.Attempt, x.Tag = 0, nil
	d.Begin(x)
	if _, _, err := d.Dispatch(context.Background(), x, []byte("GET / HTTP/1.1\r\n\r\n"), true, done); err != nil {
		t.Fatal(err)
	}
	<-done
	x.Duration, x.Status, x.RequestBytes, x.ResponseBytes = time.Millisecond, 200, 18, 0
	d.End(x)
}

func TestRequestAllocatesNothing(t *testing.T) {
	d, x, done := oneService(t), &http1.Exchange{}, make(ended, 1)
	n := testing.AllocsPerRun(2000, func() { request(t, d, x, done) })
	if n >= 0.5 && !raceEnabled {
		t.Errorf("%v allocations for each request", n)
	}
	signals := d.o.p.rec.Signals()
	if len(signals) != 1 || signals[0].Requests != 2001 || signals[0].InFlight != 0 || signals[0].Service != "bank/web" {
		t.Errorf("counted %+v", signals)
	}
	if e := d.calls[0].endpoint; e.InFlight() != 0 {
		t.Errorf("%d in flight at the endpoint", e.InFlight())
	}
}

// TestBusyIsNoFault: who has as many requests under way as a session takes is told so, and
// the endpoint is not blamed for it.
func TestBusyIsNoFault(t *testing.T) {
	d := oneService(t)
	e := d.o.set.Endpoints()[0]
	s := &session{p: d.o.p, mux: sessions(t, mux.Config{MaxStreams: 1}), security: assay.MutualTLS, born: time.Now(), life: time.Hour}
	e.Value.(*peer).sessions.Store(&[]*session{s})
	refused := 0
	for deadline := time.Now().Add(time.Minute); refused < 10; { // until the peer's limit is known there is one of the protocol's
		x := &http1.Exchange{}
		d.Begin(x)
		_, _, err := d.Dispatch(context.Background(), x, []byte("POST / HTTP/1.1\r\n"), false, make(ended, 1))
		if f, ok := err.(*http1.Failure); ok {
			refused++
			if f.Reason != refusedHeldBack || f.RetryAfter == 0 {
				t.Fatalf("%+v", f)
			}
		} else if err != nil || time.Now().After(deadline) {
			t.Fatalf("%d were refused: %v", refused, err)
		}
	}
	if list := d.o.p.unfit(); len(list) > 0 {
		t.Errorf("%+v", list)
	}
}

// TestSnapshotKeepsEndpoints: what was learned about an endpoint and its sessions
// outlive a change of the service.
func TestSnapshotKeepsEndpoints(t *testing.T) {
	d := oneService(t)
	p := d.o.p
	was := p.snap.Load().services.At("bank/web")
	svc := was.Service
	svc.Endpoints = append(svc.Endpoints, assay.Endpoint{Workload: "x", Addrs: []netip.Addr{netip.MustParseAddr("10.181.7.4")}, Targets: []uint16{8080}})
	next := p.snap.Load().withServices(link.Services{Version: 2, Upsert: []assay.Service{svc}}, p)
	now := next.services.At("bank/web")
	if now.ports[0].memory != was.ports[0].memory || now.ports[0].v4.Endpoints()[0] != was.ports[0].v4.Endpoints()[0] {
		t.Error("an update forgot what was learned")
	}
	// It has one family, so both sets hold the same endpoint.
	if now.ports[0].v4.Endpoints()[0] != now.ports[0].v6.Endpoints()[0] {
		t.Error("one endpoint is two")
	}
	if next = next.withServices(link.Services{Version: 3, Remove: []string{"bank/web"}}, p); next.vips.Len() != 0 || next.targets.Len() != 0 {
		t.Error("a removed service can still be found")
	}
}

func TestNeverPlaintextToTheMesh(t *testing.T) {
	d := oneService(t)
	p := d.o.p
	s := *p.snap.Load()
	s.MeshPrefixes = []netip.Prefix{netip.MustParsePrefix("10.181.0.0/16"), netip.MustParsePrefix("10.182.0.0/16")}
	svc := assay.Service{Namespace: "bank", Name: "odd", VIPs: []netip.Addr{netip.MustParseAddr("10.182.0.9")}, Ports: []assay.Port{{Port: 1}},
		Endpoints: []assay.Endpoint{{Workload: "nobody", Addrs: []netip.Addr{netip.MustParseAddr("10.181.9.8")}, Targets: []uint16{1}}}}
	snap := s.withServices(link.Services{Version: 2, Full: true, Upsert: []assay.Service{svc}}, p)
	for dst, want := range map[string]string{
		"10.181.9.9:1": refusedUnknown,
		"10.182.9.9:1": refusedUnknown,
		"10.182.0.9:2": refusedNoPort,
		"10.182.0.9:1": refusedUnknown, // its endpoint claims to be nobody, at the mesh's own address
	} {
		p.snap.Store(snap)
		o := &outbound{p: p, ctx: t.Context(), snap: snap, dst: netip.MustParseAddrPort(dst)}
		err := o.route()
		if err == nil {
			err = o.open(nil, false)
		}
		if r, ok := err.(*refusal); !ok || r.reason != want || o.outside {
			t.Errorf("%s: %v, want %s", dst, err, want)
		}
	}
	o := &outbound{p: p, snap: snap, dst: netip.MustParseAddrPort("203.0.113.9:443")}
	if err := o.route(); err != nil || !o.outside {
		t.Errorf("outside: %v, %v", o.outside, err)
	}
}

func BenchmarkDispatch(b *testing.B) {
	d, x, done := oneService(b), &http1.Exchange{}, make(ended, 1)
	b.ReportAllocs()
	for b.Loop() {
		request(b, d, x, done)
	}
}
