package identity

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"assay.dev"
)

// shelf is a vault in memory, which can be out of reach.
type shelf struct {
	mu  sync.Mutex
	doc []byte
}

// reach is one process's way to a shelf.
type reach struct {
	*shelf
	mu  sync.Mutex
	cut bool
}

var errCut = errors.New("out of reach")

func (r *reach) set(cut bool) { r.mu.Lock(); r.cut = cut; r.mu.Unlock() }
func (r *reach) away() bool   { r.mu.Lock(); defer r.mu.Unlock(); return r.cut }

func (r *reach) Load(context.Context) ([]byte, error) {
	if r.away() {
		return nil, errCut
	}
	r.shelf.mu.Lock()
	defer r.shelf.mu.Unlock()
	return bytes.Clone(r.doc), nil
}

func (r *reach) Swap(_ context.Context, old, next []byte) (bool, error) {
	if r.away() {
		return false, errCut
	}
	r.shelf.mu.Lock()
	defer r.shelf.mu.Unlock()
	if (old == nil) != (r.doc == nil) || !bytes.Equal(old, r.doc) {
		return false, nil
	}
	r.doc = bytes.Clone(next)
	return true, nil
}

func sealingKeys(t *testing.T, text ...string) *SealingKeys {
	t.Helper()
	keys, err := ParseSealingKeys([]byte(strings.Join(text, "")))
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

// sharing opens n authorities on one shelf.
func sharing(t *testing.T, n int, c *clock) ([]*Authority, []*reach) {
	t.Helper()
	s, keys := &shelf{}, sealingKeys(t, NewSealingKey())
	var list []*Authority
	var ways []*reach
	for range n {
		way := &reach{shelf: s}
		a, err := Open(Config{Vault: way, Keys: keys, TrustDomain: "bank.test", Now: c.now})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := a.Close(); err != nil && !way.away() {
				t.Error(err)
			}
		})
		list, ways = append(list, a), append(ways, way)
	}
	return list, ways
}

// TestSharedRotation: of three that rotate at once each step is taken once, and all have
// the same keys after they have looked.
func TestSharedRotation(t *testing.T) {
	t.Parallel()
	c := newClock(time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC))
	list, _ := sharing(t, 3, c)
	first := list[0].Bundle()
	for range 5 {
		c.advance(60 * day) // each time an intermediate is past half of its life
		var made sync.Map
		var all sync.WaitGroup
		for _, a := range list {
			all.Go(func() {
				actions, err := a.Step(Tick{})
				if err != nil {
					t.Error(err)
				}
				for _, act := range actions {
					if _, twice := made.LoadOrStore(act.String(), true); twice {
						t.Errorf("twice: %s", act)
					}
				}
			})
		}
		all.Wait()
		for _, a := range list {
			if _, err := a.Follow(); err != nil {
				t.Fatal(err)
			}
			if got, want := a.State().Workload, list[0].State().Workload; got != want {
				t.Fatalf("one has %+v, another %+v", got, want)
			}
		}
	}
	if got := list[2].State().Made; got != 3+2*5 {
		t.Errorf("%d pairs were made for 5 replacements of two intermediates and a root, want 13", got)
	}

	// A new root, asked of one, acknowledged to another, signs for the third.
	if _, err := list[0].Step(Rotate{}); err != nil {
		t.Fatal(err)
	}
	if _, err := list[1].Follow(); err != nil {
		t.Fatal(err)
	}
	if _, err := list[1].Step(Acknowledged{Least: first.Version + 1}); err != nil {
		t.Fatal(err)
	}
	followed, err := list[2].Follow()
	if err != nil || !followed {
		t.Fatalf("the third followed: %v, %v", followed, err)
	}
	cert, err := list[2].IssueWorkload(request(t, newKey(t), nil), payments, artifacts)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range list[:2] {
		if _, err := a.Follow(); err != nil {
			t.Fatal(err)
		}
		if err := verify(a, cert, c.now(), assay.WorkloadPolicy); err != nil {
			t.Error(err)
		}
	}
	if string(list[2].SigningRoot()) == string(first.Roots[0]) {
		t.Error("the third signs beneath the old root")
	}
}

// TestCutOffSigner: one that misses a rotation signs for Policy.Apart, and what it signs is
// beneath a root that the others keep for as long as it lives; then it signs nothing.
func TestCutOffSigner(t *testing.T) {
	t.Parallel()
	c := newClock(time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC))
	list, ways := sharing(t, 2, c)
	well, apart := list[0], list[1]
	ways[1].set(true)
	if _, err := well.Step(Rotate{}); err != nil {
		t.Fatal(err)
	}
	if _, err := well.Step(Acknowledged{Least: NobodyLeft}); err != nil {
		t.Fatal(err)
	}
	c.advance(DefaultApart)
	last, err := apart.IssueHost(request(t, newKey(t), nil), "host-1")
	if err != nil {
		t.Fatalf("cut off for %s it signs nothing: %v", DefaultApart, err)
	}
	for c.now().Before(last.Leaf.NotAfter) {
		if _, err := well.Step(Tick{}); err != nil {
			t.Fatal(err)
		}
		if err := verify(well, last, c.now(), assay.InfrastructurePolicy); err != nil {
			t.Fatalf("at %s: %v", c.now(), err)
		}
		c.advance(6 * time.Hour)
		if _, err := apart.IssueHost(request(t, newKey(t), nil), "host-1"); assay.KindOf(err) != assay.Unavailable {
			t.Fatalf("cut off for longer than %s: %v", DefaultApart, err)
		}
	}
	c.advance(day)
	if _, err := well.Step(Tick{}); err != nil {
		t.Fatal(err)
	}
	if n := len(well.Bundle().Roots); n != 1 {
		t.Errorf("the bundle has %d roots after the old one's last leaf", n)
	}
	// Back in reach it has what the others have.
	ways[1].set(false)
	if _, err := apart.Step(Tick{}); err != nil {
		t.Fatal(err)
	}
	if _, err := apart.Follow(); err != nil {
		t.Fatal(err)
	}
	if _, err := apart.IssueHost(request(t, newKey(t), nil), "host-1"); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(apart.SigningRoot(), well.SigningRoot()) {
		t.Error("it signs beneath another root than the others")
	}
}

// TestLeavesOfAll: how long leaves live that several signed is not lost among them.
func TestLeavesOfAll(t *testing.T) {
	t.Parallel()
	c := newClock(time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC))
	list, _ := sharing(t, 2, c)
	if _, err := list[0].IssueHost(request(t, newKey(t), nil), "host-1"); err != nil { // seven days
		t.Fatal(err)
	}
	if _, err := list[1].IssueWorkload(request(t, newKey(t), nil), payments, artifacts); err != nil { // one
		t.Fatal(err)
	}
	for _, i := range []int{0, 1, 0, 1} {
		if _, err := list[i].Step(Tick{}); err != nil {
			t.Fatal(err)
		}
	}
	for i, a := range list {
		if _, err := a.Follow(); err != nil {
			t.Fatal(err)
		}
		if got := a.State().Roots[0].Leaves; got.Before(c.now().Add(HostLife)) {
			t.Errorf("%d: leaves until %s", i, got)
		}
	}
}

// TestSeal: what is stored shows no key, and opens under the right key alone, unchanged.
func TestSeal(t *testing.T) {
	t.Parallel()
	c := newClock(time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC))
	s := &shelf{}
	old, next := NewSealingKey(), NewSealingKey()
	openWith := func(text ...string) error {
		a, err := Open(Config{Vault: &reach{shelf: s}, Keys: sealingKeys(t, text...), TrustDomain: "bank.test", Now: c.now})
		if err == nil {
			err = a.Close()
		}
		return err
	}
	if err := openWith(old); err != nil {
		t.Fatal(err)
	}
	for _, plain := range []string{"bank.test", "root-1", "trustDomain"} {
		if bytes.Contains(s.doc, []byte(plain)) {
			t.Errorf("the document shows %q", plain)
		}
	}
	if err := openWith(next); assay.KindOf(err) != assay.Denied {
		t.Errorf("under another key: %v", err)
	}
	for i := range s.doc {
		s.doc[i] ^= 1
		if err := openWith(old); err == nil {
			t.Fatalf("byte %d changed, and it opens", i)
		}
		s.doc[i] ^= 1
	}
	// A key is replaced.
	c.advance(60 * day)
	if err := openWith(next, old); err != nil {
		t.Fatal(err)
	}
	if err := openWith(next); err != nil {
		t.Errorf("sealed under the first of two: %v", err)
	}
	if err := openWith(old); err == nil {
		t.Error("still sealed under the old key")
	}
	for _, bad := range []string{"", "x\n", "aGVsbG8=\n", old + "?\n"} {
		if _, err := ParseSealingKeys([]byte(bad)); assay.KindOf(err) != assay.Invalid {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// TestTakeOver: a folder's authority goes on in a vault that has none.
func TestTakeOver(t *testing.T) {
	t.Parallel()
	c := newClock(time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC))
	dir := filepath.Join(t.TempDir(), "ca")
	was := open(t, dir, c)
	bundle := was.Bundle()
	if err := was.Close(); err != nil {
		t.Fatal(err)
	}
	s, keys := &shelf{}, sealingKeys(t, NewSealingKey())
	for _, from := range []string{dir, filepath.Join(t.TempDir(), "none"), ""} {
		a, err := Open(Config{Dir: from, Vault: &reach{shelf: s}, Keys: keys, Now: c.now})
		if err != nil {
			t.Fatal(err)
		}
		if got := a.Bundle(); got.Version != bundle.Version || !bytes.Equal(got.Roots[0], bundle.Roots[0]) || a.TrustDomain() != "bank.test" {
			t.Errorf("from %q: another authority", from)
		}
		if err := a.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
