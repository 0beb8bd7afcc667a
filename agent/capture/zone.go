package capture

import (
	"bytes"
	"errors"
	"fmt"

	"assay.dev/agent/netns"
	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// LegTable is the name of the table that tells the proxy's leg on lo from the client's on
// the link, where both are tracked.
const LegTable = "assay_leg"

// legZone is the zone of the leg's first direction; all else is in zone 0.
const legZone = 1

// zone installs the table of the leg, which is always the same:
//
//	chain output { type filter hook output priority raw
//		LEG ct original zone set 1 }
//	chain began, came { type filter hook output, prerouting priority mangle
//		tcp ct timeout set patience4, for IPv6 patience6 }
//
// LEG is TCP on lo from an address that is not the namespace's own. In the other direction
// the leg is in zone 0: there what the application answers, which nothing else can tell
// from what it begins, is unlike what the listener answers.
//
// The library knows no direction of a zone, so the rule is written by hand.
func (c *Capture) zone() error {
	if c.leg != nil && c.verifyZone() == nil {
		return nil
	}
	conn, err := netns.NFTables(c.ns)
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	t := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: LegTable})
	conn.DelTable(t)
	conn.AddTable(t)
	accept := nftables.ChainPolicyAccept
	conn.AddChain(&nftables.Chain{Name: "output", Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityRaw, Policy: &accept})
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("capture: nftables refused the table of the leg: %w", err)
	}
	if err := c.addLegRule(); err != nil {
		return fmt.Errorf("capture: nftables refused the leg's zone: %w", err)
	}
	if c.leg, err = c.legRule(); err != nil {
		return err
	}
	return c.patience()
}

// silent is how long a half-closed connection may say nothing, as where settings can be made.
const silent = 3600 // seconds

// patience has the kernel remember half-closed connections, by a policy of the namespace's new
// ones. A kernel that has no such policies forgets them after a minute or two, and they end.
func (c *Capture) patience() error {
	conn, err := netns.NFTables(c.ns)
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	t := &nftables.Table{Family: nftables.TableFamilyINet, Name: LegTable}
	accept := nftables.ChainPolicyAccept
	var chains []*nftables.Chain
	for name, hook := range map[string]*nftables.ChainHook{"began": nftables.ChainHookOutput, "came": nftables.ChainHookPrerouting} {
		chains = append(chains, conn.AddChain(&nftables.Chain{Name: name, Table: t, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityMangle, Policy: &accept}))
	}
	for name, family := range map[string]byte{"patience4": unix.NFPROTO_IPV4, "patience6": unix.NFPROTO_IPV6} {
		conn.AddObj(&nftables.NamedObj{Table: t, Name: name, Type: nftables.ObjTypeCtTimeout, Obj: &expr.CtTimeout{
			L3Proto: uint16(family), L4Proto: unix.IPPROTO_TCP,
			Policy: expr.CtStatePolicyTimeout{expr.CtStateTCPESTABLISHED: 432000, expr.CtStateTCPFINWAIT: silent, expr.CtStateTCPCLOSEWAIT: silent},
		}})
		for _, ch := range chains {
			conn.AddRule(&nftables.Rule{Table: t, Chain: ch, Exprs: rule(tcp(), one(
				&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
				&expr.Objref{Type: unix.NFT_OBJECT_CT_TIMEOUT, Name: name}))})
		}
	}
	if err := conn.Flush(); err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("capture: nftables refused a policy for half-closed connections: %w", err)
	}
	return nil
}

// legAttributes name the table's one chain.
func legAttributes() []netlink.Attribute {
	return []netlink.Attribute{
		{Type: unix.NFTA_RULE_TABLE, Data: []byte(LegTable + "\x00")},
		{Type: unix.NFTA_RULE_CHAIN, Data: []byte("output\x00")},
	}
}

func (c *Capture) addLegRule() error {
	var list []netlink.Attribute
	for _, e := range append(leg(), &expr.Immediate{Register: 1, Data: binaryutil.NativeEndian.PutUint16(legZone)}) {
		b, err := expr.Marshal(unix.NFPROTO_INET, e)
		if err != nil {
			return err
		}
		list = append(list, netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: b})
	}
	const original = 0 // IP_CT_DIR_ORIGINAL
	set, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_CT_KEY, Data: binaryutil.BigEndian.PutUint32(unix.NFT_CT_ZONE)},
		{Type: unix.NFTA_CT_SREG, Data: binaryutil.BigEndian.PutUint32(unix.NFT_REG_1)},
		{Type: unix.NFTA_CT_DIRECTION, Data: []byte{original}},
	})
	if err != nil {
		return err
	}
	ct, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_EXPR_NAME, Data: []byte("ct\x00")},
		{Type: unix.NLA_F_NESTED | unix.NFTA_EXPR_DATA, Data: set},
	})
	if err != nil {
		return err
	}
	exprs, err := netlink.MarshalAttributes(append(list, netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: ct}))
	if err != nil {
		return err
	}
	rule, err := netlink.MarshalAttributes(append(legAttributes(), netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_RULE_EXPRESSIONS, Data: exprs}))
	if err != nil {
		return err
	}
	return netns.Transaction(c.ns, netns.Change{Kind: unix.NFT_MSG_NEWRULE, Flags: netlink.Create | netlink.Append, Family: unix.NFPROTO_INET, Attributes: rule})
}

// legRule is the table's one rule as the kernel tells it.
func (c *Capture) legRule() ([]byte, error) {
	attrs, err := netlink.MarshalAttributes(legAttributes())
	if err != nil {
		return nil, err
	}
	list, err := netns.Dump(c.ns, unix.NFT_MSG_GETRULE, unix.NFPROTO_INET, attrs)
	if err != nil {
		return nil, fmt.Errorf("capture: list the leg's zone: %w", err)
	}
	if len(list) != 1 {
		return nil, fmt.Errorf("capture: table %s has %d rules, want 1", LegTable, len(list))
	}
	return list[0], nil
}

func (c *Capture) verifyZone() error {
	have, err := c.legRule()
	if err == nil && !bytes.Equal(have, c.leg) {
		err = errors.New("capture: table " + LegTable + ": its rule was changed")
	}
	return err
}

// removeZone takes that table and Track's away; one that is not there is no error.
func (c *Capture) removeZone(conn *nftables.Conn) {
	for _, name := range []string{LegTable, TrackTable} {
		conn.DelTable(conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: name}))
	}
	c.leg = nil
}
