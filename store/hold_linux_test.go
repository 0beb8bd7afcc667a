package store

import (
	"context"
	"errors"
	"os"
	"sync"
	"testing"
	"time"

	"assay.dev"
)

// TestHold: of two processes on one server one holds the store, the other waits until
// it has stopped, died or given up; one that was taken for dead cannot write.
func TestHold(t *testing.T) {
	t.Parallel() // it mostly waits
	server := newPostgres(t)
	defer server.remove()
	url := server.url("postgres")
	open := func() *DB {
		db, err := Open(t.Context(), url)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { db.Close() })
		return db
	}
	ctx := t.Context()
	const patience = 1500 * time.Millisecond
	claim := func(db *DB, id string) (waits <-chan string, got <-chan error) {
		w, g := make(chan string, 1), make(chan error, 1)
		go func() { g <- db.Claim(ctx, id, patience, func(holder string) { w <- holder }) }()
		return w, g
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	// beating renews until it is told to stop, as a holder does.
	beating := func(db *DB) (stop func() error) {
		ctx, cancel := context.WithCancel(ctx)
		var err error
		var g sync.WaitGroup
		g.Go(func() {
			for pause(ctx, patience/8) && err == nil {
				if err = db.Renew(context.WithoutCancel(ctx)); assay.KindOf(err) == assay.Unavailable {
					err = nil
				}
			}
		})
		return func() error { cancel(); g.Wait(); return err }
	}

	a, b := open(), open()
	if !a.Shared() {
		t.Error("a server is not shared")
	}
	must(a.PutMeta(ctx, "x", []byte("before any claim")))
	_, got := claim(a, "a")
	must(<-got)
	stop := beating(a)
	waits, got := claim(b, "b")
	if h := <-waits; h != "a" {
		t.Errorf("waits for %q", h)
	}
	select {
	case err := <-got:
		t.Fatalf("took the store of one that lives: %v", err)
	case <-time.After(2 * patience):
	}
	must(b.PutMeta(ctx, "x", []byte("one that waits has claimed nothing")))

	// The server goes and comes: that proves nothing about anybody.
	server.stop(os.Interrupt)
	if !pause(ctx, patience*3/2) {
		t.FailNow()
	}
	server.start(t)
	select {
	case err := <-got:
		t.Fatalf("took the store while it was away: %v", err)
	case <-time.After(2 * patience):
	}

	// The holder stands still.
	must(stop())
	must(<-got)
	if err := a.PutMeta(ctx, "x", []byte("late")); !errors.Is(err, ErrTaken) || assay.KindOf(err) != assay.Conflict {
		t.Errorf("one that was taken for dead writes: %v", err)
	}
	if err := a.Renew(ctx); !errors.Is(err, ErrTaken) {
		t.Errorf("and renews: %v", err)
	}
	must(b.PutMeta(ctx, "x", []byte("b")))

	// It gives up, and the next one has it at once; so has the same one that restarts.
	stop = beating(b)
	c := open()
	waits, got = claim(c, "c")
	<-waits
	must(stop())
	began := time.Now()
	must(b.Release(ctx))
	must(<-got)
	if d := time.Since(began); d > patience {
		t.Errorf("a store that was given up is taken after %v", d)
	}
	_, got = claim(open(), "c")
	must(<-got)
}
