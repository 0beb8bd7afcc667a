package store

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"assay.dev"
)

// as returns the same store as another process sees it.
func (db *DB) as(t testing.TB, origin string) *DB {
	t.Helper()
	e := &engine{dialect: db.dialect, name: db.name, w: db.w, r: db.r, turns: db.turns, patience: db.patience}
	other := &DB{engine: e}
	other.Follow(origin)
	return other
}

func pod(id, host, addr string) assay.Workload {
	return assay.Workload{ID: id, Host: host, Name: "app", Namespace: "bank", Addrs: []netip.Addr{netip.MustParseAddr(addr)}}
}

// testFollow: what one process writes another hears of, once, by name; not what it wrote
// itself.
func testFollow(t *testing.T, db *DB) {
	ctx := t.Context()
	check(t, db.PutHost(ctx, Host{Host: assay.Host{ID: "old"}, Joined: time.Now()})) // nobody follows
	a, b := db.as(t, "a"), db.as(t, "b")
	start := must(a.Revision(ctx))(t)
	check(t, a.PutHost(ctx, Host{Host: assay.Host{ID: "h1"}, Joined: time.Now()}))
	check(t, a.InsertCertificates(ctx, Certificate{Serial: "01", NotAfter: time.Now()}, Certificate{Serial: "02", NotAfter: time.Now()}))
	check(t, a.PutMeta(ctx, "m", []byte("x")))
	check(t, a.Audited(Audit{Who: "w", Call: "c"}).PutMeta(ctx, "m", []byte("y")))
	check(t, b.PutMeta(ctx, "mine", []byte("z")))
	revision, changed, err := b.Since(ctx, start)
	check(t, err)
	if revision != start+5 {
		t.Errorf("5 writes took revision %d to %d", start, revision)
	}
	if !slices.Equal(changed[OfHost], []string{"h1"}) || len(changed[OfCertificate]) != 2 || !slices.Equal(changed[OfMeta], []string{"m"}) || len(changed[OfAudit]) != 1 {
		t.Errorf("changed: %v", changed)
	}
	if list := must(b.CertificatesBySerial(ctx, changed[OfCertificate]...))(t); len(list) != 2 {
		t.Errorf("certificates: %v", list)
	}
	if list := must(b.AuditByID(ctx, changed[OfAudit]...))(t); len(list) != 1 || list[0].Who != "w" {
		t.Errorf("audit: %v", list)
	}
	if again, none, err := b.Since(ctx, revision); err != nil || again != revision || len(none) != 0 {
		t.Errorf("nothing new: %d, %v, %v", again, none, err)
	}
	// A write that changes nothing leaves nothing.
	if err := b.DeleteWorkloads(ctx, "nobody"); err != nil || must(b.Revision(ctx))(t) != revision {
		t.Errorf("removing nobody: %v, revision %d", err, must(b.Revision(ctx))(t))
	}
	must(db.w.ExecContext(ctx, `UPDATE change SET at = 1`))(t)
	a.forgetChanges(ctx)
	if _, _, err := b.Since(ctx, start); !errors.Is(err, ErrForgotten) {
		t.Errorf("changes that are not kept: %v", err)
	}
	if _, _, err := b.Since(ctx, revision); err != nil {
		t.Error(err)
	}
	check(t, b.PutMeta(ctx, "young", nil))
	a.forgetChanges(ctx)
	if _, changed, err := a.Since(ctx, revision); err != nil || !slices.Equal(changed[OfMeta], []string{"young"}) {
		t.Errorf("a change of now: %v, %v", changed, err)
	}
}

// TestFollowByTheStoresClock: what a process writes whose clock is far behind is kept as long as
// what others write.
func TestFollowByTheStoresClock(t *testing.T) {
	path := "sqlite:" + filepath.Join(t.TempDir(), "state.db")
	var start int64
	synctest.Test(t, func(t *testing.T) { // begins in 2000, for this process
		db := must(Open(t.Context(), path))(t)
		db.Follow("behind")
		start = must(db.Revision(t.Context()))(t)
		check(t, db.PutMeta(t.Context(), "m", nil))
		check(t, db.Close())
	})
	db := must(Open(t.Context(), path))(t)
	defer db.Close()
	db.Follow("right")
	db.forgetChanges(t.Context())
	if _, changed, err := db.Since(t.Context(), start); err != nil || !slices.Equal(changed[OfMeta], []string{"m"}) {
		t.Errorf("%v, %v", changed, err)
	}
}

// testFollowConcurrently: whoever follows misses nothing that several write at once.
func testFollowConcurrently(t *testing.T, db *DB) {
	ctx := t.Context()
	const writers, each = 4, 15
	reader := db.as(t, "reader")
	after := must(reader.Revision(ctx))(t)
	var all sync.WaitGroup
	for w := range writers {
		mine := db.as(t, fmt.Sprint("w", w))
		all.Go(func() {
			for i := range each {
				if err := mine.PutMeta(ctx, fmt.Sprintf("%d/%d", w, i), nil); err != nil {
					t.Error(err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { all.Wait(); close(done) }()
	seen := map[string]bool{}
	for ended := false; ; {
		select {
		case <-done:
			ended = true
		default:
		}
		revision, changed, err := reader.Since(ctx, after)
		check(t, err)
		for _, name := range changed[OfMeta] {
			if seen[name] {
				t.Errorf("%s twice", name)
			}
			seen[name] = true
		}
		if after = revision; ended && len(changed) == 0 {
			break
		}
	}
	if len(seen) != writers*each {
		t.Errorf("%d of %d writes were seen", len(seen), writers*each)
	}
}

// testAttached: who has a host's stream speaks for its workloads, and nobody else; an
// address has one workload, whoever reports.
func testAttached(t *testing.T, db *DB) {
	ctx := t.Context()
	a, b := db.as(t, "a"), db.as(t, "b")
	hosts := map[string]Host{}
	for _, id := range []string{"h1", "h2"} {
		hosts[id] = Host{Host: assay.Host{ID: id}, Joined: time.Now()}
		check(t, a.PutHost(ctx, hosts[id]))
	}
	attach := func(db *DB, id string) {
		t.Helper()
		if found, err := db.AttachHost(ctx, hosts[id]); err != nil || !found {
			t.Fatalf("attach %s: %v, %v", id, found, err)
		}
	}
	report := func(db *DB, put []assay.Workload, gone []Gone, want ...string) []Rejected {
		t.Helper()
		rejected := must(db.ReportWorkloads(ctx, put, gone))(t)
		var ids []string
		for _, r := range rejected {
			ids = append(ids, r.ID)
		}
		if !slices.Equal(ids, want) {
			t.Errorf("rejected: %v, want %v", rejected, want)
		}
		return rejected
	}
	attach(a, "h1")
	attach(b, "h2")
	report(a, []assay.Workload{pod("w1", "h1", "10.0.0.1")}, nil)
	// Another host's address and ID.
	r := report(b, []assay.Workload{pod("w2", "h2", "10.0.0.1"), pod("w1", "h2", "10.0.0.9"), pod("w3", "h2", "10.0.0.3")}, nil, "w2", "w1")
	if taken, ok := r[0].Cause.(AddressTaken); !ok || taken.Owner != "w1" {
		t.Errorf("w2: %v", r[0].Cause)
	}
	// Its own next workload takes its address; so does another host's once it is free.
	report(a, []assay.Workload{pod("w4", "h1", "10.0.0.1")}, []Gone{{"w1", "h1"}})
	report(b, []assay.Workload{pod("w2", "h2", "10.0.0.1")}, nil, "w2")
	report(a, nil, []Gone{{"w4", "h1"}})
	report(b, []assay.Workload{pod("w2", "h2", "10.0.0.1")}, nil)
	// The host goes elsewhere: what it said here before counts no more.
	attach(b, "h1")
	report(a, []assay.Workload{pod("w5", "h1", "10.0.0.5")}, []Gone{{"w3", "h2"}}, "w3", "w5")
	check(t, a.DetachHost(ctx, "h1", time.Now())) // not its to detach
	report(b, []assay.Workload{pod("w5", "h1", "10.0.0.5")}, nil)
	check(t, a.AcknowledgeHost(ctx, "h1", 7))
	check(t, b.AcknowledgeHost(ctx, "h2", 8))
	// The platform's word counts always.
	report(a, nil, []Gone{{"w3", ""}})
	var ids []string
	for _, w := range must(db.ListWorkloads(ctx, ""))(t) {
		ids = append(ids, w.ID)
	}
	if !slices.Equal(ids, []string{"w2", "w5"}) {
		t.Errorf("workloads: %v", ids)
	}
	if list := must(db.WorkloadsByID(ctx, "w2", "w3"))(t); len(list) != 1 || list[0].ID != "w2" {
		t.Errorf("by ID: %v", list)
	}
	list := must(db.ListHosts(ctx))(t)
	if list[0].Replica != "b" || list[0].Bundle != 0 || list[1].Bundle != 8 {
		t.Errorf("hosts: %+v", list)
	}
	// b ends.
	check(t, b.Beat(ctx, "10.0.0.2:7400"))
	check(t, a.Beat(ctx, ""))
	check(t, b.Beat(ctx, "10.0.0.2:7400"))
	if list := must(a.ListReplicas(ctx))(t); len(list) != 2 || list[1] != (Replica{"b", "10.0.0.2:7400", 2}) {
		t.Errorf("replicas: %v", list)
	}
	check(t, a.RemoveReplica(ctx, "b", 1)) // it beat since
	check(t, a.RemoveReplica(ctx, "b", 2))
	for _, h := range must(db.ListHosts(ctx))(t) {
		if h.Replica != "" {
			t.Errorf("host %s is attached to %s, which has ended", h.ID, h.Replica)
		}
	}
	// A removed host is not attached again.
	must(db.DeleteHost(ctx, "h2"))(t)
	if found, err := b.AttachHost(ctx, hosts["h2"]); err != nil || found {
		t.Errorf("a removed host was attached: %v, %v", found, err)
	}
	report(b, []assay.Workload{pod("w9", "h2", "10.0.0.1")}, nil, "w9")
}

// testOneAddress: of many that report one address at once, one has it.
func testOneAddress(t *testing.T, db *DB) {
	ctx := t.Context()
	const n = 4
	var taken, all sync.WaitGroup
	won := make(chan string, n)
	for i := range n {
		mine, host := db.as(t, fmt.Sprint("r", i)), fmt.Sprint("h", i)
		check(t, mine.PutHost(ctx, Host{Host: assay.Host{ID: host}, Joined: time.Now()}))
		must(mine.AttachHost(ctx, Host{Host: assay.Host{ID: host}}))(t)
		taken.Add(1)
		all.Go(func() {
			taken.Done()
			taken.Wait()
			rejected, err := mine.ReportWorkloads(ctx, []assay.Workload{pod(fmt.Sprint("w", i), host, "10.0.0.1")}, nil)
			if err != nil {
				t.Error(err)
			} else if len(rejected) == 0 {
				won <- host
			}
		})
	}
	all.Wait()
	if len(won) != 1 {
		t.Errorf("%d have the address", len(won))
	}
}

// testClaims: pods that may be meshed, by host.
func testClaims(t *testing.T, db *DB) {
	ctx := t.Context()
	check(t, db.SetClaims(ctx, map[string]string{"p1": "h1", "p2": "h2", "p3": "h1"}))
	check(t, db.SetClaims(ctx, map[string]string{"p1": "", "p2": "h3"}))
	if got := must(db.ListClaims(ctx))(t); len(got) != 2 || got["p2"] != "h3" || got["p3"] != "h1" {
		t.Errorf("claims: %v", got)
	}
	must(db.DeleteHost(ctx, "h3"))(t)
	if got := must(db.ListClaims(ctx))(t); len(got) != 1 {
		t.Errorf("after the host's removal: %v", got)
	}
}

// testChangedObjects: what was planned with objects that another changed is not stored.
func testChangedObjects(t *testing.T, db *DB) {
	ctx := t.Context()
	a, b := db.as(t, "a"), db.as(t, "b")
	object := func(name string) []Object {
		return []Object{{Kind: "Service", Namespace: "bank", Name: name, Spec: []byte(`{}`)}}
	}
	must(a.ReplaceObjects(ctx, "apply", object("one"), Replace{}))(t)
	since := must(b.Revision(ctx))(t)
	must(b.ReplaceObjects(ctx, "apply", object("two"), Replace{Since: since}))(t)
	if _, err := a.ReplaceObjects(ctx, "apply", object("three"), Replace{Since: since}); !errors.Is(err, ErrChanged) {
		t.Errorf("planned before another's change: %v", err)
	}
	one := Key{"Service", "bank", "one"}
	if _, err := a.DeleteObject(ctx, one, since); !errors.Is(err, ErrChanged) {
		t.Errorf("a removal that was planned before another's change: %v", err)
	}
	if list := must(a.ListObjects(ctx, one))(t); len(list) != 1 {
		t.Errorf("it is removed all the same: %v", list)
	}
	must(b.ReplaceObjects(ctx, "apply", object("four"), Replace{Since: since}))(t) // its own changes it knows
	equal(t, "removed", must(b.DeleteObject(ctx, one, since))(t), true)
	if _, err := a.ReplaceObjects(ctx, "apply", object("two"), Replace{Since: must(a.Revision(ctx))(t) - 1}); !errors.Is(err, ErrChanged) {
		t.Errorf("planned before another's removal: %v", err)
	}
	// What has changed since then is not known any more.
	since = must(a.Revision(ctx))(t)
	must(b.ReplaceObjects(ctx, "apply", object("five"), Replace{}))(t)
	must(db.w.ExecContext(ctx, `UPDATE change SET at = 1`))(t)
	b.forgetChanges(ctx)
	if _, err := a.ReplaceObjects(ctx, "apply", object("six"), Replace{Since: since}); !errors.Is(err, ErrChanged) {
		t.Errorf("planned before what is forgotten: %v", err)
	}
}
