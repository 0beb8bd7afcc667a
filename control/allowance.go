package control

import (
	"fmt"
	"slices"
	"time"

	"assay.dev"
	"assay.dev/store"
)

// A pod that is a host is whoever wrote its specification. What it makes control keep is bounded,
// so that it takes nothing from others: certificates, which are kept until they end and stored for
// months, and findings.
const (
	// podCertificates is for a start, with a certificate for each container that starts, and what
	// restarts beside that; renewals take a few in a day.
	podCertificates     = 40
	podCertificateEvery = time.Minute
	podFindings         = 20 // also those that are kept of one pod
	podFindingEvery     = 10 * time.Second
)

// allowance is what one may take: at most so many at once, and after that one in each interval. The
// zero value is a full one.
type allowance struct {
	used float64
	last time.Time
}

func (a *allowance) take(now time.Time, most int, every time.Duration) bool {
	a.used = max(0, a.used-max(0, float64(now.Sub(a.last))/float64(every)))
	a.last = now
	if a.used+1 > float64(most) {
		return false
	}
	a.used++
	return true
}

// mayCertify counts a certificate that a host is about to get, for itself or its workload.
func (m *model) mayCertify(op, id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	h := m.hosts[id]
	if h == nil || h.Pod == "" || h.certificates.take(m.now(), podCertificates, podCertificateEvery) {
		return nil
	}
	return &assay.Error{Kind: assay.Unavailable, Op: op, Err: fmt.Errorf("pod %s has asked for more than %d certificates, and gets one a minute", h.Name, podCertificates), Remedy: "try again in a minute"}
}

// findingBy records what a call of a host has brought.
func (m *model) findingBy(host string, f assay.Finding) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.findingOf(m.hosts[host], f)
}

// findingOf records what a host's word, or its mistake, is about: that of a pod is about that pod,
// and of one pod there are only so many.
func (m *model) findingOf(h *host, f assay.Finding) {
	if h == nil || h.Pod == "" {
		m.findingLocked(f)
		return
	}
	if !h.findings.take(m.now(), podFindings, podFindingEvery) {
		return
	}
	f.Workload = h.Pod
	same := func(o store.Finding) bool {
		return o.Workload == f.Workload && o.Kind == f.Kind && o.Subject == f.Subject
	}
	if !slices.ContainsFunc(m.findings, same) {
		m.forgetFinding(h.Pod)
	}
	m.findingLocked(f)
}

// forgetFinding makes room among the findings about a pod.
func (m *model) forgetFinding(uid string) {
	oldest, n := -1, 0
	for i := range m.findings {
		if m.findings[i].Workload == uid {
			if n++; oldest < 0 {
				oldest = i
			}
		}
	}
	if n >= podFindings {
		m.findings = slices.Delete(m.findings, oldest, oldest+1)
	}
}
