package proxy

import (
	"bytes"
	"context"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/link"
	"assay.dev/proxy/golden"
	"assay.dev/proxy/http1"
	"assay.dev/proxy/http2"
)

// Requests can be watched: for an access log, for traces, by somebody who taps a
// service. Without a watch a request pays one load of a pointer; with one, what is
// told is made here and sent to the agent by a goroutine of its own, which drops
// rather than waits. The agent does the rest: files and collectors are none of a
// proxy's business.

// maxRecords wait for the sender; sendRecords is how often it looks.
const (
	maxRecords  = 512
	sendRecords = 100 * time.Millisecond
)

// watches are those that are active. The list never changes.
type watches struct{ list []*watch }

type watch struct {
	assay.Watch
	path []byte

	mu      sync.Mutex
	left    float64 // of the rate
	filled  time.Time
	dropped uint64
}

// watcher keeps a proxy's watches and what they have seen.
type watcher struct {
	p     *Proxy
	ready chan struct{} // there is something to send

	mu      sync.Mutex
	records []assay.Record
}

func newWatcher(p *Proxy) *watcher { return &watcher{p: p, ready: make(chan struct{}, 1)} }

// set replaces the watches. One that stays keeps what is left of its rate.
func (w *watcher) set(list []assay.Watch) {
	if len(list) == 0 {
		w.p.watches.Store(nil)
		return
	}
	next := &watches{}
	old := w.p.watches.Load()
	for _, want := range list {
		one := &watch{Watch: want, path: []byte(want.Path), left: float64(want.Rate), filled: time.Now()}
		if old != nil {
			i := slices.IndexFunc(old.list, func(x *watch) bool { return x.ID == want.ID })
			if i >= 0 {
				was := old.list[i]
				was.mu.Lock()
				one.left, one.filled, one.dropped = min(was.left, float64(want.Rate)), was.filled, was.dropped
				was.mu.Unlock()
			}
		}
		next.list = append(next.list, one)
	}
	w.p.watches.Store(next)
}

// heard is a request's head, of either protocol.
type heard interface {
	// about returns method, authority, path and query.
	about() (method, authority, path, query []byte)
	field(name string) (string, bool)
	each(f func(name, value []byte) bool)
}

type heard1 struct {
	*http1.Request
	head http1.Head
}

func (h *heard1) about() (method, authority, path, query []byte) {
	path, query = h.Path()
	return h.Method, h.Authority, path, query
}

func (h *heard1) field(name string) (string, bool) {
	v, ok := h.head.Field(name, nil)
	return string(v), ok
}

func (h *heard1) each(f func(name, value []byte) bool) { h.head.Each(f) }

type heard2 struct{ *http2.Head }

func (h heard2) about() (method, authority, path, query []byte) {
	p, q, _ := strings.Cut(h.Path, "?")
	return []byte(h.Method), []byte(h.Authority), []byte(p), []byte(q)
}

func (h heard2) field(name string) (string, bool) { return h.Lookup(name) }

func (h heard2) each(f func(name, value []byte) bool) {
	for i := range h.Fields {
		if !f([]byte(h.Fields[i].Name), []byte(h.Fields[i].Value)) {
			return
		}
	}
}

// note1 and note2 note what is only known while the head is at hand.
func (ws *watches) note1(x *http1.Exchange, way assay.Direction, service string) {
	if req := x.Request; req != nil && len(req.Target) > 0 {
		if r := ws.note(&heard1{req, http1.NewHead(req.Head(), len(req.Head()))}, assay.HTTP1, way, service); r != nil {
			x.Note = r
		}
	}
}

func (ws *watches) note2(x *http2.Exchange, way assay.Direction, service string) {
	if x.Request != nil {
		if r := ws.note(heard2{x.Request}, assay.HTTP2, way, service); r != nil {
			x.Note = r
		}
	}
}

func (ws *watches) note(h heard, protocol assay.Protocol, way assay.Direction, service string) *assay.Record {
	method, authority, path, query := h.about()
	var r *assay.Record
	var trace assay.TraceContext
	looked := false
	for _, w := range ws.list {
		if w.Direction != "" && w.Direction != way || w.Service != "" && w.Service != service ||
			w.Method != "" && w.Method != string(method) || !bytes.HasPrefix(path, w.path) ||
			w.Share > 0 && rand.IntN(1_000_000) >= w.Share {
			continue
		}
		if !looked {
			looked = true
			if v, ok := h.field("traceparent"); ok {
				trace, _ = assay.ParseTraceParent(v) // what cannot be read is no context
			}
		}
		if w.Traced && !trace.Sampled {
			continue
		}
		if r == nil {
			r = &assay.Record{
				Time: time.Now(), Direction: way, Service: service, Protocol: protocol, Trace: trace,
				Method: cut(method), Authority: cut(authority), Path: cut(path),
			}
			if len(query) > 0 {
				r.Query = assay.Redacted
			}
		}
		r.Watches = append(r.Watches, w.ID)
		if len(query) > 0 && slices.Contains(w.Reveal, "query") {
			r.Query = cut(query)
		}
		if w.Fields {
			r.Fields = fieldsOf(h, w.Reveal)
		}
	}
	return r
}

// fieldsOf copies the fields of a head. Secrets are named, not told.
func fieldsOf(h heard, reveal []string) (list []assay.HeaderField) {
	h.each(func(name, value []byte) bool {
		f := assay.HeaderField{Name: cut(name), Value: cut(value)}
		if secret(f.Name) && !slices.ContainsFunc(reveal, func(s string) bool { return strings.EqualFold(s, f.Name) }) {
			f.Value = assay.Redacted
		}
		list = append(list, f)
		return len(list) < assay.MaxRecordField
	})
	return list
}

// secret reports whether a field's value lets somebody be somebody else.
func secret(name string) bool {
	name = strings.ToLower(name)
	switch name {
	case "cookie", "set-cookie", "referer": // a referer has a query too
		return true
	}
	for _, part := range []string{"auth", "token", "secret", "key", "session", "password", "credential", "signature"} {
		if strings.Contains(name, part) {
			return true
		}
	}
	return false
}

func cut(b []byte) string {
	return strings.ToValidUTF8(string(b[:min(len(b), assay.MaxRecordText)]), "?")
}

// end1 and end2 tell of a request that was noted.
func (w *watcher) end1(x *http1.Exchange, s *golden.Series, key assay.SignalKey) {
	r, _ := x.Note.(*assay.Record)
	x.Note = nil
	r.Duration, r.Status, r.Failure, r.RequestBytes, r.ResponseBytes = x.Duration, x.Status, x.Failure, x.RequestBytes, x.ResponseBytes
	w.end(r, s, key)
}

func (w *watcher) end2(x *http2.Exchange, s *golden.Series, key assay.SignalKey) {
	r, _ := x.Note.(*assay.Record)
	x.Note = nil
	r.Duration, r.Status, r.Failure, r.RequestBytes, r.ResponseBytes = x.Duration, x.Status, x.Failure, x.RequestBytes, x.ResponseBytes
	if x.GRPC {
		r.GRPC = &assay.GRPC{Code: x.Code, RequestMessages: x.RequestMessages, ResponseMessages: x.ResponseMessages}
	}
	w.end(r, s, key)
}

func (w *watcher) end(r *assay.Record, s *golden.Series, key assay.SignalKey) {
	if s != nil {
		key = s.Key()
	}
	r.Peer, r.Security, r.Port = key.Peer, key.Security, key.Port
	ws := w.p.watches.Load()
	if ws == nil {
		return
	}
	now := time.Now()
	r.Watches = slices.DeleteFunc(r.Watches, func(id string) bool {
		i := slices.IndexFunc(ws.list, func(one *watch) bool { return one.ID == id })
		return i < 0 || !ws.list[i].takes(r, now)
	})
	if len(r.Watches) == 0 {
		return
	}
	w.mu.Lock()
	full := len(w.records) >= maxRecords
	if !full {
		w.records = append(w.records, *r)
	}
	w.mu.Unlock()
	if full {
		for _, one := range ws.list {
			if slices.Contains(r.Watches, one.ID) {
				one.drop()
			}
		}
		return
	}
	select {
	case w.ready <- struct{}{}:
	default:
	}
}

func (w *watch) drop() {
	w.mu.Lock()
	w.dropped++
	w.mu.Unlock()
}

// takes decides by what is known at the end, and by the rate.
func (w *watch) takes(r *assay.Record, now time.Time) bool {
	if !w.Peer.IsZero() && r.Peer != w.Peer || (w.MinStatus != 0 || w.MaxStatus != 0) && (r.Status < w.MinStatus || r.Status > w.MaxStatus) ||
		!w.Until.IsZero() && now.After(w.Until) {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.left = min(float64(w.Rate), w.left+now.Sub(w.filled).Seconds()*float64(w.Rate))
	w.filled = now
	if w.left < 1 {
		w.dropped++
		return false
	}
	w.left--
	return true
}

// run sends what was seen until ctx ends.
func (w *watcher) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-w.ready:
		}
		for w.flush() {
		}
		select { // several in one message
		case <-ctx.Done():
			return
		case <-time.After(sendRecords):
		}
	}
}

// flush sends one message. It reports whether there is more.
func (w *watcher) flush() bool {
	w.mu.Lock()
	n := min(len(w.records), link.MaxRecords)
	m := link.Records{List: slices.Clone(w.records[:n])}
	w.records = append(w.records[:0], w.records[n:]...)
	more := len(w.records) > 0
	w.mu.Unlock()
	if ws := w.p.watches.Load(); ws != nil {
		for _, one := range ws.list {
			one.mu.Lock()
			if one.dropped > 0 {
				if m.Dropped == nil {
					m.Dropped = map[string]uint64{}
				}
				m.Dropped[one.ID], one.dropped = one.dropped, 0
			}
			one.mu.Unlock()
		}
	}
	if n > 0 || m.Dropped != nil {
		w.p.agent.send(link.KindRecords, 0, m) // without an agent nobody watches
	}
	return more
}
