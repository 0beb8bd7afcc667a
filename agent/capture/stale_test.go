package capture_test

import (
	"encoding/binary"
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
