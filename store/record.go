package store

import (
	"context"
	"database/sql"
	"slices"
	"strings"
	"time"

	"assay.dev"
)

// Audit is one line of the audit trail: who did what, when, and what came of it.
type Audit struct {
	ID      string    `json:"id"` // sorts by time; set by the store when empty
	Time    time.Time `json:"time"`
	Who     string    `json:"who"`  // "uid 0 (root)", an operator's SPIFFE ID
	Role    string    `json:"role"` // viewer, operator
	Call    string    `json:"call"`
	Subject string    `json:"subject"`
	Outcome string    `json:"outcome"` // "ok", or the error
}

// AppendAudit adds a line. With an ID of the caller's the same line again is no
// error. See also Audited, which ties a line to the change it is about.
func (db *DB) AppendAudit(ctx context.Context, a Audit) error {
	if a.Time.IsZero() {
		a.Time = now()
	}
	if a.ID == "" {
		a.ID = newID(a.Time) // the same in all attempts
	}
	return db.write(ctx, "store audit record", func(ctx context.Context, t *tx) error { return a.append(ctx, t) })
}

func (a Audit) append(ctx context.Context, t *tx) error {
	if a.Time.IsZero() {
		a.Time = now()
	}
	if a.ID == "" {
		a.ID = newID(a.Time)
	}
	t.touch(OfAudit, a.ID)
	_, err := t.exec(ctx, `INSERT INTO audit (id, at, who, role, call, subject, outcome) VALUES ($1, $2, $3, $4, $5, $6, $7)
		ON CONFLICT (id) DO NOTHING`, a.ID, micros(a.Time), a.Who, a.Role, a.Call, a.Subject, a.Outcome)
	return err
}

// ListAudit returns up to limit lines, the newest first, starting below the ID
// before, or at the newest for "".
func (db *DB) ListAudit(ctx context.Context, before string, limit int) ([]Audit, error) {
	var list []Audit
	err := db.read(ctx, "list audit records", func(ctx context.Context, t *tx) (err error) {
		list, err = all(ctx, t, scanAudit, selectAudit+` WHERE $1 = '' OR id < $1 ORDER BY id DESC LIMIT $2`, before, limit)
		return err
	})
	return list, err
}

// AuditByID returns those of the lines that there are, ordered by ID.
func (db *DB) AuditByID(ctx context.Context, ids ...string) ([]Audit, error) {
	var list []Audit
	err := db.read(ctx, "read audit records", func(ctx context.Context, t *tx) (err error) {
		list, err = byNames(ctx, t, scanAudit, selectAudit+` WHERE id`, ids)
		return err
	})
	slices.SortFunc(list, func(a, b Audit) int { return strings.Compare(a.ID, b.ID) })
	return list, err
}

const selectAudit = `SELECT id, at, who, role, call, subject, outcome FROM audit`

func scanAudit(rows *sql.Rows) (a Audit, err error) {
	var at int64
	err = rows.Scan(&a.ID, &at, &a.Who, &a.Role, &a.Call, &a.Subject, &a.Outcome)
	a.Time = fromMicros(at)
	return a, err
}

// MaxFindings is how many findings are kept; the ones last seen longest ago go first.
const MaxFindings = 10_000

// Finding is a finding and how often it was made.
type Finding struct {
	assay.Finding           // of the last time
	First         time.Time `json:"first"`
	Count         int64     `json:"count"`
}

// AppendFinding records a finding. One of the same workload, kind and subject is
// the same finding again: it is counted, and its detail replaced.
func (db *DB) AppendFinding(ctx context.Context, f assay.Finding) error {
	id := string(assay.DigestOf([]byte(strings.Join([]string{f.Workload, f.Kind, f.Subject}, "\x00"))))
	return db.write(ctx, "store finding", func(ctx context.Context, t *tx) error {
		t.touch(OfFinding, id)
		n, err := t.exec(ctx, `UPDATE finding SET count = count + 1, detail = $1, remedy = $2,
			last = CASE WHEN last < $3 THEN $3 ELSE last END WHERE id = $4`, f.Detail, f.Remedy, micros(f.Time), id)
		if err != nil || n > 0 {
			return err
		}
		if _, err := t.exec(ctx, `INSERT INTO finding (id, workload, kind, subject, detail, remedy, first, last, count)
			VALUES ($1, $2, $3, $4, $5, $6, $7, $7, 1)`, id, f.Workload, f.Kind, f.Subject, f.Detail, f.Remedy, micros(f.Time)); err != nil {
			return err
		}
		return t.boundFindings(ctx, MaxFindings)
	})
}

// boundFindings removes what is over the bound.
func (t *tx) boundFindings(ctx context.Context, bound int64) error {
	var count int64
	if _, err := t.row(ctx, `SELECT count(*) FROM finding`, nil, &count); err != nil || count <= bound {
		return err
	}
	_, err := t.exec(ctx, `DELETE FROM finding WHERE id IN (SELECT id FROM finding ORDER BY last, id LIMIT $1)`, count-bound)
	return err
}

// ListFindings returns up to limit findings, the one seen last first.
func (db *DB) ListFindings(ctx context.Context, limit int) ([]Finding, error) {
	var list []Finding
	err := db.read(ctx, "list findings", func(ctx context.Context, t *tx) (err error) {
		list, err = all(ctx, t, scanFinding, selectFinding+` ORDER BY last DESC, id LIMIT $1`, limit)
		return err
	})
	return list, err
}

// FindingsByID returns those of the findings that there are; IDs are those of changes.
func (db *DB) FindingsByID(ctx context.Context, ids ...string) ([]Finding, error) {
	var list []Finding
	err := db.read(ctx, "read findings", func(ctx context.Context, t *tx) (err error) {
		list, err = byNames(ctx, t, scanFinding, selectFinding+` WHERE id`, ids)
		return err
	})
	return list, err
}

const selectFinding = `SELECT workload, kind, subject, detail, remedy, first, last, count FROM finding`

func scanFinding(rows *sql.Rows) (f Finding, err error) {
	var first, last int64
	err = rows.Scan(&f.Workload, &f.Kind, &f.Subject, &f.Detail, &f.Remedy, &first, &last, &f.Count)
	f.First, f.Time = fromMicros(first), fromMicros(last)
	return f, err
}
