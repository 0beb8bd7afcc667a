package api

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"assay.dev"
)

// Bounds of what is taken from the wire. They are far above what a sane peer
// sends and low enough that a hostile one cannot exhaust the reader.
const (
	maxAddrs     = 16
	maxArtifacts = 256
	maxLabels    = 128
	maxPorts     = 4096
	maxEndpoints = 100_000
	maxZones     = 64 // of one endpoint's hints
	maxAffinity  = 86400
	maxSignals   = 20_000
	maxCounters  = 1024
	maxDecisions = 16_384
	maxCovers    = 256
	maxRoots     = 16
	maxEgress    = 1024
	maxText      = 4096    // a path, a reason, a sentence
	maxDER       = 1 << 16 // a certificate
	maxRoute     = 4 << 20 // a route as JSON
)

// ValidID reports whether s may be the ID of a workload or host: it becomes part
// of resource keys and file names.
func ValidID(s string) bool {
	if len(s) == 0 || len(s) > 128 || s[0] == '.' || s[0] == '-' {
		return false
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_' {
			return false
		}
	}
	return true
}

// ValidCover reports whether s is "NAMESPACE/SERVICE", each a name or '*'.
func ValidCover(s string) bool {
	for i := range len(s) {
		if s[i] == '/' {
			ns, name := s[:i], s[i+1:]
			return (ns == "*" || assay.ValidName(ns)) && (name == "*" || assay.ValidName(name))
		}
	}
	return false
}

func checkText(what, s string) error {
	if len(s) > maxText {
		return fmt.Errorf("%s: %d bytes, at most %d", what, len(s), maxText)
	}
	return nil
}

// checkZone takes what a zone may be called: a value of a label (topology.kubernetes.io/zone).
func checkZone(zone string) error {
	if zone != "" && (len(zone) > 63 || !ValidID(zone)) {
		return fmt.Errorf("zone %q: may hold a-z, A-Z, 0-9, '-', '.' and '_', 63 characters at most", zone)
	}
	return nil
}

func checkName(what, s string) error {
	if !assay.ValidName(s) {
		return fmt.Errorf("%s %q: may hold a-z, 0-9 and '-', 63 characters at most", what, s)
	}
	return nil
}

func checkLen(what string, n, limit int) error {
	if n > limit {
		return fmt.Errorf("%d %s, at most %d", n, what, limit)
	}
	return nil
}

// addr reads an address to which a connection can be made.
func addr(b []byte) (netip.Addr, error) {
	a, ok := netip.AddrFromSlice(b)
	switch {
	case !ok:
		return a, fmt.Errorf("address of %d bytes, want 4 or 16", len(b))
	case a.Is4In6():
		return a, fmt.Errorf("address %s: an IPv4 address has 4 bytes", a)
	case a.IsUnspecified() || a.IsMulticast() || a.IsLoopback():
		return a, fmt.Errorf("address %s: nobody else can dial it", a)
	}
	return a, nil
}

// addrs reads distinct addresses, IPv4 before IPv6.
func addrs(list [][]byte) ([]netip.Addr, error) {
	if err := checkLen("addresses", len(list), maxAddrs); err != nil {
		return nil, err
	}
	var out []netip.Addr
	for _, b := range list {
		a, err := addr(b)
		if err != nil {
			return nil, err
		}
		if slices.Contains(out, a) {
			return nil, fmt.Errorf("address %s twice", a)
		}
		if len(out) > 0 && a.Is4() && out[len(out)-1].Is6() {
			return nil, fmt.Errorf("address %s: IPv4 comes before IPv6", a)
		}
		out = append(out, a)
	}
	return out, nil
}

func fromAddrs(list []netip.Addr) [][]byte {
	var out [][]byte
	for _, a := range list {
		out = append(out, a.Unmap().AsSlice())
	}
	return out
}

// Prefixes reads prefixes in their canonical form.
func Prefixes(list []string) ([]netip.Prefix, error) {
	if err := checkLen("prefixes", len(list), maxAddrs); err != nil {
		return nil, err
	}
	var out []netip.Prefix
	for _, s := range list {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, err
		}
		if p.Masked() != p || p.String() != s || p.Addr().Is4In6() {
			return nil, fmt.Errorf("prefix %q: has bits beyond its length; want %s", s, p.Masked())
		}
		out = append(out, p)
	}
	return out, nil
}

// FromPrefixes writes prefixes.
func FromPrefixes(list []netip.Prefix) []string {
	var out []string
	for _, p := range list {
		out = append(out, p.String())
	}
	return out
}

// ports reads port numbers; zero is one only where it means "not ready".
func ports(list []uint32, zero bool) ([]uint16, error) {
	if err := checkLen("ports", len(list), maxPorts); err != nil {
		return nil, err
	}
	var out []uint16
	for _, p := range list {
		if p > 65535 || p == 0 && !zero {
			return nil, fmt.Errorf("port %d", p)
		}
		out = append(out, uint16(p))
	}
	return out, nil
}

func fromPorts(list []uint16) []uint32 {
	var out []uint32
	for _, p := range list {
		out = append(out, uint32(p))
	}
	return out
}

// maxTime is the end of the year 9999, in microseconds.
const maxTime = 253402300799999999

// Time reads microseconds since 1970; 0 is the zero time.
func Time(us int64) (time.Time, error) {
	switch {
	case us == 0:
		return time.Time{}, nil
	case us < 0 || us > maxTime:
		return time.Time{}, fmt.Errorf("time %d us: not between 1970 and 9999", us)
	}
	return time.UnixMicro(us).UTC(), nil
}

// FromTime writes t in microseconds; the zero time is 0.
func FromTime(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}

func identity(s string) (assay.Identity, error) {
	if s == "" {
		return assay.Identity{}, nil
	}
	return assay.ParseIdentity(s)
}

// counted reads the protocol of something that was counted: what passes beside a
// proxy has others than a port of a service.
func counted(s string) (assay.Protocol, error) {
	switch p := assay.Protocol(s); p {
	case assay.UDP, assay.UDPLite, assay.SCTP, assay.DCCP, assay.ICMP, assay.OtherIP:
		return p, nil
	}
	return protocol(s)
}

func protocol(s string) (assay.Protocol, error) {
	switch p := assay.Protocol(s); p {
	case assay.Detect, assay.HTTP1, assay.HTTP2, assay.TLS, assay.Opaque:
		return p, nil
	}
	return "", fmt.Errorf("protocol %q: unknown", s)
}
