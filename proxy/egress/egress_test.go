package egress

import (
	"crypto/tls"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"assay.dev"
)

// hello returns the first bytes of a real TLS client.
func hello(t testing.TB, name string) []byte {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	go tls.Client(a, &tls.Config{ServerName: name, InsecureSkipVerify: true}).Handshake()
	buf := make([]byte, 8<<10)
	b.SetReadDeadline(time.Now().Add(5 * time.Second))
	n := 0
	for n < 5 || n < 5+(int(buf[3])<<8|int(buf[4])) {
		k, err := b.Read(buf[n:])
		if err != nil {
			t.Fatal(err)
		}
		n += k
	}
	return buf[:n]
}

func TestClaimed(t *testing.T) {
	sni := hello(t, "Api.Example.com")
	bare := hello(t, "")
	for _, c := range []struct {
		name, in string
		want     Claim
		done     bool
	}{
		{"nothing", "", Claim{Protocol: assay.Opaque}, false},
		{"tls", string(sni), Claim{assay.TLS, "api.example.com", assay.BySNI}, true},
		{"tls and more", string(sni) + "early data", Claim{assay.TLS, "api.example.com", assay.BySNI}, true},
		{"tls cut short", string(sni[:len(sni)-1]), Claim{Protocol: assay.TLS}, false},
		{"tls without a name", string(bare), Claim{Protocol: assay.TLS}, true},
		{"http", "GET / HTTP/1.1\r\nAccept: */*\r\nhost:  Shop.Example.:8080 \r\n\r\n", Claim{assay.HTTP1, "shop.example", assay.ByHost}, true},
		{"head not ended", "GET / HTTP/1.1\r\nHost: shop.example\r\n", Claim{assay.HTTP1, "shop.example", assay.ByHost}, false},
		{"request line only", "GET / HTTP/1.1\r\n", Claim{Protocol: assay.HTTP1}, false},
		{"two hosts", "GET / HTTP/1.1\r\nHost: a.example\r\nHost: b.example\r\n\r\n", Claim{Protocol: assay.HTTP1}, true},
		{"an empty and another", "GET / HTTP/1.1\r\nHost:\r\nHost: b.example\r\n\r\n", Claim{Protocol: assay.HTTP1}, true},
		{"address", "GET / HTTP/1.1\r\nHost: 192.0.2.1:80\r\n\r\n", Claim{Protocol: assay.HTTP1}, true},
		{"IPv6", "GET / HTTP/1.1\r\nHost: [2001:db8::1]:80\r\n\r\n", Claim{Protocol: assay.HTTP1}, true},
		{"no name", "GET / HTTP/1.1\r\nHost: a b\r\n\r\n", Claim{Protocol: assay.HTTP1}, true},
		{"HTTP/1.0", "GET / HTTP/1.0\r\n\r\n", Claim{Protocol: assay.HTTP1}, true},
		{"tunnel", "CONNECT api.example:443 HTTP/1.1\r\nHost: api.example\r\n\r\n", Claim{Protocol: assay.HTTP1}, true},
		{"through a forward proxy", "GET http://api.example/ HTTP/1.1\r\nHost: api.example\r\n\r\n", Claim{Protocol: assay.HTTP1}, true},
		{"body", "POST / HTTP/1.1\r\n\r\nHost: a.example\r\n\r\n", Claim{Protocol: assay.HTTP1}, true},
		{"opaque", "\x00\x01\x02", Claim{Protocol: assay.Opaque}, true},
	} {
		if got, done := Claimed([]byte(c.in)); got != c.want || done != c.done {
			t.Errorf("%s: %+v, %v; want %+v, %v", c.name, got, done, c.want, c.done)
		}
	}
	for n := range len(sni) {
		if c, done := Claimed(sni[:n]); done || c.Name != "" {
			t.Fatalf("%d of %d bytes: %+v, %v", n, len(sni), c, done)
		}
	}
	endless := "GET / HTTP/1.1\r\n" + strings.Repeat("X: y\r\n", 4000)
	if _, done := Claimed([]byte(endless)); !done {
		t.Error("a head without an end is waited for for ever")
	}
}

func FuzzClaimed(f *testing.F) {
	f.Add(hello(f, "api.example.com"))
	f.Add([]byte("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n"))
	f.Add([]byte("CONNECT a:1 HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, p []byte) {
		c, done := Claimed(p)
		if c.Name != "" && (!assay.ValidDNSName(c.Name) || c.By == "") || c.Name == "" && c.By != "" {
			t.Fatalf("%+v", c)
		}
		// What is claimed stays claimed, whatever follows. (What is opaque may end its line.)
		if done && len(p) < maxHead && c.Protocol != assay.Opaque {
			if again, still := Claimed(append(p[:len(p):len(p)], "\r\nHost: b.example\r\n\r\n"...)); !still || again != c {
				t.Fatalf("%q: %+v, with more bytes %+v %v", p, c, again, still)
			}
		}
	})
}

func TestNames(t *testing.T) {
	now := time.Unix(1_700_000_000, 0)
	n := NewNames(func() time.Time { return now })
	a := netip.MustParseAddr("192.0.2.1")
	n.Add("API.example.", a, 5*time.Second)
	n.Add("www.example", netip.MustParseAddr("::ffff:192.0.2.1"), time.Hour)
	n.Add("bad name", a, time.Hour)
	if got := n.Of(a); !slices.Equal(got, []string{"www.example", "api.example"}) {
		t.Errorf("%q", got)
	}
	now = now.Add(minTTL + grace) // a short TTL lasts as long as programs keep it
	if got := n.Of(a); !slices.Equal(got, []string{"www.example"}) {
		t.Errorf("after its end: %q", got)
	}
	for i := range 20 {
		n.Add(fmt.Sprintf("n%d.example", i), a, time.Hour)
	}
	if got := n.Of(a); len(got) != maxNames || got[0] != "n19.example" {
		t.Errorf("many names: %q", got)
	}
	// Memory is bounded, and what is new finds room.
	for i := range 3 * MaxAddrs {
		last := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
		n.Add("x.example", last, time.Hour)
		if n.Len() > MaxAddrs || len(n.Of(last)) != 1 {
			t.Fatalf("%d addresses, the last one has %q", n.Len(), n.Of(last))
		}
	}
	now = now.Add(2 * maxTTL)
	n.Add("x.example", a, time.Hour)
	for range 100 {
		n.Add("y.example", netip.AddrFrom4([4]byte{11, 0, 0, byte(n.Len())}), time.Hour)
	}
	if n.Len() > MaxAddrs {
		t.Errorf("%d addresses", n.Len())
	}
}

func TestDecide(t *testing.T) {
	rules := []assay.EgressRule{
		{Name: "psp", Hosts: []string{"api.psp.example", "*.cdn.example"}, Ports: []uint16{443}},
		{Name: "old", Addresses: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("169.254.0.9/32")}, Ports: []uint16{25}},
		{Name: "others", Accounts: []string{"web"}, Hosts: []string{"web.example"}, Ports: []uint16{443}},
	}
	strict := NewPolicy(&assay.NamespaceConfig{Egress: assay.Strict, Allow: rules}, "payments")
	observe := NewPolicy(&assay.NamespaceConfig{Allow: rules}, "payments")
	sni := func(name string) Claim { return Claim{assay.TLS, name, assay.BySNI} }
	const at = "192.0.2.1:443"
	for _, c := range []struct {
		name   string
		policy *Policy
		addr   string
		names  []string
		claim  Claim
		spoken bool
		want   Decision
	}{
		{"observe, nothing known", observe, at, nil, Claim{}, true, Decision{Verdict: Allow}},
		{"observe, a name", observe, at, []string{"a.example"}, Claim{}, true, Decision{Verdict: Allow, Name: "a.example", By: "dns"}},
		{"observe, a claim", observe, at, []string{"a.example"}, sni("b.example"), true, Decision{Verdict: Allow, Name: "b.example", By: "sni"}},
		{"observe, proven", observe, at, []string{"a.example", "b.example"}, sni("b.example"), true, Decision{Verdict: Allow, Name: "b.example", By: "sni+dns"}},
		{"observe, listed", observe, at, []string{"api.psp.example"}, sni("api.psp.example"), true, Decision{Verdict: Allow, Listed: true, Name: "api.psp.example", By: "sni+dns"}},
		{"observe, a lie is not listed", observe, at, []string{"evil.example"}, sni("api.psp.example"), true, Decision{Verdict: Allow, Name: "api.psp.example", By: "sni"}},

		{"looked up", strict, at, []string{"api.psp.example"}, Claim{}, false, Decision{Verdict: Allow, Listed: true, Name: "api.psp.example", By: "dns"}},
		{"among others", strict, at, []string{"evil.example", "x.y.cdn.example"}, Claim{}, false, Decision{Verdict: Allow, Listed: true, Name: "x.y.cdn.example", By: "dns"}},
		{"and says so", strict, at, []string{"api.psp.example"}, sni("api.psp.example"), true, Decision{Verdict: Allow, Listed: true, Name: "api.psp.example", By: "sni+dns"}},
		{"and says another", strict, at, []string{"api.psp.example"}, sni("evil.example"), true, Decision{Verdict: Refuse, Name: "evil.example", By: "sni"}},
		{"and another of this address", strict, at, []string{"api.psp.example", "evil.example"}, sni("evil.example"), true, Decision{Verdict: Refuse, Name: "evil.example", By: "sni+dns"}},
		{"lies about the name", strict, at, []string{"evil.example"}, sni("api.psp.example"), true, Decision{Verdict: Unknown, Name: "api.psp.example", By: "sni", Resolve: []string{"api.psp.example"}}},
		{"not looked up, silent yet", strict, at, nil, Claim{}, false, Decision{Verdict: Unknown}},
		{"not looked up, names itself", strict, at, nil, sni("a.cdn.example"), true, Decision{Verdict: Unknown, Name: "a.cdn.example", By: "sni", Resolve: []string{"a.cdn.example"}}},
		{"not looked up, not listed", strict, at, nil, sni("a.example"), true, Decision{Verdict: Refuse, Name: "a.example", By: "sni"}},
		{"names nobody", strict, at, nil, Claim{Protocol: assay.Opaque}, true, Decision{Verdict: Unknown, Resolve: []string{"api.psp.example"}}},
		{"another port", strict, "192.0.2.1:80", []string{"api.psp.example"}, Claim{}, false, Decision{Verdict: Refuse, Name: "api.psp.example", By: "dns"}},
		{"the wildcard's own name", strict, at, []string{"cdn.example"}, sni("cdn.example"), true, Decision{Verdict: Refuse, Name: "cdn.example", By: "sni+dns"}},
		{"a name that ends like it", strict, at, []string{"evilcdn.example"}, sni("evilcdn.example"), true, Decision{Verdict: Refuse, Name: "evilcdn.example", By: "sni+dns"}},
		{"another account's", strict, at, []string{"web.example"}, sni("web.example"), true, Decision{Verdict: Refuse, Name: "web.example", By: "sni+dns"}},
		{"by address", strict, "198.51.100.7:25", nil, Claim{}, false, Decision{Verdict: Allow, Listed: true}},
		{"by address, whatever it says", strict, "198.51.100.7:25", nil, sni("evil.example"), true, Decision{Verdict: Allow, Listed: true, Name: "evil.example", By: "sni"}},
		{"by address, another port", strict, "198.51.100.7:26", nil, Claim{}, false, Decision{Verdict: Refuse}},
		{"metadata by a name", strict, "169.254.169.254:443", []string{"api.psp.example"}, sni("api.psp.example"), true, Decision{Verdict: Refuse, Name: "api.psp.example", By: "sni+dns"}},
		{"metadata by its address", strict, "169.254.0.9:25", nil, Claim{}, false, Decision{Verdict: Allow, Listed: true}},
	} {
		got := c.policy.Decide(netip.MustParseAddrPort(c.addr), c.names, c.claim, c.spoken)
		if fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
	if NewPolicy(&assay.NamespaceConfig{Egress: assay.Strict}, "x").Decide(netip.MustParseAddrPort(at), nil, Claim{}, false).Verdict != Refuse {
		t.Error("no rules, and something is allowed")
	}
}
