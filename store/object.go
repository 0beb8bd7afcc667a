package store

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"assay.dev"
)

// Object is one object of intent. Kind, Namespace and Name are its key.
type Object struct {
	Kind      string          `json:"kind"`
	Namespace string          `json:"namespace,omitempty"`
	Name      string          `json:"name"`
	Spec      json.RawMessage `json:"spec"` // compared byte for byte: write it in one normal form
	// Source is who owns the object: one source never changes another's objects.
	Source string `json:"source"`
	// Generation is 1 for a new object and one more with each change of Spec or
	// Source. The store sets it, Created and Changed.
	Generation int64           `json:"generation"`
	Status     json.RawMessage `json:"status,omitempty"`
	Created    time.Time       `json:"created"`
	Changed    time.Time       `json:"changed"`
}

// Key identifies an object of intent.
type Key struct {
	Kind      string `json:"kind"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
}

func (k Key) String() string {
	if k.Namespace == "" {
		return k.Kind + " " + k.Name
	}
	return k.Kind + " " + k.Namespace + "/" + k.Name
}

// Key returns the object's key.
func (o *Object) Key() Key { return Key{o.Kind, o.Namespace, o.Name} }

// Action is what happened to an object.
type Action string

const (
	Created   Action = "created"
	Changed   Action = "changed"
	Unchanged Action = "unchanged"
	Removed   Action = "removed"
)

// Change is what a write did to one object.
type Change struct {
	Key
	Action Action `json:"action"`
}

// Replace says how ReplaceObjects treats what is there.
type Replace struct {
	// Prune removes the source's objects that are not in the set.
	Prune bool
	// Adopt takes over objects that another source owns; without it they are a
	// Conflict.
	Adopt bool
	// DryRun computes the changes and stores nothing.
	DryRun bool
	// Since, if not 0, is a revision: when another process has changed objects after it, the
	// error is a Conflict with ErrChanged in its chain, and nothing is stored.
	Since int64
}

// PutObject creates or changes one object. Putting the same again changes nothing.
// Status is left as it is.
func (db *DB) PutObject(ctx context.Context, o Object) (Change, error) {
	changes, err := db.ReplaceObjects(ctx, o.Source, []Object{o}, Replace{})
	if err != nil {
		return Change{}, err
	}
	return changes[0], nil
}

// ReplaceObjects puts all objects with the given source, or none of them, and
// returns what that does to each, ordered by key. Repeating it changes nothing.
func (db *DB) ReplaceObjects(ctx context.Context, source string, objects []Object, how Replace) ([]Change, error) {
	const op = "store objects"
	want := make(map[Key]Object, len(objects))
	for _, o := range objects {
		if o.Kind == "" || o.Name == "" || !json.Valid(o.Spec) {
			return nil, fail(assay.Invalid, op, fmt.Errorf("%s: kind, name and a spec in JSON are needed", o.Key()), "")
		}
		if _, twice := want[o.Key()]; twice {
			return nil, fail(assay.Invalid, op, fmt.Errorf("%s is there twice", o.Key()), "keep one of them")
		}
		want[o.Key()] = o
	}
	var changes []Change
	work := func(ctx context.Context, t *tx) error {
		if err := t.unchanged(ctx, op, how.Since); err != nil {
			return err
		}
		have, err := all(ctx, t, scanObject, selectObject)
		if err != nil {
			return err
		}
		old := make(map[Key]Object, len(have))
		for _, o := range have {
			old[o.Key()] = o
		}
		changes = changes[:0]
		for key, o := range want {
			was, exists := old[key]
			action, err := compare(was, exists, o, source, how)
			if err != nil {
				return err
			}
			changes = append(changes, Change{key, action})
			if how.DryRun || action == Unchanged {
				continue
			}
			t.touch(OfObject, key.String())
			at := micros(now())
			if _, err := t.exec(ctx, `INSERT INTO object (kind, namespace, name, spec, source, generation, status, created, changed)
				VALUES ($1, $2, $3, $4, $5, $6, '', $7, $7)
				ON CONFLICT (kind, namespace, name) DO UPDATE SET
				spec = excluded.spec, source = excluded.source, generation = excluded.generation, changed = excluded.changed`,
				key.Kind, key.Namespace, key.Name, string(o.Spec), source, was.Generation+1, at); err != nil {
				return err
			}
		}
		for key, was := range old {
			if _, keep := want[key]; keep || !how.Prune || was.Source != source {
				continue
			}
			changes = append(changes, Change{key, Removed})
			if how.DryRun {
				continue
			}
			if _, err := t.deleteObject(ctx, key); err != nil {
				return err
			}
		}
		return nil
	}
	run := db.write
	if how.DryRun {
		run = db.read
	}
	if err := run(ctx, op, work); err != nil {
		return nil, err
	}
	slices.SortFunc(changes, func(a, b Change) int { return compareKeys(a.Key, b.Key) })
	return changes, nil
}

// ErrChanged is in the chain of an error when objects are not those that were planned with.
var ErrChanged = errors.New("another control has changed what is declared")

// unchanged fails when another process has changed objects after a revision.
func (t *tx) unchanged(ctx context.Context, op string, since int64) error {
	if since == 0 {
		return nil
	}
	var n, forgotten int64
	if _, err := t.row(ctx, `SELECT forgotten FROM revision WHERE one = 1`, nil, &forgotten); err != nil {
		return err
	}
	if since < forgotten { // nobody knows
		return fail(assay.Conflict, op, ErrChanged, "try again")
	}
	if _, err := t.row(ctx, `SELECT count(*) FROM change WHERE kind = $1 AND revision > $2 AND origin <> $3`, []any{string(OfObject), since, t.own()}, &n); err != nil || n == 0 {
		return err
	}
	return fail(assay.Conflict, op, ErrChanged, "try again")
}

// compare says what putting o would do.
func compare(was Object, exists bool, o Object, source string, how Replace) (Action, error) {
	switch {
	case !exists:
		return Created, nil
	case was.Source != source && !how.Adopt:
		return "", fail(assay.Conflict, "store "+o.Key().String(), fmt.Errorf("it belongs to %s", was.Source), "change it there, or remove it there first")
	case was.Source == source && string(was.Spec) == string(o.Spec):
		return Unchanged, nil
	}
	return Changed, nil
}

func compareKeys(a, b Key) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

// SetStatus stores what became of an object's generation. An object that is gone or
// has a newer generation is left alone, and set is false.
func (db *DB) SetStatus(ctx context.Context, key Key, generation int64, status json.RawMessage) (set bool, err error) {
	op := "store status of " + key.String()
	if !json.Valid(status) {
		return false, fail(assay.Invalid, op, fmt.Errorf("it is not JSON"), "")
	}
	err = db.write(ctx, op, func(ctx context.Context, t *tx) error {
		n, err := t.exec(ctx, `UPDATE object SET status = $1 WHERE kind = $2 AND namespace = $3 AND name = $4 AND generation = $5`,
			string(status), key.Kind, key.Namespace, key.Name, generation)
		set = n > 0
		return err
	})
	return set, err
}

// DeleteObject removes an object; found is false when there was none. since is that of Replace.
func (db *DB) DeleteObject(ctx context.Context, key Key, since int64) (found bool, err error) {
	op := "remove " + key.String()
	err = db.write(ctx, op, func(ctx context.Context, t *tx) error {
		if err := t.unchanged(ctx, op, since); err != nil {
			return err
		}
		found, err = t.deleteObject(ctx, key)
		return err
	})
	return found, err
}

func (t *tx) deleteObject(ctx context.Context, key Key) (bool, error) {
	t.touch(OfObject, key.String())
	n, err := t.exec(ctx, `DELETE FROM object WHERE kind = $1 AND namespace = $2 AND name = $3`, key.Kind, key.Namespace, key.Name)
	return n > 0, err
}

// ListObjects returns the objects whose key matches each field of match that is not
// empty, ordered by kind, namespace and name.
func (db *DB) ListObjects(ctx context.Context, match Key) ([]Object, error) {
	var list []Object
	err := db.read(ctx, "list objects", func(ctx context.Context, t *tx) (err error) {
		list, err = all(ctx, t, scanObject, selectObject+
			` WHERE ($1 = '' OR kind = $1) AND ($2 = '' OR namespace = $2) AND ($3 = '' OR name = $3) ORDER BY kind, namespace, name`,
			match.Kind, match.Namespace, match.Name)
		return err
	})
	return list, err
}

const selectObject = `SELECT kind, namespace, name, spec, source, generation, status, created, changed FROM object`

func scanObject(rows *sql.Rows) (o Object, err error) {
	var spec, status string
	var created, changed int64
	err = rows.Scan(&o.Kind, &o.Namespace, &o.Name, &spec, &o.Source, &o.Generation, &status, &created, &changed)
	o.Spec, o.Created, o.Changed = json.RawMessage(spec), fromMicros(created), fromMicros(changed)
	if status != "" {
		o.Status = json.RawMessage(status)
	}
	return o, err
}
