package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/link"
	"assay.dev/test/lab"
	"golang.org/x/sys/unix"
)

// dialUncaptured connects from a workload as a process does that has escaped the
// capture.
func (m *workload) dialUncaptured(to netip.AddrPort) *net.TCPConn {
	m.w.t.Helper()
	var c net.Conn
	m.do(func() (err error) {
		d := net.Dialer{Timeout: 5 * time.Second, Control: func(_, _ string, raw syscall.RawConn) error {
			var err error
			raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, ownMark) })
			return err
		}}
		c, err = d.Dial("tcp", to.String())
		return err
	})
	c.SetDeadline(time.Now().Add(20 * time.Second))
	m.w.t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

func TestPlaintextFromMeshed(t *testing.T) {
	w := newWorld(t)
	client, server := w.workload("client"), w.workload("server")
	target := netip.AddrPortFrom(server.Addrs[0], server.serve(0, func(*net.TCPConn) { t.Error("the application was reached") }))
	for _, mode := range []assay.Mode{assay.Observe, assay.Strict} {
		w.setMode(mode)
		c := client.dialUncaptured(target)
		expectReset(t, c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	}
	eventually(t, "the finding arrives", func() bool { return server.found("plaintext-from-meshed") > 0 })
	if n := server.report().Counters.Refusals["plaintext-from-meshed"]; n != 2 {
		t.Errorf("%d refusals counted, want 2", n)
	}
}

// TestTransition: clients in the mesh which have not heard that a pod has joined, or has
// left, are served, those outside as the namespace has it; and nobody is once it is over.
func TestTransition(t *testing.T) {
	w := newWorld(t)
	client, outsider, server := w.workload("client"), w.outsider(), w.prepare("server")
	target := netip.AddrPortFrom(server.Addrs[0], server.serve(0, echo))
	server.transition, server.olderGrace = true, time.Millisecond
	server.start()
	server.awaitCertificate()
	w.setMode(assay.Strict)
	c := client.dialUncaptured(target)
	if got := exchange(t, c, "still here"); got != "still here" {
		t.Error(got)
	}
	c.Close()
	held := client.dialUncaptured(target)
	if got := exchange(t, held, "and on"); got != "and on" {
		t.Error(got)
	}
	outsider.dialExpectReset(target, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	through := client.mustDial(target) // has heard
	if got := exchange(t, through, "hello"); got != "hello" {
		t.Error(got)
	}
	r := server.report()
	if s := sum(r, func(k assay.SignalKey) bool {
		return k.Reason == assay.ReasonTransition && k.Security == assay.Plaintext
	}); s.Requests != 1 || s.Failures != 0 || s.Opened != 2 {
		t.Errorf("%d in plaintext, %d failed; want 1 and none", s.Requests, s.Failures)
	}
	if n := r.Counters.Refusals["plaintext-in-strict"]; n != 1 {
		t.Errorf("%d refused from outside, want 1", n)
	}
	server.mu.Lock()
	server.transition = false
	conn := server.conn
	server.mu.Unlock()
	server.configure(conn, false)
	server.report() // so it is configured
	expectReset(t, client.dialUncaptured(target), "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	held.SetDeadline(time.Now().Add(time.Minute))
	if b, err := io.ReadAll(held); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("one of the transition: %q, %v; want a reset", b, err)
	}
	if got := exchange(t, through, "hello again"); got != "hello again" {
		t.Error(got)
	}
}

// TestPlaintextOfBefore: plaintext that was let in goes on when the namespace becomes strict,
// as long as its people allow; then it is closed, whatever it is, and told. What is under mutual
// TLS goes on.
func TestPlaintextOfBefore(t *testing.T) {
	w := newWorld(t)
	client, outsider, server := w.workload("client"), w.outsider(), w.prepare("server")
	server.olderGrace = time.Hour
	server.start()
	server.awaitCertificate()
	target := netip.AddrPortFrom(server.Addrs[0], server.serve(0, echo))
	web := netip.AddrPortFrom(server.Addrs[0], server.web(0, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "web") })))
	web2 := netip.AddrPortFrom(server.Addrs[0], server.web2(0, func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "web") }))
	accepted := make(chan struct{}, 1)
	silent := outsider.mustDial(netip.AddrPortFrom(server.Addrs[0], server.serve(0, func(c *net.TCPConn) { accepted <- struct{}{}; echo(c) })))
	<-accepted
	opaque, through := outsider.mustDial(target), client.mustDial(target)
	var kept atomic.Int64 // connections of HTTP that were made
	counting := func(c *http.Client) *http.Client {
		c.Transport.(*http.Transport).DialContext = func(_ context.Context, _, addr string) (net.Conn, error) {
			kept.Add(1)
			c, err := outsider.dial(netip.MustParseAddrPort(addr))
			if err == nil {
				c.SetDeadline(time.Time{})
			}
			return c, err
		}
		return c
	}
	one, two := counting(outsider.browser()), counting(outsider.browser2())
	ask := func(when string) {
		t.Helper()
		for _, c := range []*net.TCPConn{opaque, through} {
			c.SetDeadline(time.Now().Add(time.Minute))
			if got := exchange(t, c, "\x00text"); got != "\x00text" {
				t.Errorf("%s: %q", when, got)
			}
		}
		for c, at := range map[*http.Client]netip.AddrPort{one: web, two: web2} {
			if code, body := get(t, c, "http://"+at.String()+"/"); code != 200 || body != "web" {
				t.Errorf("%s: %d %q", when, code, body)
			}
		}
	}
	ask("in observe")
	w.setMode(assay.Strict)
	outsider.dialExpectReset(target, "\x00text")
	eventually(t, "it is told of them", func() bool { return server.found("older-plaintext") == 1 })
	ask("in strict, within the time")
	if n := kept.Load(); n != 2 {
		t.Errorf("%d connections of HTTP, want the same two", n)
	}

	server.mu.Lock()
	server.olderGrace = time.Millisecond
	conn := server.conn
	server.mu.Unlock()
	server.configure(conn, false)
	eventually(t, "they are counted", func() bool { return server.report().Counters.Refusals["older-plaintext"] == 4 })
	for name, c := range map[string]net.Conn{"opaque": opaque, "silent": silent} {
		c.SetDeadline(time.Now().Add(time.Minute))
		if b, err := io.ReadAll(c); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: read %q, %v; want a reset", name, b, err)
		}
	}
	for c, at := range map[*http.Client]netip.AddrPort{one: web, two: web2} {
		if resp, err := c.Get("http://" + at.String() + "/"); err == nil {
			resp.Body.Close()
			t.Error("a client of HTTP is served still")
		}
	}
	eventually(t, "it is told that they are closed", func() bool { return server.found("older-plaintext-closed") == 1 })
	if got := exchange(t, through, "under mutual TLS"); got != "under mutual TLS" {
		t.Error(got)
	}
	if s := sum(server.report(), func(k assay.SignalKey) bool { return k.Security == assay.Plaintext }); s.Open != 0 || s.InFlight != 0 {
		t.Errorf("%+v", s)
	}
}

// TestStrictStaysStrict: an agent that knows nothing but the names of those it adopts (its disk
// is lost, and control is away) takes strict back from none.
func TestStrictStaysStrict(t *testing.T) {
	w := newWorld(t)
	outsider, server := w.outsider(), w.workload("server")
	target := netip.AddrPortFrom(server.Addrs[0], server.serve(0, echo))
	if got := exchange(t, outsider.mustDial(target), "observed"); got != "observed" {
		t.Error(got)
	}
	w.setMode(assay.Strict)
	outsider.dialExpectReset(target, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	server.mu.Lock()
	server.conn.Close()
	server.mu.Unlock()
	server.sock.SetDeadline(time.Now().Add(time.Minute))
	next, err := server.sock.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	conn := link.NewConn(next)
	defer conn.Close()
	conn.Socket().SetDeadline(time.Now().Add(time.Minute))
	c := link.Configure{
		Workload: server.ID, Identity: server.Identity, Addrs: server.Addrs, AgentSocket: server.sock.Addr().String(),
		OwnMark: ownMark, ReturnMark: returnMark, MeshPrefixes: w.mesh, DNS: link.DNS{Domain: "mesh.test"},
		Config: assay.NamespaceConfig{Namespace: "bank", Mode: assay.Observe},
	}
	for kind := link.Kind(""); kind != link.KindReady; { // it is adopted
		m, err := conn.Receive()
		if err != nil {
			t.Fatal(err)
		}
		m.Discard()
		if kind = m.Kind; kind == link.KindHello {
			conn.Send(link.KindConfigure, 0, c)
		}
	}
	outsider.dialExpectReset(target, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
}

// TestPlaintextFromUnknown: an address of the mesh that the table does not know is a
// workload's that has just started. It proves who it is, however late, or is refused;
// an application that speaks first says nothing to it meanwhile.
func TestPlaintextFromUnknown(t *testing.T) {
	w := newWorld(t)
	server := w.workload("server")
	newcomer := w.machine("newcomer", addr4(40))
	target := netip.AddrPortFrom(server.Addrs[0], server.serve(0, func(c *net.TCPConn) {
		t.Error("the application was reached")
		banner(c)
	}))
	c, err := newcomer.dial(target)
	if err != nil {
		t.Fatal(err)
	}
	c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	if b, err := io.ReadAll(c); len(b) > 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("it was told %q, %v", b, err)
	}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	expectReset(t, c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	eventually(t, "the finding arrives", func() bool { return server.found("unknown-mesh-address") == 1 })
	if n := server.report().Counters.Refusals["unknown-mesh-address"]; n != 1 {
		t.Errorf("%d refusals counted, want 1", n)
	}
}

func TestOutsiders(t *testing.T) {
	w := newWorld(t)
	server, outsider := w.workload("server"), w.outsider()
	seen := make(chan string, 10)
	target := server.serve(0, func(c *net.TCPConn) {
		seen <- c.RemoteAddr().String()
		banner(c)
	})
	to := netip.AddrPortFrom(server.Addrs[0], target)
	w.service("mail", 25, assay.Detect, target, server)

	c := outsider.mustDial(to) // says nothing: the banner must come by itself
	line := make([]byte, len("220 ready\r\n"))
	if _, err := io.ReadFull(c, line); err != nil {
		t.Fatal(err)
	}
	if got := exchange(t, c, "QUIT\r\n"); got != "QUIT\r\n" {
		t.Error(got)
	}
	if got := strings.NewReplacer("[::ffff:", "", "]", "").Replace(<-seen); got != c.LocalAddr().String() {
		t.Errorf("the application saw %s, the client is %s", got, c.LocalAddr())
	}
	c.Close()
	eventually(t, "the exception is counted", func() bool {
		s := sum(server.report(), func(k assay.SignalKey) bool {
			return k.Direction == assay.Inbound && k.Security == assay.Plaintext && k.Reason == "outside" && k.Service == "bank/mail" && k.Port == 25
		})
		return s.Requests == 1 && s.Failures == 0 && s.BytesIn == 6 && s.BytesOut == 17
	})

	w.setMode(assay.Strict)
	c = outsider.mustDial(to)
	expectReset(t, c, "HELO\r\n")
	if n := server.report().Counters.Refusals["plaintext-in-strict"]; n != 1 {
		t.Errorf("%d refusals counted, want 1", n)
	}
	// Its own TLS is not the mesh's.
	c = outsider.mustDial(to)
	expectReset(t, c, "\x16\x03\x01\x00\x05\x01\x00\x00\x01\x03")
	// A check that connects and closes is no error.
	outsider.mustDial(to).Close()
	if r := server.report().Counters.Refusals; r["plaintext-in-strict"] != 2 || len(r) != 1 {
		t.Errorf("refusals %v, want two", r)
	}
}

func TestPassThrough(t *testing.T) {
	w := newWorld(t)
	client, outsider := w.workload("client"), w.outsider()
	port := outsider.serve(0, echo)
	c := client.mustDial(netip.AddrPortFrom(outsider.Addrs[0], port))
	if got := exchange(t, c, "hello"); got != "hello" {
		t.Error(got)
	}
	c.CloseWrite()
	if b, err := io.ReadAll(c); len(b) != 0 || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	eventually(t, "the exception is counted", func() bool {
		s := sum(client.report(), func(k assay.SignalKey) bool {
			return k.Direction == assay.Outbound && k.Security == assay.Plaintext && k.Reason == "outside" && k.Port == port
		})
		return s.Requests == 1 && s.Failures == 0 && s.BytesIn == 5 && s.BytesOut == 5
	})
	// Refused there is reset here.
	client.dialExpectReset(netip.AddrPortFrom(outsider.Addrs[0], 1), "")
	if n := client.report().Counters.Refusals["outside-unreachable"]; n != 1 {
		t.Errorf("%d refusals counted, want 1", n)
	}
}

func TestUnknownMeshAddress(t *testing.T) {
	w := newWorld(t)
	client := w.workload("client")
	// A workload that was just made: it listens, but the table does not know it.
	newcomer := w.machine("newcomer", addr4(40))
	port := newcomer.serve(0, func(*net.TCPConn) { t.Error("it was reached in plaintext") })
	client.dialExpectReset(netip.AddrPortFrom(newcomer.Addrs[0], port), "secret")
	if n := client.report().Counters.Refusals["unknown-mesh-address"]; n != 1 {
		t.Errorf("%d refusals counted, want 1", n)
	}
}

func TestWrongIdentity(t *testing.T) {
	w := newWorld(t)
	client := w.workload("client")
	// It lives at server's address, and its certificate is valid, but another one's.
	thief := w.prepare("server")
	server := thief.Identity
	thief.Identity.Account, thief.identity.Account = "thief", "thief"
	thief.published = server
	port := thief.serve(0, func(*net.TCPConn) { t.Error("the application was reached") })
	thief.start()
	thief.awaitCertificate()
	vip := w.service("ledger", 1, assay.Detect, port, thief)
	client.dialExpectReset(vip, "secret")
	r := client.report().Counters
	if r.HandshakeFailures["identity-mismatch"] != 1 || r.Refusals["handshake"] != 1 {
		t.Errorf("counted %+v", r)
	}
	eventually(t, "the finding arrives", func() bool { return client.found("identity-mismatch") == 1 })
}

// secret is what a client's application sends to whom it takes for its server.
const secret = "secret-of-the-application"

// watch looks at every packet between the machines of the world.
func (w *world) watch() *lab.Capture {
	return lab.Watch(w.t, func(f func() error) error { return f() }, secret)
}

// expectWatched fails the test when the secret was on the wire, and then sends it in
// plaintext to somebody outside: a capture that does not see that has seen nothing.
func (w *world) expectWatched(c *lab.Capture, from *workload) {
	w.t.Helper()
	c.ExpectNone(w.t)
	outsider := w.outsider()
	if got := exchange(w.t, from.mustDial(netip.AddrPortFrom(outsider.Addrs[0], outsider.serve(0, echo))), secret); got != secret {
		w.t.Errorf("outside: %q", got)
	}
	c.Settle(w.t)
	if _, found, _ := c.Seen(); found == 0 {
		w.t.Error("the capture sees no plaintext at all")
	}
}

// TestForgedEndpoint: services that name an endpoint which is not who or where they
// say. Whatever the lie is, its address gets no byte of the application's, and none is
// on the wire.
func TestForgedEndpoint(t *testing.T) {
	w := newWorld(t)
	client, server, thief, outsider := w.workload("client"), w.workload("server"), w.workload("thief"), w.outsider()
	var mu sync.Mutex
	var got []byte
	record := func(c *net.TCPConn) {
		b, _ := io.ReadAll(c)
		mu.Lock()
		got = append(got, b...)
		mu.Unlock()
	}
	inside, outside := thief.serve(0, record), outsider.serve(0, record)
	wire := w.watch()
	before := uint64(0)
	for n, lie := range []struct {
		name   string
		e      assay.Endpoint
		reason string // counted as a refusal or as a failed handshake
	}{
		{"the server's identity at the thief's address", assay.Endpoint{Workload: server.ID, Identity: server.Identity, Addrs: thief.Addrs, Targets: []uint16{inside}}, "identity-mismatch"},
		{"the server's identity outside the mesh", assay.Endpoint{Workload: server.ID, Identity: server.Identity, Addrs: outsider.Addrs, Targets: []uint16{outside}}, "handshake"},
		{"nobody's identity at an address of nobody", assay.Endpoint{Workload: server.ID, Addrs: []netip.Addr{addr4(99)}, Targets: []uint16{inside}}, "unknown-mesh-address"},
		{"another trust domain", assay.Endpoint{Workload: server.ID, Identity: assay.Identity{TrustDomain: "evil.test", Namespace: "bank", Account: "server"}, Addrs: thief.Addrs, Targets: []uint16{inside}}, "identity-mismatch"},
	} {
		vip := w.serviceAt(fmt.Sprintf("forged%d", n), 80, lie.e)
		client.dialExpectReset(vip, secret)
		c := client.report().Counters
		if count := c.Refusals[lie.reason] + c.HandshakeFailures[lie.reason]; count == 0 {
			t.Errorf("%s: counted %+v", lie.name, c)
		}
		total := uint64(0)
		for _, v := range c.Refusals {
			total += v
		}
		if total <= before {
			t.Errorf("%s: no refusal is counted: %+v", lie.name, c.Refusals)
		}
		before = total
	}
	w.expectWatched(wire, client)
	mu.Lock()
	defer mu.Unlock()
	if bytes.Contains(got, []byte(secret)) {
		t.Errorf("the application's bytes were sent: %q", got)
	}
}

// TestAddressUsedAgain: a client that has not heard that an address is another
// workload's now, with a session to the old one or without.
func TestAddressUsedAgain(t *testing.T) {
	w := newWorld(t)
	client, server := w.workload("client"), w.workload("server")
	target := server.serve(0, echo)
	vip := w.service("ledger", 1, assay.Opaque, target, server)
	wire := w.watch()
	if got := exchange(t, client.mustDial(vip), secret+"before"); got != secret+"before" {
		t.Error(got)
	}
	// The server ends; the next owner of its address listens on its port.
	server.cmd.Process.Kill()
	<-server.exited
	old := server.Identity
	server.Identity.Account, server.identity.Account = "heir", "heir"
	server.Name, server.published = "heir", old // as the client still has it
	server.restart()
	client.dialExpectReset(vip, secret)
	r := client.report().Counters
	if r.HandshakeFailures["identity-mismatch"] == 0 || r.Refusals["handshake"] == 0 {
		t.Errorf("counted %+v", r)
	}
	eventually(t, "the finding arrives", func() bool { return client.found("identity-mismatch") == 1 })
	if s := sum(server.report(), func(assay.SignalKey) bool { return true }); s.Opened != 0 {
		t.Errorf("the heir served %d connections", s.Opened)
	}
	// When the news arrive, the address is the heir's.
	server.published = assay.Identity{}
	vip = w.service("ledger", 1, assay.Opaque, target, server)
	if got := exchange(t, client.mustDial(vip), secret+"after"); got != secret+"after" {
		t.Error(got)
	}
	w.expectWatched(wire, client)
}

// TestStolenAddress: a client with a valid certificate of somebody else than lives at
// its address is refused; where the server knows nobody yet, the certificate decides.
func TestStolenAddress(t *testing.T) {
	w := newWorld(t)
	server := w.workload("server")
	thief := w.prepare("client")
	victim := thief.Identity
	thief.Identity.Account, thief.identity.Account = "thief", "thief"
	thief.published = victim
	vip := w.service("ledger", 1, assay.Opaque, server.serve(0, echo), server)
	thief.start()
	thief.awaitCertificate()
	thief.dialExpectReset(vip, "secret")
	r := server.report().Counters
	if r.HandshakeFailures["identity-mismatch"] == 0 || r.Refusals["handshake"] == 0 {
		t.Errorf("counted %+v", r)
	}
	eventually(t, "the finding arrives", func() bool { return server.found("identity-mismatch") == 1 })
	if s := sum(server.report(), func(assay.SignalKey) bool { return true }); s.Opened != 0 {
		t.Errorf("%d connections were served", s.Opened)
	}
	// The same one, as a workload that has just started is to those who have not
	// heard of it.
	thief.MeshedSince = time.Time{}
	w.publish()
	if got := exchange(t, thief.mustDial(vip), "hello"); got != "hello" {
		t.Error(got)
	}
}

func TestBeforeTheCertificate(t *testing.T) {
	w := newWorld(t)
	server := w.workload("server")
	client := w.prepare("client")
	client.refuse = "not attested yet"
	client.start()
	eventually(t, "the proxy is ready", func() bool {
		client.mu.Lock()
		defer client.mu.Unlock()
		return client.ready > 0
	})
	vip := w.service("echo", 1, assay.Opaque, server.serve(0, echo), server)
	// A connection waits for the certificate, and not for ever.
	c := client.mustDial(vip)
	start := time.Now()
	expectReset(t, c, "")
	if d := time.Since(start); d < time.Second || d > 5*time.Second {
		t.Errorf("refused after %v, want about two seconds", d)
	}
	c = client.mustDial(vip)
	client.mu.Lock()
	client.refuse = ""
	client.mu.Unlock()
	if got := exchange(t, c, "hello"); got != "hello" {
		t.Error(got)
	}
	if n := client.report().Counters.Refusals["no-certificate"]; n != 1 {
		t.Errorf("%d refusals counted, want 1", n)
	}
}
