package agent

import (
	"bufio"
	"context"
	"errors"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"assay.dev"
)

// metricsFresh is how long a scrape waits for proxies to count: one that does not
// answer is shown as it was.
const metricsFresh = 300 * time.Millisecond

// serveMetrics serves Prometheus text of all workloads of the host on /metrics, until
// ctx ends.
func (a *Agent) serveMetrics(ctx context.Context) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", a.scrape)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10}
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		end, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if server.Shutdown(end) != nil {
			server.Close()
		}
	})
	err := server.Serve(a.cfg.Metrics)
	if !stop() {
		<-done
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return &assay.Error{Op: "serve metrics", Err: err}
}

func (a *Agent) scrape(out http.ResponseWriter, r *http.Request) {
	list := a.all()
	var g sync.WaitGroup
	for _, w := range list {
		g.Go(func() { w.freshReport(r.Context(), metricsFresh) })
		g.Go(func() { w.countBeside(metricsFresh) })
	}
	g.Wait()
	out.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	b := bufio.NewWriter(out)
	defer b.Flush()
	a.mu.Lock()
	connected, version, workloads := a.connected, a.snapshot.version, len(list)
	dropped := a.outbox.droppedFindings()
	a.mu.Unlock()
	h := hostMetrics{connected: connected, version: version, workloads: workloads, dropped: dropped, unlogged: a.unlogged.Load(), untraced: a.untraced.Load()}
	if a.cfg.Pods != nil {
		h.unmeshed = a.cfg.Pods.Unmeshed()
	}
	h.lingering = a.lingering()
	h.converged = a.converge.histogram()
	writeMetrics(b, h, list)
}

func (o *outbox) droppedFindings() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.dropped
}

type hostMetrics struct {
	connected bool
	version   uint64
	workloads int
	dropped   int
	unlogged  uint64
	untraced  uint64
	unmeshed  []Unmeshed
	lingering *lingering
	converged assay.Latency
}

// source is one workload's part of the metrics.
type source struct {
	labels   string // workload, namespace and service, rendered
	signals  []assay.Signals
	counters assay.Counters
	notAfter time.Time
	beside   []assay.Signals // what passes beside the proxy
	balance  *assay.Balance
	older    int // connections older than the capture
	proxies  []proxyState
}

// proxyState is one of a workload's proxies.
type proxyState struct {
	labels string
	until  time.Time // of the drain
	open   int64     // connections
}

func writeMetrics(out io.Writer, h hostMetrics, list []*workload) {
	var sources []source
	for _, w := range list {
		n := w.noun()
		w.mu.Lock()
		s := source{counters: w.counters(), notAfter: w.notAfter, proxies: w.proxyStates()}
		if w.report != nil {
			s.signals = w.report.Signals
		}
		w.mu.Unlock()
		s.labels = labels("workload", n.ID, "namespace", n.Namespace, "name", n.Name)
		s.beside, s.balance = w.exceptions()
		s.older = w.olderLeft()
		sources = append(sources, s)
	}
	p := &page{out: out}
	p.family("assay_control_connected", "gauge", "Whether the stream to control is up.")
	p.sample("assay_control_connected", "", boolean(h.connected))
	p.family("assay_snapshot_version", "gauge", "Version of control's snapshot on this host.")
	p.sample("assay_snapshot_version", "", float64(h.version))
	p.family("assay_proxy_convergence_seconds", "histogram", "From the arrival of control's changes on this host to a proxy that uses them, by proxy.")
	p.histogram("assay_proxy_convergence_seconds", "", &h.converged)
	p.family("assay_workloads", "gauge", "Workloads of this host.")
	p.sample("assay_workloads", "", float64(h.workloads))
	p.family("assay_findings_dropped_total", "counter", "Findings that control was never told.")
	p.sample("assay_findings_dropped_total", "", float64(h.dropped))
	p.family("assay_access_log_dropped_total", "counter", "Requests that the access log lacks: too many at once, or the disk.")
	p.sample("assay_access_log_dropped_total", "", float64(h.unlogged))
	p.family("assay_spans_dropped_total", "counter", "Spans that the collector lacks.")
	p.sample("assay_spans_dropped_total", "", float64(h.untraced))
	p.family("assay_pod_unmeshed", "gauge", "1 for a pod that is labelled to be meshed and cannot be, by the reason.")
	for _, u := range h.unmeshed {
		p.sample("assay_pod_unmeshed", labels("namespace", u.Namespace, "pod", u.Name, "reason", u.Reason), 1)
	}

	if l := h.lingering; l != nil {
		p.family("assay_leaving_pods", "gauge", "While the mesh is taken out: pods that are not yet as far as that stage.")
		p.sample("assay_leaving_pods", labels("stage", "serve"), float64(l.serve))
		p.sample("assay_leaving_pods", labels("stage", "dial"), float64(l.dial))
		p.sample("assay_leaving_pods", labels("stage", "release"), float64(l.release))
	}
	p.family("assay_proxy_connections", "gauge", "Connections of each proxy process; one that was upgraded drains.")
	for _, s := range sources {
		for _, x := range s.proxies {
			p.sample("assay_proxy_connections", s.labels+","+x.labels, float64(x.open))
		}
	}
	p.family("assay_proxy_drain_deadline_seconds", "gauge", "When a draining proxy ends, Unix time.")
	for _, s := range sources {
		for _, x := range s.proxies {
			if !x.until.IsZero() {
				p.sample("assay_proxy_drain_deadline_seconds", s.labels+","+x.labels, float64(x.until.Unix()))
			}
		}
	}

	type value struct {
		name, kind, help string
		of               func(*assay.Signals) float64
	}
	for _, v := range []value{
		{"assay_requests_total", "counter", "HTTP exchanges, or opaque connections ended.", func(s *assay.Signals) float64 { return float64(s.Requests) }},
		{"assay_failures_total", "counter", "Requests that failed: 5xx, resets, refusals.", func(s *assay.Signals) float64 { return float64(s.Failures) }},
		{"assay_connections_total", "counter", "Connections or streams begun.", func(s *assay.Signals) float64 { return float64(s.Opened) }},
		{"assay_connections_open", "gauge", "Connections now.", func(s *assay.Signals) float64 { return float64(s.Open) }},
		{"assay_requests_in_flight", "gauge", "Requests now.", func(s *assay.Signals) float64 { return float64(s.InFlight) }},
	} {
		p.family(v.name, v.kind, v.help)
		for _, src := range sources {
			for i := range src.signals {
				p.sample(v.name, join(src.labels, signalLabels(&src.signals[i].SignalKey)), v.of(&src.signals[i]))
			}
		}
	}
	p.family("assay_grpc_calls_total", "counter", "gRPC calls by the status that they ended with.")
	for _, src := range sources {
		for i := range src.signals {
			s := &src.signals[i]
			for _, status := range slices.Sorted(maps.Keys(s.GRPC)) {
				p.sample("assay_grpc_calls_total", join(join(src.labels, signalLabels(&s.SignalKey)), labels("status", status)), float64(s.GRPC[status]))
			}
		}
	}
	p.family("assay_grpc_messages_total", "counter", "gRPC messages from the peer (in) and to it (out).")
	for _, src := range sources {
		for i := range src.signals {
			if s := &src.signals[i]; s.GRPC != nil {
				l := join(src.labels, signalLabels(&s.SignalKey))
				p.sample("assay_grpc_messages_total", join(l, labels("way", "in")), float64(s.MessagesIn))
				p.sample("assay_grpc_messages_total", join(l, labels("way", "out")), float64(s.MessagesOut))
			}
		}
	}
	p.family("assay_bytes_total", "counter", "Bytes from the peer (in) and to it (out).")
	for _, src := range sources {
		for i := range src.signals {
			s := &src.signals[i]
			l := join(src.labels, signalLabels(&s.SignalKey))
			p.sample("assay_bytes_total", join(l, labels("way", "in")), float64(s.BytesIn))
			p.sample("assay_bytes_total", join(l, labels("way", "out")), float64(s.BytesOut))
		}
	}
	p.family("assay_request_duration_seconds", "histogram", "From the request's head to the response's end; the life of an opaque connection.")
	for _, src := range sources {
		for i := range src.signals {
			p.histogram("assay_request_duration_seconds", join(src.labels, signalLabels(&src.signals[i].SignalKey)), &src.signals[i].Latency)
		}
	}
	p.family("assay_tls_handshakes_total", "counter", "Mutual TLS handshakes completed.")
	for _, src := range sources {
		p.sample("assay_tls_handshakes_total", src.labels, float64(src.counters.Handshakes))
	}
	for _, c := range []struct {
		name, help, label string
		of                func(*assay.Counters) map[string]uint64
	}{
		{"assay_tls_handshake_failures_total", "Mutual TLS handshakes that failed.", "reason", func(c *assay.Counters) map[string]uint64 { return c.HandshakeFailures }},
		{"assay_detections_total", "Connections by what protocol detection found.", "outcome", func(c *assay.Counters) map[string]uint64 { return c.Detections }},
		{"assay_refusals_total", "Connections that were refused: by the proxy, or (kernel-…) by the kernel on its behalf.", "reason", func(c *assay.Counters) map[string]uint64 { return c.Refusals }},
	} {
		p.family(c.name, "counter", c.help)
		for _, src := range sources {
			m := c.of(&src.counters)
			for _, key := range slices.Sorted(maps.Keys(m)) {
				p.sample(c.name, join(src.labels, labels(c.label, key)), float64(m[key]))
			}
		}
	}
	writeBeside(p, sources)
	p.family("assay_decisions_total", "counter", "What was decided to protect a service, its clients and its workloads.")
	for _, src := range sources {
		for _, d := range src.counters.Decisions {
			p.sample("assay_decisions_total", join(src.labels, labels("service", d.Service, "decision", d.Decision)), float64(d.Count))
		}
	}
	p.family("assay_endpoints_unfit", "gauge", "Endpoints that this workload's proxy finds wanting; ejected ones are given nothing.")
	for _, src := range sources {
		type group struct {
			service string
			ejected bool
		}
		unfit := map[group]int{}
		for _, u := range src.counters.Unfit {
			if u.Addr != assay.WholeService {
				unfit[group{u.Service, u.Ejected}]++
			}
		}
		for _, g := range slices.SortedFunc(maps.Keys(unfit), func(a, b group) int {
			return strings.Compare(a.service+strconv.FormatBool(a.ejected), b.service+strconv.FormatBool(b.ejected))
		}) {
			p.sample("assay_endpoints_unfit", join(src.labels, labels("service", g.service, "ejected", strconv.FormatBool(g.ejected))), float64(unfit[g]))
		}
	}
	p.family("assay_circuit_open", "gauge", "1 for a service that this workload's proxy asks no more for a while.")
	for _, src := range sources {
		seen := map[string]bool{}
		for _, u := range src.counters.Unfit {
			if key := u.Service; u.Addr == assay.WholeService && !seen[key] {
				seen[key] = true
				p.sample("assay_circuit_open", join(src.labels, labels("service", key)), 1)
			}
		}
	}
	p.family("assay_certificate_expiry_timestamp_seconds", "gauge", "When the certificate that was issued last expires.")
	for _, src := range sources {
		if !src.notAfter.IsZero() {
			p.sample("assay_certificate_expiry_timestamp_seconds", src.labels, float64(src.notAfter.Unix()))
		}
	}
}

// writeBeside writes what passes beside the proxies and where the bytes of each link
// belong.
func writeBeside(p *page, sources []source) {
	p.family("assay_exception_packets_total", "counter", "Packets beside the proxy, from the peer (in) and to it (out), by reason.")
	for _, src := range sources {
		for i := range src.beside {
			s := &src.beside[i]
			l := join(src.labels, signalLabels(&s.SignalKey))
			p.sample("assay_exception_packets_total", join(l, labels("way", "in")), float64(s.PacketsIn))
			p.sample("assay_exception_packets_total", join(l, labels("way", "out")), float64(s.PacketsOut))
		}
	}
	p.family("assay_exception_bytes_total", "counter", "Bytes of frames beside the proxy, from the peer (in) and to it (out), by reason.")
	for _, src := range sources {
		for i := range src.beside {
			s := &src.beside[i]
			l := join(src.labels, signalLabels(&s.SignalKey))
			p.sample("assay_exception_bytes_total", join(l, labels("way", "in")), float64(s.BytesIn))
			p.sample("assay_exception_bytes_total", join(l, labels("way", "out")), float64(s.BytesOut))
		}
	}
	p.family("assay_older_connections", "gauge", "Connections that are older than the capture, beside the proxy.")
	for _, src := range sources {
		p.sample("assay_older_connections", src.labels, float64(src.older))
	}
	ways := func(visit func(src *source, way string, w *assay.BalanceWay)) {
		for i := range sources {
			if b := sources[i].balance; b != nil {
				visit(&sources[i], "in", &b.In)
				visit(&sources[i], "out", &b.Out)
			}
		}
	}
	p.family("assay_link_bytes_total", "counter", "Bytes of frames on the workload's link, by where they belong: all of them, the proxy's, exceptions, control traffic by name.")
	ways(func(src *source, way string, w *assay.BalanceWay) {
		of := func(part string, c assay.FrameCount) {
			p.sample("assay_link_bytes_total", join(src.labels, labels("way", way, "part", part)), float64(c.Bytes))
		}
		of("all", w.Link)
		of("proxy", w.Proxy)
		of("exceptions", w.Exceptions)
		for _, name := range slices.Sorted(maps.Keys(w.Control)) {
			of(name, w.Control[name])
		}
	})
	p.family("assay_link_unexplained_bytes", "gauge", "Bytes that passed the link and that no rule counted.")
	ways(func(src *source, way string, w *assay.BalanceWay) {
		p.sample("assay_link_unexplained_bytes", join(src.labels, labels("way", way)), float64(w.Unexplained))
	})
}

// signalLabels are those of one series. Their number is bounded by the proxy.
func signalLabels(k *assay.SignalKey) string {
	return labels("direction", string(k.Direction), "peer", k.Peer.String(), "peer_artifacts", string(k.PeerArtifacts), "service", k.Service,
		"port", strconv.Itoa(int(k.Port)), "protocol", string(k.Protocol), "security", string(k.Security), "reason", k.Reason, "remote", k.Remote)
}

// labels renders pairs as the text format wants them; empty values are left out,
// which means the same.
func labels(pairs ...string) string {
	var b strings.Builder
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] == "" || pairs[i] == "port" && pairs[i+1] == "0" {
			continue
		}
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(pairs[i])
		b.WriteString(`="`)
		b.WriteString(escape.Replace(pairs[i+1]))
		b.WriteByte('"')
	}
	return b.String()
}

var escape = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

func join(a, b string) string {
	if a == "" || b == "" {
		return a + b
	}
	return a + "," + b
}

func boolean(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// page writes the text format, version 0.0.4. An error of the reader's connection
// shows in the bufio.Writer below.
type page struct{ out io.Writer }

func (p *page) family(name, kind, help string) {
	io.WriteString(p.out, "# HELP "+name+" "+help+"\n# TYPE "+name+" "+kind+"\n")
}

func (p *page) sample(name, labels string, v float64) {
	if labels != "" {
		name += "{" + labels + "}"
	}
	io.WriteString(p.out, name+" "+strconv.FormatFloat(v, 'g', -1, 64)+"\n")
}

func (p *page) histogram(name, labels string, l *assay.Latency) {
	var sum uint64
	for i := range l.Buckets {
		sum += l.Buckets[i]
		bound := "+Inf"
		if i < assay.LatencyBuckets-1 {
			if l.Buckets[i] == 0 && i%4 != 0 {
				continue // cumulative: what is left out is known from its neighbours
			}
			bound = strconv.FormatFloat(assay.LatencyBound(i).Seconds(), 'g', -1, 64)
		}
		p.sample(name+"_bucket", join(labels, `le="`+bound+`"`), float64(sum))
	}
	p.sample(name+"_sum", labels, l.Sum.Seconds())
	p.sample(name+"_count", labels, float64(sum))
}

// proxyStates describes the workload's proxies; mu is held.
func (w *workload) proxyStates() (list []proxyState) {
	for _, g := range w.living() {
		state := "current"
		switch {
		case g == w.next:
			state = "starting"
		case g != w.current:
			state = "draining"
		}
		s := proxyState{labels: labels("pid", strconv.Itoa(g.proc.PID()), "state", state, "digest", g.exe.Short()), until: g.until}
		if g.report != nil {
			for i := range g.report.Signals {
				s.open += g.report.Signals[i].Open
			}
		}
		list = append(list, s)
	}
	return list
}
