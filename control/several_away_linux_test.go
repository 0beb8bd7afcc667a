package control

import (
	"fmt"
	"net"
	"testing"
	"time"

	"assay.dev/api"
)

// TestCutOff: a control that alone has lost the database lets its hosts go and signs nothing,
// while another rotates; when it is back it serves what has come to be.
func TestCutOff(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 2, nil)
	a, b := m.controls[0], m.controls[1]
	h := b.join(t, "one", "bank/*")
	s := syncHost(t, h.hosts, nil)
	s.up(s.workload("w1", "bank", "payments", 1, 8080))
	s.synced()
	s.waitAccepted("w1")
	eventually(t, "both know each other and the host", func() bool { return len(a.reach(alive)) == 1 && len(b.reach(alive)) == 1 && a.knows("w1") })
	m.lines[1].set(true)
	s.waitEnd()
	eventually(t, "it takes no connection", func() bool {
		conn, err := net.Dial("tcp", b.remote.String())
		if err == nil {
			conn.Close()
		}
		return err != nil
	})
	moved := syncHost(t, h.at(t, a).hosts, s)
	moved.up(moved.workload("w1", "bank", "payments", 1, 8080))
	moved.up(moved.workload("w2", "bank", "payments", 2, 8080))
	moved.synced()
	moved.waitAccepted("w2")
	old := a.authority.State()
	resp, err := a.operator(t).Rotate(t.Context(), &api.RotateRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"w1", "w2", ""} {
		moved.ack(id, resp.BundleVersion)
	}
	eventually(t, "the new root signs", func() bool { return a.authority.State().Infrastructure.Root != old.Infrastructure.Root })
	if b.authority.State().Infrastructure.Root != old.Infrastructure.Root {
		t.Fatal("the line is not cut")
	}
	m.lines[1].set(false)
	eventually(t, "it serves again", func() bool {
		conn, err := net.Dial("tcp", b.remote.String())
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	if !b.knows("w2") {
		t.Error("it serves before it has heard what has changed")
	}
	if present, lost, _ := a.hostState(h.id); !present || lost {
		t.Errorf("the host: present %v, lost %v", present, lost)
	}
	eventually(t, "it signs with what the other signs with", func() bool {
		chain, err := issue(t, h.heard(moved).at(t, b).hosts, "w1")
		return err == nil && chain[1].Subject.CommonName == a.authority.State().Workload.ID
	})
}

// TestCutOffAfterAll: a control that alone has lost the database notices also when nobody had it
// for longer than it takes to be taken for dead.
func TestCutOffAfterAll(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 2, nil)
	a, b := m.controls[0], m.controls[1]
	eventually(t, "they know each other", func() bool { return len(a.reach(alive)) == 1 && len(b.reach(alive)) == 1 })
	m.lines[0].set(true)
	eventually(t, "it takes itself for cut off", func() bool {
		a.several.mu.Lock()
		for _, o := range a.several.others {
			o.grew = o.grew.Add(-time.Hour) // as it would be then
		}
		a.several.mu.Unlock()
		return a.several.cutOff()
	})
}

// TestStoreAwayForAll: while the database is away nobody is cut off: what is known is served,
// renewals go on, and what was reported meanwhile is everybody's when it is back.
func TestStoreAwayForAll(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 2, func(cfg *Config) { cfg.Lease = 2 * time.Second })
	a, b := m.controls[0], m.controls[1]
	h1, h2 := a.join(t, "one", "bank/*"), b.join(t, "two", "bank/*")
	s1, s2 := syncHost(t, h1.hosts, nil), syncHost(t, h2.hosts, nil)
	s1.up(s1.workload("w1", "bank", "payments", 1, 8080))
	s1.synced()
	s1.waitAccepted("w1")
	s2.waitFor("workload/w1")
	eventually(t, "they know each other", func() bool { return len(a.reach(alive)) == 1 && len(b.reach(alive)) == 1 })
	m.server.kill()
	s1.up(s1.workload("w2", "bank", "payments", 2, 8080))
	s1.waitAccepted("w2")
	for i, r := range m.controls {
		eventually(t, fmt.Sprintf("control %d has noticed", i), func() bool {
			resp, err := r.Status(t.Context(), nil)
			return err == nil && !resp.GetStore()
		})
		if _, err := issue(t, h1.at(t, r).hosts, "w1"); err != nil {
			t.Errorf("control %d signs nothing without the store: %v", i, err)
		}
		if r.several.cutOff() {
			t.Errorf("control %d takes itself for cut off", i)
		}
	}
	if _, err := issue(t, h1.hosts, "w2"); err != nil {
		t.Errorf("a new workload: %v", err)
	}
	if s2.get("workload/w1") == nil {
		t.Error("a workload is forgotten")
	}
	m.server.start()
	s2.waitFor("workload/w2")
	for i, r := range m.controls {
		if _, lost, _ := r.hostState(h1.id); lost {
			t.Errorf("control %d: the host is lost", i)
		}
	}
}
