package wire

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"io"
	"math/big"
	mrand "math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const marker = "XX00ASSAYBANK"

var (
	client4 = netip.MustParseAddrPort("10.181.0.2:40000")
	server4 = netip.MustParseAddrPort("10.181.0.3:8080")
	client6 = netip.MustParseAddrPort("[fd5a:5a59::2]:40000")
	server6 = netip.MustParseAddrPort("[fd5a:5a59::3]:8080")
)

// tcp makes a packet.
func tcp(src, dst netip.AddrPort, seq uint32, flags byte, payload string) []byte {
	h := make([]byte, 20)
	binary.BigEndian.PutUint16(h[0:], src.Port())
	binary.BigEndian.PutUint16(h[2:], dst.Port())
	binary.BigEndian.PutUint32(h[4:], seq)
	h[12], h[13] = 5<<4, flags
	return ip(src.Addr(), dst.Addr(), protoTCP, append(h, payload...))
}

func ip(src, dst netip.Addr, proto byte, body []byte) []byte {
	if src.Is4() {
		h := make([]byte, 20)
		h[0], h[9] = 0x45, proto
		binary.BigEndian.PutUint16(h[2:], uint16(20+len(body)))
		copy(h[12:], src.AsSlice())
		copy(h[16:], dst.AsSlice())
		return append(h, body...)
	}
	h := make([]byte, 40)
	h[0], h[6] = 6<<4, proto
	binary.BigEndian.PutUint16(h[4:], uint16(len(body)))
	copy(h[8:], src.AsSlice())
	copy(h[24:], dst.AsSlice())
	return append(h, body...)
}

// talk is one connection whose bytes are cut into segments.
type talk struct {
	client, server netip.AddrPort
	up, down       uint32
	packets        [][]byte
}

func newTalk(client, server netip.AddrPort) *talk {
	t := &talk{client: client, server: server, up: 0xfffffff0, down: 77} // sequence numbers wrap
	t.packets = append(t.packets, tcp(client, server, t.up, flagSYN, ""), tcp(server, client, t.down, flagSYN|flagACK, ""))
	t.up++
	t.down++
	return t
}

func (t *talk) say(fromClient bool, segments ...string) {
	for _, s := range segments {
		if fromClient {
			t.packets = append(t.packets, tcp(t.client, t.server, t.up, flagACK, s))
			t.up += uint32(len(s))
		} else {
			t.packets = append(t.packets, tcp(t.server, t.client, t.down, flagACK, s))
			t.down += uint32(len(s))
		}
	}
}

func inspect(packets [][]byte) Report {
	in := NewInspector(marker)
	for _, p := range packets {
		in.Packet(p, false)
	}
	return in.Report()
}

// cut splits s into pieces of n bytes.
func cut(s string, n int) (list []string) {
	for len(s) > n {
		list, s = append(list, s[:n]), s[n:]
	}
	return append(list, s)
}

func TestClearText(t *testing.T) {
	cases := []struct {
		name     string
		up, down string
		speaks   [2]string
	}{
		{"http", "GET /accounts/" + marker + "0001 HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n", [2]string{"http/1", "http/1"}},
		{"nats", "CONNECT {}\r\n", "INFO {\"server\":\"" + marker + "\"}\r\n", [2]string{"nats", "nats"}},
		{"grpc", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + marker, "\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x05\x00\x00\x40\x00", [2]string{"http/2", "http/2"}},
		{"bytes", "hello " + marker, "", [2]string{"other", ""}},
	}
	for _, c := range cases {
		for size := 1; size < 30; size++ {
			tk := newTalk(client6, server6)
			tk.say(true, cut(c.up, size)...)
			if c.down != "" {
				tk.say(false, cut(c.down, size)...)
			}
			r := inspect(tk.packets)
			if len(r.Conns) != 1 {
				t.Fatalf("%s: %d connections", c.name, len(r.Conns))
			}
			got := r.Conns[0]
			if got.Client != client6 || got.Server != server6 || len(got.Found) != 1 || got.Up.Speaks != c.speaks[0] || got.Down.Speaks != c.speaks[1] ||
				got.TLS() || got.Incomplete || got.Up.Bytes != uint64(len(c.up)) {
				t.Errorf("%s in segments of %d: %+v", c.name, size, got)
			}
			if !strings.Contains(got.Clear(), marker) {
				t.Errorf("%s: clear: %q", c.name, got.Clear())
			}
		}
	}
}

// recorder keeps what is written through a pipe.
type recorder struct {
	net.Conn
	mu  *sync.Mutex
	log *[]said
	up  bool
}

type said struct {
	up   bool
	data string
}

func (r recorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	*r.log = append(*r.log, said{r.up, string(p)})
	r.mu.Unlock()
	return r.Conn.Write(p)
}

// record runs real TLS 1.3 and returns what went over the wire.
func record(t *testing.T, client, server *tls.Config, payload string) []said {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	server.Certificates = []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}
	client.InsecureSkipVerify = true
	a, b := net.Pipe()
	var (
		mu  sync.Mutex
		log []said
		wg  sync.WaitGroup
	)
	wg.Go(func() {
		s := tls.Server(recorder{b, &mu, &log, false}, server)
		if _, err := io.CopyN(s, s, int64(len(payload))); err != nil {
			t.Error(err)
		}
		b.Close()
	})
	c := tls.Client(recorder{a, &mu, &log, true}, client)
	wg.Go(func() {
		if _, err := io.WriteString(c, payload); err != nil {
			t.Error(err)
		}
	})
	got := make([]byte, len(payload))
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatal(err)
	}
	a.Close()
	wg.Wait()
	return log
}

func TestTLS(t *testing.T) {
	log := record(t, &tls.Config{NextProtos: []string{"assay/1"}, ServerName: "name.example"}, &tls.Config{NextProtos: []string{"assay/1"}}, strings.Repeat(marker, 5000))
	for _, size := range []int{1, 7, 100, 1448, 65000} {
		tk := newTalk(client4, server4)
		for _, s := range log {
			tk.say(s.up, cut(s.data, size)...)
		}
		check := func(how string, packets [][]byte) {
			r := inspect(packets)
			if len(r.Conns) != 1 {
				t.Fatalf("%s: %d connections", how, len(r.Conns))
			}
			c := r.Conns[0]
			if !c.TLS() || c.Clear() != "" || c.Incomplete || !c.Hello.Offers("assay/1") || c.Hello.Name != "name.example" || c.Version != tls.VersionTLS13 {
				t.Errorf("%s, segments of %d: %+v", how, size, c)
			}
		}
		check("in order", tk.packets)

		// Each packet twice (it crosses two links), neighbours after the SYNs in any order.
		var twice [][]byte
		for _, p := range tk.packets {
			twice = append(twice, p, p)
		}
		rnd := mrand.New(mrand.NewPCG(1, uint64(size)))
		for i := 4; i+20 < len(twice); i += 20 {
			part := twice[i : i+20]
			rnd.Shuffle(len(part), func(a, b int) { part[a], part[b] = part[b], part[a] })
		}
		check("shuffled", twice)
	}
}

func TestTLSWithAClearByte(t *testing.T) {
	log := record(t, &tls.Config{}, &tls.Config{}, "hello")
	for at := range log {
		tk := newTalk(client4, server4)
		for i, s := range log {
			tk.say(s.up, s.data)
			if i == at {
				tk.say(s.up, "GET / HTTP/1.1\r\n")
			}
		}
		if c := inspect(tk.packets).Conns[0]; c.TLS() || c.Clear() == "" {
			t.Errorf("clear text after flight %d passes for TLS: %+v", at, c)
		}
	}
}

func TestHandshakeAloneIsNoTraffic(t *testing.T) {
	tk := newTalk(client4, server4)
	tk.say(true, "\x16\x03\x01\x00\x01\x01")
	tk.say(false, "\x16\x03\x03\x00\x01\x02")
	if c := inspect(tk.packets).Conns[0]; c.TLS() {
		t.Errorf("%+v", c)
	}
}

func TestHoles(t *testing.T) {
	tk := newTalk(client4, server4)
	tk.say(true, "one ", "two ", "three "+marker)
	r := inspect([][]byte{tk.packets[0], tk.packets[1], tk.packets[2], tk.packets[4]})
	if c := r.Conns[0]; !c.Incomplete || len(c.Found) != 1 {
		t.Errorf("a hole was not seen: %+v", c)
	}
	// Seen from the middle only.
	r = inspect(tk.packets[2:])
	if c := r.Conns[0]; !c.Incomplete || len(c.Found) != 1 || c.Client != client4 {
		t.Errorf("%+v", c)
	}
	// Many segments behind a hole are taken in the end.
	tk = newTalk(client4, server4)
	tk.say(true, "lost")
	tk.packets = tk.packets[:2]
	tk.say(true, cut(strings.Repeat("x", 2*maxHeld)+marker, 1)...)
	if c := inspect(tk.packets).Conns[0]; !c.Incomplete || len(c.Found) != 1 {
		t.Errorf("%+v", c)
	}
}

func TestPortsUsedAgain(t *testing.T) {
	one, two := newTalk(client4, server4), newTalk(client4, server4)
	one.say(true, marker)
	two.packets = nil
	two.up, two.down = 5000, 6000
	two.packets = append(two.packets, tcp(client4, server4, 4999, flagSYN, ""), tcp(server4, client4, 5999, flagSYN|flagACK, ""), tcp(server4, client4, 6000, flagRST, ""))
	r := inspect(append(one.packets, two.packets...))
	if len(r.Conns) != 2 {
		t.Fatalf("%+v", r.Conns)
	}
	if r.Conns[0].Clear() == "" || r.Conns[0].Reset || r.Conns[1].Clear() != "" || !r.Conns[1].Reset {
		t.Errorf("%+v", r.Conns)
	}
}

func TestOtherPackets(t *testing.T) {
	udp := append([]byte{0, 1, 0, 53, 0, 0, 0, 0}, "question about "+marker...)
	r := inspect([][]byte{ip(client4.Addr(), server4.Addr(), protoUDP, udp)})
	if len(r.Other) != 1 || len(r.Conns) != 0 {
		t.Errorf("%+v", r)
	}
	in := NewInspector(marker)
	in.Missed(3)
	in.Packet(tcp(client4, server4, 1, flagACK, "x"), true)
	if r := in.Report(); r.Missed != 3 || r.Cut != 1 || r.Packets != 1 {
		t.Errorf("%+v", r)
	}
}

func FuzzInspector(f *testing.F) {
	f.Add(tcp(client4, server4, 1, flagSYN, ""), tcp(client4, server4, 2, flagACK, "\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"))
	f.Add(tcp(client6, server6, 1, flagACK, "GET /"), tcp(server6, client6, 2, flagACK, marker))
	f.Add(tcp(client4, server4, 1<<31+1, flagACK, "x"), tcp(client4, server4, 2, flagACK, "2 GiB before what is next"))
	hop := append([]byte{protoTCP, 0, 0, 0, 0, 0, 0, 0}, tcp(client4, server4, 1, 0, marker)[20:]...)
	f.Add(ip(client6.Addr(), server6.Addr(), 0, hop), []byte{0x45})
	f.Fuzz(func(t *testing.T, a, b []byte) {
		r := inspect([][]byte{a, b, a})
		for _, p := range [][]byte{a, b} {
			s, ok := parse(p)
			if ok && s.proto == protoTCP && !bytes.Contains(s.payload, []byte(marker)) {
				continue
			}
			if !ok && bytes.Contains(p, []byte(marker)) && len(r.Other) == 0 {
				t.Error("a marker in an unreadable packet was not found")
			}
		}
	})
}
