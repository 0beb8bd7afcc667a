package agent

import "slices"

// A mesh that is taken out of its cluster leaves everywhere at once, and hosts hear of
// everything at different times. A pod that has left must not be asked for its certificate
// by one that has not heard so. Therefore it goes in steps, each of which ends when every
// host has taken it: first all proxies serve plaintext, too, then all dial nothing else,
// and only then pods are released. None of them needs control.

// Leaving says how far a mesh that is taken out has come.
type Leaving struct {
	Serve bool // proxies serve plaintext, too, whatever their namespaces say
	Dial  bool // they dial nothing else
}

// Leave takes a step of a mesh that is taken out, or takes it back.
func (a *Agent) Leave(l Leaving) {
	a.mu.Lock()
	same := a.leaving == l
	if !same {
		a.leaving, a.leavingView = l, 0 // nobody knows before it is published
	}
	a.mu.Unlock()
	if same {
		return
	}
	a.log.Warn("the mesh is taken out of the cluster, or that was taken back", "serve plaintext", l.Serve, "dial plaintext", l.Dial)
	a.publish()
	a.mu.Lock()
	if a.leaving == l {
		a.leavingView = a.view.Load().number
	}
	a.mu.Unlock()
}

// lingering is how many pods are not where a mesh that is taken out wants them.
type lingering struct{ serve, dial, release int }

// lingering is nil when the mesh stays.
func (a *Agent) lingering() *lingering {
	a.mu.Lock()
	l, number := a.leaving, a.leavingView
	a.mu.Unlock()
	if l == (Leaving{}) {
		return nil
	}
	var out lingering
	for _, w := range a.all() {
		if !w.given || w.isReleased() {
			continue
		}
		out.release++
		knows := number > 0 && w.allUse(number)
		if !l.Serve || !knows {
			out.serve++
		}
		if !l.Dial || !knows {
			out.dial++
		}
	}
	return &out
}

// allUse reports whether every proxy of the workload that may serve or dial uses view number n:
// those that drain carry what they have. One that begins hears of the newest before it accepts.
func (w *workload) allUse(n uint64) bool {
	w.mu.Lock()
	list := slices.DeleteFunc(slices.Clone(w.older), (*generation).hasEnded)
	list = append(list, w.current)
	if w.next != nil && w.next.session != nil {
		list = append(list, w.next)
	}
	sessions := make([]*session, 0, len(list))
	for _, g := range list {
		if g == nil || g.session == nil {
			w.mu.Unlock()
			return false
		}
		sessions = append(sessions, g.session)
	}
	w.mu.Unlock()
	return !slices.ContainsFunc(sessions, func(s *session) bool { return !s.uses(n) })
}
