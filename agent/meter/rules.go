package meter

import (
	"encoding/binary"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Table is the name of both nftables tables: of family inet, which knows connections,
// and netdev, which sees frames.
const Table = "assay_meter"

// Bounds of the sets. What finds no room is counted in its class all the same.
const (
	maxRemotes  = 1024             // addresses and ports in each of four sets
	forgetAfter = 10 * time.Minute // without a packet
	maxOlder    = 4096             // connections in each of four sets
	maxExcluded = 1024
)

// The classes of TCP that is neither the proxy's nor captured; other transports are
// told apart by their protocol number. Two bytes in a set's key, the low one first.
const (
	tcpExcluded = 1<<8 | unix.IPPROTO_TCP
	tcpOlder    = 2<<8 | unix.IPPROTO_TCP
	tcpEscaped  = 3<<8 | unix.IPPROTO_TCP
)

// ways are the two sides that packets come from: the link, and the workload.
var ways = []string{"in", "out"}

// transports have ports where TCP has them: a source port, then a destination port.
var transports = []byte{unix.IPPROTO_UDP, unix.IPPROTO_UDPLITE, unix.IPPROTO_SCTP, unix.IPPROTO_DCCP}

// counters are the names of the counters of class inet and netdev, each once per way.
var (
	packetCounters = []string{"own", "excluded", "older", "escaped", "udp", "udplite", "sctp", "dccp", "icmp", "ip", "icmpcontrol", "igmp", "stray"}
	frameCounters  = []string{"arp", "ethernet", "fragment", "fragment6", "stranger"}
)

type chain struct {
	chain *nftables.Chain
	rules [][]expr.Any
}

func rule(parts ...[]expr.Any) []expr.Any {
	var all []expr.Any
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

func one(e ...expr.Any) []expr.Any { return e }

func count(name, way string) []expr.Any {
	return one(&expr.Objref{Type: int(nftables.ObjTypeCounter), Name: name + "_" + way})
}

func verdict(kind expr.VerdictKind, chain string) []expr.Any {
	return one(&expr.Verdict{Kind: kind, Chain: chain})
}

func meta(key expr.MetaKey, want ...byte) []expr.Any {
	return one(&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: want})
}

func metaNot(key expr.MetaKey, not ...byte) []expr.Any {
	return one(&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: not})
}

func name16(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }

// bits matches when one of the bits of a native 32-bit value is set.
func bits(load expr.Any, mask uint32) []expr.Any {
	return one(load,
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(mask), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)})
}

// Bits and values of the kernel's headers that x/sys/unix lacks.
const (
	ctDstNAT     = 1 << 5 // IPS_DST_NAT
	ctStateNone  = 1 | 64 // NF_CT_STATE_INVALID_BIT, NF_CT_STATE_UNTRACKED_BIT
	packetHost   = 0      // PACKET_HOST
	packetOthers = 3      // PACKET_OTHERHOST
)

// packetChains are the chains of family inet:
//
//	chain in { type filter hook prerouting priority dstnat + 10
//		iif not LINK accept
//		ct status dnat count own, accept       # captured
//		ct mark OWN count own, accept          # an answer to the proxy
//		not for this host alone, fib saddr type local accept   # the kernel's own copy of a multicast
//		tcp goto in_tcp
//		ICMP that is no echo: count icmpcontrol, accept
//		igmp count igmp, accept
//		udp count udp, …, none of all these: count ip
//		goto in_list }
//	chain in_tcp {
//		for both directions: the server's port in @excluded: count excluded, note it, accept
//		the connection in @older…: count older, note it, accept
//		of no connection, RST: count stray, accept
//		count escaped, note it }
//	chain in_list { for both directions and families: note class, direction, address, port }
//	chain out …    type filter hook postrouting priority srcnat + 50
//		mark OWN: ct mark set OWN, count own, accept
//		to a group or everybody: accept        # it passes here twice, once for the sender's own copy
//		and so on
//	chain groups   type filter hook output priority srcnat + 50
//		of the link, to a group or everybody: goto out's rest
//
// In which to note is to update the set of the way and family, with a counter.
func packetChains(t *nftables.Table, link string, own uint32) []chain {
	accept := nftables.ChainPolicyAccept
	mark := binaryutil.NativeEndian.PutUint32(own)
	var out []chain
	for _, way := range ways {
		base := &nftables.Chain{Name: way, Table: t, Type: nftables.ChainTypeFilter, Policy: &accept}
		key := expr.MetaKeyIIFNAME
		base.Hooknum, base.Priority = nftables.ChainHookPrerouting, nftables.ChainPriorityRef(*nftables.ChainPriorityNATDest+10)
		if way == "out" {
			key = expr.MetaKeyOIFNAME
			base.Hooknum, base.Priority = nftables.ChainHookPostrouting, nftables.ChainPriorityRef(*nftables.ChainPriorityNATSource+50)
		}
		done := verdict(expr.VerdictAccept, "")
		c := chain{chain: base, rules: [][]expr.Any{
			rule(metaNot(key, name16(link)...), done),
			rule(bits(&expr.Ct{Key: expr.CtKeySTATUS, Register: 1}, ctDstNAT), count("own", way), done),
		}}
		if way == "out" {
			c.rules = append(c.rules, rule(meta(expr.MetaKeyMARK, mark...), one(
				&expr.Immediate{Register: 1, Data: mark},
				&expr.Ct{Key: expr.CtKeyMARK, Register: 1, SourceRegister: true}), count("own", way), done))
		} else {
			c.rules = append(c.rules,
				rule(one(&expr.Ct{Key: expr.CtKeyMARK, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: mark}), count("own", way), done),
				rule(metaNot(expr.MetaKeyPKTTYPE, packetHost), one(
					&expr.Fib{Register: 1, FlagSADDR: true, ResultADDRTYPE: true},
					&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)}), done))
		}
		rest := chain{chain: &nftables.Chain{Name: way + "_rest", Table: t}}
		rest.rules = append(rest.rules,
			rule(meta(expr.MetaKeyL4PROTO, unix.IPPROTO_TCP), verdict(expr.VerdictGoto, way+"_tcp")),
			rule(meta(expr.MetaKeyL4PROTO, unix.IPPROTO_ICMP), noEcho(0, 8), count("icmpcontrol", way), done),
			rule(meta(expr.MetaKeyL4PROTO, unix.IPPROTO_ICMPV6), noEcho(128, 129), count("icmpcontrol", way), done),
			rule(meta(expr.MetaKeyL4PROTO, unix.IPPROTO_IGMP), count("igmp", way), done))
		list := verdict(expr.VerdictGoto, way+"_list")
		for _, p := range []struct {
			number byte
			name   string
		}{
			{unix.IPPROTO_UDP, "udp"}, {unix.IPPROTO_UDPLITE, "udplite"}, {unix.IPPROTO_SCTP, "sctp"}, {unix.IPPROTO_DCCP, "dccp"},
			{unix.IPPROTO_ICMP, "icmp"}, {unix.IPPROTO_ICMPV6, "icmp"},
		} {
			rest.rules = append(rest.rules, rule(meta(expr.MetaKeyL4PROTO, p.number), count(p.name, way), list))
		}
		rest.rules = append(rest.rules, rule(count("ip", way), list))
		out = append(out, tcpChain(t, way), listChain(t, way), rest)
		if way == "out" {
			groups := chain{chain: &nftables.Chain{Name: "groups", Table: t, Type: nftables.ChainTypeFilter, Policy: &accept, Hooknum: nftables.ChainHookOutput, Priority: base.Priority},
				rules: [][]expr.Any{rule(metaNot(key, name16(link)...), done)}}
			for _, many := range toMany() {
				c.rules = append(c.rules, rule(many, done))
				groups.rules = append(groups.rules, rule(many, one(
					&expr.Meta{Key: expr.MetaKeyMARK, Register: 1}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: mark}),
					verdict(expr.VerdictGoto, rest.chain.Name)))
			}
			out = append(out, groups)
		}
		c.rules = append(c.rules, verdict(expr.VerdictGoto, rest.chain.Name))
		out = append(out, c)
	}
	return out
}

// toMany match what goes to more than one.
func toMany() [][]expr.Any {
	kind := func(n uint32) []expr.Any {
		return rule(meta(expr.MetaKeyNFPROTO, unix.NFPROTO_IPV4), one(
			&expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(n)}))
	}
	return [][]expr.Any{kind(unix.RTN_MULTICAST), kind(unix.RTN_BROADCAST),
		rule(meta(expr.MetaKeyNFPROTO, unix.NFPROTO_IPV6), one( // ff00::/8
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 24, Len: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0xff}}))}
}

// resets match segments with RST, which carry nobody's data.
func resets() []expr.Any {
	return one(
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x04}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0}})
}

func noEcho(request, reply byte) []expr.Any {
	return one(
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{request}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{reply}})
}

// directions of a connection, as conntrack numbers them: begun by the packets' sender,
// or answered. What the direction means for the workload depends on the way.
var directions = []byte{0, 1}

func ctDirection(d byte) []expr.Any {
	return one(&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{d}})
}

// serverPort is where a packet of that direction has the server's port.
func serverPort(d byte) uint32 {
	if d == 0 {
		return 2 // it goes there
	}
	return 0
}

// family is one of the two.
type family struct {
	suffix   string
	nfproto  byte
	src, dst uint32 // of the addresses in the header
	len      uint32
	after    uint32 // the register behind an address that begins in the third of a key
	kind     nftables.SetDatatype
}

var families = []family{
	{"4", unix.NFPROTO_IPV4, 12, 16, 4, unix.NFT_REG32_03, nftables.TypeIPAddr},
	{"6", unix.NFPROTO_IPV6, 8, 24, 16, unix.NFT_REG32_06, nftables.TypeIP6Addr},
}

func (f family) remote(way string) uint32 {
	if way == "in" {
		return f.src
	}
	return f.dst
}

// note counts the packet in the set of its way and family, under class (0: its
// protocol), direction, remote address and the port at an offset of the transport's
// header (none: 0).
func note(f family, way string, class uint16, d byte, port *uint32) []expr.Any {
	e := one(&expr.Immediate{Register: unix.NFT_REG32_00, Data: []byte{byte(class), byte(class >> 8), 0, 0}})
	if class == 0 {
		e = one(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: unix.NFT_REG32_00})
	}
	e = append(e,
		&expr.Immediate{Register: unix.NFT_REG32_01, Data: []byte{d, 0, 0, 0}},
		&expr.Payload{DestRegister: unix.NFT_REG32_02, Base: expr.PayloadBaseNetworkHeader, Offset: f.remote(way), Len: f.len})
	if port == nil {
		e = append(e, &expr.Immediate{Register: f.after, Data: make([]byte, 4)})
	} else {
		e = append(e, &expr.Payload{DestRegister: f.after, Base: expr.PayloadBaseTransportHeader, Offset: *port, Len: 2})
	}
	return append(e, &expr.Dynset{SrcRegKey: unix.NFT_REG32_00, SetName: remotes(way, f), Operation: unix.NFT_DYNSET_OP_UPDATE,
		Timeout: forgetAfter, Exprs: []expr.Any{&expr.Counter{}}})
}

func remotes(way string, f family) string { return way + f.suffix }

func older(role string, f family) string { return "older_" + role + f.suffix }

func tcpChain(t *nftables.Table, way string) chain {
	c := chain{chain: &nftables.Chain{Name: way + "_tcp", Table: t}}
	done := verdict(expr.VerdictAccept, "")
	// The capture has the kernel track only what it saw from the beginning: what is older
	// has no direction.
	untracked := bits(&expr.Ct{Key: expr.CtKeySTATE, Register: 1}, ctStateNone)
	for _, f := range families {
		of := meta(expr.MetaKeyNFPROTO, f.nfproto)
		for _, d := range directions {
			port := serverPort(d)
			excluded := one(
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: port, Len: 2},
				&expr.Lookup{SourceRegister: 1, SetName: "excluded"})
			c.rules = append(c.rules, rule(of, excluded, count("excluded", way), note(f, way, tcpExcluded, d, &port), done))
		}
	}
	for _, f := range families {
		of := meta(expr.MetaKeyNFPROTO, f.nfproto)
		// Of a packet that came, the remote port is the source; d is the direction of the
		// packet when the workload is client or server.
		for _, role := range []string{"client", "server"} {
			remote, local := uint32(0), uint32(2)
			if way == "out" {
				remote, local = 2, 0
			}
			port, d := remote, directions[0]
			if role == "server" {
				port = local
			}
			if (role == "client") == (way == "in") {
				d = directions[1]
			}
			known := one(
				&expr.Payload{DestRegister: unix.NFT_REG32_00, Base: expr.PayloadBaseNetworkHeader, Offset: f.remote(way), Len: f.len},
				&expr.Payload{DestRegister: f.after - 2, Base: expr.PayloadBaseTransportHeader, Offset: remote, Len: 2},
				&expr.Payload{DestRegister: f.after - 1, Base: expr.PayloadBaseTransportHeader, Offset: local, Len: 2},
				&expr.Lookup{SourceRegister: unix.NFT_REG32_00, SetName: older(role, f)})
			c.rules = append(c.rules, rule(of, known, count("older", way), note(f, way, tcpOlder, d, &port), done))
		}
	}
	c.rules = append(c.rules, rule(untracked, resets(), count("stray", way), done), count("escaped", way))
	for _, f := range families {
		family := meta(expr.MetaKeyNFPROTO, f.nfproto)
		begun, answered := serverPort(0), serverPort(1)
		c.rules = append(c.rules,
			rule(family, ctDirection(1), note(f, way, tcpEscaped, 1, &answered), done),
			rule(family, note(f, way, tcpEscaped, 0, &begun), done))
	}
	return c
}

func listChain(t *nftables.Table, way string) chain {
	c := chain{chain: &nftables.Chain{Name: way + "_list", Table: t}}
	done := verdict(expr.VerdictAccept, "")
	for _, f := range families {
		of := meta(expr.MetaKeyNFPROTO, f.nfproto)
		for _, d := range directions {
			port := serverPort(d)
			ported := one(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Lookup{SourceRegister: 1, SetName: "transports"})
			c.rules = append(c.rules, rule(of, ctDirection(d), ported, note(f, way, 0, d, &port), done))
			c.rules = append(c.rules, rule(of, ctDirection(d), note(f, way, 0, d, nil), done))
		}
	}
	return c
}

// frameChains are the chains of family netdev, on the link itself:
//
//	chain in { type filter hook ingress device LINK priority filter
//		for another host: count stranger, accept
//		arp: count arp, accept; neither ip nor ip6: count ethernet, accept
//		a fragment: count fragment or fragment6 }
//	chain out { the same on egress }
func frameChains(t *nftables.Table, link string) []chain {
	accept := nftables.ChainPolicyAccept
	var out []chain
	for _, way := range ways {
		hook := nftables.ChainHookIngress
		if way == "out" {
			hook = nftables.ChainHookEgress
		}
		done := verdict(expr.VerdictAccept, "")
		out = append(out, chain{
			chain: &nftables.Chain{Name: way, Table: t, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityFilter, Policy: &accept, Device: link},
			rules: [][]expr.Any{
				rule(meta(expr.MetaKeyPKTTYPE, packetOthers), count("stranger", way), done),
				rule(meta(expr.MetaKeyPROTOCOL, be16(unix.ETH_P_ARP)...), count("arp", way), done),
				rule(metaNot(expr.MetaKeyPROTOCOL, be16(unix.ETH_P_IP)...), one(&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: be16(unix.ETH_P_IPV6)}), count("ethernet", way), done),
				rule(meta(expr.MetaKeyPROTOCOL, be16(unix.ETH_P_IP)...), one(
					// More fragments, or an offset: RFC 791 section 3.1.
					&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 6, Len: 2},
					&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 2, Mask: []byte{0x3f, 0xff}, Xor: []byte{0, 0}},
					&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0, 0}}), count("fragment", way), done),
				rule(meta(expr.MetaKeyPROTOCOL, be16(unix.ETH_P_IPV6)...), one(
					&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 6, Len: 1},
					&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_FRAGMENT}}), count("fragment6", way), done),
			},
		})
	}
	return out
}

// sets are those of family inet.
func sets(t *nftables.Table) []*nftables.Set {
	list := []*nftables.Set{
		{Table: t, ID: 1, Name: "excluded", KeyType: nftables.TypeInetService, Size: maxExcluded},
		{Table: t, ID: 2, Name: "transports", KeyType: nftables.TypeInetProto, Size: 16},
	}
	for _, f := range families {
		for _, way := range ways {
			list = append(list, &nftables.Set{Table: t, Name: remotes(way, f), Concatenation: true, Dynamic: true, HasTimeout: true, Timeout: forgetAfter, Size: maxRemotes,
				KeyType: nftables.MustConcatSetType(nftables.TypeMark, nftables.TypeMark, f.kind, nftables.TypeInetService)})
		}
		for _, role := range []string{"client", "server"} {
			list = append(list, &nftables.Set{Table: t, Name: older(role, f), Concatenation: true, Size: maxOlder,
				KeyType: nftables.MustConcatSetType(f.kind, nftables.TypeInetService, nftables.TypeInetService)})
		}
	}
	for i, s := range list {
		s.ID = uint32(i + 1)
	}
	return list
}
