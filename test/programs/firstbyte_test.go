package programs

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"assay.dev/test/lab"
)

// What a client of a server-first protocol may wait longer than it does direct. A proxy
// that waits for the client's first bytes waits until it gives them up, ten seconds or so,
// on every connection; these bounds are far below that, and far above what a busy machine
// adds. What the way costs in milliseconds is shown in bench/.
const (
	firstMore = 2 * time.Second        // on the first connection of a pair, median
	laterMore = 500 * time.Millisecond // on later ones, lower quartile
	pairs     = 5                      // fresh pairs of workloads
	later     = 40                     // later connections of each
	greeting  = "220 the server speaks first\r\n"
)

// TestFirstByte: the first byte of a server that speaks first does not wait for its
// client to speak, on first connections of fresh pairs and on later ones.
func TestFirstByte(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent")
	first, rest := map[lab.Mode][]time.Duration{}, map[lab.Mode][]time.Duration{}
	lab.Modes(t, func(t *testing.T, w *lab.World) {
		for i := range pairs {
			server := w.Workload(t, fmt.Sprintf("greeter%d", i), lab.Spec{Ports: []int{2500}})
			client := w.Workload(t, fmt.Sprintf("greeted%d", i), lab.Spec{})
			server.Serve(t, 2500, func(c *net.TCPConn) {
				io.WriteString(c, greeting)
				io.Copy(io.Discard, c)
			})
			to := awaitReady(t, w, client, server.Name, 2500)
			if w.Mesh != nil {
				t.Cleanup(func() {
					if t.Failed() {
						t.Log(w.Mesh.CLI(t, "get", "signals", "-o", "json").Stdout)
					}
				})
			}
			first[w.Mode] = append(first[w.Mode], firstByte(t, client, to))
			for range later {
				rest[w.Mode] = append(rest[w.Mode], firstByte(t, client, to))
			}
		}
	})
	if len(first[lab.Meshed]) == 0 || len(first[lab.Direct]) == 0 {
		return // said already
	}
	d, m := median(first[lab.Direct]), median(first[lab.Meshed])
	t.Logf("first connection, median: direct %s, meshed %s, %s (longest)", d, m, slices.Max(first[lab.Meshed]))
	if m-d > firstMore {
		t.Errorf("first byte of a first connection: %s meshed, %s direct, want at most %s more", m, d, firstMore)
	}
	d, m = quantile(rest[lab.Direct], 0.25), quantile(rest[lab.Meshed], 0.25)
	t.Logf("later connections, lower quartile: direct %s, meshed %s; %s (median), %s (90 of 100)", d, m, median(rest[lab.Meshed]), quantile(rest[lab.Meshed], 0.9))
	if m-d > laterMore {
		t.Errorf("first byte of later connections: %s meshed, %s direct, want at most %s more", m, d, laterMore)
	}
}

// awaitReady waits until the client's host knows a ready endpoint, without
// opening a connection: the first one is what is measured.
func awaitReady(t *testing.T, w *lab.World, client *lab.Workload, service string, port int) netip.AddrPort {
	t.Helper()
	var to netip.AddrPort
	lab.Eventually(t, 30*time.Second, service+" is ready", func() error {
		addrs := client.Resolve(t, service)
		if len(addrs) == 0 {
			return fmt.Errorf("no address")
		}
		to = netip.AddrPortFrom(addrs[0], uint16(port))
		if w.Mode == lab.Direct {
			return nil
		}
		// What refuses connect() until there is a ready endpoint is the client's own
		// kernel.
		_, err := client.Try(t.Context(), "nft", "get", "element", "inet", "assay", "open4", fmt.Sprintf("{ %s . %d }", addrs[0], port))
		return err
	})
	return to
}

func firstByte(t *testing.T, client *lab.Workload, to netip.AddrPort) time.Duration {
	t.Helper()
	began := time.Now()
	c, err := client.Dial(to)
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	b := make([]byte, len(greeting))
	if _, err := c.Read(b[:1]); err != nil {
		t.Fatalf("first byte: %v", err)
	}
	took := time.Since(began)
	if _, err := io.ReadFull(c, b[1:]); err != nil || string(b) != greeting {
		t.Fatalf("greeting %q, %v", b, err)
	}
	return took
}

func median(d []time.Duration) time.Duration { return quantile(d, 0.5) }

func quantile(d []time.Duration, q float64) time.Duration {
	d = slices.Sorted(slices.Values(d))
	return d[min(int(q*float64(len(d))), len(d)-1)]
}
