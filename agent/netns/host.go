package netns

import (
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// protocol marks the routes that are ours (RTA_PROTOCOL), so that they are found
// again and nobody else's is touched.
const protocol = 181

// Host is the host's side of its workloads' network, in the namespace that the
// process runs in. Its state is the kernel's: a new Host with the same bridge name
// continues where another process ended.
type Host struct {
	// Bridge is the bridge's name, at most 15 bytes. Several agents in one network
	// namespace need different ones.
	Bridge string
	// Prefixes hold this host's workloads; Mesh are the networks of all workloads
	// and virtual addresses.
	Prefixes, Mesh []netip.Prefix
}

// Peer is another host.
type Peer struct {
	Via      netip.Addr // where it can be reached
	Via6     netip.Addr // for IPv6 prefixes, when Via is IPv4
	Prefixes []netip.Prefix
}

// Setup makes the bridge, its addresses, forwarding, routes and filters as the
// fields say. It may be called again, also when they have changed: what is there
// already stays, so running workloads notice nothing.
func (h *Host) Setup() error {
	if len(h.Bridge) == 0 || len(h.Bridge) > 15 {
		return fmt.Errorf("bridge name %q: want 1 to 15 bytes", h.Bridge)
	}
	if err := h.bridge(); err != nil {
		return fmt.Errorf("bridge %s: %w", h.Bridge, err)
	}
	if err := h.forwarding(); err != nil {
		return err
	}
	if err := h.unreachable(); err != nil {
		return err
	}
	return h.filter()
}

func (h *Host) bridge() error {
	link, err := netlink.LinkByName(h.Bridge)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		snooping := false // without a querier it would lose neighbour discovery
		attrs := netlink.NewLinkAttrs()
		attrs.Name = h.Bridge
		attrs.HardwareAddr = hardwareAddr(h.Bridge) // or it would change with its ports
		err = netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping})
		if err == nil {
			link, err = netlink.LinkByName(h.Bridge)
		}
	}
	if err != nil {
		return err
	}
	if _, ok := link.(*netlink.Bridge); !ok {
		return fmt.Errorf("there is a link of this name that is a %s", link.Type())
	}
	if err := quietIPv6(h.Bridge); err != nil {
		return err
	}
	for _, p := range h.Prefixes {
		if p.Addr().Is6() && !haveIPv6() {
			continue
		}
		a := Allocator{Prefix: p}
		addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a.Gateway(), p.Bits()))}
		if p.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := netlink.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("address %s: %w", addr, err)
		}
	}
	if haveIPv6() {
		// A router asks for neighbours from a link-local address; without one it
		// forwards nothing to them (RFC 4861 section 7.2.2).
		addr := &netlink.Addr{IPNet: ipNet(netip.MustParsePrefix("fe80::1/64")), Flags: unix.IFA_F_NODAD}
		if err := netlink.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("address %s: %w", addr, err)
		}
	}
	return netlink.LinkSetUp(link)
}

// forwarding lets the host forward. Turning on IPv6 forwarding makes a kernel that
// configures itself by router advertisements stop doing so (accept_ra 1), which
// would cost the host its own default route an hour later; accept_ra 2 keeps it.
func (h *Host) forwarding() error {
	if err := set(sysctl{name: "ipv4/ip_forward", value: "1"}); err != nil {
		return fmt.Errorf("forwarding: %w", err)
	}
	if !haveIPv6() {
		return nil
	}
	conf, err := filepath.Glob("/proc/sys/net/ipv6/conf/*/accept_ra")
	if err != nil {
		return err
	}
	for _, path := range conf {
		if v, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(v)) == "1" {
			name, _ := strings.CutPrefix(path, "/proc/sys/net/")
			if err := set(sysctl{name: name, value: "2", optional: true}); err != nil {
				return err
			}
		}
	}
	if err := set(sysctl{name: "ipv6/conf/all/forwarding", value: "1"}); err != nil {
		return fmt.Errorf("forwarding: %w", err)
	}
	return nil
}

// unreachable keeps what is addressed to the mesh inside it: a packet to an address
// that no host owns is answered "unreachable" here instead of following the host's
// default route into somebody else's network.
func (h *Host) unreachable() error {
	for _, p := range h.Mesh {
		if p.Addr().Is6() && !haveIPv6() {
			continue
		}
		r := &netlink.Route{Dst: ipNet(p.Masked()), Type: unix.RTN_UNREACHABLE, Protocol: protocol, Priority: h.metric()}
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("unreachable route for %s: %w", p, err)
		}
	}
	return nil
}

// SetPeers replaces the routes to other hosts' prefixes.
func (h *Host) SetPeers(peers []Peer) error {
	want := map[netip.Prefix]netip.Addr{}
	for _, peer := range peers {
		for _, p := range peer.Prefixes {
			if p.Addr().Is6() && !haveIPv6() {
				continue
			}
			for _, via := range []netip.Addr{peer.Via.Unmap(), peer.Via6} {
				// A next hop of IPv6 can carry both; one of IPv4 only its own.
				if via.IsValid() && (via.Is6() || p.Addr().Is4()) {
					want[p.Masked()] = via
					break
				}
			}
		}
	}
	for _, r := range h.routes(unix.RTN_UNICAST) {
		p, ok := prefix(r.Dst)
		if _, wanted := want[p]; ok && !wanted {
			if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("remove route to %s: %w", p, err)
			}
		}
	}
	var failed error
	for p, via := range want {
		r := &netlink.Route{Dst: ipNet(p), Protocol: protocol, Priority: h.metric() - 1}
		if via.Is4() == p.Addr().Is4() {
			r.Gw = via.AsSlice()
		} else {
			r.Via = &netlink.Via{AddrFamily: family(via), Addr: via.AsSlice()}
		}
		if err := netlink.RouteReplace(r); err != nil {
			failed = errors.Join(failed, fmt.Errorf("route to %s via %s: %w", p, via, err))
		}
	}
	return failed
}

// Remove takes away everything on the host's side. Forwarding stays on: others may
// have come to need it.
func (h *Host) Remove() error {
	var failed error
	for _, kind := range []int{unix.RTN_UNICAST, unix.RTN_UNREACHABLE} {
		for _, r := range h.routes(kind) {
			if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
				failed = errors.Join(failed, fmt.Errorf("remove route %s: %w", r.Dst, err))
			}
		}
	}
	ports, err := h.Ports()
	failed = errors.Join(failed, err)
	for _, port := range ports {
		failed = errors.Join(failed, h.Detach(port))
	}
	if link, err := netlink.LinkByName(h.Bridge); err == nil {
		failed = errors.Join(failed, netlink.LinkDel(link))
	}
	return errors.Join(failed, h.removeFilter())
}

// routes lists our routes of one type. The metric tells agents apart that share a
// network namespace.
func (h *Host) routes(kind int) []netlink.Route {
	metric := h.metric()
	if kind == unix.RTN_UNICAST {
		metric--
	}
	list, err := Whole(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Protocol: protocol, Type: kind}, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TYPE)
	})
	if err != nil {
		return nil
	}
	return slices.DeleteFunc(list, func(r netlink.Route) bool { return r.Priority != metric })
}

func (h *Host) metric() int { return 4096 + 2*int(crc32.ChecksumIEEE([]byte(h.Bridge))%4096) }

// quietIPv6 makes a link of the calling thread's namespace use exactly the IPv6
// addresses that it is given, at once: no link-local address (which anti-spoofing
// would have to let pass), no duplicate detection, no router advertisements.
func quietIPv6(link string) error {
	if !haveIPv6() {
		return nil
	}
	dir := "ipv6/conf/" + link + "/"
	return set(
		sysctl{name: dir + "disable_ipv6", value: "0"},
		sysctl{name: dir + "accept_dad", value: "0"},
		sysctl{name: dir + "addr_gen_mode", value: "1"},
		sysctl{name: dir + "accept_ra", value: "0"},
		sysctl{name: dir + "router_solicitations", value: "0", optional: true},
	)
}

// hardwareAddr derives a locally administered address from a text, so that an
// address that is used again has the same one and no neighbour's cache is wrong.
func hardwareAddr(text string) net.HardwareAddr {
	sum := crc32.ChecksumIEEE([]byte(text))
	return net.HardwareAddr{0x02, 0x5a, byte(sum >> 24), byte(sum >> 16), byte(sum >> 8), byte(sum)}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func prefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	a, ok := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	if a.Is4In6() && len(n.Mask) == net.IPv4len {
		a = a.Unmap()
	}
	return netip.PrefixFrom(a, bits), ok
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// Beside returns a global IPv6 address of the link that has the IPv4 address a, or
// none.
func Beside(a netip.Addr) netip.Addr {
	a = a.Unmap()
	if !a.Is4() {
		return netip.Addr{}
	}
	list, err := Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return netip.Addr{}
	}
	link := 0
	for _, x := range list {
		if p, ok := prefix(x.IPNet); ok && p.Addr() == a {
			link = x.LinkIndex
		}
	}
	const unusable = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED | unix.IFA_F_DEPRECATED | unix.IFA_F_TEMPORARY
	for _, x := range list {
		p, ok := prefix(x.IPNet)
		if ok && link != 0 && x.LinkIndex == link && p.Addr().Is6() && p.Addr().IsGlobalUnicast() && x.Flags&unusable == 0 {
			return p.Addr()
		}
	}
	return netip.Addr{}
}
