package control

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/api"
	"google.golang.org/grpc"
)

const (
	tapRate   = 100 // of one proxy per second, when the caller says nothing
	tapLife   = time.Hour
	tapQueue  = 1024 // records that wait for a caller
	maxReveal = 16
)

// taps are the taps that operators hold open; the model's lock guards them.
type taps struct {
	version uint64
	list    []*openTap
}

type openTap struct {
	watch   assay.Watch
	records chan []byte
	dropped uint64
}

// message is what hosts are told.
func (t *taps) message() *api.Watches {
	m := &api.Watches{}
	for _, one := range t.list {
		b, err := json.Marshal(one.watch)
		if err == nil {
			m.Json = append(m.Json, b)
		}
	}
	return m
}

// Tap shows an operator the requests of a service as they end. That it was called is
// recorded when it begins, with what was asked for: it may last.
func (c *Control) Tap(req *api.TapRequest, stream grpc.ServerStreamingServer[api.TapEvent]) error {
	ctx := stream.Context()
	k := callOf(ctx)
	var w assay.Watch
	err := json.Unmarshal(req.GetWatch(), &w)
	if err == nil {
		k.subject = cut(string(req.GetWatch()), 1000)
		err = c.checkTap(&w)
	}
	if err != nil {
		err = &assay.Error{Kind: assay.Invalid, Op: "tap " + w.Service, Err: err}
		c.record(k, err)
		return err
	}
	t := &openTap{watch: w, records: make(chan []byte, tapQueue)}
	if err := c.model.openTap(t); err != nil {
		c.record(k, err)
		return err
	}
	defer c.model.closeTap(t)
	c.record(k, nil)
	if k.role != replica {
		elsewhere, cancel := context.WithCancel(ctx)
		var asked sync.WaitGroup
		asked.Go(func() { c.tapElsewhere(elsewhere, req.GetWatch(), t) })
		defer asked.Wait()
		defer cancel()
	}
	end := time.NewTimer(time.Until(w.Until))
	defer end.Stop()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		var e api.TapEvent
		select {
		case <-ctx.Done():
			return nil
		case <-end.C:
			return &assay.Error{Kind: assay.Unavailable, Op: "tap " + w.Service, Err: fmt.Errorf("a tap lasts %s", tapLife), Remedy: "tap again"}
		case e.Record = <-t.records:
		case <-tick.C:
		}
		if e.Dropped = c.model.droppedBy(t); e.Record == nil && e.Dropped == 0 {
			continue
		}
		if err := stream.Send(&e); err != nil {
			return err
		}
	}
}

// checkTap bounds what a caller asks for.
func (c *Control) checkTap(w *assay.Watch) error {
	namespace, name, ok := strings.Cut(w.Service, "/")
	if !ok || !assay.ValidName(namespace) || !assay.ValidName(name) {
		return errors.New("want a service as NAMESPACE/NAME")
	}
	if !c.model.hasService(w.Service) {
		return fmt.Errorf("there is no service %s", w.Service)
	}
	switch {
	case w.Direction != assay.Inbound && w.Direction != assay.Outbound:
		return fmt.Errorf("direction %q, want inbound or outbound", w.Direction)
	case len(w.Method) > 64 || len(w.Path) > assay.MaxRecordText || len(w.Reveal) > maxReveal:
		return errors.New("a filter is too long")
	case w.MinStatus < 0 || w.MaxStatus < w.MinStatus || w.MaxStatus > 999:
		return fmt.Errorf("status %d to %d", w.MinStatus, w.MaxStatus)
	case w.Rate < 0 || w.Rate > assay.MaxWatchRate:
		return fmt.Errorf("%d requests per second, at most %d", w.Rate, assay.MaxWatchRate)
	}
	if w.Rate == 0 {
		w.Rate = tapRate
	}
	w.ID, w.Share, w.Traced = "tap-"+strings.ToLower(rand.Text()), 0, false
	w.Until = c.now().Add(tapLife)
	return nil
}

func (m *model) hasService(key string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.snapshot.has("service/" + key)
}

func (m *model) openTap(t *openTap) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.taps.list) >= assay.MaxWatches {
		return &assay.Error{Kind: assay.Unavailable, Op: "tap " + t.watch.Service, Err: fmt.Errorf("%d taps are open", len(m.taps.list)), Remedy: "end one; assay get audit tells whose they are"}
	}
	m.taps.list = append(slices.Clone(m.taps.list), t)
	m.tapsChanged()
	return nil
}

func (m *model) closeTap(t *openTap) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.taps.list = slices.DeleteFunc(slices.Clone(m.taps.list), func(x *openTap) bool { return x == t })
	m.tapsChanged()
}

func (m *model) tapsChanged() {
	m.taps.version++
	for s := range m.sessions {
		s.wake()
	}
}

func (m *model) droppedBy(t *openTap) (n uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	n, t.dropped = t.dropped, 0
	return n
}

// seen takes in what a host's proxies saw. Records are read before the lock is taken: a
// host may send many. A caller who does not keep up is told how much it missed.
func (m *model) seen(s *session, records *api.Records) {
	type of struct {
		Workload string   `json:"workload"`
		Watches  []string `json:"watches"`
	}
	list := make([]of, len(records.GetJson()))
	for i, raw := range records.GetJson() {
		if json.Unmarshal(raw, &list[i]) != nil {
			list[i] = of{}
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, raw := range records.GetJson() {
		r := &list[i]
		if w, ok := m.catalog.Workload(r.Workload); !ok || w.Host != s.host {
			continue
		}
		for _, t := range m.taps.list {
			if !slices.Contains(r.Watches, t.watch.ID) {
				continue
			}
			select {
			case t.records <- raw:
			default:
				t.dropped++
			}
		}
	}
	for _, t := range m.taps.list {
		t.dropped += records.GetDropped()[t.watch.ID]
	}
}
