package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"assay.dev"
)

func TestConformancePostgreSQL(t *testing.T) {
	conformance(t, sharedPostgres(t).newDatabase)
}

// pgServer is a real PostgreSQL in a folder of its own, reached over a unix socket
// there. Its databases sort by the rules of English, so that order has to come from
// the schema.
type pgServer struct {
	dir       string
	postgres  string // the program
	owner     *syscall.Credential
	process   *exec.Cmd
	databases atomic.Int64
}

// sharedPostgres is one server for all tests of the package.
func sharedPostgres(t testing.TB) *pgServer {
	t.Helper()
	if pgShared == nil {
		s := newPostgres(t)
		atExit = append(atExit, func() { s.remove() })
		pgShared = s
	}
	return pgShared
}

var pgShared *pgServer

// newPostgres makes and starts a server, or skips the test.
func newPostgres(t testing.TB) *pgServer {
	t.Helper()
	bins, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	if len(bins) == 0 {
		t.Skip("PostgreSQL is not installed (Debian: apt install postgresql): nothing was tested against it")
	}
	slices.Sort(bins)
	bin := bins[len(bins)-1]
	s := &pgServer{dir: must(os.MkdirTemp("", "assay-pg-"))(t), postgres: filepath.Join(bin, "postgres")}
	if os.Getuid() == 0 { // PostgreSQL refuses to run as root
		owner, err := user.Lookup("postgres")
		if err != nil {
			owner = must(user.Lookup("nobody"))(t)
		}
		uid, _ := strconv.Atoi(owner.Uid)
		gid, _ := strconv.Atoi(owner.Gid)
		s.owner = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
		check(t, os.Chown(s.dir, uid, gid))
	}
	initdb := exec.Command(filepath.Join(bin, "initdb"), "-D", s.data(), "-U", "assay", "-A", "trust", "-N", "--wal-segsize=1",
		"-E", "UTF8", "--locale=C.UTF-8", "--locale-provider=icu", "--icu-locale=en-US")
	initdb.Dir, initdb.SysProcAttr = s.dir, &syscall.SysProcAttr{Credential: s.owner}
	if out, err := initdb.CombinedOutput(); err != nil {
		os.RemoveAll(s.dir)
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	s.start(t)
	return s
}

func (s *pgServer) data() string { return filepath.Join(s.dir, "data") }

// start starts the server and waits until it answers.
func (s *pgServer) start(t testing.TB) {
	t.Helper()
	log := must(os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600))(t)
	defer log.Close()
	s.process = exec.Command(s.postgres, "-D", s.data(), "-k", s.dir, "-c", "listen_addresses=", "-c", "fsync=off", "-c", "shared_buffers=16MB",
		"-c", "max_connections=80", "-c", "max_wal_size=32MB")
	s.process.Dir, s.process.Stdout, s.process.Stderr = s.dir, log, log
	// SIGQUIT: stop at once. A test that dies must not leave a server behind.
	s.process.SysProcAttr = &syscall.SysProcAttr{Credential: s.owner, Pdeathsig: syscall.SIGQUIT}
	check(t, s.process.Start())
	db := must(sql.Open("pgx", s.url("postgres")))(t)
	defer db.Close()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := db.PingContext(t.Context())
		if err == nil {
			return
		}
		if time.Now().After(deadline) || !pause(t.Context(), 10*time.Millisecond) {
			text, _ := os.ReadFile(filepath.Join(s.dir, "log"))
			t.Fatalf("PostgreSQL does not answer: %v\n%s", err, text)
		}
	}
}

// stop sends a signal (SIGINT: fast shutdown, SIGQUIT: crash) and waits for the end.
func (s *pgServer) stop(signal os.Signal) {
	_ = s.process.Process.Signal(signal)
	_ = s.process.Wait()
}

func (s *pgServer) remove() {
	s.stop(syscall.SIGQUIT)
	_ = os.RemoveAll(s.dir)
}

func (s *pgServer) url(database string) string { return pgURL(s.dir, database) }

func pgURL(dir, database string) string {
	return fmt.Sprintf("postgres://assay@/%s?host=%s&port=5432", database, dir)
}

// admin runs one statement as the server's owner.
func (s *pgServer) admin(t testing.TB, statement string) {
	t.Helper()
	db := must(sql.Open("pgx", s.url("postgres")))(t)
	defer db.Close()
	if _, err := db.ExecContext(t.Context(), statement); err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
}

// newDatabase returns the URL of an empty database.
func (s *pgServer) newDatabase(t testing.TB) string {
	t.Helper()
	name := fmt.Sprintf("t%d", s.databases.Add(1))
	s.admin(t, "CREATE DATABASE "+name)
	return s.url(name)
}

// Two transactions that read what the other writes: the server lets one pass and
// refuses the other, which runs again.
func TestPostgresSerialisationFailure(t *testing.T) {
	db := openTest(t, sharedPostgres(t).newDatabase(t))
	ctx := t.Context()
	check(t, db.PutMeta(ctx, "a", []byte{1}))
	check(t, db.PutMeta(ctx, "b", []byte{1}))
	var runs atomic.Int64
	var bothRead sync.WaitGroup
	bothRead.Add(2)
	// Each doubles the sum into its own value: one after the other gives 1+1=2, then
	// 2+1=3; both at once would give 2 and 2.
	add := func(name string) error {
		first := true
		return db.write(ctx, "add", func(ctx context.Context, t *tx) error {
			runs.Add(1)
			values, err := all(ctx, t, func(rows *sql.Rows) (v []byte, err error) { return v, rows.Scan(&v) }, `SELECT value FROM meta`)
			if err != nil {
				return err
			}
			if first {
				first = false
				bothRead.Done()
				bothRead.Wait()
			}
			return t.putMeta(ctx, name, []byte{values[0][0] + values[1][0]})
		})
	}
	errs := make(chan error, 2)
	go func() { errs <- add("a") }()
	go func() { errs <- add("b") }()
	check(t, errors.Join(<-errs, <-errs))
	sum := must(db.GetMeta(ctx, "a"))(t)[0] + must(db.GetMeta(ctx, "b"))(t)[0]
	if sum != 5 || runs.Load() < 3 {
		t.Errorf("after %d runs the values add up to %d, want 5 after at least 3", runs.Load(), sum)
	}
}

// A server lets one of many writers win each time, but not each of them some time:
// eight that write without pause must all get on.
func TestPostgresNobodyStarves(t *testing.T) {
	db := openTest(t, sharedPostgres(t).newDatabase(t))
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var wg sync.WaitGroup
	const writers, enough = 8, 60
	var behind atomic.Int64
	behind.Store(writers)
	for w := range writers {
		wg.Go(func() {
			for n := 1; ctx.Err() == nil; n++ {
				began := time.Now()
				if err := db.AppendFinding(t.Context(), assay.Finding{Kind: "k", Subject: fmt.Sprint(w), Time: now()}); err != nil {
					t.Error(err)
				}
				if took := time.Since(began); took > patience/3 {
					t.Errorf("a write took %v", took)
				}
				if n == enough && behind.Add(-1) == 0 {
					stop()
				}
			}
		})
	}
	wg.Wait()
	for _, f := range must(db.ListFindings(t.Context(), 100))(t) {
		if f.Count < enough {
			t.Errorf("writer %s: %d writes", f.Subject, f.Count)
		}
	}
}

func TestPostgresDeadlock(t *testing.T) {
	db := openTest(t, sharedPostgres(t).newDatabase(t))
	ctx := t.Context()
	check(t, db.PutMeta(ctx, "a", nil))
	check(t, db.PutMeta(ctx, "b", nil))
	var bothHold sync.WaitGroup
	bothHold.Add(2)
	put := func(names ...string) error {
		first := true
		return db.write(ctx, "put", func(ctx context.Context, t *tx) error {
			for _, n := range names {
				if err := t.putMeta(ctx, n, []byte(names[0])); err != nil {
					return err
				}
				if first {
					first = false
					bothHold.Done()
					bothHold.Wait()
				}
			}
			return nil
		})
	}
	errs := make(chan error, 2)
	go func() { errs <- put("a", "b") }()
	go func() { errs <- put("b", "a") }()
	check(t, errors.Join(<-errs, <-errs))
	equal(t, "both values are of one writer", string(must(db.GetMeta(ctx, "a"))(t)), string(must(db.GetMeta(ctx, "b"))(t)))
}

// A process that was stopped in a transaction, as by a laptop's sleep, finds it
// ended by the server, and begins again.
func TestPostgresIdleTransaction(t *testing.T) {
	dbURL := sharedPostgres(t).newDatabase(t)
	direct := openTest(t, dbURL)
	db := openTest(t, dbURL+"&idle_in_transaction_session_timeout=1000")
	runs := 0
	check(t, db.write(t.Context(), "store", func(ctx context.Context, tx *tx) error {
		var pid int
		if _, err := tx.row(ctx, `SELECT pg_backend_pid()`, nil, &pid); err != nil {
			return err
		}
		if runs++; runs == 1 {
			waitFor(t, "the server to end the transaction", func() bool {
				var alive int
				check(t, direct.r.QueryRowContext(ctx, `SELECT count(*) FROM pg_stat_activity WHERE pid = $1`, pid).Scan(&alive))
				return alive == 0
			})
		}
		return tx.putMeta(ctx, "x", nil)
	}))
	if runs < 2 { // more, where the second attempt waited for its turn on a processor for so long
		t.Errorf("%d runs", runs)
	}
}

// A server that is restarted or crashes under writers costs them time, not writes:
// every acknowledged write is there, once.
func TestPostgresRestart(t *testing.T) {
	server := sharedPostgres(t)
	db := openTest(t, server.newDatabase(t))
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	const writers = 4
	var acked, unsure [writers]int64
	for w := range writers {
		wg.Go(func() {
			for ctx.Err() == nil {
				err := db.AppendFinding(t.Context(), assay.Finding{Kind: "k", Subject: fmt.Sprint(w), Time: now()})
				switch {
				case err == nil:
					atomic.AddInt64(&acked[w], 1)
				case errors.Is(err, ErrUnknown):
					unsure[w]++
				default:
					t.Errorf("writer %d: %v", w, err)
				}
			}
		})
	}
	progress := func() {
		t.Helper()
		var before [writers]int64
		for w := range writers {
			before[w] = atomic.LoadInt64(&acked[w])
		}
		waitFor(t, "every writer to get on", func() bool {
			for w := range writers {
				if atomic.LoadInt64(&acked[w]) < before[w]+3 {
					return false
				}
			}
			return true
		})
	}
	for _, signal := range []os.Signal{syscall.SIGINT, syscall.SIGQUIT, syscall.SIGINT, syscall.SIGQUIT} {
		progress()
		server.stop(signal)
		server.start(t)
	}
	progress()
	stop()
	wg.Wait()
	for _, f := range must(db.ListFindings(t.Context(), 100))(t) {
		w, _ := strconv.Atoi(f.Subject)
		if f.Count < acked[w] || f.Count > acked[w]+unsure[w] {
			t.Errorf("writer %d: %d acknowledged, %d unknown, %d stored", w, acked[w], unsure[w], f.Count)
		}
	}
}

// waitFor waits until the condition holds.
func waitFor(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !condition() {
		if time.Now().After(deadline) || !pause(t.Context(), time.Millisecond) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

func TestPostgresErrors(t *testing.T) {
	server := sharedPostgres(t)
	url := server.newDatabase(t)
	db := openTest(t, url)
	ctx := t.Context()

	_, err := Open(ctx, server.url("nowhere"))
	wantKind(t, err, assay.NotFound)

	stranger := fmt.Sprintf("stranger%d", server.databases.Add(1))
	server.admin(t, "CREATE ROLE "+stranger+" LOGIN")
	_, err = Open(ctx, strings.Replace(url, "assay@", stranger+"@", 1))
	wantKind(t, err, assay.Denied)

	server.admin(t, "ALTER DATABASE "+url[strings.Index(url, "@/")+2:strings.Index(url, "?")]+" SET default_transaction_read_only = on")
	readOnly := openTest(t, url)
	err = readOnly.PutMeta(ctx, "x", nil)
	wantKind(t, err, assay.Denied)
	if !strings.Contains(err.Error(), "read-only") {
		t.Errorf("error does not say why: %v", err)
	}

	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	_, err = Open(short, "postgres://u:secret@127.0.0.1:1/x")
	wantKind(t, err, assay.Unavailable)
	if strings.Contains(err.Error(), "secret") {
		t.Errorf("error tells the password: %v", err)
	}
	check(t, db.PutMeta(ctx, "x", nil))
}

// The database's files are on a disk of their own that fills up; the server itself
// lives on.
func TestPostgresDiskFull(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: a server's user and a mount")
	}
	if !inMountNamespace(t) {
		return
	}
	server := newPostgres(t)
	t.Cleanup(server.remove)
	disk := smallDisk(t, "24m")
	// The folders above must let the server's user through.
	for dir := disk; dir != "/"; dir = filepath.Dir(dir) {
		st := must(os.Stat(dir))(t)
		check(t, os.Chmod(dir, st.Mode()|0o711))
	}
	space := filepath.Join(disk, "space")
	check(t, os.Mkdir(space, 0o700))
	check(t, os.Chown(space, int(server.owner.Uid), int(server.owner.Gid)))
	server.admin(t, "CREATE TABLESPACE small LOCATION '"+space+"'")
	server.admin(t, "CREATE DATABASE small TABLESPACE small")
	db := openTest(t, server.url("small"))
	ctx := t.Context()

	incompressible := func() []byte {
		f := must(os.Open("/dev/urandom"))(t)
		defer f.Close()
		b := make([]byte, 1<<20)
		must(f.Read(b))(t)
		return b
	}
	var err error
	stored := 0
	for ; stored < 40 && err == nil; stored++ {
		err = db.Audited(Audit{Who: "uid 0"}).PutMeta(ctx, fmt.Sprint(stored), incompressible())
	}
	stored-- // the last one was refused
	wantKind(t, err, assay.Unavailable)
	if !strings.Contains(err.Error(), "space") {
		t.Fatalf("error does not say what is missing: %v", err)
	}
	_, err = db.GetMeta(ctx, fmt.Sprint(stored))
	wantKind(t, err, assay.NotFound)
	equal(t, "audit lines", len(must(db.ListAudit(ctx, "", 100))(t)), stored)
	if stored == 0 {
		t.Fatal("nothing fitted")
	}
	must(db.GetMeta(ctx, fmt.Sprint(stored-1)))(t)
}
