package control

import (
	"slices"
	"time"

	"assay.dev"
)

// Services that follow from workloads, after the last of those has gone: their addresses
// stay theirs for a while.

// noteIdle keeps since when an implicit service has no workload.
func (m *model) noteIdle() {
	now := m.now()
	list := m.catalog.Remembered()
	changed := false
	for _, key := range list {
		if _, ok := m.idle[key]; !ok {
			m.idle[key] = now
			changed = true
		}
	}
	for key := range m.idle {
		if !slices.Contains(list, key) {
			delete(m.idle, key)
			changed = true
		}
	}
	if changed {
		m.behind.idle(m.idleServices())
	}
}

// idleService is how a remembered service is stored.
type idleService struct {
	Since time.Time    `json:"since"`
	Ports []assay.Port `json:"ports"`
}

func (m *model) idleServices() map[string]idleService {
	out := map[string]idleService{}
	for key, since := range m.idle {
		if r := m.snapshot.get("service/" + key); r != nil {
			if s, err := r.GetService().Noun(); err == nil {
				out[key] = idleService{since, s.Ports}
			}
		}
	}
	return out
}

// allocated takes the number of a service's virtual address.
func (m *model) allocated(key string, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.vips[key] = n
	m.publishSoon()
}

// released forgets a number; false when the service is there again.
func (m *model) released(key string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.snapshot.has("service/" + key) {
		return false
	}
	delete(m.vips, key)
	return true
}
