package meter_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"assay.dev/agent/capture"
	"assay.dev/agent/internal/lab"
	"assay.dev/agent/meter"
	"assay.dev/agent/netns"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { lab.Main(m) }

const (
	ownMark    = 0x41535301
	returnMark = 0x41535302
	mine       = "10.181.7.2"
	theirs     = "10.181.7.3"
	mine6      = "fd5a:5a59::7:0:0:2"
	theirs6    = "fd5a:5a59::7:0:0:3"
)

// bench is a workload's namespace with capture and meter, and a peer beside it.
type bench struct {
	t                 *testing.T
	host              *netns.Host
	workload, other   *netns.Namespace
	outbound, inbound net.Listener
	capture           *capture.Capture
	meter             *meter.Meter
}

func setup(t *testing.T) *bench {
	t.Helper()
	prefixes := lab.Prefixes("10.181.7.0/24", "fd5a:5a59:0:0:7::/80")
	b := &bench{t: t, host: lab.Host(t, "asy-meter", prefixes, lab.Prefixes("10.181.0.0/16", "fd5a:5a59::/64")), workload: lab.Namespace(t), other: lab.Namespace(t)}
	b.outbound = lab.Listen(t, b.workload, "tcp", "[::]:0")
	b.inbound = lab.Listen(t, b.workload, "tcp", "[::]:0")
	b.capture, b.meter = capture.New(b.workload), meter.New(b.workload)
	for i, ns := range []*netns.Namespace{b.workload, b.other} {
		if err := b.host.Attach(ns, b.host.Port(uint32(i)), lab.Addrs([]string{mine, theirs}[i], []string{mine6, theirs6}[i])); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

func port(a net.Addr) uint16 { return netip.MustParseAddrPort(a.String()).Port() }

// install writes rules of both, with ports excluded.
func (b *bench) install(excluded ...uint16) {
	b.t.Helper()
	if err := b.capture.Install(capture.Rules{OutboundPort: port(b.outbound.Addr()), InboundPort: port(b.inbound.Addr()), OwnMark: ownMark, ReturnMark: returnMark, Excluded: excluded}, nil); err != nil {
		b.t.Fatal(err)
	}
	if err := b.meter.Install(meter.Config{Link: netns.Interface, OwnMark: ownMark, Excluded: excluded}, b.link); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) link() (meter.Traffic, error) {
	l, err := b.host.Traffic(b.host.Port(0))
	return meter.Traffic{In: meter.Count{Packets: l.InPackets, Bytes: l.InBytes}, Out: meter.Count{Packets: l.OutPackets, Bytes: l.OutBytes}}, err
}

// read returns a reading that no frame disturbed, and what it leaves unexplained.
func (b *bench) read() (r *meter.Reading, in, out int64) {
	b.t.Helper()
	lab.Eventually(b.t, "a quiet link", func() bool {
		before, err := b.link()
		if err != nil {
			b.t.Fatal(err)
		}
		if r, err = b.meter.Read(); err != nil {
			b.t.Fatal(err)
		}
		after, _ := b.link()
		in, out = r.Unexplained(before, after)
		return before == after
	})
	return r, in, out
}

// balanced fails the test unless every byte has its place.
func (b *bench) balanced() *meter.Reading {
	b.t.Helper()
	r, in, out := b.read()
	if in != 0 || out != 0 {
		link, _ := b.link()
		b.t.Errorf("unexplained: %d bytes in, %d out; link %+v, reading %+v", in, out, link, *r)
	}
	return r
}

// flow finds the one flow of class with port.
func flow(t *testing.T, r *meter.Reading, class meter.Class, port uint16) meter.Flow {
	t.Helper()
	i := slices.IndexFunc(r.Flows, func(f meter.Flow) bool { return f.Class == class && f.Port == port })
	if i < 0 {
		t.Fatalf("no flow of %s, port %d: %+v", class, port, r.Flows)
	}
	return r.Flows[i]
}

func (b *bench) packetConn(ns *netns.Namespace, addr string) *net.UDPConn {
	b.t.Helper()
	c := lab.In(b.t, ns, func() (net.PacketConn, error) { return net.ListenPacket("udp", addr) })
	b.t.Cleanup(func() { c.Close() })
	return c.(*net.UDPConn)
}

// exchange sends a datagram from one to the other, and an answer back.
func exchange(t *testing.T, from, to *net.UDPConn, size, answer int) {
	t.Helper()
	send := func(from, to *net.UDPConn, size int) {
		t.Helper()
		addr := to.LocalAddr().(*net.UDPAddr)
		if _, err := from.WriteTo(bytes.Repeat([]byte{'x'}, size), addr); err != nil {
			t.Fatal(err)
		}
		to.SetReadDeadline(time.Now().Add(5 * time.Second))
		if n, _, err := to.ReadFrom(make([]byte, size+1)); err != nil || n != size {
			t.Fatalf("%d bytes, %v; want %d", n, err, size)
		}
	}
	send(from, to, size)
	send(to, from, answer)
}

func TestDatagrams(t *testing.T) {
	b := setup(t)
	b.install()
	for _, c := range []struct {
		mine, theirs string
		header       uint64
	}{{mine, theirs, 14 + 20 + 8}, {mine6, theirs6, 14 + 40 + 8}} {
		remote := netip.MustParseAddr(c.theirs)
		// The workload asks.
		server := b.packetConn(b.other, net.JoinHostPort(c.theirs, "0"))
		exchange(t, b.packetConn(b.workload, net.JoinHostPort(c.mine, "0")), server, 100, 200)
		f := flow(t, b.balanced(), meter.UDP, port(server.LocalAddr()))
		want := meter.Flow{FlowKey: meter.FlowKey{Class: meter.UDP, Remote: remote, Port: port(server.LocalAddr()), Protocol: unix.IPPROTO_UDP},
			In: meter.Count{Packets: 1, Bytes: 200 + c.header}}
		answer := want
		want.In, want.Out = meter.Count{}, meter.Count{Packets: 1, Bytes: 100 + c.header}
		if f != want && f != answer {
			t.Errorf("asked: %+v, want %+v or %+v", f, want, answer)
		}
		// The workload is asked: the port is its own.
		server = b.packetConn(b.workload, net.JoinHostPort(c.mine, "0"))
		exchange(t, b.packetConn(b.other, net.JoinHostPort(c.theirs, "0")), server, 300, 400)
		r := b.balanced()
		f = flow(t, r, meter.UDP, port(server.LocalAddr()))
		if !f.Inbound || f.Remote != remote {
			t.Errorf("is asked: %+v", f)
		}
		var in, out uint64
		for _, f := range r.Flows {
			if f.Remote == remote {
				in, out = in+f.In.Bytes, out+f.Out.Bytes
			}
		}
		if in != 200+300+2*c.header || out != 100+400+2*c.header {
			t.Errorf("%s: %d bytes in, %d out", remote, in, out)
		}
	}
	if r := b.balanced(); r.Control["arp"].Out.Packets+r.Control["arp"].In.Packets == 0 || r.Control["icmp"].Out.Packets == 0 {
		t.Errorf("control traffic: %+v", r.Control)
	}
}

// A datagram larger than the link is one packet and many frames.
func TestFragments(t *testing.T) {
	b := setup(t)
	b.install()
	for _, a := range [][2]string{{mine, theirs}, {mine6, theirs6}} {
		server := b.packetConn(b.other, net.JoinHostPort(a[1], "0"))
		exchange(t, b.packetConn(b.workload, net.JoinHostPort(a[0], "0")), server, 20_000, 30_000)
	}
	if r := b.balanced(); r.Fragments.In.Packets == 0 || r.Fragments.Out.Packets == 0 {
		t.Errorf("fragments: %+v", r.Fragments)
	}
}

// What the workload sends to a group comes back to it without having been on the link.
func TestMulticastToOneself(t *testing.T) {
	b := setup(t)
	b.install()
	c := b.packetConn(b.workload, mine+":0")
	lab.In(t, b.workload, func() (int, error) {
		raw, err := c.SyscallConn()
		if err != nil {
			return 0, err
		}
		raw.Control(func(fd uintptr) {
			link, _ := net.InterfaceByName(netns.Interface)
			err = unix.SetsockoptIPMreqn(int(fd), unix.IPPROTO_IP, unix.IP_ADD_MEMBERSHIP, &unix.IPMreqn{Multiaddr: [4]byte{239, 1, 2, 3}, Ifindex: int32(link.Index)})
		})
		return 0, err
	})
	if _, err := c.WriteTo(make([]byte, 500), &net.UDPAddr{IP: net.IPv4(239, 1, 2, 3), Port: 5353}); err != nil {
		t.Fatal(err)
	}
	f := flow(t, b.balanced(), meter.UDP, 5353)
	if f.Out.Bytes != 500+42 || f.In.Bytes != 0 {
		t.Errorf("%+v", f)
	}
}

func TestPing(t *testing.T) {
	if _, err := exec.LookPath("ping"); err != nil {
		t.Skip(err)
	}
	b := setup(t)
	b.install()
	if err := b.workload.Do(func() error {
		if out, err := exec.Command("ping", "-c", "2", "-i", "0.01", theirs).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if r := b.balanced(); r.Exceptions[meter.ICMP].Out.Packets != 2 || r.Exceptions[meter.ICMP].In.Packets != 2 {
		t.Errorf("%+v", r.Exceptions)
	}
}

// echo answers every connection with what it sends, until the listener is closed.
func echo(t *testing.T, l net.Listener) {
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.Copy(c, c)
			}()
		}
	}()
	t.Cleanup(func() { l.Close() })
}

// talk sends n bytes and reads them back.
func talk(t *testing.T, c net.Conn, n int) {
	t.Helper()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	go c.Write(make([]byte, n))
	if _, err := io.ReadFull(c, make([]byte, n)); err != nil {
		t.Fatal(err)
	}
}

func (b *bench) dial(ns *netns.Namespace, addr string) net.Conn {
	b.t.Helper()
	c, err := lab.Dial(ns, addr)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { c.Close() })
	return c
}

// What the proxy dials and what is led to it is the proxy's, to the last byte.
func TestTheProxysOwn(t *testing.T) {
	b := setup(t)
	echo(t, b.inbound)
	peer := lab.Listen(t, b.other, "tcp", "[::]:0")
	echo(t, peer)
	b.install()
	for _, addr := range []string{mine, mine6} {
		c := b.dial(b.other, net.JoinHostPort(addr, "80"))
		talk(t, c, 3<<20)
		c.Close()
	}
	for _, addr := range []string{theirs, theirs6} {
		d := net.Dialer{Timeout: 3 * time.Second, Control: func(_, _ string, raw syscall.RawConn) error {
			return raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, ownMark) })
		}}
		c := lab.In(t, b.workload, func() (net.Conn, error) {
			return d.DialContext(context.Background(), "tcp", net.JoinHostPort(addr, fmt.Sprint(port(peer.Addr()))))
		})
		talk(t, c, 3<<20)
		c.Close()
	}
	// Names are asked for in datagrams.
	server := b.packetConn(b.other, theirs+":0")
	client := b.packetConn(b.workload, mine+":0")
	raw, _ := client.SyscallConn()
	raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, ownMark) })
	exchange(t, client, server, 50, 500)
	r := b.balanced()
	if r.Proxy.In.Bytes < 12<<20 || r.Proxy.Out.Bytes < 12<<20 {
		t.Errorf("the proxy's: %+v", r.Proxy)
	}
	for c, e := range r.Exceptions {
		if e != (meter.Traffic{}) {
			t.Errorf("%s: %+v", c, e)
		}
	}
}

func TestExcludedPorts(t *testing.T) {
	b := setup(t)
	app := lab.Listen(t, b.workload, "tcp", "[::]:0")
	echo(t, app)
	far := lab.Listen(t, b.other, "tcp", "[::]:0")
	echo(t, far)
	b.install(port(app.Addr()), port(far.Addr()))
	in := b.dial(b.other, net.JoinHostPort(mine6, fmt.Sprint(port(app.Addr()))))
	talk(t, in, 1<<20)
	out := b.dial(b.workload, net.JoinHostPort(theirs, fmt.Sprint(port(far.Addr()))))
	talk(t, out, 1<<20)
	r := b.balanced()
	var inBytes, outBytes uint64
	for _, f := range r.Flows {
		if f.Class != meter.Excluded || f.Inbound != (f.Port == port(app.Addr())) {
			t.Errorf("%+v", f)
		}
		inBytes, outBytes = inBytes+f.In.Bytes, outBytes+f.Out.Bytes
	}
	total := r.Exceptions[meter.Excluded]
	if total.In.Bytes != inBytes || total.Out.Bytes != outBytes || inBytes < 2<<20 || outBytes < 2<<20 {
		t.Errorf("total %+v, flows %d in, %d out", total, inBytes, outBytes)
	}
	// The ports are captured from now on: what exists goes on and is older. (An acknowledgement
	// may still have come before.)
	b.install()
	total = b.balanced().Exceptions[meter.Excluded]
	talk(t, in, 1000)
	talk(t, out, 1000)
	r = b.balanced()
	if f := flow(t, r, meter.Older, port(app.Addr())); !f.Inbound {
		t.Errorf("%+v", f)
	}
	if f := flow(t, r, meter.Older, port(far.Addr())); f.Inbound {
		t.Errorf("%+v", f)
	}
	if r.Exceptions[meter.Escaped] != (meter.Traffic{}) || r.Exceptions[meter.Excluded] != total {
		t.Errorf("%+v", r.Exceptions)
	}
}

func TestOlderThanTheCapture(t *testing.T) {
	b := setup(t)
	app, far := lab.Listen(t, b.workload, "tcp", "[::]:0"), lab.Listen(t, b.other, "tcp", "[::]:0")
	echo(t, app)
	echo(t, far)
	var conns []net.Conn
	for _, a := range [][2]string{{mine, theirs}, {mine6, theirs6}} {
		conns = append(conns, b.dial(b.other, net.JoinHostPort(a[0], fmt.Sprint(port(app.Addr())))), b.dial(b.workload, net.JoinHostPort(a[1], fmt.Sprint(port(far.Addr())))))
	}
	for _, c := range conns {
		talk(t, c, 100_000)
	}
	b.install()
	for _, c := range conns {
		talk(t, c, 1<<20)
	}
	r := b.balanced()
	if f := flow(t, r, meter.Older, port(app.Addr())); !f.Inbound {
		t.Errorf("%+v", f)
	}
	if f := flow(t, r, meter.Older, port(far.Addr())); f.Inbound {
		t.Errorf("%+v", f)
	}
	if got := r.Exceptions[meter.Older]; got.In.Bytes < 4<<20 || got.Out.Bytes < 4<<20 || r.Exceptions[meter.Escaped] != (meter.Traffic{}) {
		t.Errorf("%+v", r.Exceptions)
	}
}

// raw sends one packet of an IP protocol from a raw socket.
func (b *bench) raw(protocol int, payload []byte) {
	b.t.Helper()
	lab.In(b.t, b.workload, func() (int, error) {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, protocol)
		if err != nil {
			return 0, err
		}
		defer unix.Close(fd)
		return 0, unix.Sendto(fd, payload, 0, &unix.SockaddrInet4{Addr: netip.MustParseAddr(theirs).As4()})
	})
}

// Protocols that this kernel may not have are made by hand.
func TestOtherTransports(t *testing.T) {
	b := setup(t)
	b.install()
	ports := []byte{0x30, 0x39, 0x0b, 0x59} // 12345 to 2905
	init := append(append(slices.Clone(ports), 0, 0, 0, 0 /* tag */, 0, 0, 0, 0 /* CRC32c */, 1, 0, 0, 20), make([]byte, 16)...)
	b.raw(unix.IPPROTO_SCTP, init)
	b.raw(unix.IPPROTO_DCCP, append(slices.Clone(ports), make([]byte, 12)...))
	b.raw(unix.IPPROTO_UDPLITE, append(slices.Clone(ports), 0, 8, 0xff, 0xff, 'x')) // its checksum is wrong: of no connection
	b.raw(47, []byte("no tunnel"))
	r := b.balanced()
	for class, want := range map[meter.Class]uint64{meter.SCTP: 32, meter.DCCP: 16, meter.UDPLite: 9, meter.IP: 9} {
		if got := r.Exceptions[class].Out; got != (meter.Count{Packets: 1, Bytes: want + 34}) {
			t.Errorf("%s: %+v", class, got)
		}
	}
	if f := flow(t, r, meter.SCTP, 2905); f.Remote != netip.MustParseAddr(theirs) {
		t.Errorf("%+v", f)
	}
	if f := flow(t, r, meter.IP, 0); f.Protocol != 47 {
		t.Errorf("%+v", f)
	}
}

// segment is a TCP segment that no socket of the kernel sent.
func segment(flags byte) []byte {
	return append([]byte{0x30, 0x39, 0x01, 0xbb, 0, 0, 0, 1, 0, 0, 0, 1, 5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0}, "over the wall"...)
}

// A raw socket is not captured, unless it sends what a connection begins with.
func TestEscape(t *testing.T) {
	b := setup(t)
	b.install()
	b.raw(unix.IPPROTO_TCP, segment(0x10))
	r := b.balanced()
	beside := r.Exceptions[meter.Escaped].Out
	if beside.Packets != 1 || beside.Bytes != 34+33 {
		t.Errorf("%+v, %+v", r.Exceptions, r.Control)
	}
}

// Frames that no rule sees are found by the link's own counters.
func TestFramesBesideTheRules(t *testing.T) {
	for _, bypass := range []int{0, 1} {
		t.Run(fmt.Sprintf("bypass=%d", bypass), func(t *testing.T) {
			b := setup(t)
			b.install()
			b.balanced()
			frame := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x08, 0x00}, make([]byte, 1000)...)
			frame[14] = 0x45
			lab.In(t, b.workload, func() (int, error) {
				link, err := net.InterfaceByName(netns.Interface)
				if err != nil {
					return 0, err
				}
				fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
				if err != nil {
					return 0, err
				}
				defer unix.Close(fd)
				if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, bypass); err != nil {
					return 0, err
				}
				return 0, unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Ifindex: link.Index, Halen: 6})
			})
			_, in, out := b.read()
			if in != 0 || out != 1014 {
				t.Errorf("unexplained: %d in, %d out; want 1014 out", in, out)
			}
		})
	}
}

// However many remote ends there are, memory is bounded and the total is right.
func TestManyRemotes(t *testing.T) {
	b := setup(t)
	b.install()
	server := b.packetConn(b.workload, mine+":0")
	client := b.packetConn(b.workload, mine+":0")
	const n = 3000
	for i := range n {
		if _, err := client.WriteTo([]byte("x"), &net.UDPAddr{IP: net.ParseIP(theirs), Port: 1 + i}); err != nil {
			t.Fatal(err)
		}
	}
	server.Close()
	r := b.balanced()
	if got := r.Exceptions[meter.UDP].Out; got.Packets != n {
		t.Errorf("%d packets, want %d", got.Packets, n)
	}
	if len(r.Flows) == 0 || len(r.Flows) > 1024 {
		t.Errorf("%d flows", len(r.Flows))
	}
}

func TestCountsOutliveRules(t *testing.T) {
	b := setup(t)
	if err := b.meter.Verify(); err == nil {
		t.Error("verified what is not there")
	}
	b.install()
	server := b.packetConn(b.other, theirs+":0")
	exchange(t, b.packetConn(b.workload, mine+":0"), server, 100, 100)
	want := b.balanced()
	b.meter = meter.New(b.workload) // another agent
	b.install(25)
	got := b.balanced()
	if got.Exceptions[meter.UDP] != want.Exceptions[meter.UDP] || got.Before != want.Before || len(got.Flows) != len(want.Flows) {
		t.Errorf("%+v, want %+v", got, want)
	}
	if err := b.meter.Verify(); err != nil {
		t.Error(err)
	}
	lab.In(t, b.workload, func() (int, error) {
		return 0, exec.Command("nft", "insert", "rule", "inet", meter.Table, "out", "accept").Run()
	})
	if err := b.meter.Verify(); err == nil {
		t.Error("a rule that was added is not noticed")
	}
	b.install(25)
	if err := b.meter.Verify(); err != nil {
		t.Error(err)
	}
	lab.In(t, b.workload, func() (int, error) { return 0, exec.Command("nft", "delete", "table", "inet", meter.Table).Run() })
	if _, err := b.meter.Read(); err == nil {
		t.Error("read from a table that is gone")
	}
	b.install()
	b.balanced()
}

// TestCost says what reading costs; it bounds it generously.
func TestCost(t *testing.T) {
	b := setup(t)
	b.install()
	server := b.packetConn(b.other, theirs+":0")
	exchange(t, b.packetConn(b.workload, mine+":0"), server, 1, 1)
	fastest := time.Hour
	for range 50 {
		begin := time.Now()
		if _, err := b.meter.Read(); err != nil {
			t.Fatal(err)
		}
		fastest = min(fastest, time.Since(begin))
	}
	t.Log("the fastest of 50 readings takes", fastest)
	if fastest > 50*time.Millisecond {
		t.Errorf("a reading takes %v", fastest)
	}
}

// TestOlderConnections: connections that are older than the capture are listed while they
// exist, and can be ended; others are not among them.
func TestOlderConnections(t *testing.T) {
	b := setup(t)
	app, far := lab.Listen(t, b.workload, "tcp", "[::]:0"), lab.Listen(t, b.other, "tcp", "[::]:0")
	echo(t, app)
	echo(t, far)
	echo(t, b.inbound)
	var conns []net.Conn
	for _, a := range []string{mine, mine6} {
		conns = append(conns, b.dial(b.other, net.JoinHostPort(a, fmt.Sprint(port(app.Addr())))))
	}
	for _, a := range []string{theirs, theirs6} {
		conns = append(conns, b.dial(b.workload, net.JoinHostPort(a, fmt.Sprint(port(far.Addr())))))
	}
	for _, c := range conns {
		talk(t, c, 1000)
	}
	d := net.Dialer{Timeout: 20 * time.Second, Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, ownMark) })
	}}
	own := lab.In(t, b.workload, func() (net.Conn, error) {
		return d.DialContext(context.Background(), "tcp", net.JoinHostPort(theirs, fmt.Sprint(port(far.Addr()))))
	})
	defer own.Close()
	talk(t, own, 1000)
	b.install()
	fresh := b.dial(b.other, net.JoinHostPort(mine, fmt.Sprint(port(app.Addr()))))
	talk(t, fresh, 1000)
	older := func(n int) []meter.OlderConnection {
		t.Helper()
		var list []meter.OlderConnection
		lab.Eventually(t, fmt.Sprintf("%d older connections", n), func() bool {
			var err error
			if list, _, err = b.meter.OlderConnections(1, 2); err != nil {
				t.Fatal(err)
			}
			return len(list) == n
		})
		return list
	}
	list := older(4)
	for _, c := range list {
		if c.Inbound != (c.Local.Port() == port(app.Addr())) {
			t.Errorf("%+v", c)
		}
	}
	conns[3].Close()
	list = older(3)
	b.install(port(far.Addr())) // what may go beside the proxy is left alone
	if got := older(2); !got[0].Inbound || !got[1].Inbound {
		t.Errorf("with the other's port excluded: %+v", got)
	}
	if err := b.meter.End(list); err != nil {
		t.Fatal(err)
	}
	older(0)
	for _, c := range conns[:3] {
		c.SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: %v", c.LocalAddr(), err)
		}
	}
	if err := b.meter.End(list); err != nil {
		t.Errorf("those that have ended: %v", err)
	}
	talk(t, fresh, 1000)
	talk(t, own, 1000)
}

// TestManyOlderConnections: however many there are, all are listed and can be ended.
func TestManyOlderConnections(t *testing.T) {
	b := setup(t)
	const many = 2200 // more than the kernel is asked to remember of one role and family
	far := lab.Listen(t, b.other, "tcp", "[::]:0")
	var held sync.WaitGroup
	defer held.Wait()
	held.Go(func() {
		for range many {
			c, err := far.Accept()
			if err != nil {
				return
			}
			held.Go(func() { io.Copy(io.Discard, c); c.Close() })
		}
	})
	to := net.JoinHostPort(theirs, fmt.Sprint(port(far.Addr())))
	for range many {
		defer b.dial(b.workload, to).Close()
	}
	b.install()
	list, unclear, err := b.meter.OlderConnections(1, 2)
	if err != nil || len(list) != many || unclear != 0 {
		t.Fatalf("%d older connections, %d unclear, %v; want %d", len(list), unclear, err, many)
	}
	if err := b.meter.End(list); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, "all have ended", func() bool {
		list, unclear, err := b.meter.OlderConnections(1, 2)
		return err == nil && len(list)+unclear == 0
	})
}

// TestSharedLocalPort: connections to different destinations may have one local address and
// port, so a captured one hides no older one.
func TestSharedLocalPort(t *testing.T) {
	b := setup(t)
	one, two := lab.Listen(t, b.other, "tcp", "[::]:0"), lab.Listen(t, b.other, "tcp", "[::]:0")
	for _, l := range []net.Listener{one, two, b.outbound} {
		echo(t, l)
	}
	local := 0
	dial := func(to string, port uint16) net.Conn {
		t.Helper()
		d := net.Dialer{Timeout: 20 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(mine), Port: local}, Control: func(_, _ string, raw syscall.RawConn) error {
			return raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
		}}
		c := lab.In(t, b.workload, func() (net.Conn, error) {
			return d.DialContext(context.Background(), "tcp", net.JoinHostPort(to, fmt.Sprint(port)))
		})
		t.Cleanup(func() { c.Close() })
		talk(t, c, 1000)
		return c
	}
	older := dial(theirs, port(one.Addr()))
	local = older.LocalAddr().(*net.TCPAddr).Port
	b.install()
	listed := func(when string, want, wantUnclear int) {
		t.Helper()
		lab.Eventually(t, fmt.Sprintf("%s, %d listed, %d unclear", when, want, wantUnclear), func() bool {
			list, unclear, err := b.meter.OlderConnections(port(b.outbound.Addr()), port(b.inbound.Addr()))
			return err == nil && len(list) == want && unclear == wantUnclear
		})
	}
	listed("alone", 1, 0)
	// The listener's end of a connection alone: the older one may be its other end.
	led := dial("127.0.0.1", port(b.outbound.Addr()))
	listed("with the listener's end alone", 0, 1)
	dial(theirs, port(two.Addr()))
	listed("beside one that is captured", 1, 0)
	led.Close()
	listed("beside that alone", 1, 0)
}
