package control

import (
	"testing"

	"assay.dev/api"
)

// TestPodsOfSeveral: a pod joins at one control and may go on at another, which knows it as a pod and
// not as its node; one that has heard of the host before the pod does not forget it.
func TestPodsOfSeveral(t *testing.T) {
	t.Parallel()
	now := newClock()
	m := newMesh(t, 2, func(cfg *Config) { cfg.Now, cfg.Cluster = now.now, testCluster(); cfg.Cluster.Sidecars = true })
	a, b := m.controls[0], m.controls[1]
	a.follow(t, twoNodes(injected("p", "node-1", "10.1.0.9", "app"), pod("plain", "node-1", "10.1.0.8")))
	b.follow(t, twoNodes(pod("plain", "node-1", "10.1.0.8"))) // it has not heard of the pod yet
	h := a.joinNode(t, "own p")
	s := syncHost(t, h.hosts, nil)
	s.up(a.meshed(h, "p", "10.1.0.9"))
	s.waitAccepted("p")
	eventually(t, "the other control knows the host", func() bool { known, ok := b.model.host(h.id); return ok && known.Pod == "p" })
	if gone := b.model.gone(); len(gone) > 0 {
		t.Errorf("it would forget a pod that it has not heard of: %v", gone)
	}
	b.follow(t, ClusterChanges{Pods: []Pod{injected("p", "node-1", "10.1.0.9", "app")}})
	eventually(t, "and the workload", func() bool { return b.knows("p") })
	s.close()
	other := h.heard(s).at(t, b)
	s = syncHost(t, other.hosts, s)
	s.up(b.meshed(other, "p", "10.1.0.9"))
	s.waitAccepted("p")
	if _, err := issue(t, other.hosts, "p"); err != nil {
		t.Errorf("a certificate of the other control: %v", err)
	}
	s.up(b.meshed(other, "plain", "10.1.0.8"))
	s.refusedFor("plain", "speaks for itself alone")
	for _, r := range m.controls {
		r.follow(t, ClusterChanges{RemovedPods: []string{"p"}})
	}
	now.advance(settleIn)
	eventually(t, "no control knows the host any more", func() bool {
		_, first := a.model.host(h.id)
		_, second := b.model.host(h.id)
		return !first && !second
	})
	if _, err := other.hosts.Renew(t.Context(), &api.RenewRequest{Csr: csr(t, newKey(t))}); err == nil {
		t.Error("it is renewed")
	}
}
