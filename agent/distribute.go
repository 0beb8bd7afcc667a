package agent

import (
	"context"
	"errors"
	"maps"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"time"

	"assay.dev"
	"assay.dev/agent/capture"
)

// What a workload's kernel is told: its rules, and which addresses are open.

func (w *workload) wakeUp() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// wakeOthers has the proxies that are not the current one hear of a new view: what those that
// drain carry still may dial, and a successor accepts with what it knows then.
func (w *workload) wakeOthers() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, g := range w.living() {
		if g.session != nil && g != w.current {
			g.session.wakeUp()
		}
	}
}

// wakeSessions has all proxies hear of what is no matter of views.
func (w *workload) wakeSessions() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, g := range w.living() {
		if g.session != nil {
			g.session.wakeUp()
		}
	}
}

func (w *workload) look() {
	select {
	case w.lookNow <- struct{}{}:
	default:
	}
}

// ownPorts are those of the agent's listeners, which are no endpoints.
func (w *workload) ownPorts() []uint16 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return []uint16{w.rec.Outbound, w.rec.Inbound}
}

// rules are the capture rules for the namespace's settings.
func (w *workload) rules(c assay.NamespaceConfig) capture.Rules {
	w.a.mu.Lock()
	virtual := w.a.state.virtual()
	w.a.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	return capture.Rules{
		OutboundPort: w.rec.Outbound, InboundPort: w.rec.Inbound,
		OwnMark: w.a.cfg.OwnMark, ReturnMark: w.a.cfg.ReturnMark,
		Virtual: virtual, Excluded: c.ExcludedPorts, Released: w.rec.Given != nil && w.rec.Given.Released,
		Tracked: w.a.cfg.Own != nil,
	}
}

// distribute keeps rules and proxy up to date with the newest view. What is no longer
// there is closed at once; what is new is opened in the kernel when the proxy has said
// that it uses it: else a connection that the kernel took would find no endpoint.
func (w *workload) distribute(ctx context.Context) {
	var installed capture.Rules
	namespace := w.namespace()
	if w.adopted {
		select { // what is installed is at least as new as what this agent read
		case <-w.a.fresh.ch:
		case <-ctx.Done():
			return
		}
		if err := w.capture.Adopt(); err != nil {
			w.log.Error("capture rules of the last agent", "err", err)
		}
	}
	var of opened
	var next *view // that the proxy has not said to use
	for {
		v := w.a.view.Load()
		w.mu.Lock()
		s := w.session
		w.mu.Unlock()
		var used *view // that it has, and had not before
		if s != nil {
			if next != nil && s.uses(next.number) {
				used, next = next, nil
			}
			if s.uses(v.number) {
				used, next = v, nil
			} else {
				if !s.toldOf(v.number) {
					s.wakeUp()
				}
				if next == nil {
					next = v
				}
			}
		}
		if rules := w.rules(v.config(namespace)); !reflect.DeepEqual(rules, installed) {
			if err := w.installRules(rules, of.all(w.capture, used, v)); err != nil {
				w.log.Error("capture rules", "err", err)
				of = opened{}
			} else {
				installed = rules
				of.are(used, v)
			}
		} else if err := of.follow(w.capture, used, v); err != nil {
			w.log.Error("capture rules: addresses", "err", err)
			of = opened{}
		}
		select {
		case <-ctx.Done():
			return
		case <-w.wake:
		}
	}
}

// opened is which views a workload's kernel goes by: open is what the proxy uses of the one,
// but for what was closed up to the other. The zero value knows of none.
type opened struct{ used, seen *view }

// all is what is to be open in view v, of what the proxy uses; used is nil when that is as
// it was.
func (o *opened) all(c *capture.Capture, used, v *view) map[netip.AddrPort]bool {
	switch used {
	case v:
		return v.open
	case nil:
		return both(c.Open(), v.open)
	}
	return both(used.open, v.open)
}

// are notes that it is.
func (o *opened) are(used, v *view) {
	if used != nil {
		o.used = used
	}
	o.seen = v
}

// follow has the kernel go by view v, and by used unless that is nil.
func (o *opened) follow(c *capture.Capture, used, v *view) error {
	open, closed, known := o.changed(used, v)
	var err error
	if known {
		err = c.Change(open, closed)
	} else {
		err = c.SetOpen(o.all(c, used, v))
	}
	if err == nil {
		o.are(used, v)
	}
	return err
}

// changed is what the kernel opens and closes for that. The last value is false when it is not
// known: everything is to be looked at.
func (o *opened) changed(used, v *view) (open, closed []netip.AddrPort, known bool) {
	from := o.seen
	if used != nil {
		from = o.used
	}
	if from == nil {
		return nil, nil, false
	}
	c, known := v.since(from.number)
	for _, at := range c.open {
		if !v.open[at] || used != nil && !used.open[at] {
			closed = append(closed, at)
		} else if used != nil {
			open = append(open, at)
		}
	}
	return open, closed, known
}

// both returns what is open in a and in b; it may be one of them.
func both(a, b map[netip.AddrPort]bool) map[netip.AddrPort]bool {
	if len(a) == len(b) && maps.Equal(a, b) {
		return b
	}
	out := make(map[netip.AddrPort]bool, min(len(a), len(b)))
	for at := range a {
		if b[at] {
			out[at] = true
		}
	}
	return out
}

// verifying is how a workload's capture is looked after.
type verifying struct {
	at         time.Time     // when it was last
	whole      time.Time     // when all of it was, and was right
	every      time.Duration // how soon it is again: not all of a host at once
	generation uint32        // of the rules, then
	again      bool          // it could not be said whether somebody changed it
	down       time.Time     // since when lo is, as far as it was seen; zero: it is not
}

// lookAtCapture verifies the capture now and then, and soon after rules were changed. Rules of
// which the kernel says that nobody has changed them are read back seldom.
func (w *workload) lookAtCapture(v *verifying) {
	since := time.Since(v.at)
	if since <= verifySoon {
		return
	}
	// The number first: what changes from now on is looked at the next time.
	now, err := w.capture.Generation()
	changed := v.again || err == nil && now != v.generation
	if !changed && since <= v.every {
		return
	}
	w.verifyCapture(v, changed || err != nil || time.Since(v.whole) > verifyWhole)
	v.at, v.generation = time.Now(), now
	v.every = verifyEvery - rand.N(verifyEvery/3)
}

// verifyCapture repairs what somebody changed, and says so. A pod whose lo is down may be about
// to end, which its runtime will have said soon.
func (w *workload) verifyCapture(v *verifying, whole bool) {
	v.again = false
	if w.capture.Open() == nil {
		return // the last agent's, and not yet this one's
	}
	err := w.verified(whole)
	if err == nil {
		v.down = time.Time{}
		if whole {
			v.whole = time.Now()
		}
		return
	}
	v.whole = time.Time{}
	var repair error
	if w.given && w.ns.LoopbackDown() {
		if v.down.IsZero() {
			v.down = time.Now()
		}
		if v.again = time.Since(v.down) < endsWithin; v.again {
			return
		}
		err, repair = errors.Join(errors.New("lo is down"), err), w.ns.RaiseLoopback()
	}
	v.down = time.Time{}
	repair = errors.Join(repair, w.installRules(w.rules(w.a.view.Load().config(w.noun().Namespace)), nil))
	w.log.Error("capture rules were changed from outside", "err", err, "repair", repair)
	w.a.outbox.finding(&assay.Finding{
		Time: time.Now(), Workload: w.id, Kind: "capture-changed", Subject: w.id, Detail: err.Error(),
		Remedy: "find out who holds CAP_NET_ADMIN in the workload's network namespace; the rules were written anew",
	})
}

// verified compares what is to be there, rules or the way that they need alone, with what is.
func (w *workload) verified(whole bool) error {
	if !whole {
		return w.capture.VerifyWay()
	}
	if err := w.capture.Verify(); err != nil {
		return err
	}
	w.beside.mu.Lock()
	metered := w.beside.installed.Link != ""
	w.beside.mu.Unlock()
	if metered {
		return w.beside.meter.Verify()
	}
	return nil
}
