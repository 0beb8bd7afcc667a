package store

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"assay.dev"
)

// ErrUnknown is in the chain of an error whose write may or may not be stored:
// the connection was lost at the commit and did not come back in time.
var ErrUnknown = errors.New("whether the change was stored is not known")

// DB is an open store. Its methods may be called by many goroutines at once.
type DB struct {
	*engine
	audit *Audit
}

// Open opens the store at url and brings its schema up to date. The url is
// "sqlite:PATH" or a plain path (created with mode 0600 when it does not exist), or
// "postgres://…" as libpq understands it. The caller closes the DB.
func Open(ctx context.Context, url string) (*DB, error) {
	var e *engine
	var err error
	switch scheme, rest, found := strings.Cut(url, ":"); {
	case url == "":
		err = fail(assay.Invalid, "open store", errors.New("its URL is empty"), "give sqlite:PATH or postgres://USER@HOST/DATABASE")
	case found && (scheme == "postgres" || scheme == "postgresql"):
		e, err = openPostgres(ctx, url)
	case found && scheme == "sqlite":
		e, err = openSQLite(rest)
	case found && !strings.Contains(scheme, "/"):
		err = fail(assay.Invalid, "open store", fmt.Errorf("%q is not a scheme for stores", scheme), "give sqlite:PATH or postgres://USER@HOST/DATABASE")
	default:
		e, err = openSQLite(url)
	}
	if err != nil {
		return nil, err
	}
	db := &DB{engine: e}
	if err := db.migrate(ctx); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

// Close waits for calls that are under way and gives up the store.
func (db *DB) Close() error {
	var errs []error
	if db.r != db.w {
		errs = append(errs, db.r.Close())
	}
	errs = append(errs, db.w.Close())
	if db.lock != nil {
		errs = append(errs, db.lock.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fail(assay.Internal, "close store "+db.name, err, "")
	}
	return nil
}

// Name returns where the store is, without any password.
func (db *DB) Name() string { return db.name }

// Audited returns a DB on the same store whose every write appends a to the audit
// trail in the same transaction: the change and its record are both stored or
// neither is. Its ID, and its time when that is zero, are set for each write.
func (db *DB) Audited(a Audit) *DB { return &DB{engine: db.engine, audit: &a} }

// engine is one database behind two pools.
type engine struct {
	dialect
	name   string    // for error messages; never holds a password
	w, r   *sql.DB   // writers and readers, the same pool on a server
	lock   io.Closer // what makes this process the owner; nil on a server
	turns  *semaphore.Weighted
	pruned atomic.Int64 // when old keys were last forgotten, microseconds
	held   atomic.Pointer[holder]
	origin atomic.Pointer[string] // see Follow
	// patience is how long one call keeps retrying.
	patience time.Duration
}

func now() time.Time { return time.Now() }

// newID returns a key that is unique and sorts by time: 16 hexadecimal digits of
// microseconds, 16 of randomness.
func newID(t time.Time) string {
	var b [8]byte
	rand.Read(b[:]) // never fails (crypto/rand)
	return fmt.Sprintf("%016x%s", uint64(t.UnixMicro()), hex.EncodeToString(b[:]))
}

func micros(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}

func fromMicros(us int64) time.Time {
	if us == 0 {
		return time.Time{}
	}
	return time.UnixMicro(us).UTC()
}

func fail(kind assay.Kind, op string, err error, remedy string) error {
	return &assay.Error{Kind: kind, Op: op, Err: err, Remedy: remedy}
}
