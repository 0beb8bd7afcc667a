// Package sockdiag asks the kernel for the TCP sockets of a network namespace and ends them,
// through its sock_diag interface (linux/inet_diag.h).
//
// It knows nothing of workloads, and starts no goroutine. A Conn is its caller's alone: answers
// are told apart by their order.
package sockdiag

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"assay.dev/agent/netns"
	"golang.org/x/sys/unix"
)

// States of a socket (linux/tcp_states.h).
const (
	TimeWait = 6
	Close    = 7
	Listen   = 10
)

// AllStates is every state, as a set for List; 1<<Listen is the one.
const AllStates = 1<<12 - 1

// Families are those that have TCP.
var Families = [...]byte{unix.AF_INET, unix.AF_INET6}

// Socket is one of TCP.
type Socket struct {
	Family, State byte
	ID            ID
	Local, Remote netip.AddrPort
	Inode         uint32 // 0: no process has it
	Mark          uint32 // told to who has CAP_NET_ADMIN
}

// ID is a struct inet_diag_sockid, which names a socket alone: ports, addresses, interface, cookie.
type ID [48]byte

// Sizes of messages, and their kinds.
const (
	header   = 16 // struct nlmsghdr
	request  = header + 8 + len(ID{})
	answer   = 72 // struct inet_diag_msg; then attributes
	inode    = 68 // of inet_diag_msg.idiag_inode
	markAttr = 15 // INET_DIAG_MARK
	byFamily = 20 // SOCK_DIAG_BY_FAMILY
	destroy  = 21 // SOCK_DESTROY
)

// Conn is a way to ask about one namespace.
type Conn struct{ fd int }

// Open opens one to a namespace; nil is the caller's own.
func Open(ns *netns.Namespace) (*Conn, error) {
	c := &Conn{fd: -1}
	open := func() (err error) {
		c.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
		return err
	}
	var err error
	if ns == nil {
		err = open()
	} else {
		err = ns.Do(open)
	}
	if err != nil {
		return nil, fmt.Errorf("sock_diag: %w", err)
	}
	// A kernel that does not answer must not hold a goroutine for ever.
	if err := unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2}); err != nil {
		unix.Close(c.fd)
		return nil, fmt.Errorf("sock_diag: %w", err)
	}
	return c, nil
}

func (c *Conn) Close() error { return unix.Close(c.fd) }

// buffers are for answers, of which an agent with many pods asks for hundreds a second.
var buffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// List visits the sockets of one family that are in one of the states (1<<Listen, AllStates …).
func (c *Conn) List(family byte, states uint32, visit func(*Socket)) error {
	if err := c.ask(question(byFamily, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, family, states)); err != nil {
		return err
	}
	buf := buffers.Get().(*[32 << 10]byte)
	defer buffers.Put(buf)
	for {
		n, err := c.receive(buf[:])
		if err != nil {
			return err
		}
		for m := buf[:n]; len(m) >= header; {
			size := int(binary.NativeEndian.Uint32(m))
			if size < header || size > len(m) {
				return fmt.Errorf("sock_diag: message of %d bytes in %d", size, len(m))
			}
			switch kindOf(m) {
			case unix.NLMSG_DONE:
				return nil
			case unix.NLMSG_ERROR:
				return fmt.Errorf("sock_diag: %w", errnoOf(m[:size]))
			case byFamily:
				if body := m[header:size]; len(body) >= answer {
					visit(socketOf(body))
				}
			}
			m = m[min((size+3)&^3, len(m)):]
		}
	}
}

// Find returns the socket of one connection by both of its ends; nil when there is none, or
// somebody listens on its port in its place. It asks for that connection alone: a list by ports
// has others too, since the kernel gives one port to connections with several servers.
func (c *Conn) Find(local, remote netip.AddrPort) (*Socket, error) {
	family := byte(unix.AF_INET)
	if local.Addr().Is6() {
		family = unix.AF_INET6
	}
	b := question(byFamily, unix.NLM_F_REQUEST, family, AllStates)
	id := b[header+8:]
	binary.BigEndian.PutUint16(id[0:], local.Port())
	binary.BigEndian.PutUint16(id[2:], remote.Port())
	copy(id[4:], local.Addr().AsSlice())
	copy(id[20:], remote.Addr().AsSlice())
	binary.NativeEndian.PutUint64(id[40:], 1<<64-1) // whatever its cookie
	if err := c.ask(b); err != nil {
		return nil, err
	}
	buf := make([]byte, 4096)
	n, err := c.receive(buf)
	switch {
	case err != nil:
		return nil, err
	case n >= header && kindOf(buf) == unix.NLMSG_ERROR:
		if err := errnoOf(buf[:n]); !errors.Is(err, unix.ENOENT) {
			return nil, fmt.Errorf("sock_diag: %w", err)
		}
		return nil, nil
	case n < header+answer:
		return nil, fmt.Errorf("sock_diag: an answer of %d bytes", n)
	}
	if s := socketOf(buf[header:n]); s.State != Listen {
		return s, nil
	}
	return nil, nil
}

// Destroy ends a connection as if it had been reset: the peer is told, and who has the
// socket. One that has ended meanwhile is no error.
func (c *Conn) Destroy(s *Socket) error {
	b := question(destroy, unix.NLM_F_REQUEST|unix.NLM_F_ACK, s.Family, AllStates)
	copy(b[header+8:], s.ID[:])
	if err := c.ask(b); err != nil {
		return err
	}
	buf := make([]byte, 512)
	n, err := c.receive(buf)
	switch {
	case err != nil:
		return err
	case n < header+4 || kindOf(buf) != unix.NLMSG_ERROR:
		return fmt.Errorf("sock_diag: an answer of %d bytes", n)
	}
	if err := errnoOf(buf[:n]); err != unix.Errno(0) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("sock_diag: %w", err)
	}
	return nil
}

func (c *Conn) ask(b []byte) error {
	if err := unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("sock_diag: %w", err)
	}
	return nil
}

func (c *Conn) receive(buf []byte) (int, error) {
	for {
		n, _, err := unix.Recvfrom(c.fd, buf, 0)
		switch err {
		case nil:
			return n, nil
		case unix.EINTR:
		default:
			return 0, fmt.Errorf("sock_diag: %w", err)
		}
	}
}

// question is a request about TCP sockets: struct inet_diag_req_v2.
func question(kind, flags uint16, family byte, states uint32) []byte {
	b := make([]byte, request)
	ne := binary.NativeEndian
	ne.PutUint32(b[0:], uint32(request))
	ne.PutUint16(b[4:], kind)
	ne.PutUint16(b[6:], flags)
	b[header], b[header+1] = family, unix.IPPROTO_TCP
	ne.PutUint32(b[header+4:], states)
	return b
}

func kindOf(m []byte) uint16 { return binary.NativeEndian.Uint16(m[4:]) }

// errnoOf reads struct nlmsgerr; 0 is an acknowledgement.
func errnoOf(m []byte) error {
	if len(m) < header+4 {
		return errors.New("an error without a number")
	}
	return unix.Errno(-int32(binary.NativeEndian.Uint32(m[header:])))
}

// socketOf reads a struct inet_diag_msg: family, state, timer, retransmissions; the ID, with ports in
// network order and then both addresses; and more.
func socketOf(body []byte) *Socket {
	return &Socket{
		Family: body[0], State: body[1], ID: ID(body[4:]),
		Local: endpoint(body[0], body[4:6], body[8:24]), Remote: endpoint(body[0], body[6:8], body[24:40]),
		Inode: binary.NativeEndian.Uint32(body[inode:]), Mark: markIn(body[answer:]),
	}
}

func endpoint(family byte, port, addr []byte) netip.AddrPort {
	a := netip.AddrFrom16([16]byte(addr)).Unmap()
	if family == unix.AF_INET {
		a = netip.AddrFrom4([4]byte(addr))
	}
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(port))
}

// markIn finds a socket's mark among attributes: struct rtattr of linux/rtnetlink.h.
func markIn(attrs []byte) uint32 {
	ne := binary.NativeEndian
	for len(attrs) >= 4 {
		size := int(ne.Uint16(attrs))
		if size < 4 || size > len(attrs) {
			return 0
		}
		if ne.Uint16(attrs[2:]) == markAttr && size >= 8 {
			return ne.Uint32(attrs[4:])
		}
		attrs = attrs[min((size+3)&^3, len(attrs)):]
	}
	return 0
}
