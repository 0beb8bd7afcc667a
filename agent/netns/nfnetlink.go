package netns

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// What package nftables cannot say is said to the kernel directly: linux/netfilter/nf_tables.h.

// Change is one message of a transaction of nftables.
type Change struct {
	Kind       uint16 // NFT_MSG_NEWRULE, for instance
	Flags      netlink.HeaderFlags
	Family     byte // NFPROTO_INET, for instance
	Attributes []byte
}

// Transaction makes changes in n, all or none.
func Transaction(n *Namespace, changes ...Change) error {
	c, err := dialNetfilter(n)
	if err != nil {
		return err
	}
	defer c.Close()
	// A batch is of the subsystem that its beginning and end name: struct nfgenmsg.
	mark := func(kind uint16) netlink.Message {
		return netlink.Message{
			Header: netlink.Header{Type: netlink.HeaderType(kind), Flags: netlink.Request},
			Data:   binary.BigEndian.AppendUint16([]byte{unix.AF_UNSPEC, unix.NFNETLINK_V0}, unix.NFNL_SUBSYS_NFTABLES),
		}
	}
	batch := []netlink.Message{mark(unix.NFNL_MSG_BATCH_BEGIN)}
	for _, x := range changes {
		batch = append(batch, message(x.Kind, netlink.Request|netlink.Acknowledge|x.Flags, x.Family, x.Attributes))
	}
	if _, err := c.SendMessages(append(batch, mark(unix.NFNL_MSG_BATCH_END))); err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	for range changes {
		if _, err := c.Receive(); err != nil {
			return fmt.Errorf("nftables: %w", err)
		}
	}
	return nil
}

// Dump asks in n for a list, and returns the attributes of each part of it.
func Dump(n *Namespace, kind uint16, family byte, attributes []byte) (list [][]byte, err error) {
	c, err := dialNetfilter(n)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	answers, err := c.Execute(message(kind, netlink.Request|netlink.Dump, family, attributes))
	if err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	for _, m := range answers {
		if len(m.Data) > nfgenmsg {
			list = append(list, m.Data[nfgenmsg:])
		}
	}
	return list, nil
}

const nfgenmsg = 4 // sizeof(struct nfgenmsg)

func message(kind uint16, flags netlink.HeaderFlags, family byte, attributes []byte) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | kind), Flags: flags},
		Data:   append([]byte{family, unix.NFNETLINK_V0, 0, 0}, attributes...),
	}
}

func dialNetfilter(n *Namespace) (*netlink.Conn, error) {
	cfg := &netlink.Config{}
	if n != nil && !n.own {
		cfg.NetNS = n.FD()
	}
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, cfg)
	if err == nil {
		err = c.SetDeadline(time.Now().Add(answerTime))
	}
	if err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	return c, nil
}
