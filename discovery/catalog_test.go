package discovery

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"assay.dev"
)

var meshed = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// vipOf gives each key an address that depends on the key alone.
func vipOf(key string) ([]netip.Addr, bool) {
	var h byte
	for i := range len(key) {
		h = h*31 + key[i]
	}
	return []netip.Addr{netip.AddrFrom4([4]byte{10, 182, 0, h})}, true
}

func workload(id, ns, service string, n byte, ports ...uint16) *assay.Workload {
	return &assay.Workload{
		ID: id, Namespace: ns, Name: service, Service: service, Host: "h1", MeshedSince: meshed,
		Identity: assay.Identity{TrustDomain: "test", Namespace: ns, Account: service},
		Addrs:    []netip.Addr{netip.AddrFrom4([4]byte{10, 181, 0, n})}, Ports: ports, Listening: ports,
	}
}

func declared(ns, name string, selector map[string]string, ports ...DeclaredPort) DeclaredService {
	return DeclaredService{Namespace: ns, Name: name, Selector: selector, Ports: ports}
}

func port(name string, p, target uint16) DeclaredPort {
	return DeclaredPort{Port: assay.Port{Name: name, Port: p}, Target: target}
}

// show writes services one per line, for comparison.
func show(list []assay.Service) string {
	var b strings.Builder
	for i := range list {
		s := &list[i]
		fmt.Fprintf(&b, "%s %v", s.Key(), s.VIPs)
		for _, p := range s.Ports {
			fmt.Fprintf(&b, " %d", p.Port)
		}
		for _, e := range s.Endpoints {
			fmt.Fprintf(&b, " %s%v", e.Workload, e.Targets)
		}
		b.WriteByte('\n')
	}
	return strings.TrimSuffix(b.String(), "\n")
}

func TestServices(t *testing.T) {
	noVIP := func(string) ([]netip.Addr, bool) { return nil, true }
	for _, tc := range []struct {
		name string
		do   func(c *Catalog)
		want string
	}{
		{"implicit, from two replicas", func(c *Catalog) {
			c.SetWorkload(workload("b", "bank", "pay", 2, 80, 90))
			c.SetWorkload(workload("a", "bank", "pay", 1, 80))
		}, "bank/pay [] 80 90 a[80 0] b[80 90]"},
		{"a client only has no service", func(c *Catalog) { c.SetWorkload(workload("a", "bank", "curl", 1)) }, ""},
		{"a port that does not listen is not ready", func(c *Catalog) {
			w := workload("a", "bank", "pay", 1, 80)
			w.Listening = nil
			c.SetWorkload(w)
		}, "bank/pay [] 80 a[0]"},
		{"not meshed yet: no endpoint", func(c *Catalog) {
			w := workload("a", "bank", "pay", 1, 80)
			w.MeshedSince = time.Time{}
			c.SetWorkload(w)
		}, "bank/pay [] 80"},
		{"draining: listed, not ready", func(c *Catalog) {
			w := workload("a", "bank", "pay", 1, 80)
			w.Draining = true
			c.SetWorkload(w)
		}, "bank/pay [] 80 a[0]"},
		{"lost host: listed, not ready", func(c *Catalog) {
			c.SetWorkload(workload("a", "bank", "pay", 1, 80))
			c.SetHostLost("h1", true)
		}, "bank/pay [] 80 a[0]"},
		{"host came back", func(c *Catalog) {
			c.SetWorkload(workload("a", "bank", "pay", 1, 80))
			c.SetHostLost("h1", true)
			c.Changes(noVIP)
			c.SetHostLost("h1", false)
		}, "bank/pay [] 80 a[80]"},
		{"declared wins over --port, with a target port", func(c *Catalog) {
			w := workload("a", "bank", "pay", 1, 8080)
			c.SetWorkload(w)
			c.SetIntent(Intent{Services: []DeclaredService{declared("bank", "pay", nil, port("http", 80, 8080))}})
		}, "bank/pay [] 80 a[8080]"},
		{"a selector needs every label and its own namespace", func(c *Catalog) {
			for i, ns := range []string{"bank", "bank", "other"} {
				w := workload(fmt.Sprint("w", i), ns, "", byte(i+1), 80)
				w.Labels = map[string]string{"app": "pay", "tier": []string{"back", "front", "back"}[i]}
				c.SetWorkload(w)
			}
			c.SetIntent(Intent{Services: []DeclaredService{declared("bank", "pay", map[string]string{"app": "pay", "tier": "back"}, port("", 80, 0))}})
		}, "bank/pay [] 80 w0[80]"},
		{"one workload behind two services", func(c *Catalog) {
			w := workload("a", "bank", "pay", 1, 80)
			w.Labels = map[string]string{"app": "x"}
			c.SetIntent(Intent{Services: []DeclaredService{declared("bank", "all", map[string]string{"app": "x"}, port("", 80, 0))}})
			c.SetWorkload(w)
		}, "bank/all [] 80 a[80]\nbank/pay [] 80 a[80]"},
		{"a label that changes moves the endpoint", func(c *Catalog) {
			w := workload("a", "bank", "", 1, 80)
			w.Labels = map[string]string{"app": "x"}
			c.SetIntent(Intent{Services: []DeclaredService{
				declared("bank", "x", map[string]string{"app": "x"}, port("", 80, 0)), declared("bank", "y", map[string]string{"app": "y"}, port("", 80, 0))}})
			c.SetWorkload(w)
			c.Changes(noVIP)
			moved := *w
			moved.Labels = map[string]string{"app": "y"}
			c.SetWorkload(&moved)
		}, "bank/x [] 80\nbank/y [] 80 a[80]"},
		{"the last replica is gone: the name stays, nothing is ready", func(c *Catalog) {
			c.SetWorkload(workload("a", "bank", "pay", 1, 80))
			c.Changes(noVIP)
			c.RemoveWorkload("a")
		}, "bank/pay [] 80"},
		{"until it is forgotten", func(c *Catalog) {
			c.SetWorkload(workload("a", "bank", "pay", 1, 80))
			c.Changes(noVIP)
			c.RemoveWorkload("a")
			c.Changes(noVIP)
			c.Forget("bank/pay")
		}, ""},
		{"a withdrawn declaration falls back to --port", func(c *Catalog) {
			c.SetWorkload(workload("a", "bank", "pay", 1, 8080))
			c.SetIntent(Intent{Services: []DeclaredService{declared("bank", "pay", nil, port("", 80, 8080))}})
			c.Changes(noVIP)
			c.SetIntent(Intent{})
		}, "bank/pay [] 8080 a[8080]"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := New()
			tc.do(c)
			c.Changes(noVIP)
			if got := show(c.Services()); got != tc.want {
				t.Errorf("got\n%s\nwant\n%s", got, tc.want)
			}
		})
	}
}

func TestChangesTellOnlyWhatChanged(t *testing.T) {
	c := New()
	c.SetWorkload(workload("a", "bank", "pay", 1, 80))
	c.SetWorkload(workload("b", "bank", "ledger", 2, 80))
	if got := c.Changes(vipOf); len(got.Services) != 2 || len(got.Namespaces) != 1 {
		t.Fatalf("first: %+v", got)
	}
	c.SetWorkload(workload("b", "bank", "ledger", 2, 80))
	if got := c.Changes(vipOf); !reflect.DeepEqual(got, Changes{}) {
		t.Errorf("the same workload again: %+v", got)
	}
	w := workload("b", "bank", "ledger", 2, 80)
	w.Draining = true
	c.SetWorkload(w)
	if got := c.Changes(vipOf); len(got.Services) != 1 || got.Services[0].Name != "ledger" || got.Namespaces != nil {
		t.Errorf("draining: %+v", got)
	}
	c.SetIntent(Intent{Namespaces: []assay.NamespaceConfig{{Namespace: "bank", Mode: assay.Strict}}})
	if got := c.Changes(vipOf); len(got.Services) != 0 || len(got.Namespaces) != 1 || got.Namespaces[0].Mode != assay.Strict {
		t.Errorf("strict: %+v", got)
	}
	c.SetIntent(Intent{})
	if got := c.Changes(vipOf); len(got.Namespaces) != 1 || got.Namespaces[0].Mode != assay.Observe {
		t.Errorf("back to observe: %+v", got)
	}
	c.RemoveWorkload("a")
	c.RemoveWorkload("b")
	c.Changes(vipOf)
	for _, key := range c.Remembered() {
		c.Forget(key)
	}
	if got := c.Changes(vipOf); len(got.RemovedServices) != 2 {
		t.Errorf("all gone: %+v", got)
	}
}

func TestServiceWaitsForItsAddress(t *testing.T) {
	c := New()
	have := false
	vips := func(key string) ([]netip.Addr, bool) {
		if !have {
			return nil, false
		}
		return vipOf(key)
	}
	c.SetWorkload(workload("a", "bank", "pay", 1, 80))
	if got := c.Changes(vips); len(got.Services) != 0 || len(got.Pending) != 1 {
		t.Fatalf("without an address: %+v", got)
	}
	have = true
	if got := c.Changes(vips); len(got.Services) != 1 || len(got.Services[0].VIPs) != 1 || got.Pending != nil {
		t.Fatalf("with an address: %+v", got)
	}
	headless := declared("bank", "pay", nil, port("", 80, 0))
	headless.Headless = true
	c.SetIntent(Intent{Services: []DeclaredService{headless}})
	if got := c.Changes(vips); len(got.Services) != 1 || got.Services[0].VIPs != nil {
		t.Fatalf("headless: %+v", got)
	}
}

// TestIncrementalEqualsWhole does random changes and compares what the changes
// add up to with a catalog that was given the end state at once, in another order.
func TestIncrementalEqualsWhole(t *testing.T) {
	for seed := range uint64(200) {
		r := rand.New(rand.NewPCG(seed, 1))
		c := New()
		workloads := map[string]*assay.Workload{}
		lost := map[string]bool{}
		mirror := map[string]assay.Service{}
		var intent Intent
		for range 60 {
			switch r.IntN(6) {
			case 0, 1, 2:
				w := workload(fmt.Sprint("w", r.IntN(8)), []string{"a", "b"}[r.IntN(2)], []string{"", "x", "y"}[r.IntN(3)], byte(r.IntN(200)), uint16(80+r.IntN(2)))
				w.Host = fmt.Sprint("h", r.IntN(2))
				w.Labels = map[string]string{"l": fmt.Sprint(r.IntN(2))}
				w.Draining = r.IntN(4) == 0
				workloads[w.ID] = w
				c.SetWorkload(w)
			case 3:
				id := fmt.Sprint("w", r.IntN(8))
				delete(workloads, id)
				c.RemoveWorkload(id)
			case 4:
				h := fmt.Sprint("h", r.IntN(2))
				lost[h] = r.IntN(2) == 0
				c.SetHostLost(h, lost[h])
			case 5:
				intent = Intent{}
				for i := range r.IntN(3) {
					intent.Services = append(intent.Services, declared([]string{"a", "b"}[r.IntN(2)], []string{"x", "z", "v"}[i], map[string]string{"l": fmt.Sprint(r.IntN(2))}, port("", 80, uint16(80+r.IntN(2)))))
				}
				if err := c.SetIntent(intent); err != nil {
					t.Fatal(err)
				}
			}
			if r.IntN(3) == 0 {
				apply(mirror, c.Changes(vipOf))
			}
		}
		apply(mirror, c.Changes(vipOf))
		for _, key := range c.Remembered() {
			c.Forget(key)
		}
		apply(mirror, c.Changes(vipOf))

		whole := New()
		if err := whole.SetIntent(intent); err != nil {
			t.Fatal(err)
		}
		for h, l := range lost {
			whole.SetHostLost(h, l)
		}
		for _, w := range workloads {
			whole.SetWorkload(w)
		}
		whole.Changes(vipOf)
		got, want := show(sortedValues(mirror)), show(whole.Services())
		if got != want || show(c.Services()) != want {
			t.Fatalf("seed %d: incremental\n%s\nwhole\n%s", seed, got, want)
		}
		a, _ := json.Marshal(c.Services())
		b, _ := json.Marshal(whole.Services())
		if string(a) != string(b) {
			t.Fatalf("seed %d: not the same bytes:\n%s\n%s", seed, a, b)
		}
	}
}

func apply(mirror map[string]assay.Service, ch Changes) {
	for _, s := range ch.Services {
		mirror[s.Key()] = s
	}
	for _, key := range ch.RemovedServices {
		delete(mirror, key)
	}
}

func TestIntentIsValidated(t *testing.T) {
	svc := func(change func(*DeclaredService)) Intent {
		s := declared("bank", "pay", nil, port("a", 80, 0), port("b", 81, 0))
		change(&s)
		return Intent{Services: []DeclaredService{s}}
	}
	for want, in := range map[string]Intent{
		"may hold":               svc(func(s *DeclaredService) { s.Name = "Pay" }),
		"no port":                svc(func(s *DeclaredService) { s.Ports = nil }),
		"port 0":                 svc(func(s *DeclaredService) { s.Ports[0].Port.Port = 0 }),
		"port 80 twice":          svc(func(s *DeclaredService) { s.Ports[1].Port.Port = 80 }),
		"has no name":            svc(func(s *DeclaredService) { s.Ports[1].Name = "" }),
		"name \"a\" twice":       svc(func(s *DeclaredService) { s.Ports[1].Name = "a" }),
		"headless":               svc(func(s *DeclaredService) { s.Headless, s.ClusterIPs = true, []netip.Addr{{}} }),
		"bank/pay: declared":     {Services: []DeclaredService{declared("bank", "pay", nil, port("", 1, 0)), declared("bank", "pay", nil, port("", 1, 0))}},
		"mode \"off\"":           {Namespaces: []assay.NamespaceConfig{{Namespace: "bank", Mode: "off"}}},
		"namespace bank: declar": {Namespaces: []assay.NamespaceConfig{{Namespace: "bank", Mode: assay.Strict}, {Namespace: "bank", Mode: assay.Strict}}},
	} {
		c := New()
		if err := c.SetIntent(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}

// BenchmarkOneChange is one endpoint's change among 5,000 workloads of 500
// services.
func BenchmarkOneChange(b *testing.B) {
	c := New()
	for i := range 5000 {
		c.SetWorkload(workload(fmt.Sprint("w", i), fmt.Sprint("ns", i%20), fmt.Sprint("s", i%500), byte(i), 80))
	}
	c.Changes(vipOf)
	w := *workload("w7", "ns7", "s7", 1, 80)
	b.ReportAllocs()
	for b.Loop() {
		next := w
		next.Draining = !w.Draining
		w = next
		c.SetWorkload(&next)
		if got := c.Changes(vipOf); len(got.Services) != 1 {
			b.Fatal(got)
		}
	}
}
