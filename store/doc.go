// Package store keeps Assay's state in SQL: intent, hosts and their join tokens,
// workloads, the numbers behind virtual addresses and prefixes, the inventory of
// certificates, the audit trail, findings, and small named values.
//
// One schema and one set of queries run on two engines: SQLite, embedded, for one
// control; PostgreSQL's wire protocol for several, which follow each other's writes. What differs is in dialect
// values (sqlite.go, postgres.go): how a transaction starts, how a row is locked,
// what an error code means. CockroachDB is designed for (no LISTEN, advisory lock,
// sequence, or any SQL of one engine) and untested.
//
// # Contract
//
// Every call is one transaction and serialisable: it takes effect at one point
// between its start and its return, all of it or nothing. What a call has
// returned is durable: it survives kill -9 and, as far as the disk keeps its
// promises, loss of power (SQLite: WAL with synchronous=FULL; PostgreSQL: as the
// server is configured). A reader sees every write that returned before it began.
//
// Every write can be retried. Inside a call the store does so itself, for
// serialisation failures, deadlocks, lost connections and server restarts, until
// the context ends or 15 seconds have passed. On a server each write transaction
// first stores a random key of its own; when the connection is lost at COMMIT the
// key is read back, so that a change is made once and its result is the result of
// the attempt that was stored (see engine.write). When even that cannot be
// decided in time the error wraps [ErrUnknown], and the call may be repeated as it
// is: all methods are idempotent by the caller's keys, as each says.
//
// Every error is an *assay.Error with a remedy. Its kind says what the caller can
// do: Unavailable may be retried (lost connection, full disk, database locked),
// Denied needs a privilege (read-only, wrong password), Conflict means that the
// record says otherwise, or that another process or a newer build owns the store.
//
// Text must be UTF-8 without NUL. Times have microseconds, are UTC, and 0 when not
// set. Lists are ordered bytewise by key, whatever the server's locale.
//
// # What it refuses to do
//
// It holds no secret in the clear: of a token it has only a hash, of an authority that
// several controls share what they have sealed. It decides
// nothing, watches nothing and starts no goroutine of its own (database/sql keeps
// one per pool until Close). Nothing reads it to serve a request.
//
// A SQLite file belongs to one process, which holds PATH.lock; others may read it
// with SQLite's own tools, for instance to make a backup (`sqlite3 PATH .backup`).
//
// # Tour
//
// store.go opens; engine.go runs transactions; migrate.go and migrations/ hold the
// schema; object.go is intent; host.go hosts, tokens and workloads; allocate.go
// stable numbers; certificate.go the inventory; record.go audit and findings;
// meta.go named values; follow.go what others have changed; replica.go who they are, whose
// hosts are whose, and what one may say of them.
package store
