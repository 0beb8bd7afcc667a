package agent

import (
	"net/netip"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/agent/meter"
)

func reading(flows ...meter.Flow) *meter.Reading {
	r := &meter.Reading{Exceptions: map[meter.Class]meter.Traffic{}, Flows: flows}
	for _, f := range flows {
		t := r.Exceptions[f.Class]
		t.In, t.Out = sum(t.In, f.In), sum(t.Out, f.Out)
		r.Exceptions[f.Class] = t
	}
	return r
}

func udp(remote string, port uint16, n uint64) meter.Flow {
	return meter.Flow{FlowKey: meter.FlowKey{Class: meter.UDP, Remote: netip.MustParseAddr(remote), Port: port, Protocol: 17}, Out: meter.Count{Packets: n, Bytes: 100 * n}}
}

// total adds up everything that is shown, and the part of it that has no place.
func (b *beside) total() (packets, over uint64) {
	for key, s := range b.series {
		packets += s.PacketsOut
		if key.Remote == assay.Overflow {
			over += s.PacketsOut
		}
	}
	return packets, over
}

// TestBesideAddsUp: whatever the kernel forgets and whatever finds no room, what is
// shown is what was counted.
func TestBesideAddsUp(t *testing.T) {
	b := newBeside(nil, time.Now())
	peer := &assay.Workload{Identity: assay.Identity{TrustDomain: "bank.test", Namespace: "bank", Account: "ledger"}, Addrs: []netip.Addr{netip.MustParseAddr("10.181.0.2")}}
	of := &owners{of: map[netip.Addr][]*assay.Workload{peer.Addrs[0]: {peer}}}
	expect := func(what string, packets, over uint64) {
		t.Helper()
		if p, o := b.total(); p != packets || o != over {
			t.Errorf("%s: %d packets, %d of them over; want %d, %d", what, p, o, packets, over)
		}
	}
	now := time.Now()
	b.take(reading(udp("192.0.2.1", 53, 3), udp("10.181.0.2", 53, 4)), of, now)
	expect("first", 7, 0)
	if s := b.series[assay.SignalKey{Direction: assay.Outbound, Peer: peer.Identity, PeerArtifacts: peer.Artifacts.Digest(), Port: 53, Protocol: assay.UDP, Security: assay.Plaintext, Reason: assay.ReasonUDP}]; s == nil || s.PacketsOut != 4 {
		t.Errorf("a meshed peer is not known as one: %+v", b.series)
	}
	// Nothing new is nothing more.
	b.take(reading(udp("192.0.2.1", 53, 3), udp("10.181.0.2", 53, 4)), of, now.Add(time.Second))
	expect("again", 7, 0)
	// The kernel forgot one of them: the total did not.
	r := reading(udp("10.181.0.2", 53, 4))
	r.Exceptions[meter.UDP] = meter.Traffic{Out: meter.Count{Packets: 7, Bytes: 700}}
	b.take(r, of, now)
	expect("forgotten", 7, 0)
	// And it is back, counted from the beginning.
	r = reading(udp("192.0.2.1", 53, 1), udp("10.181.0.2", 53, 4))
	r.Exceptions[meter.UDP] = meter.Traffic{Out: meter.Count{Packets: 8, Bytes: 800}}
	b.take(r, of, now)
	expect("back", 8, 0)
	// What passed and was forgotten while nobody looked has no address.
	r.Exceptions[meter.UDP] = meter.Traffic{Out: meter.Count{Packets: 10, Bytes: 1000}}
	b.take(r, of, now)
	expect("unseen", 10, 2)
	// A thousand addresses: as many as there is room for, and all in the total.
	var many []meter.Flow
	for i := range 1000 {
		many = append(many, udp(netip.AddrFrom4([4]byte{198, 51, byte(i >> 8), byte(i)}).String(), 1, 1))
	}
	r = reading(append(many, udp("192.0.2.1", 53, 1), udp("10.181.0.2", 53, 4))...)
	r.Exceptions[meter.UDP] = meter.Traffic{Out: meter.Count{Packets: 1010, Bytes: 101_000}}
	b.take(r, of, now)
	if len(b.series) > maxBeside+len(meter.Classes) {
		t.Errorf("%d series", len(b.series))
	}
	if packets, over := b.total(); packets != 1010 || over < 700 {
		t.Errorf("%d packets, %d over", packets, over)
	}
}
