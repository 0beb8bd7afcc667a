package lifecycle

import (
	"bufio"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"assay.dev/test/lab"
)

// pairsEnv is how many fresh pairs TestFreshPairs makes, if not the usual number.
const pairsEnv = "ASSAY_PAIRS"

// TestFreshPairs: the very first connection of a workload that has just started, to
// one that has just begun to listen. It is refused by the kernel until there is a
// ready endpoint; from the moment it is accepted, it must work. Nothing that has not
// arrived yet (a certificate, a table, a bundle) may show.
func TestFreshPairs(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent")
	pairs := 12
	if n, err := strconv.Atoi(os.Getenv(pairsEnv)); err == nil {
		pairs = n
	}
	w := lab.NewWorld(t, lab.Meshed)
	for i := range pairs {
		name := fmt.Sprintf("fresh%d", i)
		var client, server *lab.Workload
		listen := func() {
			server = w.Workload(t, name, lab.Spec{Ports: []int{portHTTP, portEcho}})
			serve(t, server)
		}
		if i%2 == 0 {
			listen()
			client = w.Workload(t, "caller"+name, lab.Spec{})
		} else {
			client = w.Workload(t, "caller"+name, lab.Spec{})
			listen()
		}
		var err error
		if i%4 < 2 {
			err = firstTalk(t, client, name)
		} else {
			err = firstRequest(t, client, name)
		}
		if err != nil {
			t.Errorf("pair %d: its first connection: %v\n%s", i, err, w.Mesh.ProxyLogs(t, client, server))
		}
		for _, x := range []*lab.Workload{client, server} {
			x.Main.Stop(5 * time.Second)
		}
	}
}

// firstTalk is the client's first connection, to the service that speaks first.
func firstTalk(t *testing.T, client *lab.Workload, service string) error {
	return untilAccepted(t, client, service, portEcho, func(to netip.AddrPort) error {
		v, err := converse(client, to)
		if err != nil {
			return err
		}
		defer v.c.Close()
		return v.say()
	})
}

func firstRequest(t *testing.T, client *lab.Workload, service string) error {
	return untilAccepted(t, client, service, portHTTP, func(to netip.AddrPort) error {
		c, err := client.Dial(to)
		if err != nil {
			return err
		}
		defer c.Close()
		return request(t.Context(), c, bufio.NewReader(c))
	})
}

// untilAccepted tries until the answer is another one than "connection refused".
func untilAccepted(t *testing.T, client *lab.Workload, service string, port int, try func(netip.AddrPort) error) (err error) {
	lab.Eventually(t, 30*time.Second, client.Name+" is accepted by "+service, func() error {
		addrs := client.Resolve(t, service)
		if len(addrs) == 0 {
			return errors.New("no such name yet")
		}
		err = try(netip.AddrPortFrom(addrs[0], uint16(port)))
		if errors.Is(err, syscall.ECONNREFUSED) {
			return err
		}
		return nil
	})
	return err
}
