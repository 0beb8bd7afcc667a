package nowait

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Conn is what the proxy needs of a TCP connection. Those that package net dials have it,
// and those that a Listener accepts.
type Conn interface {
	net.Conn
	syscall.Conn
	CloseWrite() error
	SetLinger(seconds int) error
}

// TCP is a connection that a Listener has accepted. Of the ten calls with which
// package net accepts and ends one it makes five, and announces one. Whoever moves bytes
// does so with SyscallConn, as with a net.TCPConn; its Read and Write are announced, for
// what is seldom.
type TCP struct {
	file   *os.File
	raw    syscall.RawConn
	remote netip.AddrPort
	closed atomic.Bool
}

// NewTCP takes over the descriptor of a connected socket that does not block.
func NewTCP(fd int) (*TCP, error) {
	var name sockaddr
	size := uint32(unsafe.Sizeof(name))
	if _, _, errno := syscall.RawSyscall(syscall.SYS_GETPEERNAME, uintptr(fd), uintptr(unsafe.Pointer(&name)), uintptr(unsafe.Pointer(&size))); errno != 0 {
		unix.Close(fd)
		return nil, failed("getpeername", errno)
	}
	return newTCP(fd, name.addrPort())
}

func newTCP(fd int, remote netip.AddrPort) (*TCP, error) {
	t := &TCP{file: os.NewFile(uintptr(fd), "tcp"), remote: remote}
	raw, err := t.file.SyscallConn()
	if err != nil {
		t.file.Close()
		return nil, err
	}
	t.raw = raw
	return t, nil
}

// Remote is the address of the other end, IPv4 as such and without a zone.
func (t *TCP) Remote() netip.AddrPort { return t.remote }

// Local is the address of this end; the zero value if the kernel does not say.
func (t *TCP) Local() netip.AddrPort {
	var name sockaddr
	size := uint32(unsafe.Sizeof(name))
	errno := syscall.Errno(0)
	err := t.raw.Control(func(fd uintptr) {
		_, _, errno = syscall.RawSyscall(syscall.SYS_GETSOCKNAME, fd, uintptr(unsafe.Pointer(&name)), uintptr(unsafe.Pointer(&size)))
	})
	if err != nil || errno != 0 {
		return netip.AddrPort{}
	}
	return name.addrPort()
}

// AddrOption returns an option that is an address: where a redirected connection was meant
// to go is one.
func (t *TCP) AddrOption(level, name int) (netip.AddrPort, error) {
	var v sockaddr
	size := uint32(unsafe.Sizeof(v))
	err := t.control(func(fd uintptr) error {
		_, _, errno := syscall.RawSyscall6(syscall.SYS_GETSOCKOPT, fd, uintptr(level), uintptr(name), uintptr(unsafe.Pointer(&v)), uintptr(unsafe.Pointer(&size)), 0)
		return failed("getsockopt", errno)
	})
	if err != nil {
		return netip.AddrPort{}, err
	}
	return v.addrPort(), nil
}

func (t *TCP) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(t.remote) }
func (t *TCP) LocalAddr() net.Addr  { return net.TCPAddrFromAddrPort(t.Local()) }

func (t *TCP) SyscallConn() (syscall.RawConn, error) { return (*rawTCP)(t), nil }

func (t *TCP) Read(p []byte) (int, error) {
	n, err := t.file.Read(p)
	return n, t.told(err)
}

func (t *TCP) Write(p []byte) (int, error) {
	n, err := t.file.Write(p)
	return n, t.told(err)
}

func (t *TCP) SetDeadline(d time.Time) error      { return t.file.SetDeadline(d) }
func (t *TCP) SetReadDeadline(d time.Time) error  { return t.file.SetReadDeadline(d) }
func (t *TCP) SetWriteDeadline(d time.Time) error { return t.file.SetWriteDeadline(d) }

// Close ends the connection; calls that wait return net.ErrClosed.
func (t *TCP) Close() error {
	t.closed.Store(true)
	return t.told(t.file.Close())
}

// CloseWrite tells the other end that no more will be sent.
func (t *TCP) CloseWrite() error {
	return t.control(func(fd uintptr) error {
		_, _, errno := syscall.RawSyscall(syscall.SYS_SHUTDOWN, fd, syscall.SHUT_WR, 0)
		return failed("shutdown", errno)
	})
}

// SetLinger is net.TCPConn's: 0 has Close reset the connection.
func (t *TCP) SetLinger(seconds int) error {
	l := syscall.Linger{Onoff: 1, Linger: int32(seconds)}
	if seconds < 0 {
		l = syscall.Linger{}
	}
	return t.control(func(fd uintptr) error {
		_, _, errno := syscall.RawSyscall6(syscall.SYS_SETSOCKOPT, fd, syscall.SOL_SOCKET, syscall.SO_LINGER, uintptr(unsafe.Pointer(&l)), unsafe.Sizeof(l), 0)
		return failed("setsockopt", errno)
	})
}

func (t *TCP) control(f func(fd uintptr) error) error {
	var err error
	if e := t.raw.Control(func(fd uintptr) { err = f(fd) }); e != nil {
		return t.told(e)
	}
	return err
}

// told has errors of a closed connection be what package net's are.
func (t *TCP) told(err error) error {
	switch {
	case err == nil:
		return nil
	case t.closed.Load() && !errors.Is(err, os.ErrDeadlineExceeded):
		return net.ErrClosed
	}
	if e, ok := errors.AsType[*os.PathError](err); ok {
		return &net.OpError{Op: e.Op, Net: "tcp", Err: e.Err}
	}
	return err
}

type rawTCP TCP

func (r *rawTCP) Control(f func(fd uintptr)) error {
	return (*TCP)(r).told(r.raw.Control(f))
}

func (r *rawTCP) Read(f func(fd uintptr) bool) error {
	return (*TCP)(r).told(r.raw.Read(f))
}

func (r *rawTCP) Write(f func(fd uintptr) bool) error {
	return (*TCP)(r).told(r.raw.Write(f))
}

// Listener accepts connections on a socket that is not only its own: other processes may
// hold it, too.
type Listener struct {
	file   *os.File
	raw    syscall.RawConn
	closed atomic.Bool
	accept func(fd uintptr) bool // bound once
	name   sockaddr
	fd     int
	errno  syscall.Errno
}

// Listen takes over the descriptor of a listening TCP socket. What it accepts has no delay
// for small segments, and alive. The kernel gives a connection the options of the socket
// that it came by: so they are set once, here, and hold for all who accept on it.
func Listen(fd int, alive net.KeepAliveConfig) (*Listener, error) {
	options := [][3]int{{unix.SOL_TCP, unix.TCP_NODELAY, 1}, {unix.SOL_SOCKET, unix.SO_KEEPALIVE, 0}}
	if alive.Enable {
		options = [][3]int{
			{unix.SOL_TCP, unix.TCP_NODELAY, 1}, {unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
			{unix.SOL_TCP, unix.TCP_KEEPIDLE, int(alive.Idle / time.Second)},
			{unix.SOL_TCP, unix.TCP_KEEPINTVL, int(alive.Interval / time.Second)},
			{unix.SOL_TCP, unix.TCP_KEEPCNT, alive.Count},
		}
	}
	err := os.NewSyscallError("fcntl", unix.SetNonblock(fd, true))
	for _, o := range options {
		if err == nil {
			err = os.NewSyscallError("setsockopt", unix.SetsockoptInt(fd, o[0], o[1], o[2]))
		}
	}
	if err == nil {
		var is int
		is, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
		if err == nil && is == 0 {
			err = syscall.EINVAL
		}
		err = os.NewSyscallError("getsockopt SO_ACCEPTCONN", err)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	l := &Listener{file: os.NewFile(uintptr(fd), "listener")}
	l.accept = l.acceptFD
	l.raw, err = l.file.SyscallConn()
	return l, err
}

// Accept waits for a connection. One goroutine accepts at a time. After Close it returns
// net.ErrClosed.
func (l *Listener) Accept() (*TCP, error) {
	if err := l.raw.Read(l.accept); err != nil {
		if l.closed.Load() {
			err = net.ErrClosed
		}
		return nil, err
	}
	if l.errno != 0 {
		return nil, failed("accept", l.errno)
	}
	return newTCP(l.fd, l.name.addrPort())
}

func (l *Listener) acceptFD(fd uintptr) bool {
	for {
		size := uint32(unsafe.Sizeof(l.name))
		n, _, errno := syscall.RawSyscall6(syscall.SYS_ACCEPT4, fd, uintptr(unsafe.Pointer(&l.name)), uintptr(unsafe.Pointer(&size)), syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK, 0, 0)
		switch errno {
		case syscall.EINTR, syscall.ECONNABORTED: // it was reset before it was accepted
		case syscall.EAGAIN:
			return false
		default:
			l.fd, l.errno = int(n), errno
			return true
		}
	}
}

// Close ends Accept. The socket listens on as long as somebody else has it.
func (l *Listener) Close() error {
	l.closed.Store(true)
	return l.file.Close()
}

// sockaddr has room for struct sockaddr_in6, the larger of the two.
type sockaddr [unix.SizeofSockaddrInet6]byte

// addrPort reads family, port, then an IPv4 address, or a flow and an IPv6 address.
func (s *sockaddr) addrPort() netip.AddrPort {
	port := uint16(s[2])<<8 | uint16(s[3])
	switch family := *(*uint16)(unsafe.Pointer(s)); family {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(s[4:8])), port)
	case unix.AF_INET6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(s[8:24])).Unmap(), port)
	}
	return netip.AddrPort{}
}
