package proxy

import (
	"context"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/link"
	"assay.dev/proxy/http1"
	"assay.dev/proxy/mux"
	"golang.org/x/sys/unix"
)

// meshedTable is one in which somebody has each address.
func meshedTable(t testing.TB, list ...netip.Addr) *link.AddressTable {
	t.Helper()
	var workloads []assay.Workload
	for _, a := range list {
		workloads = append(workloads, assay.Workload{
			ID: "w-" + a.String(), Namespace: "bank", Name: "w", Addrs: []netip.Addr{a}, MeshedSince: time.Now(),
			Identity: assay.Identity{TrustDomain: "bank.test", Namespace: "bank", Account: "w"},
		})
	}
	fd, err := link.BuildTable(1, workloads)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	own, err := unix.Dup(fd)
	if err != nil {
		t.Fatal(err)
	}
	table, err := link.OpenTable(own)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

// TestTableForbidsPlaintext: whoever asks, and whatever was chosen before, the newest
// table decides.
func TestTableForbidsPlaintext(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	to := l.Addr().(*net.TCPAddr).AddrPort()
	p := oneService(t).o.p
	p.ctx = t.Context()
	svc := assay.Service{Namespace: "bank", Name: "legacy", VIPs: []netip.Addr{netip.MustParseAddr("10.182.0.2")}, Ports: []assay.Port{{Port: 80}},
		Endpoints: []assay.Endpoint{{Addrs: []netip.Addr{to.Addr()}, Targets: []uint16{to.Port()}}}}
	p.snap.Store(p.snap.Load().withServices(link.Services{Version: 2, Upsert: []assay.Service{svc}}, p))
	e := p.snap.Load().services.At("bank/legacy").ports[0].v4.Endpoints()[0]
	pe, err := p.proven(e)
	if err != nil || !pe.plain() {
		t.Fatalf("not known to the table: %+v, %v", pe, err)
	}
	c, err := p.dialPlain(t.Context(), to)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	far := &session{p: p, local: to}
	header := (&Header{Protocol: assay.HTTP1, Port: 80}).AppendTo(nil)

	p.snap.Store(p.snap.Load().withTable(meshedTable(t, to.Addr()), 3))
	if _, err := p.dialPlain(t.Context(), to); err != errMeshed {
		t.Errorf("dial: %v", err)
	}
	if h, code := far.acceptPlain(mux.Stream{}, header); h != nil || code != mux.Refused {
		t.Errorf("a stream that was on its way: %v, %v", h, code)
	}
	if _, err := (application{p}).Dial(t.Context(), http1.Origin{Target: to}); err != errMeshed {
		t.Errorf("the engine dials: %v", err)
	}
	if pe, err = p.proven(e); err != nil || pe.plain() || pe.key.id.Account != "w" {
		t.Errorf("chosen again: %+v, %v", pe, err)
	}
	// Networks of the mesh's own are closed, known or not.
	s := *p.snap.Load()
	s.table, s.MeshPrefixes = nil, []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	p.snap.Store(&s)
	if _, err := p.dialPlain(t.Context(), to); err != errMeshed {
		t.Errorf("in a network of the mesh: %v", err)
	}
	if pe, err := p.proven(e); err == nil {
		t.Errorf("in a network of the mesh: %+v", pe)
	}
}

// TestHints: who is meant for other zones is left out, where there is somebody for this one.
func TestHints(t *testing.T) {
	for name, tc := range map[string]struct {
		zone string
		any  bool
		list []assay.Endpoint
		want []string
	}{
		"for this zone":             {"a", false, []assay.Endpoint{{Workload: "1", Zones: []string{"a", "b"}}, {Workload: "2", Zones: []string{"b"}}}, []string{"1"}},
		"for others alone":          {"c", false, []assay.Endpoint{{Workload: "1", Zones: []string{"a"}}, {Workload: "2", Zones: []string{"b"}}}, []string{"1", "2"}},
		"of no zone":                {"", false, []assay.Endpoint{{Workload: "1", Zones: []string{"a"}}, {Workload: "2", Zones: []string{"b"}}}, []string{"1", "2"}},
		"no hints":                  {"a", false, []assay.Endpoint{{Workload: "1"}, {Workload: "2"}}, []string{"1", "2"}},
		"the one for it is away":    {"a", false, []assay.Endpoint{{Workload: "1", Zones: []string{"a"}, Targets: []uint16{0}}, {Workload: "2", Zones: []string{"b"}}}, []string{"2"}},
		"the owner wants all zones": {"a", true, []assay.Endpoint{{Workload: "1", Zones: []string{"a"}}, {Workload: "2", Zones: []string{"b"}}}, []string{"1", "2"}},
	} {
		p := oneService(t).o.p
		s := p.snap.Load().withConfigure(link.Configure{Zone: tc.zone}, p)
		svc := assay.Service{Namespace: "bank", Name: "hinted", Headless: true, Ports: []assay.Port{{Port: 80}}}
		if tc.any {
			svc.Policy = &assay.TrafficPolicy{AnyZone: true}
		}
		for i, e := range tc.list {
			e.Addrs = []netip.Addr{netip.AddrFrom4([4]byte{10, 244, 0, byte(i)})}
			if e.Targets == nil {
				e.Targets = []uint16{8080}
			}
			svc.Endpoints = append(svc.Endpoints, e)
		}
		s = s.withServices(link.Services{Version: 2, Upsert: []assay.Service{svc}}, p)
		var got []string
		for _, e := range s.services.At("bank/hinted").ports[0].v4.Endpoints() {
			got = append(got, e.Workload)
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
	}
}

// TestUnmeshedRequestAllocatesNothing: the way to an endpoint that is not meshed costs no
// more than that to one that is.
func TestUnmeshedRequestAllocatesNothing(t *testing.T) {
	d, x, done := unmeshedService(t), &http1.Exchange{}, make(ended, 1)
	n := testing.AllocsPerRun(2000, func() { request(t, d, x, done) })
	if n >= 0.5 && !raceEnabled {
		t.Errorf("%v allocations for each request", n)
	}
	signals := d.o.p.rec.Signals()
	if len(signals) != 1 || signals[0].Security != assay.Plaintext || signals[0].Reason != assay.ReasonUnmeshed || signals[0].Remote != "10.244.0.3" || signals[0].Requests != 2001 {
		t.Errorf("counted %+v", signals)
	}
}

// unmeshedService is oneService whose endpoint is not meshed, in a table of others.
func unmeshedService(t testing.TB) *dispatcher {
	d := oneService(t)
	p := d.o.p
	p.ctx = context.Background()
	svc := p.snap.Load().services.At("bank/web").Service
	svc.Endpoints = []assay.Endpoint{{Addrs: []netip.Addr{netip.MustParseAddr("10.244.0.3")}, Targets: []uint16{8080}}}
	s := p.snap.Load().withServices(link.Services{Version: 2, Upsert: []assay.Service{svc}}, p)
	p.snap.Store(s.withTable(meshedTable(t, netip.MustParseAddr("10.244.0.1"), netip.MustParseAddr("10.244.0.9")), 2))
	if err := d.follow(); err != nil {
		t.Fatal(err)
	}
	e := p.snap.Load().services.At("bank/web").ports[0].v4.Endpoints()[0]
	e.Value.(*peer).sessions.Store(&[]*session{{
		p: p, mux: sessions(t, mux.Config{}), security: assay.Plaintext, reason: assay.ReasonUnmeshed, local: e.Addr, born: time.Now(), life: time.Hour,
	}})
	return d
}

// BenchmarkDispatchUnmeshed beside BenchmarkDispatch says what the table's word costs.
func BenchmarkDispatchUnmeshed(b *testing.B) {
	d, x, done := unmeshedService(b), &http1.Exchange{}, make(ended, 1)
	b.ReportAllocs()
	for b.Loop() {
		request(b, d, x, done)
	}
}
