package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"assay.dev"
)

// Kind is what a change is about.
type Kind string

// Kinds of changes, and what their names are.
const (
	OfHost        Kind = "host"        // ID
	OfWorkload    Kind = "workload"    // ID
	OfClaim       Kind = "claim"       // pod
	OfToken       Kind = "token"       // ID
	OfVIP         Kind = "vip"         // service
	OfObject      Kind = "object"      // Key.String
	OfCertificate Kind = "certificate" // serial
	OfFinding     Kind = "finding"     // its digest
	OfAudit       Kind = "audit"       // ID
	OfMeta        Kind = "meta"        // name
)

// ErrForgotten is in the chain of an error when changes that were asked for are no longer
// kept: whoever follows has to read everything.
var ErrForgotten = errors.New("what has changed since is no longer known")

// changeRetention is how long changes are kept for those who were away.
const changeRetention = time.Hour

// Follow has every write of this process leave a change for the other processes on this
// store, under a revision that only grows. origin names this process; no other has it.
func (db *DB) Follow(origin string) { db.origin.Store(&origin) }

// own returns the name of this process; "" if it does not Follow.
func (e *engine) own() string {
	if p := e.origin.Load(); p != nil {
		return *p
	}
	return ""
}

type touch struct {
	kind Kind
	name string
}

// touch notes what a transaction has changed.
func (t *tx) touch(kind Kind, name string) {
	if t.own() != "" {
		t.touched = append(t.touched, touch{kind, name})
	}
}

// leave leaves the changes of a transaction, under a revision of its own. It is the last
// statement before the commit: writers wait for each other here, and briefly.
func (t *tx) leave(ctx context.Context) error {
	if len(t.touched) == 0 {
		return nil
	}
	if _, err := t.exec(ctx, `UPDATE revision SET current = current + 1 WHERE one = 1`); err != nil {
		return err
	}
	var revision int64
	if _, err := t.row(ctx, `SELECT current FROM revision WHERE one = 1`, nil, &revision); err != nil {
		return err
	}
	slices.SortFunc(t.touched, func(a, b touch) int {
		if c := strings.Compare(string(a.kind), string(b.kind)); c != 0 {
			return c
		}
		return strings.Compare(a.name, b.name)
	})
	origin := t.own()
	for part := range slices.Chunk(slices.Compact(t.touched), 100) {
		var values strings.Builder
		var args []any
		for i, c := range part {
			if i > 0 {
				values.WriteByte(',')
			}
			fmt.Fprintf(&values, "($%d,$%d,$%d,$%d,%s)", 4*i+1, 4*i+2, 4*i+3, 4*i+4, t.clock)
			args = append(args, revision, string(c.kind), c.name, origin)
		}
		if _, err := t.exec(ctx, `INSERT INTO change (revision, kind, name, origin, at) VALUES `+values.String(), args...); err != nil {
			return err
		}
	}
	return nil
}

// Revision returns the revision of the newest write that left a change.
func (db *DB) Revision(ctx context.Context) (revision int64, err error) {
	err = db.read(ctx, "read the store's revision", func(ctx context.Context, t *tx) error {
		_, err := t.row(ctx, `SELECT current FROM revision WHERE one = 1`, nil, &revision)
		return err
	})
	return revision, err
}

// Since returns the newest revision and the names of what other processes have changed after
// the given one, by kind. Whoever then reads those has at least that revision of them. The
// error has ErrForgotten in its chain when that is no longer known.
func (db *DB) Since(ctx context.Context, after int64) (revision int64, changed map[Kind][]string, err error) {
	const op = "read what has changed"
	err = db.read(ctx, op, func(ctx context.Context, t *tx) error {
		changed = map[Kind][]string{}
		var forgotten int64
		if _, err := t.row(ctx, `SELECT current, forgotten FROM revision WHERE one = 1`, nil, &revision, &forgotten); err != nil || revision == after {
			return err
		}
		if after < forgotten || revision < after {
			return fail(assay.Conflict, op, fmt.Errorf("since revision %d, of %d: %w", after, revision, ErrForgotten), "start this control again: it then reads everything")
		}
		list, err := all(ctx, t, func(rows *sql.Rows) (c touch, err error) { return c, rows.Scan(&c.kind, &c.name) },
			`SELECT DISTINCT kind, name FROM change WHERE revision > $1 AND origin <> $2 ORDER BY kind, name`, after, t.own())
		for _, c := range list {
			changed[c.kind] = append(changed[c.kind], c.name)
		}
		return err
	})
	return revision, changed, err
}

// forgetChanges removes what nobody needs who was not away for too long.
func (db *DB) forgetChanges(ctx context.Context) {
	_ = db.transact(ctx, "forget old changes", newID(now()), func(ctx context.Context, t *tx) error {
		var oldest int64
		if found, err := t.row(ctx, `SELECT revision FROM change WHERE at < `+t.clock+` - $1 ORDER BY revision DESC LIMIT 1`, []any{changeRetention.Microseconds()}, &oldest); err != nil || !found {
			return err
		}
		if _, err := t.exec(ctx, `UPDATE revision SET forgotten = $1 WHERE one = 1`, oldest); err != nil {
			return err
		}
		_, err := t.exec(ctx, `DELETE FROM change WHERE revision <= $1`, oldest)
		return err
	})
}

// byNames reads records whose column is one of names, which may be many.
func byNames[T any](ctx context.Context, t *tx, scan func(*sql.Rows) (T, error), query string, names []string) ([]T, error) {
	var out []T
	for part := range slices.Chunk(names, 500) {
		var marks strings.Builder
		args := make([]any, len(part))
		for i, n := range part {
			if i > 0 {
				marks.WriteByte(',')
			}
			fmt.Fprintf(&marks, "$%d", i+1)
			args[i] = n
		}
		list, err := all(ctx, t, scan, query+" IN ("+marks.String()+")", args...)
		if err != nil {
			return nil, err
		}
		out = append(out, list...)
	}
	return out, nil
}
