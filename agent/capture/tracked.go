package capture

import (
	"encoding/binary"
	"fmt"

	"assay.dev/agent/netns"
	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// TrackTable is the name of Track's table.
const TrackTable = "assay_track"

// Track has the kernel track connections before there are rules, and know those that carry
// mark. Rules that are Tracked cut off what they have not seen the beginning of, also
// connections of whoever installs them.
func Track(ns *netns.Namespace, mark uint32) error {
	conn, err := netns.NFTables(ns)
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	t := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: TrackTable})
	conn.DelTable(t)
	conn.AddTable(t)
	accept := nftables.ChainPolicyAccept
	ch := conn.AddChain(&nftables.Chain{Name: "output", Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityMangle, Policy: &accept})
	conn.AddRule(&nftables.Rule{Table: t, Chain: ch, Exprs: own(mark)})
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("capture: nftables refused to track connections: %w", err)
	}
	return nil
}

// own marks connections that leave with a mark.
func own(m uint32) []expr.Any {
	return rule(mark(m), link(expr.MetaKeyOIFNAME), one(
		&expr.Immediate{Register: 1, Data: binaryutil.NativeEndian.PutUint32(m)},
		&expr.Ct{Key: expr.CtKeyMARK, SourceRegister: true, Register: 1}))
}

// tracked returns what is different where the namespace's settings are not ours to make. The
// leg is tracked, in a zone of its own (see zone.go), and its answers are known by that:
//
//	chain back { type route hook output priority mangle
//		LEG ct mark set RETURN, accept
//		mark OWN, oif not lo: ct mark set OWN   # as the meter does, and before there is one
//		ct mark RETURN meta mark set RETURN }
//
// The kernel forgets connections that are silent for long, and begins to track what it has not
// seen the beginning of; what is outside of a window it does not translate. None of that may pass:
//
//	chain staleout	tcp, oif not lo, mark neither OWN nor RETURN, neither port EXCLUDED, fib daddr type not local:
//		ct state invalid drop
//		ct status not dnat reject with tcp reset
//	chain stalein	tcp, iif not lo: ct state invalid drop
//		the same, ct direction original, ct status not dnat, not EXCLUDED: drop
func tracked(r Rules) (staleOut, staleIn, back [][]expr.Any) {
	ret := binaryutil.NativeEndian.PutUint32(r.ReturnMark)
	drop := one(&expr.Verdict{Kind: expr.VerdictDrop})
	back = [][]expr.Any{
		rule(leg(), one(
			&expr.Immediate{Register: 1, Data: ret},
			&expr.Ct{Key: expr.CtKeyMARK, SourceRegister: true, Register: 1},
			&expr.Verdict{Kind: expr.VerdictAccept})),
		own(r.OwnMark),
		one(
			&expr.Ct{Key: expr.CtKeyMARK, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: ret},
			&expr.Immediate{Register: 1, Data: ret},
			&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1}),
	}
	out := rule(tcp(), link(expr.MetaKeyOIFNAME), notMark(r.OwnMark), notMark(r.ReturnMark), notLocal(), notPorts(r.Excluded), notSourcePorts(r.Excluded))
	staleOut = [][]expr.Any{
		rule(out, invalid(), drop),
		rule(out, notTranslated(), one(&expr.Reject{Type: unix.NFT_REJECT_TCP_RST})),
	}
	in := rule(tcp(), link(expr.MetaKeyIIFNAME))
	staleIn = [][]expr.Any{
		rule(in, invalid(), drop),
		rule(in, original(), notTranslated(), notPorts(r.Excluded), drop),
	}
	return staleOut, staleIn, back
}

// leg matches what the proxy says to its application: on lo, from a client's address.
func leg() []expr.Any {
	return rule(tcp(), loopback(expr.MetaKeyOIFNAME), one(
		&expr.Fib{Register: 1, FlagSADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)}))
}

// invalid matches packets that belong to no connection.
func invalid() []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(expr.CtStateBitINVALID)},
	}
}

// original matches packets of whoever began the connection.
func original() []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0}}, // IP_CT_DIR_ORIGINAL
	}
}

func notMark(m uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binaryutil.NativeEndian.PutUint32(m)},
	}
}

func notSourcePorts(ports []uint16) (all []expr.Any) {
	for _, p := range ports {
		all = append(all,
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: binary.BigEndian.AppendUint16(nil, p)})
	}
	return all
}
