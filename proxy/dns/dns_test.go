package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"assay.dev"
	"go.uber.org/goleak"
	"golang.org/x/net/dns/dnsmessage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// list is a few services.
type list []*assay.Service

func (l list) Service(key string) *assay.Service {
	return l.find(func(s *assay.Service) bool { return s.Key() == key })
}

func (l list) Owner(a netip.Addr) *assay.Service {
	return l.find(func(s *assay.Service) bool { return slices.Contains(s.VIPs, a) })
}

func (l list) find(is func(*assay.Service) bool) *assay.Service {
	if i := slices.IndexFunc(l, is); i >= 0 {
		return l[i]
	}
	return nil
}

func zone(upstreams ...netip.AddrPort) *Snapshot {
	return NewSnapshot("bank", "mesh.test", list{
		{Namespace: "bank", Name: "ledger", VIPs: addrs("10.182.0.1", "fd5a:5a59:1::1"), Ports: []assay.Port{{Name: "http", Port: 80}}},
		{Namespace: "bank", Name: "old", VIPs: addrs("10.182.0.2")},
		{Namespace: "shop", Name: "ledger", VIPs: addrs("10.182.0.3")},
		{Namespace: "bank", Name: "events", Headless: true, Ports: []assay.Port{{Port: 4222}}, Endpoints: []assay.Endpoint{
			{Addrs: addrs("10.181.7.2", "fd5a:5a59::7:0:2"), Targets: []uint16{4222}},
			{Addrs: addrs("10.181.7.3"), Targets: []uint16{0}},
			{Addrs: addrs("10.181.7.4"), Targets: []uint16{4222}},
		}},
	}, upstreams)
}

func server(t *testing.T, s *Snapshot) *Server {
	return NewServer(Options{Snapshot: func() *Snapshot { return s }, Log: slog.New(slog.DiscardHandler)})
}

// query packs a question, with EDNS0 when size is over 0.
func query(name string, kind dnsmessage.Type, size int) []byte {
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 77, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName(name), Type: kind, Class: dnsmessage.ClassINET}},
	}
	if size > 0 {
		var h dnsmessage.ResourceHeader
		h.SetEDNS0(size, 0, true)
		m.Additionals = []dnsmessage.Resource{{Header: h, Body: &dnsmessage.OPTResource{}}}
	}
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

// text is an answer in one line.
func text(t testing.TB, msg []byte) string {
	t.Helper()
	var m dnsmessage.Message
	if err := m.Unpack(msg); err != nil {
		t.Fatalf("answer cannot be read: %v", err)
	}
	if m.ID != 77 || !m.Response || len(m.Questions) != 1 {
		t.Errorf("header %+v", m.Header)
	}
	out := strings.TrimPrefix(m.RCode.String(), "RCode")
	if m.Truncated {
		out += " TC"
	}
	for _, a := range m.Answers {
		switch b := a.Body.(type) {
		case *dnsmessage.AResource:
			out += " " + netip.AddrFrom4(b.A).String()
		case *dnsmessage.AAAAResource:
			out += " " + netip.AddrFrom16(b.AAAA).String()
		case *dnsmessage.PTRResource:
			out += " " + b.PTR.String()
		case *dnsmessage.SRVResource:
			out += fmt.Sprintf(" %s:%d", b.Target, b.Port)
		}
		if a.Header.TTL > 5 {
			t.Errorf("TTL %d", a.Header.TTL)
		}
	}
	return out
}

func TestNames(t *testing.T) {
	const a, aaaa, ptr, srv, mx = dnsmessage.TypeA, dnsmessage.TypeAAAA, dnsmessage.TypePTR, dnsmessage.TypeSRV, dnsmessage.TypeMX
	s := server(t, zone())
	for _, c := range []struct {
		name string
		kind dnsmessage.Type
		want string // "" is for the upstreams
	}{
		{"ledger.", a, "Success 10.182.0.1"},
		{"LEDGER.", a, "Success 10.182.0.1"},
		{"ledger.", aaaa, "Success fd5a:5a59:1::1"},
		{"ledger.", mx, "Success"},
		{"ledger.bank.", a, "Success 10.182.0.1"},
		{"ledger.shop.", a, "Success 10.182.0.3"},
		{"ledger.shop.svc.", a, "Success 10.182.0.3"},
		{"ledger.shop.svc.mesh.test.", a, "Success 10.182.0.3"},
		{"old.", aaaa, "Success"}, // no data, not no name
		{"events.", a, "Success 10.181.7.2 10.181.7.4"},
		{"events.bank.svc.mesh.test.", aaaa, "Success fd5a:5a59::7:0:2"},
		{"nobody.", a, ""},
		{"nobody.bank.", a, ""},
		{"_grpc_config.ledger.", dnsmessage.TypeTXT, "NameError"},
		{"_grpc_config.ledger.bank.", dnsmessage.TypeTXT, "NameError"},
		{"_grpc_config.example.org.", dnsmessage.TypeTXT, ""},
		{"nobody.bank.svc.", a, "NameError"},
		{"nobody.bank.svc.mesh.test.", aaaa, "NameError"},
		{"bank.svc.mesh.test.", a, "NameError"},
		{"x.ledger.bank.svc.mesh.test.", a, "NameError"},
		{"ledger.example.", a, ""},
		{"_http._tcp.ledger.bank.svc.mesh.test.", srv, "Success ledger.bank.svc.mesh.test.:80"},
		{"_80._tcp.ledger.", srv, "Success ledger.bank.svc.mesh.test.:80"},
		{"_smtp._tcp.ledger.", srv, "NameError"},
		{"1.0.182.10.in-addr.arpa.", ptr, "Success ledger.bank.svc.mesh.test."},
		{"1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.1.0.0.0.9.5.a.5.a.5.d.f.ip6.arpa.", ptr, "Success ledger.bank.svc.mesh.test."},
		{"9.9.182.10.in-addr.arpa.", ptr, ""},
		{".", a, ""},
	} {
		r, msg := s.parse(query(c.name, c.kind, 0), true)
		if c.want == "" {
			if r.forward || text(t, msg) != "ServerFailure" { // there is no upstream here
				t.Errorf("%s %s: %v %s", c.name, c.kind, r.forward, text(t, msg))
			}
			continue
		}
		if got := text(t, msg); got != c.want {
			t.Errorf("%s %s: %s, want %s", c.name, c.kind, got, c.want)
		}
	}
}

func TestSizes(t *testing.T) {
	svc := &assay.Service{Namespace: "bank", Name: "many", Headless: true}
	for i := range 100 {
		svc.Endpoints = append(svc.Endpoints, assay.Endpoint{Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 181, 9, byte(i)})}, Targets: []uint16{1}})
	}
	s := server(t, NewSnapshot("bank", "", list{svc}, nil))
	for _, c := range []struct {
		size int
		udp  bool
		want string
		n    int
	}{{0, true, "Success TC", 0}, {1232, true, "Success TC", 0}, {4096, true, "Success TC", 0}, {0, false, "", 100}} {
		_, msg := s.parse(query("many.", dnsmessage.TypeA, c.size), c.udp)
		got := text(t, msg)
		if c.udp && (got != c.want || len(msg) > max(c.size, 512)) || !c.udp && strings.Count(got, "10.181.9.") != c.n {
			t.Errorf("EDNS0 %d, UDP %v: %.60s", c.size, c.udp, got)
		}
	}
	_, msg := s.parse(query("nobody.bank.svc.", dnsmessage.TypeA, 1232), true)
	var m dnsmessage.Message
	if m.Unpack(msg); len(m.Additionals) != 1 || m.Additionals[0].Header.Type != dnsmessage.TypeOPT {
		t.Error("a query with EDNS0 was answered without (RFC 6891 section 6.1.1)")
	}
}

// upstream is a resolver that knows one name.
type upstream struct {
	udp  *net.UDPConn
	tcp  *net.TCPListener
	ids  sync.Map
	udps atomic.Int64
}

func newUpstream(t *testing.T, answer func(q dnsmessage.Message, tcp bool) *dnsmessage.Message) *upstream {
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	u := &upstream{tcp: l}
	if u.udp, err = net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: l.Addr().(*net.TCPAddr).Port}); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := u.udp.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			u.udps.Add(1)
			var q dnsmessage.Message
			if q.Unpack(buf[:n]) != nil {
				continue
			}
			u.ids.Store(q.ID, true)
			if a := answer(q, false); a != nil {
				// First what an attacker would send: the wrong ID, the wrong question.
				forged := *a
				forged.ID++
				b, _ := forged.Pack()
				u.udp.WriteToUDPAddrPort(b, from)
				b, _ = a.Pack()
				u.udp.WriteToUDPAddrPort(b, from)
			}
		}
	})
	wg.Go(func() {
		for {
			c, err := u.tcp.Accept()
			if err != nil {
				return
			}
			var size [2]byte
			io.ReadFull(c, size[:])
			b := make([]byte, binary.BigEndian.Uint16(size[:]))
			io.ReadFull(c, b)
			var q dnsmessage.Message
			if q.Unpack(b) == nil {
				b, _ = answer(q, true).Pack()
				c.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...))
			}
			c.Close()
		}
	})
	t.Cleanup(func() { u.udp.Close(); u.tcp.Close(); wg.Wait() })
	return u
}

func (u *upstream) addr() netip.AddrPort { return u.tcp.Addr().(*net.TCPAddr).AddrPort() }

// reply answers with n addresses, over UDP cut short when they are many.
func reply(q dnsmessage.Message, tcp bool) *dnsmessage.Message {
	m := &dnsmessage.Message{Header: dnsmessage.Header{ID: q.ID, Response: true, RecursionAvailable: true}, Questions: q.Questions}
	n := 1
	if strings.HasPrefix(q.Questions[0].Name.String(), "big") {
		if !tcp {
			m.Truncated = true
			return m
		}
		n = 200
	}
	for i := range n {
		r, _ := addressRecord(q.Questions[0].Name, netip.AddrFrom4([4]byte{203, 0, 113, byte(i)}))
		m.Answers = append(m.Answers, r)
	}
	return m
}

// listen serves on real sockets.
func listen(t *testing.T, s *Server) netip.AddrPort {
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: l.Addr().(*net.TCPAddr).Port})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { s.ServeUDP(ctx, udp) })
	wg.Go(func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			wg.Go(func() { s.ServeTCP(ctx, c) })
		}
	})
	t.Cleanup(func() { cancel(); l.Close(); wg.Wait() })
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func resolver(at netip.AddrPort) *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, at.String())
	}}
}

// TestResolver asks over sockets as a program does: A and AAAA at the same time,
// over TCP when an answer is cut short.
func TestResolver(t *testing.T) {
	dead := netip.MustParseAddrPort("127.0.0.1:1") // refuses: the next one is asked
	up := newUpstream(t, reply)
	at := listen(t, server(t, zone(dead, up.addr())))
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	r := resolver(at)
	for name, want := range map[string][]string{
		"ledger.":          {"10.182.0.1", "fd5a:5a59:1::1"},
		"events.bank.":     {"10.181.7.2", "10.181.7.4", "fd5a:5a59::7:0:2"},
		"www.example.com.": {"203.0.113.0"},
	} {
		got, err := r.LookupHost(ctx, name)
		slices.Sort(got)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %v, %v; want %v", name, got, err, want)
		}
	}
	got, err := r.LookupIP(ctx, "ip4", "big.example.com.")
	if err != nil || len(got) != 200 {
		t.Errorf("big.example.com: %d addresses, %v", len(got), err)
	}
	if _, err := r.LookupHost(ctx, "nobody.bank.svc.mesh.test."); !isNotFound(err) {
		t.Errorf("nobody: %v", err)
	}
	names, err := r.LookupAddr(ctx, "10.182.0.1")
	if err != nil || !slices.Equal(names, []string{"ledger.bank.svc.mesh.test."}) {
		t.Errorf("reverse: %v, %v", names, err)
	}
	_, srv, err := r.LookupSRV(ctx, "http", "tcp", "ledger.bank.svc.mesh.test.")
	if err != nil || len(srv) != 1 || srv[0].Port != 80 {
		t.Errorf("SRV: %v, %v", srv, err)
	}
	n := 0
	up.ids.Range(func(any, any) bool { n++; return true })
	if n < 3 {
		t.Errorf("%d queries have %d different IDs", up.udps.Load(), n)
	}
}

func isNotFound(err error) bool {
	e, ok := errors.AsType[*net.DNSError](err)
	return ok && e.IsNotFound
}

// TestNoUpstreamAnswers: SERVFAIL in time, and nothing is left behind.
func TestNoUpstreamAnswers(t *testing.T) {
	silent := newUpstream(t, func(dnsmessage.Message, bool) *dnsmessage.Message { return nil })
	at := listen(t, server(t, zone(silent.addr())))
	c, err := net.Dial("udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	c.Write(query("www.example.com.", dnsmessage.TypeA, 0))
	buf := make([]byte, 2048)
	n, err := c.Read(buf)
	if err != nil || text(t, buf[:n]) != "ServerFailure" {
		t.Fatalf("%v", err)
	}
}

func TestRefusesNonsense(t *testing.T) {
	s := server(t, zone())
	good := query("ledger.", dnsmessage.TypeA, 0)
	answer := slices.Clone(good)
	answer[2] |= 0x80
	status := slices.Clone(good)
	status[2] |= 2 << 3
	none := slices.Clone(good[:12])
	none[5] = 0
	for name, c := range map[string]struct {
		in   []byte
		want dnsmessage.RCode
		no   bool
	}{
		"an answer":    {in: answer, no: true},
		"a fragment":   {in: good[:5], no: true},
		"an opcode":    {in: status, want: dnsmessage.RCodeNotImplemented},
		"no question":  {in: none, want: dnsmessage.RCodeFormatError},
		"cut question": {in: good[:len(good)-3], want: dnsmessage.RCodeFormatError},
	} {
		r, msg := s.parse(c.in, true)
		if c.no {
			if msg != nil || r.forward {
				t.Errorf("%s was answered", name)
			}
			continue
		}
		var m dnsmessage.Message
		if err := m.Unpack(msg); err != nil || m.RCode != c.want || m.ID != 77 {
			t.Errorf("%s: %v, %v", name, m.RCode, err)
		}
	}
}

func FuzzDNS(f *testing.F) {
	f.Add(query("ledger.", dnsmessage.TypeA, 0), true)
	f.Add(query("events.bank.svc.mesh.test.", dnsmessage.TypeALL, 1232), true)
	f.Add(query("1.0.182.10.in-addr.arpa.", dnsmessage.TypePTR, 0), false)
	f.Add(query("_http._tcp.ledger.", dnsmessage.TypeSRV, 4096), true)
	snap := zone(netip.MustParseAddrPort("127.0.0.1:1"))
	s := NewServer(Options{Snapshot: func() *Snapshot { return snap }, Log: slog.New(slog.DiscardHandler)})
	f.Fuzz(func(t *testing.T, p []byte, udp bool) {
		r, msg := s.parse(p, udp)
		if msg == nil {
			return
		}
		var m dnsmessage.Message
		if err := m.Unpack(msg); err != nil {
			t.Fatalf("%x is answered with what cannot be read: %v", p, err)
		}
		if !m.Response || m.ID != r.header.ID || len(msg) > r.limit {
			t.Fatalf("answer of %d bytes, limit %d: %+v", len(msg), r.limit, m.Header)
		}
	})
}
