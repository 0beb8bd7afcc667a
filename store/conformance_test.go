package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"assay.dev"
)

// Every engine passes the same suite.
func TestConformanceSQLite(t *testing.T) {
	conformance(t, func(t testing.TB) string { return "sqlite:" + filepath.Join(t.TempDir(), "state.db") })
}

// conformance runs the suite; fresh returns the URL of an empty store.
func conformance(t *testing.T, fresh func(testing.TB) string) {
	for _, c := range []struct {
		name string
		test func(*testing.T, *DB)
	}{
		{"Objects", testObjects},
		{"ReplaceObjects", testReplaceObjects},
		{"Status", testStatus},
		{"Hosts", testHosts},
		{"Tokens", testTokens},
		{"TokenOnce", testTokenOnce},
		{"Workloads", testWorkloads},
		{"Allocate", testAllocate},
		{"AllocateConcurrently", testAllocateConcurrently},
		{"Certificates", testCertificates},
		{"PruneConcurrently", testPruneConcurrently},
		{"Audit", testAudit},
		{"AuditIsAtomic", testAuditIsAtomic},
		{"Findings", testFindings},
		{"Meta", testMeta},
		{"CompareAndSet", testCompareAndSet},
		{"BytewiseOrder", testBytewiseOrder},
		{"Text", testText},
		{"Cancelled", testCancelled},
		{"ReadsSeeOneState", testReadsSeeOneState},
		{"Follow", testFollow},
		{"FollowConcurrently", testFollowConcurrently},
		{"Attached", testAttached},
		{"OneAddress", testOneAddress},
		{"Claims", testClaims},
		{"ChangedObjects", testChangedObjects},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, openTest(t, fresh(t))) })
	}
	t.Run("Reopen", func(t *testing.T) { testReopen(t, fresh(t)) })
	t.Run("NewerSchema", func(t *testing.T) { testNewerSchema(t, fresh(t)) })
	t.Run("ForeignTables", func(t *testing.T) { testForeignTables(t, fresh(t)) })
}

func openTest(t testing.TB, url string) *DB {
	t.Helper()
	db, err := Open(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	return db
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func wantKind(t *testing.T, err error, kind assay.Kind) {
	t.Helper()
	if e, ok := errors.AsType[*assay.Error](err); !ok || e.Kind != kind {
		t.Fatalf("error %v: want one of kind %s", err, kind)
	}
}

func equal[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Fatalf("%s:\n got %+v\nwant %+v", what, got, want)
	}
}

var day = time.Date(2026, 3, 29, 1, 30, 0, 123456000, time.UTC)

func testObjects(t *testing.T, db *DB) {
	ctx := t.Context()
	o := Object{Kind: "Service", Namespace: "bank", Name: "payments", Spec: json.RawMessage(`{"a":1}`), Source: "apply"}
	equal(t, "first put", must(db.PutObject(ctx, o))(t).Action, Created)
	equal(t, "same put", must(db.PutObject(ctx, o))(t).Action, Unchanged)
	first := must(db.ListObjects(ctx, o.Key()))(t)
	if len(first) != 1 || first[0].Generation != 1 || string(first[0].Spec) != `{"a":1}` || first[0].Created.IsZero() || first[0].Status != nil {
		t.Fatalf("after two puts: %+v", first)
	}
	o.Spec = json.RawMessage(`{"a":2}`)
	equal(t, "new spec", must(db.PutObject(ctx, o))(t).Action, Changed)
	second := must(db.ListObjects(ctx, o.Key()))(t)
	if second[0].Generation != 2 || second[0].Created != first[0].Created || !second[0].Changed.After(first[0].Changed) {
		t.Fatalf("after a change: %+v, before: %+v", second, first)
	}
	must(db.PutObject(ctx, Object{Kind: "Service", Namespace: "shop", Name: "payments", Spec: json.RawMessage(`{}`), Source: "apply"}))(t)
	must(db.PutObject(ctx, Object{Kind: "MeshConfig", Namespace: "bank", Name: "default", Spec: json.RawMessage(`{}`), Source: "apply"}))(t)
	for _, c := range []struct {
		match Key
		want  int
	}{{Key{}, 3}, {Key{Kind: "Service"}, 2}, {Key{Namespace: "bank"}, 2}, {Key{Name: "payments"}, 2}, {Key{Kind: "Route"}, 0}} {
		if got := must(db.ListObjects(ctx, c.match))(t); len(got) != c.want {
			t.Errorf("ListObjects(%v) = %v, want %d", c.match, got, c.want)
		}
	}
	equal(t, "delete", must(db.DeleteObject(ctx, o.Key(), 0))(t), true)
	equal(t, "delete again", must(db.DeleteObject(ctx, o.Key(), 0))(t), false)
	_, err := db.PutObject(ctx, Object{Kind: "Service", Name: "x", Spec: json.RawMessage(`{`)})
	wantKind(t, err, assay.Invalid)
}

func testReplaceObjects(t *testing.T, db *DB) {
	ctx := t.Context()
	object := func(name, spec string) Object {
		return Object{Kind: "Service", Namespace: "bank", Name: name, Spec: json.RawMessage(spec)}
	}
	set := func(changes []Change) string {
		var s []string
		for _, c := range changes {
			s = append(s, c.Name+" "+string(c.Action))
		}
		return strings.Join(s, ", ")
	}
	names := func() string {
		var s []string
		for _, o := range must(db.ListObjects(ctx, Key{}))(t) {
			s = append(s, fmt.Sprintf("%s %s %s %d", o.Name, o.Spec, o.Source, o.Generation))
		}
		return strings.Join(s, ", ")
	}
	must(db.ReplaceObjects(ctx, "config", []Object{object("z", `1`)}, Replace{}))(t)
	equal(t, "put a b", set(must(db.ReplaceObjects(ctx, "apply", []Object{object("b", `1`), object("a", `1`)}, Replace{}))(t)), "a created, b created")
	next := []Object{object("b", `2`), object("c", `1`)}
	equal(t, "dry run", set(must(db.ReplaceObjects(ctx, "apply", next, Replace{Prune: true, DryRun: true}))(t)), "a removed, b changed, c created")
	equal(t, "nothing stored", names(), "a 1 apply 1, b 1 apply 1, z 1 config 1")
	equal(t, "prune", set(must(db.ReplaceObjects(ctx, "apply", next, Replace{Prune: true}))(t)), "a removed, b changed, c created")
	equal(t, "again", set(must(db.ReplaceObjects(ctx, "apply", next, Replace{Prune: true}))(t)), "b unchanged, c unchanged")
	equal(t, "stored", names(), "b 2 apply 2, c 1 apply 1, z 1 config 1")

	// All or nothing: d comes before the conflict or after, and is not there.
	_, err := db.ReplaceObjects(ctx, "apply", []Object{object("d", `1`), object("z", `2`)}, Replace{})
	wantKind(t, err, assay.Conflict)
	if !strings.Contains(err.Error(), "bank/z") || !strings.Contains(err.Error(), "config") {
		t.Errorf("conflict does not name object and owner: %v", err)
	}
	equal(t, "after conflict", names(), "b 2 apply 2, c 1 apply 1, z 1 config 1")
	equal(t, "adopt", set(must(db.ReplaceObjects(ctx, "apply", []Object{object("z", `1`)}, Replace{Adopt: true}))(t)), "z changed")
	equal(t, "adopted", names(), "b 2 apply 2, c 1 apply 1, z 1 apply 2")
	_, err = db.ReplaceObjects(ctx, "apply", []Object{object("d", `1`), object("d", `2`)}, Replace{})
	wantKind(t, err, assay.Invalid)
}

func testStatus(t *testing.T, db *DB) {
	ctx := t.Context()
	o := Object{Kind: "Service", Namespace: "bank", Name: "a", Spec: json.RawMessage(`1`), Source: "apply"}
	must(db.PutObject(ctx, o))(t)
	equal(t, "set", must(db.SetStatus(ctx, o.Key(), 1, json.RawMessage(`{"ready":true}`)))(t), true)
	equal(t, "other generation", must(db.SetStatus(ctx, o.Key(), 2, json.RawMessage(`{}`)))(t), false)
	o.Spec = json.RawMessage(`2`)
	must(db.PutObject(ctx, o))(t)
	got := must(db.ListObjects(ctx, o.Key()))(t)[0]
	equal(t, "kept status", string(got.Status), `{"ready":true}`)
	equal(t, "old generation", must(db.SetStatus(ctx, o.Key(), 1, json.RawMessage(`{}`)))(t), false)
	equal(t, "unknown object", must(db.SetStatus(ctx, Key{"Service", "bank", "b"}, 1, json.RawMessage(`{}`)))(t), false)
}

func testHosts(t *testing.T, db *DB) {
	ctx := t.Context()
	h := Host{Host: assay.Host{ID: "h1", Name: "metal-1", Advertise: netip.MustParseAddr("192.0.2.7"),
		Prefixes: []netip.Prefix{netip.MustParsePrefix("10.181.1.0/24")}, Covers: []string{"bank/*"}}, Joined: day, Seen: day}
	check(t, db.PutHost(ctx, h))
	h.Seen, h.Joined, h.Ready = day.Add(time.Hour), day.Add(time.Hour), true
	check(t, db.PutHost(ctx, h))
	h.Joined = day // the first one stands
	equal(t, "hosts", must(db.ListHosts(ctx))(t), []Host{h})

	must(db.AllocatePrefix(ctx, "h1", 10))(t)
	check(t, db.PutWorkloads(ctx, assay.Workload{ID: "w1", Host: "h1"}, assay.Workload{ID: "w2", Host: "h2"}))
	equal(t, "delete", must(db.DeleteHost(ctx, "h1"))(t), true)
	equal(t, "delete again", must(db.DeleteHost(ctx, "h1"))(t), false)
	if left := must(db.ListWorkloads(ctx, ""))(t); len(left) != 1 || left[0].ID != "w2" {
		t.Errorf("workloads left: %+v", left)
	}
	wantKind(t, db.PutHost(ctx, Host{}), assay.Invalid)
}

func testTokens(t *testing.T, db *DB) {
	ctx := t.Context()
	token := Token{ID: "t1", Hash: []byte{0, 1, 255}, Covers: []string{"bank/*"}, Creator: "uid 0", Created: day, Expires: day.Add(time.Hour)}
	check(t, db.CreateToken(ctx, token))
	check(t, db.CreateToken(ctx, token))
	equal(t, "tokens", must(db.ListTokens(ctx))(t), []Token{token})
	other := token
	other.Hash = []byte{7}
	wantKind(t, db.CreateToken(ctx, other), assay.Conflict)

	_, err := db.ConsumeToken(ctx, "t2", token.Hash, "key-a", day)
	wantKind(t, err, assay.NotFound)
	_, err = db.ConsumeToken(ctx, "t1", []byte{0, 1, 254}, "key-a", day)
	wantKind(t, err, assay.NotFound)
	_, err = db.ConsumeToken(ctx, "t1", token.Hash, "key-a", token.Expires)
	wantKind(t, err, assay.Denied)
	token.Consumer, token.Consumed = "key-a", day.Add(time.Minute)
	equal(t, "consumed", must(db.ConsumeToken(ctx, "t1", token.Hash, "key-a", day.Add(time.Minute)))(t), token)
	equal(t, "repeated join", must(db.ConsumeToken(ctx, "t1", token.Hash, "key-a", day.Add(time.Hour)))(t), token)
	_, err = db.ConsumeToken(ctx, "t1", token.Hash, "key-b", day.Add(time.Minute))
	wantKind(t, err, assay.Conflict)
	equal(t, "delete", must(db.DeleteToken(ctx, "t1"))(t), true)
	equal(t, "delete again", must(db.DeleteToken(ctx, "t1"))(t), false)
}

func testTokenOnce(t *testing.T, db *DB) {
	ctx := t.Context()
	check(t, db.CreateToken(ctx, Token{ID: "t", Hash: []byte{1}, Expires: day}))
	var mu sync.Mutex
	var winners []string
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			by := fmt.Sprintf("key-%d", i)
			switch _, err := db.ConsumeToken(ctx, "t", []byte{1}, by, day.Add(-time.Hour)); {
			case err == nil:
				mu.Lock()
				winners = append(winners, by)
				mu.Unlock()
			case assay.KindOf(err) != assay.Conflict:
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if len(winners) != 1 || must(db.ListTokens(ctx))(t)[0].Consumer != winners[0] {
		t.Fatalf("consumed by %v", winners)
	}
}

func testWorkloads(t *testing.T, db *DB) {
	ctx := t.Context()
	w := assay.Workload{ID: "w1", Namespace: "bank", Name: "payments", Host: "h1",
		Identity: assay.Identity{TrustDomain: "bank.example", Namespace: "bank", Account: "payments"},
		Addrs:    []netip.Addr{netip.MustParseAddr("10.181.1.2"), netip.MustParseAddr("fd5a:5a59::1")},
		Labels:   map[string]string{"v": "1"}, Ports: []uint16{80}, MeshedSince: day,
		Artifacts: assay.ArtifactSet{{Kind: assay.Executable, Name: "/bin/true", Digest: assay.DigestOf(nil)},
			{Kind: assay.Image, Name: "shop:1", Digest: assay.DigestOf([]byte("manifest")), Config: assay.DigestOf([]byte("config")), Index: assay.DigestOf([]byte("index"))}}}
	check(t, db.PutWorkloads(ctx, w, assay.Workload{ID: "w2", Host: "h1"}, assay.Workload{ID: "w3", Host: "h2"}))
	w.Draining = true
	check(t, db.PutWorkloads(ctx, w))
	got := must(db.ListWorkloads(ctx, "h1"))(t)
	if len(got) != 2 {
		t.Fatalf("workloads of h1: %+v", got)
	}
	equal(t, "round trip", got[0], w)
	check(t, db.DeleteWorkloads(ctx, "w1", "w3", "unknown"))
	if got := must(db.ListWorkloads(ctx, ""))(t); len(got) != 1 || got[0].ID != "w2" {
		t.Fatalf("left: %+v", got)
	}
	wantKind(t, db.PutWorkloads(ctx, assay.Workload{ID: "w4"}, assay.Workload{}), assay.Invalid)
	if got := must(db.ListWorkloads(ctx, ""))(t); len(got) != 1 {
		t.Fatalf("half of a refused set was stored: %+v", got)
	}
	check(t, db.PutWorkloads(ctx))
}

func testAllocate(t *testing.T, db *DB) {
	ctx := t.Context()
	take := func(service string) int64 { t.Helper(); return must(db.AllocateVIP(ctx, service, 3))(t) }
	equal(t, "first", take("bank/a"), 1)
	equal(t, "second", take("bank/b"), 2)
	equal(t, "stable", take("bank/a"), 1)
	check(t, db.ReleaseVIP(ctx, "bank/a"))
	check(t, db.ReleaseVIP(ctx, "bank/a"))
	equal(t, "a released number waits", take("bank/c"), 3)
	equal(t, "until all others were given out", take("bank/d"), 1)
	_, err := db.AllocateVIP(ctx, "bank/e", 3)
	wantKind(t, err, assay.Unavailable)
	equal(t, "list", must(db.ListVIPs(ctx))(t), map[string]int64{"bank/b": 2, "bank/c": 3, "bank/d": 1})
	equal(t, "spaces are apart", must(db.AllocatePrefix(ctx, "bank/a", 3))(t), 1)
	must(db.DeleteHost(ctx, "bank/a"))(t)
	equal(t, "larger network", must(db.AllocateVIP(ctx, "bank/e", 5000))(t), 4)
}

func testAllocateConcurrently(t *testing.T, db *DB) {
	ctx := t.Context()
	const writers, services = 8, 10
	got := make([][services]int64, writers)
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for s := range services {
				n, err := db.AllocateVIP(ctx, fmt.Sprintf("bank/s%d", (s+w)%services), 100)
				if err != nil {
					t.Error(err)
					return
				}
				got[w][(s+w)%services] = n
			}
		})
	}
	wg.Wait()
	seen := map[int64]int{}
	for s, n := range got[0] {
		if other, taken := seen[n]; taken {
			t.Errorf("services %d and %d share number %d", s, other, n)
		}
		seen[n] = s
	}
	for w := range got {
		equal(t, fmt.Sprintf("what writer %d was told", w), got[w], got[0])
	}
}

func testCertificates(t *testing.T, db *DB) {
	ctx := t.Context()
	certificate := func(i int) Certificate {
		return Certificate{Serial: fmt.Sprintf("%04x", i), Subject: "spiffe://bank.example/ns/bank/sa/a", Workload: fmt.Sprintf("w%d", i%2), Host: "h1",
			Artifacts: assay.DigestOf([]byte{byte(i)}), Issuer: "ca", NotBefore: day, NotAfter: day.Add(time.Duration(i) * time.Hour), IssuedAt: day}
	}
	check(t, db.InsertCertificates(ctx, certificate(0), certificate(1), certificate(2)))
	check(t, db.InsertCertificates(ctx, certificate(3), certificate(2), certificate(4), certificate(5)))
	again := certificate(3)
	again.Subject = "somebody else"
	check(t, db.InsertCertificates(ctx, again))
	equal(t, "of w1, later than 1 h", must(db.ListCertificates(ctx, "w1", day.Add(time.Hour)))(t), []Certificate{certificate(3), certificate(5)})
	equal(t, "pruned", must(db.PruneCertificates(ctx, day.Add(2*time.Hour)))(t), 2)
	equal(t, "pruned again", must(db.PruneCertificates(ctx, day.Add(2*time.Hour)))(t), 0)
	if left := must(db.ListCertificates(ctx, "", time.Time{}))(t); len(left) != 4 || left[0].Serial != "0002" {
		t.Errorf("left: %+v", left)
	}
}

// testPruneConcurrently: several may forget at once while others store, and each certificate is
// forgotten once.
func testPruneConcurrently(t *testing.T, db *DB) {
	ctx := t.Context()
	const old, pruners, lasting = 2*PruneBatch + 7, 3, 20
	certificate := func(serial string, ends time.Time) Certificate {
		return Certificate{Serial: serial, Subject: "spiffe://bank.example/ns/bank/sa/a", Workload: serial, NotAfter: ends}
	}
	var ended []Certificate
	for i := range old {
		ended = append(ended, certificate(fmt.Sprintf("old-%04x", i), day.Add(time.Duration(i)*time.Second)))
	}
	check(t, db.InsertCertificates(ctx, ended...))
	var all sync.WaitGroup
	var forgotten atomic.Int64
	for range pruners {
		all.Go(func() {
			for {
				n, err := db.PruneCertificates(ctx, day.Add(old*time.Second))
				if err != nil || n > PruneBatch {
					t.Errorf("forgot %d: %v", n, err)
				}
				if forgotten.Add(n); n < PruneBatch {
					return
				}
			}
		})
	}
	for i := range lasting {
		check(t, db.InsertCertificates(ctx, certificate(fmt.Sprintf("new-%04x", i), day.Add(old*time.Second))))
	}
	all.Wait()
	equal(t, "forgotten", forgotten.Load(), old)
	equal(t, "left", len(must(db.ListCertificates(ctx, "", time.Time{}))(t)), lasting)
}

func testAudit(t *testing.T, db *DB) {
	ctx := t.Context()
	var all []Audit
	for i := range 5 {
		a := Audit{ID: newID(day.Add(time.Duration(i) * time.Second)), Time: day.Add(time.Duration(i) * time.Second), Who: "uid 0", Role: "operator", Call: "Apply", Subject: fmt.Sprint(i), Outcome: "ok"}
		check(t, db.AppendAudit(ctx, a))
		check(t, db.AppendAudit(ctx, a))
		all = append([]Audit{a}, all...)
	}
	equal(t, "newest", must(db.ListAudit(ctx, "", 2))(t), all[:2])
	equal(t, "next page", must(db.ListAudit(ctx, all[1].ID, 10))(t), all[2:])
	check(t, db.AppendAudit(ctx, Audit{Who: "uid 1"}))
	got := must(db.ListAudit(ctx, "", 1))(t)[0]
	if got.Who != "uid 1" || len(got.ID) != 32 || time.Since(got.Time) > time.Minute {
		t.Errorf("filled in: %+v", got)
	}
}

// A change and its audit line are stored together or not at all.
func testAuditIsAtomic(t *testing.T, db *DB) {
	ctx := t.Context()
	by := db.Audited(Audit{Who: "uid 0", Role: "operator", Call: "Apply", Outcome: "ok"})
	o := Object{Kind: "Service", Namespace: "bank", Name: "a", Spec: json.RawMessage(`1`), Source: "apply"}
	must(by.PutObject(ctx, o))(t)
	check(t, by.PutMeta(ctx, "x", []byte("1")))
	if lines := must(db.ListAudit(ctx, "", 10))(t); len(lines) != 2 || lines[0].Who != "uid 0" {
		t.Fatalf("after two writes: %+v", lines)
	}
	o.Source = "config"
	_, err := by.PutObject(ctx, o)
	wantKind(t, err, assay.Conflict)
	must(by.ReplaceObjects(ctx, "apply", nil, Replace{Prune: true, DryRun: true}))(t)
	bad := db.Audited(Audit{Who: "uid\x00"})
	wantKind(t, bad.PutMeta(ctx, "x", []byte("2")), assay.Invalid)
	equal(t, "change without its line", string(must(db.GetMeta(ctx, "x"))(t)), "1")
	if lines := must(db.ListAudit(ctx, "", 10))(t); len(lines) != 2 {
		t.Fatalf("after refused writes and a dry run: %+v", lines)
	}
}

func testFindings(t *testing.T, db *DB) {
	ctx := t.Context()
	f := assay.Finding{Time: day, Workload: "w1", Kind: "plaintext-from-meshed", Subject: "10.181.1.2", Detail: "port 80", Remedy: "look"}
	check(t, db.AppendFinding(ctx, f))
	f.Time, f.Detail = day.Add(time.Second), "port 81"
	check(t, db.AppendFinding(ctx, f))
	late := f
	late.Time = day.Add(-time.Second)
	check(t, db.AppendFinding(ctx, late))
	equal(t, "findings", must(db.ListFindings(ctx, 10))(t), []Finding{{Finding: f, First: day, Count: 3}})

	for i := range 5 {
		check(t, db.AppendFinding(ctx, assay.Finding{Time: day.Add(time.Duration(i+2) * time.Second), Kind: "k", Subject: fmt.Sprint(i)}))
	}
	check(t, db.write(ctx, "bound", func(ctx context.Context, t *tx) error { return t.boundFindings(ctx, 2) }))
	got := must(db.ListFindings(ctx, 10))(t)
	if len(got) != 2 || got[0].Subject != "4" || got[1].Subject != "3" {
		t.Errorf("newest two: %+v", got)
	}
}

func testMeta(t *testing.T, db *DB) {
	ctx := t.Context()
	_, err := db.GetMeta(ctx, "x")
	wantKind(t, err, assay.NotFound)
	for _, v := range [][]byte{{0, 1, 2, 255}, {}, []byte("long " + strings.Repeat("v", 1<<20))} {
		check(t, db.PutMeta(ctx, "x", v))
		if got := must(db.GetMeta(ctx, "x"))(t); string(got) != string(v) {
			t.Fatalf("stored %d bytes, got %d", len(v), len(got))
		}
	}
	check(t, db.PutMeta(ctx, "x", nil))
	check(t, db.PutMeta(ctx, fmt.Sprint(math.MaxInt64), []byte{1}))
}

func testCompareAndSet(t *testing.T, db *DB) {
	ctx := t.Context()
	equal(t, "wrong expectation", must(db.CompareAndSetMeta(ctx, "x", []byte{}, []byte("0")))(t), false)
	equal(t, "first", must(db.CompareAndSetMeta(ctx, "x", nil, []byte("0")))(t), true)
	equal(t, "not absent", must(db.CompareAndSetMeta(ctx, "x", nil, []byte("9")))(t), false)
	equal(t, "not empty", must(db.CompareAndSetMeta(ctx, "x", []byte{}, []byte("9")))(t), false)

	// A counter that many raise loses no step.
	const writers, steps = 6, 5
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for done := 0; done < steps; {
				old, err := db.GetMeta(ctx, "x")
				if err != nil {
					t.Error(err)
					return
				}
				var n int
				fmt.Sscan(string(old), &n)
				swapped, err := db.CompareAndSetMeta(ctx, "x", old, fmt.Append(nil, n+1))
				if err != nil {
					t.Error(err)
					return
				}
				if swapped {
					done++
				}
			}
		})
	}
	wg.Wait()
	equal(t, "counter", string(must(db.GetMeta(ctx, "x"))(t)), fmt.Sprint(writers*steps))
}

// The servers of the tests sort by the rules of a language, as many real ones do.
func testBytewiseOrder(t *testing.T, db *DB) {
	ctx := t.Context()
	names := []string{"b", "A", "a", "B", "_", "-", "a-b", "ab", "é", "z", "1", "a.b"}
	var objects []Object
	for _, n := range names {
		objects = append(objects, Object{Kind: "Service", Name: n, Spec: json.RawMessage(`1`)})
	}
	must(db.ReplaceObjects(ctx, "", objects, Replace{}))(t)
	var got []string
	for _, o := range must(db.ListObjects(ctx, Key{}))(t) {
		got = append(got, o.Name)
	}
	slices.Sort(names)
	equal(t, "order", got, names)
}

func testText(t *testing.T, db *DB) {
	ctx := t.Context()
	wantKind(t, db.PutMeta(ctx, "a\x00b", nil), assay.Invalid)
	wantKind(t, db.PutMeta(ctx, "a\xff", nil), assay.Invalid)
	_, err := db.GetMeta(ctx, "a\x00b")
	wantKind(t, err, assay.Invalid)
	check(t, db.PutMeta(ctx, `q'uo"te $1 ? é 漢`, []byte("1")))
	must(db.GetMeta(ctx, `q'uo"te $1 ? é 漢`))(t)
}

func testCancelled(t *testing.T, db *DB) {
	ctx, cancel := context.WithCancelCause(t.Context())
	gone := errors.New("the caller is gone")
	cancel(gone)
	for _, err := range []error{db.PutMeta(ctx, "x", nil), func() error { _, err := db.ListHosts(ctx); return err }()} {
		wantKind(t, err, assay.Unavailable)
		if !errors.Is(err, gone) {
			t.Errorf("error %v does not say why", err)
		}
	}
	// Cancelled in the middle: nothing is stored, and the pool is as good as before.
	ctx, cancel = context.WithCancelCause(t.Context())
	err := db.write(ctx, "store", func(ctx context.Context, t *tx) error {
		if err := t.putMeta(ctx, "x", nil); err != nil {
			return err
		}
		cancel(gone)
		return t.putMeta(ctx, "y", nil)
	})
	wantKind(t, err, assay.Unavailable)
	_, err = db.GetMeta(t.Context(), "x")
	wantKind(t, err, assay.NotFound)
	check(t, db.PutMeta(t.Context(), "x", nil))

	// Cancelled after the last statement: the outcome is known all the same.
	ctx, cancel = context.WithCancelCause(t.Context())
	check(t, db.write(ctx, "store", func(ctx context.Context, t *tx) error {
		defer cancel(gone)
		return t.putMeta(ctx, "z", nil)
	}))
	must(db.GetMeta(t.Context(), "z"))(t)
}

// Two queries of one call never see two states, and a write is seen by whatever
// begins after it returned.
func testReadsSeeOneState(t *testing.T, db *DB) {
	ctx := t.Context()
	check(t, db.PutMeta(ctx, "x", []byte("0")))
	check(t, db.read(ctx, "read twice", func(ctx context.Context, tx *tx) error {
		var a, b []byte
		if _, err := tx.row(ctx, `SELECT value FROM meta WHERE name = 'x'`, nil, &a); err != nil {
			return err
		}
		check(t, db.PutMeta(t.Context(), "x", []byte("1")))
		if _, err := tx.row(ctx, `SELECT value FROM meta WHERE name = 'x'`, nil, &b); err != nil {
			return err
		}
		equal(t, "second read", string(b), string(a))
		return nil
	}))
	equal(t, "after", string(must(db.GetMeta(ctx, "x"))(t)), "1")
	// A reader cannot write.
	if err := db.read(ctx, "write", func(ctx context.Context, t *tx) error { return t.putMeta(ctx, "x", nil) }); err == nil {
		t.Error("a read transaction took a write")
	}
}

func testReopen(t *testing.T, url string) {
	// Several processes may bring the schema up to date at once; a file has one.
	if strings.HasPrefix(url, "postgres") {
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				db, err := Open(t.Context(), url)
				if err != nil {
					t.Error(err)
					return
				}
				db.Close()
			})
		}
		wg.Wait()
	}
	db := must(Open(t.Context(), url))(t)
	check(t, db.PutMeta(t.Context(), "x", []byte("1")))
	check(t, db.Close())
	db = openTest(t, url)
	equal(t, "kept", string(must(db.GetMeta(t.Context(), "x"))(t)), "1")
}

func testNewerSchema(t *testing.T, url string) {
	db := must(Open(t.Context(), url))(t)
	must(db.w.ExecContext(t.Context(), `UPDATE assay_schema SET version = 1000`))(t)
	check(t, db.Close())
	_, err := Open(t.Context(), url)
	wantKind(t, err, assay.Conflict)
	if s := err.Error(); !strings.Contains(s, "version 1000") || !strings.Contains(s, fmt.Sprintf("up to %d", Schema)) {
		t.Errorf("error does not name both versions: %v", err)
	}
}

func testForeignTables(t *testing.T, url string) {
	db := must(Open(t.Context(), url))(t)
	must(db.w.ExecContext(t.Context(), `DROP TABLE assay_schema`))(t)
	check(t, db.Close())
	_, err := Open(t.Context(), url)
	if err == nil || !strings.Contains(err.Error(), "already exists") {
		t.Fatalf("opening over somebody else's tables: %v", err)
	}
}
