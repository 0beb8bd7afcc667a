package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"golang.org/x/sync/semaphore"

	"assay.dev"
)

const (
	serverConns    = 16
	serverConnLife = 30 * time.Minute // so that load moves to a new primary or replica
)

// openPostgres makes the pool; the first connection is made by the migration.
func openPostgres(ctx context.Context, url string) (*engine, error) {
	const op = "open store"
	config, err := pgx.ParseConfig(url)
	if err != nil {
		// pgx keeps the password out of this error.
		return nil, fail(assay.Invalid, op, err, "give postgres://USER@HOST:PORT/DATABASE?sslmode=verify-full")
	}
	if config.ConnectTimeout == 0 {
		config.ConnectTimeout = 5 * time.Second
	}
	for name, value := range map[string]string{
		"application_name": "assay",
		// A transaction whose client has vanished must not hold its locks for long.
		"idle_in_transaction_session_timeout": "15000", // milliseconds
		"lock_timeout":                        "5000",
	} {
		if config.RuntimeParams[name] == "" {
			config.RuntimeParams[name] = value
		}
	}
	pool := stdlib.OpenDB(*config)
	pool.SetMaxOpenConns(serverConns)
	pool.SetMaxIdleConns(serverConns)
	pool.SetConnMaxLifetime(serverConnLife)
	e := &engine{
		name: fmt.Sprintf("postgres://%s:%d/%s", config.Host, config.Port, config.Database), w: pool, r: pool, patience: patience, turns: semaphore.NewWeighted(crowd),
		dialect: dialect{
			begin:     "BEGIN ISOLATION LEVEL SERIALIZABLE",
			beginRead: "BEGIN ISOLATION LEVEL SERIALIZABLE READ ONLY",
			forUpdate: " FOR UPDATE",
			clock:     "(extract(epoch FROM clock_timestamp()) * 1000000)::BIGINT",
			hasTable:  `SELECT count(*) FROM information_schema.tables WHERE table_schema = current_schema() AND table_name = $1`,
			keyed:     true,
			diagnose:  diagnosePostgres,
		},
	}
	// The one place that asks what the server is: CockroachDB orders text bytewise
	// anyway, and has no collation of PostgreSQL's name for it.
	var version string
	err = e.persist(ctx, op, new(bool), func() (diagnosis, error) {
		if err := pool.QueryRowContext(ctx, `SELECT version()`).Scan(&version); err != nil {
			return diagnosePostgres(err), err
		}
		return diagnosis{}, nil
	})
	if err != nil {
		return nil, errors.Join(err, pool.Close())
	}
	text := `TEXT COLLATE "C"`
	if strings.HasPrefix(version, "CockroachDB") {
		text = "TEXT"
	}
	e.types = strings.NewReplacer("{{bytes}}", "BYTEA", "{{text}}", text)
	return e, nil
}

// diagnosePostgres goes by SQLSTATE (PostgreSQL, appendix A), first the exact
// code, then its class.
func diagnosePostgres(err error) diagnosis {
	e, ok := errors.AsType[*pgconn.PgError](err)
	if !ok {
		if lostConnection(err) {
			return diagnosis{then: reconnect, kind: assay.Unavailable, cause: "the connection to the server was lost or refused",
				remedy: "the server must run and be reachable from here"}
		}
		return diagnosis{kind: assay.Internal}
	}
	switch e.Code {
	case "40003", "25P03": // statement_completion_unknown, idle_in_transaction_session_timeout
		return diagnosis{then: reconnect, kind: assay.Unavailable, cause: "the server ended the transaction", remedy: "try again"}
	case "55P03", "57014": // lock_not_available, query_canceled
		return diagnosis{then: again, kind: assay.Unavailable, cause: "the server gave up waiting", remedy: "look for a long transaction on the server"}
	case "53100": // disk_full
		return diagnosis{kind: assay.Unavailable, cause: "no space left on the server", remedy: "free space there; nothing was stored"}
	case "25006": // read_only_sql_transaction
		return diagnosis{kind: assay.Denied, cause: "the server is read-only", remedy: "name the primary in the URL, or all servers with target_session_attrs=read-write"}
	case "3D000": // invalid_catalog_name
		return diagnosis{kind: assay.NotFound, remedy: "create the database and give its owner to this user"}
	case "42501": // insufficient_privilege
		return diagnosis{kind: assay.Denied, remedy: "grant this user all on the store's schema"}
	case "23505", "42P07", "42710": // unique_violation, duplicate_table, duplicate_object
		return diagnosis{then: alreadyKept, kind: assay.Conflict}
	}
	switch e.Code[:min(2, len(e.Code))] {
	case "40": // transaction_rollback
		return diagnosis{then: again, kind: assay.Unavailable, cause: "other writers keep winning", remedy: "try again"}
	case "08", "57": // connection_exception, operator_intervention
		return diagnosis{then: reconnect, kind: assay.Unavailable, cause: "the server is going down or coming up", remedy: "try again when it is up"}
	case "28": // invalid_authorization_specification
		return diagnosis{kind: assay.Denied, cause: "the server does not let this user in", remedy: "check user, password and certificate in the URL"}
	case "53": // insufficient_resources
		return diagnosis{then: reconnect, kind: assay.Unavailable, cause: "the server is at its limits", remedy: "raise max_connections or memory on the server"}
	case "58": // system_error
		return diagnosis{kind: assay.Unavailable, cause: "the server's disk fails", remedy: "check the server's log and disk"}
	}
	return diagnosis{kind: assay.Internal}
}

// lostConnection tells errors of the connection from errors of the call.
func lostConnection(err error) bool {
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		return true
	}
	if _, ok := errors.AsType[net.Error](err); ok {
		return true
	}
	return errors.Is(err, driver.ErrBadConn) || errors.Is(err, sql.ErrConnDone) || errors.Is(err, io.EOF) ||
		errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) || pgconn.SafeToRetry(err) ||
		strings.Contains(err.Error(), "conn closed")
}
