package proxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"assay.dev/proxy/nowait"
	"golang.org/x/sys/unix"
)

const ip6tOriginalDst = 80 // linux/netfilter_ipv6/ip6_tables.h

// keepalive notices a dead peer in about two minutes. It is for connections that
// leave the workload: the kernel knows when a process of its own has gone.
var keepalive = net.KeepAliveConfig{Enable: true, Idle: 60 * time.Second, Interval: 15 * time.Second, Count: 4}

// originalDst returns where a redirected connection was meant to go.
func originalDst(c *nowait.TCP) (netip.AddrPort, error) {
	if c.Remote().Addr().Is4() {
		return c.AddrOption(unix.SOL_IP, unix.SO_ORIGINAL_DST)
	}
	return c.AddrOption(unix.SOL_IPV6, ip6tOriginalDst)
}

// addrPort is a TCP address without a zone and without IPv4 in IPv6.
func addrPort(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

// dialNetwork connects to another proxy, or to where there is none.
func dialNetwork(ctx context.Context, to netip.AddrPort, mark uint32) (*net.TCPConn, error) {
	return dial(ctx, to, mark, nil, keepalive, nil)
}

// dialAs connects to the application with the client's address, and with its port
// when that is not 0 and free. The capture keeps this connection out of connection
// tracking, so it may look the same as the one that the client made.
func dialAs(ctx context.Context, from, to netip.AddrPort, mark uint32) (*net.TCPConn, error) {
	transparent := func(fd int) error {
		if from.Addr().Is4() {
			return os.NewSyscallError("setsockopt IP_TRANSPARENT", unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1))
		}
		return os.NewSyscallError("setsockopt IPV6_TRANSPARENT", unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1))
	}
	if from.Port() != 0 {
		c, err := dial(ctx, to, mark, net.TCPAddrFromAddrPort(from), net.KeepAliveConfig{}, func(fd int) error {
			// One source port may serve several destinations.
			if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
				return os.NewSyscallError("setsockopt SO_REUSEADDR", err)
			}
			return transparent(fd)
		})
		if !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return c, err
		}
	}
	return dial(ctx, to, mark, net.TCPAddrFromAddrPort(netip.AddrPortFrom(from.Addr(), 0)), net.KeepAliveConfig{}, func(fd int) error {
		// The port is chosen when the destination is known, so that there is one for
		// each client, not one for each connection to anybody.
		_ = unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
		return transparent(fd)
	})
}

func dial(ctx context.Context, to netip.AddrPort, mark uint32, from net.Addr, alive net.KeepAliveConfig, prepare func(fd int) error) (*net.TCPConn, error) {
	d := net.Dialer{
		LocalAddr:       from,
		KeepAlive:       -1, // unless the next line says otherwise
		KeepAliveConfig: alive,
		FallbackDelay:   -1,
		Control: func(_, _ string, raw syscall.RawConn) error {
			var err error
			if e := raw.Control(func(fd uintptr) {
				if mark != 0 {
					err = os.NewSyscallError("setsockopt SO_MARK", unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(mark)))
				}
				if err == nil && prepare != nil {
					err = prepare(int(fd))
				}
			}); e != nil {
				return e
			}
			return err
		},
	}
	c, err := d.DialContext(ctx, "tcp", to.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// abort ends a connection with a reset, so that the application sees that it did
// not end well.
func abort(c nowait.Conn) {
	c.SetLinger(0)
	c.Close()
}

// acceptLoop accepts until the listener is closed. Running out of descriptors is
// waited out: what cannot be accepted stays in the backlog.
func (p *Proxy) acceptLoop(ctx context.Context, role string, l *nowait.Listener, serve func(context.Context, *nowait.TCP)) {
	defer p.end() // of accept's begin
	pause := time.Duration(0)
	for {
		c, err := l.Accept()
		if err == nil {
			pause = 0
			p.serveConn(func() { serve(ctx, c) })
			continue
		}
		if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
			return
		}
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		p.log.Warn("accept", "listener", role, "error", err, "pause", pause)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// serveConn runs serve for a connection, which counts as work from this moment on.
func (p *Proxy) serveConn(serve func()) {
	p.begin()
	p.wg.Go(func() {
		defer p.end()
		serve()
	})
}
