package capture_test

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"assay.dev/agent/capture"
	"assay.dev/agent/internal/lab"
	"assay.dev/agent/netns"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	lab.Contain()
	if os.Getenv("ASSAY_TEST_CONTAINED") != "" {
		runContained()
		return
	}
	lab.Main(m)
}

const (
	ownMark    = 0x41535301
	returnMark = 0x41535302
)

// host is a workload's namespace with capture installed, a second one beside it,
// and the listeners that a proxy would have.
type host struct {
	workload, other   *netns.Namespace
	outbound, inbound net.Listener
	capture           capturer
	rules             capture.Rules
}

// everywhere runs a test with the capture of an agent, which may do everything, and with that
// of a container that may not.
func everywhere(t *testing.T, test func(*testing.T, func(testing.TB, ...uint16) *host)) {
	t.Run("agent", func(t *testing.T) { test(t, setup) })
	t.Run("container", func(t *testing.T) { test(t, setupContained) })
}

// setupContained has the kernel check the way back of every packet, as some distributions do:
// there, too, nothing can be set.
func setupContained(t testing.TB, excluded ...uint16) *host {
	t.Helper()
	s := setup(t, excluded...)
	lab.In(t, s.workload, func() (any, error) {
		var failed error
		for _, link := range []string{"all", "lo", netns.Interface} {
			failed = errors.Join(failed, os.WriteFile("/proc/sys/net/ipv4/conf/"+link+"/rp_filter", []byte("1"), 0))
		}
		return nil, failed
	})
	s.rules.Tracked = true
	s.capture = contain(t, s.workload)
	return s
}

func setup(t testing.TB, excluded ...uint16) *host {
	t.Helper()
	prefixes := lab.Prefixes("10.181.7.0/24", "fd5a:5a59:0:0:7::/80")
	h := lab.Host(t, "asy-capture", prefixes, lab.Prefixes("10.181.0.0/16", "10.182.0.0/16", "fd5a:5a59::/64", "fd5a:5a59:1::/112"))
	s := &host{workload: lab.Namespace(t), other: lab.Namespace(t)}
	for i, ns := range []*netns.Namespace{s.workload, s.other} {
		addrs := lab.Addrs([]string{"10.181.7.2", "10.181.7.3"}[i], []string{"fd5a:5a59::7:0:0:2", "fd5a:5a59::7:0:0:3"}[i])
		if err := h.Attach(ns, h.Port(uint32(i)), addrs); err != nil {
			t.Fatal(err)
		}
	}
	s.outbound = lab.Listen(t, s.workload, "tcp", "[::]:0")
	s.inbound = lab.Listen(t, s.workload, "tcp", "[::]:0")
	s.capture = capture.New(s.workload)
	t.Cleanup(func() { s.capture.Close() })
	s.rules = capture.Rules{
		OutboundPort: port(s.outbound), InboundPort: port(s.inbound), OwnMark: ownMark, ReturnMark: returnMark,
		Virtual: lab.Prefixes("10.182.0.0/16", "fd5a:5a59:1::/112"), Excluded: excluded,
	}
	return s
}

func (s *host) install(t *testing.T) {
	t.Helper()
	if err := s.capture.Install(s.rules, nil); err != nil {
		t.Fatal(err)
	}
}

func port(l net.Listener) uint16 { return l.Addr().(*net.TCPAddr).AddrPort().Port() }

// greet answers every connection with a word until the listener is closed.
func greet(t *testing.T, l net.Listener, word string) {
	t.Helper()
	var g sync.WaitGroup
	g.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, word)
			c.Close()
		}
	})
	t.Cleanup(func() { l.Close(); g.Wait() })
}

func ask(ns *netns.Namespace, addr string) (string, error) {
	c, err := lab.Dial(ns, addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(3 * time.Second))
	b, err := io.ReadAll(c)
	return string(b), err
}

func expect(t *testing.T, ns *netns.Namespace, addr, want string) {
	t.Helper()
	if got, err := ask(ns, addr); got != want || err != nil {
		t.Errorf("%s: answered by %q (%v), want %q", addr, got, err, want)
	}
}

func TestRedirect(t *testing.T) { everywhere(t, redirect) }

func redirect(t *testing.T, setup func(testing.TB, ...uint16) *host) {
	s := setup(t, 7777)
	greet(t, s.outbound, "outbound")
	greet(t, s.inbound, "inbound")
	app4 := lab.Listen(t, s.workload, "tcp", "10.181.7.2:8080")
	app6 := lab.Listen(t, s.workload, "tcp", "[fd5a:5a59::7:0:0:2]:8080")
	local := lab.Listen(t, s.workload, "tcp", "127.0.0.1:8081")
	skipped := lab.Listen(t, s.workload, "tcp", "10.181.7.2:7777")
	far := lab.Listen(t, s.other, "tcp", "10.181.7.3:7777")
	for _, l := range []net.Listener{app4, app6, local, skipped, far} {
		greet(t, l, "application")
	}
	s.install(t)

	expect(t, s.workload, "10.181.7.3:80", "outbound")
	expect(t, s.workload, "[fd5a:5a59::7:0:0:3]:80", "outbound")
	expect(t, s.workload, "192.0.2.1:443", "outbound")
	expect(t, s.other, "10.181.7.2:8080", "inbound")
	expect(t, s.other, "[fd5a:5a59::7:0:0:2]:8080", "inbound")
	expect(t, s.other, "10.181.7.2:9", "inbound") // also where nothing listens: the proxy says so
	// What the application says to itself is its own business.
	expect(t, s.workload, "127.0.0.1:8081", "application")
	expect(t, s.workload, "10.181.7.2:8080", "application")
	expect(t, s.workload, "[fd5a:5a59::7:0:0:2]:8080", "application")
	// Excluded ports, both ways.
	expect(t, s.other, "10.181.7.2:7777", "application")
	expect(t, s.workload, "10.181.7.3:7777", "application")
}

func TestOwnMarkIsNotCaptured(t *testing.T) { everywhere(t, ownMarkIsNotCaptured) }

func ownMarkIsNotCaptured(t *testing.T, setup func(testing.TB, ...uint16) *host) {
	s := setup(t)
	greet(t, s.outbound, "outbound")
	greet(t, lab.Listen(t, s.other, "tcp", "10.181.7.3:80"), "peer")
	s.install(t)
	c, err := dialFrom(s.workload, netip.AddrPort{}, "10.181.7.3:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if b, _ := io.ReadAll(c); string(b) != "peer" {
		t.Errorf("the proxy's own connection was answered by %q", b)
	}
}

// dial dials from an address and port of the namespace's own.
func dial(ns *netns.Namespace, from netip.AddrPort, to string, within time.Duration) (net.Conn, error) {
	d := net.Dialer{Timeout: within, LocalAddr: net.TCPAddrFromAddrPort(from)}
	var c net.Conn
	err := ns.Do(func() (err error) {
		c, err = d.DialContext(context.Background(), "tcp", to)
		return err
	})
	return c, err
}

// dialFrom dials as a proxy does: with the own mark and, when from is given, from an
// address that belongs to somebody else.
func dialFrom(ns *netns.Namespace, from netip.AddrPort, to string) (net.Conn, error) {
	d := net.Dialer{Timeout: 3 * time.Second, Control: func(_, _ string, raw syscall.RawConn) error {
		var failed error
		err := raw.Control(func(fd uintptr) {
			failed = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, ownMark)
			if from.IsValid() {
				if from.Addr().Is4() {
					failed = errors.Join(failed, unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1))
				} else {
					failed = errors.Join(failed, unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1))
				}
				failed = errors.Join(failed, unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1))
			}
		})
		return errors.Join(err, failed)
	}}
	if from.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(from)
	}
	var c net.Conn
	err := ns.Do(func() (err error) {
		c, err = d.DialContext(context.Background(), "tcp", to)
		return err
	})
	return c, err
}

// The heart of it: the client dials, the proxy accepts and dials the application
// from the client's address AND port; the application sees the client, and bytes
// flow in both directions.
func TestTheApplicationSeesItsClient(t *testing.T) { everywhere(t, applicationSeesItsClient) }

func applicationSeesItsClient(t *testing.T, setup func(testing.TB, ...uint16) *host) {
	for _, addr := range []string{"10.181.7.2:8080", "[fd5a:5a59::7:0:0:2]:8080"} {
		t.Run(addr, func(t *testing.T) {
			s := setup(t)
			app := lab.Listen(t, s.workload, "tcp", addr)
			s.install(t)
			var g sync.WaitGroup
			defer g.Wait()
			g.Go(func() { // the application echoes, after telling whom it sees
				c, err := app.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				io.WriteString(c, c.RemoteAddr().String()+"\n")
				io.Copy(c, c)
			})
			failed := make(chan error, 1)
			g.Go(func() { // the proxy relays
				in, err := s.inbound.Accept()
				if err != nil {
					failed <- err
					return
				}
				defer in.Close()
				client := in.RemoteAddr().(*net.TCPAddr).AddrPort()
				out, err := dialFrom(s.workload, netip.AddrPortFrom(client.Addr().Unmap(), client.Port()), addr)
				if err != nil {
					failed <- err
					return
				}
				failed <- nil
				defer out.Close()
				var both sync.WaitGroup
				both.Go(func() { io.Copy(out, in); out.(*net.TCPConn).CloseWrite() })
				both.Go(func() { io.Copy(in, out); in.(*net.TCPConn).CloseWrite() })
				both.Wait()
			})
			c, err := lab.Dial(s.other, addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if err := <-failed; err != nil {
				t.Fatal("the proxy's dial of the application:", err)
			}
			c.SetDeadline(time.Now().Add(5 * time.Second))
			payload := strings.Repeat("x", 1<<20)
			g.Go(func() { io.WriteString(c, payload); c.(*net.TCPConn).CloseWrite() })
			b, err := io.ReadAll(c)
			if err != nil {
				t.Fatal(err)
			}
			seen, echo, _ := strings.Cut(string(b), "\n")
			if seen != c.LocalAddr().String() {
				t.Errorf("the application saw %s, the client is %s", seen, c.LocalAddr())
			}
			if echo != payload {
				t.Errorf("%d bytes came back of %d", len(echo), len(payload))
			}
		})
	}
}

// A port where nothing listens must refuse the proxy at once, though the reset goes
// to somebody else's address.
func TestRefusalReachesTheProxy(t *testing.T) { everywhere(t, refusalReachesTheProxy) }

func refusalReachesTheProxy(t *testing.T, setup func(testing.TB, ...uint16) *host) {
	s := setup(t)
	s.install(t)
	for from, to := range map[string]string{"10.181.7.3:40000": "10.181.7.2:9999", "[fd5a:5a59::7:0:0:3]:40000": "[fd5a:5a59::7:0:0:2]:9999"} {
		start := time.Now()
		_, err := dialFrom(s.workload, netip.MustParseAddrPort(from), to)
		if !errors.Is(err, unix.ECONNREFUSED) || time.Since(start) > 950*time.Millisecond { // a lost SYN is repeated after a second

			t.Errorf("from %s to %s: %v after %v, want a refusal at once", from, to, err, time.Since(start))
		}
	}
}

func TestVirtualAddresses(t *testing.T) { everywhere(t, virtualAddresses) }

func virtualAddresses(t *testing.T, setup func(testing.TB, ...uint16) *host) {
	s := setup(t)
	greet(t, s.outbound, "outbound")
	s.install(t)
	refused := func(addr string) {
		t.Helper()
		start := time.Now()
		_, err := lab.Dial(s.workload, addr)
		if !errors.Is(err, unix.ECONNREFUSED) || time.Since(start) > 950*time.Millisecond {
			t.Errorf("%s: %v after %v, want ECONNREFUSED at once", addr, err, time.Since(start))
		}
	}
	vips := []string{"10.182.0.5:80", "[fd5a:5a59:1::5]:80"}
	open := map[netip.AddrPort]bool{}
	for _, v := range vips {
		refused(v)
		open[netip.MustParseAddrPort(v)] = true
	}
	if err := s.capture.SetOpen(open); err != nil {
		t.Fatal(err)
	}
	for _, v := range vips {
		expect(t, s.workload, v, "outbound")
	}
	refused("10.182.0.5:81")
	refused("10.182.0.6:80")
	// A connection that is open goes on when the last endpoint goes.
	held := lab.In(t, s.workload, func() (net.Conn, error) { return net.Dial("tcp", vips[0]) })
	defer held.Close()
	if err := s.capture.SetOpen(nil); err != nil {
		t.Fatal(err)
	}
	refused(vips[0])
	if b, err := io.ReadAll(held); string(b) != "outbound" || err != nil {
		t.Errorf("the open connection got %q, %v", b, err)
	}
	// New rules keep what is open.
	if err := s.capture.SetOpen(open); err != nil {
		t.Fatal(err)
	}
	s.rules.Excluded = []uint16{1234}
	s.install(t)
	expect(t, s.workload, vips[0], "outbound")
}

func TestOlderConnectionsLiveOn(t *testing.T) {
	s := setup(t)
	greet(t, s.outbound, "outbound")
	greet(t, s.inbound, "inbound")
	type pair struct{ dialled, accepted net.Conn }
	connect := func(from, to *netns.Namespace, addr string) pair {
		l := lab.Listen(t, to, "tcp", addr)
		c, err := lab.Dial(from, l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		a, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close(); a.Close() })
		return pair{c, a}
	}
	pairs := []pair{
		connect(s.workload, s.other, "10.181.7.3:0"), connect(s.other, s.workload, "10.181.7.2:0"),
		connect(s.workload, s.other, "[fd5a:5a59::7:0:0:3]:0"),
	}
	talk := func(when string) {
		t.Helper()
		for i, p := range pairs {
			for _, d := range [][2]net.Conn{{p.dialled, p.accepted}, {p.accepted, p.dialled}} {
				if _, err := io.WriteString(d[0], "ping"); err != nil {
					t.Fatalf("%s, connection %d: %v", when, i, err)
				}
				b := make([]byte, 4)
				d[1].SetReadDeadline(time.Now().Add(3 * time.Second))
				if _, err := io.ReadFull(d[1], b); err != nil {
					t.Fatalf("%s, connection %d: %v", when, i, err)
				}
			}
		}
	}
	talk("before")
	s.install(t)
	talk("after the rules")
	for range 20 {
		s.install(t)
	}
	talk("after twenty changes")
	expect(t, s.workload, "10.181.7.3:80", "outbound")
}

// TestRelease: a workload leaves the mesh. What goes through its proxy goes on, what is
// new goes direct; afterwards nothing of the capture is left.
func TestRelease(t *testing.T) {
	s := setup(t)
	app := lab.Listen(t, s.workload, "tcp", "10.181.7.2:8080")
	greet(t, lab.Listen(t, s.other, "tcp", "10.181.7.3:80"), "other")
	s.install(t)
	type pair struct{ near, far net.Conn }
	accept := func(l net.Listener) net.Conn {
		t.Helper()
		l.(*net.TCPListener).SetDeadline(time.Now().Add(20 * time.Second))
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	dial := func(ns *netns.Namespace, addr string) net.Conn {
		t.Helper()
		c, err := lab.Dial(ns, addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	leaving := dial(s.workload, "10.181.7.3:80")
	client := dial(s.other, "10.181.7.2:8080")
	atProxy := accept(s.inbound)
	out, err := dialFrom(s.workload, client.LocalAddr().(*net.TCPAddr).AddrPort(), "10.181.7.2:8080")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { out.Close() })
	open := []pair{{leaving, accept(s.outbound)}, {client, atProxy}, {out, accept(app)}}
	talk := func(when string) {
		t.Helper()
		for i, p := range open {
			for _, d := range [][2]net.Conn{{p.near, p.far}, {p.far, p.near}} {
				b := make([]byte, 4)
				io.WriteString(d[0], "ping")
				d[1].SetReadDeadline(time.Now().Add(20 * time.Second))
				if _, err := io.ReadFull(d[1], b); err != nil {
					t.Fatalf("%s, connection %d: %v", when, i, err)
				}
			}
		}
	}
	talk("captured")
	s.rules.Released = true
	s.install(t)
	talk("released")
	if err := s.capture.Verify(); err != nil {
		t.Error(err)
	}
	expect(t, s.workload, "10.181.7.3:80", "other")
	open = append(open, pair{dial(s.other, "10.181.7.2:8080"), accept(app)})
	talk("beside new ones")

	for _, p := range open[:3] {
		p.near.Close()
		p.far.Close()
	}
	open = open[3:]
	if err := s.capture.Remove(returnMark); err != nil {
		t.Fatal(err)
	}
	talk("removed")
	expect(t, s.workload, "10.181.7.3:80", "other")
	left := string(lab.In(t, s.workload, func() ([]byte, error) {
		return exec.Command("sh", "-c", "nft list ruleset; ip rule; ip -6 rule; ip route show table 100; ip -6 route show table 100; sysctl net.ipv4.tcp_fwmark_accept").Output()
	}))
	for _, part := range []string{"table inet", "lookup 100", "fwmark 0x", "local default", "accept = 1"} {
		if strings.Contains(left, part) {
			t.Errorf("%q is left:\n%s", part, left)
		}
	}
	if err := s.capture.Remove(returnMark); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

func TestVerifyNoticesAChange(t *testing.T) { everywhere(t, verifyNoticesAChange) }

func verifyNoticesAChange(t *testing.T, setup func(testing.TB, ...uint16) *host) {
	s := setup(t, 22, 53)
	s.install(t)
	if err := s.capture.SetOpen(map[netip.AddrPort]bool{netip.MustParseAddrPort("10.182.0.5:80"): true}); err != nil {
		t.Fatal(err)
	}
	nft, err := exec.LookPath("nft")
	if err != nil {
		t.Skip("needs nft to change rules behind our back:", err)
	}
	for _, change := range []string{
		"", "add rule inet assay outbound accept", "insert rule inet assay outbound accept", "flush chain inet assay inbound",
		"delete table inet assay", "add element inet assay open4 { 10.182.0.6 . 80 }", "add chain inet assay more",
	} {
		s.install(t)
		if change != "" {
			lab.In(t, s.workload, func() (any, error) {
				out, err := exec.Command(nft, change).CombinedOutput()
				if err != nil {
					t.Errorf("nft %s: %s", change, out)
				}
				return nil, nil
			})
		}
		if err := s.capture.Verify(); (err != nil) != (change != "") {
			t.Errorf("after %q: %v", change, err)
		}
	}
	s.install(t)
	lab.In(t, s.workload, func() (any, error) {
		return nil, exec.Command("ip", "rule", "del", "fwmark", "0x41535302").Run()
	})
	if err := s.capture.Verify(); err == nil {
		t.Error("a missing policy route was not noticed")
	}
	s.install(t)
	if err := s.capture.Verify(); err != nil {
		t.Errorf("after repair: %v", err)
	}
}

// TestRefusedIsCounted: the kernel's own refusals are counted, those of a proxy are
// not, and new rules do not forget.
func TestRefusedIsCounted(t *testing.T) { everywhere(t, refusedIsCounted) }

func refusedIsCounted(t *testing.T, setup func(testing.TB, ...uint16) *host) {
	s := setup(t)
	count := func(want capture.Refused) {
		t.Helper()
		got, err := s.capture.Refused()
		if err != nil || got != want {
			t.Errorf("counted %+v, %v, want %+v", got, err, want)
		}
	}
	count(capture.Refused{})
	s.install(t)
	refused := func(ns *netns.Namespace, addrs ...string) {
		t.Helper()
		for _, addr := range addrs {
			if _, err := lab.Dial(ns, addr); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("%s: %v", addr, err)
			}
		}
	}
	refused(s.workload, "10.182.0.5:80", "[fd5a:5a59:1::5]:80")
	count(capture.Refused{NoEndpoint: 2})

	// Resets of connections that there were: the proxy's, and the application's.
	abort := func(l net.Listener, from *netns.Namespace, to string, byClient bool) {
		t.Helper()
		c, err := lab.Dial(from, to)
		if err != nil {
			t.Fatal(err)
		}
		far, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if byClient {
			c, far = far, c
		}
		far.(*net.TCPConn).SetLinger(0)
		far.Close()
		c.SetDeadline(time.Now().Add(3 * time.Second))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%s: %v, want a reset", to, err)
		}
		c.Close()
	}
	for _, byClient := range []bool{false, true} {
		abort(s.outbound, s.workload, "10.181.7.3:80", byClient)
		abort(s.outbound, s.workload, "[fd5a:5a59::7:0:0:3]:80", byClient)
		abort(s.inbound, s.other, "10.181.7.2:80", byClient)
	}
	count(capture.Refused{NoEndpoint: 2})

	s.outbound.Close()
	s.inbound.Close()
	refused(s.workload, "10.181.7.3:80", "[fd5a:5a59::7:0:0:3]:80", "192.0.2.1:443")
	refused(s.other, "10.181.7.2:80", "[fd5a:5a59::7:0:0:2]:80")
	count(capture.Refused{NoProxy: 5, NoEndpoint: 2})
	s.rules.Excluded = []uint16{1234}
	s.install(t)
	if err := s.capture.Verify(); err != nil {
		t.Error(err)
	}
	refused(s.workload, "10.181.7.3:80")
	count(capture.Refused{NoProxy: 6, NoEndpoint: 2})
	// The next agent reads the same.
	next := capture.New(s.workload)
	t.Cleanup(func() { next.Close() })
	s.capture = next
	count(capture.Refused{NoProxy: 6, NoEndpoint: 2})
}

// TestOnlyOthersChangesAreNew: what the capture opens and closes is no reason to read its rules
// back, and what anybody else does is.
func TestOnlyOthersChangesAreNew(t *testing.T) {
	s := setup(t)
	s.install(t)
	c := s.capture.(*capture.Capture)
	generation := func() uint32 {
		t.Helper()
		n, err := c.Generation()
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	one, two := netip.MustParseAddrPort("10.182.0.5:80"), netip.MustParseAddrPort("10.182.0.6:80")
	before := generation()
	for _, err := range []error{c.SetOpen(map[netip.AddrPort]bool{one: true}), c.Change([]netip.AddrPort{one, two}, nil), c.Change(nil, []netip.AddrPort{one}), c.Change(nil, []netip.AddrPort{one})} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if now := generation(); now != before {
		t.Errorf("what was opened and closed made generation %d of %d", now, before)
	}
	if err := c.Verify(); err != nil {
		t.Error(err)
	}
	if open := c.Open(); len(open) != 1 || !open[two] {
		t.Errorf("open are %v", open)
	}
	other := capture.New(s.workload)
	defer other.Close()
	if err := errors.Join(other.Adopt(), other.Change(nil, []netip.AddrPort{two})); err != nil {
		t.Fatal(err)
	}
	if now := generation(); now == before {
		t.Error("what somebody else closed was not seen")
	}
	if c.Verify() == nil {
		t.Error("what somebody else closed was not found")
	}
}

// TestVerifyWay: what the rules stand on is looked at without them.
func TestVerifyWay(t *testing.T) {
	s := setup(t)
	c := s.capture.(*capture.Capture)
	if c.VerifyWay() == nil {
		t.Error("nothing is installed, and that is right")
	}
	s.install(t)
	if err := c.VerifyWay(); err != nil {
		t.Error(err)
	}
	lab.In(t, s.workload, func() (any, error) {
		return nil, os.WriteFile("/proc/sys/net/ipv4/tcp_fwmark_accept", []byte("0"), 0)
	})
	if c.VerifyWay() == nil {
		t.Error("a setting that was taken back was not found")
	}
	s.install(t)
	other := capture.New(s.workload)
	defer other.Close()
	if err := other.Remove(returnMark); err != nil {
		t.Fatal(err)
	}
	s.install(t)
	if err := c.VerifyWay(); err != nil {
		t.Errorf("after it was installed again: %v", err)
	}
}
