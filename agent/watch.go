package agent

import (
	"encoding/json"
	"reflect"
	"slices"
	"strings"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/link"
)

// Rates of the watches that a namespace's configuration makes, of each proxy.
const (
	logRate   = assay.MaxWatchRate
	traceRate = 200
)

// setTaps takes in the taps that operators hold open; nil for none.
func (a *Agent) setTaps(m *api.Watches) {
	var list []assay.Watch
	for _, raw := range m.GetJson() {
		var w assay.Watch
		if err := json.Unmarshal(raw, &w); err != nil || !strings.HasPrefix(w.ID, "tap-") || len(list) >= assay.MaxWatches {
			a.log.Error("control asks for a tap that cannot be read", "err", err)
			continue
		}
		w.Rate = min(w.Rate, assay.MaxWatchRate)
		list = append(list, w)
	}
	a.mu.Lock()
	same := len(a.taps) == 0 && len(list) == 0
	a.taps = list
	a.mu.Unlock()
	if same {
		return
	}
	for _, w := range a.all() {
		w.wakeSessions()
	}
}

// watches is what a workload's proxy is to watch for.
func (w *workload) watches(c assay.NamespaceConfig) []assay.Watch {
	w.a.mu.Lock()
	list := slices.Clone(w.a.taps)
	w.a.mu.Unlock()
	if c.AccessLog > 0 && w.a.cfg.AccessLog != nil {
		list = append(list, assay.Watch{ID: assay.WatchLog, Share: c.AccessLog, Rate: logRate})
	}
	if c.Traces && w.a.spans != nil {
		list = append(list, assay.Watch{ID: assay.WatchTrace, Traced: true, Rate: traceRate})
	}
	return list
}

func (s *session) updateWatches(v *view) error {
	list := s.w.watches(v.config(s.w.namespace()))
	if len(list) == 0 && len(s.watches) == 0 || reflect.DeepEqual(list, s.watches) {
		return nil
	}
	s.mu.Lock()
	s.watches = list
	s.mu.Unlock()
	return s.conn.Send(link.KindWatch, 0, link.Watch{List: list})
}

// records takes in what a proxy saw, to who asked for it.
func (s *session) records(m *link.Records) {
	w := s.w
	n := w.noun()
	s.mu.Lock()
	asked := s.watches
	s.mu.Unlock()
	var taps []assay.Record
	for i := range m.List {
		r := &m.List[i]
		if i == link.MaxRecords || !validRecord(r) {
			w.log.Error("the proxy tells of a request that cannot be", "request", r.Method)
			return
		}
		r.Workload, r.Identity = w.id, n.Identity
		r.Watches = slices.DeleteFunc(r.Watches, func(id string) bool {
			return !slices.ContainsFunc(asked, func(x assay.Watch) bool { return x.ID == id })
		})
		if slices.Contains(r.Watches, assay.WatchLog) && w.a.accessLog != nil {
			w.a.accessLog.add(r)
		}
		if slices.Contains(r.Watches, assay.WatchTrace) && w.a.spans != nil {
			w.a.spans.add(r, &n)
		}
		if slices.ContainsFunc(r.Watches, isTap) {
			taps = append(taps, *r)
		}
	}
	dropped := map[string]uint64{}
	for id, n := range m.Dropped {
		if isTap(id) && len(dropped) < assay.MaxWatches {
			dropped[id] = n
		}
	}
	if len(taps) > 0 || len(dropped) > 0 {
		w.a.outbox.seen(taps, dropped)
	}
	w.a.unlogged.Add(m.Dropped[assay.WatchLog])
	w.a.untraced.Add(m.Dropped[assay.WatchTrace])
}

func isTap(id string) bool { return strings.HasPrefix(id, "tap-") }

// validRecord holds a proxy to the bounds of a record.
func validRecord(r *assay.Record) bool {
	const more = assay.MaxRecordText + 64
	if len(r.Watches) > assay.MaxWatches+2 || len(r.Fields) > assay.MaxRecordField {
		return false
	}
	for _, s := range append([]string{r.Method, r.Authority, r.Path, r.Query, r.Service, r.Failure, r.Trace.Trace, r.Trace.Span,
		string(r.Direction), string(r.Protocol), string(r.Security), r.Peer.TrustDomain, r.Peer.Namespace, r.Peer.Account}, r.Watches...) {
		if len(s) > more {
			return false
		}
	}
	for _, f := range r.Fields {
		if len(f.Name) > more || len(f.Value) > more {
			return false
		}
	}
	return true
}
