package control

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"assay.dev"
)

// Network is the mesh's address plan. Every address in it is meshed or nothing: a
// proxy never dials one in plaintext. The zero value is that of a mesh whose workloads and
// services come with addresses of their own, as those of a cluster do.
type Network struct {
	Workloads4 netip.Prefix // hosts get /24s of it
	Workloads6 netip.Prefix // hosts get /80s of it
	Services4  netip.Prefix // virtual addresses
	Services6  netip.Prefix
}

// DefaultNetwork is used where nothing is configured. The IPv6 networks are of
// one random unique local prefix (RFC 4193).
var DefaultNetwork = Network{
	Workloads4: netip.MustParsePrefix("10.181.0.0/16"),
	Workloads6: netip.MustParsePrefix("fd5a:5a59::/64"),
	Services4:  netip.MustParsePrefix("10.182.0.0/16"),
	Services6:  netip.MustParsePrefix("fd5a:5a59:1::/112"),
}

const (
	hostBits4 = 24
	hostBits6 = 80
)

func (n Network) validate() error {
	if n == (Network{}) {
		return nil
	}
	list := n.prefixes()
	for i, p := range list {
		limit, family := 30, "IPv4"
		if i%2 == 1 {
			limit, family = 126, "IPv6"
		}
		if !p.IsValid() || p != p.Masked() || p.Addr().Is4() != (i%2 == 0) || p.Addr().Is4In6() || p.Bits() > limit {
			return &assay.Error{Kind: assay.Invalid, Op: "configure the network", Err: fmt.Errorf("%s: want an %s prefix of at most /%d", p, family, limit)}
		}
		for _, q := range list[:i] {
			if p.Overlaps(q) {
				return &assay.Error{Kind: assay.Invalid, Op: "configure the network", Err: fmt.Errorf("%s and %s overlap", q, p)}
			}
		}
	}
	if n.Workloads4.Bits() > hostBits4 || n.Workloads6.Bits() > hostBits6 {
		return &assay.Error{Kind: assay.Invalid, Op: "configure the network", Err: fmt.Errorf("%s, %s: no room for one host (a /%d and a /%d)", n.Workloads4, n.Workloads6, hostBits4, hostBits6)}
	}
	return nil
}

func (n Network) prefixes() []netip.Prefix {
	if n == (Network{}) {
		return nil
	}
	return []netip.Prefix{n.Workloads4, n.Workloads6, n.Services4, n.Services6}
}

// hosts is how many hosts have room.
func (n Network) hosts() int64 {
	return 1 << min(hostBits4-n.Workloads4.Bits(), hostBits6-n.Workloads6.Bits(), 30)
}

// services is how many virtual addresses there are besides the first and the last.
func (n Network) services() int64 {
	return 1<<min(32-n.Services4.Bits(), 128-n.Services6.Bits(), 30) - 2
}

// hostPrefixes returns the prefixes of host number i, from 1.
func (n Network) hostPrefixes(i int64) ([]netip.Prefix, error) {
	if i < 1 || i > n.hosts() {
		return nil, fmt.Errorf("host number %d is outside %s", i, n.Workloads4)
	}
	a4 := add(n.Workloads4.Addr(), uint64(i-1)<<(32-hostBits4))
	a6 := addHigh(n.Workloads6.Addr(), uint64(i-1))
	return []netip.Prefix{netip.PrefixFrom(a4, hostBits4), netip.PrefixFrom(a6, hostBits6)}, nil
}

// vips returns virtual addresses number i, from 1.
func (n Network) vips(i int64) ([]netip.Addr, error) {
	if i < 1 || i > n.services() {
		return nil, errors.New("service number is outside the network")
	}
	return []netip.Addr{add(n.Services4.Addr(), uint64(i)), add(n.Services6.Addr(), uint64(i))}, nil
}

// add adds n to the low bits of a.
func add(a netip.Addr, n uint64) netip.Addr {
	if a.Is4() {
		b := a.As4()
		binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(n))
		return netip.AddrFrom4(b)
	}
	b := a.As16()
	binary.BigEndian.PutUint64(b[8:], binary.BigEndian.Uint64(b[8:])+n)
	return netip.AddrFrom16(b)
}

// addHigh adds n in units of one /80.
func addHigh(a netip.Addr, n uint64) netip.Addr {
	b := a.As16()
	low := binary.BigEndian.Uint64(b[8:])
	sum := low + n<<(128-hostBits6)
	binary.BigEndian.PutUint64(b[8:], sum)
	high := binary.BigEndian.Uint64(b[:8]) + n>>(64-(128-hostBits6))
	if sum < low {
		high++
	}
	binary.BigEndian.PutUint64(b[:8], high)
	return netip.AddrFrom16(b)
}
