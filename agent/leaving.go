package agent

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
	a.leaving = l
	a.mu.Unlock()
	if same {
		return
	}
	a.log.Warn("the mesh is taken out of the cluster, or that was taken back", "serve plaintext", l.Serve, "dial plaintext", l.Dial)
	a.publish()
	a.mu.Lock()
	a.leavingView = a.view.Load().number
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
		w.mu.Lock()
		s := w.session
		w.mu.Unlock()
		knows := s != nil && number > 0 && s.uses(number)
		if !l.Serve || !knows {
			out.serve++
		}
		if !l.Dial || !knows {
			out.dial++
		}
	}
	return &out
}
