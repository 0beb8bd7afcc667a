package control

import (
	"maps"
	"slices"
	"time"

	"assay.dev"
	"assay.dev/api"
)

// report is the latest numbers of a workload and who it was when it sent them. In a mesh with
// traffic each workload sends one a second, and somebody asks now and then: it stays as
// it came until then, which is a tenth of the memory and most of the work.
type report struct {
	encoded  []byte // an api.WorkloadReport
	workload *assay.Workload
	received time.Time
	gone     time.Time // when the workload went; zero while it is there
}

// counts are a report that was read.
type counts struct {
	api.Report
	workload       *assay.Workload
	received, gone time.Time
}

// counts reads the reports one after the other, in the order of the workloads' IDs. The model
// is held only to find them. One that cannot be read is forgotten, with a finding.
func (m *model) counts(yield func(*counts) bool) {
	m.mu.Lock()
	list := make([]report, 0, len(m.reports))
	for _, id := range slices.Sorted(maps.Keys(m.reports)) {
		list = append(list, *m.reports[id])
	}
	m.mu.Unlock()
	for i := range list {
		r := &list[i]
		read, err := api.ReadReport(r.encoded)
		if err != nil {
			m.forgetReport(r, err)
			continue
		}
		if !r.gone.IsZero() {
			// Nothing is open any more, whatever it said last.
			for i := range read.Signals {
				read.Signals[i].Open, read.Signals[i].InFlight = 0, 0
			}
		}
		if !yield(&counts{read, r.workload, r.received, r.gone}) {
			return
		}
	}
}

// forgetReport drops what cannot be read, unless a newer one has come.
func (m *model) forgetReport(r *report, cause error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if now := m.reports[r.workload.ID]; now == nil || !now.received.Equal(r.received) {
		return
	}
	delete(m.reports, r.workload.ID)
	m.findingOf(m.hosts[r.workload.Host], assay.Finding{Workload: r.workload.ID, Kind: "report-unreadable", Subject: "host " + r.workload.Host, Detail: cut(cause.Error(), 1000),
		Remedy: "see that the host's agent is of a version that this control knows"})
}

func (m *model) forgetReports(now time.Time) {
	var gone []*report
	for id, r := range m.reports {
		switch {
		case r.gone.IsZero():
		case now.Sub(r.gone) >= rememberFor:
			delete(m.reports, id)
		default:
			gone = append(gone, r)
		}
	}
	if len(gone) > keptReports {
		slices.SortFunc(gone, func(a, b *report) int { return a.gone.Compare(b.gone) })
		for _, r := range gone[:len(gone)-keptReports] {
			delete(m.reports, r.workload.ID)
		}
	}
}
