package lifecycle

import (
	"net"
	"strings"
	"testing"

	"assay.dev/test/lab"
)

// TestTwoHosts: a workload on a second machine is reached by its name, encrypted
// on the wire between the machines, and sees the client's own address.
func TestTwoHosts(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent", "unshare")
	const marker = "BETWEEN-HOSTS-9127"
	w := lab.NewRoles(t)
	other := w.Mesh.SecondHost(t, "machine2")
	server := other.Run(t, "shop", lab.Spec{Ports: []int{portHTTP, portEcho}})
	client := w.Workload(t, "buyer", lab.Spec{})
	seen := make(chan string, 64)
	serve(t, server)
	server.Serve(t, 7100, func(c *net.TCPConn) { seen <- c.RemoteAddr().String(); c.Write([]byte("x")) })
	w.AwaitService(t, client, "shop", portHTTP)
	must(t, "between two hosts", everything(t, client))

	capture := w.Capture(t, marker)
	v := mustConverse(t, client, "shop")
	for range 20 {
		if _, err := v.c.Write([]byte(strings.Repeat(marker, 4) + "\n")); err != nil {
			t.Fatal(err)
		}
		if err := v.say2(); err != nil {
			t.Fatal(err)
		}
	}
	capture.ExpectNone(t)

	c := client.MustDial(t, addrPort(server, 7100))
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if from, _, _ := net.SplitHostPort(<-seen); from != client.IPv4.String() {
		t.Errorf("the server on the other machine saw %s, want %s", from, client.IPv4)
	}
}
