package identity

import (
	"fmt"
	"math"
	"time"
)

// Policy is how long things live.
type Policy struct {
	RootLife         time.Duration
	RootLead         time.Duration // a root is replaced when less than this is left of it
	RootForce        time.Duration // and its successor signs, acknowledged or not, when less than this is left
	IntermediateLife time.Duration // replaced at half of it
	Skew             time.Duration // how far the clock of a verifier may be behind
	// Apart is how long one of several signers goes on with the keys it knows while it
	// cannot ask whether they are still those in use; zero: there is one signer.
	Apart time.Duration
}

// DefaultApart is what several signers run with: a day without the store costs no
// certificate of those who run and of those who come.
const DefaultApart = day

// DefaultPolicy is what the mesh runs with.
var DefaultPolicy = Policy{
	RootLife:         10 * 365 * day,
	RootLead:         365 * day,
	RootForce:        180 * day,
	IntermediateLife: 90 * day,
	Skew:             time.Minute,
}

const day = 24 * time.Hour

// Phase is where a root is in its life.
type Phase string

const (
	Published Phase = "published" // in the bundle, signs nothing: proxies are learning it
	Signing   Phase = "signing"   // signs the intermediates
	Retiring  Phase = "retiring"  // signs nothing; leaves beneath it are still alive
)

// Root is one root in the bundle.
type Root struct {
	ID        string    `json:"id"`
	Phase     Phase     `json:"phase"`
	NotBefore time.Time `json:"notBefore"`
	NotAfter  time.Time `json:"notAfter"`
	// Bundle is the first version of the bundle that held it.
	Bundle uint64 `json:"bundle"`
	// Leaves is when the last leaf beneath it ends, rounded up to an hour so that
	// it need not be stored for every leaf.
	Leaves time.Time `json:"leaves,omitzero"`
}

// Use is what an intermediate signs.
type Use string

const (
	Workloads      Use = "workload"
	Infrastructure Use = "infrastructure"
)

// Intermediate is one intermediate that signs leaves.
type Intermediate struct {
	ID        string    `json:"id"`
	Root      string    `json:"root"`
	NotBefore time.Time `json:"notBefore"`
	NotAfter  time.Time `json:"notAfter"`
}

// State is everything that rotation knows. The zero State is an authority that
// has nothing yet. A State is a value: Step never changes the one it is given.
type State struct {
	Bundle         uint64       `json:"bundle"` // version of the trust bundle
	Roots          []Root       `json:"roots"`  // in the bundle, oldest first
	Workload       Intermediate `json:"workload"`
	Infrastructure Intermediate `json:"infrastructure"`
	Made           int          `json:"made"` // key pairs so far, for their IDs
	// Deadline is when a published root signs even though somebody has not
	// acknowledged it; zero: wait (see Policy.RootForce).
	Deadline time.Time `json:"deadline,omitzero"`
}

// Event is what happened. Exactly one kind:
type Event interface{ event() }

type (
	// Tick is time passing.
	Tick struct{}
	// Acknowledged tells the lowest version of the bundle that any live proxy or
	// host trusts; NobodyLeft when there is none.
	Acknowledged struct{ Least uint64 }
	// Issued tells that a leaf beneath Root lives until NotAfter.
	Issued struct {
		Root     string
		NotAfter time.Time
	}
	// Rotate is an operator's wish for a new root. Deadline, when not zero, is how
	// long acknowledgements are waited for.
	Rotate struct{ Deadline time.Time }
)

// NobodyLeft is the version that nobody acknowledges because nobody is there.
const NobodyLeft = math.MaxUint64

func (Tick) event()         {}
func (Acknowledged) event() {}
func (Issued) event()       {}
func (Rotate) event()       {}

// Action is what the runner does, in order, before it keeps the new State. A
// runner that dies in between starts again from the old State: what was made is
// then unused and is removed at the next start.
type Action interface{ String() string }

type (
	// MakeRoot makes a key pair and a self-signed certificate.
	MakeRoot struct {
		ID                  string
		NotBefore, NotAfter time.Time
	}
	// MakeIntermediate makes a key pair and has Root sign its certificate.
	MakeIntermediate struct {
		ID, Root            string
		Use                 Use
		NotBefore, NotAfter time.Time
	}
	// Publish gives the new bundle to everybody.
	Publish struct {
		Version uint64
		Roots   []string
	}
	// Destroy removes a key pair.
	Destroy struct{ ID string }
)

func (a MakeRoot) String() string {
	return fmt.Sprintf("make %s, %s", a.ID, life(a.NotBefore, a.NotAfter))
}
func (a MakeIntermediate) String() string {
	return fmt.Sprintf("make %s beneath %s, %s", a.ID, a.Root, life(a.NotBefore, a.NotAfter))
}
func (a Publish) String() string { return fmt.Sprintf("publish bundle %d: %v", a.Version, a.Roots) }
func (a Destroy) String() string { return "destroy " + a.ID }

func life(from, to time.Time) string {
	const form = "2006-01-02 15:04"
	return from.UTC().Format(form) + " to " + to.UTC().Format(form)
}

// Step is the whole decision: what follows from a state, an event and the time.
func Step(s State, e Event, now time.Time, p Policy) (State, []Action) {
	d := decision{State: s, now: now, p: p}
	d.Roots = append([]Root(nil), s.Roots...)
	least := uint64(0)
	switch e := e.(type) {
	case Issued:
		d.issued(e)
		return d.State, nil
	case Rotate:
		if len(d.Roots) > 0 && !d.has(Published) {
			d.publishRoot()
		}
		if d.has(Published) {
			d.Deadline = e.Deadline
		}
	case Acknowledged:
		least = e.Least
	}
	d.first()
	d.successor()
	d.promote(least)
	d.intermediates()
	d.retire()
	return d.State, d.actions
}

// decision is one Step under way.
type decision struct {
	State
	now     time.Time
	p       Policy
	actions []Action
}

func (d *decision) do(a Action) { d.actions = append(d.actions, a) }

func (d *decision) root(phase Phase) *Root {
	for i := range d.Roots {
		if d.Roots[i].Phase == phase {
			return &d.Roots[i]
		}
	}
	return nil
}

func (d *decision) has(phase Phase) bool { return d.root(phase) != nil }

func (d *decision) newID(kind string) string {
	d.Made++
	return fmt.Sprintf("%s-%d", kind, d.Made)
}

func (d *decision) newRoot(phase Phase) {
	r := Root{ID: d.newID("root"), Phase: phase, NotBefore: d.now.Add(-d.p.Skew), NotAfter: d.now.Add(d.p.RootLife), Bundle: d.Bundle + 1}
	d.do(MakeRoot{r.ID, r.NotBefore, r.NotAfter})
	d.Roots = append(d.Roots, r)
}

func (d *decision) publish() {
	d.Bundle++
	a := Publish{Version: d.Bundle}
	for _, r := range d.Roots {
		a.Roots = append(a.Roots, r.ID)
	}
	d.do(a)
}

func (d *decision) publishRoot() {
	d.newRoot(Published)
	d.Deadline = time.Time{}
	d.publish()
}

// first makes the root of a new mesh: nobody has to learn it before it signs.
func (d *decision) first() {
	if len(d.Roots) == 0 {
		d.newRoot(Signing)
		d.publish()
	}
}

// successor publishes the next root when the signing one nears its end.
func (d *decision) successor() {
	if d.root(Signing).NotAfter.Sub(d.now) < d.p.RootLead && !d.has(Published) {
		d.publishRoot()
	}
}

// promote lets a published root sign once everybody who lives trusts it.
func (d *decision) promote(least uint64) {
	next, old := d.root(Published), d.root(Signing)
	if next == nil {
		return
	}
	acknowledged := least >= next.Bundle
	overdue := !d.Deadline.IsZero() && !d.now.Before(d.Deadline)
	forced := old.NotAfter.Sub(d.now) < d.p.RootForce
	if !acknowledged && !overdue && !forced {
		return
	}
	old.Phase, next.Phase = Retiring, Signing
	d.Deadline = time.Time{}
	if d.p.Apart > 0 {
		// A signer that does not hear of this signs beneath the old root for that long.
		if until := d.now.Add(d.p.Apart + HostLife); old.Leaves.Before(until) {
			old.Leaves = until
		}
	}
}

// intermediates replaces each one at half-life or when its root signs no longer.
// The old key goes at once; leaves that it signed carry its certificate and need
// only their root.
func (d *decision) intermediates() {
	for _, use := range []Use{Workloads, Infrastructure} {
		im := &d.Workload
		if use == Infrastructure {
			im = &d.Infrastructure
		}
		root := d.root(Signing)
		half := im.NotBefore.Add(im.NotAfter.Sub(im.NotBefore) / 2)
		if im.Root == root.ID && d.now.Before(half) {
			continue
		}
		old := im.ID
		*im = Intermediate{ID: d.newID(string(use)), Root: root.ID, NotBefore: d.now.Add(-d.p.Skew), NotAfter: d.now.Add(d.p.IntermediateLife)}
		if root.NotAfter.Before(im.NotAfter) {
			im.NotAfter = root.NotAfter
		}
		if im.NotBefore.Before(root.NotBefore) {
			im.NotBefore = root.NotBefore
		}
		d.do(MakeIntermediate{im.ID, im.Root, use, im.NotBefore, im.NotAfter})
		if old != "" {
			d.do(Destroy{old})
		}
	}
}

// retire takes a root out of the bundle when no leaf beneath it lives, with an
// allowance for clocks.
func (d *decision) retire() {
	kept := d.Roots[:0]
	var gone []string
	for _, r := range d.Roots {
		if r.Phase == Retiring && d.now.After(r.Leaves.Add(d.p.Skew)) {
			gone = append(gone, r.ID)
			continue
		}
		kept = append(kept, r)
	}
	d.Roots = kept
	if len(gone) > 0 {
		d.publish()
		for _, id := range gone {
			d.do(Destroy{id})
		}
	}
}

func (d *decision) issued(e Issued) {
	until := e.NotAfter.Truncate(time.Hour)
	if until.Before(e.NotAfter) {
		until = until.Add(time.Hour)
	}
	for i := range d.Roots {
		if r := &d.Roots[i]; r.ID == e.Root && r.Leaves.Before(until) {
			r.Leaves = until
		}
	}
}
