package nowait

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"assay.dev/proxy/pairtest"
)

// long bounds what cannot fail but by not happening.
const long = 20 * time.Second

// listen returns a Listener and its address; the socket itself stays the test's, as the
// agent's stays the agent's.
func listen(t testing.TB, address string, alive net.KeepAliveConfig) (*Listener, netip.AddrPort) {
	t.Helper()
	inner, err := net.Listen("tcp", address)
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { inner.Close() })
	f, err := inner.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen(fd, alive)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, inner.Addr().(*net.TCPAddr).AddrPort()
}

// accepted returns both ends of a connection.
func accepted(t *testing.T, l *Listener, to string) (*TCP, *net.TCPConn) {
	t.Helper()
	c, err := net.Dial("tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s, c.(*net.TCPConn)
}

func option(t *testing.T, c Conn, level, name int) int {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	v := 0
	if e := raw.Control(func(fd uintptr) { v, err = unix.GetsockoptInt(int(fd), level, name) }); e != nil || err != nil {
		t.Fatal(e, err)
	}
	return v
}

// TestAccepted: options come from the listener, addresses from the kernel.
func TestAccepted(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0", "[::]:0"} {
		t.Run(address, func(t *testing.T) {
			l, at := listen(t, address, net.KeepAliveConfig{Enable: true, Idle: 60 * time.Second, Interval: 15 * time.Second, Count: 4})
			to := at.String()
			if at.Addr().IsUnspecified() {
				to = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), at.Port()).String()
			}
			s, c := accepted(t, l, to)
			if got, want := s.Remote().String(), c.LocalAddr().String(); got != want || s.RemoteAddr().String() != want {
				t.Errorf("remote %s, want %s", got, want)
			}
			if got := s.Local().String(); got != to || s.LocalAddr().String() != to {
				t.Errorf("local %s, want %s", got, to)
			}
			for _, o := range []struct{ level, name, want int }{
				{unix.SOL_TCP, unix.TCP_NODELAY, 1}, {unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1}, {unix.SOL_TCP, unix.TCP_KEEPIDLE, 60},
				{unix.SOL_TCP, unix.TCP_KEEPINTVL, 15}, {unix.SOL_TCP, unix.TCP_KEEPCNT, 4},
			} {
				if got := option(t, s, o.level, o.name); got != o.want {
					t.Errorf("option %d of level %d is %d, want %d", o.name, o.level, got, o.want)
				}
			}
		})
	}
	l, at := listen(t, "127.0.0.1:0", net.KeepAliveConfig{})
	if s, _ := accepted(t, l, at.String()); option(t, s, unix.SOL_SOCKET, unix.SO_KEEPALIVE) != 0 {
		t.Error("a connection within the kernel is kept alive")
	}
}

// TestBytes moves more than buffers hold, half-closes, and reads to the end.
func TestBytes(t *testing.T) {
	l, at := listen(t, "127.0.0.1:0", net.KeepAliveConfig{})
	s, c := accepted(t, l, at.String())
	const size = 8 << 20
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		io.Copy(c, c)
		c.CloseWrite()
	})
	wg.Go(func() {
		for left := size; left > 0; left -= 64 << 10 {
			if _, err := s.Write(make([]byte, 64<<10)); err != nil {
				t.Error(err)
			}
		}
		if err := s.CloseWrite(); err != nil {
			t.Error(err)
		}
	})
	s.SetReadDeadline(time.Now().Add(long))
	if n, err := io.Copy(io.Discard, s); n != size || err != nil {
		t.Errorf("%d bytes came back, %v", n, err)
	}
}

// TestSetLinger: a connection that is closed without lingering is reset.
func TestSetLinger(t *testing.T) {
	l, at := listen(t, "127.0.0.1:0", net.KeepAliveConfig{})
	s, c := accepted(t, l, at.String())
	if err := s.SetLinger(0); err != nil {
		t.Fatal(err)
	}
	s.Close()
	c.SetReadDeadline(time.Now().Add(long))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %v, want a reset", err)
	}
}

// TestWaitsEnd: a deadline and Close end waits, and say which it was.
func TestWaitsEnd(t *testing.T) {
	l, at := listen(t, "127.0.0.1:0", net.KeepAliveConfig{})
	s, _ := accepted(t, l, at.String())
	raw, err := s.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	waits := map[string]func() error{
		"Read":     func() error { _, err := s.Read(make([]byte, 1)); return err },
		"raw Read": func() error { return raw.Read(func(uintptr) bool { return false }) },
	}
	for name, wait := range waits {
		s.SetReadDeadline(time.Unix(1, 0))
		if err := wait(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s after its deadline: %v", name, err)
		}
	}
	s.SetReadDeadline(time.Time{})
	done := make(chan error)
	for _, wait := range waits {
		go func() { done <- wait() }()
	}
	s.Close()
	for range waits {
		if err := <-done; !errors.Is(err, net.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	}
	for name, err := range map[string]error{
		"CloseWrite": s.CloseWrite(), "SetLinger": s.SetLinger(0), "Close": s.Close(),
		"Control": raw.Control(func(uintptr) { t.Error("called with no descriptor") }),
	} {
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
	if s.Local().IsValid() {
		t.Error("a closed connection has an address")
	}
}

// TestListenerCloses: Accept ends; the socket of somebody else does not.
func TestListenerCloses(t *testing.T) {
	l, at := listen(t, "127.0.0.1:0", net.KeepAliveConfig{})
	done := make(chan error)
	go func() { _, err := l.Accept(); done <- err }()
	l.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept: %v", err)
	}
	c, err := net.Dial("tcp", at.String())
	if err != nil {
		t.Fatalf("the socket has ended with one of its holders: %v", err)
	}
	c.Close()
}

// TestNotListening: what does not listen is refused, and closed.
func TestNotListening(t *testing.T) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if l, err := Listen(fd, net.KeepAliveConfig{}); err == nil {
		l.Close()
		t.Error("a socket that does not listen was taken")
	}
	if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0); err != nil {
		t.Fatal(err)
	}
	if c, err := NewTCP(fd); err == nil {
		c.Close()
		t.Error("a socket that is not connected was taken")
	}
}

// TestTakenOver: a descriptor of another process becomes a connection.
func TestTakenOver(t *testing.T) {
	a, b := pairtest.TCP(t)
	var fd int
	on(t, a, func(from uintptr) { fd, _ = unix.FcntlInt(from, unix.F_DUPFD_CLOEXEC, 0) })
	s, err := NewTCP(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if s.Remote().String() != b.LocalAddr().String() {
		t.Errorf("remote %v, want %v", s.Remote(), b.LocalAddr())
	}
	b.Write([]byte("x"))
	s.SetReadDeadline(time.Now().Add(long))
	if n, err := s.Read(make([]byte, 2)); n != 1 || err != nil {
		t.Errorf("read %d bytes, %v", n, err)
	}
}

// TestWriteMore: bytes wait for the end, and leave with it as one segment; or for Push.
func TestWriteMore(t *testing.T) {
	for name, c := range map[string]struct {
		then     func(fd uintptr) error
		segments uint32
	}{
		"shut": {func(fd uintptr) error { return unix.Shutdown(int(fd), unix.SHUT_WR) }, 1},
		"push": {Push, 1},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := pairtest.TCP(t)
			on(t, a, func(fd uintptr) {
				Push(fd) // no delay, as all of ours
				segments := func() uint32 {
					info, err := unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO)
					if err != nil {
						t.Fatal(err)
					}
					return info.Segs_out
				}
				before := segments()
				if n, err := WriteMore(fd, []byte("bytes")); n != 5 || err != nil {
					t.Fatalf("wrote %d, %v", n, err)
				}
				if segments() != before {
					t.Error("bytes did not wait")
				}
				if err := c.then(fd); err != nil {
					t.Fatal(err)
				}
				if n := segments() - before; n != c.segments {
					t.Errorf("%d segments, want %d", n, c.segments)
				}
			})
			b.SetReadDeadline(time.Now().Add(long))
			if _, err := io.ReadFull(b, make([]byte, 5)); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestPeek(t *testing.T) {
	a, b := pairtest.TCP(t)
	buf := make([]byte, 10)
	on(t, a, func(fd uintptr) {
		if n, err := Peek(fd, buf); n != 0 || err != Again {
			t.Errorf("nothing to see: %d %v", n, err)
		}
	})
	b.Write([]byte("seen"))
	raw, _ := a.SyscallConn()
	a.SetReadDeadline(time.Now().Add(long))
	for range 2 { // it stays
		err := raw.Read(func(fd uintptr) bool {
			n, err := Peek(fd, buf)
			if err == nil && string(buf[:n]) != "seen" {
				t.Errorf("saw %q", buf[:n])
			}
			return err != Again
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}
