package sockdiag_test

import (
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"assay.dev/agent/internal/lab"
	"assay.dev/agent/internal/sockdiag"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { lab.Main(m) }

// TestSockets: listeners and connections of both families are listed and found by their ends, with
// the inode that their process sees, and one that is ended resets its process.
func TestSockets(t *testing.T) {
	ns := lab.Namespace(t)
	sockets, err := sockdiag.Open(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer sockets.Close()
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(address, func(t *testing.T) {
			l := lab.Listen(t, ns, "tcp", address)
			conn, err := lab.Dial(ns, l.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			c := conn.(*net.TCPConn)
			at, local := l.Addr().(*net.TCPAddr).AddrPort(), c.LocalAddr().(*net.TCPAddr).AddrPort()
			listening, connections := 0, map[netip.AddrPort]sockdiag.Socket{}
			for _, family := range sockdiag.Families {
				visit := func(s *sockdiag.Socket) {
					if s.State == sockdiag.Listen && s.Local == at {
						listening++
					} else if s.State != sockdiag.Listen {
						connections[s.Local] = *s
					}
				}
				if err := sockets.List(family, sockdiag.AllStates, visit); err != nil {
					t.Fatal(err)
				}
				if err := sockets.List(family, 1<<sockdiag.Listen, func(s *sockdiag.Socket) {
					if s.State != sockdiag.Listen {
						t.Errorf("among those that listen: %+v", s)
					}
					visit(s)
				}); err != nil {
					t.Fatal(err)
				}
			}
			if listening != 2 || connections[local].Remote != at || connections[at].Remote != local {
				t.Errorf("%d listeners, connections %+v", listening, connections)
			}
			found, err := sockets.Find(local, at)
			if err != nil || found == nil || found.ID != connections[local].ID || found.Inode != inodeOf(t, c) {
				t.Fatalf("found %+v, %v", found, err)
			}
			if s, err := sockets.Find(netip.AddrPortFrom(local.Addr(), 1), at); s != nil || err != nil {
				t.Errorf("nobody's: %+v, %v", s, err)
			}
			if s, err := sockets.Find(at, netip.AddrPortFrom(local.Addr(), 1)); s != nil || err != nil {
				t.Errorf("the listener in the place of a connection: %+v, %v", s, err)
			}
			if err := sockets.Destroy(found); err != nil {
				t.Fatal(err)
			}
			c.SetReadDeadline(time.Now().Add(time.Minute))
			if _, err := c.Read(make([]byte, 1)); err == nil || os.IsTimeout(err) {
				t.Errorf("a connection that was ended: %v", err)
			}
			if err := sockets.Destroy(found); err != nil {
				t.Errorf("again: %v", err)
			}
		})
	}
}

// inodeOf is that of the socket, as its process sees it.
func inodeOf(t *testing.T, c *net.TCPConn) uint32 {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = unix.Fstat(int(fd), &st) }); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
	return uint32(st.Ino)
}
