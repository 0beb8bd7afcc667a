package control

import (
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/identity"
)

// rotate tells the authority what happened, publishes a new bundle and keeps
// control's own certificate fresh. Only Open, tick and Rotate call it, through
// the authority's lock one after the other.
func (c *Control) rotate(e identity.Event) error {
	actions, err := c.authority.Step(e)
	for _, a := range actions {
		c.log.Info("certificates", "action", a.String())
	}
	b := c.authority.Bundle()
	c.model.setBundle(api.FromBundle(b.Version, b.Roots))
	if own := c.ownCertificate(len(actions) > 0); err == nil {
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
	cert, renewAt, err := c.authority.IssueControl("control")
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
		if h.session != nil || m.certified(assay.Infrastructure(m.trustDomain, "host", h.ID).String(), "", now) {
			out = append(out, trusting{nil, h, h.bundle})
		}
	}
	for _, w := range m.catalog.Workloads() {
		h := m.hosts[w.Host]
		if h == nil {
			continue
		}
		if m.certified(w.Identity.String(), w.ID, now) || !w.MeshedSince.IsZero() && h.session != nil {
			out = append(out, trusting{w, h, m.acks[w.ID]})
		}
	}
	return out
}

func (m *model) certified(subject, workload string, now time.Time) bool {
	c, ok := m.current(subject, workload)
	return ok && now.Before(c.NotAfter)
}

func (m *model) leastAcknowledged() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	least := uint64(identity.NobodyLeft)
	for _, t := range m.live() {
		least = min(least, t.version)
	}
	return least
}
