package proxy

import (
	"net/netip"
	"testing"
	"time"

	"assay.dev/link"
)

// TestProbesOfOneAddress: whoever asks for much from one address of the host leaves room for
// the kubelet at another.
func TestProbesOfOneAddress(t *testing.T) {
	q := newProbes()
	late := make(chan time.Time)
	close(late)
	enter := func(a string) func() {
		for range 100 { // of what is ready select takes either
			if leave, ok := q.enter(t.Context(), netip.MustParseAddr(a), late); ok {
				return leave
			}
		}
		return nil
	}
	var leave func()
	for range maxProbesFrom {
		if leave = enter("192.0.2.1"); leave == nil {
			t.Fatal("no slot")
		}
	}
	if enter("192.0.2.1") != nil {
		t.Errorf("more than %d of one address", maxProbesFrom)
	}
	if enter("192.0.2.2") == nil {
		t.Error("another address has none")
	}
	leave()
	if enter("192.0.2.1") == nil {
		t.Error("a slot was not given back")
	}
	if n := len(q.slots); n != maxProbesFrom+1 {
		t.Errorf("%d slots are taken, want %d", n, maxProbesFrom+1)
	}
}

// TestNextAgentIsHeard: an agent that has just come is not silent because the one before was.
func TestNextAgentIsHeard(t *testing.T) {
	conn, far, err := link.Pair()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(); far.Close() })
	p := New(conn, Options{})
	p.probes.begin()
	p.probes.silent = time.Now().Add(-2 * agentSilent)
	if !p.probes.unheard() {
		t.Error("the last one was not silent")
	}
	p.agent.attach(conn)
	p.probes.begin()
	if p.probes.unheard() {
		t.Error("the next one is")
	}
}
