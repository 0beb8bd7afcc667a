package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The host's side has two tables with the bridge's name. In family bridge, frames
// from a port pass only with a triple (port, hardware address, address) of the set
// allow4 or allow6; neighbour discovery is checked for the address that it
// announces, so nobody can take over another's. In family inet, what leaves the
// mesh networks is translated to the host's address.
const (
	allow4 = "allow4"
	allow6 = "allow6"
)

// filter writes both tables in one transaction. The sets are kept, so ports that
// are allowed stay so.
func (h *Host) filter() error {
	c, err := NFTables(nil)
	if err != nil {
		return err
	}
	bridge := c.AddTable(&nftables.Table{Family: nftables.TableFamilyBridge, Name: h.Bridge})
	for _, s := range h.sets(bridge) {
		if err := c.AddSet(s, nil); err != nil {
			return fmt.Errorf("set %s: %w", s.Name, err)
		}
	}
	ports := c.AddChain(&nftables.Chain{Name: "ports", Table: bridge, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRef(-300)})
	c.FlushChain(ports)
	for _, exprs := range h.portRules() {
		c.AddRule(&nftables.Rule{Table: bridge, Chain: ports, Exprs: exprs})
	}

	inet := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: h.Bridge})
	leave := c.AddChain(&nftables.Chain{Name: "leave", Table: inet, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource})
	c.FlushChain(leave)
	for _, exprs := range h.leaveRules() {
		c.AddRule(&nftables.Rule{Table: inet, Chain: leave, Exprs: exprs})
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("nftables: tables %s (bridge, inet): %w", h.Bridge, err)
	}
	return nil
}

func (h *Host) removeFilter() error {
	c, err := NFTables(nil)
	if err != nil {
		return err
	}
	for _, f := range []nftables.TableFamily{nftables.TableFamilyBridge, nftables.TableFamilyINet} {
		// Added first, so that deleting what is not there is no error.
		t := c.AddTable(&nftables.Table{Family: f, Name: h.Bridge})
		c.DelTable(t)
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("nftables: remove tables %s: %w", h.Bridge, err)
	}
	return nil
}

func (h *Host) sets(t *nftables.Table) []*nftables.Set {
	return []*nftables.Set{
		{Table: t, Name: allow4, Concatenation: true, KeyType: nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeEtherAddr, nftables.TypeIPAddr)},
		{Table: t, Name: allow6, Concatenation: true, KeyType: nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeEtherAddr, nftables.TypeIP6Addr)},
	}
}

// portRules are the rules of chain ports, in order.
func (h *Host) portRules() [][]expr.Any {
	const regName, regEther, regAddr = 1, 12, 14 // 16 bytes, 8, 4 or 16: one key
	port := []byte(h.portPrefix())
	known := func(addr *expr.Payload, ether *expr.Payload, set string) []expr.Any {
		return []expr.Any{
			&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: regName}, ether, addr,
			&expr.Lookup{SourceRegister: regName, SetName: set},
			&expr.Verdict{Kind: expr.VerdictAccept},
		}
	}
	ether := &expr.Payload{DestRegister: regEther, Base: expr.PayloadBaseLLHeader, Offset: 6, Len: 6}
	network := func(offset, n uint32) *expr.Payload {
		return &expr.Payload{DestRegister: regAddr, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: n}
	}
	protocol := func(p uint16) []expr.Any {
		return []expr.Any{
			&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(p)},
		}
	}
	icmp6 := func(kind byte) []expr.Any {
		return append(protocol(unix.ETH_P_IPV6),
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_ICMPV6}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{kind}})
	}
	drop := &expr.Verdict{Kind: expr.VerdictDrop}
	const routerAdvert, neighbourAdvert, redirect = 134, 136, 137
	target := &expr.Payload{DestRegister: regAddr, Base: expr.PayloadBaseTransportHeader, Offset: 8, Len: 16}
	return [][]expr.Any{
		{ // not one of our ports
			&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: port},
			&expr.Verdict{Kind: expr.VerdictAccept},
		},
		append(protocol(unix.ETH_P_IP), known(network(12, 4), ether, allow4)...),
		append(protocol(unix.ETH_P_ARP), known(network(14, 4),
			&expr.Payload{DestRegister: regEther, Base: expr.PayloadBaseNetworkHeader, Offset: 8, Len: 6}, allow4)...),
		append(icmp6(routerAdvert), drop),
		append(icmp6(redirect), drop),
		append(icmp6(neighbourAdvert), known(target, ether, allow6)...),
		append(icmp6(neighbourAdvert), drop),
		append(protocol(unix.ETH_P_IPV6), known(network(8, 16), ether, allow6)...),
		{&expr.Counter{}, drop},
	}
}

// leaveRules are the rules of chain leave, in order.
func (h *Host) leaveRules() [][]expr.Any {
	var rules [][]expr.Any
	for _, p := range h.Prefixes {
		for _, m := range h.Mesh {
			if m.Addr().Is4() == p.Addr().Is4() {
				rules = append(rules, append(append(inPrefix(p, true), inPrefix(m, false)[2:]...), &expr.Verdict{Kind: expr.VerdictAccept}))
			}
		}
		name := make([]byte, unix.IFNAMSIZ)
		copy(name, h.Bridge)
		rules = append(rules, append(inPrefix(p, true),
			&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: name},
			&expr.Masq{}))
	}
	return rules
}

// inPrefix matches packets whose source or destination is in p.
func inPrefix(p netip.Prefix, source bool) []expr.Any {
	p = p.Masked()
	nfproto, offset, n := byte(unix.NFPROTO_IPV4), uint32(16), uint32(4)
	if p.Addr().Is6() {
		nfproto, offset, n = unix.NFPROTO_IPV6, 24, 16
	}
	if source {
		offset -= n
	}
	mask := ipNet(p).Mask
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{nfproto}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: n},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: n, Mask: mask, Xor: make([]byte, n)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Addr().AsSlice()},
	}
}

// Allow lets a port use addresses. Doing it twice is no error.
func (h *Host) Allow(port string, addrs []netip.Addr) error { return h.change(port, addrs, true) }

func (h *Host) deny(port string, addrs []netip.Addr) error { return h.change(port, addrs, false) }

func (h *Host) change(port string, addrs []netip.Addr, add bool) error {
	c, err := NFTables(nil)
	if err != nil {
		return err
	}
	sets := h.sets(&nftables.Table{Family: nftables.TableFamilyBridge, Name: h.Bridge})
	for _, a := range addrs {
		s := sets[0]
		if a.Is6() {
			s = sets[1]
		}
		elem := []nftables.SetElement{{Key: allowKey(port, workloadHardwareAddr(addrs), a)}}
		if add {
			err = c.SetAddElements(s, elem)
		} else {
			err = c.SetDeleteElements(s, elem)
		}
		if err != nil {
			return fmt.Errorf("nftables: set %s: %w", s.Name, err)
		}
	}
	if err := c.Flush(); err != nil && !(errors.Is(err, unix.ENOENT) && !add) {
		return fmt.Errorf("nftables: allow %s %v: %w", port, addrs, err)
	}
	return nil
}

// denyPort removes whatever a port was allowed.
func (h *Host) denyPort(port string) error {
	c, err := NFTables(nil)
	if err != nil {
		return err
	}
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, port)
	found := false
	for _, s := range h.sets(&nftables.Table{Family: nftables.TableFamilyBridge, Name: h.Bridge}) {
		elems, err := c.GetSetElements(s)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return fmt.Errorf("nftables: list %s: %w", s.Name, err)
		}
		for _, e := range elems {
			if len(e.Key) >= len(name) && string(e.Key[:len(name)]) == string(name) {
				if err := c.SetDeleteElements(s, []nftables.SetElement{{Key: e.Key}}); err != nil {
					return fmt.Errorf("nftables: set %s: %w", s.Name, err)
				}
				found = true
			}
		}
	}
	if !found {
		return nil
	}
	if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("nftables: deny %s: %w", port, err)
	}
	return nil
}

// allowKey is a concatenation: each part starts at a multiple of four bytes.
func allowKey(port string, ether []byte, a netip.Addr) []byte {
	key := make([]byte, unix.IFNAMSIZ, 40)
	copy(key, port)
	key = append(key, ether...)
	key = binary.BigEndian.AppendUint16(key, 0)
	return append(key, a.AsSlice()...)
}
