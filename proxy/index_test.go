package proxy

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"testing"

	"assay.dev"
	"assay.dev/link"
	"assay.dev/proxy/balance"
)

// meaning is what a snapshot finds at each place.
type meaning struct {
	vips                     map[netip.Addr]string
	targets, externals, sole map[netip.AddrPort]tableKey
	announced, certified     map[netip.AddrPort]bool
}

// Everything of these tests is at few places, so that services get in each other's way.
var (
	testAddrs = []netip.Addr{
		netip.MustParseAddr("10.181.0.1"), netip.MustParseAddr("10.181.0.2"), netip.MustParseAddr("10.181.0.3"), netip.MustParseAddr("fd5a::1"), netip.MustParseAddr("fd5a::2"),
	}
	testPorts = []uint16{80, 443, 8080}
	testNode  = netip.MustParseAddr("192.168.0.1")
)

func testPlaces(yield func(netip.AddrPort) bool) {
	for _, a := range append(slices.Clone(testAddrs), testNode) {
		for _, n := range append(slices.Clone(testPorts), 30080, 30443) {
			if !yield(netip.AddrPortFrom(a, n)) {
				return
			}
		}
	}
}

func newMeaning() meaning {
	return meaning{
		vips: map[netip.Addr]string{}, targets: map[netip.AddrPort]tableKey{}, externals: map[netip.AddrPort]tableKey{}, sole: map[netip.AddrPort]tableKey{},
		announced: map[netip.AddrPort]bool{}, certified: map[netip.AddrPort]bool{},
	}
}

// unlike says in what a meaning is not another one.
func (m meaning) unlike(want meaning) string {
	return cmp.Or(unlike("vip", m.vips, want.vips), unlike("target", m.targets, want.targets), unlike("external", m.externals, want.externals),
		unlike("sole", m.sole, want.sole), unlike("announced", m.announced, want.announced), unlike("certified", m.certified, want.certified))
}

func unlike[K, V comparable](what string, is, want map[K]V) string {
	for key := range want {
		if is[key] != want[key] {
			return fmt.Sprintf("%s %v is %v, want %v", what, key, is[key], want[key])
		}
	}
	for key := range is {
		if _, wanted := want[key]; !wanted {
			return fmt.Sprintf("%s %v is %v, want none", what, key, is[key])
		}
	}
	return ""
}

// looked asks a snapshot about every place.
func looked(s *snapshot) meaning {
	m := newMeaning()
	for at := range testPlaces {
		if svc := s.vip(at.Addr()); svc != nil {
			m.vips[at.Addr()] = svc.Key()
		}
		note := func(to map[netip.AddrPort]tableKey, sp *servicePort) {
			if sp != nil {
				to[at] = sp.key()
			}
		}
		note(m.targets, s.target(at))
		note(m.externals, s.external(at))
		note(m.sole, s.sole(at))
		if s.announced(at) {
			m.announced[at] = true
		}
		if s.certified(at) {
			m.certified[at] = true
		}
	}
	return m
}

// reckoned goes over all services, in order, for every place.
func reckoned(s *snapshot) meaning {
	m := newMeaning()
	services := maps.Collect(s.services.All())
	nodePorts := map[uint16]tableKey{}
	owners := map[netip.AddrPort][]tableKey{} // those that can be meant
	first := func(to map[netip.AddrPort]tableKey, at netip.AddrPort, key tableKey) {
		if _, taken := to[at]; !taken {
			to[at] = key
		}
	}
	for _, key := range slices.Sorted(maps.Keys(services)) {
		svc := services[key]
		for _, a := range svc.VIPs {
			if m.vips[a] == "" {
				m.vips[a] = key
			}
		}
		for i, sp := range svc.ports {
			for _, a := range svc.Externals {
				first(m.externals, netip.AddrPortFrom(a, sp.port), sp.key())
			}
			if n := svc.Ports[i].NodePort; n != 0 {
				if _, taken := nodePorts[n]; !taken {
					nodePorts[n] = sp.key()
				}
			}
			for _, set := range []*balance.Set{sp.v4, sp.v6} {
				for _, e := range set.Endpoints() {
					if !e.Identity.IsZero() && !svc.owns(e) {
						continue
					}
					first(m.targets, e.Addr, sp.key())
					if sp.announce {
						m.announced[e.Addr] = true
					}
					if sp.certify {
						m.certified[e.Addr] = true
					}
					if svc.owns(e) && !svc.Headless && !slices.Contains(owners[e.Addr], sp.key()) {
						owners[e.Addr] = append(owners[e.Addr], sp.key())
					}
				}
			}
		}
	}
	for n, key := range nodePorts {
		first(m.externals, netip.AddrPortFrom(testNode, n), key)
	}
	for at, list := range owners {
		if len(list) == 1 && s.tables[list[0]] != nil {
			m.sole[at] = list[0]
		}
	}
	return m
}

func pick[T any](r *rand.Rand, list []T) T { return list[r.IntN(len(list))] }

// anyService is a service at some of the few places.
func anyService(r *rand.Rand, name int) assay.Service {
	s := assay.Service{Namespace: pick(r, []string{"bank", "shop"}), Name: fmt.Sprintf("s%d", name), Headless: r.IntN(4) == 0, Local: r.IntN(6) == 0}
	if !s.Headless {
		s.VIPs = []netip.Addr{testAddrs[r.IntN(len(testAddrs))]}
	}
	if r.IntN(3) == 0 {
		s.Externals = []netip.Addr{pick(r, testAddrs)}
	}
	for i, n := range r.Perm(len(testPorts))[:1+r.IntN(2)] {
		p := assay.Port{Port: testPorts[n], ProxyProtocol: r.IntN(5) == 0, ForwardClientCert: r.IntN(5) == 0}
		if r.IntN(3) == 0 {
			p.NodePort = []uint16{30080, 30443}[i]
		}
		s.Ports = append(s.Ports, p)
	}
	for range r.IntN(4) {
		e := assay.Endpoint{Addrs: []netip.Addr{pick(r, testAddrs)}, Host: pick(r, []string{"here", "there"}), Zone: pick(r, []string{"a", "b"})}
		if r.IntN(2) == 0 {
			e.Addrs = append(e.Addrs, pick(r, testAddrs))
		}
		if r.IntN(4) > 0 {
			e.Workload, e.Identity = "w"+e.Addrs[0].String(), assay.Identity{TrustDomain: "t", Namespace: pick(r, []string{"bank", "shop"}), Account: "a"}
		}
		for range s.Ports {
			e.Targets = append(e.Targets, pick(r, append([]uint16{0}, testPorts...)))
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	return s
}

// TestIndex: whatever changed, everything is found as by one who looks at all services, and as
// by a proxy that was told of them at once.
func TestIndex(t *testing.T) {
	for seed := range uint64(6) {
		r := rand.New(rand.NewPCG(seed, 1))
		conn, far, err := link.Pair()
		if err != nil {
			t.Fatal(err)
		}
		p := New(conn, Options{})
		identity := assay.Identity{TrustDomain: "t", Namespace: "bank", Account: "a"}
		configure := link.Configure{Workload: "w", Identity: identity, Nodes: []netip.Addr{testNode}, Host: "here", Zone: "a"}
		s := p.snap.Load().withConfigure(configure, p)
		for step := range 100 {
			d := link.Services{Version: uint64(step + 1), Full: step == 0 || r.IntN(40) == 0}
			if d.Full {
				d.Config = &assay.NamespaceConfig{Namespace: "bank", Mode: assay.Observe}
			}
			for range 1 + r.IntN(3) {
				name := r.IntN(12)
				if r.IntN(4) == 0 {
					d.Remove = append(d.Remove, pick(r, []string{"bank/", "shop/"})+fmt.Sprintf("s%d", name))
				} else {
					d.Upsert = append(d.Upsert, anyService(r, name))
				}
			}
			if r.IntN(3) == 0 {
				route := assay.Route{Kind: assay.HTTPRoute, Namespace: "bank", Name: fmt.Sprintf("r%d", r.IntN(3)),
					Parents: []assay.RouteParent{{Service: fmt.Sprintf("bank/s%d", r.IntN(12))}}, Rules: []assay.RouteRule{{Backends: []assay.RouteBackend{{Service: "bank/s1", Port: 80, Weight: 1}}}}}
				if r.IntN(3) == 0 {
					d.RemoveRoutes = append(d.RemoveRoutes, route.Key())
				} else {
					d.Routes = append(d.Routes, route)
				}
			}
			s = s.withServices(d, p)
			if r.IntN(20) == 0 { // the node says where it is, and all endpoints are judged anew
				configure.Host, configure.Zone = pick(r, []string{"here", "there"}), pick(r, []string{"a", "b"})
				s = s.withConfigure(configure, p)
			}
			is := looked(s)
			if diff := is.unlike(reckoned(s)); diff != "" {
				t.Fatalf("seed %d, step %d: %s", seed, step, diff)
			}
			all := link.Services{Version: 1, Full: true, Config: &s.settings}
			for _, svc := range s.services.All() {
				all.Upsert = append(all.Upsert, svc.Service)
			}
			for _, route := range s.routes {
				all.Routes = append(all.Routes, *route)
			}
			fresh := new(snapshot).withConfigure(configure, p).withServices(all, p)
			if diff := is.unlike(looked(fresh)); diff != "" {
				t.Fatalf("seed %d, step %d, as by a new proxy: %s", seed, step, diff)
			}
			if fresh.announcing != s.announcing || fresh.certifying != s.certifying || fresh.targets.Len() != s.targets.Len() ||
				fresh.vips.Len() != s.vips.Len() || fresh.nodePorts.Len() != s.nodePorts.Len() || fresh.externals.Len() != s.externals.Len() {
				t.Fatalf("seed %d, step %d: the sizes are not those of a new proxy", seed, step)
			}
		}
		conn.Close()
		far.Close()
	}
}

// cluster is one of so many services, with five endpoints each, and one in a hundred with a hundred.
func cluster(services int) (list []assay.Service) {
	next := uint32(0)
	for i := range services {
		s := assay.Service{
			Namespace: fmt.Sprintf("team-%d", i%20), Name: fmt.Sprintf("service-%d", i),
			VIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})}, Ports: []assay.Port{{Name: "http", Port: 80}},
		}
		n := 4
		if i%100 == 0 {
			n = 100
		}
		for range n {
			s.Endpoints = append(s.Endpoints, assay.Endpoint{
				Workload: fmt.Sprintf("%08x-5f3a-4c1d-8b2e-%012x", 2, next), Identity: assay.Identity{TrustDomain: "cluster.local", Namespace: s.Namespace, Account: s.Name},
				Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 128, byte(next >> 8), byte(next)})}, Targets: []uint16{8080}, Zone: fmt.Sprintf("eu-1%c", 'a'+next%3), Host: fmt.Sprintf("host-%d", next%52),
			})
			next++
		}
		list = append(list, s)
	}
	return list
}

// BenchmarkChange is what a proxy does for one changed service of a cluster.
func BenchmarkChange(b *testing.B) {
	for _, n := range []int{250, 1000, 4000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			conn, far, err := link.Pair()
			if err != nil {
				b.Fatal(err)
			}
			defer conn.Close()
			defer far.Close()
			p := New(conn, Options{})
			list := cluster(n)
			raw, _ := json.Marshal(link.Services{Version: 1, Full: true, Upsert: list})
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			var d link.Services
			json.Unmarshal(raw, &d)
			p.learn(p.snap.Load().withServices(d, p))
			d = link.Services{}
			runtime.GC()
			runtime.ReadMemStats(&after)
			// One in five is of a service with a hundred endpoints; all come and go back.
			var changes [][]byte
			for i := range 100 {
				was := &list[(i*7)%n]
				if i%5 == 0 {
					was = &list[0]
				}
				is := *was
				is.Endpoints = slices.Clone(was.Endpoints)
				is.Endpoints[i%4].Targets = []uint16{0}
				for _, step := range [][2]*assay.Service{{was, &is}, {&is, was}} {
					patch, _ := link.NewPatch(step[0], step[1])
					raw, _ := json.Marshal(link.Services{Version: 2, Patch: []link.Patch{patch}})
					changes = append(changes, raw)
				}
			}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				var d link.Services
				if err := errors.Join(json.Unmarshal(changes[i%len(changes)], &d), p.snap.Load().patched(&d)); err != nil {
					b.Fatal(err)
				}
				p.learn(p.snap.Load().withServices(d, p))
				i++
			}
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(n), "B/service")
		})
	}
}
