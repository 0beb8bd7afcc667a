package control

import (
	"crypto/subtle"
	"slices"

	"assay.dev"
	"assay.dev/store"
)

// What is remembered for people and for checks: findings, the audit trail, certificates, tokens.

// findingLocked records something that a person should look at.
func (m *model) findingLocked(f assay.Finding) {
	if f.Time.IsZero() {
		f.Time = m.now()
	}
	m.behind.finding(f)
	m.found++
	i := slices.IndexFunc(m.findings, func(o store.Finding) bool {
		return o.Workload == f.Workload && o.Kind == f.Kind && o.Subject == f.Subject
	})
	n := store.Finding{Finding: f, First: f.Time, Count: 1}
	if i >= 0 {
		n.First, n.Count = m.findings[i].First, m.findings[i].Count+1
		m.findings = slices.Delete(m.findings, i, i+1)
	}
	m.findings = append(m.findings, n)
	if over := len(m.findings) - keptFindings; over > 0 {
		m.findings = slices.Delete(m.findings, 0, over)
	}
}

// audited adds a line to what List shows.
func (m *model) audited(a store.Audit) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.audit = append(m.audit, a)
	if over := len(m.audit) - keptAudit; over > 0 {
		m.audit = slices.Delete(m.audit, 0, over)
	}
}

// issued keeps a certificate in the inventory and has it stored behind.
func (m *model) issued(c store.Certificate) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.issuedLocked(c)
	m.behind.certificate(c)
}

func (m *model) issuedLocked(c store.Certificate) {
	list := m.certs[c.Subject]
	if len(list) > 0 { // pods of a service have one identity, and mostly one image: its text is kept once
		last := &list[len(list)-1]
		c.Subject = last.Subject
		share(&c.Issuer, last.Issuer)
		share(&c.Artifacts, last.Artifacts)
	}
	m.certs[c.Subject] = append(list, c)
}

// share has s use the memory of like, if they are the same text.
func share[T ~string](s *T, like T) {
	if *s == like {
		*s = like
	}
}

// current returns the newest certificate of a workload, or of a host's subject.
func (m *model) current(subject, workload string) (store.Certificate, bool) {
	var newest store.Certificate
	for _, c := range m.certs[subject] {
		if c.Workload == workload && (newest.Serial == "" || newest.IssuedAt.Before(c.IssuedAt)) {
			newest = c
		}
	}
	return newest, newest.Serial != ""
}

// consumed takes a token as the store has it.
func (m *model) consumed(t store.Token) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tokens[t.ID] = t
}

// knowsToken reports whether there is a token with this ID and hash.
func (m *model) knowsToken(id string, hash []byte) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	t, ok := m.tokens[id]
	return ok && subtle.ConstantTimeCompare(t.Hash, hash) == 1
}

// tokenOf returns the ID of the token with which a host joined.
func (m *model) tokenOf(host string) (string, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, t := range m.tokens {
		if t.Consumer == host {
			return id, true
		}
	}
	return "", false
}
