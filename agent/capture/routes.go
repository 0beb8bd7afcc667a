package capture

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"

	"assay.dev/agent/netns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// returnTable is the routing table in which every address is local.
const returnTable = 100

// A setting is one of the kernel's for a network namespace, under /proc/sys/net.
type setting struct{ name, captured, without string }

// settings give the return mark to what answers the proxy (accepted sockets, and resets
// and ICMP messages that belong to no socket) and say how connections are tracked:
//   - loose: what was not seen from its beginning is not tracked. Else the last
//     packets of a connection that is older than the capture, or a few that somebody
//     makes up, would be remembered as a connection, for days; and a new one with the
//     same addresses and ports would be taken for that one, and not be captured.
//   - be_liberal: a packet outside of the window is still translated. Else it would
//     reach a socket that does not know it, whose reset ends the connection.
//   - half-closed connections may be silent for an hour, not one minute or two; what is
//     forgotten is not translated any more.
//
// A kernel without IPv6 lacks the first one.
var settings = []setting{
	{"ipv6/fwmark_reflect", "1", "0"},
	{"ipv4/tcp_fwmark_accept", "1", "0"},
	{"ipv4/fwmark_reflect", "1", "0"},
	{"netfilter/nf_conntrack_tcp_loose", "0", "1"},
	{"netfilter/nf_conntrack_tcp_be_liberal", "1", "0"},
	{"netfilter/nf_conntrack_tcp_timeout_close_wait", "3600", "60"},
	{"netfilter/nf_conntrack_tcp_timeout_fin_wait", "3600", "120"},
}

// here are those that this kernel has.
func here() []setting { return settings[2-len(families()):] }

func (s setting) path() string { return "/proc/sys/net/" + s.name }

func (s setting) write(value string) error {
	if err := os.WriteFile(s.path(), []byte(value), 0); err != nil {
		return fmt.Errorf("capture: setting %s: %w", s.name, err)
	}
	return nil
}

func families() []int {
	if _, err := os.Stat("/proc/sys/net/ipv6"); err != nil {
		return []int{unix.AF_INET}
	}
	return []int{unix.AF_INET, unix.AF_INET6}
}

// set writes the settings in the calling thread's namespace. Those of the tracking are
// there once the kernel has loaded it, for rules that need it.
func set(rulesThere bool) error {
	for _, s := range here() {
		err := s.write(s.captured)
		if errors.Is(err, fs.ErrNotExist) && !rulesThere && strings.HasPrefix(s.name, "netfilter/") {
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// unset puts the settings back.
func unset() (failed error) {
	for _, s := range here() {
		failed = errors.Join(failed, s.write(s.without))
	}
	return failed
}

func verifySettings() error {
	for _, s := range here() {
		if v, err := os.ReadFile(s.path()); err != nil || strings.TrimSpace(string(v)) != s.captured {
			return fmt.Errorf("capture: %s is %q, want %s", s.name, v, s.captured)
		}
	}
	return nil
}

// routes delivers what carries mark on lo, whatever its address, in the calling
// thread's namespace.
func routes(mark uint32) error {
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
