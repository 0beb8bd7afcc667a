package main

import (
	"io"
	"net"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/link"
)

func TestAgentDiesAndComesBack(t *testing.T) {
	w := newWorld(t)
	client, server := w.workload("client"), w.workload("server")
	vip := w.service("echo", 1, assay.Opaque, server.serve(0, echo), server)
	old := client.mustDial(vip)
	exchange(t, old, "before")

	client.mu.Lock()
	conn := client.conn
	client.mu.Unlock()
	conn.Close()
	// Without an agent: what is there goes on, and new connections are made.
	if got := exchange(t, old, "during"); got != "during" {
		t.Error(got)
	}
	if got := exchange(t, client.mustDial(vip), "new"); got != "new" {
		t.Error(got)
	}

	// The next agent.
	client.sock.SetDeadline(time.Now().Add(10 * time.Second))
	u, err := client.sock.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	client.mu.Lock()
	before := client.ready
	client.mu.Unlock()
	client.speakAgain(link.NewConn(u))
	eventually(t, "the proxy is adopted", func() bool {
		client.mu.Lock()
		defer client.mu.Unlock()
		return client.conn != nil && client.ready > before
	})
	client.mu.Lock()
	h := client.hello
	client.mu.Unlock()
	slices.Sort(h.Listeners)
	if want := slices.Sorted(slices.Values(roles)); h.Workload != client.ID || !slices.Equal(h.Listeners, want) || h.Serial == "" || h.Services == 0 || h.Table == 0 || h.Bundle != 1 {
		t.Errorf("hello %+v", h)
	}
	if client.handed != len(roles) {
		t.Errorf("%d listeners were handed back, want %d", client.handed, len(roles))
	}
	moved := w.service("other", 1, assay.Opaque, server.serve(0, echo), server) // it follows the new one
	if got := exchange(t, client.mustDial(moved), "after"); got != "after" {
		t.Error(got)
	}
	if got := exchange(t, old, "after"); got != "after" {
		t.Error(got)
	}
}

// TestRenewalUnderLoad renews every two hundred milliseconds while connections are
// made, used and kept. Nothing may be lost.
func TestRenewalUnderLoad(t *testing.T) {
	w := newWorld(t)
	fast := func(time.Time) time.Time { return time.Now().Add(200 * time.Millisecond) }
	client, server := w.prepare("client"), w.prepare("server")
	client.renewAt, server.renewAt = fast, fast
	client.start()
	server.start()
	client.awaitCertificate()
	server.awaitCertificate()
	vip := w.service("echo", 1, assay.Opaque, server.serve(0, echo), server)
	kept := client.mustDial(vip)
	var wg sync.WaitGroup
	stop := time.Now().Add(3 * time.Second)
	for range 4 {
		wg.Go(func() {
			for time.Now().Before(stop) {
				c, err := client.dial(vip)
				if err != nil {
					t.Error(err)
					return
				}
				for range 20 {
					if _, err := io.WriteString(c, "ping"); err != nil {
						t.Error(err)
						return
					}
					b := make([]byte, 4)
					if _, err := io.ReadFull(c, b); err != nil || string(b) != "ping" {
						t.Errorf("%q, %v", b, err)
						return
					}
				}
				c.Close()
			}
		})
	}
	for time.Now().Before(stop) {
		if got := exchange(t, kept, "kept"); got != "kept" {
			t.Fatal(got)
		}
	}
	wg.Wait()
	client.mu.Lock()
	csrs := client.csrs
	client.mu.Unlock()
	r := client.report()
	if csrs < 5 || r.Counters.Handshakes < 5 {
		t.Errorf("%d certificates and %d handshakes: too few to prove anything", csrs, r.Counters.Handshakes)
	}
	s := sum(r, func(k assay.SignalKey) bool { return k.Service == "bank/echo" })
	if s.Failures != 0 || len(r.Counters.Refusals) != 0 {
		t.Errorf("failures %d, refusals %v", s.Failures, r.Counters.Refusals)
	}
	t.Logf("%d connections, %d certificates, %d handshakes", s.Opened, csrs, r.Counters.Handshakes)
}

func TestDrain(t *testing.T) {
	w := newWorld(t)
	client, server := w.workload("client"), w.workload("server")
	vip := w.service("echo", 1, assay.Opaque, server.serve(0, echo), server)
	c := client.mustDial(vip)
	exchange(t, c, "before")
	for _, m := range []*workload{client, server} {
		m.mu.Lock()
		conn := m.conn
		m.mu.Unlock()
		if err := conn.Send(link.KindDrain, 0, link.Drain{Deadline: time.Now().Add(20 * time.Second)}); err != nil {
			t.Fatal(err)
		}
	}
	if got := exchange(t, c, "during"); got != "during" {
		t.Error(got)
	}
	select {
	case <-client.exited:
		t.Fatal("the proxy ended with a connection open")
	default:
	}
	c.Close()
	for _, m := range []*workload{client, server} {
		select {
		case <-m.exited:
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: did not end although nothing is open", m.ID)
		}
		if code := m.cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("%s: exit code %d", m.ID, code)
		}
	}
}

// TestKilledProxy: the listeners are the agent's, so connections wait for the next
// proxy instead of being refused.
func TestKilledProxy(t *testing.T) {
	w := newWorld(t)
	client, server := w.workload("client"), w.workload("server")
	vip := w.service("echo", 1, assay.Opaque, server.serve(0, echo), server)
	exchange(t, client.mustDial(vip), "before")
	client.cmd.Process.Signal(syscall.SIGKILL)
	<-client.exited
	waiting := make(chan *net.TCPConn, 1)
	go func() {
		c, err := client.dial(vip)
		if err != nil {
			t.Error(err)
		}
		waiting <- c
	}()
	client.restart()
	if c := <-waiting; c != nil {
		if got := exchange(t, c, "after"); got != "after" {
			t.Error(got)
		}
	}
}
