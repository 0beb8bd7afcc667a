package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"assay.dev/agent/netns"
)

// interfaceAddrs lists the addresses of the thread's network namespace.
func interfaceAddrs() ([]netip.Addr, error) {
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, err
	}
	var addrs []netip.Addr
	for _, a := range list {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			addrs = append(addrs, ip.Unmap())
		}
	}
	return addrs, nil
}

// Node is a plain host on the uplink.
type Node struct {
	*Space
	Name string
	IPv4 netip.Addr
	IPv6 netip.Addr
}

// Node adds a plain host to the uplink and gives it a name in DNS.
func (l *Lab) Node(t TB, name string) *Node {
	t.Helper()
	l.mu.Lock()
	l.nodes++
	n := l.nodes
	l.mu.Unlock()
	node := &Node{
		Name: name,
		IPv4: netip.AddrFrom4([4]byte{10, 90, 0, byte(10 + n)}),
		IPv6: netip.MustParseAddr(fmt.Sprintf("fd00:90::%x", 0x10+n)),
	}
	if err := l.addNode(node, fmt.Sprintf("node%d", n)); err != nil {
		t.Fatalf("make host %s: %v", name, err)
	}
	l.Names.Set(name, node.IPv4, node.IPv6)
	t.Cleanup(node.Close)
	return node
}

func (l *Lab) addNode(node *Node, link string) error {
	// The namespace is made by a thread that ends at once; the open file keeps it.
	var file *os.File
	err := netns.OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("network namespace: %w", err)
		}
		var err error
		file, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		return err
	}
	node.Space = &Space{net: file}
	if node.pid, err = os.Open(fmt.Sprintf("/proc/%d/ns/pid", l.init.Process.Pid)); err != nil {
		return err
	}
	if node.mnt, err = os.Open(fmt.Sprintf("/proc/%d/ns/mnt", l.init.Process.Pid)); err != nil {
		return err
	}
	err = l.In(func() error {
		bridge, err := netlink.LinkByName(uplinkName)
		if err != nil {
			return err
		}
		veth := &netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: link, MasterIndex: bridge.Attrs().Index},
			PeerName:      "eth0",
			PeerNamespace: netlink.NsFd(file.Fd()),
		}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("link %s: %w", link, err)
		}
		return netlink.LinkSetUp(veth)
	})
	if err != nil {
		return err
	}
	return node.In(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		eth, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		if err := errors.Join(netlink.LinkSetUp(lo),
			addAddr(eth, node.IPv4.String()+"/24"), addAddr(eth, node.IPv6.String()+"/64"),
			netlink.LinkSetUp(eth)); err != nil {
			return err
		}
		for _, gateway := range []string{UplinkIPv4, UplinkIPv6} {
			gw := netip.MustParseAddr(gateway)
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: eth.Attrs().Index, Gw: gw.AsSlice()}); err != nil {
				return fmt.Errorf("route by %s: %w", gateway, err)
			}
		}
		return nil
	})
}
