package agent

import (
	"net"
	"os"
	"testing"
	"time"

	"assay.dev/agent/netns"
	"golang.org/x/sys/unix"
)

// TestDNSAnswersFromItsAddress: an answer that comes from another address than was
// asked is dropped by every resolver.
func TestDNSAnswersFromItsAddress(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("skipped: needs root, to make a network namespace")
	}
	ns, err := netns.Create()
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	err = ns.Do(func() error {
		fd, err := dnsSocket(unix.SOCK_DGRAM)
		if err != nil {
			return err
		}
		f := os.NewFile(uintptr(fd), "dns")
		defer f.Close()
		server, err := net.FilePacketConn(f)
		if err != nil {
			return err
		}
		defer server.Close()
		client, err := net.Dial("udp", dnsAddr.String()) // connected: takes answers from there only
		if err != nil {
			return err
		}
		defer client.Close()
		for _, c := range []net.PacketConn{server, client.(*net.UDPConn)} {
			c.SetDeadline(time.Now().Add(5 * time.Second))
		}
		if _, err := client.Write([]byte("question")); err != nil {
			return err
		}
		_, from, err := server.ReadFrom(make([]byte, 16))
		if err != nil {
			return err
		}
		if _, err := server.WriteTo([]byte("answer"), from); err != nil {
			return err
		}
		_, err = client.Read(make([]byte, 16))
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
