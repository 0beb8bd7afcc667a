package control

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"

	"assay.dev/api"
)

func resource(text string) *api.Resource {
	return &api.Resource{Body: &api.Resource_Namespace{Namespace: &api.NamespaceConfig{Namespace: text}}}
}

// TestSnapshotReaders compares what readers have that follow at their own pace,
// come back with what they kept, or are told to begin anew, with the truth.
func TestSnapshotReaders(t *testing.T) {
	for seed := range uint64(50) {
		r := rand.New(rand.NewPCG(seed, 3))
		s := newSnapshot(1)
		truth := map[string]string{}
		type reader struct {
			version uint64
			have    map[string]*api.Resource
		}
		readers := make([]*reader, 4)
		for i := range readers {
			readers[i] = &reader{have: map[string]*api.Resource{}}
		}
		take := func(rd *reader, c changes) {
			for _, k := range c.remove {
				delete(rd.have, k)
			}
			for _, e := range c.upsert {
				res := e.resource()
				if old := rd.have[res.Key]; old != nil && old.Version > res.Version {
					t.Fatalf("seed %d: %s went from version %d to %d", seed, res.Key, old.Version, res.Version)
				}
				rd.have[res.Key] = res
			}
			rd.version = c.version
		}
		known := func(rd *reader) map[string]uint64 {
			out := map[string]uint64{}
			for k, res := range rd.have {
				out[k] = res.Version
			}
			return out
		}
		for range 400 {
			key := fmt.Sprint("namespace/", r.IntN(30))
			switch r.IntN(4) {
			case 0:
				if _, ok := truth[key]; s.remove(key) != ok {
					t.Fatalf("seed %d: removal of %s", seed, key)
				}
				delete(truth, key)
			default:
				text := fmt.Sprint(r.IntN(3))
				old, ok := truth[key]
				if s.put(key, resource(text)) == (ok && old == text) {
					t.Fatalf("seed %d: %s put as %s over %s", seed, key, text, old)
				}
				truth[key] = text
			}
			rd := readers[r.IntN(len(readers))]
			switch r.IntN(8) {
			case 0:
				take(rd, s.resume(1, known(rd)))
			case 1:
				take(rd, s.resume(99, known(rd))) // of another epoch
			case 2:
				least := s.version
				for _, other := range readers[:3] { // the fourth is left behind
					least = min(least, other.version)
				}
				s.prune(least)
			default:
				if c, ok := s.since(rd.version); ok {
					take(rd, c)
				} else {
					take(rd, s.resume(1, known(rd)))
				}
			}
		}
		for i, rd := range readers {
			if c, ok := s.since(rd.version); ok {
				take(rd, c)
			} else {
				take(rd, s.resume(1, known(rd)))
			}
			if len(rd.have) != len(truth) {
				t.Fatalf("seed %d reader %d: %d resources, want %d", seed, i, len(rd.have), len(truth))
			}
			for k, want := range truth {
				if got := rd.have[k].GetNamespace().GetNamespace(); got != want {
					t.Fatalf("seed %d reader %d: %s is %s, want %s", seed, i, k, got, want)
				}
			}
		}
	}
}

// TestTombstonesAreBounded: a stream that lags cannot make removals pile up.
func TestTombstonesAreBounded(t *testing.T) {
	s := newSnapshot(1)
	s.put("namespace/first", resource("x"))
	for i := range maxTombstones + 100 {
		key := fmt.Sprint("namespace/", i)
		s.put(key, resource("x"))
		s.remove(key)
	}
	s.prune(0)
	if s.tombstones > maxTombstones || len(s.entries) > maxTombstones+1 {
		t.Errorf("%d tombstones", s.tombstones)
	}
	if _, ok := s.since(0); ok {
		t.Error("a stream from before is served as if nothing was forgotten")
	}
	s.prune(s.version)
	if s.tombstones != 0 || s.order.Len() != 1 || s.get("namespace/first") == nil {
		t.Errorf("%d tombstones, %d entries", s.tombstones, s.order.Len())
	}
}

func TestNetwork(t *testing.T) {
	n := DefaultNetwork
	if err := n.validate(); err != nil {
		t.Fatal(err)
	}
	if n.hosts() != 256 || n.services() != 65534 {
		t.Errorf("%d hosts, %d services", n.hosts(), n.services())
	}
	seen := map[netip.Prefix]bool{}
	for i := range n.hosts() {
		list, err := n.hostPrefixes(i + 1)
		if err != nil {
			t.Fatal(err)
		}
		for j, p := range list {
			whole := []netip.Prefix{n.Workloads4, n.Workloads6}[j]
			if seen[p] || !whole.Overlaps(p) || p.Masked() != p {
				t.Fatalf("host %d has %v", i+1, list)
			}
			seen[p] = true
		}
	}
	for _, i := range []int64{1, 2, 255, 256, 65534} {
		list, err := n.vips(i)
		if err != nil || !n.Services4.Contains(list[0]) || !n.Services6.Contains(list[1]) {
			t.Errorf("service %d: %v, %v", i, list, err)
		}
	}
	for _, i := range []int64{0, -1, 65535} {
		if _, err := n.vips(i); err == nil {
			t.Errorf("service %d has an address", i)
		}
	}
	if _, err := n.hostPrefixes(257); err == nil {
		t.Error("host 257 has a prefix")
	}
	for name, change := range map[string]func(*Network){
		"overlap":   func(n *Network) { n.Services4 = netip.MustParsePrefix("10.181.4.0/24") },
		"family":    func(n *Network) { n.Services6 = n.Services4 },
		"none":      func(n *Network) { n.Workloads6 = netip.Prefix{} },
		"bits":      func(n *Network) { n.Workloads4 = netip.MustParsePrefix("10.181.0.1/16") },
		"too small": func(n *Network) { n.Workloads4 = netip.MustParsePrefix("10.181.0.0/25") },
		"one host6": func(n *Network) { n.Workloads6 = netip.MustParsePrefix("fd5a:5a59::/96") },
	} {
		bad := DefaultNetwork
		change(&bad)
		if bad.validate() == nil {
			t.Errorf("%s: %v is taken", name, bad)
		}
	}
}

// What cannot be encoded leaves hosts with what they know, and is told; it ends nobody.
func TestUntold(t *testing.T) {
	s := newSnapshot(1)
	s.put("namespace/first", resource("x"))
	version := s.version
	if s.put("namespace/first", resource("\xff")) || s.put("namespace/\xff", resource("x")) || s.version != version {
		t.Error("what is not UTF-8 is published")
	}
	if len(s.untold) != 2 || s.get("namespace/first").GetNamespace() == nil {
		t.Errorf("untold %v", s.untold)
	}
	s.put("namespace/first", resource("y"))
	s.remove("namespace/\xff")
	if len(s.untold) != 0 || s.version != version+1 {
		t.Errorf("untold %v, version %d", s.untold, s.version)
	}
}
