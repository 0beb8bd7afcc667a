package control

import (
	"maps"
	"time"
)

// A pod may be in the mesh before control has taken it: its report is too early, or
// contradicts the platform, or could not come because its node's agent is away. One that has
// ended is still a place of services until the platform has heard so. Nobody is
// sent to such a pod, in plaintext least of all: its proxy would refuse that from the
// meshed, and what was sent would be on the wire.

// claim is what is known of a pod that may be meshed and is not taken.
type claim struct {
	host    string
	session *session  // that reported it here; nil: none did
	stored  bool      // others know of it
	since   time.Time // by the clock of this process
}

// claim notes that a host has a pod in its hands. Only the pod's own node can.
func (m *model) claim(h *host, s *session, id string) {
	if m.cluster == nil || h == nil || h.Node == "" {
		return
	}
	if p := m.cluster.pods[id]; p == nil || !h.maySpeakFor(p) || p.HostNetwork {
		return
	}
	if old, ok := m.cluster.claims[id]; ok && s == nil && (old.session != nil || old.stored) {
		return
	}
	told := m.me != "" && s != nil
	if told {
		m.behind.claim(id, h.ID)
	}
	m.cluster.claims[id] = claim{h.ID, s, told, time.Now()}
	m.catalog.SetClaimed(id, true)
}

// What others report to their controls is heard through the store, so a pod that is new on a
// host of another control may be in the mesh for as long as the store has not been heard since.
// While it is away nobody is sent there in plaintext, and a while longer, until the
// others have stored what they took meanwhile: they try again after as long as they have tried.
const (
	unheard   = time.Second           // a store that was not heard for so long was away
	catchesUp = retryMost + flushTime // in which others store what they know, when it is back
)

// claimNew claims pods that came, or got an address, while their node's agent was away or
// reported to another control.
func (m *model) claimNew(ids []string) {
	for _, id := range ids {
		_, taken := m.catalog.Workload(id)
		if h := m.hosts[nodeID(m.cluster.pods[id].Node)]; !taken && h != nil && h.session == nil {
			m.claim(h, nil, id)
		}
	}
}

// heardOthers takes note that the store was heard, as it was at began, and gives up the claims
// about which others have had their say.
func (m *model) heardOthers(began time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := time.Now()
	if gap := began.Sub(m.heard); gap > unheard {
		if until := now.Add(min(2*gap, catchesUp)); until.After(m.caught) {
			m.caught = until
		}
	}
	if m.heard = began; now.Before(m.caught) {
		return
	}
	m.disclaim(func(_ string, c claim) bool {
		h := m.hosts[c.host]
		return c.session == nil && !c.stored && c.since.Before(began) && h != nil && h.elsewhere() && now.Sub(h.since) >= catchesUp
	})
	m.publishSoon()
}

// disclaim forgets the claims for which f says so.
func (m *model) disclaim(f func(id string, c claim) bool) {
	if m.cluster == nil {
		return
	}
	maps.DeleteFunc(m.cluster.claims, func(id string, c claim) bool {
		if !f(id, c) {
			return false
		}
		m.unclaim(id, c)
		return true
	})
}

// disclaimPod forgets the claim to one pod.
func (m *model) disclaimPod(id string) {
	if m.cluster == nil {
		return
	}
	if c, claimed := m.cluster.claims[id]; claimed {
		delete(m.cluster.claims, id)
		m.unclaim(id, c)
	}
}

func (m *model) unclaim(id string, c claim) {
	m.catalog.SetClaimed(id, m.injected(id))
	if c.stored {
		m.behind.claim(id, "")
	}
}
