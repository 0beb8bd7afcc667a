package agent

import (
	"context"
	"reflect"
	"slices"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/link"
)

// A proxy is asked for its counts every second while they change, and less often
// while they do not: an idle one should sleep.
const (
	pollFast = time.Second
	pollSlow = 4 * time.Second
)

// pollReports keeps the workload's report fresh.
func (w *workload) pollReports(ctx context.Context) {
	wait := pollFast
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		before := w.lastReport()
		w.freshReport(ctx, time.Second)
		wait = min(2*wait, pollSlow)
		if w.lastReport() != before {
			wait = pollFast
		}
	}
}

func (w *workload) lastReport() *link.Report {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.report
}

// freshReport asks the proxy and waits for its answer, at most d.
func (w *workload) freshReport(ctx context.Context, d time.Duration) {
	w.mu.Lock()
	s := w.session
	w.mu.Unlock()
	if s == nil {
		return
	}
	answered := make(chan struct{})
	s.mu.Lock()
	s.asked++
	id := s.asked
	s.waiting[id] = answered
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.waiting, id)
		s.mu.Unlock()
	}()
	if s.conn.Send(link.KindReportNow, id, nil) != nil {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-answered:
	case <-t.C:
	case <-ctx.Done():
	}
}

// reported takes in a report. One that says nothing new is forgotten.
func (s *session) reported(id uint64, r *link.Report) {
	w := s.w
	w.mu.Lock()
	news := w.report == nil || !reflect.DeepEqual(w.report, r)
	if news {
		w.report = r
	}
	w.mu.Unlock()
	if news {
		w.a.outbox.report(w.id)
	}
	s.mu.Lock()
	if answered, ok := s.waiting[id]; ok {
		close(answered)
		delete(s.waiting, id)
	}
	s.mu.Unlock()
}

// settleReport takes the last numbers of a workload whose command has ended. Its
// connections end a moment later, and are counted when they do: that moment is waited
// for, since a short life is otherwise never told.
func (w *workload) settleReport() {
	const most = 250 * time.Millisecond
	ctx, cancel := context.WithTimeout(context.Background(), most)
	defer cancel()
	for ctx.Err() == nil {
		w.freshReport(ctx, most)
		r := w.lastReport()
		if r == nil || !slices.ContainsFunc(r.Signals, func(s assay.Signals) bool { return s.Open > 0 || s.InFlight > 0 }) {
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// reportMessage is the newest report for control, nil when there is none.
func (w *workload) reportMessage() *api.WorkloadReport {
	r := w.lastReport()
	if r == nil {
		return nil
	}
	return api.FromReport(&api.Report{Workload: w.id, Started: r.Started, Signals: r.Signals, Counters: r.Counters})
}
