package store

import (
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"assay.dev"
)

// sqliteReaders is how many readers run beside the one writer.
const sqliteReaders = 4

// openSQLite opens the file at path. One process owns it: WAL allows one writer at
// a time, and a single connection in a single process makes that a queue instead
// of a contest.
func openSQLite(path string) (*engine, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fail(assay.Invalid, "open store "+path, err, "give an absolute path")
	}
	op := "open store " + path
	lock, err := lockFile(path + ".lock")
	if err != nil {
		return nil, err
	}
	// Created here for its mode; SQLite gives the same one to its -wal and -shm files.
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		lock.Close()
		return nil, fail(fileKind(err), op, err, "the folder must exist and this user must be able to write there")
	}
	f.Close()

	pragmas := url.Values{"_pragma": {"busy_timeout(1000)", "journal_mode(WAL)", "synchronous(FULL)", "temp_store(MEMORY)"}}
	dsn := (&url.URL{Scheme: "file", Path: path, RawQuery: pragmas.Encode()}).String()
	w, err := sql.Open("sqlite", dsn)
	if err != nil {
		lock.Close()
		return nil, fail(assay.Internal, op, err, "")
	}
	r, err := sql.Open("sqlite", dsn+"&_pragma=query_only(1)")
	if err != nil {
		w.Close()
		lock.Close()
		return nil, fail(assay.Internal, op, err, "")
	}
	w.SetMaxOpenConns(1)
	r.SetMaxOpenConns(sqliteReaders)
	r.SetMaxIdleConns(sqliteReaders)
	return &engine{
		name: path, w: w, r: r, lock: lock, patience: patience, turns: semaphore.NewWeighted(crowd),
		dialect: dialect{
			begin:     "BEGIN IMMEDIATE",
			beginRead: "BEGIN",
			clock:     "CAST(unixepoch('subsec') * 1000000 AS INTEGER)",
			hasTable:  `SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = $1`,
			types:     strings.NewReplacer("{{bytes}}", "BLOB", "{{text}}", "TEXT"),
			diagnose:  diagnoseSQLite,
		},
	}, nil
}

// lockFile makes this process the owner of a store until the file is closed, at
// the latest by the kernel when the process ends. The file stays: removing it would
// let two processes lock two different files of one name.
func lockFile(path string) (io.Closer, error) {
	op := "lock store " + strings.TrimSuffix(path, ".lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fail(fileKind(err), op, err, "the folder must exist and this user must be able to write there")
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder, _ := io.ReadAll(io.LimitReader(f, 32))
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fail(assay.Conflict, op, fmt.Errorf("another process has it open (pid %s)", strings.TrimSpace(string(holder))),
				"stop that process, or give this one a data folder of its own")
		}
		return nil, fail(assay.Internal, op, err, "the file system must support flock")
	}
	// The number is for people only, so it may be missing on a full disk.
	if err := f.Truncate(0); err == nil {
		_, _ = fmt.Fprintf(f, "%d\n", os.Getpid())
	}
	return f, nil
}

func fileKind(err error) assay.Kind {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return assay.NotFound
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.EROFS):
		return assay.Denied
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return assay.Unavailable
	}
	return assay.Internal
}

func diagnoseSQLite(err error) diagnosis {
	e, ok := errors.AsType[*sqlite.Error](err)
	if !ok {
		return diagnosis{kind: assay.Internal}
	}
	switch e.Code() & 0xff { // without the extended part
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED:
		return diagnosis{then: again, kind: assay.Unavailable, cause: "another process holds its lock",
			remedy: "end the program that writes to the file, for instance an open sqlite3 shell"}
	case sqlite3.SQLITE_FULL:
		return diagnosis{kind: assay.Unavailable, cause: "no space left for it", remedy: "free space on its file system; nothing was stored"}
	case sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH:
		return diagnosis{kind: assay.Denied, cause: "it is read-only", remedy: "make the file and its folder writable for this user"}
	case sqlite3.SQLITE_CANTOPEN:
		return diagnosis{kind: assay.Denied, cause: "it cannot be opened", remedy: "the folder must exist and this user must be able to write there"}
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return diagnosis{kind: assay.Internal, cause: "it is damaged, or no database", remedy: "restore the latest backup; keep the damaged file for a diagnosis"}
	case sqlite3.SQLITE_IOERR:
		if c := e.Code(); c == sqlite3.SQLITE_IOERR_WRITE || c == sqlite3.SQLITE_IOERR_SHMSIZE || c == sqlite3.SQLITE_IOERR_SHMMAP || c == sqlite3.SQLITE_IOERR_TRUNCATE {
			return diagnosis{kind: assay.Unavailable, cause: "its disk does not take writes", remedy: "check space and health of its disk"}
		}
		return diagnosis{kind: assay.Internal, cause: "its disk fails", remedy: "check the health of its disk before anything else"}
	case sqlite3.SQLITE_CONSTRAINT:
		return diagnosis{then: alreadyKept, kind: assay.Conflict}
	}
	return diagnosis{kind: assay.Internal}
}
