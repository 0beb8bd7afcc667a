package api

import (
	"context"
	"errors"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"assay.dev"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

var (
	someTime = time.Date(2026, 3, 4, 5, 6, 7, 8000, time.UTC)
	digest   = assay.DigestOf([]byte("an executable"))
	payments = assay.Identity{TrustDomain: "bank.test", Namespace: "bank", Account: "payments"}
)

func fullWorkload() assay.Workload {
	return assay.Workload{
		ID: "payments-7f3a", Namespace: "bank", Name: "payments", Service: "payments", Host: "host-1", Identity: payments,
		Addrs:  []netip.Addr{netip.MustParseAddr("10.181.0.5"), netip.MustParseAddr("fd5a:5a59::5")},
		Labels: map[string]string{"app": "payments", "example.com/tier": "back"}, Ports: []uint16{8080, 9090}, Listening: []uint16{8080},
		Artifacts: assay.ArtifactSet{{Kind: assay.Executable, Name: "/usr/bin/python3", Digest: digest, Unproven: "an interpreter"},
			{Kind: assay.Image, Name: "shop:1", Digest: assay.DigestOf([]byte("manifest")), Config: assay.DigestOf([]byte("config")), Index: assay.DigestOf([]byte("index"))},
			{Kind: assay.Image, Name: "shop:2", Digest: assay.DigestOf([]byte("config 2")), Config: assay.DigestOf([]byte("config 2")), Unproven: "its manifest is away"}},
		MeshedSince: someTime, Draining: true, Zone: "west-1",
	}
}

func fullService() assay.Service {
	return assay.Service{
		Namespace: "bank", Name: "payments", VIPs: []netip.Addr{netip.MustParseAddr("10.182.0.1"), netip.MustParseAddr("fd5a:5a59:1::1")},
		Externals: []netip.Addr{netip.MustParseAddr("192.0.2.80")}, Affinity: time.Minute, Local: true,
		Ports: []assay.Port{{Name: "grpc", Port: 80, Protocol: assay.HTTP2, NodePort: 30080}, {Name: "admin", Port: 81}},
		Endpoints: []assay.Endpoint{{Workload: "payments-7f3a", Identity: payments,
			Addrs: []netip.Addr{netip.MustParseAddr("10.181.0.5")}, Targets: []uint16{8080, 0}, Zone: "west", Zones: []string{"Zone_1.a", "west"},
			Hosts: []string{"host-1"}, Host: "host-1"},
			{Workload: "not-meshed", Addrs: []netip.Addr{netip.MustParseAddr("10.244.0.5")}, Targets: []uint16{8080, 81}},
			{Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.5")}, Targets: []uint16{8080, 81}}},
		Policy: &assay.TrafficPolicy{Namespace: "bank", Name: "p", Services: []string{"payments"}, Timeout: time.Second, PanicPercent: -1,
			Retry: assay.RetryPolicy{Codes: []int{503}}, Inbound: assay.InboundPolicy{RateLimit: 2.5}},
	}
}

func fullReport() Report {
	s := assay.Signals{
		SignalKey: assay.SignalKey{Direction: assay.Inbound, Peer: payments, PeerArtifacts: digest, Service: "bank/ledger", Port: 80,
			Protocol: assay.HTTP1, Security: assay.MutualTLS, Reason: "r"},
		Requests: 1, Failures: 2, Opened: 3, BytesIn: 4, BytesOut: 5, Open: 6, InFlight: 7, FirstSeen: someTime, LastSeen: someTime.Add(time.Second),
	}
	s.Latency.Buckets[0], s.Latency.Buckets[9], s.Latency.Sum = 1, 2, time.Second
	return Report{Workload: "payments-7f3a", Started: someTime, Signals: []assay.Signals{s}, Counters: assay.Counters{
		Handshakes: 9, HandshakeFailures: map[string]uint64{"expired": 1}, Detections: map[string]uint64{"http1": 2}, Refusals: map[string]uint64{"strict": 3},
		Decisions: []assay.Decided{{Service: "bank/ledger", Decision: "eject", Count: 4}},
		Unfit:     []assay.Unfit{{Service: "bank/ledger", Workload: "ledger-1", Addr: "10.181.0.7:80", Ejected: true, Why: "5 failures in a row", Until: someTime}}}}
}

// wire sends a message through its encoding.
func wire[M proto.Message](t *testing.T, in, out M) M {
	t.Helper()
	b, err := proto.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	if err := proto.Unmarshal(b, out); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestRoundTrip(t *testing.T) {
	check := func(name string, got any, err error, want any) {
		t.Helper()
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v, %v\nwant %+v", name, got, err, want)
		}
	}
	w := fullWorkload()
	gotW, err := wire(t, FromWorkload(&w), &Workload{}).Noun()
	check("workload", gotW, err, w)
	s := fullService()
	gotS, err := wire(t, FromService(&s), &Service{}).Noun()
	check("service", gotS, err, s)
	headless := assay.Service{Namespace: "bank", Name: "x", Headless: true, Ports: []assay.Port{{Port: 1}}}
	gotS, err = wire(t, FromService(&headless), &Service{}).Noun()
	check("headless", gotS, err, headless)
	h := assay.Host{ID: "host-1", Name: "node1.example.com", Advertise: netip.MustParseAddr("192.0.2.1"), Covers: []string{"bank/*", "*/*"}, Ready: true, Zone: "west-1", Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")},
		Prefixes: []netip.Prefix{netip.MustParsePrefix("10.181.0.0/24"), netip.MustParsePrefix("fd5a:5a59::/80")}}
	gotH, err := wire(t, FromHost(&h), &Host{}).Noun()
	check("host", gotH, err, h)
	n := assay.NamespaceConfig{Namespace: "bank", Mode: assay.Strict, ExcludedPorts: []uint16{53}}
	gotN, err := wire(t, FromNamespaceConfig(&n), &NamespaceConfig{}).Noun()
	check("namespace", gotN, err, n)
	f := assay.Finding{Time: someTime, Workload: "payments-7f3a", Kind: "plaintext-from-meshed", Subject: "10.0.0.1", Detail: "d", Remedy: "r"}
	gotF, err := wire(t, FromFinding(&f), &Finding{}).Noun()
	check("finding", gotF, err, f)
	r := fullReport()
	gotR, err := wire(t, FromReport(&r), &WorkloadReport{}).Noun()
	check("report", gotR, err, r)
}

func TestRefusesWhatIsMalformed(t *testing.T) {
	v4, v6 := []byte{10, 181, 0, 5}, netip.MustParseAddr("fd5a:5a59::5").AsSlice()
	mapped := netip.MustParseAddr("::ffff:10.0.0.1").AsSlice()
	workload := func(change func(*Workload)) error {
		w := fullWorkload()
		m := FromWorkload(&w)
		change(m)
		_, err := m.Noun()
		return err
	}
	service := func(change func(*Service)) error {
		s := fullService()
		m := FromService(&s)
		change(m)
		_, err := m.Noun()
		return err
	}
	for name, tc := range map[string]struct {
		err  error
		want string
	}{
		"id":               {workload(func(m *Workload) { m.Id = "../x" }), "the ID may hold"},
		"host":             {workload(func(m *Workload) { m.Host = "" }), "not an ID"},
		"namespace":        {workload(func(m *Workload) { m.Namespace = "Bank" }), "namespace"},
		"foreign identity": {workload(func(m *Workload) { m.Identity = "spiffe://bank.test/ns/bank/sa/ledger" }), "is not that of bank/payments"},
		"infrastructure":   {workload(func(m *Workload) { m.Identity = "spiffe://bank.test/assay/host/host-1" }), "SPIFFE ID"},
		"no address":       {workload(func(m *Workload) { m.Addrs = nil }), "no address"},
		"short address":    {workload(func(m *Workload) { m.Addrs = [][]byte{{1, 2, 3}} }), "3 bytes"},
		"mapped":           {workload(func(m *Workload) { m.Addrs = [][]byte{mapped} }), "4 bytes"},
		"loopback":         {workload(func(m *Workload) { m.Addrs = [][]byte{{127, 0, 0, 1}} }), "nobody else"},
		"order":            {workload(func(m *Workload) { m.Addrs = [][]byte{v6, v4} }), "before IPv6"},
		"twice":            {workload(func(m *Workload) { m.Addrs = [][]byte{v4, v4} }), "twice"},
		"port":             {workload(func(m *Workload) { m.Ports = []uint32{70000} }), "port 70000"},
		"port 0":           {workload(func(m *Workload) { m.Listening = []uint32{0} }), "port 0"},
		"digest":           {workload(func(m *Workload) { m.Artifacts[0].Digest = "sha256:AA" }), "digest"},
		"artifact kind":    {workload(func(m *Workload) { m.Artifacts[0].Kind = "script" }), "none of"},
		"config":           {workload(func(m *Workload) { m.Artifacts[1].Config = "sha256:AA" }), "digest"},
		"index":            {workload(func(m *Workload) { m.Artifacts[1].Index = "latest" }), "digest"},
		"config, no image": {workload(func(m *Workload) { m.Artifacts[0].Config = m.Artifacts[1].Config }), "only an image"},
		"index, no image":  {workload(func(m *Workload) { m.Artifacts[0].Index = m.Artifacts[1].Index }), "only an image"},
		"manifest = index": {workload(func(m *Workload) { m.Artifacts[1].Index = m.Artifacts[1].Digest }), "its index is said to be"},
		"config = index":   {workload(func(m *Workload) { m.Artifacts[1].Index = m.Artifacts[1].Config }), "its index is said to be"},
		"manifest, config": {workload(func(m *Workload) { m.Artifacts[1].Config = m.Artifacts[1].Digest }), "its manifest is said to be"},
		"config in index":  {workload(func(m *Workload) { m.Artifacts[2].Index = m.Artifacts[1].Index }), "its manifest is said to be"},
		"many artifacts":   {workload(func(m *Workload) { m.Artifacts = make([]*Artifact, maxArtifacts+1) }), "artifacts"},
		"label":            {workload(func(m *Workload) { m.Labels = map[string]string{"": "x"} }), "label"},
		"time":             {workload(func(m *Workload) { m.MeshedSince = -1 }), "between 1970"},
		"targets":          {service(func(m *Service) { m.Endpoints[0].Targets = []uint32{1} }), "1 targets"},
		"endpoint's ID":    {service(func(m *Service) { m.Endpoints[0].Workload = "" }), "ID"},
		"plain one's ID":   {service(func(m *Service) { m.Endpoints[1].Workload = "a/b" }), "ID"},
		"no SPIFFE ID":     {service(func(m *Service) { m.Endpoints[1].Identity = "x" }), "SPIFFE"},
		"zone":             {service(func(m *Service) { m.Endpoints[0].Zones = []string{"a b"} }), "zone"},
		"endpoint's host":  {service(func(m *Service) { m.Endpoints[0].Hosts = []string{"a/b"} }), "not an ID"},
		"affinity":         {service(func(m *Service) { m.AffinitySeconds = 86401 }), "affinity"},
		"headless":         {service(func(m *Service) { m.Headless = true }), "headless"},
		"same port":        {service(func(m *Service) { m.Ports[1].Port = 80 }), "there twice"},
		"protocol":         {service(func(m *Service) { m.Ports[0].Protocol = "http3" }), "protocol"},
		"nil workload":     {func() error { _, err := (*Workload)(nil).Noun(); return err }(), "ID"},
	} {
		if tc.err == nil || !strings.Contains(tc.err.Error(), tc.want) {
			t.Errorf("%s: got %v, want an error with %q", name, tc.err, tc.want)
		}
	}
	for _, p := range []string{"10.181.0.1/24", "10.181.0.0/240", "10.181.0.0", "::ffff:10.0.0.0/112"} {
		if _, err := Prefixes([]string{p}); err == nil {
			t.Errorf("prefix %q accepted", p)
		}
	}
	for c, want := range map[string]bool{"*/*": true, "bank/*": true, "bank/ledger": true, "*/ledger": true, "bank": false, "bank/": false, "b*/x": false, "a/b/c": false} {
		if ValidCover(c) != want {
			t.Errorf("cover %q: got %v", c, !want)
		}
	}
}

func TestErrorsCrossTheWire(t *testing.T) {
	for kind := assay.Internal; kind <= assay.Unavailable; kind++ {
		in := &assay.Error{Kind: kind, Op: "apply x.yaml", Err: errors.New("line 3: no"), Remedy: "change it"}
		out := StatusError("call", ErrorStatus(in))
		if assay.KindOf(out) != kind || out.Error() != in.Error() {
			t.Errorf("%v: got %v (%v)", kind, out, assay.KindOf(out))
		}
	}
	if got := status.Code(ErrorStatus(context.DeadlineExceeded)); got != codes.DeadlineExceeded {
		t.Errorf("deadline: %v", got)
	}
	if got := StatusError("sync", status.Error(codes.Unauthenticated, "x")); assay.KindOf(got) != assay.Denied {
		t.Errorf("unauthenticated: %v", got)
	}
	if ErrorStatus(nil) != nil || StatusError("x", nil) != nil {
		t.Error("no error became one")
	}
}

// FuzzNouns reads arbitrary bytes as each message. What is accepted must survive
// a second trip unchanged: nothing is half understood.
func FuzzNouns(f *testing.F) {
	w, s, r := fullWorkload(), fullService(), fullReport()
	for _, m := range []proto.Message{FromWorkload(&w), FromService(&s), FromReport(&r)} {
		b, _ := proto.Marshal(m)
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		again(t, b, &Workload{}, (*Workload).Noun, func(v assay.Workload) *Workload { return FromWorkload(&v) })
		again(t, b, &Service{}, (*Service).Noun, func(v assay.Service) *Service { return FromService(&v) })
		again(t, b, &WorkloadReport{}, (*WorkloadReport).Noun, func(v Report) *WorkloadReport { return FromReport(&v) })
		again(t, b, &Host{}, (*Host).Noun, func(v assay.Host) *Host { return FromHost(&v) })
		again(t, b, &Finding{}, (*Finding).Noun, func(v assay.Finding) *Finding { return FromFinding(&v) })
		again(t, b, &NamespaceConfig{}, (*NamespaceConfig).Noun, func(v assay.NamespaceConfig) *NamespaceConfig { return FromNamespaceConfig(&v) })
	})
}

func again[M proto.Message, V any](t *testing.T, b []byte, m M, read func(M) (V, error), write func(V) M) {
	if proto.Unmarshal(b, m) != nil {
		return
	}
	v, err := read(m)
	if err != nil {
		return
	}
	v2, err := read(write(v))
	if err != nil || !reflect.DeepEqual(v, v2) {
		t.Errorf("%T: accepted once, then %v:\n%+v\n%+v", m, err, v, v2)
	}
}

func TestReportOf(t *testing.T) {
	r := FromReport(&Report{Workload: "w1", Signals: []assay.Signals{{SignalKey: assay.SignalKey{Direction: assay.Inbound, Protocol: assay.HTTP1, Security: assay.Plaintext}}}})
	encoded := ReportUpdate(r).GetReport()
	if got := ReportOf(encoded); got != "w1" {
		t.Errorf("of %q", got)
	}
	// Fields may come in any order.
	other, err := proto.Marshal(&WorkloadReport{Handshakes: 3, Counted: 7})
	if err != nil {
		t.Fatal(err)
	}
	if got := ReportOf(append(other, encoded...)); got != "w1" {
		t.Errorf("of %q, with the ID last", got)
	}
	for _, bad := range [][]byte{nil, {0xff}, encoded[:3], other, {0x0a, 2, '.', '.'}} {
		if got := ReportOf(bad); got != "" {
			t.Errorf("%x is of %q", bad, got)
		}
	}
	if _, err := ReadReport(encoded[:len(encoded)-1]); err == nil {
		t.Error("half a report is read")
	}
}
