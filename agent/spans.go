package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"assay.dev"
	common "go.opentelemetry.io/proto/otlp/common/v1"
	resources "go.opentelemetry.io/proto/otlp/resource/v1"
	trace "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// Spans go to a collector by OTLP over HTTP (OTLP 1.0, protobuf). A proxy's span is a
// child of the one that the request names; heads are carried as they are, so the
// application at the far end is a child of the same one.

const (
	maxSpans    = 4096 // that wait for the collector
	spansAtOnce = 512
	spansEvery  = time.Second
	spansWithin = 10 * time.Second
	spansTries  = 3
	spansLast   = time.Second // for what is left at the agent's end
)

// spans sends what add is given until its context ends.
type spans struct {
	url     string
	dropped *atomic.Uint64
	full    chan struct{}

	mu   sync.Mutex
	list []*trace.ResourceSpans
}

func newSpans(url string, dropped *atomic.Uint64) *spans {
	return &spans{url: strings.TrimSuffix(url, "/") + "/v1/traces", dropped: dropped, full: make(chan struct{}, 1)}
}

// add makes a span of a request.
func (s *spans) add(r *assay.Record, w *assay.Workload) {
	id, err := hex.DecodeString(r.Trace.Trace)
	parent, err2 := hex.DecodeString(r.Trace.Span)
	if err != nil || err2 != nil || len(id) != 16 || len(parent) != 8 {
		return
	}
	own := make([]byte, 8)
	rand.Read(own)
	span := &trace.Span{
		TraceId: id, SpanId: own, ParentSpanId: parent, Name: r.Method, Kind: trace.Span_SPAN_KIND_CLIENT, Flags: 1,
		StartTimeUnixNano: uint64(r.Time.UnixNano()), EndTimeUnixNano: uint64(r.Time.Add(r.Duration).UnixNano()),
		Attributes: []*common.KeyValue{
			text("http.request.method", r.Method), text("url.path", r.Path), text("server.address", r.Authority),
			text("network.protocol.name", "http"), number("http.response.status_code", int64(r.Status)),
			number("http.request.size", r.RequestBytes), number("http.response.size", r.ResponseBytes),
			text("assay.service", r.Service), text("assay.peer", r.Peer.String()), text("assay.security", string(r.Security)),
		},
	}
	if r.Direction == assay.Inbound {
		span.Kind = trace.Span_SPAN_KIND_SERVER
	}
	if g := r.GRPC; g != nil {
		span.Attributes = append(span.Attributes, text("rpc.system", "grpc"), number("rpc.grpc.status_code", int64(g.Code)))
	}
	if r.Failure != "" {
		span.Attributes = append(span.Attributes, text("error.type", r.Failure))
	}
	if r.Failure != "" || r.Status >= 500 || r.GRPC != nil && r.GRPC.Code != 0 {
		span.Status = &trace.Status{Code: trace.Status_STATUS_CODE_ERROR, Message: r.Failure}
	}
	one := &trace.ResourceSpans{
		Resource: &resources.Resource{Attributes: []*common.KeyValue{
			text("service.name", w.Name), text("service.namespace", w.Namespace), text("service.instance.id", w.ID), text("host.id", w.Host),
			text("assay.identity", w.Identity.String()),
		}},
		ScopeSpans: []*trace.ScopeSpans{{Scope: &common.InstrumentationScope{Name: "assay.dev/proxy"}, Spans: []*trace.Span{span}}},
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.list) >= maxSpans {
		s.dropped.Add(1)
		return
	}
	s.list = append(s.list, one)
	if len(s.list) >= spansAtOnce {
		select {
		case s.full <- struct{}{}:
		default:
		}
	}
}

func text(key, value string) *common.KeyValue {
	return &common.KeyValue{Key: key, Value: &common.AnyValue{Value: &common.AnyValue_StringValue{StringValue: value}}}
}

func number(key string, value int64) *common.KeyValue {
	return &common.KeyValue{Key: key, Value: &common.AnyValue{Value: &common.AnyValue_IntValue{IntValue: value}}}
}

// run sends spans until ctx ends, and then what is left, once.
func (s *spans) run(ctx context.Context, log func(msg string, args ...any)) {
	t := time.NewTicker(spansEvery)
	defer t.Stop()
	// A collector that hangs does not hold up the agent's end.
	sending, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(spansLast, cancel) })()
	failing := false
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-t.C:
		case <-s.full:
		}
		for {
			batch := s.take()
			if len(batch) == 0 {
				break
			}
			err := s.send(sending, batch)
			if err != nil {
				s.dropped.Add(uint64(len(batch)))
				if !failing {
					log("spans are lost", "err", err, "remedy", "see whether the collector of --otlp answers")
				}
			}
			failing = err != nil
		}
	}
}

func (s *spans) take() []*trace.ResourceSpans {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := min(len(s.list), spansAtOnce)
	batch := s.list[:n:n]
	if s.list = s.list[n:]; len(s.list) == 0 {
		s.list = nil
	}
	return batch
}

// send posts one batch. What a collector may take later is tried again.
func (s *spans) send(ctx context.Context, batch []*trace.ResourceSpans) error {
	body, err := proto.Marshal(&trace.TracesData{ResourceSpans: batch}) // an ExportTraceServiceRequest on the wire
	if err != nil {
		return err
	}
	for try := 1; ; try++ {
		wait, err := s.post(ctx, body)
		if err == nil || wait == 0 || try == spansTries {
			return err
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return err
		}
	}
}

func (s *spans) post(ctx context.Context, body []byte) (retry time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, spansWithin)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url, bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Content-Type", "application/x-protobuf")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return time.Second, err
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10))
	switch {
	case resp.StatusCode/100 == 2:
		return 0, nil
	case resp.StatusCode == 429, resp.StatusCode == 502, resp.StatusCode == 503, resp.StatusCode == 504:
		return time.Second, fmt.Errorf("%s: %s", s.url, resp.Status)
	}
	return 0, fmt.Errorf("%s: %s", s.url, resp.Status)
}
