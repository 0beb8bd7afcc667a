package store

import (
	"context"
	"database/sql"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"assay.dev"
)

// Replica is one of several processes that Follow the same store.
type Replica struct {
	ID      string
	Address string // where the others reach it; "" nowhere
	Beat    int64  // grows while it lives; clocks of different machines are never compared
}

// Beat shows that this process lives.
func (db *DB) Beat(ctx context.Context, address string) error {
	return db.write(ctx, "show life in the store", func(ctx context.Context, t *tx) error {
		_, err := t.exec(ctx, `INSERT INTO replica (id, address, beat) VALUES ($1, $2, 1)
			ON CONFLICT (id) DO UPDATE SET address = excluded.address, beat = replica.beat + 1`, t.own(), address)
		return err
	})
}

// ListReplicas returns all, ordered by ID. Which of them live their beats show.
func (db *DB) ListReplicas(ctx context.Context) ([]Replica, error) {
	var list []Replica
	err := db.read(ctx, "list controls", func(ctx context.Context, t *tx) (err error) {
		list, err = all(ctx, t, func(rows *sql.Rows) (r Replica, err error) {
			return r, rows.Scan(&r.ID, &r.Address, &r.Beat)
		}, `SELECT id, address, beat FROM replica ORDER BY id`)
		return err
	})
	return list, err
}

// RemoveReplica forgets a process whose beat still is the one given; its hosts have no
// stream from then on. A process removes itself when it ends, whatever its beat: 0.
func (db *DB) RemoveReplica(ctx context.Context, id string, beat int64) error {
	return db.write(ctx, "forget control "+id, func(ctx context.Context, t *tx) error {
		n, err := t.exec(ctx, `DELETE FROM replica WHERE id = $1 AND (beat = $2 OR $2 = 0)`, id, beat)
		if err != nil || n == 0 {
			return err
		}
		hosts, err := all(ctx, t, func(rows *sql.Rows) (id string, err error) { return id, rows.Scan(&id) }, `SELECT id FROM host WHERE replica = $1`, id)
		if err != nil {
			return err
		}
		for _, h := range hosts {
			t.touch(OfHost, h)
		}
		_, err = t.exec(ctx, `UPDATE host SET replica = '' WHERE replica = $1`, id)
		return err
	})
}

// AttachHost stores that this process has the stream of a host, and the host with it. found is
// false when the host was removed: nothing is stored then.
func (db *DB) AttachHost(ctx context.Context, h Host) (found bool, err error) {
	op := "store host " + h.ID
	record, err := encode(op, h.ID, hostRecord{h.Host, h.Node, h.Pod})
	if err != nil {
		return false, err
	}
	err = db.write(ctx, op, func(ctx context.Context, t *tx) error {
		n, err := t.exec(ctx, `UPDATE host SET record = $1, seen = $2, replica = $3 WHERE id = $4`, record, micros(h.Seen), t.own(), h.ID)
		if found = n > 0; found {
			t.touch(OfHost, h.ID)
		}
		return err
	})
	return found, err
}

// DetachHost stores that this process has lost the stream of a host, unless another has it.
func (db *DB) DetachHost(ctx context.Context, id string, seen time.Time) error {
	return db.write(ctx, "store host "+id, func(ctx context.Context, t *tx) error {
		n, err := t.exec(ctx, `UPDATE host SET seen = $1, replica = '' WHERE id = $2 AND replica = $3`, micros(seen), id, t.own())
		if n > 0 {
			t.touch(OfHost, id)
		}
		return err
	})
}

// AcknowledgeHost stores which bundle everybody on a host trusts, if this process has its
// stream.
func (db *DB) AcknowledgeHost(ctx context.Context, id string, bundle uint64) error {
	return db.write(ctx, "store the bundle of host "+id, func(ctx context.Context, t *tx) error {
		n, err := t.exec(ctx, `UPDATE host SET bundle = $1 WHERE id = $2 AND replica = $3`, int64(bundle), id, t.own())
		if n > 0 {
			t.touch(OfHost, id)
		}
		return err
	})
}

// Gone is a workload that has gone. Host says whose word that is; "": the platform's, which
// counts always.
type Gone struct {
	ID, Host string
}

// Rejected is a workload that was not stored, since the store says otherwise.
type Rejected struct {
	ID    string
	Cause error // nil: this process has lost the stream of its host
}

// ReportWorkloads stores what hosts say whose streams this process has: first those that
// have gone, then the others, each whole. What contradicts the store is left out and
// returned: an ID or an address that a workload of another host has, and a host that is
// attached elsewhere. So two processes never store one address twice.
func (db *DB) ReportWorkloads(ctx context.Context, put []assay.Workload, gone []Gone) (rejected []Rejected, err error) {
	const op = "store workloads"
	record := make([]string, len(put))
	for i, w := range put {
		if record[i], err = encode(op, w.ID, w); err != nil {
			return nil, err
		}
	}
	err = db.write(ctx, op, func(ctx context.Context, t *tx) error {
		rejected = nil
		attached := map[string]bool{}
		mine := func(host string) (bool, error) {
			if is, asked := attached[host]; asked {
				return is, nil
			}
			var replica string
			found, err := t.row(ctx, `SELECT replica FROM host WHERE id = $1`, []any{host}, &replica)
			attached[host] = found && replica == t.own()
			return attached[host], err
		}
		for _, g := range gone {
			if g.Host != "" {
				is, err := mine(g.Host)
				if err != nil {
					return err
				}
				if !is {
					rejected = append(rejected, Rejected{ID: g.ID})
					continue
				}
			}
			if err := t.deleteWorkload(ctx, g.ID, g.Host); err != nil {
				return err
			}
		}
		for i := range put {
			is, err := mine(put[i].Host)
			if err != nil {
				return err
			}
			var cause error
			if is {
				if cause, err = t.putWorkload(ctx, &put[i], record[i]); err != nil {
					return err
				}
			}
			if !is || cause != nil {
				rejected = append(rejected, Rejected{put[i].ID, cause})
			}
		}
		return nil
	})
	return rejected, err
}

// putWorkload stores a workload with its addresses; cause says what contradicts it.
func (t *tx) putWorkload(ctx context.Context, w *assay.Workload, record string) (cause, err error) {
	var host string
	found, err := t.row(ctx, `SELECT host FROM workload WHERE id = $1`, []any{w.ID}, &host)
	if err != nil {
		return nil, err
	}
	if found && host != w.Host {
		return fmt.Errorf("host %s has a workload of this ID", host), nil
	}
	want := make([]string, len(w.Addrs))
	for i, a := range w.Addrs {
		want[i] = a.String()
	}
	slices.Sort(want)
	have, err := all(ctx, t, func(rows *sql.Rows) (a string, err error) { return a, rows.Scan(&a) },
		`SELECT addr FROM address WHERE workload = $1 ORDER BY addr`, w.ID)
	if err != nil {
		return nil, err
	}
	if !slices.Equal(have, want) {
		for _, a := range want {
			if cause, err := t.free(ctx, a, w); err != nil || cause != nil {
				return cause, err
			}
		}
		if _, err := t.exec(ctx, `DELETE FROM address WHERE workload = $1`, w.ID); err != nil {
			return nil, err
		}
		for _, a := range want {
			if _, err := t.exec(ctx, `INSERT INTO address (addr, workload) VALUES ($1, $2)
				ON CONFLICT (addr) DO UPDATE SET workload = excluded.workload`, a, w.ID); err != nil {
				return nil, err
			}
		}
	}
	t.touch(OfWorkload, w.ID)
	_, err = t.exec(ctx, `INSERT INTO workload (id, host, record) VALUES ($1, $2, $3)
		ON CONFLICT (id) DO UPDATE SET host = excluded.host, record = excluded.record`, w.ID, w.Host, record)
	return nil, err
}

// free says who has an address, unless w may have it. Of its own workloads a host knows
// best.
func (t *tx) free(ctx context.Context, addr string, w *assay.Workload) (cause, err error) {
	var owner, host string
	found, err := t.row(ctx, `SELECT a.workload, o.host FROM address a JOIN workload o ON o.id = a.workload WHERE a.addr = $1`, []any{addr}, &owner, &host)
	if err != nil || !found || owner == w.ID || host == w.Host {
		return nil, err
	}
	return AddressTaken{netip.MustParseAddr(addr), owner}, nil
}

// AddressTaken is why a workload was rejected whose address another one has.
type AddressTaken struct {
	Addr  netip.Addr
	Owner string // ID of a workload
}

func (e AddressTaken) Error() string {
	return fmt.Sprintf("address %s belongs to workload %s", e.Addr, e.Owner)
}

// deleteWorkload forgets a workload, if it is the host's ("": whoever's).
func (t *tx) deleteWorkload(ctx context.Context, id, host string) error {
	n, err := t.exec(ctx, `DELETE FROM workload WHERE id = $1 AND ($2 = '' OR host = $2)`, id, host)
	if err != nil || n == 0 {
		return err
	}
	t.touch(OfWorkload, id)
	_, err = t.exec(ctx, `DELETE FROM address WHERE workload = $1`, id)
	return err
}

// WorkloadsByID returns those of the workloads that there are.
func (db *DB) WorkloadsByID(ctx context.Context, ids ...string) ([]assay.Workload, error) {
	var list []assay.Workload
	err := db.read(ctx, "read workloads", func(ctx context.Context, t *tx) (err error) {
		list, err = byNames(ctx, t, scanWorkload, `SELECT record FROM workload WHERE id`, ids)
		return err
	})
	return list, err
}

// SetClaims stores which pods may be meshed though they are not taken, and on which host
// each is; "": it is no longer so.
func (db *DB) SetClaims(ctx context.Context, claims map[string]string) error {
	return db.write(ctx, "store claims", func(ctx context.Context, t *tx) error {
		for _, pod := range sortedKeys(claims) {
			host := claims[pod]
			t.touch(OfClaim, pod)
			var err error
			if host == "" {
				_, err = t.exec(ctx, `DELETE FROM claim WHERE pod = $1`, pod)
			} else {
				_, err = t.exec(ctx, `INSERT INTO claim (pod, host) VALUES ($1, $2) ON CONFLICT (pod) DO UPDATE SET host = excluded.host`, pod, host)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// ListClaims returns the hosts of claimed pods, by pod.
func (db *DB) ListClaims(ctx context.Context) (map[string]string, error) {
	var claims map[string]string
	err := db.read(ctx, "list claims", func(ctx context.Context, t *tx) error {
		claims = map[string]string{}
		_, err := all(ctx, t, func(rows *sql.Rows) (struct{}, error) {
			var pod, host string
			err := rows.Scan(&pod, &host)
			claims[pod] = host
			return struct{}{}, err
		}, `SELECT pod, host FROM claim`)
		return err
	})
	return claims, err
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, strings.Compare)
	return keys
}
