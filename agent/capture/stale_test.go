package capture_test

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"assay.dev/agent/capture"
	"assay.dev/agent/internal/lab"
	"assay.dev/agent/netns"
	"golang.org/x/sys/unix"
)

// ack sends an ACK of no connection that acknowledges up to n.
func ack(t *testing.T, ns *netns.Namespace, from, to netip.AddrPort, n uint32) {
	t.Helper()
	seg := binary.BigEndian.AppendUint16(nil, from.Port())
	seg = binary.BigEndian.AppendUint16(seg, to.Port())
	seg = binary.BigEndian.AppendUint32(seg, 1000)
	seg = binary.BigEndian.AppendUint32(seg, n)
	seg = append(seg, 5<<4, 0x10, 0xff, 0xff, 0, 0, 0, 0)
	pseudo := append(from.Addr().AsSlice(), to.Addr().AsSlice()...)
	pseudo = append(pseudo, 0, unix.IPPROTO_TCP, 0, byte(len(seg)))
	sum := uint32(0)
	for b := append(pseudo, seg...); len(b) > 0; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(seg[16:], ^uint16(sum+sum>>16))
	lab.In(t, ns, func() (any, error) {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP)
		if err != nil {
			return nil, err
		}
		defer unix.Close(fd)
		return nil, unix.Sendto(fd, seg, 0, &unix.SockaddrInet4{Addr: to.Addr().As4()})
	})
}

// knock begins a connection from a port of its own and returns who answered: "" for
// nobody.
func knock(t *testing.T, ns *netns.Namespace, from netip.AddrPort, to string, within time.Duration) string {
	t.Helper()
	c, err := dial(ns, from, to, within)
	if err != nil {
		return ""
	}
	defer c.Close()
	b := make([]byte, 100)
	c.SetReadDeadline(time.Now().Add(3 * time.Second))
	n, _ := c.Read(b)
	return string(b[:n])
}

var (
	appAt      = netip.MustParseAddrPort("10.181.7.2:8080")
	strangerAt = netip.MustParseAddr("10.181.7.3")
)

// TestStale: what the kernel tracked before the capture, with a rule of the workload's
// own, cannot be begun anew past the proxy, from neither side.
func TestStale(t *testing.T) {
	s := setup(t)
	greet(t, s.inbound, "inbound")
	greet(t, s.outbound, "outbound")
	greet(t, lab.Listen(t, s.workload, "tcp", appAt.String()), "application")
	there := netip.MustParseAddrPort("10.181.7.3:80")
	greet(t, lab.Listen(t, s.other, "tcp", there.String()), "elsewhere")
	nft := func(rule string) {
		t.Helper()
		lab.In(t, s.workload, func() (any, error) {
			out, err := exec.Command("nft", rule).CombinedOutput()
			if err != nil {
				t.Fatalf("nft %s: %s", rule, out)
			}
			return nil, nil
		})
	}
	// Resets would end what is tracked.
	nft("table inet own { chain c { type filter hook output priority -400; tcp flags rst drop; }; chain d { type filter hook prerouting priority -400; tcp flags rst drop; }; chain e { type filter hook input priority 0; ct state new counter; }; }")
	in, out := netip.AddrPortFrom(strangerAt, 45001), netip.AddrPortFrom(appAt.Addr(), 45002)
	ack(t, s.other, in, appAt, 50000)
	ack(t, s.workload, out, there, 50000)
	s.install(t)
	if err := s.capture.Verify(); err != nil {
		t.Error(err)
	}
	for _, try := range []struct {
		ns   *netns.Namespace
		from netip.AddrPort
		to   string
	}{{s.other, in, appAt.String()}, {s.workload, out, there.String()}} {
		if who := knock(t, try.ns, try.from, try.to, 300*time.Millisecond); who != "" {
			t.Errorf("%s to %s: answered by %q", try.from, try.to, who)
		}
	}
	refused, err := s.capture.Refused()
	if err != nil || refused != (capture.Refused{Stale: 2}) {
		t.Errorf("counted %+v, %v", refused, err)
	}
	// Others are not concerned, and nobody is any more once the workload is released.
	expect(t, s.other, appAt.String(), "inbound")
	expect(t, s.workload, there.String(), "outbound")
	s.rules.Released = true
	s.install(t)
	if who := knock(t, s.other, in, appAt.String(), 3*time.Second); who != "application" {
		t.Errorf("released: answered by %q", who)
	}
}

// TestReuse: a client that uses the port of a connection that was there before the
// capture, and ended after it, is captured.
func TestReuse(t *testing.T) {
	s := setup(t)
	greet(t, s.inbound, "inbound")
	app := lab.Listen(t, s.workload, "tcp", appAt.String())
	for port := uint16(45001); port < 45010; port++ {
		from := netip.AddrPortFrom(strangerAt, port)
		old, err := dial(s.other, from, appAt.String(), 3*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		served, err := app.Accept()
		if err != nil {
			t.Fatal(err)
		}
		// Half of its end is before the capture, so that the kernel sees the other half.
		served.Close()
		s.install(t)
		old.Close()
		if who := knock(t, s.other, from, appAt.String(), 3*time.Second); who != "inbound" {
			t.Errorf("answered by %q", who)
		}
		if err := s.capture.Remove(returnMark); err != nil {
			t.Fatal(err)
		}
	}
	left := string(lab.In(t, s.workload, func() ([]byte, error) {
		return exec.Command("sysctl", "-n", "net.netfilter.nf_conntrack_tcp_loose", "net.netfilter.nf_conntrack_tcp_be_liberal",
			"net.netfilter.nf_conntrack_tcp_timeout_close_wait", "net.netfilter.nf_conntrack_tcp_timeout_fin_wait").Output()
	}))
	if got := strings.Join(strings.Fields(left), " "); got != "1 0 60 120" {
		t.Errorf("the settings are %s", got)
	}
}

// TestTranslatedElsewhere: rules of the workload's own that lead a connection past the proxy,
// by translating it before the capture can, by not having it tracked, or by way of a port that is
// excluded, end in nothing.
func TestTranslatedElsewhere(t *testing.T) { everywhere(t, translatedElsewhere) }

func translatedElsewhere(t *testing.T, setup func(testing.TB, ...uint16) *host) {
	s := setup(t, 7777)
	for name, l := range map[string]net.Listener{
		"inbound": s.inbound, "outbound": s.outbound,
		"application": lab.Listen(t, s.workload, "tcp", "[::]:8081"), "excluded": lab.Listen(t, s.workload, "tcp", "[::]:7777"),
		"elsewhere": lab.Listen(t, s.other, "tcp", "[::]:81"), "excluded there": lab.Listen(t, s.other, "tcp", "[::]:7777"),
	} {
		greet(t, l, name)
	}
	s.install(t)
	port := uint16(46000)
	for _, try := range []struct {
		what, hook, rule, to, want string
	}{
		{"in, elsewhere", "prerouting", "tcp dport 8080 redirect to :8081", "10.181.7.2:8080", ""},
		{"in, elsewhere", "prerouting", "tcp dport 8080 redirect to :8081", "[fd5a:5a59::7:0:0:2]:8080", ""},
		{"in, to what is excluded", "prerouting", "tcp dport 8080 redirect to :7777", "10.181.7.2:8080", ""},
		{"in, from what is excluded", "prerouting", "tcp dport 7777 redirect to :8081", "10.181.7.2:7777", ""},
		{"in, not tracked", "raw prerouting", "tcp dport 8081 notrack", "10.181.7.2:8081", ""},
		{"out, not tracked", "raw output", "tcp dport 81 notrack", "10.181.7.3:81", ""},
		{"in, the capture's own", "prerouting", fmt.Sprintf("tcp dport 8080 redirect to :%d", s.rules.InboundPort), "10.181.7.2:8080", "inbound"},
		{"in, excluded", "prerouting", "tcp dport 9999 redirect to :8081", "10.181.7.2:7777", "excluded"},
		{"out, elsewhere", "output", "tcp dport 80 dnat ip to 10.181.7.3:81", "10.181.7.3:80", ""},
		{"out, elsewhere", "output", "tcp dport 80 dnat ip6 to [fd5a:5a59::7:0:0:3]:81", "[fd5a:5a59::7:0:0:3]:80", ""},
		{"out, to what is excluded", "output", "tcp dport 80 dnat ip to 10.181.7.3:7777", "10.181.7.3:80", ""},
		{"out, from what is excluded", "output", "tcp dport 7777 dnat ip to 10.181.7.3:81", "10.181.7.3:7777", ""},
		{"out, excluded", "output", "tcp dport 9999 redirect to :8081", "10.181.7.3:7777", "excluded there"},
	} {
		kind, priority := "nat", -110
		hook, raw := strings.CutPrefix(try.hook, "raw ")
		if raw {
			kind, priority = "filter", -310
		}
		out := map[bool]int{true: 1}[hook == "output"]
		from, source := []*netns.Namespace{s.other, s.workload}[out], []netip.Addr{strangerAt, appAt.Addr()}[out]
		if try.to[0] == '[' {
			source = lab.Addrs("fd5a:5a59::7:0:0:3", "fd5a:5a59::7:0:0:2")[out]
		}
		nft(t, s.workload, fmt.Sprintf("table inet own { chain c { type %s hook %s priority %d; %s; }; }", kind, hook, priority, try.rule))
		before, err := s.capture.Refused()
		if err != nil {
			t.Fatal(err)
		}
		within := 300 * time.Millisecond
		if try.want != "" {
			within = 20 * time.Second
		}
		port++
		if who := knock(t, from, netip.AddrPortFrom(source, port), try.to, within); who != try.want {
			t.Errorf("%s: answered by %q, want %q", try.what, who, try.want)
		}
		after, err := s.capture.Refused()
		if err != nil || (after.Stale > before.Stale) != (try.want == "") {
			t.Errorf("%s: counted %+v, then %+v, %v", try.what, before, after, err)
		}
		nft(t, s.workload, "delete table inet own")
	}
}
