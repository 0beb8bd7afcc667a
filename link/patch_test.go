package link

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"assay.dev"
)

func patchedService(n int) assay.Service {
	s := assay.Service{Namespace: "bank", Name: "web", VIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1")}, Ports: []assay.Port{{Port: 80}}}
	for i := range n {
		s.Endpoints = append(s.Endpoints, patchedEndpoint(i))
	}
	return s
}

func patchedEndpoint(i int) assay.Endpoint {
	return assay.Endpoint{
		Workload: fmt.Sprintf("w%d", i), Identity: assay.Identity{TrustDomain: "t", Namespace: "bank", Account: "web"},
		Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, 0, byte(i)})}, Targets: []uint16{8080},
	}
}

// carried is a patch as it is sent.
func carried(t *testing.T, p Patch) (got Patch) {
	t.Helper()
	b, err := json.Marshal(p)
	if err == nil {
		err = json.Unmarshal(b, &got)
	}
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// TestPatch: whatever becomes of a service's endpoints, a patch makes of the old service
// what the new one is, or is not made.
func TestPatch(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	made := 0
	for range 3000 {
		was := patchedService(r.IntN(12))
		is := was
		is.Endpoints = append([]assay.Endpoint{}, was.Endpoints...)
		for range r.IntN(4) {
			switch n := len(is.Endpoints); {
			case r.IntN(3) == 0 || n == 0: // also one that is there already
				i := r.IntN(n + 1)
				is.Endpoints = append(is.Endpoints[:i:i], append([]assay.Endpoint{patchedEndpoint(r.IntN(20))}, is.Endpoints[i:]...)...)
			case r.IntN(2) == 0:
				i := r.IntN(n)
				is.Endpoints = append(is.Endpoints[:i:i], is.Endpoints[i+1:]...)
			case r.IntN(2) == 0:
				is.Endpoints[r.IntN(n)].Targets = []uint16{uint16(r.IntN(2))}
			default:
				i, j := r.IntN(n), r.IntN(n)
				is.Endpoints[i], is.Endpoints[j] = is.Endpoints[j], is.Endpoints[i]
			}
		}
		p, ok := NewPatch(&was, &is)
		if !ok {
			continue
		}
		made++
		p = carried(t, p)
		got, err := p.Apply(&was)
		if err != nil {
			t.Fatal(err)
		}
		if len(got.Endpoints) != len(is.Endpoints) || len(is.Endpoints) > 0 && !reflect.DeepEqual(got, is) {
			t.Fatalf("of %v became %v, want %v", was.Endpoints, got.Endpoints, is.Endpoints)
		}
	}
	if made < 1500 {
		t.Errorf("only %d patches were made", made)
	}
}

// TestPatchIsSmall: one endpoint of a hundred is one, wherever it comes and goes.
func TestPatchIsSmall(t *testing.T) {
	was := patchedService(100)
	is := was
	is.Endpoints = append(append([]assay.Endpoint{}, was.Endpoints[1:60]...), patchedEndpoint(200))
	is.Endpoints = append(is.Endpoints, was.Endpoints[60:]...)
	p, ok := NewPatch(&was, &is)
	want := []Run{{From: 1, Keep: 59}, {New: []assay.Endpoint{patchedEndpoint(200)}}, {From: 60, Keep: 40}}
	if !ok || !reflect.DeepEqual(p.Endpoints, want) {
		t.Errorf("%+v", p)
	}
}

// TestPatchIsOfEndpoints: what else a service says is not patched.
func TestPatchIsOfEndpoints(t *testing.T) {
	was := patchedService(5)
	for name, change := range map[string]func(*assay.Service){
		"address":   func(s *assay.Service) { s.VIPs = nil },
		"port":      func(s *assay.Service) { s.Ports = []assay.Port{{Port: 81}} },
		"headless":  func(s *assay.Service) { s.Headless = true },
		"externals": func(s *assay.Service) { s.Externals = s.VIPs },
		"affinity":  func(s *assay.Service) { s.Affinity = time.Second },
		"local":     func(s *assay.Service) { s.Local = true },
		"policy":    func(s *assay.Service) { s.Policy = &assay.TrafficPolicy{} },
		"most":      func(s *assay.Service) { s.Endpoints = patchedService(11).Endpoints },
	} {
		is := was
		change(&is)
		if _, ok := NewPatch(&was, &is); ok {
			t.Errorf("%s: was patched", name)
		}
	}
}

// TestPatchOutOfStep: a patch that was made for something else changes nothing.
func TestPatchOutOfStep(t *testing.T) {
	was := patchedService(3)
	for _, p := range []Patch{
		{Service: "bank/web", Had: 2}, {Service: "bank/web", Had: 4}, {Service: "bank/other", Had: 3},
		{Service: "bank/web", Had: 3, Endpoints: []Run{{From: 1, Keep: 3}}}, {Service: "bank/web", Had: 3, Endpoints: []Run{{From: -1, Keep: 1}}},
		{Service: "bank/web", Had: 3, Endpoints: []Run{{From: 1, Keep: -1}}}, {Service: "bank/web", Had: 3, Endpoints: []Run{{From: 1 << 62, Keep: 1 << 62}}},
	} {
		if got, err := p.Apply(&was); err == nil {
			t.Errorf("%+v: %v", p, got.Endpoints)
		}
	}
	if _, err := new(Patch).Apply(nil); err == nil {
		t.Error("nothing was patched")
	}
}
