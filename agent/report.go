package agent

import (
	"cmp"
	"context"
	"maps"
	"reflect"
	"slices"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/agent/capture"
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
		w.enforceDrain(time.Now())
		w.lookAtOlder(time.Now())
		before := w.lastReport()
		w.freshReport(ctx, time.Second)
		beside := w.countBeside(besideEvery)
		if beside {
			w.a.outbox.report(w.id)
		}
		wait = min(2*wait, pollSlow)
		if beside || w.lastReport() != before {
			wait = pollFast
		}
	}
}

func (w *workload) lastReport() *link.Report {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.report
}

// freshReport asks the kernel, and the proxies, and waits for their answers, at most d.
func (w *workload) freshReport(ctx context.Context, d time.Duration) {
	w.countRefused()
	var g sync.WaitGroup
	defer g.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, x := range w.living() {
		if s := x.session; s != nil {
			g.Go(func() { s.freshReport(ctx, d) })
		}
	}
}

func (s *session) freshReport(ctx context.Context, d time.Duration) {
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
	news := s.g.report == nil || !reflect.DeepEqual(s.g.report, r)
	if news {
		s.g.report = r
		w.report = w.wholeReport()
	}
	w.counted = time.Now()
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

// Reasons of refusals that the kernel makes by the capture's rules, beside those of the
// proxy: package capture counts them.
const (
	refusedNoProxy    = "kernel-no-proxy"
	refusedNoEndpoint = "kernel-no-endpoint"
	refusedStale      = "kernel-stale"
)

// countRefused takes in what the kernel has refused.
func (w *workload) countRefused() {
	refused, err := w.capture.Refused()
	if err != nil {
		w.log.Debug("what the kernel refuses is not counted", "err", err) // its namespace is going
		return
	}
	w.mu.Lock()
	news := w.kernel != refused && w.report != nil
	w.kernel = refused
	w.mu.Unlock()
	if news {
		w.a.outbox.report(w.id)
	}
}

// counters are the report's, with the kernel's refusals among them. w.mu is held.
func (w *workload) counters() assay.Counters {
	if w.report == nil {
		return withKernel(assay.Counters{}, w.kernel)
	}
	return withKernel(w.report.Counters, w.kernel)
}

// withKernel returns c with the kernel's refusals, whatever c said of them.
func withKernel(c assay.Counters, refused capture.Refused) assay.Counters {
	of := maps.Clone(c.Refusals)
	if of == nil {
		of = map[string]uint64{}
	}
	for reason, n := range map[string]uint64{refusedNoProxy: refused.NoProxy, refusedNoEndpoint: refused.NoEndpoint, refusedStale: refused.Stale} {
		if of[reason] = n; n == 0 {
			delete(of, reason)
		}
	}
	c.Refusals = of
	return c
}

// wholeReport is what all of the workload's proxies have counted, those that have
// ended too, so that counters only grow; mu is held.
func (w *workload) wholeReport() *link.Report {
	whole := w.past
	for _, g := range w.living() {
		if g.report != nil {
			whole = addReports(whole, g.report)
		}
	}
	return whole
}

// addReports adds two reports, either of which may be nil.
func addReports(a, b *link.Report) *link.Report {
	if a == nil || b == nil {
		return cmp.Or(a, b)
	}
	sum := &link.Report{Started: a.Started, Signals: slices.Clone(a.Signals), Counters: a.Counters.Plus(&b.Counters)}
	if b.Started.Before(a.Started) {
		sum.Started = b.Started
	}
	at := make(map[assay.SignalKey]int, len(sum.Signals))
	for i := range sum.Signals {
		at[sum.Signals[i].SignalKey] = i
	}
	for i := range b.Signals {
		s := &b.Signals[i]
		if j, ok := at[s.SignalKey]; ok {
			sum.Signals[j].Add(s)
		} else if len(sum.Signals) < link.MaxSignals {
			sum.Signals = append(sum.Signals, *s)
		}
	}
	return sum
}

// settled is the report of a proxy that has ended: nothing of it is open.
func settled(r *link.Report) *link.Report {
	out := *r
	out.Signals = slices.Clone(r.Signals)
	for i := range out.Signals {
		out.Signals[i].Open, out.Signals[i].InFlight = 0, 0
	}
	return &out
}

// settleReport takes the last numbers of a workload whose command has ended. Its
// connections end a moment later, and are counted when they do: that moment is waited
// for, since a short life is otherwise never told.
func (w *workload) settleReport() {
	const most = 250 * time.Millisecond
	ctx, cancel := context.WithTimeout(context.Background(), most)
	defer cancel()
	defer w.countBeside(0)
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

// reportMessage is the newest report for control, nil when there is none: what the
// proxy counted, and what the kernel counted beside it.
func (w *workload) reportMessage() *api.WorkloadReport {
	beside, balance := w.exceptions()
	w.mu.Lock()
	defer w.mu.Unlock()
	r := w.report
	switch {
	case r == nil && balance == nil:
		return nil
	case r == nil:
		r = &link.Report{Started: balance.Since}
	}
	return api.FromReport(&api.Report{Workload: w.id, Started: r.Started, Counted: w.counted, Signals: slices.Concat(r.Signals, beside), Counters: w.counters(), Balance: balance})
}
