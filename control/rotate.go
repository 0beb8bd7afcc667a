package control

import (
	"context"
	"slices"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/identity"
)

// rotate follows the steps of others and tells the authority what happened, publishes a new
// bundle and keeps control's own certificate fresh. Only Open, rotations and Rotate call it,
// through the authority's lock one after the other.
func (c *Control) rotate(e identity.Event) error {
	followed, err := c.authority.Follow()
	if followed {
		c.log.Info("certificates", "followed", "another control's step")
	}
	var actions []identity.Action
	if err == nil {
		actions, err = c.authority.Step(e)
	}
	for _, a := range actions {
		c.log.Info("certificates", "action", a.String())
	}
	b := c.authority.Bundle()
	c.model.setBundle(api.FromBundle(b.Version, b.Roots))
	if own := c.ownCertificate(followed || len(actions) > 0); err == nil {
		err = own
	}
	return err
}

// ownCertificate renews control's certificate when it is due, or now.
func (c *Control) ownCertificate(force bool) error {
	c.renewing.Lock()
	defer c.renewing.Unlock()
	if !force && c.certificate.Load() != nil && c.now().Before(c.renewAt) {
		return nil
	}
	cert, renewAt, err := c.authority.IssueControl("control", c.cfg.Names...)
	if err != nil {
		return err
	}
	c.certificate.Store(&cert)
	c.renewAt = renewAt
	return nil
}

// setBundle gives streams a new bundle.
func (m *model) setBundle(b *api.Bundle) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.bundle != nil && m.bundle.Version == b.Version {
		return
	}
	m.bundle = b
	for s := range m.sessions {
		s.wake()
	}
}

// trusting is one proxy or agent that has to acknowledge bundles.
type trusting struct {
	workload *assay.Workload // nil: the agent
	host     *host
	version  uint64
}

// live lists everybody whose trust counts: agents that are connected or have a
// certificate, and workloads that are meshed or have one. One whose certificate
// has ended talks to nobody.
func (m *model) live() []trusting {
	now := m.now()
	var out []trusting
	for _, h := range m.hosts {
		if h.present || m.certified(assay.Infrastructure(m.trustDomain, "host", h.ID).String(), "", now) {
			out = append(out, trusting{nil, h, h.acknowledged(h.bundle)})
		}
	}
	for _, w := range m.catalog.Workloads() {
		h := m.hosts[w.Host]
		if h == nil || h.elsewhere() {
			continue // who has its stream says for all on it
		}
		if m.certified(w.Identity.String(), w.ID, now) || !w.MeshedSince.IsZero() && h.present {
			out = append(out, trusting{w, h, h.acknowledged(m.acks[w.ID])})
		}
	}
	return out
}

func (m *model) certified(subject, workload string, now time.Time) bool {
	c, ok := m.current(subject, workload)
	return ok && now.Before(c.NotAfter)
}

// leastAcknowledged is the oldest bundle that anybody trusts for whom a new root waits. For a pod that is
// a host it waits no longer than such a host's certificate lives: whoever renewed it since has had the
// new root with it, and who says nothing of that holds back the mesh for as long as it likes.
func (m *model) leastAcknowledged(s identity.State) uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.now()
	least := uint64(identity.NobodyLeft)
	for _, t := range m.live() {
		late := func(r identity.Root) bool {
			return r.Phase == identity.Published && t.version < r.Bundle && now.Sub(r.NotBefore) >= identity.PodLife
		}
		if t.host.Pod != "" && slices.ContainsFunc(s.Roots, late) {
			continue
		}
		least = min(least, t.version)
	}
	return least
}

// acknowledged is what somebody on a host trusts: what was heard here while its stream is here,
// and else what the control stored that had it, if that is more.
func (h *host) acknowledged(heard uint64) uint64 {
	if h.session != nil {
		return heard
	}
	return max(heard, h.Bundle)
}

// acknowledge stores what everybody on the hosts trusts whose streams are here, for the control
// that takes the next step.
func (c *Control) acknowledge(ctx context.Context) {
	if c.several == nil {
		return
	}
	for id, least := range c.model.toAcknowledge(c.authority.Waiting()) {
		limited, cancel := context.WithTimeout(ctx, flushTime)
		err := c.store.AcknowledgeHost(limited, id, least)
		cancel()
		if err != nil {
			return // the next tick does, when the store is back
		}
		c.model.stored(id, least)
	}
}

// toAcknowledge returns the oldest bundle that anybody trusts on hosts of which the store has
// another. A workload that has not said yet counts only when somebody waits for all.
func (m *model) toAcknowledge(waiting bool) map[string]uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	due := false
	for _, h := range m.hosts {
		due = due || h.session != nil && h.session.attached && (waiting || m.bundle != nil && h.Bundle < m.bundle.Version)
	}
	if !due {
		return nil
	}
	out := map[string]uint64{}
	for _, t := range m.live() {
		if s := t.host.session; s == nil || !s.attached || t.version == 0 && t.workload != nil && !waiting {
			continue
		}
		if least, ok := out[t.host.ID]; !ok || t.version < least {
			out[t.host.ID] = t.version
		}
	}
	for id, least := range out {
		if m.hosts[id].Bundle == least {
			delete(out, id)
		}
	}
	return out
}

func (m *model) stored(host string, bundle uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if h := m.hosts[host]; h != nil {
		h.Bundle = bundle
	}
}
