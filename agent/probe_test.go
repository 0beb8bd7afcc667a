package agent

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"assay.dev/agent/internal/lab"
	"golang.org/x/sys/unix"
)

// TestKubelet: sockets of the process that listens on the kubelet's port are told from
// those of every other process of the host.
func TestKubelet(t *testing.T) {
	own, err := net.Listen("tcp", "127.0.0.1:0") // this process is the kubelet
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	port := own.Addr().(*net.TCPAddr).AddrPort().Port()

	// Another process, whose end of a connection with this one is as good as any of its own.
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	app := free.Addr().String()
	free.Close()
	other := exec.Command("/proc/self/exe")
	other.Env = append(os.Environ(), "ASSAY_TEST_APP="+app)
	other.Stdin, other.Stderr = lifeline(), os.Stderr
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Process.Kill(); other.Wait() })
	var c net.Conn
	lab.Eventually(t, "the other process listens", func() bool {
		c, err = net.Dial("tcp", app)
		return err == nil
	})
	defer c.Close()
	c.Read(make([]byte, 7)) // "client ": it has taken the connection
	ours, theirs := c.LocalAddr().(*net.TCPAddr).AddrPort(), c.RemoteAddr().(*net.TCPAddr).AddrPort()

	k := &kubelet{port: port}
	for _, when := range []string{"at first", "again"} {
		if is, err := k.owns(ours, theirs); !is || err != nil {
			t.Errorf("%s: the kubelet's socket: %v, %v", when, is, err)
		}
		if is, err := k.owns(theirs, ours); is || err != nil {
			t.Errorf("%s: another process's socket: %v, %v", when, is, err)
		}
	}
	if is, err := k.owns(netip.MustParseAddrPort("127.0.0.1:1"), theirs); is || err != nil {
		t.Errorf("a connection that does not exist: %v, %v", is, err)
	}
	if is, err := k.owns(netip.MustParseAddrPort("127.0.0.1:"+fmt.Sprint(port)), theirs); is || err != nil {
		t.Errorf("one that does not exist, of a port that listens: %v, %v", is, err)
	}
	if is, err := (&kubelet{}).owns(ours, theirs); is || err != nil {
		t.Errorf("a host without a kubelet: %v, %v", is, err)
	}
	own.Close()
	if is, err := (&kubelet{port: port}).owns(ours, theirs); is || err == nil || !strings.Contains(err.Error(), "listens on the kubelet's port") {
		t.Errorf("a kubelet that is gone: %v, %v", is, err)
	}
}

// TestOnePortOfSeveralConnections: the kernel gives one port to connections with several
// servers of the same port, as a node's pods are. Each is known by all that it is.
func TestOnePortOfSeveralConnections(t *testing.T) {
	first, err := net.Listen("tcp", "127.0.1.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	servers := []netip.AddrPort{first.Addr().(*net.TCPAddr).AddrPort()}
	for _, a := range []string{"127.0.1.2", "127.0.1.3"} {
		at := netip.AddrPortFrom(netip.MustParseAddr(a), servers[0].Port())
		l, err := net.Listen("tcp", at.String())
		if err != nil {
			t.Skipf("skipped: somebody has %s: %v", at, err)
		}
		defer l.Close()
		servers = append(servers, at)
	}
	dialer := net.Dialer{Timeout: 20 * time.Second, Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	}}
	var ours []netip.AddrPort
	inodes := map[uint32]bool{}
	for _, at := range servers {
		c, err := dialer.Dial("tcp", at.String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		local := c.LocalAddr().(*net.TCPAddr)
		dialer.LocalAddr = local
		ours = append(ours, local.AddrPort())
	}
	for i, at := range servers {
		inode, err := inodeOf(ours[i], at)
		if err != nil || inode == 0 || inodes[inode] || !holds(os.Getpid(), inode) || ours[i] != ours[0] {
			t.Errorf("%s to %s: %d, %v", ours[i], at, inode, err)
		}
		inodes[inode] = true
	}
}
