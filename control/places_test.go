package control

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/discovery"
	"assay.dev/store"
)

// TestPlaces: a service whose endpoints are places says of each host who is there: the
// attested workload, or nobody of the mesh. What leaves the mesh becomes plain when it is
// withdrawn, and a place at somebody else's address is a finding.
func TestPlaces(t *testing.T) {
	r := start(t, nil)
	a := syncHost(t, localHosts(t, r), nil)
	a.synced()
	w := a.workload("pod-1", "bank", "", 1)
	place := func(pod string, addr netip.Addr) discovery.Place {
		return discovery.Place{Workload: pod, Addrs: []netip.Addr{addr}, Targets: []uint16{8080}, Ready: true, Serving: true}
	}
	placed := func(list ...discovery.Place) {
		r.model.mu.Lock()
		defer r.model.mu.Unlock()
		r.model.catalog.SetPlaced(discovery.DeclaredService{
			Namespace: "bank", Name: "web", ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.7")},
			Ports: []discovery.DeclaredPort{{Port: assay.Port{Port: 80}}},
		}, list)
		r.model.publish()
	}
	endpoint := func(workload, identity string) {
		t.Helper()
		eventually(t, "endpoint "+workload+" "+identity, func() bool {
			list := a.get("service/bank/web").GetService().GetEndpoints()
			return len(list) == 1 && list[0].GetWorkload() == workload && list[0].GetIdentity() == identity && list[0].GetTargets()[0] == 8080
		})
	}
	placed(place("pod-1", w.Addrs[0]))
	endpoint("pod-1", "")
	a.up(w)
	endpoint("pod-1", w.Identity.String())
	if a.get("workload/pod-1") == nil {
		t.Error("an endpoint's identity is known before the address table has it")
	}
	a.gone("pod-1")
	endpoint("pod-1", "")
	if a.get("workload/pod-1") != nil {
		t.Error("the endpoint is plain, and the address table still has it")
	}
	a.up(w)
	endpoint("pod-1", w.Identity.String())
	placed(place("pod-2", w.Addrs[0]))
	eventually(t, "no endpoint", func() bool { return len(a.get("service/bank/web").GetService().GetEndpoints()) == 0 })
	o := r.operator(t)
	eventually(t, "the finding", func() bool {
		for _, f := range documents[store.Finding](t, o, "findings") {
			if f.Kind == "misplaced-endpoint" && strings.Contains(f.Subject, "bank/web") && strings.Contains(f.Detail, "pod-1") {
				return f.Remedy != ""
			}
		}
		return false
	})
}

// TestPodInBetween: a pod that may be in the mesh, and is not taken, is nobody's endpoint in
// plaintext: one whose report contradicts the platform, and one that came while its
// node's agent was away.
func TestPodInBetween(t *testing.T) {
	r := startCluster(t, nil)
	list := []Pod{pod("one", "node-1", "10.0.1.1"), pod("two", "node-1", "10.0.1.2"), pod("far", "node-2", "10.0.2.1")}
	service := func(pods ...Pod) Placed {
		s := Placed{DeclaredService: discovery.DeclaredService{Namespace: "shop", Name: "web", ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1")},
			Ports: []discovery.DeclaredPort{{Port: assay.Port{Port: 80}}}}}
		for _, p := range pods {
			s.Places = append(s.Places, discovery.Place{Workload: p.UID, Addrs: p.Addrs, Targets: []uint16{8080}, Ready: true, Serving: true})
		}
		return s
	}
	changes := twoNodes(list...)
	changes.Services = []Placed{service(list...)}
	r.follow(t, changes)
	h := r.joinNode(t, "node-1")
	a := syncHost(t, h.hosts, nil)
	a.synced()
	// endpoints: "+" behind those with an identity.
	endpoints := func(want ...string) {
		t.Helper()
		eventually(t, fmt.Sprint("endpoints ", want), func() bool {
			var got []string
			for _, e := range a.get("service/shop/web").GetService().GetEndpoints() {
				name := e.GetWorkload()
				if e.GetIdentity() != "" {
					name += "+"
				}
				got = append(got, name)
			}
			return slices.Equal(got, want)
		})
	}
	endpoints("far", "one", "two")
	w := r.meshed(h, "one", "10.0.1.1")
	w.Name, w.Identity.Account = "bank", "bank"
	a.up(w)
	a.waitRefused("one")
	endpoints("far", "two")
	a.forget()
	a.up(r.meshed(h, "one", "10.0.1.1"))
	a.waitAccepted("one")
	endpoints("far", "one+", "two")
	// A node's word about another's pod changes nothing.
	a.up(r.meshed(h, "far", "10.0.2.1"))
	a.waitRefused("far")
	endpoints("far", "one+", "two")
	// The platform contradicts what was taken: withdrawn, and not plain.
	moved := pod("one", "node-1", "10.0.1.9")
	r.follow(t, ClusterChanges{Pods: []Pod{moved}, Services: []Placed{service(moved, list[1], list[2])}})
	endpoints("far", "two")
	a.released("one")
	endpoints("far", "one", "two")
	a.close()
	eventually(t, "the host is away", func() bool { r.model.mu.Lock(); defer r.model.mu.Unlock(); return r.model.hosts[h.id].session == nil })
	fresh := pod("three", "node-1", "10.0.1.3")
	r.follow(t, ClusterChanges{Pods: []Pod{fresh, pod("four", "node-2", "10.0.2.4")}, Services: []Placed{service(moved, list[1], list[2], fresh, pod("four", "node-2", "10.0.2.4"))}})
	a = syncHost(t, h.hosts, nil)
	endpoints("far", "four", "one", "two") // what was there before is what it was
	a.synced()
	endpoints("far", "four", "one", "three", "two")
}

// TestPodThatHasEnded: a pod of the mesh that has ended is nobody's endpoint, though the API
// server still has it, and though services still name it after that; one that was released is one
// in plaintext. So it is for pods that never were in the mesh.
func TestPodThatHasEnded(t *testing.T) {
	r := startCluster(t, nil)
	list := []Pod{pod("one", "node-1", "10.0.1.1"), pod("two", "node-1", "10.0.1.2"), pod("plain", "node-2", "10.0.2.1")}
	changes := twoNodes(list...)
	s := Placed{DeclaredService: discovery.DeclaredService{Namespace: "shop", Name: "web", ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1")},
		Ports: []discovery.DeclaredPort{{Port: assay.Port{Port: 80}}}}}
	for _, p := range list {
		s.Places = append(s.Places, discovery.Place{Workload: p.UID, Addrs: p.Addrs, Targets: []uint16{8080}, Ready: true, Serving: true})
	}
	changes.Services = []Placed{s}
	r.follow(t, changes)
	h := r.joinNode(t, "node-1")
	a := syncHost(t, h.hosts, nil)
	a.synced()
	endpoints := func(want ...string) {
		t.Helper()
		eventually(t, fmt.Sprint("endpoints ", want), func() bool {
			var got []string
			for _, e := range a.get("service/shop/web").GetService().GetEndpoints() {
				got = append(got, e.GetWorkload()+map[bool]string{true: "+"}[e.GetIdentity() != ""])
			}
			return slices.Equal(got, want)
		})
	}
	a.up(r.meshed(h, "one", "10.0.1.1"))
	a.up(r.meshed(h, "two", "10.0.1.2"))
	endpoints("one+", "plain", "two+")
	a.released("two")
	endpoints("one+", "plain", "two")
	a.gone("one")
	endpoints("plain", "two")
	r.follow(t, ClusterChanges{RemovedPods: []string{"one", "plain"}})
	endpoints("two")
	r.follow(t, ClusterChanges{Services: []Placed{s}}) // as it was
	a.up(r.meshed(h, "two", "10.0.1.2"))
	endpoints("two+")
	s.Places = s.Places[1:2]
	r.follow(t, ClusterChanges{Services: []Placed{s}})
	endpoints("two+")
	r.model.mu.Lock()
	defer r.model.mu.Unlock()
	if n := len(r.model.cluster.claims); n != 0 {
		t.Errorf("%d claims are left", n)
	}
}

// TestUnmeshedEndpointsAreOneFinding: of a client and a service, whatever the number of
// endpoints.
func TestUnmeshedEndpointsAreOneFinding(t *testing.T) {
	now := time.Now()
	client := assay.Party{Identity: assay.Identity{TrustDomain: "bank.test", Namespace: "bank", Account: "web"}}
	plain := func(service, remote, reason string, opened, failures uint64) assay.Edge {
		return assay.Edge{Client: client, Service: service, Port: 80, Protocol: assay.HTTP1, Security: assay.Plaintext, Reason: reason, Remote: remote, Opened: opened, Failures: failures, LastSeen: now}
	}
	got := checkPlaintext([]assay.Edge{
		plain("bank/legacy", "10.244.0.1", assay.ReasonUnmeshed, 2, 0),
		plain("bank/legacy", "10.244.0.2", assay.ReasonUnmeshed, 3, 0),
		plain("bank/legacy", "10.244.0.3", assay.ReasonUnmeshed, 1, 1), // nothing passed
		plain("bank/other", "10.244.0.4", assay.ReasonUnmeshed, 1, 0),
		plain("", "192.0.2.1", assay.ReasonOutside, 1, 0),
		plain("", "192.0.2.2", assay.ReasonOutside, 1, 0),
		plain("", "192.0.2.3", assay.ReasonEgress, 1, 0),
		plain("", "192.0.2.4", assay.ReasonProbe, 1, 0),
		plain("", "192.0.2.5", assay.ReasonMetrics, 1, 0),
	}, now)
	var text []string
	for _, f := range got {
		text = append(text, f.Subject+": "+f.Detail)
	}
	want := []string{
		"bank/web -> bank/legacy: port 80, http1: 5 connections to 2 endpoints that are not meshed",
		"bank/web -> bank/other: port 80, http1: 1 connections to 1 endpoints that are not meshed",
		"bank/web -> 192.0.2.1: port 80, http1: 1 connections, outside",
		"bank/web -> 192.0.2.2: port 80, http1: 1 connections, outside",
	}
	if !slices.Equal(text, want) {
		t.Errorf("got %q\nwant %q", text, want)
	}
}
