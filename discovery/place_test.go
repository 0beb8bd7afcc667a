package discovery

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"assay.dev"
)

func at(n byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 244, 0, n}) }

// place is a ready one of a pod.
func place(pod string, n byte, targets ...uint16) Place {
	return Place{Workload: pod, Addrs: []netip.Addr{at(n)}, Targets: targets, Ready: true, Serving: true}
}

// ending is that place while its pod ends.
func ending(p Place) Place {
	p.Ready, p.Terminating = false, true
	return p
}

func hinted(p Place, zones ...string) Place {
	p.Zones = zones
	return p
}

// pod is a meshed one.
func pod(id string, n byte) *assay.Workload {
	return &assay.Workload{
		ID: id, Namespace: "shop", Name: "web", Host: "h1", MeshedSince: meshed, Addrs: []netip.Addr{at(n)},
		Identity: assay.Identity{TrustDomain: "test", Namespace: "shop", Account: "web"},
	}
}

// web is a service of the cluster.
func web(change ...func(*DeclaredService)) DeclaredService {
	s := declared("shop", "web", map[string]string{"app": "web"}, port("http", 80, 0), port("admin", 9000, 0))
	s.ClusterIPs = []netip.Addr{netip.MustParseAddr("10.96.0.7")}
	for _, f := range change {
		f(&s)
	}
	return s
}

// showPlaces writes endpoints one per line: who, in whose identity, where, for whom.
func showPlaces(c *Catalog) string {
	var lines []string
	for _, s := range c.Services() {
		for _, e := range s.Endpoints {
			line := fmt.Sprintf("%s %s %v %v", e.Workload, e.Identity.Account, e.Addrs, e.Targets)
			if e.Zone != "" || e.Zones != nil {
				line += fmt.Sprintf(" %s%v", e.Zone, e.Zones)
			}
			if e.Host != "" || e.Hosts != nil {
				line += fmt.Sprintf(" on %s for %v", e.Host, e.Hosts)
			}
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n")
}

func TestPlaces(t *testing.T) {
	for name, tc := range map[string]struct {
		do        func(c *Catalog)
		want      string
		misplaced string
	}{
		"meshed: the workload's identity, the place's readiness": {func(c *Catalog) {
			c.SetWorkload(pod("one", 1)) // nothing listens there, says the kernel
			c.SetPlaced(web(), []Place{place("one", 1, 8080, 0)})
		}, "one web [10.244.0.1] [8080 0]", ""},
		"not meshed: no identity": {func(c *Catalog) {
			c.SetPlaced(web(), []Place{place("one", 1, 8080, 9000)})
		}, "one  [10.244.0.1] [8080 9000]", ""},
		"an address that nobody runs": {func(c *Catalog) {
			c.SetPlaced(web(), []Place{place("", 1, 8080, 9000), place("", 2, 8080, 9000)})
		}, "  [10.244.0.1] [8080 9000]\n  [10.244.0.2] [8080 9000]", ""},
		"an address without a pod that is a meshed one's": {func(c *Catalog) {
			c.SetPlaced(web(), []Place{place("", 1, 8080, 9000)})
			c.Changes(vipOf)
			c.SetWorkload(pod("one", 1))
		}, "one web [10.244.0.1] [8080 9000]", ""},
		"by hand and by pod: one endpoint": {func(c *Catalog) {
			c.SetWorkload(pod("one", 1))
			c.SetPlaced(web(), []Place{place("", 1, 0, 9001), place("one", 1, 8080, 0)})
		}, "one web [10.244.0.1] [8080 9001]", ""},
		"another workload has the address": {func(c *Catalog) {
			c.SetWorkload(pod("two", 1))
			c.SetPlaced(web(), []Place{place("one", 1, 8080, 9000), place("three", 3, 8080, 9000)})
		}, "three  [10.244.0.3] [8080 9000]", "{shop/web one 10.244.0.1 two}"},
		"another workload has the address of a meshed pod's place": {func(c *Catalog) {
			c.SetWorkload(pod("one", 5))
			c.SetWorkload(pod("two", 1))
			c.SetPlaced(web(), []Place{place("one", 1, 8080, 9000)})
		}, "", "{shop/web one 10.244.0.1 two}"},
		"the meshed pod has another address": {func(c *Catalog) {
			c.SetWorkload(pod("one", 5))
			c.SetPlaced(web(), []Place{place("one", 1, 8080, 9000)})
		}, "", "{shop/web one 10.244.0.1 }"},
		"the meshed pod has one of two addresses": {func(c *Catalog) {
			c.SetWorkload(pod("one", 1))
			p := place("one", 1, 8080, 9000)
			p.Addrs = append(p.Addrs, netip.MustParseAddr("fd00::1"))
			c.SetPlaced(web(), []Place{p})
		}, "one web [10.244.0.1] [8080 9000]", ""},
		"addresses of two workloads": {func(c *Catalog) {
			c.SetWorkload(pod("one", 1))
			two := pod("two", 2)
			two.Addrs = []netip.Addr{netip.MustParseAddr("fd00::2")}
			c.SetWorkload(two)
			p := place("", 1, 8080, 9000)
			p.Addrs = append(p.Addrs, two.Addrs[0])
			c.SetPlaced(web(), []Place{p})
		}, "", "{shop/web  fd00::2 two}"},
		"known and not meshed yet: nothing, never plain": {func(c *Catalog) {
			w := pod("one", 1)
			w.MeshedSince = time.Time{}
			c.SetWorkload(w)
			c.SetPlaced(web(), []Place{place("one", 1, 8080, 9000)})
		}, "", ""},
		"joins the mesh": {func(c *Catalog) {
			c.SetPlaced(web(), []Place{place("one", 1, 8080, 9000)})
			c.Changes(vipOf)
			c.SetWorkload(pod("one", 1))
		}, "one web [10.244.0.1] [8080 9000]", ""},
		"said to be in the mesh, and not taken: nothing, never plain": {func(c *Catalog) {
			c.SetPlaced(web(), []Place{place("one", 1, 8080, 9000), place("", 2, 8080, 9000)})
			c.Changes(vipOf)
			c.SetClaimed("one", true)
		}, "  [10.244.0.2] [8080 9000]", ""},
		"taken, though said to be": {func(c *Catalog) {
			c.SetClaimed("one", true)
			c.SetWorkload(pod("one", 1))
			c.SetPlaced(web(), []Place{place("one", 1, 8080, 9000)})
		}, "one web [10.244.0.1] [8080 9000]", ""},
		"said to be no more": {func(c *Catalog) {
			c.SetClaimed("one", true)
			c.SetPlaced(web(), []Place{place("one", 1, 8080, 9000)})
			c.Changes(vipOf)
			c.SetClaimed("one", false)
		}, "one  [10.244.0.1] [8080 9000]", ""},
		"leaves the mesh": {func(c *Catalog) {
			c.SetWorkload(pod("one", 1))
			c.SetPlaced(web(), []Place{place("one", 1, 8080, 9000)})
			c.Changes(vipOf)
			c.RemoveWorkload("one")
		}, "one  [10.244.0.1] [8080 9000]", ""},
		"draining in the mesh: nothing new, and not plain": {func(c *Catalog) {
			w := pod("one", 1)
			w.Draining = true
			c.SetWorkload(w)
			c.SetPlaced(web(), []Place{place("one", 1, 8080, 9000)})
		}, "one web [10.244.0.1] [0 0]", ""},
		"a host that is lost is the kubelet's to judge": {func(c *Catalog) {
			c.SetWorkload(pod("one", 1))
			c.SetPlaced(web(), []Place{place("one", 1, 8080, 9000)})
			c.SetHostLost("h1", true)
		}, "one web [10.244.0.1] [8080 9000]", ""},
		"not ready stays listed": {func(c *Catalog) {
			p := place("one", 1, 8080, 9000)
			p.Ready = false
			c.SetPlaced(web(), []Place{p, place("two", 2, 8080, 9000)})
		}, "one  [10.244.0.1] [0 0]\ntwo  [10.244.0.2] [8080 9000]", ""},
		"one that ends is not needed": {func(c *Catalog) {
			c.SetPlaced(web(), []Place{ending(place("one", 1, 8080, 9000)), place("two", 2, 8080, 9000)})
		}, "one  [10.244.0.1] [0 0]\ntwo  [10.244.0.2] [8080 9000]", ""},
		"those that end are all there is": {func(c *Catalog) {
			down := ending(place("two", 2, 8080, 9000))
			down.Serving = false
			c.SetPlaced(web(), []Place{ending(place("one", 1, 8080, 9000)), down})
		}, "one  [10.244.0.1] [8080 9000]\ntwo  [10.244.0.2] [0 0]", ""},
		"that is so for each port": {func(c *Catalog) {
			c.SetPlaced(web(), []Place{ending(place("one", 1, 8080, 9000)), place("two", 2, 8080, 0)})
		}, "one  [10.244.0.1] [0 9000]\ntwo  [10.244.0.2] [8080 0]", ""},
		"a draining workload is no better than one that ends": {func(c *Catalog) {
			w := pod("two", 2)
			w.Draining = true
			c.SetWorkload(w)
			c.SetPlaced(web(), []Place{ending(place("one", 1, 8080, 9000)), place("two", 2, 8080, 9000)})
		}, "one  [10.244.0.1] [8080 9000]\ntwo web [10.244.0.2] [0 0]", ""},
		"hints, when all have them": {func(c *Catalog) {
			out := place("three", 3, 8080, 9000)
			out.Ready = false
			c.SetPlaced(web(), []Place{hinted(place("one", 1, 8080, 9000), "a"), hinted(place("two", 2, 8080, 9000), "a", "b"), out})
		}, "one  [10.244.0.1] [8080 9000] [a]\nthree  [10.244.0.3] [0 0]\ntwo  [10.244.0.2] [8080 9000] [a b]", ""},
		"hints, when one lacks them": {func(c *Catalog) {
			c.SetPlaced(web(), []Place{hinted(place("one", 1, 8080, 9000), "a"), place("two", 2, 8080, 9000)})
		}, "one  [10.244.0.1] [8080 9000]\ntwo  [10.244.0.2] [8080 9000]", ""},
		"hints for hosts, when all have them": {func(c *Catalog) {
			one, two := hinted(place("one", 1, 8080, 9000), "a"), hinted(place("two", 2, 8080, 9000), "a")
			one.Hosts, two.Hosts = []string{"h1"}, []string{"h2"}
			c.SetPlaced(web(), []Place{one, two})
		}, "one  [10.244.0.1] [8080 9000] [a] on  for [h1]\ntwo  [10.244.0.2] [8080 9000] [a] on  for [h2]", ""},
		"hints for hosts, when one lacks them": {func(c *Catalog) {
			one := place("one", 1, 8080, 9000)
			one.Hosts = []string{"h1"}
			c.SetPlaced(web(), []Place{one, place("two", 2, 8080, 9000)})
		}, "one  [10.244.0.1] [8080 9000]\ntwo  [10.244.0.2] [8080 9000]", ""},
		"local: on each host the ending ones only where none is ready": {func(c *Catalog) {
			on := func(host string, p Place) Place {
				p.Host = host
				return p
			}
			local := web(func(s *DeclaredService) { s.Local = true })
			c.SetWorkload(pod("four", 4)) // its host is known best by itself
			c.SetPlaced(local, []Place{on("h2", place("one", 1, 8080, 9000)), on("h2", ending(place("two", 2, 8080, 9000))),
				on("h3", ending(place("three", 3, 8080, 9000))), on("h2", place("four", 4, 8080, 9000))})
		}, "four web [10.244.0.4] [8080 9000] on h1 for []\none  [10.244.0.1] [8080 9000] on h2 for []\n" +
			"three  [10.244.0.3] [8080 9000] on h3 for []\ntwo  [10.244.0.2] [0 0] on h2 for []", ""},
		"zones: the place's, else the host's": {func(c *Catalog) {
			w := pod("one", 1)
			w.Zone = "host"
			c.SetWorkload(w)
			two := place("two", 2, 8080, 9000)
			two.Zone = "b"
			c.SetPlaced(web(), []Place{place("one", 1, 8080, 9000), two})
		}, "one web [10.244.0.1] [8080 9000] host[]\ntwo  [10.244.0.2] [8080 9000] b[]", ""},
		"headless": {func(c *Catalog) {
			c.SetPlaced(web(func(s *DeclaredService) { s.Headless, s.ClusterIPs = true, nil }), []Place{place("one", 1, 8080, 9000)})
		}, "one  [10.244.0.1] [8080 9000]", ""},
		"without an address yet: withheld": {func(c *Catalog) {
			c.SetPlaced(web(func(s *DeclaredService) { s.ClusterIPs = nil }), []Place{place("one", 1, 8080, 9000)})
		}, "", ""},
		"without a port (ExternalName): none": {func(c *Catalog) {
			c.SetPlaced(web(func(s *DeclaredService) { s.Ports = nil }), nil)
		}, "", ""},
		"its selector selects nobody": {func(c *Catalog) {
			w := pod("one", 1)
			w.Labels = map[string]string{"app": "web"}
			c.SetWorkload(w)
			c.SetPlaced(web(), nil)
		}, "", ""},
		"it stands before what was declared": {func(c *Catalog) {
			w := pod("one", 1)
			w.Labels, w.Listening = map[string]string{"app": "web"}, []uint16{80}
			c.SetWorkload(w)
			c.SetIntent(Intent{Services: []DeclaredService{web()}})
			c.SetPlaced(web(), []Place{place("two", 2, 8080, 9000)})
		}, "two  [10.244.0.2] [8080 9000]", ""},
		"and gives it back": {func(c *Catalog) {
			w := pod("one", 1)
			w.Labels, w.Listening = map[string]string{"app": "web"}, []uint16{80}
			c.SetWorkload(w)
			c.SetIntent(Intent{Services: []DeclaredService{web()}})
			c.SetPlaced(web(), []Place{place("two", 2, 8080, 9000)})
			c.Changes(vipOf)
			c.RemovePlaced("shop/web")
		}, "one web [10.244.0.1] [80 0]", ""},
		"replaced": {func(c *Catalog) {
			c.SetPlaced(web(), []Place{place("one", 1, 8080, 9000)})
			c.Changes(vipOf)
			c.SetPlaced(web(), []Place{place("two", 2, 8080, 9000)})
			c.SetWorkload(pod("one", 1))
		}, "two  [10.244.0.2] [8080 9000]", ""},
	} {
		t.Run(name, func(t *testing.T) {
			c := New()
			tc.do(c)
			ch := c.Changes(vipOf)
			if got := showPlaces(c); got != tc.want {
				t.Errorf("got\n%s\nwant\n%s", got, tc.want)
			}
			var misplaced []string
			for _, m := range ch.Misplaced {
				misplaced = append(misplaced, fmt.Sprint(m))
			}
			if got := strings.Join(misplaced, "\n"); got != tc.misplaced {
				t.Errorf("misplaced: got %s, want %s", got, tc.misplaced)
			}
			if len(ch.Pending) > 0 {
				t.Errorf("pending: %v", ch.Pending)
			}
		})
	}
}

// TestMisplacedIsToldOnce: and again when it has been right in between.
func TestMisplacedIsToldOnce(t *testing.T) {
	c := New()
	c.SetWorkload(pod("two", 1))
	c.SetPlaced(web(), []Place{place("one", 1, 8080, 9000)})
	told := func() int { return len(c.Changes(vipOf).Misplaced) }
	if n := told(); n != 1 {
		t.Errorf("first: %d", n)
	}
	c.SetPlaced(web(), []Place{place("one", 1, 8080, 9000), place("three", 3, 8080, 9000)})
	if n := told(); n != 0 {
		t.Errorf("again: %d", n)
	}
	c.RemoveWorkload("two")
	if n := told(); n != 0 {
		t.Errorf("put right: %d", n)
	}
	c.SetWorkload(pod("two", 1))
	if n := told(); n != 1 {
		t.Errorf("wrong once more: %d", n)
	}
}

// TestPlacesAreForgotten: nothing is kept of what is gone.
func TestPlacesAreForgotten(t *testing.T) {
	c := New()
	c.SetWorkload(pod("two", 1))
	c.SetPlaced(web(), []Place{place("one", 1, 8080, 9000), place("", 3, 8080, 9000), place("", 3, 1, 1)})
	c.Changes(vipOf)
	c.RemovePlaced("shop/web")
	c.RemovePlaced("shop/never")
	c.RemoveWorkload("two")
	if ch := c.Changes(vipOf); !slices.Equal(ch.RemovedServices, []string{"shop/web"}) {
		t.Errorf("%+v", ch)
	}
	p := &c.places
	if n := len(p.services) + len(p.byWorkload) + len(p.byAddr) + len(p.owners) + len(p.misplaced); n > 0 {
		t.Errorf("something is kept: %+v", p)
	}
}

// TestPlacesInAnyOrder does random changes of workloads and places, and compares what
// they add up to with a catalog that was given the end state at once. On the way no
// endpoint without an identity ever has an address that a workload has.
func TestPlacesInAnyOrder(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 2))
		c := New()
		workloads, placed := map[string]*assay.Workload{}, map[string][]Place{}
		mirror := map[string]assay.Service{}
		check := func() {
			for _, s := range mirror {
				for _, e := range s.Endpoints {
					for _, w := range workloads {
						if e.Identity.IsZero() && slices.ContainsFunc(w.Addrs, func(a netip.Addr) bool { return slices.Contains(e.Addrs, a) }) {
							t.Fatalf("seed %d: %+v is plain, and meshed as %+v", seed, e, w)
						}
					}
				}
			}
		}
		for range 80 {
			switch id := fmt.Sprint("p", r.IntN(6)); r.IntN(5) {
			case 0, 1:
				w := pod(id, byte(r.IntN(6)))
				w.Identity.Account = fmt.Sprint("a", r.IntN(2))
				if r.IntN(5) == 0 {
					w.MeshedSince = time.Time{}
				}
				w.Draining = r.IntN(4) == 0
				workloads[id] = w
				c.SetWorkload(w)
			case 2:
				delete(workloads, id)
				c.RemoveWorkload(id)
			case 3:
				name := fmt.Sprint("s", r.IntN(3))
				var list []Place
				for range r.IntN(4) {
					p := place([]string{"", id}[r.IntN(2)], byte(r.IntN(6)), uint16(r.IntN(2)), 9000)
					p.Ready, p.Serving, p.Terminating = r.IntN(2) == 0, r.IntN(2) == 0, r.IntN(2) == 0
					if r.IntN(2) == 0 {
						p.Zones = []string{"a"}
					}
					list = append(list, p)
				}
				placed[name] = list
				c.SetPlaced(web(func(s *DeclaredService) { s.Name = name }), list)
			case 4:
				name := fmt.Sprint("s", r.IntN(3))
				delete(placed, name)
				c.RemovePlaced("shop/" + name)
			}
			if r.IntN(3) == 0 {
				apply(mirror, c.Changes(vipOf))
				check()
			}
		}
		apply(mirror, c.Changes(vipOf))
		check()
		whole := New()
		for name, list := range placed {
			whole.SetPlaced(web(func(s *DeclaredService) { s.Name = name }), list)
		}
		for _, w := range workloads {
			whole.SetWorkload(w)
		}
		whole.Changes(vipOf)
		a, _ := json.Marshal(sortedValues(mirror))
		b, _ := json.Marshal(whole.Services())
		if string(a) != string(b) {
			t.Fatalf("seed %d: not the same:\n%s\n%s", seed, a, b)
		}
	}
}

// BenchmarkOnePlace is what a change of one pod costs among 10,000 of 2,000 services.
func BenchmarkOnePlace(b *testing.B) {
	c := New()
	service := func(i int, ready bool) {
		var list []Place
		for j := range 5 {
			p := place(fmt.Sprintf("pod-%d-%d", i, j), 0, 8080)
			p.Addrs = []netip.Addr{netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), byte(j)})}
			p.Ready = j > 0 || ready
			list = append(list, p)
		}
		s := declared("shop", fmt.Sprint("s", i), nil, port("", 80, 0))
		s.ClusterIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})}
		c.SetPlaced(s, list)
	}
	for i := range 2000 {
		service(i, true)
		for j := range 5 {
			w := pod(fmt.Sprintf("pod-%d-%d", i, j), 0)
			w.Addrs = []netip.Addr{netip.AddrFrom4([4]byte{10, byte(i >> 8), byte(i), byte(j)})}
			c.SetWorkload(w)
		}
	}
	c.Changes(vipOf)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		service(i%2000, i/2000%2 == 1)
		if ch := c.Changes(vipOf); len(ch.Services) != 1 {
			b.Fatalf("%+v", ch)
		}
	}
}
