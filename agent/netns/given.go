package netns

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
)

// What follows is for namespaces that somebody else makes, as a container runtime does:
// Assay is a guest there.

// At returns the namespace that path leads to: a file of nsfs, or of /proc/PID/ns.
func At(path string) (*Namespace, error) { return open(path) }

// Loosen lets lo carry packets from foreign addresses: the proxy dials its workload from
// the client's. Where the namespace checks the way back of every packet, its other links
// go on doing so.
func (n *Namespace) Loosen() error {
	return n.Do(func() error {
		const dir = "/proc/sys/net/ipv4/conf/"
		if all := rpFilter(dir + "all"); all != "0" {
			links, err := Whole(netlink.LinkList)
			if err != nil {
				return fmt.Errorf("list links: %w", err)
			}
			names := []string{"default"}
			for _, l := range links {
				names = append(names, l.Attrs().Name)
			}
			for _, name := range names { // the larger one of "all" and its own counts
				if name == "lo" || rpFilter(dir+name) > all {
					continue
				}
				if err := set(sysctl{name: "ipv4/conf/" + name + "/rp_filter", value: all}); err != nil {
					return err
				}
			}
		}
		return set(sysctl{name: "ipv4/conf/all/rp_filter", value: "0"}, sysctl{name: "ipv4/conf/lo/rp_filter", value: "0"})
	})
}

func rpFilter(dir string) string {
	b, err := os.ReadFile(filepath.Join(dir, "rp_filter"))
	if err != nil {
		return "0"
	}
	return strings.TrimSpace(string(b))
}

// Traffic reads the counters of the namespace's own end of a link. Whoever has
// CAP_NET_ADMIN there can make them start anew.
func (n *Namespace) Traffic(link string) (t Traffic, err error) {
	err = n.Do(func() error {
		l, err := netlink.LinkByName(link)
		if err != nil {
			return fmt.Errorf("link %s: %w", link, err)
		}
		s := l.Attrs().Statistics
		if s == nil {
			return fmt.Errorf("link %s: the kernel tells no counters", link)
		}
		t = Traffic{InPackets: s.RxPackets, InBytes: s.RxBytes, OutPackets: s.TxPackets, OutBytes: s.TxBytes}
		return nil
	})
	return t, err
}
