package control

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/store"
)

// server is a PostgreSQL server of a test's own.
type server struct {
	t       *testing.T
	dir     string // of its data and its socket
	bin     string
	attr    *syscall.SysProcAttr
	process *exec.Cmd
}

// postgres starts a server and returns a URL of a database in it.
func postgres(t *testing.T) string { return newServer(t).url() }

func newServer(t *testing.T) *server {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		t.Skip("PostgreSQL is not installed")
	}
	bin := filepath.Dir(found[len(found)-1])
	dir, err := os.MkdirTemp("", "assay-pg-") // a short path: sockets are in it
	if err != nil {
		t.Fatal(err)
	}
	attr := &syscall.SysProcAttr{Pdeathsig: syscall.SIGQUIT}
	if os.Geteuid() == 0 { // which it refuses to run as
		nobody, err := user.Lookup("nobody")
		if err != nil {
			t.Fatal(err)
		}
		uid, _ := strconv.Atoi(nobody.Uid)
		gid, _ := strconv.Atoi(nobody.Gid)
		attr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		if err := os.Chown(dir, uid, gid); err != nil {
			t.Fatal(err)
		}
	}
	data := filepath.Join(dir, "data")
	initdb := exec.Command(filepath.Join(bin, "initdb"), "-D", data, "-U", "assay", "-A", "trust", "-N", "--wal-segsize=1")
	initdb.Dir, initdb.SysProcAttr = dir, attr
	if out, err := initdb.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	s := &server{t: t, dir: dir, bin: bin, attr: attr}
	t.Cleanup(func() {
		s.kill()
		os.RemoveAll(dir)
	})
	s.start()
	return s
}

func (s *server) url() string {
	return fmt.Sprintf("postgres://assay@/postgres?host=%s&port=5432", s.dir)
}

// start starts it and waits until it answers.
func (s *server) start() {
	s.t.Helper()
	s.process = exec.Command(filepath.Join(s.bin, "postgres"), "-D", filepath.Join(s.dir, "data"), "-k", s.dir, "-c", "listen_addresses=", "-c", "fsync=off", "-c", "shared_buffers=16MB")
	s.process.Dir, s.process.SysProcAttr = s.dir, s.attr
	if err := s.process.Start(); err != nil {
		s.t.Fatal(err)
	}
	eventually(s.t, "PostgreSQL answers", func() bool {
		db, err := store.Open(s.t.Context(), s.url())
		if err == nil {
			err = db.Close()
		}
		return err == nil
	})
}

// kill ends it at once, as a crash does.
func (s *server) kill() {
	s.process.Process.Signal(syscall.SIGQUIT)
	s.process.Wait()
}

// TestControlsOnOneStore: a second control waits until the first has ended, and then
// has everything that the first was told; one with another authority is refused; one
// that was taken for dead ends when it hears so.
func TestControlsOnOneStore(t *testing.T) {
	t.Parallel()
	url := postgres(t)
	config := func(data string) Config {
		return Config{Data: data, Store: url, TrustDomain: "bank.test", takeover: time.Second}
	}
	first, second := filepath.Join(t.TempDir(), "first"), filepath.Join(t.TempDir(), "second")
	a := start(t, func(cfg *Config) { *cfg = config(first) })
	a.join(t, "node", "bank/*")
	if err := os.CopyFS(filepath.Join(second, "ca"), os.DirFS(filepath.Join(first, "ca"))); err != nil {
		t.Fatal(err)
	}
	os.Chmod(second, 0o700)
	files, err := filepath.Glob(filepath.Join(second, "ca", "*"))
	for _, f := range append(files, filepath.Join(second, "ca")) {
		mode := os.FileMode(0o600)
		if f == filepath.Join(second, "ca") {
			mode = 0o700
		}
		err = errors.Join(err, os.Chmod(f, mode))
	}
	if err != nil {
		t.Fatal(err)
	}

	opened := make(chan *Control, 1)
	go func() {
		c, err := Open(t.Context(), config(second))
		if err != nil {
			t.Error(err)
		}
		opened <- c
	}()
	select {
	case <-opened:
		t.Fatal("two controls have one store")
	case <-time.After(3 * time.Second):
	}
	// What the first is told while the second waits is the second's, too.
	if _, err := a.operator(t).CreateToken(t.Context(), &api.CreateTokenRequest{Covers: []string{"late/*"}, TtlSeconds: 3600}); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	a.stop()
	b := <-opened
	if b == nil {
		t.FailNow()
	}
	t.Logf("taken over in %v", time.Since(began))
	b.model.mu.Lock()
	hosts, late := len(b.model.hosts), false
	for _, k := range b.model.tokens {
		late = late || slices.Contains(k.Covers, "late/*")
	}
	b.model.mu.Unlock()
	if hosts != 1 || !late {
		t.Errorf("the second knows %d hosts, and of the token: %v", hosts, late)
	}
	ended := make(chan error, 1)
	go func() { ended <- b.Run(context.Background()) }()

	// A third takes it for dead.
	db, err := store.Open(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Claim(t.Context(), "third", 0, nil); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if !errors.Is(err, store.ErrTaken) {
			t.Errorf("it ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("a control that was taken for dead goes on")
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if err := errors.Join(db.Release(t.Context()), db.Close()); err != nil {
		t.Fatal(err)
	}

	// Another authority.
	_, err = Open(t.Context(), config(filepath.Join(t.TempDir(), "stranger")))
	if assay.KindOf(err) != assay.Conflict {
		t.Errorf("a control with another authority on the store: %v", err)
	}
	// And the first again, at once: it is the one that its folder says.
	start(t, func(cfg *Config) { *cfg = config(first) })
}
