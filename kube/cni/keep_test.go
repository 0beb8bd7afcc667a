package cni

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// TestNotices: a failure is told once, and so is its end, whoever ends it.
func TestNotices(t *testing.T) {
	dir := t.TempDir()
	type notice struct {
		file string
		err  error
	}
	notices := make(chan notice, 100)
	ctx, cancel := context.WithCancel(t.Context())
	var keeping sync.WaitGroup
	keeping.Go(func() {
		Keep(ctx, dir, "/run/agent.sock", func(file string, err error) { notices <- notice{file, err} })
	})
	defer keeping.Wait()
	defer cancel()
	next := func(what string) notice {
		t.Helper()
		select {
		case n := <-notices:
			return n
		case <-time.After(time.Minute):
			t.Fatalf("%s: nothing is told", what)
			panic(0)
		}
	}
	put := func(b []byte) {
		t.Helper()
		if err := write(dir, "10-net.conflist", b); err != nil {
			t.Fatal(err)
		}
	}
	if n := next("an empty folder"); n.err == nil {
		t.Fatalf("an empty folder: %+v", n)
	}
	put([]byte(`{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]}`))
	if n := next("a configuration"); n.err != nil || n.file != "10-net.conflist" {
		t.Fatalf("a configuration: %+v", n)
	}
	ours, err := os.ReadFile(filepath.Join(dir, "10-net.conflist"))
	if err != nil {
		t.Fatal(err)
	}
	put([]byte(`{"name": `))
	if n := next("half a configuration"); n.err == nil {
		t.Fatalf("half a configuration: %+v", n)
	}
	put(ours)
	if n := next("the one of before"); n.err != nil {
		t.Fatalf("the one of before: %+v", n)
	}
	if len(notices) > 0 {
		t.Errorf("and besides: %+v", <-notices)
	}
}
