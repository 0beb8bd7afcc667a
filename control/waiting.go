package control

import (
	"fmt"
	"maps"
	"slices"
	"time"

	"assay.dev"
)

// What a host says may come before what the platform says of it: it waits, bounded.

// tooEarly is why a report cannot be taken yet: what the platform says may change, and
// then it is looked at again.
type tooEarly struct{ error }

// waiting is a report that is too early.
type waiting struct {
	session *session
	w       *assay.Workload
	cause   error
	since   time.Time
	refused bool // the host has been told
}

// waitFor is how long a host waits for an answer about a pod that the platform does not
// know. It is looked at again after that, too.
const waitFor = 10 * time.Second

// wait keeps a report for later. What the host said of the workload before counts no more
// when it had other addresses.
func (m *model) wait(s *session, w *assay.Workload, cause error) {
	if old, ok := m.catalog.Workload(w.ID); ok && !slices.Equal(old.Addrs, w.Addrs) {
		m.removeWorkload(w.ID)
		m.behind.gone(w.ID, old.Host)
	}
	n := &waiting{session: s, w: w, cause: cause, since: m.now()}
	if old := m.cluster.waiting[w.ID]; old != nil && old.session == s {
		n.since, n.refused = old.since, old.refused
	}
	if m.cluster.waiting[w.ID] == nil && m.waitingOf(s) >= maxRunning {
		m.refuse(s, w.ID, &assay.Error{Kind: assay.Unavailable, Op: "take workload " + w.ID, Err: fmt.Errorf("%d others of host %s wait to be known", maxRunning, s.host)})
		return
	}
	m.cluster.waiting[w.ID] = n
}

func (m *model) waitingOf(s *session) (n int) {
	for _, x := range m.cluster.waiting {
		if x.session == s {
			n++
		}
	}
	return n
}

// tryWaiting looks again at what waits.
func (m *model) tryWaiting() {
	for _, id := range slices.Sorted(maps.Keys(m.cluster.waiting)) {
		n := m.cluster.waiting[id]
		if h := m.hosts[n.session.host]; h != nil && h.session == n.session {
			m.report(h, n.session, n.w)
		}
	}
}

// waitedLong tells hosts what has waited for too long, once.
func (m *model) waitedLong(now time.Time) {
	if m.cluster == nil {
		return
	}
	m.tryWaiting() // addresses become free
	for _, n := range m.cluster.waiting {
		if !n.refused && now.Sub(n.since) >= waitFor {
			n.refused = true
			m.refuse(n.session, n.w.ID, &assay.Error{Kind: assay.Denied, Op: "take workload " + n.w.ID, Err: n.cause,
				Remedy: "it is taken as soon as the API server says so; see kubectl get pod -o wide"})
		}
	}
}

// waitNoMore forgets what waits of a workload that has gone.
func (m *model) waitNoMore(s *session, id string) {
	if m.cluster == nil {
		return
	}
	if n := m.cluster.waiting[id]; n != nil && n.session == s {
		delete(m.cluster.waiting, id)
	}
	if m.cluster.claims[id].host == s.host {
		m.disclaimPod(id)
	}
}

// stopWaiting forgets what waits of a host.
func (m *model) stopWaiting(host string) {
	if m.cluster != nil {
		maps.DeleteFunc(m.cluster.waiting, func(_ string, n *waiting) bool { return n.session.host == host })
	}
}
