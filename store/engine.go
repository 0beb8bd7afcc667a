package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
	"unicode/utf8"

	"assay.dev"
)

const (
	patience       = 15 * time.Second // how long one call keeps retrying
	commitPatience = 10 * time.Second // how long one COMMIT or ROLLBACK may take
	keyRetention   = time.Hour        // a commit's key is needed for patience; the store's clock may be set
	pruneEvery     = 10 * time.Minute

	// A server lets some writer win each time, not each writer some time. One that
	// has lost so often gets its turn alone, as far as this process is concerned.
	losses = 4
	crowd  = 1 << 10 // writers that may try at once
)

// dialect is everything in which the two engines differ.
type dialect struct {
	begin     string // starts a write transaction
	beginRead string // starts a read-only transaction
	forUpdate string // suffix of a SELECT that locks the rows it returns
	clock     string // the store's own clock, in microseconds since 1970: those of its processes differ
	hasTable  string // counts the tables named $1
	types     *strings.Replacer
	// keyed says that a COMMIT can end without an answer, so that every write
	// stores its key (table committed).
	keyed bool
	// diagnose explains an error of the driver.
	diagnose func(error) diagnosis
}

// diagnosis is what to do about an error of the driver.
type diagnosis struct {
	then   action
	kind   assay.Kind
	cause  string // "" keeps the driver's own words
	remedy string
}

type action uint8

const (
	giveUp      action = iota // the statement was refused
	again                     // the transaction lost to another: nothing is stored, run it again
	reconnect                 // the connection is gone
	alreadyKept               // a unique key exists: for the commit's own key, an earlier attempt is stored
)

// tx is one attempt at a transaction.
type tx struct {
	conn *sql.Conn
	*engine
	// err is the first error of a statement. PostgreSQL answers COMMIT with success
	// after one, having rolled back, so it must never be overlooked.
	err     error
	touched []touch // for those who follow
}

func (t *tx) exec(ctx context.Context, query string, args ...any) (int64, error) {
	if err := checkText(args); err != nil {
		return 0, err
	}
	res, err := t.conn.ExecContext(ctx, query, args...)
	if err != nil {
		t.err = errors.Join(t.err, err)
		return 0, err
	}
	return res.RowsAffected()
}

// row runs a query for at most one row; found is false when there is none.
func (t *tx) row(ctx context.Context, query string, args []any, dest ...any) (found bool, err error) {
	if err := checkText(args); err != nil {
		return false, err
	}
	err = t.conn.QueryRowContext(ctx, query, args...).Scan(dest...)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return false, nil
	case err != nil:
		t.err = errors.Join(t.err, err)
		return false, err
	}
	return true, nil
}

// all runs a query and scans every row.
func all[T any](ctx context.Context, t *tx, scan func(*sql.Rows) (T, error), query string, args ...any) ([]T, error) {
	if err := checkText(args); err != nil {
		return nil, err
	}
	list, err := func() ([]T, error) {
		rows, err := t.conn.QueryContext(ctx, query, args...)
		if err != nil {
			return nil, err
		}
		defer rows.Close()
		var list []T
		for rows.Next() {
			v, err := scan(rows)
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		return list, rows.Err()
	}()
	if err != nil {
		t.err = errors.Join(t.err, err)
	}
	return list, err
}

// checkText holds both engines to PostgreSQL's idea of text.
func checkText(args []any) error {
	for _, a := range args {
		if s, ok := a.(string); ok && (!utf8.ValidString(s) || strings.IndexByte(s, 0) >= 0) {
			return fail(assay.Invalid, fmt.Sprintf("store text %.40q", s), errors.New("it is not UTF-8 text without NUL"), "send text")
		}
	}
	return nil
}

// write runs fn in a serialisable transaction and commits it, running it again
// for as long as that can help. fn may run several times and must set its results
// anew each time; when write returns nil they are those of the attempt that was
// stored.
//
// How a lost COMMIT is decided, on an engine with dialect.keyed: the transaction's
// first statement inserts its key, the same in all attempts. The next attempt
// looks the key up: if it is there, the earlier one was stored. If not, it inserts
// the key again. Should the earlier transaction be still alive on the server, this
// insert waits for it, and then either fails, because the earlier one was stored
// after all, or goes through, because it never will be. Only then does fn run
// again.
func (db *DB) write(ctx context.Context, op string, fn func(context.Context, *tx) error) error {
	key := ""
	if db.keyed {
		key = newID(now())
	}
	if err := db.transact(ctx, op, key, fn); err != nil {
		return err
	}
	db.pruneKeys(ctx)
	return nil
}

func (db *DB) transact(ctx context.Context, op, key string, fn func(context.Context, *tx) error) error {
	unknown := false
	lost := 0
	return db.persist(ctx, op, &unknown, func() (d diagnosis, err error) {
		weight := int64(1)
		if lost >= losses {
			weight = crowd
		}
		if err := db.turns.Acquire(ctx, weight); err != nil {
			return diagnosis{}, err
		}
		defer db.turns.Release(weight)
		defer func() {
			if err != nil && d.then == again {
				lost++
			}
		}()
		t, end, err := db.start(ctx, db.w, db.begin)
		if err != nil {
			return db.diagnose(err), err
		}
		committed := false
		defer func() { end(committed) }()

		if key != "" {
			if unknown {
				var one int64
				found, err := t.row(ctx, `SELECT 1 FROM committed WHERE id = $1`, []any{key}, &one)
				if err != nil {
					return db.diagnose(err), err
				}
				if found {
					return diagnosis{}, nil
				}
			}
			if _, err := t.exec(ctx, `INSERT INTO committed (id, at) VALUES ($1, `+db.clock+`)`, key); err != nil {
				d := db.diagnose(err)
				if d.then == alreadyKept {
					d.then = again
				}
				return d, err
			}
			unknown = false // the earlier attempt is dead
		}
		if err := t.mine(ctx, op); err != nil {
			return db.diagnose(err), err
		}
		if err := fn(ctx, t); err != nil {
			return db.diagnose(err), err
		}
		if db.audit != nil {
			if err := db.audit.append(ctx, t); err != nil {
				return db.diagnose(err), err
			}
		}
		if err := t.leave(ctx); err != nil {
			return db.diagnose(err), err
		}
		if t.err != nil {
			return diagnosis{}, fmt.Errorf("a statement's error was overlooked: %w", t.err)
		}

		// A caller that goes away now must not make the outcome unknown.
		commitCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commitPatience)
		defer cancel()
		if _, err := t.conn.ExecContext(commitCtx, "COMMIT"); err != nil {
			d := db.diagnose(err)
			if db.keyed && d.then != again {
				// Even an error message is no proof: a server that shuts down can
				// send one after it has committed.
				unknown, d.then = true, reconnect
			}
			return d, err
		}
		committed, unknown = true, false
		return diagnosis{}, nil
	})
}

// read runs fn in a read-only transaction: all its queries see one state.
func (db *DB) read(ctx context.Context, op string, fn func(context.Context, *tx) error) error {
	unknown := false
	return db.persist(ctx, op, &unknown, func() (diagnosis, error) {
		t, end, err := db.start(ctx, db.r, db.beginRead)
		if err != nil {
			return db.diagnose(err), err
		}
		defer end(false)
		if err := fn(ctx, t); err != nil {
			return db.diagnose(err), err
		}
		return diagnosis{}, nil
	})
}

// start takes a connection and begins a transaction; end rolls back what was not
// committed and gives the connection back.
func (e *engine) start(ctx context.Context, pool *sql.DB, begin string) (t *tx, end func(committed bool), err error) {
	conn, err := pool.Conn(ctx)
	if err != nil {
		return nil, nil, err
	}
	end = func(committed bool) {
		if !committed {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commitPatience)
			defer cancel()
			if _, err := conn.ExecContext(ctx, "ROLLBACK"); err != nil {
				// In doubt about its state, the connection is thrown away.
				_ = conn.Raw(func(any) error { return driver.ErrBadConn })
			}
		}
		_ = conn.Close() // it only goes back to the pool
	}
	if _, err := conn.ExecContext(ctx, begin); err != nil {
		end(false)
		return nil, nil, err
	}
	return &tx{conn: conn, engine: e}, end, nil
}

// persist runs attempt until it succeeds, cannot, or has been tried for too long,
// and turns what is left into an error for people.
func (e *engine) persist(ctx context.Context, op string, unknown *bool, attempt func() (diagnosis, error)) error {
	began := now()
	for n := 0; ; n++ {
		d, err := attempt()
		if err == nil {
			return nil
		}
		if (d.then == again || d.then == reconnect) && ctx.Err() == nil && now().Sub(began) < e.patience {
			wait := min(time.Millisecond<<min(n, 8), 250*time.Millisecond)
			if pause(ctx, wait/2+rand.N(wait)) {
				continue
			}
		}
		return e.explain(ctx, op, d, err, *unknown)
	}
}

// pause waits for d; it returns false when the context ends first.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (e *engine) explain(ctx context.Context, op string, d diagnosis, err error, unknown bool) error {
	if unknown {
		return fail(assay.Unavailable, op, fmt.Errorf("store %s: %w: %w", e.name, ErrUnknown, err),
			"repeat the call as it is once the store answers again")
	}
	if known, ok := errors.AsType[*assay.Error](err); ok {
		return known
	}
	if ctx.Err() != nil {
		return fail(assay.Unavailable, op, fmt.Errorf("store %s: %w", e.name, context.Cause(ctx)), "nothing was stored; try again")
	}
	if d.cause != "" {
		err = fmt.Errorf("%s: %w", d.cause, err)
	}
	return fail(d.kind, op, fmt.Errorf("store %s: %w", e.name, err), d.remedy)
}

// pruneKeys forgets the keys of old commits, every now and then. It is an
// auxiliary of a call that has succeeded already, so its own errors are left to
// the next call that meets them.
func (db *DB) pruneKeys(ctx context.Context) {
	last, t := db.pruned.Load(), now()
	if !db.keyed || t.UnixMicro()-last < pruneEvery.Microseconds() || !db.pruned.CompareAndSwap(last, t.UnixMicro()) {
		return
	}
	_, _ = db.w.ExecContext(ctx, `DELETE FROM committed WHERE at < `+db.clock+` - $1`, keyRetention.Microseconds())
	if db.own() != "" {
		db.forgetChanges(ctx)
	}
}
