package agent

import (
	"context"
	"time"
)

// A pod that runs has clients when it joins, and when it leaves. Those in the mesh hear of
// it a moment later, and until then treat it as what it was: they say nothing of the mesh
// to one that has just joined, and ask one that has left for its certificate. Neither may
// fail. So its proxy is there before others hear of it and stays until they have,
// and serves their plaintext meanwhile.

// hearWithin is how long everybody may take to hear what control has published.
const hearWithin = 3 * time.Second

func (w *workload) setTransition(on bool) {
	w.mu.Lock()
	w.transition = on
	w.mu.Unlock()
	w.wakeSessions() // a successor's, too: it serves plaintext no longer than that
}

// arrive ends the transition of a pod that joins, once everybody has heard of it.
func (w *workload) arrive(ctx context.Context) {
	w.mu.Lock()
	joins := w.transition
	w.mu.Unlock()
	if !joins {
		return
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !w.published() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
	if w.heard(ctx) {
		w.setTransition(false)
	}
}

// published reports whether control tells this host of the workload, as all others.
func (w *workload) published() bool {
	w.a.mu.Lock()
	defer w.a.mu.Unlock()
	return w.a.connected && w.a.snapshot.hasWorkload(w.id)
}

// heard waits until everybody has heard what control has published; false when the pod or
// ctx ends before.
func (w *workload) heard(ctx context.Context) bool {
	t := time.NewTimer(hearWithin)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-w.gone.ch:
	case <-ctx.Done():
	}
	return false
}
