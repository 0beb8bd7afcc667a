package proxy

import (
	"encoding/json"
	"errors"
	"net/netip"
	"testing"

	"assay.dev"
	"assay.dev/link"
)

func servicesMessage(t *testing.T, d link.Services) *link.Message {
	t.Helper()
	b, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	return &link.Message{Kind: link.KindServices, Body: b}
}

// TestPatchedService: a patch is as good as the service whole, what was learned stays, and
// one that does not fit ends the link, and changes nothing.
func TestPatchedService(t *testing.T) {
	p := oneService(t).o.p
	was := p.snap.Load().services.At("bank/web")
	next := was.Service
	next.Endpoints = append([]assay.Endpoint{}, was.Endpoints...)
	next.Endpoints = append(next.Endpoints, was.Endpoints[0])
	next.Endpoints[1].Workload, next.Endpoints[1].Addrs = "x", []netip.Addr{netip.MustParseAddr("10.181.7.9")}
	patch, ok := link.NewPatch(&was.Service, &next)
	if !ok {
		t.Fatal("no patch")
	}
	m := servicesMessage(t, link.Services{Version: 2, Patch: []link.Patch{patch}})
	if err := p.agent.handle(t.Context(), p.agent.conn, m); err != nil {
		t.Fatal(err)
	}
	s := p.snap.Load()
	is := s.services.At("bank/web")
	if e := is.ports[0].v4.Endpoints(); len(e) != 2 || e[0] != was.ports[0].v4.Endpoints()[0] || is.ports[0].memory != was.ports[0].memory {
		t.Errorf("endpoints %v", e)
	}
	if sp := s.target(netip.MustParseAddrPort("10.181.7.9:8080")); sp != is.ports[0] {
		t.Error("what came is not found")
	}
	if err := p.agent.handle(t.Context(), p.agent.conn, m); !errors.Is(err, errOutOfStep) || p.snap.Load() != s {
		t.Errorf("the same patch again: %v", err)
	}
	// Nor is it known what a patch is of when something before it could not be used.
	broken := servicesMessage(t, link.Services{Version: 3})
	broken.Body = append(broken.Body, '}')
	if err := p.agent.handle(t.Context(), p.agent.conn, broken); err == nil || errors.Is(err, errOutOfStep) {
		t.Errorf("not JSON: %v", err)
	}
	if patch, ok = link.NewPatch(&next, &was.Service); !ok {
		t.Fatal("no patch")
	}
	m = servicesMessage(t, link.Services{Version: 4, Patch: []link.Patch{patch}})
	if err := p.agent.handle(t.Context(), p.agent.conn, m); !errors.Is(err, errOutOfStep) {
		t.Errorf("a patch after it: %v", err)
	}
	full := servicesMessage(t, link.Services{Version: 5, Full: true, Upsert: []assay.Service{next}})
	for _, m := range []*link.Message{full, m} {
		if err := p.agent.handle(t.Context(), p.agent.conn, m); err != nil {
			t.Errorf("when everything was told anew: %v", err)
		}
	}
}
