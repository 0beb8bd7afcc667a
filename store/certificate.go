package store

import (
	"context"
	"database/sql"
	"time"

	"assay.dev"
)

// Certificate is one line of the inventory: a certificate that was issued.
type Certificate struct {
	Serial    string       `json:"serial"`  // hexadecimal
	Subject   string       `json:"subject"` // SPIFFE ID
	Workload  string       `json:"workload,omitempty"`
	Host      string       `json:"host,omitempty"`
	Artifacts assay.Digest `json:"artifacts,omitempty"` // of the set that the leaf names
	Issuer    string       `json:"issuer"`              // serial of the issuing certificate
	NotBefore time.Time    `json:"notBefore"`
	NotAfter  time.Time    `json:"notAfter"`
	IssuedAt  time.Time    `json:"issuedAt"`
}

// InsertCertificates records certificates under their serials, all or none. The same again
// is no error: the first record stands.
func (db *DB) InsertCertificates(ctx context.Context, list ...Certificate) error {
	const op = "store certificates"
	for _, c := range list {
		if _, err := encode(op, c.Serial, nil); err != nil {
			return err
		}
	}
	return db.write(ctx, op, func(ctx context.Context, t *tx) error {
		for _, c := range list {
			t.touch(OfCertificate, c.Serial)
			if _, err := t.exec(ctx, `INSERT INTO certificate (serial, subject, workload, host, artifacts, issuer, notbefore, notafter, issued)
				VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (serial) DO NOTHING`,
				c.Serial, c.Subject, c.Workload, c.Host, string(c.Artifacts), c.Issuer, micros(c.NotBefore), micros(c.NotAfter), micros(c.IssuedAt)); err != nil {
				return err
			}
		}
		return nil
	})
}

// CertificatesBySerial returns those of the certificates that there are.
func (db *DB) CertificatesBySerial(ctx context.Context, serials ...string) ([]Certificate, error) {
	var list []Certificate
	err := db.read(ctx, "read certificates", func(ctx context.Context, t *tx) (err error) {
		list, err = byNames(ctx, t, scanCertificate, selectCertificate+` WHERE serial`, serials)
		return err
	})
	return list, err
}

const selectCertificate = `SELECT serial, subject, workload, host, artifacts, issuer, notbefore, notafter, issued FROM certificate`

func scanCertificate(rows *sql.Rows) (c Certificate, err error) {
	var notBefore, notAfter, issued int64
	err = rows.Scan(&c.Serial, &c.Subject, &c.Workload, &c.Host, &c.Artifacts, &c.Issuer, &notBefore, &notAfter, &issued)
	c.NotBefore, c.NotAfter, c.IssuedAt = fromMicros(notBefore), fromMicros(notAfter), fromMicros(issued)
	return c, err
}

// ListCertificates returns the certificates of a workload, or all for "", that end
// after the given time, ordered by the time they end.
func (db *DB) ListCertificates(ctx context.Context, workload string, after time.Time) ([]Certificate, error) {
	var list []Certificate
	err := db.read(ctx, "list certificates", func(ctx context.Context, t *tx) (err error) {
		list, err = all(ctx, t, scanCertificate, selectCertificate+`
			WHERE ($1 = '' OR workload = $1) AND notafter > $2 ORDER BY notafter, serial`, workload, micros(after))
		return err
	})
	return list, err
}

// PruneBatch bounds what one call of PruneCertificates forgets. Serial numbers are random, so on
// SQLite, whose one writer all others wait for, each costs a page of its own in two indices.
const PruneBatch = 250

// PruneCertificates forgets up to PruneBatch certificates that ended before the
// given time, the oldest first, and returns how many; call it again until it returns fewer.
func (db *DB) PruneCertificates(ctx context.Context, before time.Time) (n int64, err error) {
	err = db.write(ctx, "prune certificates", func(ctx context.Context, t *tx) error {
		n, err = t.exec(ctx, `DELETE FROM certificate WHERE serial IN
			(SELECT serial FROM certificate WHERE notafter < $1 ORDER BY notafter, serial LIMIT $2)`, micros(before), PruneBatch)
		return err
	})
	return n, err
}
