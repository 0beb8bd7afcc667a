package control

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"assay.dev"
	"assay.dev/store"
)

// What others store becomes what this control knows. Of the workloads of a host whose
// stream it has it knows best by itself; of all else the store says what is.

// news is what was read of what others have changed.
type news struct {
	revision  int64
	changed   map[store.Kind][]string
	hosts     map[string]store.Host
	workloads map[string]*assay.Workload
	claims    map[string]string
	tokens    map[string]store.Token
	vips      map[string]int64
	certs     []store.Certificate
	findings  []store.Finding
	audit     []store.Audit
}

// hearSince reads what has changed after a revision and takes it in.
func (c *Control) hearSince(ctx context.Context, after int64) (int64, error) {
	revision, changed, err := c.store.Since(ctx, after)
	if err != nil {
		return 0, err
	}
	lost := c.model.takeLost()
	if len(lost) > 0 {
		changed[store.OfWorkload] = append(changed[store.OfWorkload], lost...)
	}
	n, err := c.read(ctx, revision, changed)
	if err != nil {
		c.model.putLost(lost)
		return 0, err
	}
	c.model.hear(n)
	if err := c.rereadMoved(ctx); err != nil {
		return 0, err
	}
	if slices.Contains(changed[store.OfMeta], metaRefused) {
		if err := c.loadRefused(ctx); err != nil {
			return 0, err
		}
	}
	if len(changed[store.OfObject]) > 0 {
		c.intent.mu.Lock()
		defer c.intent.mu.Unlock()
		if err := c.loadIntent(ctx); err != nil {
			return 0, err
		}
	}
	return revision, nil
}

func (c *Control) read(ctx context.Context, revision int64, changed map[store.Kind][]string) (n *news, err error) {
	n = &news{revision: revision, changed: changed, hosts: map[string]store.Host{}, workloads: map[string]*assay.Workload{}, tokens: map[string]store.Token{}}
	has := func(k store.Kind) bool { return err == nil && len(changed[k]) > 0 }
	if has(store.OfHost) || has(store.OfWorkload) {
		var list []store.Host
		list, err = c.store.ListHosts(ctx)
		for _, h := range list {
			n.hosts[h.ID] = h
		}
	}
	if has(store.OfWorkload) {
		var list []assay.Workload
		list, err = c.store.WorkloadsByID(ctx, changed[store.OfWorkload]...)
		for i := range list {
			n.workloads[list[i].ID] = &list[i]
		}
	}
	if has(store.OfClaim) {
		n.claims, err = c.store.ListClaims(ctx)
	}
	if has(store.OfToken) {
		var list []store.Token
		list, err = c.store.ListTokens(ctx)
		for _, t := range list {
			n.tokens[t.ID] = t
		}
	}
	if has(store.OfVIP) {
		n.vips, err = c.store.ListVIPs(ctx)
	}
	if has(store.OfCertificate) {
		n.certs, err = c.store.CertificatesBySerial(ctx, changed[store.OfCertificate]...)
	}
	if has(store.OfFinding) {
		n.findings, err = c.store.FindingsByID(ctx, changed[store.OfFinding]...)
	}
	if has(store.OfAudit) {
		ids := changed[store.OfAudit]
		n.audit, err = c.store.AuditByID(ctx, ids[max(0, len(ids)-keptAudit):]...)
	}
	return n, err
}

// hear takes in what was read.
func (m *model) hear(n *news) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, id := range n.changed[store.OfHost] {
		if h, ok := n.hosts[id]; !ok {
			m.removeHostLocked(id)
		} else {
			m.hearHost(h)
		}
	}
	m.hearWorkloads(n.changed[store.OfWorkload], n.workloads)
	m.hearClaims(n)
	for _, id := range n.changed[store.OfToken] {
		if t, ok := n.tokens[id]; ok {
			m.tokens[id] = t
		} else {
			delete(m.tokens, id)
		}
	}
	for _, key := range n.changed[store.OfVIP] {
		if number, ok := n.vips[key]; ok {
			m.vips[key] = number
		} else if delete(m.vips, key); m.snapshot.has("service/" + key) {
			m.number(key, true) // another did not know that it is still there
		}
	}
	for _, cert := range n.certs {
		if !slices.ContainsFunc(m.certs[cert.Subject], func(o store.Certificate) bool { return o.Serial == cert.Serial }) {
			m.issuedLocked(cert)
		}
	}
	for i := range n.findings {
		m.hearFinding(&n.findings[i])
	}
	m.audit = append(m.audit, n.audit...)
	if over := len(m.audit) - keptAudit; over > 0 {
		m.audit = slices.Delete(m.audit, 0, over)
	}
	if m.revision = n.revision; len(n.changed) > 0 {
		m.publish()
	}
}

// hearHost takes in a host. What was not heard of one while its stream was here, because this
// control knew best, is read when it has gone to another.
func (m *model) hearHost(h store.Host) {
	known := m.hosts[h.ID]
	if known == nil {
		known = &host{away: m.now()}
		m.hosts[h.ID] = known
	}
	if s := known.session; s != nil {
		if h.Replica == m.me || !s.attached {
			known.Replica = h.Replica // until this control's word is stored
			return
		}
		s.cancel(errReplaced)
		delete(m.sessions, s)
		m.stopWaiting(h.ID)
		known.session = nil
		m.moved = append(m.moved, h.ID)
	}
	if h.Replica != known.Replica {
		known.since = time.Now()
	}
	if !h.Joined.Equal(known.Joined) {
		known.left = false // it is another node of that name
	}
	h.Ready = known.Ready
	if m.cluster != nil {
		n := m.cluster.nodes[h.Node]
		h.Zone, h.Addrs = n.Zone, n.Addrs
	}
	known.Host = h
	m.settle(known)
	m.publishHost(known)
}

// settle follows whether a host has a stream, here or elsewhere.
func (m *model) settle(h *host) {
	present := h.session != nil || m.me != "" && h.Replica != "" && h.Replica != m.me && !m.dead[h.Replica]
	if present == h.present {
		return
	}
	if h.since = time.Now(); m.heard.IsZero() {
		h.since = time.Time{} // it is being loaded, with what was stored
	}
	h.present, h.Ready = present, present
	if present && h.lost {
		h.lost = false
		m.catalog.SetHostLost(h.ID, false)
	}
	if !present {
		h.away = m.now()
		if m.cluster != nil && m.cluster.told {
			for _, id := range m.workloadsOf(h.ID) {
				m.suspect(id) // whoever had its stream may have missed something at the end
			}
		}
	}
	m.publishHost(h)
}

// elsewhere reports whether another control has a host's stream, and looks after it.
func (h *host) elsewhere() bool { return h.present && h.session == nil }

// setDead follows which controls show no life, and returns those that are new to that.
func (m *model) setDead(dead map[string]bool) map[string]bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	fresh := maps.Clone(dead)
	maps.DeleteFunc(fresh, func(id string, _ bool) bool { return m.dead[id] })
	if maps.Equal(dead, m.dead) {
		return nil
	}
	m.dead = dead
	for _, h := range m.hosts {
		m.settle(h)
	}
	m.publish()
	return fresh
}

// speakers returns the other controls that are said to have the streams of hosts.
func (m *model) speakers() map[string]bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := map[string]bool{}
	for _, h := range m.hosts {
		if h.Replica != "" && h.Replica != m.me {
			out[h.Replica] = true
		}
	}
	return out
}

// forget takes in that a control was removed from the store.
func (m *model) forget(replica string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, h := range m.hosts {
		if h.Replica == replica {
			h.Replica = ""
			m.settle(h)
		}
	}
	m.publish()
}

// hearWorkloads takes in the workloads that others have stored or removed.
func (m *model) hearWorkloads(ids []string, stored map[string]*assay.Workload) {
	for _, id := range ids {
		w, ok := m.catalog.Workload(id)
		if stored[id] != nil || !ok {
			continue
		}
		if h := m.hosts[w.Host]; h != nil && h.session != nil {
			m.behind.workload(id, w) // its host says that it is there
			continue
		}
		m.removeWorkload(id)
	}
	for _, id := range ids {
		w := stored[id]
		if w == nil {
			continue
		}
		h := m.hosts[w.Host]
		if h == nil {
			continue // removed since
		}
		if s := h.session; s != nil {
			if _, known := m.catalog.Workload(id); known {
				continue
			}
			if s.synced {
				m.behind.gone(id, h.ID) // stored by the control that had the host before
				continue
			}
		}
		if err := m.forged(h, w); err != nil {
			m.contradict(h, w, err)
			continue
		}
		m.evict(w)
		m.setWorkload(w)
		m.disclaimPod(id)
	}
}

// evict removes what this control thought has the addresses of a stored workload: the store
// has taken one of them, and takes no other.
func (m *model) evict(w *assay.Workload) {
	for _, a := range w.Addrs {
		owner, taken := m.owner[a]
		if !taken || owner == w.ID {
			continue
		}
		if o, ok := m.catalog.Workload(owner); ok {
			m.contradicted(o, store.AddressTaken{Addr: a, Owner: w.ID})
		}
		m.lost = append(m.lost, owner)
	}
}

// rereadMoved takes in all workloads of the hosts that went from this control to another.
func (c *Control) rereadMoved(ctx context.Context) error {
	m := c.model
	for {
		m.mu.Lock()
		if len(m.moved) == 0 {
			m.mu.Unlock()
			return nil
		}
		host := m.moved[0]
		m.mu.Unlock()
		list, err := c.store.ListWorkloads(ctx, host)
		if err != nil {
			return err
		}
		m.reread(host, list)
	}
}

// reread takes in all workloads of a host, the first of those that moved.
func (m *model) reread(host string, list []assay.Workload) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.moved = m.moved[1:]
	stored := map[string]*assay.Workload{}
	for i := range list {
		stored[list[i].ID] = &list[i]
	}
	ids := slices.Collect(maps.Keys(stored))
	for _, id := range m.workloadsOf(host) {
		if stored[id] == nil {
			ids = append(ids, id)
		}
	}
	m.hearWorkloads(ids, stored)
	m.publish()
}

// rejected takes in what the store did not take, because it says otherwise.
func (m *model) rejected(list []store.Rejected) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, r := range list {
		w, ok := m.catalog.Workload(r.ID)
		if m.behind.waits(r.ID) {
			continue // there is newer word
		}
		if r.Cause == nil || !ok {
			m.lost = append(m.lost, r.ID)
			continue
		}
		m.contradicted(w, r.Cause)
		if _, taken := errors.AsType[store.AddressTaken](r.Cause); !taken {
			m.lost = append(m.lost, r.ID)
		}
	}
	m.publish()
}

// contradicted withdraws a workload that the store says cannot be. If its host has its stream
// here it is taken when what contradicts it has gone.
func (m *model) contradicted(w *assay.Workload, cause error) {
	m.removeWorkload(w.ID)
	h := m.hosts[w.Host]
	if h == nil || h.session == nil {
		return
	}
	m.findingLocked(assay.Finding{Kind: "workload-withdrawn", Subject: w.ID, Detail: cut(fmt.Sprintf("host %s: %v, which another control has taken", w.Host, cause), 1000),
		Remedy: "if that lasts, look at the two hosts"})
	if h.Node == "" {
		m.refuse(h.session, w.ID, &assay.Error{Kind: assay.Conflict, Op: "take workload " + w.ID, Err: cause, Remedy: "report that one gone first"})
		return
	}
	m.claim(h, h.session, w.ID)
	m.wait(h.session, w, tooEarly{cause})
}

// takeLost returns the workloads of which the store has to be asked again.
func (m *model) takeLost() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := m.lost
	m.lost = nil
	return list
}

func (m *model) putLost(ids []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lost = append(m.lost, ids...)
}

// hearClaims takes in which pods may be meshed that nobody has taken.
func (m *model) hearClaims(n *news) {
	if m.cluster == nil {
		return
	}
	for _, pod := range n.changed[store.OfClaim] {
		mine, claimed := m.cluster.claims[pod]
		host, stored := n.claims[pod]
		switch {
		case claimed && mine.session != nil:
		case stored:
			m.cluster.claims[pod] = claim{host: host, stored: true}
			m.catalog.SetClaimed(pod, true)
		case claimed && mine.stored:
			delete(m.cluster.claims, pod)
			m.catalog.SetClaimed(pod, m.injected(pod))
		}
	}
}

// hearFinding takes in a finding that another control has made, or made again.
func (m *model) hearFinding(f *store.Finding) {
	i := slices.IndexFunc(m.findings, func(o store.Finding) bool {
		return o.Workload == f.Workload && o.Kind == f.Kind && o.Subject == f.Subject
	})
	n := *f
	m.found++
	if i >= 0 {
		n.Count = max(n.Count, m.findings[i].Count)
		m.findings = slices.Delete(m.findings, i, i+1)
	}
	m.findings = append(m.findings, n)
	if over := len(m.findings) - keptFindings; over > 0 {
		m.findings = slices.Delete(m.findings, 0, over)
	}
}
