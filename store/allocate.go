package store

import (
	"context"
	"database/sql"
	"fmt"

	"assay.dev"
)

// Spaces of numbers.
const (
	spaceVIP    = "vip"
	spacePrefix = "prefix"
)

// AllocateVIP returns the number of a service's virtual address: stable for the
// service ("NAMESPACE/NAME"), of no other, from 1 to limit. A number that was
// released is given out again only after all others have been, so that a client
// with an old answer of DNS does not soon reach a stranger. Unavailable when all
// are taken.
func (db *DB) AllocateVIP(ctx context.Context, service string, limit int64) (int64, error) {
	return db.allocate(ctx, spaceVIP, service, limit)
}

// ReleaseVIP gives a service's number back. There may be none.
func (db *DB) ReleaseVIP(ctx context.Context, service string) error {
	return db.write(ctx, "release the virtual address of "+service, func(ctx context.Context, t *tx) error {
		return t.release(ctx, spaceVIP, service)
	})
}

// ListVIPs returns the numbers by service.
func (db *DB) ListVIPs(ctx context.Context) (map[string]int64, error) {
	return db.allocations(ctx, spaceVIP)
}

// AllocatePrefix returns the number of a host's address prefix, as AllocateVIP does
// for services. DeleteHost releases it.
func (db *DB) AllocatePrefix(ctx context.Context, host string, limit int64) (int64, error) {
	return db.allocate(ctx, spacePrefix, host, limit)
}

func (db *DB) allocate(ctx context.Context, space, owner string, limit int64) (number int64, err error) {
	op := fmt.Sprintf("allocate a %s number for %s", space, owner)
	// Nearly always it exists, and a read costs no disk.
	err = db.read(ctx, op, func(ctx context.Context, t *tx) error {
		number, err = t.allocated(ctx, space, owner)
		return err
	})
	if err != nil || number != 0 {
		return number, err
	}
	err = db.write(ctx, op, func(ctx context.Context, t *tx) error {
		if number, err = t.allocated(ctx, space, owner); err != nil || number != 0 {
			return err
		}
		next := int64(1)
		if _, err := t.row(ctx, `SELECT next FROM allocator WHERE space = $1`+t.forUpdate, []any{space}, &next); err != nil {
			return err
		}
		if number, err = t.firstFree(ctx, space, next, limit); err == nil && number == 0 {
			number, err = t.firstFree(ctx, space, 1, min(next-1, limit))
		}
		if err != nil {
			return err
		}
		if number == 0 {
			return fail(assay.Unavailable, op, fmt.Errorf("all %d are taken", limit), "remove what is not used any more, or configure a larger network")
		}
		if _, err := t.exec(ctx, `INSERT INTO allocation (space, owner, number) VALUES ($1, $2, $3)`, space, owner, number); err != nil {
			return err
		}
		if space == spaceVIP {
			t.touch(OfVIP, owner)
		}
		_, err = t.exec(ctx, `INSERT INTO allocator (space, next) VALUES ($1, $2) ON CONFLICT (space) DO UPDATE SET next = excluded.next`, space, number+1)
		return err
	})
	return number, err
}

// allocated returns an owner's number, 0 when it has none.
func (t *tx) allocated(ctx context.Context, space, owner string) (number int64, err error) {
	_, err = t.row(ctx, `SELECT number FROM allocation WHERE space = $1 AND owner = $2`, []any{space, owner}, &number)
	return number, err
}

// firstFree returns the smallest number from low to high that nobody has, or 0.
func (t *tx) firstFree(ctx context.Context, space string, low, high int64) (int64, error) {
	const page = 1000
	for low <= high {
		taken, err := all(ctx, t, func(rows *sql.Rows) (n int64, err error) { return n, rows.Scan(&n) },
			`SELECT number FROM allocation WHERE space = $1 AND number >= $2 ORDER BY number LIMIT $3`, space, low, page)
		if err != nil {
			return 0, err
		}
		for _, n := range taken {
			if n != low {
				return low, nil
			}
			if low++; low > high {
				return 0, nil
			}
		}
		if len(taken) < page {
			return low, nil
		}
	}
	return 0, nil
}

func (t *tx) release(ctx context.Context, space, owner string) error {
	n, err := t.exec(ctx, `DELETE FROM allocation WHERE space = $1 AND owner = $2`, space, owner)
	if n > 0 && space == spaceVIP {
		t.touch(OfVIP, owner)
	}
	return err
}

func (db *DB) allocations(ctx context.Context, space string) (map[string]int64, error) {
	var list map[string]int64
	err := db.read(ctx, "list "+space+" numbers", func(ctx context.Context, t *tx) error {
		list = make(map[string]int64)
		_, err := all(ctx, t, func(rows *sql.Rows) (struct{}, error) {
			var owner string
			var number int64
			err := rows.Scan(&owner, &number)
			list[owner] = number
			return struct{}{}, err
		}, `SELECT owner, number FROM allocation WHERE space = $1`, space)
		return err
	})
	return list, err
}
