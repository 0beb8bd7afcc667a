package store

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"assay.dev"
)

// metaHolder is who writes to a store that many can reach.
const metaHolder = "store/holder"

// ErrTaken is in the chain of an error when another has become the store's holder.
var ErrTaken = errors.New("another process has taken the store over")

// holder is the value of metaHolder. Beat grows while the holder lives; clocks of
// different machines are never compared.
type holder struct {
	ID   string `json:"id"` // "" when it was given up
	Beat uint64 `json:"beat"`
}

// Shared reports whether several processes can have the store open.
func (db *DB) Shared() bool { return db.keyed }

// Claim makes id the store's holder, and blocks until it is: while another one's beat
// is seen to change it waits, and takes over once that has stood still for patience in a
// store that answers: the holder cannot beat while the store is away, and gets a whole
// patience once it is back. waiting is told once whom it waits for. An id that held the
// store before gets it at once: its owner sees to it that there is only one of it. From
// then on every write of this process is refused when the store is not its own any more.
func (db *DB) Claim(ctx context.Context, id string, patience time.Duration, waiting func(holder string)) error {
	const op = "claim the store"
	var seen []byte
	since := now() // when the beat was first seen to stand where it does
	for {
		asked := now()
		raw, err := db.GetMeta(ctx, metaHolder)
		if now().Sub(asked) > patience/4 {
			since = now() // the store was away, or we were
		}
		if waiting == nil && assay.KindOf(err) == assay.Unavailable && ctx.Err() == nil {
			// Nobody's beat can be seen, the holder's neither: that proves nothing.
			if since = now(); !pause(ctx, patience/20) {
				return fail(assay.Unavailable, op, context.Cause(ctx), "")
			}
			continue
		}
		if err != nil && assay.KindOf(err) != assay.NotFound {
			return err
		}
		var h holder
		if raw != nil {
			if err := json.Unmarshal(raw, &h); err != nil {
				return fail(assay.Internal, op, err, "look who writes "+metaHolder+" of table meta besides Assay")
			}
		}
		if string(raw) != string(seen) {
			seen, since = raw, now()
		}
		if h.ID == "" || h.ID == id || now().Sub(since) >= patience {
			next := holder{ID: id, Beat: h.Beat + 1}
			swapped, err := db.CompareAndSetMeta(ctx, metaHolder, raw, next.encode())
			if err != nil {
				return err
			}
			if swapped {
				db.held.Store(&next)
				return nil
			}
			continue
		}
		if waiting != nil {
			waiting(h.ID)
			waiting = nil
		}
		if !pause(ctx, patience/20) {
			return fail(assay.Unavailable, op, context.Cause(ctx), "")
		}
	}
}

// Renew shows that the holder lives; Claim's patience bounds how seldom. The error has
// ErrTaken in its chain when the store is another's now: this process must end.
func (db *DB) Renew(ctx context.Context) error {
	return db.hold(ctx, func(h holder) holder { return holder{ID: h.ID, Beat: h.Beat + 1} })
}

// Release gives the store up, so that the next one need not wait.
func (db *DB) Release(ctx context.Context) error {
	if db.held.Load() == nil {
		return nil
	}
	return db.hold(ctx, func(h holder) holder { return holder{Beat: h.Beat + 1} })
}

func (db *DB) hold(ctx context.Context, step func(holder) holder) error {
	h := db.held.Load()
	if h == nil {
		return fail(assay.Internal, "hold the store", errors.New("it was not claimed"), "")
	}
	next := step(*h)
	swapped, err := db.CompareAndSetMeta(ctx, metaHolder, h.encode(), next.encode())
	if err != nil {
		return err
	}
	if !swapped {
		return errTaken("hold the store")
	}
	if next.ID == "" {
		db.held.Store(nil)
	} else {
		db.held.Store(&next)
	}
	return nil
}

func (h holder) encode() []byte {
	b, err := json.Marshal(h)
	if err != nil {
		panic(err) // two fields that always can be
	}
	return b
}

func errTaken(op string) error {
	return fail(assay.Conflict, op, ErrTaken, "only one control writes to a store: stop this one, or let it wait by starting it again")
}

// mine fails in a transaction of a process that is not the holder any more. One that
// never claimed may write.
func (t *tx) mine(ctx context.Context, op string) error {
	h := t.held.Load()
	if h == nil {
		return nil
	}
	var raw []byte
	found, err := t.row(ctx, `SELECT value FROM meta WHERE name = $1`, []any{metaHolder}, &raw)
	if err != nil {
		return err
	}
	var now holder
	if !found || json.Unmarshal(raw, &now) != nil || now.ID != h.ID {
		return errTaken(op)
	}
	return nil
}
