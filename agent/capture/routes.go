package capture

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"assay.dev/agent/netns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// returnTable is the routing table in which every address is local.
const returnTable = 100

// settings give the return mark to what answers the proxy: accepted sockets, and
// resets and ICMP messages that belong to no socket. A kernel without IPv6 lacks the
// last one.
var settings = []string{
	"/proc/sys/net/ipv4/tcp_fwmark_accept",
	"/proc/sys/net/ipv4/fwmark_reflect",
	"/proc/sys/net/ipv6/fwmark_reflect",
}

func families() []int {
	if _, err := os.Stat("/proc/sys/net/ipv6"); err != nil {
		return []int{unix.AF_INET}
	}
	return []int{unix.AF_INET, unix.AF_INET6}
}

// routes delivers what carries mark on lo, whatever its address, in the calling
// thread's namespace.
func routes(mark uint32) error {
	for i, path := range settings[:1+len(families())] {
		if err := os.WriteFile(path, []byte("1"), 0); err != nil {
			return fmt.Errorf("capture: setting %d of %d: %w", i+1, len(settings), err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("capture: lo: %w", err)
	}
	for _, f := range families() {
		rule := policy(f, mark)
		have, err := rules(f, mark)
		if err != nil {
			return fmt.Errorf("capture: list rules: %w", err)
		}
		if len(have) == 0 {
			if err := netlink.RuleAdd(rule); err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("capture: rule for mark %#x: %w", mark, err)
			}
		}
		r := &netlink.Route{LinkIndex: lo.Attrs().Index, Dst: everything(f), Table: returnTable, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Family: f}
		if f == unix.AF_INET6 {
			r.Scope = netlink.SCOPE_UNIVERSE
		}
		if err := netlink.RouteReplace(r); err != nil {
			return fmt.Errorf("capture: local route in table %d: %w", returnTable, err)
		}
	}
	return nil
}

// removeRoutes takes back what routes did, and nothing else that is in the table.
func removeRoutes(mark uint32) error {
	var failed error
	for i, path := range settings[:1+len(families())] {
		if err := os.WriteFile(path, []byte("0"), 0); err != nil {
			failed = errors.Join(failed, fmt.Errorf("capture: setting %d of %d: %w", i+1, len(settings), err))
		}
	}
	for _, f := range families() {
		if err := netlink.RuleDel(policy(f, mark)); err != nil && !errors.Is(err, unix.ENOENT) {
			failed = errors.Join(failed, fmt.Errorf("capture: rule for mark %#x: %w", mark, err))
		}
		list, err := localRoutes(f)
		failed = errors.Join(failed, err)
		for i := range list {
			if dst := list[i].Dst; dst != nil && dst.String() != everything(f).String() {
				continue
			}
			if err := netlink.RouteDel(&list[i]); err != nil && !errors.Is(err, unix.ESRCH) {
				failed = errors.Join(failed, fmt.Errorf("capture: local route in table %d: %w", returnTable, err))
			}
		}
	}
	return failed
}

func verifyRoutes(mark uint32) error {
	for _, path := range settings[:1+len(families())] {
		if v, err := os.ReadFile(path); err != nil || strings.TrimSpace(string(v)) != "1" {
			return fmt.Errorf("capture: %s is %q, want 1", path, v)
		}
	}
	for _, f := range families() {
		have, err := rules(f, mark)
		if err != nil || len(have) == 0 {
			return errors.Join(fmt.Errorf("capture: the rule for mark %#x is missing", mark), err)
		}
		list, err := localRoutes(f)
		if err != nil || len(list) == 0 {
			return errors.Join(fmt.Errorf("capture: the local route in table %d is missing", returnTable), err)
		}
	}
	return nil
}

// rules are those of the policy routing for mark, localRoutes what they lead to.
func rules(family int, mark uint32) ([]netlink.Rule, error) {
	return netns.Whole(func() ([]netlink.Rule, error) {
		return netlink.RuleListFiltered(family, policy(family, mark), netlink.RT_FILTER_TABLE|netlink.RT_FILTER_MARK)
	})
}

func localRoutes(family int) ([]netlink.Route, error) {
	return netns.Whole(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(family, &netlink.Route{Table: returnTable, Type: unix.RTN_LOCAL}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
	})
}

func policy(family int, mark uint32) *netlink.Rule {
	r := netlink.NewRule()
	r.Family, r.Mark, r.Table, r.Priority = family, mark, returnTable, returnTable
	return r
}

func everything(family int) *net.IPNet {
	if family == unix.AF_INET {
		return &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	}
	return &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
}
