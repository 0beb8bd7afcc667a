package attacks

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"assay.dev/proxy/mtls"
	"assay.dev/test/lab"
)

// TestCaptureSees is what makes the others worth something: without a mesh the
// marker is seen.
func TestCaptureSees(t *testing.T) {
	lab.Require(t, "ip", "nft")
	w := lab.NewWorld(t, lab.Direct)
	server := w.Workload(t, "plain-s", lab.Spec{})
	client := w.Workload(t, "plain-c", lab.Spec{})
	a := &arena{World: w, client: client, server: server, to: netip.AddrPortFrom(server.IPv4, port)}
	server.Serve(t, port, a.application)
	a.capture = w.Capture(t, marker)
	if _, end := a.attempt(); end != "answered" {
		t.Fatalf("direct: %s", end)
	}
	a.capture.Settle(t)
	if _, found, _ := a.capture.Seen(); found == 0 {
		t.Errorf("the capture did not see the marker in plaintext")
	}
}

// TestDowngrade attacks fresh pairs of workloads of one mesh.
func TestDowngrade(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent")
	w := lab.NewWorld(t, lab.Meshed, "--metrics", metricsAddress)
	for _, attack := range []struct {
		name string
		run  func(t *testing.T, a *arena)
	}{
		{"honest", honest},
		{"server's proxy dead", serverProxyDead},
		{"client's proxy dead", clientProxyDead},
		{"client's proxy and its agent dead", allDead},
		{"server's proxy and its agent dead", serverAllDead},
		{"server stripped", serverStripped},
		{"stale address", staleAddress},
		{"address freed", addressFreed},
		{"address of nobody", addressOfNobody},
		{"name forged", nameForged},
		{"plaintext from a meshed address", plaintextFromMeshed},
	} {
		t.Run(attack.name, func(t *testing.T) { attack.run(t, newArena(t, w)) })
	}
}

// honest: no attack; everything passes, encrypted.
func honest(t *testing.T, a *arena) {
	for range 5 {
		if _, end := a.attempt(); end != "answered" {
			t.Errorf("ended with %s", end)
		}
	}
	if a.served.Load() == 0 {
		t.Errorf("nothing reached the server")
	}
	a.capture.ExpectNone(t)
	if packets, _, _ := a.capture.Seen(); packets == 0 {
		t.Errorf("the capture saw no packet at all")
	}
}

// serverProxyDead: and nobody there to start another one.
func serverProxyDead(t *testing.T, a *arena) {
	thaw := a.freeze(t)
	a.killProxy(t, a.server)
	a.mustRefuse(t)
	thaw()
	a.mustBeCounted(t, a.client, "timeout", "peer-unreachable")
	a.mustRecover(t)
}

// clientProxyDead: an agent that lives keeps the listeners, so connections wait; what
// they hold goes to the next proxy and no further.
func clientProxyDead(t *testing.T, a *arena) {
	thaw := a.freeze(t)
	a.killProxy(t, a.client)
	a.mustRefuse(t)
	thaw()
	a.mustRecover(t)
}

// allDead: the client's proxy and every part that could start another one. Nothing
// listens where its kernel leads its connections: the kernel refuses, and counts.
func allDead(t *testing.T, a *arena) {
	a.Mesh.Up.Kill()
	a.killProxy(t, a.client)
	for i := range 3 {
		// The first may still meet the listener, which then closes with a reset: the client
		// hears of it when it reads or when it writes.
		if _, end := a.attempt(); end != "ECONNREFUSED" && (i > 0 || end != "ECONNRESET" && end != "EPIPE") {
			t.Errorf("attempt %d ended with %q, want ECONNREFUSED", i, end)
		}
	}
	a.nothingPassed(t)
	a.Mesh.Start(t)
	a.mustBeCounted(t, a.client, "kernel-no-proxy")
	a.mustRecover(t)
}

// serverAllDead: the same on the side that is called.
func serverAllDead(t *testing.T, a *arena) {
	a.Mesh.Up.Kill()
	a.killProxy(t, a.server)
	a.mustRefuse(t)
	a.Mesh.Start(t)
	a.mustBeCounted(t, a.server, "kernel-no-proxy")
	a.mustBeCounted(t, a.client, "peer-unreachable")
	a.mustRecover(t)
}

func (a *arena) mustRecover(t *testing.T) {
	t.Helper()
	lab.Eventually(t, 30*time.Second, "the pair talks again", func() error {
		if _, end := a.attempt(); end != "answered" {
			return errors.New(end)
		}
		return nil
	})
	a.capture.ExpectNone(t)
}

// serverStripped: the server's proxy and its capture are gone, so the application
// itself is at the address, in plaintext.
func serverStripped(t *testing.T, a *arena) {
	thaw := a.freeze(t)
	a.killProxy(t, a.server)
	unguard(t, a.server)
	for range 3 {
		if _, end := a.attempt(); end == "answered" || end == "EOF" {
			t.Errorf("ended with %s", end)
		}
	}
	// The application may have seen the beginning of a handshake, never the marker.
	a.capture.ExpectNone(t)
	thaw()
	a.mustBeCounted(t, a.client, "malformed", "disconnected", "timeout")
}

// staleAddress: the server has ended while the client's host learned nothing of
// it, and somebody else serves in plaintext at its address.
func staleAddress(t *testing.T, a *arena) {
	thaw := a.freeze(t)
	a.killProxy(t, a.server)
	a.server.Main.Kill()
	unguard(t, a.server)
	var thief atomic.Int64
	a.server.Serve(t, port+1, func(c *net.TCPConn) {
		n, _ := io.Copy(io.Discard, c)
		thief.Add(n)
	})
	a.to = netip.AddrPortFrom(a.server.IPv4, port+1)
	a.mustRefuse(t)
	thaw()
	a.mustBeCounted(t, a.client, "disconnected", "malformed", "timeout")
}

// addressFreed: the server has ended and everybody knows; an application that kept
// its address finds nobody.
func addressFreed(t *testing.T, a *arena) {
	a.to = netip.AddrPortFrom(a.server.IPv4, port)
	a.server.Main.Kill()
	lab.Eventually(t, 30*time.Second, "the server is gone", func() error {
		if pid := a.Mesh.Proxy(a.server); pid != 0 {
			return fmt.Errorf("its proxy runs (%d)", pid)
		}
		return nil
	})
	a.mustRefuse(t)
	a.mustBeCounted(t, a.client, "unknown-mesh-address")
}

// addressOfNobody: in the mesh's own networks nothing is dialled that the table
// does not know.
func addressOfNobody(t *testing.T, a *arena) {
	b := a.server.IPv4.As4()
	b[3] = 253
	a.to = netip.AddrPortFrom(netip.AddrFrom4(b), port)
	a.mustRefuse(t)
	a.mustBeCounted(t, a.client, "unknown-mesh-address")
}

// nameForged: a name server outside leads an innocent name to a workload. That is
// the workload all the same: encrypted, and known by its identity.
func nameForged(t *testing.T, a *arena) {
	a.Names.Set("innocent.test", a.server.IPv4)
	a.to = a.client.Target(t, "innocent.test", port)
	if a.to.Addr() != a.server.IPv4 {
		t.Fatalf("innocent.test is %s", a.to)
	}
	if _, end := a.attempt(); end != "answered" {
		t.Errorf("ended with %s", end)
	}
	a.capture.ExpectNone(t)
}

// plaintextFromMeshed: a workload that has escaped its capture meets the server's
// proxy, also while plaintext from outside is still served.
func plaintextFromMeshed(t *testing.T, a *arena) {
	for range 3 {
		c, err := dialPast(a.client, netip.AddrPortFrom(a.server.IPv4, port))
		if err == nil {
			c.SetDeadline(time.Now().Add(5 * time.Second))
			io.WriteString(c, "escaped")
			if _, err = c.Read(make([]byte, 1)); err == nil {
				t.Errorf("plaintext from a meshed address was answered")
			}
			c.Close()
		}
	}
	a.nothingPassed(t)
	a.mustBeCounted(t, a.server, "plaintext-from-meshed")
	lab.Eventually(t, 30*time.Second, "there is a finding", func() error {
		var list []struct {
			Kind, Subject, Detail string
		}
		a.Mesh.Get(t, "findings", &list)
		if len(list) == 0 {
			return errors.New("none")
		}
		return nil
	})
}

// TestEvilServer puts servers of the test's own making where the client expects
// the real one: they speak the mesh's TLS with another identity.
func TestEvilServer(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent")
	w := lab.NewWorld(t, lab.Meshed, "--metrics", metricsAddress)
	m := newMint(t, w.Mesh, 0)
	brief := newMint(t, w.Mesh, time.Second)
	for _, evil := range []struct {
		name   string
		config func(t *testing.T, a *arena) *tls.Config
		reason string
	}{
		{"another workload's identity", func(t *testing.T, a *arena) *tls.Config {
			return serverTLS(m.workload(t, "somebody-else"))
		}, "identity-mismatch"},
		{"the client's own identity", func(t *testing.T, a *arena) *tls.Config {
			return serverTLS(m.workload(t, a.client.Name))
		}, "identity-mismatch"},
		{"a host's identity", func(t *testing.T, a *arena) *tls.Config { return serverTLS(m.host(t)) }, "malformed"},
		{"the right name by another signer", func(t *testing.T, a *arena) *tls.Config {
			return serverTLS(m.forged(t, a.server.Name))
		}, "unknown-authority"},
		{"an ended certificate", func(t *testing.T, a *arena) *tls.Config {
			c := brief.workload(t, a.server.Name)
			<-time.After(2 * time.Second) // its life
			return serverTLS(c)
		}, "expired"},
		{"TLS 1.2", func(t *testing.T, a *arena) *tls.Config {
			c := serverTLS(m.workload(t, a.server.Name))
			c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
			return c
		}, "peer-refused"},
		{"another protocol", func(t *testing.T, a *arena) *tls.Config {
			c := serverTLS(m.workload(t, a.server.Name))
			c.NextProtos = []string{"h2", "http/1.1"}
			return c
		}, "bad-alpn"},
		{"no protocol", func(t *testing.T, a *arena) *tls.Config {
			c := serverTLS(m.workload(t, a.server.Name))
			c.NextProtos = nil
			return c
		}, "bad-alpn"},
		{"no TLS", func(*testing.T, *arena) *tls.Config { return nil }, "malformed"},
	} {
		t.Run(evil.name, func(t *testing.T) {
			a := newArena(t, w)
			config := evil.config(t, a)
			thaw := a.freeze(t)
			a.killProxy(t, a.server)
			unguard(t, a.server)
			var got atomic.Int64
			a.server.Serve(t, port+1, func(c *net.TCPConn) {
				c.SetDeadline(time.Now().Add(5 * time.Second))
				var conn net.Conn = c
				if config != nil {
					conn = tls.Server(c, config)
				} else {
					io.WriteString(c, "assay/1 welcome, no TLS needed\r\n")
				}
				b := make([]byte, 64<<10)
				for {
					n, err := conn.Read(b)
					if config != nil {
						got.Add(int64(n))
					}
					if err != nil {
						return
					}
				}
			})
			a.to = netip.AddrPortFrom(a.server.IPv4, port+1)
			a.mustRefuse(t)
			if n := got.Load(); n > 0 {
				t.Errorf("the evil server received %d bytes inside TLS", n)
			}
			thaw()
			a.mustBeCounted(t, a.client, evil.reason)
		})
	}
}

func serverTLS(cert tls.Certificate) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{mtls.ALPN}, ClientAuth: tls.RequestClientCert}
}

// TestEvilClient speaks the mesh's TLS to a server's proxy from the client's
// address, with identities that are not the client's.
func TestEvilClient(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent")
	w := lab.NewWorld(t, lab.Meshed, "--metrics", metricsAddress)
	m := newMint(t, w.Mesh, 0)
	for _, evil := range []struct {
		name string
		cert func(t *testing.T, a *arena) []tls.Certificate
		// reason of the server's refusal; none: it is served
		reason string
	}{
		{"the client's identity", func(t *testing.T, a *arena) []tls.Certificate {
			return []tls.Certificate{m.workload(t, a.client.Name)}
		}, ""}, // shows that the others fail for what they are
		{"no certificate", func(*testing.T, *arena) []tls.Certificate { return nil }, "no-certificate"},
		{"another workload's identity", func(t *testing.T, a *arena) []tls.Certificate {
			return []tls.Certificate{m.workload(t, "somebody-else")}
		}, "identity-mismatch"},
		{"the server's own identity", func(t *testing.T, a *arena) []tls.Certificate {
			return []tls.Certificate{m.workload(t, a.server.Name)}
		}, "identity-mismatch"},
		{"a host's identity", func(t *testing.T, a *arena) []tls.Certificate { return []tls.Certificate{m.host(t)} }, "malformed"},
		{"the right name by another signer", func(t *testing.T, a *arena) []tls.Certificate {
			return []tls.Certificate{m.forged(t, a.client.Name)}
		}, "unknown-authority"},
	} {
		t.Run(evil.name, func(t *testing.T) {
			a := newArena(t, w)
			err := a.openStream(t, evil.cert(t, a), a.header())
			if evil.reason == "" {
				if err != nil || a.served.Load() == 0 {
					t.Fatalf("a stream with the right identity: %v, %d bytes", err, a.served.Load())
				}
				return
			}
			if err == nil {
				t.Errorf("the stream was answered")
			}
			a.nothingPassed(t)
			a.mustBeCounted(t, a.server, evil.reason)
		})
	}
}

// within bounds what an evil peer waits for.
func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Second)
	t.Cleanup(cancel)
	return ctx
}
