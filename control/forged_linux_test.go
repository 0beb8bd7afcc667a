package control

import (
	"testing"

	"assay.dev"
	"assay.dev/store"
)

// intruder is somebody who can write the database, and has nothing else.
func intruder(t *testing.T, url string) *store.DB {
	t.Helper()
	db, err := store.Open(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	db.Follow("intruder")
	return db
}

// TestForgedRecords: in a cluster whoever writes the database and has a node's certificate is worth
// the pods of that node all the same, and those as who they are.
func TestForgedRecords(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 1, func(cfg *Config) { cfg.Cluster = testCluster() })
	r := m.controls[0]
	r.follow(t, twoNodes(pod("own", "node-1", "10.0.1.1"), pod("other", "node-2", "10.0.2.1")))
	h := r.joinNode(t, "node-1")
	db := intruder(t, m.server.url())
	known, _ := r.model.host(h.id)
	for what, forge := range map[string]func(*store.Host){
		"a host with covers": func(h *store.Host) { h.Node, h.Covers = "", []string{"*/*"} },
		"another node":       func(h *store.Host) { h.Node = "node-2" },
	} {
		forged := known
		forge(&forged)
		if err := db.PutHost(t.Context(), forged); err != nil {
			t.Fatal(err)
		}
		eventually(t, what+" is heard", func() bool { now, _ := r.model.host(h.id); return now.Node == forged.Node })
		s := syncHost(t, h.hosts, nil)
		s.up(r.meshed(h, "other", "10.0.2.1"))
		s.waitRefused("other")
		if _, err := issue(t, h.hosts, "other"); err == nil {
			t.Errorf("%s: a certificate for another node's pod", what)
		}
		s.close()
		eventually(t, "the stream is gone", func() bool { present, _, _ := r.hostState(h.id); return !present })
	}
	if err := db.PutHost(t.Context(), known); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it is what it was", func() bool { now, _ := r.model.host(h.id); return now.Node == known.Node })
	as := func(change func(*assay.Workload)) assay.Workload {
		w := r.meshed(h, "own", "10.0.1.1")
		change(w)
		return *w
	}
	for what, w := range map[string]assay.Workload{
		"another identity":  as(func(w *assay.Workload) { w.Identity.Namespace, w.Identity.Account = "bank", "payments" }),
		"another namespace": as(func(w *assay.Workload) { w.Namespace, w.Identity.Namespace = "bank", "bank" }),
		"another domain":    as(func(w *assay.Workload) { w.Identity.TrustDomain = "evil.test" }),
	} {
		if err := db.PutWorkloads(t.Context(), w); err != nil {
			t.Fatal(err)
		}
		revision, err := db.Revision(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, what+" is heard", func() bool { return r.several.heardTo() >= revision })
		if r.knows("own") {
			t.Errorf("%s: it is taken", what)
		}
		if _, err := issue(t, h.hosts, "own"); err == nil {
			t.Errorf("%s: it gets a certificate", what)
		}
	}
}

// TestForgedWorkloadIsLeftOut: nor is a stored workload taken when control starts that has another
// identity than its own.
func TestForgedWorkloadIsLeftOut(t *testing.T) {
	t.Parallel()
	for _, driver := range []string{"postgres", "sqlite"} {
		t.Run(driver, func(t *testing.T) {
			t.Parallel()
			url := "sqlite:" + t.TempDir() + "/state.db"
			if driver == "postgres" {
				url = newServer(t).url()
			}
			r := startCluster(t, func(cfg *Config) { cfg.Store = url })
			r.follow(t, twoNodes())
			h := r.joinNode(t, "node-1")
			r.stop()
			db := intruder(t, url)
			w := r.meshed(h, "own", "10.0.1.1")
			w.Identity.Account = "payments"
			if err := db.PutWorkloads(t.Context(), *w); err != nil {
				t.Fatal(err)
			}
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
			again := r.restart(nil)
			if again.knows("own") {
				t.Error("it is taken")
			}
			if _, err := issue(t, h.at(t, again).hosts, "own"); err == nil {
				t.Error("it gets a certificate")
			}
		})
	}
}
