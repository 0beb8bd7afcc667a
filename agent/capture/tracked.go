package capture

import (
	"encoding/binary"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

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
	own, ret := binaryutil.NativeEndian.PutUint32(r.OwnMark), binaryutil.NativeEndian.PutUint32(r.ReturnMark)
	drop := one(&expr.Verdict{Kind: expr.VerdictDrop})
	back = [][]expr.Any{
		rule(leg(), one(
			&expr.Immediate{Register: 1, Data: ret},
			&expr.Ct{Key: expr.CtKeyMARK, SourceRegister: true, Register: 1},
			&expr.Verdict{Kind: expr.VerdictAccept})),
		rule(mark(r.OwnMark), link(expr.MetaKeyOIFNAME), one(
			&expr.Immediate{Register: 1, Data: own},
			&expr.Ct{Key: expr.CtKeyMARK, SourceRegister: true, Register: 1})),
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
