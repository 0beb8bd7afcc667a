package store

import (
	"bufio"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"assay.dev"
)

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	garbage := filepath.Join(dir, "garbage.db")
	check(t, os.WriteFile(garbage, []byte(strings.Repeat("not a database ", 500)), 0o600))
	for _, c := range []struct {
		url, says string
		kind      assay.Kind
	}{
		{"", "postgres://", assay.Invalid},
		{"mysql://x", `"mysql"`, assay.Invalid},
		{"postgres://u:secret@h:port/", "postgres://USER@HOST", assay.Invalid},
		{"sqlite:" + filepath.Join(dir, "no/such/state.db"), "folder must exist", assay.NotFound},
		{garbage, "no database", assay.Internal},
	} {
		db, err := Open(t.Context(), c.url)
		if err == nil {
			db.Close()
			t.Errorf("Open(%q) succeeded", c.url)
			continue
		}
		if assay.KindOf(err) != c.kind || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "secret") {
			t.Errorf("Open(%q): %s: %v; want %s: … %s", c.url, assay.KindOf(err), err, c.kind, c.says)
		}
	}
}

func TestSQLiteIsPrivate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state with ?#%20 in its name.db")
	db := openTest(t, path)
	check(t, db.PutMeta(t.Context(), "x", nil))
	for _, suffix := range []string{"", "-wal", "-shm", ".lock"} {
		if st := must(os.Stat(path + suffix))(t); st.Mode() != 0o600 {
			t.Errorf("%s has mode %v", st.Name(), st.Mode())
		}
	}
	for _, c := range []struct{ pragma, want string }{{"journal_mode", "wal"}, {"synchronous", "2"}} {
		for _, pool := range []*sql.DB{db.w, db.r} {
			var got string
			check(t, pool.QueryRow("PRAGMA "+c.pragma).Scan(&got))
			equal(t, c.pragma, got, c.want)
		}
	}
}

func TestSQLiteSecondOwner(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	db := must(Open(t.Context(), path))(t)
	_, err := Open(t.Context(), path)
	wantKind(t, err, assay.Conflict)
	if !strings.Contains(err.Error(), fmt.Sprintf("pid %d", os.Getpid())) {
		t.Errorf("error does not name the owner: %v", err)
	}
	check(t, db.PutMeta(t.Context(), "x", nil)) // the owner is not disturbed
	check(t, db.Close())
	openTest(t, path)
}

// A program that does not know the lock file, such as an open sqlite3 shell, holds
// SQLite's own lock.
func TestSQLiteLockedByShell(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state.db")
	db := openTest(t, path)
	check(t, db.PutMeta(t.Context(), "x", []byte("1")))
	shell := must(sql.Open("sqlite", path))(t)
	defer shell.Close()
	conn := must(shell.Conn(t.Context()))(t)
	defer conn.Close()
	must(conn.ExecContext(t.Context(), "BEGIN IMMEDIATE"))(t)

	db.patience = 0
	err := db.PutMeta(t.Context(), "x", []byte("2"))
	wantKind(t, err, assay.Unavailable)
	if !strings.Contains(err.Error(), "another process") {
		t.Errorf("error does not say who: %v", err)
	}
	equal(t, "reading goes on", string(must(db.GetMeta(t.Context(), "x"))(t)), "1")

	// A writer that is patient outlasts it.
	db.patience = patience
	done := make(chan error, 1)
	go func() { done <- db.PutMeta(t.Context(), "x", []byte("2")) }()
	must(conn.ExecContext(t.Context(), "ROLLBACK"))(t)
	check(t, <-done)
}

const writerVariable = "ASSAY_STORE_TEST_WRITER"

// writeUntilKilled appends audit lines and says on its standard output which ones
// have been acknowledged.
func writeUntilKilled(path string) {
	db, err := Open(context.Background(), path)
	for i := 0; err == nil; i++ {
		id := newID(now())
		by := db.Audited(Audit{ID: id, Who: "writer"})
		if err = by.PutMeta(context.Background(), "latest", []byte(id)); err == nil {
			_, err = fmt.Println(id)
		}
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(3)
}

// After kill -9 every acknowledged write is there, the file is sound, at most one
// write more than acknowledged was stored, and that one entirely.
func TestSQLiteKilledWriter(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state.db")
	total := 0
	for round := range 5 {
		acked := killedWriter(t, path, 20+7*round)
		total += len(acked)
		db := must(Open(t.Context(), path))(t)
		var sound string
		check(t, db.r.QueryRow("PRAGMA integrity_check").Scan(&sound))
		equal(t, "integrity", sound, "ok")
		lines := must(db.ListAudit(t.Context(), "", 1_000_000))(t)
		there := make(map[string]bool)
		for _, l := range lines {
			there[l.ID] = true
		}
		for _, id := range acked {
			if !there[id] {
				t.Errorf("round %d: acknowledged write %s is lost", round, id)
			}
		}
		if extra := len(lines) - total; extra < 0 || extra > 1 {
			t.Errorf("round %d: %d writes acknowledged so far, %d stored", round, total, len(lines))
		}
		equal(t, "change and audit line", string(must(db.GetMeta(t.Context(), "latest"))(t)), lines[0].ID)
		total = len(lines)
		check(t, db.Close())
	}
}

// killedWriter runs a writer in a process of its own, kills it after n
// acknowledgements, and returns all that it gave.
func killedWriter(t *testing.T, path string, n int) (acked []string) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), writerVariable+"="+path)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out := must(cmd.StdoutPipe())(t)
	check(t, cmd.Start())
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		acked = append(acked, lines.Text())
		if len(acked) == n {
			if _, err := Open(t.Context(), path); assay.KindOf(err) != assay.Conflict || !strings.Contains(err.Error(), fmt.Sprint(cmd.Process.Pid)) {
				t.Errorf("opening beside the writer: %v", err)
			}
			check(t, cmd.Process.Kill())
		}
	}
	if err := cmd.Wait(); err == nil || len(acked) < n {
		t.Fatalf("writer ended by itself after %d acknowledgements: %v %s", len(acked), err, stderr.String())
	}
	// The last line may have been cut in the middle.
	if last := acked[len(acked)-1]; len(last) != 32 {
		acked = acked[:len(acked)-1]
	}
	return acked
}

func TestSQLiteDamaged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	db := must(Open(t.Context(), path))(t)
	for i := range 50 {
		check(t, db.PutMeta(t.Context(), fmt.Sprint(i), make([]byte, 4000)))
	}
	check(t, db.Close())
	if _, err := os.Stat(path + "-wal"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("the log is still there after Close: %v", err)
	}
	raw := must(os.ReadFile(path))(t)
	for i := 4096 * 8; i < len(raw); i++ {
		raw[i] ^= 0x5a
	}
	check(t, os.WriteFile(path, raw, 0o600))
	db, err := Open(t.Context(), path)
	if err == nil {
		_, err = db.GetMeta(t.Context(), "7")
		db.Close()
	}
	wantKind(t, err, assay.Internal)
	if !strings.Contains(err.Error(), "restore the latest backup") {
		t.Errorf("error has no remedy: %v", err)
	}
}
