package control

import "maps"

// A pod may be in the mesh before control has taken it: its report is too early, or
// contradicts the platform, or could not come because its node's agent is away. One that has
// ended is still a place of services until the platform has heard so. Nobody is
// sent to such a pod, in plaintext least of all: its proxy would refuse that from the
// meshed, and what was sent would be on the wire.

// claim is what is known of a pod that may be meshed and is not taken.
type claim struct {
	host    string
	session *session // that reported it here; nil: none did
	stored  bool     // others know of it
}

// claim notes that a host has a pod in its hands. Only the pod's own node can.
func (m *model) claim(h *host, s *session, id string) {
	if m.cluster == nil || h == nil || h.Node == "" {
		return
	}
	if p := m.cluster.pods[id]; p == nil || p.Node != h.Node || p.HostNetwork {
		return
	}
	if old, ok := m.cluster.claims[id]; ok && s == nil && (old.session != nil || old.stored) {
		return
	}
	told := m.me != "" && s != nil
	if told {
		m.behind.claim(id, h.ID)
	}
	m.cluster.claims[id] = claim{h.ID, s, told}
	m.catalog.SetClaimed(id, true)
}

// claimNew does so for pods that came while their node's agent was away.
func (m *model) claimNew(ids []string) {
	if len(ids) == 0 {
		return
	}
	away := map[string]*host{} // by node
	for _, h := range m.hosts {
		if h.Node != "" && !h.present {
			away[h.Node] = h
		}
	}
	for _, id := range ids {
		m.claim(away[m.cluster.pods[id].Node], nil, id)
	}
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
	m.catalog.SetClaimed(id, false)
	if c.stored {
		m.behind.claim(id, "")
	}
}
