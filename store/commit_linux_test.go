package store

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"assay.dev"
)

// fault is what a cutter does to a connection on which a COMMIT arrives.
type fault int

const (
	passOn       fault = iota
	cutBefore          // the server never hears of it
	cutAfter           // the server commits, the client never hears of it
	leaveHanging       // the client is cut off, the server waits in the open transaction
	lateCommit         // like leaveHanging; resolve then delivers the COMMIT after all
)

func (f fault) String() string {
	return [...]string{"pass on", "cut before", "cut after", "leave hanging", "late commit"}[f]
}

// cutter sits between pgx and the server and cuts connections at COMMIT. It reads
// the frontend's messages as PostgreSQL's documentation has them (Message Formats):
// after the start-up message, a type byte and a length that counts itself.
type cutter struct {
	dir      string // where it listens, as a server would
	server   string
	listener net.Listener
	wg       sync.WaitGroup

	mu      sync.Mutex
	next    []fault // for the COMMITs to come
	down    bool    // new connections are refused
	conns   map[net.Conn]bool
	hanging chan func() // ends one hanging transaction
}

// newCutter listens in front of the database at dbURL and returns the URL to use
// instead.
func newCutter(t *testing.T, dbURL string) (*cutter, string) {
	t.Helper()
	u := must(url.Parse(dbURL))(t)
	c := &cutter{dir: t.TempDir(), server: filepath.Join(u.Query().Get("host"), ".s.PGSQL.5432"),
		conns: make(map[net.Conn]bool), hanging: make(chan func(), 1)}
	c.listener = must(net.Listen("unix", filepath.Join(c.dir, ".s.PGSQL.5432")))(t)
	c.wg.Go(c.accept)
	t.Cleanup(func() {
		c.listener.Close()
		c.mu.Lock()
		for conn := range c.conns {
			conn.Close()
		}
		c.mu.Unlock()
		c.wg.Wait()
	})
	return c, pgURL(c.dir, strings.TrimPrefix(u.Path, "/"))
}

// plan sets what happens at the next COMMITs.
func (c *cutter) plan(faults ...fault) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.next = faults
}

func (c *cutter) setDown(down bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.down = down
}

func (c *cutter) take() fault {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.next) == 0 {
		return passOn
	}
	f := c.next[0]
	c.next = c.next[1:]
	return f
}

func (c *cutter) accept() {
	for {
		client, err := c.listener.Accept()
		if err != nil {
			return
		}
		c.mu.Lock()
		server, err := net.Dial("unix", c.server)
		if c.down || err != nil {
			client.Close()
			if err == nil {
				server.Close()
			}
			c.mu.Unlock()
			continue
		}
		c.conns[client], c.conns[server] = true, true
		c.mu.Unlock()
		var muted atomic.Bool
		answered := make(chan struct{}, 1)
		c.wg.Go(func() { c.answers(client, server, &muted, answered) })
		c.wg.Go(func() { c.questions(client, server, &muted, answered) })
	}
}

// answers carries what the server says, until it is muted.
func (c *cutter) answers(client, server net.Conn, muted *atomic.Bool, answered chan<- struct{}) {
	defer client.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := server.Read(buf)
		if muted.Load() {
			select {
			case answered <- struct{}{}:
			default:
			}
		} else if _, werr := client.Write(buf[:n]); werr != nil {
			return
		}
		if err != nil {
			return
		}
	}
}

// questions carries what the client says, message by message.
func (c *cutter) questions(client, server net.Conn, muted *atomic.Bool, answered <-chan struct{}) {
	hang := false
	defer func() {
		if !hang {
			server.Close()
		}
	}()
	head := make([]byte, 5)
	for start := true; ; start = false {
		skip := 0
		if start {
			skip = 1 // the start-up message has no type
		}
		if _, err := io.ReadFull(client, head[skip:]); err != nil {
			return
		}
		body := make([]byte, binary.BigEndian.Uint32(head[1:])-4)
		if _, err := io.ReadFull(client, body); err != nil {
			return
		}
		message := append(bytes.Clone(head[skip:]), body...)
		if !start && head[0] == 'Q' && string(body) == "COMMIT\x00" {
			switch f := c.take(); f {
			case cutBefore:
				client.Close()
				return
			case cutAfter:
				muted.Store(true)
				if _, err := server.Write(message); err == nil {
					<-answered
				}
				client.Close()
				return
			case leaveHanging, lateCommit:
				muted.Store(true)
				client.Close()
				hang = true
				c.hanging <- func() {
					if f == lateCommit {
						if _, err := server.Write(message); err == nil {
							<-answered
						}
					}
					server.Close()
				}
				return
			}
		}
		if _, err := server.Write(message); err != nil {
			return
		}
	}
}

// A connection that is lost at COMMIT, before or after the server has heard of it,
// never loses a change and never makes it twice.
func TestCommitWithoutAnswer(t *testing.T) {
	dbURL := sharedPostgres(t).newDatabase(t)
	cut, through := newCutter(t, dbURL)
	db, direct := openTest(t, through), openTest(t, dbURL)
	ctx := t.Context()

	plans := [][]fault{{cutBefore}, {cutAfter}, {cutBefore, cutAfter}, {cutBefore, cutBefore, passOn}, {cutAfter, cutAfter}}
	for i, plan := range plans {
		t.Run(fmt.Sprint(plan), func(t *testing.T) {
			name := fmt.Sprint("finding ", i)
			cut.plan(plan...)
			check(t, db.AppendFinding(ctx, assay.Finding{Kind: name, Time: day}))
			for _, f := range must(direct.ListFindings(ctx, 100))(t) {
				if f.Kind == name && f.Count != 1 {
					t.Errorf("stored %d times", f.Count)
				}
			}
			equal(t, "findings", len(must(direct.ListFindings(ctx, 100))(t)), i+1)

			cut.plan(plan...)
			equal(t, "number", must(db.AllocateVIP(ctx, name, 100))(t), int64(i+1))
			equal(t, "stored number", must(direct.ListVIPs(ctx))(t)[name], int64(i+1))

			check(t, direct.CreateToken(ctx, Token{ID: name, Hash: []byte{1}, Expires: day}))
			cut.plan(plan...)
			must(db.ConsumeToken(ctx, name, []byte{1}, "key-a", day.Add(-1)))(t)

			cut.plan(plan...)
			equal(t, "swapped", must(db.CompareAndSetMeta(ctx, name, nil, []byte("1")))(t), true)

			cut.plan(plan...)
			o := Object{Kind: "Service", Name: name, Spec: []byte(`1`), Source: "apply"}
			equal(t, "action", must(db.Audited(Audit{Who: name}).PutObject(ctx, o))(t).Action, Created)
			lines := 0
			for _, a := range must(direct.ListAudit(ctx, "", 100))(t) {
				if a.Who == name {
					lines++
				}
			}
			equal(t, "audit lines", lines, 1)
			cut.plan()
		})
	}
}

// The hard case: the client is cut off, its transaction lives on with all its locks,
// and commits only while the next attempt waits for it, or never.
func TestCommitOfHangingTransaction(t *testing.T) {
	dbURL := sharedPostgres(t).newDatabase(t)
	cut, through := newCutter(t, dbURL)
	db, direct := openTest(t, through), openTest(t, dbURL)
	for _, f := range []fault{leaveHanging, lateCommit} {
		t.Run(fmt.Sprint(f), func(t *testing.T) {
			name := fmt.Sprint("service ", f)
			before := int64(len(must(direct.ListVIPs(t.Context()))(t)))
			cut.plan(f)
			type answer struct {
				number int64
				err    error
			}
			done := make(chan answer, 1)
			go func() {
				n, err := db.AllocateVIP(t.Context(), name, 100)
				done <- answer{n, err}
			}()
			end := <-cut.hanging
			waitFor(t, "the next attempt to wait for the hanging one", func() bool {
				var waiting int
				check(t, direct.r.QueryRowContext(t.Context(), `SELECT count(*) FROM pg_stat_activity
					WHERE wait_event_type = 'Lock' AND datname = current_database()`).Scan(&waiting))
				return waiting > 0
			})
			end()
			got := <-done
			check(t, got.err)
			all := must(direct.ListVIPs(t.Context()))(t)
			if got.number != before+1 || all[name] != got.number || int64(len(all)) != before+1 {
				t.Errorf("told %d, stored %v, want %d", got.number, all, before+1)
			}
		})
	}
}

// When the server does not come back in time, the caller is told that the outcome
// is unknown, and repeating the call settles it.
func TestCommitUnknown(t *testing.T) {
	dbURL := sharedPostgres(t).newDatabase(t)
	cut, through := newCutter(t, dbURL)
	db, direct := openTest(t, through), openTest(t, dbURL)
	db.patience = 300 * time.Millisecond
	for _, f := range []fault{cutBefore, cutAfter} {
		name := fmt.Sprint("bank/", f)
		cut.plan(f)
		cut.setDown(true)
		_, err := db.AllocateVIP(t.Context(), name, 100)
		// The read before the write may have needed a connection too.
		if !errors.Is(err, ErrUnknown) || assay.KindOf(err) != assay.Unavailable {
			t.Fatalf("error %v, want one that wraps ErrUnknown", err)
		}
		_, stored := must(direct.ListVIPs(t.Context()))(t)[name]
		equal(t, "stored", stored, f == cutAfter)
		cut.setDown(false)
		number := must(db.AllocateVIP(t.Context(), name, 100))(t)
		equal(t, "number", must(direct.ListVIPs(t.Context()))(t)[name], number)
	}

	// A caller that goes away while the outcome is unknown is told so, too.
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cut.plan(cutAfter)
	cut.setDown(true)
	db.patience = time.Minute
	err := db.write(ctx, "store", func(ctx context.Context, t *tx) error {
		time.AfterFunc(100*time.Millisecond, cancel)
		return t.putMeta(ctx, "x", nil)
	})
	if !errors.Is(err, ErrUnknown) {
		t.Errorf("error %v, want one that wraps ErrUnknown", err)
	}
	cut.setDown(false)
}

// Old keys are forgotten, young ones are not.
func TestCommitKeysArePruned(t *testing.T) {
	db := openTest(t, sharedPostgres(t).newDatabase(t))
	ctx := t.Context()
	must(db.w.ExecContext(ctx, `INSERT INTO committed (id, at) VALUES ('old', $1)`, micros(now().Add(-keyRetention-time.Second))))(t)
	check(t, db.PutMeta(ctx, "x", nil))
	var keys int
	check(t, db.r.QueryRowContext(ctx, `SELECT count(*) FROM committed`).Scan(&keys))
	equal(t, "keys kept", keys, 1)
	check(t, db.PutMeta(ctx, "x", nil))
	check(t, db.r.QueryRowContext(ctx, `SELECT count(*) FROM committed`).Scan(&keys))
	equal(t, "keys kept", keys, 2)
}
