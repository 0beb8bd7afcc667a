package store

import (
	"context"
	"crypto/subtle"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"assay.dev"
)

// Host is a machine that has joined.
type Host struct {
	assay.Host
	// Node is its name in the platform of which it is a node, as Kubernetes has them; ""
	// for a host that joined with a token of ours.
	Node string `json:"node,omitempty"`
	// Pod is the UID of the one pod there that it is, and speaks for; "" for the node itself.
	Pod    string    `json:"pod,omitempty"`
	Joined time.Time `json:"joined"`
	Seen   time.Time `json:"seen,omitzero"` // when its stream was last up
	// Replica is the process that has its stream, of several; Bundle what that one
	// acknowledged for it. AttachHost and AcknowledgeHost store them, PutHost does not.
	Replica string `json:"-"`
	Bundle  uint64 `json:"-"`
}

// hostRecord is what the column record holds of a host.
type hostRecord struct {
	assay.Host
	Node string `json:"node,omitempty"`
	Pod  string `json:"pod,omitempty"`
}

// PutHost stores a host under its ID, whole. Joined is kept from the first time.
func (db *DB) PutHost(ctx context.Context, h Host) error {
	op := "store host " + h.ID
	record, err := encode(op, h.ID, hostRecord{h.Host, h.Node, h.Pod})
	if err != nil {
		return err
	}
	return db.write(ctx, op, func(ctx context.Context, t *tx) error {
		t.touch(OfHost, h.ID)
		_, err := t.exec(ctx, `INSERT INTO host (id, record, joined, seen) VALUES ($1, $2, $3, $4)
			ON CONFLICT (id) DO UPDATE SET record = excluded.record, seen = excluded.seen`,
			h.ID, record, micros(h.Joined), micros(h.Seen))
		return err
	})
}

// ListHosts returns all hosts, ordered by ID.
func (db *DB) ListHosts(ctx context.Context) ([]Host, error) {
	var list []Host
	err := db.read(ctx, "list hosts", func(ctx context.Context, t *tx) (err error) {
		list, err = all(ctx, t, func(rows *sql.Rows) (h Host, err error) {
			var record string
			var joined, seen, bundle int64
			var replica string
			if err := rows.Scan(&record, &joined, &seen, &replica, &bundle); err != nil {
				return h, err
			}
			var r hostRecord
			err = json.Unmarshal([]byte(record), &r)
			return Host{Host: r.Host, Node: r.Node, Pod: r.Pod, Joined: fromMicros(joined), Seen: fromMicros(seen), Replica: replica, Bundle: uint64(bundle)}, err
		}, `SELECT record, joined, seen, replica, bundle FROM host ORDER BY id`)
		return err
	})
	return list, err
}

// DeleteHost forgets a host, its workloads and its prefix number.
func (db *DB) DeleteHost(ctx context.Context, id string) (found bool, err error) {
	err = db.write(ctx, "remove host "+id, func(ctx context.Context, t *tx) error {
		n, err := t.exec(ctx, `DELETE FROM host WHERE id = $1`, id)
		if err != nil {
			return err
		}
		if found = n > 0; found {
			t.touch(OfHost, id)
		}
		if _, err := t.exec(ctx, `DELETE FROM address WHERE workload IN (SELECT id FROM workload WHERE host = $1)`, id); err != nil {
			return err
		}
		if _, err := t.exec(ctx, `DELETE FROM claim WHERE host = $1`, id); err != nil {
			return err
		}
		if _, err := t.exec(ctx, `DELETE FROM workload WHERE host = $1`, id); err != nil {
			return err
		}
		return t.release(ctx, spacePrefix, id)
	})
	return found, err
}

// Token lets one host join. The token that a person carries holds a secret; here is
// only its hash.
type Token struct {
	ID       string    `json:"id"`
	Hash     []byte    `json:"-"`      // SHA-256 of the secret
	Covers   []string  `json:"covers"` // see assay.Host
	Creator  string    `json:"creator"`
	Created  time.Time `json:"created"`
	Expires  time.Time `json:"expires"`
	Consumer string    `json:"consumer,omitempty"`
	Consumed time.Time `json:"consumed,omitzero"`
}

// CreateToken stores a token. Creating the same token again is no error; another one
// of the same ID is a Conflict.
func (db *DB) CreateToken(ctx context.Context, k Token) error {
	op := "store token " + k.ID
	covers, err := encode(op, k.ID, k.Covers)
	if err != nil {
		return err
	}
	return db.write(ctx, op, func(ctx context.Context, t *tx) error {
		old, found, err := t.token(ctx, k.ID)
		if err != nil {
			return err
		}
		if found {
			if subtle.ConstantTimeCompare(old.Hash, k.Hash) == 1 {
				return nil
			}
			return fail(assay.Conflict, op, errors.New("there is another token of this ID"), "make a new one")
		}
		t.touch(OfToken, k.ID)
		_, err = t.exec(ctx, `INSERT INTO token (id, hash, covers, creator, created, expires, consumer, consumed)
			VALUES ($1, $2, $3, $4, $5, $6, '', 0)`,
			k.ID, k.Hash, covers, k.Creator, micros(k.Created), micros(k.Expires))
		return err
	})
}

// ConsumeToken gives the token to consumer, exactly once: whoever comes second is
// told Conflict. The same consumer may ask again, so that a join whose answer was
// lost can be repeated; consumer must therefore be something that only this one
// join has, for instance the digest of its public key. An unknown token or one
// whose hash differs is NotFound, an expired one Denied.
func (db *DB) ConsumeToken(ctx context.Context, id string, hash []byte, consumer string, at time.Time) (Token, error) {
	op := "consume token " + id
	const remedy = "make a new token with: assay token create"
	var token Token
	if consumer == "" {
		return token, fail(assay.Invalid, op, errors.New("no consumer is named"), "")
	}
	err := db.write(ctx, op, func(ctx context.Context, t *tx) error {
		var found bool
		var err error
		token, found, err = t.token(ctx, id)
		switch {
		case err != nil:
			return err
		case !found || subtle.ConstantTimeCompare(token.Hash, hash) != 1:
			return fail(assay.NotFound, op, errors.New("there is no such token"), remedy)
		case token.Consumer == consumer:
			return nil
		case token.Consumer != "":
			return fail(assay.Conflict, op, fmt.Errorf("it was used at %s", token.Consumed.Format(time.RFC3339)), remedy)
		case !at.Before(token.Expires):
			return fail(assay.Denied, op, fmt.Errorf("it expired at %s", token.Expires.Format(time.RFC3339)), remedy)
		}
		token.Consumer, token.Consumed = consumer, fromMicros(micros(at))
		t.touch(OfToken, id)
		_, err = t.exec(ctx, `UPDATE token SET consumer = $1, consumed = $2 WHERE id = $3`, consumer, micros(at), id)
		return err
	})
	if err != nil {
		return Token{}, err
	}
	return token, nil
}

// DeleteToken revokes a token, or forgets a used one.
func (db *DB) DeleteToken(ctx context.Context, id string) (found bool, err error) {
	err = db.write(ctx, "remove token "+id, func(ctx context.Context, t *tx) error {
		n, err := t.exec(ctx, `DELETE FROM token WHERE id = $1`, id)
		if found = n > 0; found {
			t.touch(OfToken, id)
		}
		return err
	})
	return found, err
}

// ListTokens returns all tokens, ordered by ID.
func (db *DB) ListTokens(ctx context.Context) ([]Token, error) {
	var list []Token
	err := db.read(ctx, "list tokens", func(ctx context.Context, t *tx) (err error) {
		list, err = all(ctx, t, scanToken, selectToken+` ORDER BY id`)
		return err
	})
	return list, err
}

// token reads a token and locks it for the rest of the transaction.
func (t *tx) token(ctx context.Context, id string) (Token, bool, error) {
	list, err := all(ctx, t, scanToken, selectToken+` WHERE id = $1`+t.forUpdate, id)
	if err != nil || len(list) == 0 {
		return Token{}, false, err
	}
	return list[0], true, nil
}

const selectToken = `SELECT id, hash, covers, creator, created, expires, consumer, consumed FROM token`

func scanToken(rows *sql.Rows) (k Token, err error) {
	var covers string
	var created, expires, consumed int64
	if err := rows.Scan(&k.ID, &k.Hash, &covers, &k.Creator, &created, &expires, &k.Consumer, &consumed); err != nil {
		return k, err
	}
	k.Created, k.Expires, k.Consumed = fromMicros(created), fromMicros(expires), fromMicros(consumed)
	return k, json.Unmarshal([]byte(covers), &k.Covers)
}

// PutWorkloads stores workloads under their IDs, each whole, all or none.
func (db *DB) PutWorkloads(ctx context.Context, workloads ...assay.Workload) error {
	const op = "store workloads"
	record := make([]string, len(workloads))
	for i, w := range workloads {
		var err error
		if record[i], err = encode(op, w.ID, w); err != nil {
			return err
		}
	}
	return db.write(ctx, op, func(ctx context.Context, t *tx) error {
		for i, w := range workloads {
			t.touch(OfWorkload, w.ID)
			if _, err := t.exec(ctx, `INSERT INTO workload (id, host, record) VALUES ($1, $2, $3)
				ON CONFLICT (id) DO UPDATE SET host = excluded.host, record = excluded.record`, w.ID, w.Host, record[i]); err != nil {
				return err
			}
		}
		return nil
	})
}

// DeleteWorkloads forgets workloads, all or none. IDs that are not there are passed over.
func (db *DB) DeleteWorkloads(ctx context.Context, ids ...string) error {
	return db.write(ctx, "remove workloads", func(ctx context.Context, t *tx) error {
		for _, id := range ids {
			if err := t.deleteWorkload(ctx, id, ""); err != nil {
				return err
			}
		}
		return nil
	})
}

// ListWorkloads returns the workloads of a host, or all for "", ordered by ID.
func (db *DB) ListWorkloads(ctx context.Context, host string) ([]assay.Workload, error) {
	var list []assay.Workload
	err := db.read(ctx, "list workloads", func(ctx context.Context, t *tx) (err error) {
		list, err = all(ctx, t, scanWorkload, `SELECT record FROM workload WHERE $1 = '' OR host = $1 ORDER BY id`, host)
		return err
	})
	return list, err
}

func scanWorkload(rows *sql.Rows) (w assay.Workload, err error) {
	var record string
	if err := rows.Scan(&record); err != nil {
		return w, err
	}
	return w, json.Unmarshal([]byte(record), &w)
}

// encode writes a record as JSON and insists on its key.
func encode(op, key string, v any) (string, error) {
	if key == "" {
		return "", fail(assay.Invalid, op, errors.New("it has no ID"), "")
	}
	b, err := json.Marshal(v)
	if err != nil {
		return "", fail(assay.Invalid, op, err, "")
	}
	return string(b), nil
}
