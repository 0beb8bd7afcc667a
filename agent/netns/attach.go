package netns

import (
	"errors"
	"fmt"
	"hash/crc32"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Interface is the name of a workload's one link.
const Interface = "eth0"

// Port returns the name of the bridge's port for the host's n-th workload. It says
// whose it is, so that a sweep after a crash finds it.
func (h *Host) Port(n uint32) string { return fmt.Sprintf("%s%08x", h.portPrefix(), n) }

func (h *Host) portPrefix() string {
	return fmt.Sprintf("asv%04x", crc32.ChecksumIEEE([]byte(h.Bridge))&0xffff)
}

// Ports lists the ports that exist.
func (h *Host) Ports() ([]string, error) {
	links, err := Whole(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var ports []string
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, h.portPrefix()) && l.Type() == "veth" {
			ports = append(ports, l.Attrs().Name)
		}
	}
	return ports, nil
}

// Attach joins a namespace to the bridge through port and gives it addresses, one
// of each of the host's prefixes at most. Only frames with these addresses pass the
// port. Everything is up and usable when it returns.
func (h *Host) Attach(ns *Namespace, port string, addrs []netip.Addr) error {
	bridge, err := netlink.LinkByName(h.Bridge)
	if err != nil {
		return fmt.Errorf("bridge %s: %w", h.Bridge, err)
	}
	if err := h.Allow(port, addrs); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = port
	attrs.MasterIndex = bridge.Attrs().Index
	attrs.MTU = bridge.Attrs().MTU
	veth := netlink.NewVeth(attrs)
	veth.PeerName = Interface
	veth.PeerHardwareAddr = workloadHardwareAddr(addrs)
	veth.PeerNamespace = netlink.NsFd(ns.FD())
	veth.PeerMTU = uint32(bridge.Attrs().MTU)
	if err := netlink.LinkAdd(veth); err != nil {
		return errors.Join(fmt.Errorf("link %s: %w", port, err), h.deny(port, addrs))
	}
	err = func() error {
		link, err := netlink.LinkByName(port)
		if err != nil {
			return err
		}
		if err := quietIPv6(port); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		return ns.Do(func() error { return h.inside(addrs) })
	}()
	if err != nil {
		return errors.Join(fmt.Errorf("link %s: %w", port, err), h.Detach(port))
	}
	return nil
}

// inside configures the calling thread's namespace.
func (h *Host) inside(addrs []netip.Addr) error {
	if err := set(
		sysctl{name: "ipv4/conf/all/rp_filter", value: "0"},
		sysctl{name: "ipv4/conf/default/rp_filter", value: "0"},
		sysctl{name: "ipv4/conf/" + Interface + "/rp_filter", value: "0"},
		sysctl{name: "ipv4/conf/lo/rp_filter", value: "0"},
		// Like in a container: ports below 1024 protect nobody in a namespace that
		// belongs to one workload, and ping works without a raw socket.
		sysctl{name: "ipv4/ip_unprivileged_port_start", value: "0"},
		sysctl{name: "ipv4/ping_group_range", value: "0 2147483647", optional: true},
	); err != nil {
		return err
	}
	if haveIPv6() {
		if err := set(
			sysctl{name: "ipv6/conf/all/disable_ipv6", value: "0"},
			sysctl{name: "ipv6/conf/lo/disable_ipv6", value: "0"},
		); err != nil {
			return err
		}
	}
	if err := quietIPv6(Interface); err != nil {
		return err
	}
	for _, name := range []string{"lo", Interface} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if name == Interface {
			for _, a := range addrs {
				if err := h.address(link, a); err != nil {
					return err
				}
			}
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	link, err := netlink.LinkByName(Interface)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		p := h.prefixOf(a)
		if a.Is6() && !haveIPv6() {
			continue
		}
		gw := Allocator{Prefix: p}
		def := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		if a.Is6() {
			def = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		r := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(def), Gw: gw.Gateway().AsSlice(), Protocol: protocol}
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("default route via %s: %w", gw.Gateway(), err)
		}
	}
	return nil
}

func (h *Host) address(link netlink.Link, a netip.Addr) error {
	p := h.prefixOf(a)
	if !p.IsValid() {
		return fmt.Errorf("address %s: not in a prefix of this host (%v)", a, h.Prefixes)
	}
	if a.Is6() && !haveIPv6() {
		return nil
	}
	addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, p.Bits()))}
	if a.Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("address %s: %w", addr, err)
	}
	return nil
}

func (h *Host) prefixOf(a netip.Addr) netip.Prefix {
	for _, p := range h.Prefixes {
		if p.Contains(a) {
			return p
		}
	}
	return netip.Prefix{}
}

// Detach removes a port, and with it the namespace's link. A port that is not
// there is no error.
func (h *Host) Detach(port string) error {
	link, err := netlink.LinkByName(port)
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err != nil && !errors.As(err, new(netlink.LinkNotFoundError)) && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove link %s: %w", port, err)
	}
	return h.denyPort(port)
}

// workloadHardwareAddr depends only on the first address.
func workloadHardwareAddr(addrs []netip.Addr) []byte {
	if len(addrs) == 0 {
		return nil
	}
	return hardwareAddr(addrs[0].String())
}

// LoopbackDown reports whether the namespace's lo is known to be down.
func (n *Namespace) LoopbackDown() (down bool) {
	n.Do(func() error {
		link, err := netlink.LinkByName("lo")
		if err == nil {
			down = link.Attrs().RawFlags&unix.IFF_UP == 0
		}
		return err
	})
	return down
}

// RaiseLoopback brings lo up.
func (n *Namespace) RaiseLoopback() error {
	return n.Do(func() error {
		link, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(link)
		}
		if err != nil {
			return fmt.Errorf("lo: %w", err)
		}
		return nil
	})
}

// HasAddress reports whether the workload's link in the namespace has a.
func (n *Namespace) HasAddress(a netip.Addr) bool {
	found := false
	n.Do(func() error {
		link, err := netlink.LinkByName(Interface)
		if err != nil {
			return err
		}
		list, err := Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_ALL) })
		for _, have := range list {
			p, ok := prefix(have.IPNet)
			found = found || ok && p.Addr() == a
		}
		return err
	})
	return found
}

// Traffic is what passed a link, in frames and bytes, as the workload sees it.
type Traffic struct{ InPackets, InBytes, OutPackets, OutBytes uint64 }

// Traffic reads the counters of a port: the host's end of a workload's link, which
// the workload cannot reach. What the host sends, the workload receives.
func (h *Host) Traffic(port string) (Traffic, error) {
	link, err := netlink.LinkByName(port)
	if err != nil {
		return Traffic{}, fmt.Errorf("link %s: %w", port, err)
	}
	s := link.Attrs().Statistics
	if s == nil {
		return Traffic{}, fmt.Errorf("link %s: the kernel tells no counters", port)
	}
	return Traffic{InPackets: s.TxPackets, InBytes: s.TxBytes, OutPackets: s.RxPackets, OutBytes: s.RxBytes}, nil
}
