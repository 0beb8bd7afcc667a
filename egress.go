package assay

import (
	"net/netip"
	"slices"
	"strings"
)

// EgressRule allows connections from a namespace to outside the mesh: to hosts by
// name, or to addresses where there is no name.
type EgressRule struct {
	Name     string   `json:"name"`               // of the Egress that says so
	Accounts []string `json:"accounts,omitempty"` // whose; none: everybody's in the namespace
	// Hosts are names in lower case without a final dot. "*.example.com" is any name
	// below example.com, at any depth, and not example.com itself.
	Hosts     []string       `json:"hosts,omitempty"`
	Addresses []netip.Prefix `json:"addresses,omitempty"`
	Ports     []uint16       `json:"ports"` // never empty
}

// Applies reports whether the rule is for an account and a port.
func (r *EgressRule) Applies(account string, port uint16) bool {
	return slices.Contains(r.Ports, port) && (len(r.Accounts) == 0 || slices.Contains(r.Accounts, account))
}

// AllowsHost reports whether the rule names host.
func (r *EgressRule) AllowsHost(host string) bool {
	for _, h := range r.Hosts {
		if h == host {
			return true
		}
		if below, ok := strings.CutPrefix(h, "*"); ok && len(host) > len(below) && strings.HasSuffix(host, below) {
			return true
		}
	}
	return false
}

// AllowsAddr reports whether the rule holds the address.
func (r *EgressRule) AllowsAddr(a netip.Addr) bool {
	return slices.ContainsFunc(r.Addresses, func(p netip.Prefix) bool { return p.Contains(a.Unmap()) })
}

// ValidHost reports whether s is a host of a rule: a DNS name in lower case, with "*"
// for its first label if wanted.
func ValidHost(s string) bool {
	rest, _ := strings.CutPrefix(s, "*.")
	if len(s) > 253 || !strings.Contains(rest, ".") && rest != s {
		return false // "*.com" would be everybody
	}
	return ValidDNSName(rest)
}

// ValidDNSName reports whether s is a name of labels as hosts have them (RFC 1123
// section 2.1; underscores too, which are in use), in lower case, and not an address.
func ValidDNSName(s string) bool {
	if len(s) == 0 || len(s) > 253 {
		return false
	}
	if _, err := netip.ParseAddr(s); err == nil {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if len(label) == 0 || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for i := range len(label) {
			c := label[i]
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return false
			}
		}
	}
	return true
}

// How the remote end of a connection to outside came to its name, weakest first. The
// client alone says "sni" or "host"; with "+dns", the proxy itself resolved that name
// to the address. What is on the other side of TLS nobody here can see.
const (
	ByDNS     = "dns"      // the workload looked up this name and got this address
	BySNI     = "sni"      // the client's TLS ClientHello says so
	ByHost    = "host"     // the first HTTP/1 request says so
	BySNIDNS  = "sni+dns"  // both
	ByHostDNS = "host+dns" // both
)

// ReasonEgress is why a connection to outside that a rule allows is not under mutual
// TLS; ReasonOutside that of one that no rule mentions, or from outside; ReasonUnmeshed
// that of one to an endpoint of a service that is not meshed; ReasonProbe that of the
// kubelet's questions whether a pod lives; ReasonMetrics that of who reads the metrics of a
// pod's sidecar; ReasonTransition that of a client in the mesh which has not heard yet that a pod
// has joined it, or has left it.
const (
	ReasonProbe      = "probe"
	ReasonMetrics    = "metrics"
	ReasonOutside    = "outside"
	ReasonEgress     = "egress"
	ReasonUnmeshed   = "unmeshed-endpoint"
	ReasonTransition = "transition"
)
