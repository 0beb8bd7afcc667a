package agent

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"

	"assay.dev/agent/internal/lab"
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
	if is, err := k.owns(netip.MustParseAddrPort("127.0.0.1:1"), theirs); is || err == nil {
		t.Errorf("a connection that does not exist: %v, %v", is, err)
	}
	if is, err := (&kubelet{}).owns(ours, theirs); is || err != nil {
		t.Errorf("a host without a kubelet: %v, %v", is, err)
	}
	own.Close()
	if is, err := (&kubelet{port: port}).owns(ours, theirs); is || err == nil || !strings.Contains(err.Error(), "listens on the kubelet's port") {
		t.Errorf("a kubelet that is gone: %v, %v", is, err)
	}
}
