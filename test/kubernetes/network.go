package kubernetes

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"assay.dev/agent/netns"
)

// The addresses of every cluster: they exist in its own namespaces only.
var (
	machines = []netip.Prefix{netip.MustParsePrefix("10.89.0.0/24"), netip.MustParsePrefix("fd00:89::/64")}
	services = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:10:96::/112")}
	pods     = []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:10:244::/48")}
)

// families keeps the prefixes of the IP versions that pods and services have.
func (o *Options) families(list []netip.Prefix) (kept []netip.Prefix) {
	for _, p := range list {
		if p.Addr().Is4() && strings.Contains(o.Families, "4") || p.Addr().Is6() && strings.Contains(o.Families, "6") {
			kept = append(kept, p)
		}
	}
	return kept
}

// serviceRanges and allPods are those of the whole cluster, as its programs want them.
func (o *Options) serviceRanges() string { return commas(o.families(services)) }
func (o *Options) allPods() string       { return commas(o.families(pods)) }

func commas(list []netip.Prefix) string {
	var text []string
	for _, p := range list {
		text = append(text, p.String())
	}
	return strings.Join(text, ",")
}

// dns is the address of CoreDNS's service.
func (o *Options) dns() string {
	if o.Families == "6" {
		return "fd00:10:96::a"
	}
	return "10.96.0.10"
}

// of are a machine's addresses that Kubernetes knows, the first one first.
func (o *Options) of(m *Machine) string {
	switch o.Families {
	case "4":
		return m.IPv4.String()
	case "6":
		return m.IPv6.String()
	}
	return m.IPv4.String() + "," + m.IPv6.String()
}

// address returns the machine's addresses: n is 1 for the control plane, then the
// nodes from 11.
func address(n int) (v4, v6 netip.Addr) {
	return netip.AddrFrom4([4]byte{10, 89, 0, byte(n)}), netip.MustParseAddr(fmt.Sprintf("fd00:89::%x", n))
}

// podRanges returns the addresses of a node's pods.
func podRanges(node int) []netip.Prefix {
	return []netip.Prefix{
		netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(node), 0}), 24),
		netip.MustParsePrefix(fmt.Sprintf("fd00:10:244:%x::/64", node)),
	}
}

// newSwitch makes a network namespace with a bridge: what the machines' cables are
// plugged into.
func newSwitch() (*os.File, error) {
	var file *os.File
	err := netns.OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("network namespace: %w", err)
		}
		bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "switch", HardwareAddr: net.HardwareAddr{2, 0, 0, 0x89, 0, 0}}}
		if err := netlink.LinkAdd(bridge); err != nil {
			return fmt.Errorf("bridge: %w", err)
		}
		if err := netlink.LinkSetUp(bridge); err != nil {
			return fmt.Errorf("bridge: %w", err)
		}
		// Packets cross it as they cross a switch: no rule of an upper layer sees them.
		for _, name := range []string{"iptables", "ip6tables", "arptables"} {
			_ = os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+name, []byte("0"), 0)
		}
		var err error
		file, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	return file, err
}

// plugIn connects a machine with the switch and gives it its addresses.
func plugIn(sw *os.File, m *Machine) error {
	var space *os.File
	for i, k := range kinds {
		if k.name == "net" {
			space = m.spaces[i]
		}
	}
	err := netns.OnThread(func() error {
		if err := unix.Setns(int(sw.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		bridge, err := netlink.LinkByName("switch")
		if err != nil {
			return err
		}
		if old, err := netlink.LinkByName(m.Name); err == nil { // the machine was rebooted
			if err := netlink.LinkDel(old); err != nil {
				return err
			}
		}
		cable := &netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: m.Name, MasterIndex: bridge.Attrs().Index},
			PeerName:      "eth0",
			PeerNamespace: netlink.NsFd(space.Fd()),
		}
		if err := netlink.LinkAdd(cable); err != nil {
			return err
		}
		return netlink.LinkSetUp(cable)
	})
	if err == nil {
		err = m.In(func() error { return m.configureNetwork() })
	}
	if err != nil {
		return fmt.Errorf("network of %s: %w", m.Name, err)
	}
	return nil
}

// configureNetwork runs on a thread in the machine's network namespace.
func (m *Machine) configureNetwork() error {
	for file, value := range map[string]string{
		"ipv4/ip_forward":             "1",
		"ipv6/conf/all/forwarding":    "1",
		"ipv6/conf/all/accept_dad":    "0", // no waiting on links that we made
		"ipv6/conf/eth0/accept_dad":   "0",
		"ipv6/conf/default/accept_ra": "0",
	} {
		if err := os.WriteFile("/proc/sys/net/"+file, []byte(value), 0); err != nil {
			return err
		}
	}
	for _, name := range []string{"lo", "eth0"} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if name == "eth0" {
			for i, ip := range []netip.Addr{m.IPv4, m.IPv6} {
				a, err := netlink.ParseAddr(netip.PrefixFrom(ip, machines[i].Bits()).String())
				if err != nil {
					return err
				}
				a.Flags = unix.IFA_F_NODAD
				if err := netlink.AddrAdd(link, a); err != nil {
					return fmt.Errorf("address %s: %w", ip, err)
				}
			}
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
	}
	return nil
}

// route tells a machine the way to the pods of another one.
func (m *Machine) route(to *Machine) error {
	return m.In(func() error {
		var errs error
		for _, prefix := range to.Pods {
			_, dst, err := net.ParseCIDR(prefix.String())
			if err != nil {
				return err
			}
			gateway := to.IPv4
			if prefix.Addr().Is6() {
				gateway = to.IPv6
			}
			if err := netlink.RouteReplace(&netlink.Route{Dst: dst, Gw: gateway.AsSlice()}); err != nil {
				errs = errors.Join(errs, fmt.Errorf("route %s on %s: %w", prefix, m.Name, err))
			}
		}
		return errs
	})
}

// defaultRoute sends what is for nowhere to a link that is nowhere: without any
// default route, programs that look for this machine's main address find none.
func (m *Machine) defaultRoute(gateway *Machine) error {
	return m.In(func() error {
		var errs error
		for _, ip := range []netip.Addr{gateway.IPv4, gateway.IPv6} {
			if err := netlink.RouteReplace(&netlink.Route{Gw: ip.AsSlice()}); err != nil {
				errs = errors.Join(errs, fmt.Errorf("default route on %s: %w", m.Name, err))
			}
		}
		return errs
	})
}
