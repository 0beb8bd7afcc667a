package netns_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"assay.dev/agent/internal/lab"
	"assay.dev/agent/netns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { lab.Main(m) }

var (
	prefixes = lab.Prefixes("10.181.7.0/24", "fd5a:5a59:0:0:7::/80")
	mesh     = lab.Prefixes("10.181.0.0/16", "10.182.0.0/16", "fd5a:5a59::/64", "fd5a:5a59:1::/112")
)

func attach(t *testing.T, h *netns.Host, n uint32, addrs ...string) *netns.Namespace {
	t.Helper()
	ns := lab.Namespace(t)
	if err := h.Attach(ns, h.Port(n), lab.Addrs(addrs...)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Detach(h.Port(n)); err != nil {
			t.Error(err)
		}
	})
	return ns
}

func exchange(t *testing.T, from, to *netns.Namespace, addr string) error {
	t.Helper()
	l := lab.Listen(t, to, "tcp", addr)
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			io.WriteString(c, "hello")
			c.Close()
		}
	}()
	c, err := lab.Dial(from, l.Addr().String())
	if err != nil {
		return err
	}
	defer c.Close()
	if b, err := io.ReadAll(c); err != nil || string(b) != "hello" {
		return errors.Join(errors.New("got "+string(b)), err)
	}
	return nil
}

func TestWorkloadsReachEachOther(t *testing.T) {
	h := lab.Host(t, "asy-reach", prefixes, mesh)
	a := attach(t, h, 1, "10.181.7.2", "fd5a:5a59::7:0:0:2")
	b := attach(t, h, 2, "10.181.7.3", "fd5a:5a59::7:0:0:3")
	// Nobody asks first whether somebody else has them, which takes a second.
	for _, addr := range lab.In(t, b, func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V6) }) {
		if addr.Flags&unix.IFA_F_TENTATIVE != 0 {
			t.Errorf("%s is tentative", addr)
		}
	}
	for _, addr := range []string{"10.181.7.3:0", "[fd5a:5a59::7:0:0:3]:0"} {
		if err := exchange(t, a, b, addr); err != nil {
			t.Errorf("%s: %v", addr, err)
		}
	}
	// The same call again changes nothing that works.
	if err := h.Setup(); err != nil {
		t.Fatal(err)
	}
	if err := exchange(t, b, a, "10.181.7.2:0"); err != nil {
		t.Error(err)
	}
}

func TestAddressOfAnotherIsDropped(t *testing.T) {
	h := lab.Host(t, "asy-spoof", prefixes, mesh)
	liar := attach(t, h, 1, "10.181.7.2", "fd5a:5a59::7:0:0:2")
	honest := attach(t, h, 2, "10.181.7.3", "fd5a:5a59::7:0:0:3")
	if err := exchange(t, liar, honest, "10.181.7.3:0"); err != nil {
		t.Fatal(err)
	}
	// The liar takes addresses that it was not given.
	lab.In(t, liar, func() (any, error) {
		link, err := netlink.LinkByName(netns.Interface)
		if err != nil {
			return nil, err
		}
		for _, s := range []string{"10.181.7.9/24", "fd5a:5a59::7:0:0:9/80"} {
			a, err := netlink.ParseAddr(s)
			if err != nil {
				return nil, err
			}
			a.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrAdd(link, a); err != nil {
				return nil, err
			}
		}
		return nil, nil
	})
	for _, pair := range [][2]string{{"10.181.7.9", "10.181.7.3:0"}, {"fd5a:5a59::7:0:0:9", "[fd5a:5a59::7:0:0:3]:0"}} {
		l := lab.Listen(t, honest, "tcp", pair[1])
		err := liar.Do(func() error {
			d := net.Dialer{Timeout: 400 * time.Millisecond, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(pair[0]), 0))}
			c, err := d.Dial("tcp", l.Addr().String())
			if err == nil {
				c.Close()
			}
			return err
		})
		if err == nil {
			t.Errorf("a connection from %s, which is not the workload's, was accepted", pair[0])
		}
	}
	// And nobody finds the liar at the stolen address.
	for _, addr := range []string{"10.181.7.9:0", "[fd5a:5a59::7:0:0:9]:0"} {
		l := lab.Listen(t, liar, "tcp", addr)
		err := honest.Do(func() error {
			c, err := net.DialTimeout("tcp", l.Addr().String(), 400*time.Millisecond)
			if err == nil {
				c.Close()
			}
			return err
		})
		if err == nil {
			t.Errorf("the stolen address %s answers", addr)
		}
	}
	if err := exchange(t, liar, honest, "10.181.7.3:0"); err != nil {
		t.Errorf("its own address: %v", err)
	}
}

// outside is a host beyond the workloads' host, joined by a veth pair.
func outside(t *testing.T) *netns.Namespace {
	t.Helper()
	ns := lab.Namespace(t)
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "uplink"
	v := netlink.NewVeth(attrs)
	v.PeerName, v.PeerNamespace = "eth0", netlink.NsFd(ns.FD())
	if err := netlink.LinkAdd(v); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(v) })
	configure := func(name, addr string) error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(addr)
		if err != nil {
			return err
		}
		return errors.Join(netlink.AddrAdd(link, a), netlink.LinkSetUp(link))
	}
	if err := configure("uplink", "192.0.2.1/24"); err != nil {
		t.Fatal(err)
	}
	lab.In(t, ns, func() (any, error) { return nil, configure("eth0", "192.0.2.2/24") })
	return ns
}

func TestLeavingTheMeshIsTranslated(t *testing.T) {
	far := outside(t)
	h := lab.Host(t, "asy-leave", prefixes, mesh)
	w := attach(t, h, 1, "10.181.7.2", "fd5a:5a59::7:0:0:2")
	l := lab.Listen(t, far, "tcp", "192.0.2.2:0")
	peer := make(chan string, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			peer <- err.Error()
			return
		}
		peer <- c.RemoteAddr().(*net.TCPAddr).IP.String()
		c.Close()
	}()
	c, err := lab.Dial(w, l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if got := <-peer; got != "192.0.2.1" {
		t.Errorf("the outside saw %s, want the host's address", got)
	}
}

// Another host's packets are forwarded to workloads, in both families.
func TestForwardingIn(t *testing.T) {
	far := outside(t)
	h := lab.Host(t, "asy-in", prefixes, mesh)
	link, err := netlink.LinkByName("uplink")
	if err != nil {
		t.Fatal(err)
	}
	add := func(link netlink.Link, addr string) error {
		a, err := netlink.ParseAddr(addr)
		if err == nil {
			a.Flags = unix.IFA_F_NODAD
			err = netlink.AddrAdd(link, a)
		}
		return err
	}
	if err := add(link, "2001:db8::1/64"); err != nil {
		t.Fatal(err)
	}
	lab.In(t, far, func() (any, error) {
		eth, err := netlink.LinkByName("eth0")
		if err != nil {
			return nil, err
		}
		if err := add(eth, "2001:db8::2/64"); err != nil {
			return nil, err
		}
		for i, p := range prefixes {
			_, dst, err := net.ParseCIDR(p.String())
			if err != nil {
				return nil, err
			}
			if err := netlink.RouteAdd(&netlink.Route{Dst: dst, Gw: net.ParseIP([]string{"192.0.2.1", "2001:db8::1"}[i])}); err != nil {
				return nil, err
			}
		}
		return nil, nil
	})
	w := attach(t, h, 1, "10.181.7.2", "fd5a:5a59::7:0:0:2")
	for _, addr := range []string{"10.181.7.2:0", "[fd5a:5a59::7:0:0:2]:0"} {
		if err := exchange(t, far, w, addr); err != nil {
			t.Errorf("%s: %v", addr, err)
		}
	}
}

func TestMeshAddressesNeverLeaveByTheDefaultRoute(t *testing.T) {
	far := outside(t)
	_ = far
	link, err := netlink.LinkByName("uplink")
	if err != nil {
		t.Fatal(err)
	}
	_, all, _ := net.ParseCIDR("0.0.0.0/0")
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: all, Gw: net.ParseIP("192.0.2.2")}); err != nil {
		t.Fatal(err)
	}
	h := lab.Host(t, "asy-default", prefixes, mesh)
	w := attach(t, h, 1, "10.181.7.2", "fd5a:5a59::7:0:0:2")
	_, err = lab.Dial(w, "10.182.0.9:80")
	if !errors.Is(err, unix.EHOSTUNREACH) && !errors.Is(err, unix.ENETUNREACH) {
		t.Errorf("dial of a virtual address: %v, want unreachable at once", err)
	}
}

func TestPeers(t *testing.T) {
	outside(t)
	h := lab.Host(t, "asy-peers", prefixes, mesh)
	via := netip.MustParseAddr("192.0.2.2")
	peers := []netns.Peer{{Via: via, Prefixes: lab.Prefixes("10.181.8.0/24")}, {Via: via, Prefixes: lab.Prefixes("10.181.9.0/24")}}
	routed := func() (n int) {
		list, err := netlink.RouteList(nil, netlink.FAMILY_V4)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range list {
			if r.Gw.Equal(net.IP(via.AsSlice())) {
				n++
			}
		}
		return n
	}
	for _, want := range []int{2, 1, 0, 2} {
		if err := h.SetPeers(peers[:want]); err != nil {
			t.Fatal(err)
		}
		if got := routed(); got != want {
			t.Errorf("%d routes to peers, want %d", got, want)
		}
	}
}

func TestBeside(t *testing.T) {
	outside(t)
	link, err := netlink.LinkByName("uplink")
	if err != nil {
		t.Fatal(err)
	}
	four := netip.MustParseAddr("192.0.2.1")
	if got := netns.Beside(four); got.IsValid() {
		t.Errorf("an address beside a link that has none: %s", got)
	}
	for _, s := range []string{"fe80::5/64", "2001:db8::5/64"} {
		a, err := netlink.ParseAddr(s)
		if err != nil {
			t.Fatal(err)
		}
		a.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(link, a); err != nil {
			t.Fatal(err)
		}
	}
	if got := netns.Beside(four); got.String() != "2001:db8::5" {
		t.Errorf("beside %s: %s", four, got)
	}
	h := lab.Host(t, "asy-six", prefixes, mesh)
	if err := h.SetPeers([]netns.Peer{{Via: netip.MustParseAddr("192.0.2.2"), Via6: netip.MustParseAddr("2001:db8::6"), Prefixes: lab.Prefixes("10.181.8.0/24", "fd5a:5a59:0:0:8::/80")}}); err != nil {
		t.Error(err)
	}
}

func TestRemoveLeavesNothing(t *testing.T) {
	before := state(t)
	h := lab.Host(t, "asy-remove", prefixes, mesh)
	for n := range uint32(3) {
		ns := lab.Namespace(t)
		if err := h.Attach(ns, h.Port(n), []netip.Addr{netip.MustParseAddr("10.181.7.10").Next()}); err != nil && n == 0 {
			t.Fatal(err)
		}
	}
	if err := h.Remove(); err != nil {
		t.Fatal(err)
	}
	if after := state(t); after != before {
		t.Errorf("links and routes before %v, after %v", before, after)
	}
}

func state(t *testing.T) [2]int {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	return [2]int{len(links), len(routes)}
}

func TestOnThreadKeepsTheProcessWhereItIs(t *testing.T) {
	before, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for range 50 {
		ns, err := netns.Create()
		if err != nil {
			t.Fatal(err)
		}
		ns.Do(func() error { return nil })
		ns.Close()
	}
	if after, _ := os.Readlink("/proc/self/ns/net"); after != before {
		t.Errorf("the process moved from %s to %s", before, after)
	}
}

func TestAllocator(t *testing.T) {
	a := netns.Allocator{Prefix: netip.MustParsePrefix("10.181.7.0/29")}
	used := map[netip.Addr]bool{}
	inUse := func(x netip.Addr) bool { return used[x] }
	var got []string
	for range 5 {
		x, err := a.Next(inUse)
		if err != nil {
			t.Fatal(err)
		}
		used[x] = true
		got = append(got, x.String())
	}
	if got[0] != "10.181.7.2" || got[4] != "10.181.7.6" {
		t.Errorf("handed out %v", got)
	}
	if x, err := a.Next(inUse); err == nil {
		t.Errorf("a full prefix handed out %s", x)
	}
	// What was given back last is used again last.
	delete(used, netip.MustParseAddr("10.181.7.6"))
	delete(used, netip.MustParseAddr("10.181.7.3"))
	if x, _ := a.Next(inUse); x.String() != "10.181.7.3" {
		t.Errorf("next is %s, want 10.181.7.3", x)
	}
}
