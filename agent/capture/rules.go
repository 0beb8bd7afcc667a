package capture

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

type chain struct {
	chain *nftables.Chain
	rules [][]expr.Any
}

// chains returns the whole table:
//
//	chain local { type filter hook output priority raw
//		meta mark OWN oif lo meta mark set RETURN notrack
//		meta mark RETURN notrack
//		tcp sport { OUTBOUND, INBOUND } tcp RST, ACK, sequence 0: counter no-proxy }
//	chain refuse { type filter hook output priority mangle
//		meta mark OWN accept
//		tcp SYN, ip daddr in VIRTUAL, ip daddr . tcp dport not in @open4: counter no-endpoint, reject with tcp reset
//		the same for IPv6 }
//	chain outbound { type nat hook output priority dstnat
//		meta mark OWN accept
//		oif lo accept, fib daddr type local accept
//		tcp dport EXCLUDED accept
//		tcp SYN redirect to OUTBOUND }
//	chain inbound { type nat hook prerouting priority dstnat
//		iif lo accept
//		tcp dport EXCLUDED accept
//		tcp SYN redirect to INBOUND }
//	chain staleout { type filter hook output priority dstnat + 10
//		tcp SYN, oif not lo, mark not OWN, fib daddr type not local, not EXCLUDED: counter stale, drop
//		the same, EXCLUDED, ct status dnat: counter stale, drop }
//	chain stalein { type filter hook prerouting priority dstnat + 10
//		tcp SYN, iif not lo, ct status not dnat, not EXCLUDED: counter stale, drop
//		tcp SYN, iif not lo, not INBOUND, not EXCLUDED: counter stale, drop
//		the same, EXCLUDED, ct status dnat: counter stale, drop }
//
// Where the leg is tracked, there are more (see tracked), and of local only the counters.
// Once released, refuse and the last two are empty, and outbound and inbound begin with accept.
// SYN is: SYN set; FIN, RST and ACK not. The counted resets are the kernel's own answers
// to a SYN that was led to a listener which is gone: a reset of a connection that there
// was has a sequence number (RFC 9293 section 3.10.7.1).
//
// A stale SYN has the addresses and ports of a connection that the kernel already tracks,
// and so asks no chain of type nat: it would pass untranslated. Whoever sent it sends it
// again, until what was tracked is forgotten. One that rules of the workload's own have
// translated before, or keep from being tracked, would pass the listeners by, too.
func chains(t *nftables.Table, r Rules) []chain {
	base := func(name string, kind nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority, rules ...[]expr.Any) chain {
		accept := nftables.ChainPolicyAccept
		return chain{&nftables.Chain{Name: name, Table: t, Type: kind, Hooknum: hook, Priority: prio, Policy: &accept}, rules}
	}
	accept := &expr.Verdict{Kind: expr.VerdictAccept}

	local := base("local", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityRaw)
	if !r.Tracked {
		local.rules = append(local.rules,
			rule(mark(r.OwnMark), loopback(expr.MetaKeyOIFNAME), one(
				&expr.Immediate{Register: 1, Data: binaryutil.NativeEndian.PutUint32(r.ReturnMark)},
				&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
				&expr.Notrack{})),
			rule(mark(r.ReturnMark), one(&expr.Notrack{})))
	}
	for _, port := range []uint16{r.OutboundPort, r.InboundPort} {
		local.rules = append(local.rules, rule(refusal(port), one(count(noProxy))))
	}

	refuse := base("refuse", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityMangle,
		rule(mark(r.OwnMark), one(accept)))
	for _, p := range r.Virtual {
		refuse.rules = append(refuse.rules, rule(syn(), notOpen(p.Masked()), one(
			count(noEndpoint), &expr.Reject{Type: unix.NFT_REJECT_TCP_RST})))
	}

	outbound := base("outbound", nftables.ChainTypeNAT, nftables.ChainHookOutput, nftables.ChainPriorityNATDest,
		rule(mark(r.OwnMark), one(accept)),
		rule(loopback(expr.MetaKeyOIFNAME), one(accept)),
		rule(one(
			&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
			accept)),
	)
	inbound := base("inbound", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest,
		rule(loopback(expr.MetaKeyIIFNAME), one(accept)),
	)
	for _, port := range r.Excluded {
		outbound.rules = append(outbound.rules, rule(dport(port), one(accept)))
		inbound.rules = append(inbound.rules, rule(dport(port), one(accept)))
	}
	outbound.rules = append(outbound.rules, rule(syn(), redirect(r.OutboundPort)))
	inbound.rules = append(inbound.rules, rule(syn(), redirect(r.InboundPort)))
	after := nftables.ChainPriorityRef(*nftables.ChainPriorityNATDest + 10)
	drop := one(count(staleSYN), &expr.Verdict{Kind: expr.VerdictDrop})
	leaves := rule(syn(), link(expr.MetaKeyOIFNAME), notMark(r.OwnMark), notLocal())
	arrives := rule(syn(), link(expr.MetaKeyIIFNAME))
	staleOut := base("staleout", nftables.ChainTypeFilter, nftables.ChainHookOutput, after,
		rule(leaves, notPorts(r.Excluded), drop))
	staleIn := base("stalein", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, after,
		rule(arrives, notTranslated(), notPorts(r.Excluded), drop),
		rule(arrives, notPorts(append([]uint16{r.InboundPort}, r.Excluded...)), drop))
	for _, port := range r.Excluded {
		another := rule(dport(port), translated(), drop) // was dialled
		staleOut.rules = append(staleOut.rules, rule(leaves, another))
		staleIn.rules = append(staleIn.rules, rule(arrives, another))
	}
	var more []chain
	if r.Tracked {
		beside, stray, back := tracked(r)
		staleOut.rules, staleIn.rules = append(staleOut.rules, beside...), append(staleIn.rules, stray...)
		more = append(more, base("back", nftables.ChainTypeRoute, nftables.ChainHookOutput, nftables.ChainPriorityMangle, back...))
	}
	if r.Released {
		// The kernel tracks connections, and so translates them, as long as a rule could.
		refuse.rules, staleOut.rules, staleIn.rules = nil, nil, nil
		outbound.rules = [][]expr.Any{one(accept), redirect(r.OutboundPort)}
		inbound.rules = [][]expr.Any{one(accept), redirect(r.InboundPort)}
	}
	return append(more, local, refuse, outbound, inbound, staleOut, staleIn)
}

func rule(parts ...[]expr.Any) []expr.Any { return slices.Concat(parts...) }

func one(e ...expr.Any) []expr.Any { return e }

func mark(m uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(m)},
	}
}

func loopback(key expr.MetaKey) []expr.Any { return device(key, expr.CmpOpEq) }

// link matches what comes from or goes to elsewhere.
func link(key expr.MetaKey) []expr.Any { return device(key, expr.CmpOpNeq) }

func device(key expr.MetaKey, op expr.CmpOp) []expr.Any {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, "lo")
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: name},
	}
}

// notTranslated matches packets of connections that were not led to a listener when
// they began, nor anywhere else.
func notTranslated() []expr.Any { return destinations(expr.CmpOpEq) }

func translated() []expr.Any { return destinations(expr.CmpOpNeq) }

func destinations(op expr.CmpOp) []expr.Any {
	const dstNAT = 1 << 5 // IPS_DST_NAT
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(dstNAT), Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: 1, Data: make([]byte, 4)},
	}
}

// notLocal matches what is for none of the namespace's own addresses.
func notLocal() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

// notPorts matches every destination port but these.
func notPorts(ports []uint16) []expr.Any {
	var all []expr.Any
	for _, p := range ports {
		all = append(all,
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, p)})
	}
	return all
}

func tcp() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
	}
}

// syn matches the first packet of a connection: RFC 9293 section 3.1 has the flags
// in the header's 14th byte.
func syn() []expr.Any {
	const fin, syn, rst, ack = 0x01, 0x02, 0x04, 0x10
	return append(tcp(),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{fin | syn | rst | ack}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{syn}})
}

// refusal matches the answer to a SYN for a port of ours on which nobody listens.
func refusal(port uint16) []expr.Any {
	const rst, ack = 0x04, 0x10
	return append(tcp(),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{rst | ack}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 4, Len: 4},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0, 0, 0, 0}})
}

func count(name string) *expr.Objref {
	return &expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: name}
}

func dport(port uint16) []expr.Any {
	return append(tcp(),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)})
}

func redirect(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: binary.BigEndian.AppendUint16(nil, port)},
		&expr.Redir{RegisterProtoMin: 1},
	}
}

// notOpen matches a destination in p whose address and port are not in the set.
func notOpen(p netip.Prefix) []expr.Any {
	nfproto, offset, n, set, second := byte(unix.NFPROTO_IPV4), uint32(16), uint32(4), open4, uint32(unix.NFT_REG32_01)
	if p.Addr().Is6() {
		nfproto, offset, n, set, second = unix.NFPROTO_IPV6, 24, 16, open6, unix.NFT_REG32_04
	}
	mask := net.CIDRMask(p.Bits(), p.Addr().BitLen())
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{nfproto}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: n},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: n, Mask: mask, Xor: make([]byte, n)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Addr().AsSlice()},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: n},
		&expr.Payload{DestRegister: second, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: 1, SetName: set, Invert: true},
	}
}
