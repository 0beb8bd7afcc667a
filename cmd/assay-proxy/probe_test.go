package main

import (
	"io"
	"net/netip"
	"sync"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/link"
)

// TestProbe: in strict, the kubelet's questions whether a pod lives are passed to the
// ports that the pod declares, and nothing else that comes from the node is.
func TestProbe(t *testing.T) {
	w := newWorld(t)
	node, other := w.outsider(), w.outsider()
	server := w.prepare("server")
	probed, unprobed := server.serve(0, echo), server.serve(0, echo)
	server.probes, server.nodes = []uint16{probed}, node.Addrs
	answers := func(is func(link.Probe) bool) {
		server.mu.Lock()
		defer server.mu.Unlock()
		server.kubelet = is
	}
	server.start()
	server.awaitCertificate()
	at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(server.Addrs[0], port) }
	served := func(m *workload, port uint16, what string) {
		t.Helper()
		c := m.mustDial(at(port))
		defer c.Close()
		if got := exchange(t, c, "alive?"); got != "alive?" {
			t.Errorf("%s: %q", what, got)
		}
	}
	refused := func(m *workload, port uint16, what string) {
		t.Helper()
		before := server.report().Counters.Refusals["plaintext-in-strict"]
		m.dialExpectReset(at(port), "alive?")
		if n := server.report().Counters.Refusals["plaintext-in-strict"]; n != before+1 {
			t.Errorf("%s: %d refusals, then %d", what, before, n)
		}
	}

	w.setMode(assay.Strict)
	answers(func(p link.Probe) bool { return p.Client.Addr() == node.Addrs[0] && p.Server == at(probed) })
	served(node, probed, "a probe")
	refused(node, unprobed, "another port")
	refused(other, probed, "from another machine")
	answers(func(link.Probe) bool { return false })
	refused(node, probed, "from another process of the node")

	// Who asks for much of the agent's word, so that it is late, gains nothing by it.
	answers(func(link.Probe) bool { time.Sleep(20 * time.Millisecond); return false }) // the agent's work
	var crowd sync.WaitGroup
	for range 100 {
		crowd.Go(func() {
			c, err := node.dial(at(probed))
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(20 * time.Second))
			io.WriteString(c, "alive?")
			if n, err := c.Read(make([]byte, 1)); n > 0 || err == nil {
				t.Error("one of a crowd was served")
			}
		})
	}
	crowd.Wait()

	// An agent that does not answer for long, and none at all: pods are not restarted for it.
	answers(nil)
	refused(node, probed, "an agent that says nothing at first")
	eventually(t, "an agent that says nothing is none", func() bool {
		c := node.mustDial(at(probed))
		defer c.Close()
		io.WriteString(c, "alive?")
		n, _ := io.ReadFull(c, make([]byte, 6))
		return n > 0
	})
	refused(node, unprobed, "an agent that says nothing, another port")
	server.mu.Lock()
	conn := server.conn
	server.mu.Unlock()
	s := sum(server.report(), func(k assay.SignalKey) bool { return k.Reason == assay.ReasonProbe && k.Direction == assay.Inbound })
	if s.Requests != 2 || s.Failures != 0 {
		t.Errorf("%d probes, %d failed; want 2 and none", s.Requests, s.Failures)
	}
	conn.Close()
	served(node, probed, "no agent")
	server.sock.SetDeadline(time.Now().Add(20 * time.Second))
	next, err := server.sock.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	answers(func(link.Probe) bool { return false })
	server.speakAgain(link.NewConn(next))
	eventually(t, "the next agent is asked", func() bool {
		server.mu.Lock()
		defer server.mu.Unlock()
		return server.conn != nil && server.conn != conn
	})
	server.report() // so it is adopted
	refused(node, probed, "the next agent knows another process")
}
