package netns

import (
	"fmt"
	"math/big"
	"net/netip"
)

// Allocator hands out the addresses of one prefix in order, so that an address is
// not used again before all others were: whoever still believes in an old owner has
// the longest time to learn better. It is a plain value for the caller to store;
// it is not safe for concurrent use.
type Allocator struct {
	Prefix netip.Prefix `json:"prefix"`
	Last   netip.Addr   `json:"last,omitzero"` // handed out most recently
}

// Gateway returns the prefix's first address, which is the bridge's.
func (a *Allocator) Gateway() netip.Addr { return a.Prefix.Masked().Addr().Next() }

// Next hands out an address that inUse denies.
func (a *Allocator) Next(inUse func(netip.Addr) bool) (netip.Addr, error) {
	first, last := a.Gateway().Next(), a.last()
	at := first
	if a.Prefix.Contains(a.Last) && a.Last.Compare(first) >= 0 && a.Last.Less(last) {
		at = a.Last.Next()
	}
	// A prefix is only ever searched for as many addresses as can be in use on one
	// host, so a full one ends after one round and a /64 does not take for ever.
	for start, tried := at, 0; tried < 1<<16; tried++ {
		if !inUse(at) {
			a.Last = at
			return at, nil
		}
		if at == last {
			at = first
		} else {
			at = at.Next()
		}
		if at == start {
			break
		}
	}
	return netip.Addr{}, fmt.Errorf("all addresses of %s are in use", a.Prefix)
}

// last returns the highest address that may be handed out: for IPv4 the one
// before the broadcast address.
func (a *Allocator) last() netip.Addr {
	p := a.Prefix.Masked()
	raw := p.Addr().AsSlice()
	n := new(big.Int).SetBytes(raw)
	host := new(big.Int).Lsh(big.NewInt(1), uint(p.Addr().BitLen()-p.Bits()))
	n.Add(n, host).Sub(n, big.NewInt(1))
	if p.Addr().Is4() {
		n.Sub(n, big.NewInt(1))
	}
	last, _ := netip.AddrFromSlice(n.FillBytes(raw))
	return last
}
