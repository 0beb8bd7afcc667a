package agent

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"strings"
)

// resolver configurations of a host, best first: the first one names the servers
// behind a stub that listens on the host's loopback, where no workload reaches it.
var resolvConfs = []string{"/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"}

// upstreams are the host's name servers that a workload can reach.
func upstreams() []netip.AddrPort {
	list := []netip.AddrPort{} // not nil: nil means that nobody looked
	for _, path := range resolvConfs {
		b, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			field := strings.Fields(line)
			if len(field) < 2 || field[0] != "nameserver" {
				continue
			}
			if a, err := netip.ParseAddr(field[1]); err == nil && !a.IsLoopback() {
				list = append(list, netip.AddrPortFrom(a, 53))
			}
		}
		if len(list) > 0 {
			break
		}
	}
	return list
}

// resolvConf is what a workload sees as /etc/resolv.conf: its proxy as the name
// server, the mesh's names first, and for the rest what the host says.
func resolvConf(namespace, domain string) []byte {
	search := []string{namespace + ".svc." + domain, "svc." + domain}
	var options []string
	if b, err := os.ReadFile("/etc/resolv.conf"); err == nil {
		for line := range strings.Lines(string(b)) {
			field := strings.Fields(line)
			if len(field) < 2 {
				continue
			}
			switch field[0] {
			case "search", "domain":
				search = append(search[:2:2], field[1:]...)
			case "options":
				options = append(options, field[1:]...)
			}
		}
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, "# assay: names of services, and the host's for all else\nnameserver %s\nsearch %s\n", dnsAddr.Addr(), strings.Join(search, " "))
	if len(options) > 0 {
		fmt.Fprintf(&out, "options %s\n", strings.Join(options, " "))
	}
	return out.Bytes()
}
