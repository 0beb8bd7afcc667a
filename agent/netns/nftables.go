package netns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// answerTime bounds one exchange with the kernel, which answers before it returns from
// the request: an answer that is not there after so long has been lost.
var answerTime = 20 * time.Second

// NFTables returns a connection to nftables in n, or in the caller's namespace if n is
// nil. Each exchange has a socket of its own, and ends with os.ErrDeadlineExceeded ("i/o
// timeout") after 20 seconds; whether a change was made is not known then.
func NFTables(n *Namespace) (*nftables.Conn, error) {
	return dialNFTables(n, nftables.WithSockOptions(func(c *netlink.Conn) error {
		// The kernel answers each message of a transaction at once. Without privileges the
		// room stays what the machine gives, for some 270.
		_ = c.SetReadBuffer(1 << 20)
		return c.SetDeadline(time.Now().Add(answerTime))
	}))
}

func dialNFTables(n *Namespace, more ...nftables.ConnOption) (*nftables.Conn, error) {
	if n != nil && !n.own {
		more = append(more, nftables.WithNetNSFd(n.FD()))
	}
	c, err := nftables.New(more...)
	if err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	return c, nil
}

// Questions keeps a socket for what is asked of nftables often. It is not safe for
// concurrent use.
type Questions struct {
	ns     *Namespace
	conn   *nftables.Conn // nil: the next question makes one
	socket *netlink.Conn  // its
}

// QuestionsIn asks in ns, which it uses but does not close.
func QuestionsIn(ns *Namespace) *Questions { return &Questions{ns: ns} }

// Ask has fn ask something that changes nothing. If no answer comes within 20 seconds fn
// asks once more, on a new socket.
func (q *Questions) Ask(fn func(*nftables.Conn) error) error {
	err := q.once(fn)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = q.once(fn)
	}
	return err
}

func (q *Questions) once(fn func(*nftables.Conn) error) (err error) {
	defer func() {
		if err != nil {
			q.Close() // what else is in the socket answers no later question
		}
	}()
	if q.conn == nil {
		keep := nftables.WithSockOptions(func(c *netlink.Conn) error { q.socket = c; return nil })
		if q.conn, err = dialNFTables(q.ns, keep, nftables.AsLasting()); err != nil {
			return err
		}
	}
	if err := q.socket.SetDeadline(time.Now().Add(answerTime)); err != nil {
		return err
	}
	return fn(q.conn)
}

// Generation returns a number that every change of the namespace's rules makes another one,
// whoever's it is.
func (q *Questions) Generation() (id uint32, err error) {
	err = q.Ask(func(*nftables.Conn) error {
		// struct nfgenmsg, and NFTA_GEN_ID of the answer: linux/netfilter/nf_tables.h.
		answer, err := q.socket.Execute(netlink.Message{
			Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
			Data:   make([]byte, 4),
		})
		if err != nil {
			return err
		}
		for _, m := range answer {
			if len(m.Data) < 4 {
				continue
			}
			attrs, err := netlink.NewAttributeDecoder(m.Data[4:])
			if err != nil {
				return err
			}
			attrs.ByteOrder = binary.BigEndian
			for attrs.Next() {
				if attrs.Type() == unix.NFTA_GEN_ID {
					id = attrs.Uint32()
				}
			}
			if attrs.Err() != nil {
				return attrs.Err()
			}
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("nftables: the rules' generation: %w", err)
	}
	return id, nil
}

// Close closes the socket; the next question opens another.
func (q *Questions) Close() error {
	if q.conn == nil {
		return nil
	}
	c := q.conn
	q.conn, q.socket = nil, nil
	return c.CloseLasting()
}
