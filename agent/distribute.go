package agent

import (
	"context"
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

// verifyCapture repairs rules that somebody changed, and says so.
func (w *workload) verifyCapture() {
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
	if err == nil || w.given && !w.ns.LoopbackUp() {
		return // a runtime that ends a pod begins with that link, and takes its routes
	}
	repair := w.installRules(w.rules(w.a.view.Load().config(w.noun().Namespace)), nil)
	w.log.Error("capture rules were changed from outside", "err", err, "repair", repair)
	w.a.outbox.finding(&assay.Finding{
		Time: time.Now(), Workload: w.id, Kind: "capture-changed", Subject: w.id, Detail: err.Error(),
		Remedy: "find out who holds CAP_NET_ADMIN in the workload's network namespace; the rules were written anew",
	})
}
