package control

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"assay.dev"
	"assay.dev/discovery"
)

// placedAt is a service with a place for each pod.
func placedAt(name string, pods ...Pod) Placed {
	s := Placed{DeclaredService: discovery.DeclaredService{Namespace: "shop", Name: name, ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1")},
		Ports: []discovery.DeclaredPort{{Port: assay.Port{Port: 80}}}}}
	for _, p := range pods {
		s.Places = append(s.Places, discovery.Place{Workload: p.UID, Addrs: p.Addrs, Targets: []uint16{8080}, Ready: true, Serving: true})
	}
	return s
}

// endpoints are the workloads of a service's endpoints, "+" behind those with an identity.
func (a *agent) endpoints(key string) (list []string) {
	for _, e := range a.get("service/" + key).GetService().GetEndpoints() {
		list = append(list, e.GetWorkload()+map[bool]string{true: "+"}[e.GetIdentity() != ""])
	}
	return list
}

// TestStoreAwayNothingInTheClear: while the database is away pods start on the node of another
// control. What that has taken into the mesh, and this one cannot have heard of, is nobody's
// endpoint in plaintext; pods of before are what they were. With the database back each is what it is.
func TestStoreAwayNothingInTheClear(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 2, func(cfg *Config) { cfg.Cluster = testCluster() })
	a, b := m.controls[0], m.controls[1]
	old := pod("old", "node-2", "10.0.2.1")
	early, late, plain := pod("early", "node-2"), pod("late", "node-2", "10.0.2.3"), pod("plain", "node-2", "10.0.2.4")
	for _, r := range m.controls {
		changes := twoNodes(old, early)
		changes.Services = []Placed{placedAt("web", old)}
		r.follow(t, changes)
	}
	h1, h2 := a.joinNode(t, "node-1"), b.joinNode(t, "node-2")
	s1, s2 := syncHost(t, h1.hosts, nil), syncHost(t, h2.hosts, nil)
	s1.synced()
	s2.synced()
	expect := func(what string, want ...string) {
		t.Helper()
		eventually(t, fmt.Sprint(what, ": endpoints ", want), func() bool { return slices.Equal(s1.endpoints("shop/web"), want) })
	}
	expect("at first", "old")
	eventually(t, "a knows where the other node is", func() bool { present, _, _ := a.hostState(h2.id); return present })
	m.server.kill()
	s2.up(b.meshed(h2, "early", "10.0.2.2"))
	s2.up(b.meshed(h2, "late", "10.0.2.3")) // the API server is late
	s2.waitAccepted("early")
	early = pod("early", "node-2", "10.0.2.2")
	ended := pod("ended", "node-1", "10.0.1.9") // by which the next snapshot is known
	for _, r := range m.controls {
		r.follow(t, ClusterChanges{Pods: []Pod{early, late, plain, ended}, Services: []Placed{placedAt("web", old, early, late, plain), placedAt("marker", ended)}})
	}
	s2.waitAccepted("late")
	s1.waitFor("service/shop/marker")
	expect("with the database away", "old")
	m.server.start()
	expect("with the database back", "early+", "late+", "old", "plain")
}
