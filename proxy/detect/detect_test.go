package detect

import (
	"crypto/tls"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"assay.dev"
)

func TestClient(t *testing.T) {
	long := "GET /" + strings.Repeat("a", MaxFirst)
	for _, c := range []struct {
		in   string
		want assay.Protocol
		done bool
	}{
		{"", assay.Opaque, false},
		{"G", assay.Opaque, false},
		{"GET", assay.Opaque, false},
		{"GET ", assay.Opaque, false},
		{"GET /", assay.HTTP1, false},
		{"GET / HTTP/1.1", assay.HTTP1, false},
		{"GET / HTTP/1.1\r\n", assay.HTTP1, true},
		{"GET / HTTP/1.0\n", assay.HTTP1, true}, // the engine refuses the bare LF and says so
		{"PROPFIND /x HTTP/1.1\r\nHost: a\r\n", assay.HTTP1, true},
		{"OPTIONS * HTTP/1.1\r\n", assay.HTTP1, true},
		{"CONNECT a:1 HTTP/1.1\r\n", assay.HTTP1, true},
		{long, assay.HTTP1, true},
		{"GET / HTTP/2.0\r\n", assay.Opaque, true},
		{"GET /\r\n", assay.Opaque, true}, // HTTP/0.9
		{"GET key\r\n", assay.Opaque, true},
		{"PING\r\n", assay.Opaque, true},
		{"PING", assay.Opaque, true}, // no method begins so
		{"PROP", assay.Opaque, false},
		{"late", assay.Opaque, true},
		{"get / HTTP/1.1\r\n", assay.HTTP1, true}, // the engine says what is wrong with it
		{"BREW /pot HTTP/1.1\r\n", assay.HTTP1, true},
		{"BREW /pot", assay.Opaque, true},
		{"GET \x00 HTTP/1.", assay.Opaque, false},
		{"GET \x00 HTTP/1.1\r\n", assay.HTTP1, true}, // refused by the engine, in pieces and whole
		{"Ünicode / HTTP/1.1\r\n", assay.Opaque, true},
		{"EHLO client.example\r\n", assay.Opaque, true},
		{"CONNECT {\"verbose\":false}\r\n", assay.Opaque, true},
		{"SSH-2.0-OpenSSH_9.2\r\n", assay.Opaque, true},
		{strings.Repeat("A", 40), assay.Opaque, true},
		{"*1\r\n$4\r\nPING\r\n", assay.Opaque, true},
		{"\x00\x00\x00\x08\x04\xd2\x16\x2f", assay.Opaque, true}, // PostgreSQL's SSLRequest
		{"P", assay.Opaque, false},
		{"PR", assay.HTTP2, false},
		{"PRI * HTTP/2.0\r\n", assay.HTTP2, false},
		{preface, assay.HTTP2, true},
		{preface + "\x00\x00\x00\x04", assay.HTTP2, true},
		{"PRI * HTTP/2.0\r\n\r\nXX", assay.Opaque, true},
		{"PRINT /\r\n", assay.Opaque, true},
		{"\x16", assay.Opaque, false},
		{"\x16\x03\x01\x02\x00", assay.Opaque, false},
		{"\x16\x03\x01\x02\x00\x01", assay.TLS, true},
		{"\x16\x03\x01\x02\x00\x02", assay.Opaque, true},
		{"\x16\x03\x01\x00\x00\x01", assay.Opaque, true},
		{"\x16\x04", assay.Opaque, true},
	} {
		got, done := Client([]byte(c.in))
		if got != c.want || done != c.done {
			t.Errorf("Client(%.40q) = %s, %v; want %s, %v", c.in, got, done, c.want, c.done)
		}
	}
}

func TestServer(t *testing.T) {
	for in, want := range map[string]Speech{
		"":                                     Silent,
		"H":                                    Partial,
		"HTTP":                                 Partial,
		"HTTP/1.1 408 Request Timeout\r\n":     HTTPText,
		"HELO":                                 Other,
		"220 mail.example ESMTP\r\n":           Other,
		"\x00":                                 Partial,
		"\x00\x00\x12\x04\x00\x00\x00\x00":     Partial,
		"\x00\x00\x12\x04\x00\x00\x00\x00\x00": Settings,
		"\x00\x00\x00\x04\x00\x00\x00\x00\x00": Settings,
		"\x00\x00\x12\x04\x01\x00\x00\x00\x00": Other, // an ACK is no preface
		"\x00\x00\x11\x04\x00\x00\x00\x00\x00": Other, // not whole settings
		"\x00\x00\x12\x04\x00\x00\x00\x00\x01": Other, // not stream 0
		"\x4a\x00\x00\x00\x0a8.0.36":           Other, // MySQL
		"SSH-2.0-OpenSSH_9.2p1\r\n":            Other,
		"INFO {\"server_id\":\"N\"}\r\n":       Other, // NATS
	} {
		if got := Server([]byte(in)); got != want {
			t.Errorf("Server(%q) = %d, want %d", in, got, want)
		}
	}
}

// hello returns the first record that a real client sends.
func hello(t testing.TB, alpn ...string) []byte {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	go tls.Client(a, &tls.Config{ServerName: "x", NextProtos: alpn}).Handshake()
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

func TestClientHello(t *testing.T) {
	ours := hello(t, "assay/1")
	both := hello(t, "h2", "assay/1")
	foreign := hello(t, "h2", "http/1.1")
	bare := hello(t)
	for name, c := range map[string]struct {
		in   []byte
		want Hello
	}{
		"ours":     {ours, HelloOurs},
		"among":    {both, HelloOurs},
		"foreign":  {foreign, HelloForeign},
		"bare":     {bare, HelloForeign},
		"longer":   {append(ours[:len(ours):len(ours)], "more"...), HelloOurs},
		"text":     {[]byte("GET / HTTP/1.1\r\n"), HelloNone},
		"nothing":  {nil, HelloMore},
		"serverly": {[]byte("\x16\x03\x01\x00\x04\x02\x00\x00\x00"), HelloNone},
		"empty":    {[]byte("\x16\x03\x01\x00\x00"), HelloNone},
		"huge":     {[]byte("\x16\x03\x01\x00\x04\x01\xff\xff\xff"), HelloNone},
		"cut":      {[]byte("\x16\x03\x01\x00\x08\x01\x00\x00\x04\x03\x03\x00\x00"), HelloNone},
	} {
		if got := ClientHello(c.in, "assay/1"); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
	for n := 1; n < len(ours); n++ {
		if got := ClientHello(ours[:n], "assay/1"); got != HelloMore {
			t.Fatalf("%d of %d bytes: %d, want more", n, len(ours), got)
		}
	}
	// The same message over several records.
	var split []byte
	for body := ours[5:]; len(body) > 0; {
		k := min(100, len(body))
		split = append(split, 22, 3, 1, 0, byte(k))
		split = append(split, body[:k]...)
		body = body[k:]
	}
	if got := ClientHello(split, "assay/1"); got != HelloOurs {
		t.Errorf("split over records: %d", got)
	}
}

func TestDecide(t *testing.T) {
	settings := []byte("\x00\x00\x12\x04\x00\x00\x00\x00\x00")
	for _, c := range []struct {
		name string
		in   Input
		want Decision
	}{
		{"declared", Input{Declared: assay.HTTP2, Client: []byte("GET / HTTP/1.1\r\n")}, Decision{Action: Settle, Protocol: assay.HTTP2, Outcome: Declared}},
		{"just accepted", Input{}, Decision{Action: Wait, For: Patience}},
		{"learned", Input{Learned: true}, Decision{Action: Open}},
		{"patience over", Input{Age: Patience}, Decision{Action: Open}},
		{"routes", Input{Age: Patience, NoPatience: true}, Decision{Action: Wait}},
		{"silent pool", Input{Age: time.Hour, Opened: true}, Decision{Action: Wait}},
		{"http", Input{Client: []byte("GET / HTTP/1.1\r\n")}, Decision{Action: Settle, Protocol: assay.HTTP1, Outcome: ClientHTTP1}},
		{"late http", Input{Client: []byte("GET / HTTP/1.1\r\n"), Age: time.Hour, Opened: true}, Decision{Action: Settle, Protocol: assay.HTTP1, Outcome: ClientHTTP1}},
		{"late http after a held 408", Input{Client: []byte("GET / HTTP/1.1\r\n"), Server: []byte("HTTP/1.1 408"), Opened: true}, Decision{Action: Settle, Protocol: assay.HTTP1, Outcome: ClientHTTP1}},
		{"late h2 after held settings", Input{Client: []byte(preface), Server: settings, Opened: true}, Decision{Action: Settle, Protocol: assay.HTTP2, Outcome: ClientHTTP2}},
		{"greeting", Input{Server: []byte("220 hi\r\n"), Opened: true}, Decision{Action: Settle, Protocol: assay.Opaque, Outcome: ServerFirst}},
		{"greeting meets half a line", Input{Client: []byte("GET"), Server: []byte("220 hi\r\n"), Opened: true}, Decision{Action: Settle, Protocol: assay.Opaque, Outcome: ServerFirst}},
		{"settings", Input{Server: settings, Opened: true, ServerAge: 100 * time.Millisecond}, Decision{Action: Wait, For: Hold - 100*time.Millisecond}},
		{"settings only", Input{Server: settings, Opened: true, ServerAge: Hold}, Decision{Action: Settle, Protocol: assay.HTTP2, Outcome: ServerHTTP2}},
		{"408", Input{Server: []byte("HTTP/1.1 408"), Opened: true, ServerAge: time.Hour}, Decision{Action: Wait}},
		{"408 and close", Input{Server: []byte("HTTP/1.1 408"), ServerEnd: true, Opened: true}, Decision{Action: Settle, Protocol: assay.Opaque, Outcome: ServerClosed}},
		{"server closes", Input{ServerEnd: true, Opened: true}, Decision{Action: Settle, Protocol: assay.Opaque, Outcome: ServerClosed}},
		{"check", Input{ClientEnd: true}, Decision{Action: Settle, Protocol: assay.Opaque, Outcome: ClientClosed}},
		{"dribble begins", Input{Client: []byte("GE"), Opened: true, ClientAge: 100 * time.Millisecond}, Decision{Action: Wait, For: Dribble - 100*time.Millisecond}},
		{"dribble opens", Input{Client: []byte("GE"), Age: Patience, ClientAge: Patience}, Decision{Action: Open}},
		{"dribble ends", Input{Client: []byte("GE"), Opened: true, ClientAge: Dribble}, Decision{Action: Settle, Protocol: assay.Opaque, Outcome: ClientDribbled}},
		{"dribbled http", Input{Client: []byte("GET /x"), Opened: true, ClientAge: Dribble}, Decision{Action: Settle, Protocol: assay.HTTP1, Outcome: ClientDribbled}},
		{"half a line and end", Input{Client: []byte("GE"), ClientEnd: true}, Decision{Action: Settle, Protocol: assay.Opaque, Outcome: ClientOpaque}},
	} {
		if got := Decide(c.in); got != c.want {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

func TestMemory(t *testing.T) {
	var m Memory
	now := time.Unix(1_700_000_000, 0)
	m.Observe(ServerFirst, now)
	if m.ServerFirst(now) {
		t.Error("one connection is not evidence")
	}
	m.Observe(ServerFirst, now)
	if !m.ServerFirst(now) {
		t.Error("two connections are")
	}
	if m.ServerFirst(now.Add(lifetime)) {
		t.Error("what was learned does not expire")
	}
	m.Observe(ServerFirst, now.Add(lifetime))
	if m.ServerFirst(now.Add(lifetime)) {
		t.Error("old evidence counts beside new")
	}
	m.Observe(ServerFirst, now.Add(lifetime))
	m.Observe(ClientHTTP1, now.Add(lifetime))
	if m.ServerFirst(now.Add(lifetime)) {
		t.Error("a client that spoke first changes nothing")
	}
}

func TestDecideAllocatesNothing(t *testing.T) {
	in := Input{Client: []byte("GET /accounts/1 HTTP/1.1\r\nHost: accounts\r\n\r\n")}
	first := hello(t, "assay/1")
	if n := testing.AllocsPerRun(100, func() { Decide(in); ClientHello(first, "assay/1") }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzClient(f *testing.F) {
	for _, s := range []string{"GET / HTTP/1.1\r\n", preface, "\x16\x03\x01\x02\x00\x01", "PING\r\n", "CONNECT {}\r\n", "BREW / HTTP/1.", "GET \x01 HTTP/1."} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		proto, done := Client(p)
		if !done {
			if len(p) >= MaxFirst {
				t.Fatalf("undecided after %d bytes", len(p))
			}
			return
		}
		// What is decided stays decided, however the bytes arrive; but for a method that nobody
		// has registered, whose line is not waited for.
		method, _, _ := strings.Cut(string(p), " ")
		if proto == assay.Opaque && !strings.Contains(string(p), "\n") && !slices.Contains(methods, method) || len(p) >= MaxFirst {
			return
		}
		if again, still := Client(append(p[:len(p):len(p)], "x\r\n"...)); !still || again != proto {
			t.Fatalf("%q: %s, with more bytes %s %v", p, proto, again, still)
		}
	})
}

func FuzzServer(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK"))
	f.Add([]byte("\x00\x00\x12\x04\x00\x00\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, p []byte) {
		s := Server(p)
		if s == Partial && len(p) >= frameHeader {
			t.Fatalf("undecided after %d bytes", len(p))
		}
		if s > Partial && Server(append(p[:len(p):len(p)], 0)) != s {
			t.Fatalf("%q: changed its mind", p)
		}
	})
}

func FuzzClientHello(f *testing.F) {
	f.Add(hello(f, "assay/1"))
	f.Add(hello(f, "h2"))
	f.Add([]byte("\x16\x03\x01\x00\x04\x01\x00\x00\x00"))
	f.Fuzz(func(t *testing.T, p []byte) {
		got := ClientHello(p, "assay/1")
		if got == HelloMore && len(p) >= MaxHello+5+maxRecord {
			t.Fatalf("undecided after %d bytes", len(p))
		}
		if got != HelloMore && len(p) < MaxHello && ClientHello(append(p[:len(p):len(p)], 7), "assay/1") != got {
			t.Fatal("changed its mind")
		}
	})
}

func TestServerName(t *testing.T) {
	whole := hello(t, "h2")
	if name, state := ServerName(whole); name != "x" || state != HelloForeign {
		t.Errorf("%q, %d", name, state)
	}
	for n := range len(whole) {
		if name, state := ServerName(whole[:n]); name != "" || state != HelloMore {
			t.Fatalf("%d of %d bytes: %q, %d", n, len(whole), name, state)
		}
	}
	if name, state := ServerName([]byte("GET / HTTP/1.1\r\n")); name != "" || state != HelloNone {
		t.Errorf("text: %q, %d", name, state)
	}
	// A hello of nothing but the extension, in ways that no client sends it.
	with := func(ext string) []byte {
		body := "\x03\x03" + strings.Repeat("r", 32) + "\x00" + "\x00\x02\x13\x01" + "\x01\x00" + string([]byte{byte(len(ext) >> 8), byte(len(ext))}) + ext
		msg := "\x01\x00" + string([]byte{byte(len(body) >> 8), byte(len(body))}) + body
		return []byte("\x16\x03\x01" + string([]byte{byte(len(msg) >> 8), byte(len(msg))}) + msg)
	}
	one := "\x00\x00\x00\x06\x00\x04\x00\x00\x01a"
	for in, want := range map[string]Hello{
		one:                                    HelloForeign,
		"":                                     HelloForeign,
		one + one:                              HelloNone, // twice
		"\x00\x00\x00\x02\x00\x00":             HelloNone, // empty list
		"\x00\x00\x00\x05\x00\x03\x00\x00\x00": HelloNone, // empty name
		"\x00\x00\x00\x0a\x00\x08\x00\x00\x01a\x00\x00\x01b": HelloNone, // two names
		"\x00\x00\x00\x06\x00\x04\x00\x00\x09a":              HelloNone, // cut
	} {
		if _, state := ServerName(with(in)); state != want {
			t.Errorf("%q: %d, want %d", in, state, want)
		}
	}
}
