package control

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/store"
)

// endedCertificates stores count certificates that ended at the given time.
func endedCertificates(t *testing.T, db *store.DB, count int, ended time.Time) {
	t.Helper()
	var list []store.Certificate
	for i := range count {
		list = append(list, store.Certificate{Serial: fmt.Sprintf("%x-%04x", ended.Unix(), i), Subject: "spiffe://bank.test/ns/bank/sa/web",
			NotBefore: ended.Add(-24 * time.Hour), NotAfter: ended, IssuedAt: ended.Add(-24 * time.Hour)})
	}
	if err := db.InsertCertificates(t.Context(), list...); err != nil {
		t.Fatal(err)
	}
}

// endedAre reports whether the store has these certificates that ended, by the day before now.
func endedAre(t *testing.T, r *running, now time.Time, want map[int]int) bool {
	t.Helper()
	list, err := r.store.ListCertificates(t.Context(), "", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	got := map[int]int{}
	for _, c := range list {
		if c.NotAfter.Before(now) {
			got[int(now.Sub(c.NotAfter).Hours()/24)]++
		}
	}
	for day, n := range got {
		if want[day] != n {
			return false
		}
	}
	return len(got) == len(want)
}

// TestEndedCertificates: what ended longer ago than is kept is forgotten in batches, and nothing
// else is, also not what was given to somebody who lives.
func TestEndedCertificates(t *testing.T) {
	t.Parallel()
	now := time.Now()
	day := 24 * time.Hour
	r := start(t, nil)
	h := r.join(t, "h1", "bank/*")
	endedCertificates(t, r.store, store.PruneBatch+10, now.Add(-91*day))
	endedCertificates(t, r.store, 10, now.Add(-89*day-time.Hour))
	endedCertificates(t, r.store, 10, now.Add(-day-time.Hour))
	r = r.restart(nil)
	eventually(t, "the default", func() bool { return endedAre(t, r, now, map[int]int{89: 10, 1: 10}) })
	r = r.restart(func(cfg *Config) { cfg.KeepEnded = 7 * day })
	eventually(t, "a week", func() bool { return endedAre(t, r, now, map[int]int{1: 10}) })
	if !slices.ContainsFunc(r.model.certificatesOf(assay.Infrastructure(r.TrustDomain(), "host", h.id).String()), func(c store.Certificate) bool { return c.Host == h.id }) {
		t.Error("the host's own certificate is forgotten")
	}
	cfg := r.cfg
	cfg.Data, cfg.Store, cfg.KeepEnded = t.TempDir(), "", time.Minute
	if c, err := Open(t.Context(), cfg); assay.KindOf(err) != assay.Invalid {
		t.Errorf("a minute: %v, %v", c, err)
	}
}

// TestEndedCertificatesOfSeveral: controls on one store that all begin at once come to the same.
func TestEndedCertificatesOfSeveral(t *testing.T) {
	t.Parallel()
	now := time.Now()
	m := newMesh(t, 0, nil)
	db, err := store.Open(t.Context(), m.server.url())
	if err != nil {
		t.Fatal(err)
	}
	endedCertificates(t, db, 3*store.PruneBatch, now.Add(-91*24*time.Hour))
	endedCertificates(t, db, 10, now.Add(-89*24*time.Hour-time.Hour))
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	m.add()
	m.add()
	eventually(t, "the old ones are forgotten", func() bool { return endedAre(t, m.controls[1], now, map[int]int{89: 10}) })
}
