package agent

import (
	"context"
	"errors"
	"maps"
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

// wakeOlder has proxies that drain hear of a new view: what they carry still may dial.
func (w *workload) wakeOlder() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, g := range w.older {
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
	namespace := w.noun().Namespace
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
	known := w.capture.Open() // of what is open, what the proxy uses
	var next *view            // that it has not said to use
	for {
		v := w.a.view.Load()
		w.mu.Lock()
		s := w.session
		w.mu.Unlock()
		if s != nil {
			if next != nil && s.uses(next.number) {
				known, next = next.open, nil
			}
			if s.uses(v.number) {
				known, next = v.open, nil
			} else {
				s.wakeUp()
				if next == nil {
					next = v
				}
			}
		}
		known = both(known, v.open)
		if rules := w.rules(v.config(namespace)); !reflect.DeepEqual(rules, installed) {
			if err := w.installRules(rules, known); err != nil {
				w.log.Error("capture rules", "err", err)
			} else {
				installed = rules
			}
		} else if err := w.capture.SetOpen(known); err != nil {
			w.log.Error("capture rules: addresses", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-w.wake:
		}
	}
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
	at         time.Time // when it was last
	generation uint32    // of the rules, then
	again      bool      // it could not be said whether somebody changed it
	down       time.Time // since when lo is, as far as it was seen; zero: it is not
}

// lookAtCapture verifies the capture now and then, and soon after rules were changed.
func (w *workload) lookAtCapture(v *verifying) {
	since := time.Since(v.at)
	if since <= verifySoon {
		return
	}
	// The number first: what changes from now on is looked at the next time.
	now, err := w.capture.Generation()
	if since > verifyEvery || v.again || err == nil && now != v.generation {
		w.verifyCapture(v)
		v.at, v.generation = time.Now(), now
	}
}

// verifyCapture repairs what somebody changed, and says so. A pod whose lo is down may be about
// to end, which its runtime will have said soon.
func (w *workload) verifyCapture(v *verifying) {
	v.again = false
	if w.capture.Open() == nil {
		return // the last agent's, and not yet this one's
	}
	err := w.capture.Verify()
	w.beside.mu.Lock()
	metered := w.beside.installed.Link != ""
	w.beside.mu.Unlock()
	if err == nil && metered {
		err = w.beside.meter.Verify()
	}
	if err == nil {
		v.down = time.Time{}
		return
	}
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
