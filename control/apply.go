package control

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/discovery"
	"assay.dev/store"
)

// Who owns an object: one never changes the other's.
const (
	fromApply   = "apply"   // people, with `assay apply`
	fromFolder  = "folder"  // the folder that control watches
	fromCluster = "cluster" // people, at the API server
)

// intent is what people declared, as objects. Its lock makes one change at a time
// and is held while the store is written.
type intent struct {
	mu       sync.Mutex
	shown    sync.Mutex // guards what follows; never held for long, inside mu
	objects  map[store.Key]store.Object
	problems map[store.Key]Unsound // objects that have no effect, and why
	broken   error                 // why the folder, or what is stored, is not in effect
	since    time.Time             // of broken
}

func (in *intent) list() []store.Object {
	in.shown.Lock()
	defer in.shown.Unlock()
	out := slices.Collect(maps.Values(in.objects))
	slices.SortFunc(out, func(a, b store.Object) int { return compareKeys(a.Key(), b.Key()) })
	return out
}

func (in *intent) get(key store.Key) (store.Object, bool) {
	in.shown.Lock()
	defer in.shown.Unlock()
	o, ok := in.objects[key]
	return o, ok
}

// broke notes why intent is not in effect; nil ends that. It reports whether that
// is news.
func (in *intent) broke(err error, now time.Time) bool {
	in.shown.Lock()
	defer in.shown.Unlock()
	news := (in.broken == nil) != (err == nil) || err != nil && in.broken.Error() != err.Error()
	if news {
		in.broken, in.since = err, now
	}
	return news
}

// unsound returns the objects that have no effect, and why.
func (in *intent) unsound() map[store.Key]Unsound {
	in.shown.Lock()
	defer in.shown.Unlock()
	return in.problems // replaced, never changed
}

func (in *intent) status() (since time.Time, cause error) {
	in.shown.Lock()
	defer in.shown.Unlock()
	return in.since, in.broken
}

func compareKeys(a, b store.Key) int {
	return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

// loadIntent puts what is stored into effect. An object that this release no
// longer takes is left out and shown, so that the rest works.
func (c *Control) loadIntent(ctx context.Context) error {
	if c.cfg.Cluster != nil {
		return nil // Follow brings it
	}
	list, err := c.store.ListObjects(ctx, store.Key{})
	if err != nil {
		return err
	}
	objects := make(map[store.Key]store.Object, len(list))
	var files []discovery.File
	for _, o := range list {
		objects[o.Key()] = o
		files = append(files, storedFile(o))
	}
	c.intent.shown.Lock()
	before := len(c.intent.objects)
	c.intent.objects = objects
	c.intent.shown.Unlock()
	if len(files)+before == 0 || c.cfg.Translate == nil {
		return nil
	}
	in, _, err := c.cfg.Translate(files)
	if err == nil && c.cfg.Intent == "" {
		c.intent.broke(nil, c.now()) // another control may have mended it
	}
	if err != nil {
		c.intent.broke(fmt.Errorf("stored intent: %w", err), c.now())
		c.log.Error("stored intent is not all in effect", "err", err)
		files = slices.DeleteFunc(files, func(f discovery.File) bool {
			_, _, err := c.cfg.Translate([]discovery.File{f})
			return err != nil
		})
		if in, _, err = c.cfg.Translate(files); err != nil {
			in = discovery.Intent{}
		}
	}
	return c.effect(in)
}

// effect puts intent into effect. What only the store knows of a route, which one is
// older, is added here.
func (c *Control) effect(in discovery.Intent) error {
	for i := range in.Routes {
		r := &in.Routes[i]
		if o, ok := c.intent.get(store.Key{Kind: string(r.Kind), Namespace: r.Namespace, Name: r.Name}); ok {
			r.Generation, r.Created = o.Generation, o.Created.UTC().Truncate(time.Second)
		}
	}
	return c.model.setIntent(in)
}

// elsewhere refuses what is declared to a platform's API server.
func elsewhere(op, remedy string) error {
	return &assay.Error{Kind: assay.Conflict, Op: op, Err: errors.New("this mesh is a cluster's: what the API server has is in effect"), Remedy: remedy}
}

// storedFile is a file that translates to a stored object again.
func storedFile(o store.Object) discovery.File {
	return discovery.File{Name: "stored " + o.Key().String(), YAML: o.Spec}
}

// plan is a change of intent that was found to be sound as a whole.
type plan struct {
	source  string
	objects []store.Object // of the source, new or changed or the same
	remove  []store.Key
	intent  discovery.Intent
	changes []store.Change
}

// plan reads files and works out what they change. Files that do not name an
// object leave it as it is, unless prune removes what the source owns.
func (c *Control) plan(source string, files []discovery.File, prune bool) (*plan, error) {
	if c.cfg.Cluster != nil {
		return nil, elsewhere("apply", "kubectl apply -f FILE")
	}
	if c.cfg.Translate == nil {
		return nil, &assay.Error{Kind: assay.Unavailable, Op: "apply", Err: errors.New("this control takes no intent")}
	}
	_, objects, err := c.cfg.Translate(files)
	if err != nil {
		return nil, invalid(err)
	}
	p := &plan{source: source}
	named := map[store.Key]bool{}
	for _, o := range objects {
		spec, err := normal(o.Manifest)
		if err != nil {
			return nil, invalid(fmt.Errorf("%s:%d: %w", o.Source, o.Line, err))
		}
		n := store.Object{Kind: o.Kind, Namespace: o.Namespace, Name: o.Name, Spec: spec, Source: source, Generation: 1}
		action := store.Created
		if was, ok := c.intent.get(n.Key()); ok {
			if was.Source != source {
				return nil, &assay.Error{Kind: assay.Conflict, Op: "apply", Err: fmt.Errorf("%s:%d: %s belongs to %s", o.Source, o.Line, n.Key(), owner(was.Source)),
					Remedy: "change it there, or remove it there first"}
			}
			action, n.Generation = store.Unchanged, was.Generation
			if !bytes.Equal(was.Spec, n.Spec) {
				action, n.Generation = store.Changed, was.Generation+1
			}
		}
		named[n.Key()] = true
		p.objects = append(p.objects, n)
		p.changes = append(p.changes, store.Change{Key: n.Key(), Action: action})
	}
	whole := slices.Clone(files)
	for _, o := range c.intent.list() {
		switch {
		case named[o.Key()]:
		case prune && o.Source == source:
			p.remove = append(p.remove, o.Key())
			p.changes = append(p.changes, store.Change{Key: o.Key(), Action: store.Removed})
		default:
			whole = append(whole, storedFile(o))
		}
	}
	// Once more with everything else that is declared: references cross files.
	if p.intent, _, err = c.cfg.Translate(whole); err != nil {
		return nil, invalid(err)
	}
	if err := p.intent.Validate(); err != nil {
		return nil, invalid(err)
	}
	slices.SortFunc(p.changes, func(a, b store.Change) int { return compareKeys(a.Key, b.Key) })
	return p, nil
}

func invalid(err error) error {
	if _, ok := errors.AsType[*assay.Error](err); ok {
		return err
	}
	return &assay.Error{Kind: assay.Invalid, Op: "apply", Err: err}
}

func owner(source string) string {
	if source == fromCluster {
		return "the API server"
	}
	if source == fromFolder {
		return "the folder that control watches"
	}
	return "what was applied by hand"
}

// normal writes JSON in one form: no spaces, sorted keys.
func normal(raw json.RawMessage) (json.RawMessage, error) {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return nil, err
	}
	return json.Marshal(v)
}

// commit stores a plan and puts it into effect. The caller holds intent.mu since
// before the plan.
func (c *Control) commit(ctx context.Context, db *store.DB, p *plan, prune bool, since int64) error {
	if !slices.ContainsFunc(p.changes, func(ch store.Change) bool { return ch.Action != store.Unchanged }) && p.source == fromFolder {
		return nil
	}
	if _, err := db.ReplaceObjects(ctx, p.source, p.objects, store.Replace{Prune: prune, Since: since}); err != nil {
		return err
	}
	now := c.now()
	c.intent.shown.Lock()
	for _, o := range p.objects {
		was, ok := c.intent.objects[o.Key()]
		if ok && was.Generation == o.Generation {
			continue
		}
		o.Created, o.Changed = now, now
		if ok {
			o.Created = was.Created
		}
		c.intent.objects[o.Key()] = o
	}
	for _, key := range p.remove {
		delete(c.intent.objects, key)
	}
	c.intent.shown.Unlock()
	return c.effect(p.intent)
}

// apply is the one path from files to what is in effect.
func (c *Control) apply(ctx context.Context, db *store.DB, source string, files []discovery.File, prune bool) ([]store.Change, error) {
	var changes []store.Change
	err := c.planned(ctx, func() (err error) {
		changes, err = c.tryApply(ctx, db, source, files, prune)
		return err
	})
	return changes, err
}

// applies is how often a change is planned anew because another control was first.
const applies = 5

// planned has a change of intent planned and stored, anew when another control was first.
func (c *Control) planned(ctx context.Context, try func() error) error {
	for n := 0; ; n++ {
		if err := try(); !errors.Is(err, store.ErrChanged) || n == applies {
			return err
		}
		c.catchUp(ctx)
	}
}

func (c *Control) tryApply(ctx context.Context, db *store.DB, source string, files []discovery.File, prune bool) ([]store.Change, error) {
	c.intent.mu.Lock()
	defer c.intent.mu.Unlock()
	since := c.several.heardTo()
	p, err := c.plan(source, files, prune)
	if err != nil {
		return nil, err
	}
	return p.changes, c.commit(ctx, db, p, prune, since)
}

// remove removes one object of intent.
func (c *Control) remove(ctx context.Context, key store.Key) error {
	op := "delete " + key.String()
	if c.cfg.Cluster != nil {
		return elsewhere(op, "kubectl delete "+strings.ToLower(key.Kind)+" -n "+key.Namespace+" "+key.Name)
	}
	if c.cfg.Translate == nil {
		return &assay.Error{Kind: assay.Unavailable, Op: op, Err: errors.New("this control takes no intent")}
	}
	if _, ok := c.intent.get(key); !ok {
		c.catchUp(ctx) // it may be new, from another control
	}
	return c.planned(ctx, func() error { return c.tryRemove(ctx, op, key) })
}

func (c *Control) tryRemove(ctx context.Context, op string, key store.Key) error {
	c.intent.mu.Lock()
	defer c.intent.mu.Unlock()
	since := c.several.heardTo()
	o, ok := c.intent.get(key)
	if !ok {
		return &assay.Error{Kind: assay.NotFound, Op: op, Err: errors.New("there is no such object"), Remedy: "see assay get " + key.Kind}
	}
	if o.Source != fromApply {
		return &assay.Error{Kind: assay.Conflict, Op: op, Err: fmt.Errorf("it belongs to %s", owner(o.Source)), Remedy: "remove it there"}
	}
	var files []discovery.File
	for _, other := range c.intent.list() {
		if other.Key() != key {
			files = append(files, storedFile(other))
		}
	}
	in, _, err := c.cfg.Translate(files)
	if err != nil {
		return &assay.Error{Kind: assay.Conflict, Op: op, Err: err, Remedy: "remove what refers to it first"}
	}
	if _, err := c.storeFor(ctx, key.String()).DeleteObject(ctx, key, since); err != nil {
		return err
	}
	c.intent.shown.Lock()
	delete(c.intent.objects, key)
	c.intent.shown.Unlock()
	return c.effect(in)
}
