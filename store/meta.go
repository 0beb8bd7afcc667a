package store

import (
	"bytes"
	"context"
	"errors"

	"assay.dev"
)

// PutMeta stores a small named value.
func (db *DB) PutMeta(ctx context.Context, name string, value []byte) error {
	return db.write(ctx, "store "+name, func(ctx context.Context, t *tx) error { return t.putMeta(ctx, name, value) })
}

// GetMeta returns a named value; NotFound when there is none.
func (db *DB) GetMeta(ctx context.Context, name string) (value []byte, err error) {
	op := "read " + name
	err = db.read(ctx, op, func(ctx context.Context, t *tx) error {
		found, err := t.row(ctx, `SELECT value FROM meta WHERE name = $1`, []any{name}, &value)
		if err == nil && !found {
			err = fail(assay.NotFound, op, errors.New("it was never stored"), "")
		}
		return err
	})
	return value, err
}

// CompareAndSetMeta stores value if the present one equals old; an old of nil
// means that there must be none. Otherwise swapped is false and nothing changes.
func (db *DB) CompareAndSetMeta(ctx context.Context, name string, old, value []byte) (swapped bool, err error) {
	err = db.write(ctx, "store "+name, func(ctx context.Context, t *tx) error {
		var present []byte
		found, err := t.row(ctx, `SELECT value FROM meta WHERE name = $1`+t.forUpdate, []any{name}, &present)
		if err != nil {
			return err
		}
		if swapped = found == (old != nil) && bytes.Equal(present, old); !swapped {
			return nil
		}
		return t.putMeta(ctx, name, value)
	})
	return swapped, err
}

func (t *tx) putMeta(ctx context.Context, name string, value []byte) error {
	if value == nil {
		value = []byte{} // not NULL
	}
	t.touch(OfMeta, name)
	_, err := t.exec(ctx, `INSERT INTO meta (name, value) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET value = excluded.value`, name, value)
	return err
}
