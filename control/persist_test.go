package control

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/store"
)

// TestStoreAway locks the database from outside: people are told to wait, and
// everything that runs goes on. When it is back, nothing is missing.
func TestStoreAway(t *testing.T) {
	t.Parallel()
	r := start(t, nil)
	hosts := localHosts(t, r)
	a := syncHost(t, hosts, nil)
	a.up(a.workload("before", "bank", "s", 1, 80))
	a.waitAccepted("before")
	a.waitFor("service/bank/s")

	db, err := sql.Open("sqlite", filepath.Join(r.cfg.Data, "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	hold, err := db.Conn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer hold.Close()
	eventually(t, "the lock", func() bool {
		_, err := hold.ExecContext(t.Context(), "BEGIN IMMEDIATE")
		return err == nil
	})

	// Renewals and facts go on.
	if _, err := issue(t, hosts, "before"); err != nil {
		t.Errorf("renewal: %v", err)
	}
	a.up(a.workload("during", "bank", "s", 2, 80))
	a.waitAccepted("during")
	eventually(t, "its endpoint", func() bool { return len(a.get("service/bank/s").GetService().GetEndpoints()) == 2 })
	serial, err := issue(t, hosts, "during")
	if err != nil {
		t.Errorf("a certificate: %v", err)
	}
	// A new service has no address yet, and is not published without one.
	a.up(a.workload("new", "bank", "new", 3, 80))
	a.waitAccepted("new")
	a.waitFor("workload/new")
	// People are told.
	o := r.operator(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := o.CreateToken(ctx, &api.CreateTokenRequest{Covers: []string{"a/b"}, TtlSeconds: 60}); assay.KindOf(api.StatusError("token", err)) != assay.Unavailable {
		t.Errorf("token: %v", err)
	}
	eventually(t, "the check says so", func() bool {
		resp, err := o.Check(t.Context(), &api.CheckRequest{})
		return err == nil && slices.ContainsFunc(resp.Findings, func(f *api.Finding) bool { return f.Kind == "store-away" && f.Remedy != "" })
	})
	if a.get("service/bank/new") != nil {
		t.Error("a service without an address is published")
	}

	if _, err := hold.ExecContext(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	a.waitFor("service/bank/new")
	eventually(t, "the check is clean", func() bool {
		resp, err := o.Check(t.Context(), &api.CheckRequest{})
		return err == nil && !slices.ContainsFunc(resp.Findings, func(f *api.Finding) bool { return f.Kind == "store-away" })
	})
	a.close()
	r = r.restart(nil)
	workloads := documents[api.WorkloadView](t, r.operator(t), "workloads")
	if len(workloads) != 3 {
		t.Errorf("workloads after a restart: %s", show(workloads))
	}
	if len(serial) > 0 && !strings.Contains(show(documents[api.CertificateView](t, r.operator(t), "certificates")), fmt.Sprintf("%032x", serial[0].SerialNumber)) {
		t.Error("a certificate that was issued meanwhile is not in the inventory")
	}
}

// TestBoundsOfWhatWaits fills the queues of a store that is away.
func TestBoundsOfWhatWaits(t *testing.T) {
	b := newBehind(nil, nil)
	for i := range waitingFindings + 10 {
		b.finding(assay.Finding{Kind: "k", Subject: fmt.Sprint(i)})
	}
	if n := len(b.work.findings); n != waitingFindings {
		t.Errorf("%d findings wait", n)
	}
	if b.work.findings[0].Subject != "10" {
		t.Errorf("the oldest is %q", b.work.findings[0].Subject)
	}
	if _, dropped, _ := b.health(); dropped != 10 {
		t.Errorf("%d dropped", dropped)
	}
	w := &assay.Workload{ID: "w"}
	for range 1000 {
		b.workload("w", w)
	}
	b.gone("w", "h")
	if len(b.work.workloads) != 1 || b.work.workloads["w"].w != nil {
		t.Errorf("waiting: %v", b.work.workloads)
	}
	// What comes back does not undo what came later.
	old := emptyPending()
	old.workloads["w"], old.workloads["v"] = said{w: w}, said{w: w}
	b.keep(&old)
	if b.work.workloads["w"].w != nil || b.work.workloads["v"].w == nil {
		t.Errorf("kept: %v", b.work.workloads)
	}
}

// TestAddressesAreStable: a service keeps its address over restarts, also while
// none of its workloads runs.
func TestAddressesAreStable(t *testing.T) {
	r := start(t, nil)
	a := syncHost(t, localHosts(t, r), nil)
	want := map[string]string{}
	for i := range byte(5) {
		name := fmt.Sprint("s", i)
		a.up(a.workload(name, "bank", name, i+1, 80))
		want[name] = show(a.waitFor("service/bank/" + name).GetService().GetVips())
	}
	seen := map[string]bool{}
	for _, v := range want {
		seen[v] = true
	}
	if len(seen) != 5 {
		t.Errorf("addresses are shared: %v", want)
	}
	a.gone("s2")
	eventually(t, "s2 gone", func() bool { return a.get("workload/s2") == nil })
	a.close()
	r = r.restart(nil)
	b := syncHost(t, localHosts(t, r), nil)
	for name, v := range want {
		if got := b.waitFor("service/bank/" + name).GetService(); show(got.GetVips()) != v {
			t.Errorf("%s: %v before, %v after the restart", name, v, got.GetVips())
		}
	}
	if n := len(b.get("service/bank/s2").GetService().GetEndpoints()); n != 0 {
		t.Errorf("s2 has %d endpoints", n)
	}
}

// TestForgottenService: a day after its last workload, an implicit service is gone,
// and another may have its number.
func TestForgottenService(t *testing.T) {
	c := newClock()
	r := start(t, func(cfg *Config) { cfg.Now = c.now })
	a := syncHost(t, localHosts(t, r), nil)
	a.up(a.workload("w", "bank", "s", 1, 80))
	a.waitFor("service/bank/s")
	a.gone("w")
	eventually(t, "gone", func() bool { return a.get("workload/w") == nil })
	c.advance(23 * time.Hour)
	r.model.tick()
	if a.get("service/bank/s") == nil {
		t.Error("forgotten too early")
	}
	c.advance(2 * time.Hour)
	eventually(t, "forgotten", func() bool { return a.get("service/bank/s") == nil })
	eventually(t, "its number is released", func() bool {
		list, err := r.store.ListVIPs(t.Context())
		return err == nil && len(list) == 0
	})
}

// TestNothingIsLostAtTheEnd: what is issued while control stops is in the inventory
// of the next.
func TestNothingIsLostAtTheEnd(t *testing.T) {
	r := start(t, nil)
	hosts := localHosts(t, r)
	a := syncHost(t, hosts, nil)
	a.up(a.workload("w", "bank", "s", 1, 80))
	a.waitAccepted("w")
	r.cancel()
	r.done.Wait()
	// As a call does that was under way.
	r.model.issued(store.Certificate{Serial: "ff", Subject: "spiffe://bank.test/ns/bank/sa/s", Workload: "w", NotAfter: time.Now().Add(time.Hour), IssuedAt: time.Now()})
	r = r.restart(nil)
	if !strings.Contains(show(documents[api.CertificateView](t, r.operator(t), "certificates")), `"serial":"ff"`) {
		t.Error("a certificate is not in the inventory")
	}
}

func TestSecondControlIsRefused(t *testing.T) {
	r := start(t, nil)
	_, err := Open(t.Context(), r.cfg)
	if assay.KindOf(err) != assay.Conflict || !strings.Contains(err.Error(), fmt.Sprintf("process %d", os.Getpid())) {
		t.Errorf("got %v", err)
	}
	r.stop()
	c, err := Open(t.Context(), r.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	r.cfg.TrustDomain = "other.test"
	if _, err := Open(t.Context(), r.cfg); assay.KindOf(err) != assay.Conflict {
		t.Errorf("another trust domain: %v", err)
	}
	r.cfg.Store = "mysql://x"
	if _, err := Open(t.Context(), r.cfg); err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("another store: %v", err)
	}
}
