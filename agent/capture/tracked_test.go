package capture_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"assay.dev/agent/internal/lab"
	"assay.dev/agent/netns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// nft runs a command of nft's in a namespace.
func nft(t *testing.T, ns *netns.Namespace, command string) string {
	t.Helper()
	return string(lab.In(t, ns, func() ([]byte, error) {
		out, err := exec.Command("nft", command).CombinedOutput()
		if err != nil {
			t.Fatalf("nft %s: %s", command, out)
		}
		return out, nil
	}))
}

// relayed is a connection through the proxy, and what each end of it has.
type relayed struct{ client, atProxy, out, app net.Conn }

func relay(t *testing.T, s *host, app net.Listener) (r relayed) {
	t.Helper()
	keep := func(c net.Conn, err error) net.Conn {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(20 * time.Second))
		return c
	}
	addr := app.Addr().String()
	r.client = keep(lab.Dial(s.other, addr))
	r.atProxy = keep(s.inbound.Accept())
	r.out = keep(dialFrom(s.workload, r.client.LocalAddr().(*net.TCPAddr).AddrPort(), addr))
	r.app = keep(app.Accept())
	return r
}

// TestForgotten: what the kernel no longer tracks does not pass beside the proxy. What the
// application answers to a client ends there and then; what a client makes up does not arrive.
func TestForgotten(t *testing.T) {
	s := setupContained(t)
	app := lab.Listen(t, s.workload, "tcp", appAt.String())
	s.install(t)
	r := relay(t, s, app)
	if _, err := io.WriteString(r.app, "tracked"); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 7)
	if _, err := io.ReadFull(r.out, b); string(b) != "tracked" {
		t.Fatalf("the proxy reads %q, %v", b, err)
	}

	lab.In(t, s.workload, func() (any, error) { return nil, netlink.ConntrackTableFlush(netlink.ConntrackTable) })
	nft(t, s.other, "table inet seen { chain c { type filter hook prerouting priority 0; tcp sport 8080 counter; }; }")
	io.WriteString(r.app, "forgotten")
	if _, err := r.app.Read(b); err == nil || errors.Is(err, io.EOF) || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the application reads %v, want a reset", err)
	}
	if seen := nft(t, s.other, "list table inet seen"); !strings.Contains(seen, "packets 0 ") {
		t.Errorf("it left the namespace:\n%s", seen)
	}

	nft(t, s.workload, "table inet seen { chain c { type filter hook input priority 0; iifname eth0 tcp dport 8080 counter; }; }")
	ack(t, s.other, netip.AddrPortFrom(strangerAt, 45001), appAt, 50000)
	// What comes after it, on the same link, has been seen.
	greet(t, s.inbound, "inbound")
	expect(t, s.other, appAt.String(), "inbound")
	if seen := nft(t, s.workload, "list table inet seen"); !strings.Contains(seen, "packets 0 ") {
		t.Errorf("it reached the application:\n%s", seen)
	}
}

// TestTrack: what the proxy's mark carries and was there before the rules goes on, whoever speaks
// first.
func TestTrack(t *testing.T) {
	s := setupContained(t)
	l := lab.Listen(t, s.other, "tcp", "10.181.7.3:80")
	if _, err := s.capture.(*contained).ask(order{Do: "track"}); err != nil {
		t.Fatal(err)
	}
	near, err := dialFrom(s.workload, netip.AddrPort{}, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	s.install(t)
	nft(t, s.workload, "table inet seen { chain c { type filter hook input priority 0; tcp sport 80 ct mark != 0x41535301 counter; }; }")
	near.SetDeadline(time.Now().Add(20 * time.Second))
	io.WriteString(far, "hello")
	b := make([]byte, 5)
	if _, err := io.ReadFull(near, b); err != nil {
		t.Error(err)
	}
	if seen := nft(t, s.workload, "list table inet seen"); !strings.Contains(seen, "packets 0 ") {
		t.Errorf("it is not known as the proxy's:\n%s", seen)
	}
	if err := s.capture.Remove(returnMark); err != nil {
		t.Fatal(err)
	}
	if left := nft(t, s.workload, "list tables"); left != "table inet seen\n" {
		t.Errorf("left: %s", left)
	}
}

// TestPatience: a connection that one side has closed is not forgotten after a minute.
func TestPatience(t *testing.T) {
	for at, family := range map[string]netlink.InetFamily{appAt.String(): unix.AF_INET, "[fd5a:5a59::7:0:0:2]:8080": unix.AF_INET6} {
		t.Run(at, func(t *testing.T) { patience(t, at, family) })
	}
}

func patience(t *testing.T, at string, family netlink.InetFamily) {
	s := setupContained(t)
	app := lab.Listen(t, s.workload, "tcp", at)
	s.install(t)
	r := relay(t, s, app)
	r.client.(*net.TCPConn).CloseWrite()
	b := make([]byte, 1)
	if _, err := r.atProxy.Read(b); err != io.EOF {
		t.Fatalf("the proxy reads %v", err)
	}
	r.out.(*net.TCPConn).CloseWrite()
	if _, err := r.app.Read(b); err != io.EOF {
		t.Fatalf("the application reads %v", err)
	}
	lab.Eventually(t, "both legs are remembered", func() bool {
		list := lab.In(t, s.workload, func() ([]*netlink.ConntrackFlow, error) {
			return netlink.ConntrackTableList(netlink.ConntrackTable, family)
		})
		n := 0
		for _, f := range list {
			if f.TimeOut > 3000 && f.TimeOut <= 3600 {
				n++
			}
		}
		return n == 2
	})
}

// TestLegIsVerified: the table of the leg is what was written, or that is noticed and repaired.
func TestLegIsVerified(t *testing.T) {
	s := setupContained(t)
	s.install(t)
	for _, change := range []string{"flush chain inet assay_leg output", "insert rule inet assay_leg output accept", "delete table inet assay_leg"} {
		nft(t, s.workload, change)
		if err := s.capture.Verify(); err == nil {
			t.Errorf("after %q: not noticed", change)
		}
		s.install(t)
		if err := s.capture.Verify(); err != nil {
			t.Errorf("repaired after %q: %v", change, err)
		}
	}
	if err := s.capture.Remove(returnMark); err != nil {
		t.Fatal(err)
	}
	if left := nft(t, s.workload, "list tables"); left != "" {
		t.Errorf("left: %s", left)
	}
}

// TestSamePortAgain: a client that begins one connection after the other from the same port is
// served each time, whoever ends the one before, and however.
func TestSamePortAgain(t *testing.T) { everywhere(t, samePortAgain) }

func samePortAgain(t *testing.T, setup func(testing.TB, ...uint16) *host) {
	s := setup(t)
	app := lab.Listen(t, s.workload, "tcp", appAt.String())
	s.install(t)
	from := netip.AddrPortFrom(strangerAt, 45001)
	for i := range 24 {
		client, err := dial(s.other, from, appAt.String(), 20*time.Second)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		in, err := s.inbound.Accept()
		if err != nil {
			t.Fatal(err)
		}
		out, err := dialFrom(s.workload, from, appAt.String())
		if err != nil {
			t.Fatalf("connection %d: the application: %v", i, err)
		}
		served, err := app.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if got := served.RemoteAddr().String(); got != from.String() {
			t.Fatalf("connection %d: the application sees %s", i, got)
		}
		b := make([]byte, 4)
		served.SetDeadline(time.Now().Add(20 * time.Second))
		io.WriteString(out, "ping")
		if _, err := io.ReadFull(served, b); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		if i%3 == 2 {
			served.(*net.TCPConn).SetLinger(0)
		}
		first, second := out, served // who is in TIME_WAIT
		if i%2 == 1 {
			first, second = second, first
		}
		first.Close()
		second.Close()
		in.Close()
		client.(*net.TCPConn).SetLinger(0) // else its own kernel keeps the port
		client.Close()
	}
}
