package main

import (
	"net/netip"
	"testing"

	"assay.dev"
)

// TestMetrics: in strict, who is outside the mesh reaches the port at which the pod's own agent
// serves metrics, and no other. The mesh's own have mutual TLS there, too, or nothing.
func TestMetrics(t *testing.T) {
	w := newWorld(t)
	outsider, member := w.outsider(), w.workload("member")
	server := w.prepare("server")
	metrics, other := server.serve(0, echo), server.serve(0, echo)
	server.metrics = metrics
	server.start()
	server.awaitCertificate()
	member.awaitCertificate()
	w.setMode(assay.Strict)
	at := func(port uint16) netip.AddrPort { return netip.AddrPortFrom(server.Addrs[0], port) }
	for _, m := range []*workload{outsider, member} {
		c := m.mustDial(at(metrics))
		if got := exchange(t, c, "counts?"); got != "counts?" {
			t.Errorf("%v: %q", m.Addrs, got)
		}
		c.Close()
	}
	outsider.dialExpectReset(at(other), "counts?")
	escaped := member.dialUncaptured(at(metrics))
	defer escaped.Close()
	expectReset(t, escaped, "counts?")
	eventually(t, "each is counted as what it is", func() bool {
		plain := sum(server.report(), func(k assay.SignalKey) bool { return k.Reason == assay.ReasonMetrics && k.Security == assay.Plaintext })
		mutual := sum(server.report(), func(k assay.SignalKey) bool { return k.Security == assay.MutualTLS && k.Port == metrics })
		r := server.report().Counters.Refusals
		return plain.Requests == 1 && mutual.Requests == 1 && r["plaintext-in-strict"] == 1 && r["plaintext-from-meshed"] == 1
	})
}
