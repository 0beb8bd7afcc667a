package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"assay.dev"
	"assay.dev/api"
)

func statCommand() *cobra.Command {
	var conn connection
	var namespace, output string
	var interval time.Duration
	var watch bool
	cmd := &cobra.Command{
		Use:   "stat [SERVICE]",
		Short: "Show the golden signals of services",
		Long: `Show the golden signals of services: success rate, requests per second, latency,
what is under way, bytes per second, and the share of connections under mutual TLS.

The numbers are those of the service's own proxies; where a service is outside the
mesh, those of its clients. They are of the last interval; --interval 0 shows totals
since the proxies started. Below are the decisions that protected services in that
time (docs/resilience.md names them), if there were any. For a protocol that the mesh carries as bytes a request
is a connection, and latency is how long it lasted. -o json is always totals.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := errors.Join(checkFormat(output, "table", "json"), checkInterval(interval)); err != nil {
				return err
			}
			name := ""
			if len(args) == 1 {
				var err error
				if namespace, name, err = splitName(namespace, args[0]); err != nil {
					return err
				}
			}
			o, err := conn.open(cmd.Context())
			if err != nil {
				return err
			}
			defer o.close()
			s := &signals{operator: o, namespace: namespace, service: name}
			if output == "json" {
				docs, _, err := s.sample(cmd.Context())
				if err != nil {
					return err
				}
				items, err := encode(docs)
				if err != nil {
					return err
				}
				return writeJSON(cmd.OutOrStdout(), items)
			}
			return s.show(cmd.Context(), cmd.OutOrStdout(), interval, watch)
		},
	}
	conn.flags(cmd)
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "of this namespace only")
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	cmd.Flags().DurationVar(&interval, "interval", time.Second, "what rates are measured over; 0 for totals")
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "go on until interrupted")
	return cmd
}

// signals reads the golden signals of some services.
type signals struct {
	*operator
	namespace, service string
}

// sample returns all workloads' numbers, with those series only that are asked for.
func (s *signals) sample(ctx context.Context) ([]api.SignalsView, time.Time, error) {
	docs, at, err := listAs[api.SignalsView](ctx, s.operator, "signals", "", "")
	if err != nil || s.namespace == "" && s.service == "" {
		return docs, at, err
	}
	for i, d := range docs {
		docs[i].Signals = slices.DeleteFunc(d.Signals, func(one assay.Signals) bool {
			namespace, name := subjectOf(d, one)
			return s.namespace != "" && namespace != s.namespace || s.service != "" && name != s.service
		})
	}
	return slices.DeleteFunc(docs, func(d api.SignalsView) bool { return len(d.Signals) == 0 }), at, nil
}

// show prints one table, or one after the other until the context ends.
func (s *signals) show(ctx context.Context, w io.Writer, interval time.Duration, watch bool) error {
	screen := newScreen(w)
	before, _, err := s.sample(ctx)
	if err != nil {
		return err
	}
	for {
		docs, base := before, []api.SignalsView(nil)
		if interval > 0 {
			if docs, err = s.newer(ctx, before, interval); err != nil {
				return ended(ctx, err)
			}
			base = before
		}
		var picture bytes.Buffer
		rows := statRows(base, docs)
		if len(rows) == 0 {
			fmt.Fprintln(&picture, "nothing has been counted yet")
		} else if err := writeTable(&picture, statColumns(interval == 0), rows, false, time.Time{}); err != nil {
			return err
		}
		if err := s.showDecisions(&picture, base, docs); err != nil {
			return err
		}
		if err := screen.draw(picture.Bytes()); err != nil || !watch {
			return err
		}
		if interval == 0 && !sleep(ctx, time.Second) {
			return nil
		}
		before = docs
		if interval == 0 {
			if before, _, err = s.sample(ctx); err != nil {
				return ended(ctx, err)
			}
		}
	}
}

// decisionRow is how often something was decided about a service's requests.
type decisionRow struct {
	service, decision string
	count             uint64
}

// showDecisions writes what docs have decided more than base, if anything. What protects
// a service where its clients are and where it is stands in one list.
func (s *signals) showDecisions(w io.Writer, base, docs []api.SignalsView) error {
	rows := decisionRows(base, docs, s.namespace, s.service)
	if len(rows) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	return writeTable(w, []column[decisionRow]{
		col("SERVICE", func(r decisionRow) string { return cmp.Or(r.service, outside) }),
		col("DECISION", func(r decisionRow) string { return r.decision }),
		col("COUNT", func(r decisionRow) string { return number(r.count) }),
	}, rows, false, time.Time{})
}

// decisionRows adds up what docs have decided more than base about the services that are
// asked for, an empty name being any.
func decisionRows(base, docs []api.SignalsView, namespace, service string) []decisionRow {
	type source struct {
		workload string
		started  time.Time
		decisionRow
	}
	was := map[source]uint64{}
	for _, d := range base {
		for _, one := range d.Counters.Decisions {
			was[source{d.Workload, d.Started, decisionRow{one.Service, one.Decision, 0}}] = one.Count
		}
	}
	total := map[decisionRow]uint64{}
	for _, d := range docs {
		for _, one := range d.Counters.Decisions {
			ns, name, _ := cutKey(one.Service)
			if namespace != "" && ns != namespace || service != "" && name != service {
				continue
			}
			key := decisionRow{one.Service, one.Decision, 0}
			if before := was[source{d.Workload, d.Started, key}]; one.Count > before {
				total[key] += one.Count - before
			}
		}
	}
	var rows []decisionRow
	for r, n := range total {
		r.count = n
		rows = append(rows, r)
	}
	slices.SortFunc(rows, func(a, b decisionRow) int {
		return cmp.Or(cmp.Compare(a.service, b.service), cmp.Compare(a.decision, b.decision))
	})
	return rows
}

// newer waits for an interval and then until every workload has reported since.
func (s *signals) newer(ctx context.Context, before []api.SignalsView, interval time.Duration) ([]api.SignalsView, error) {
	deadline := time.Now().Add(interval + 3*time.Second)
	wait := interval
	for {
		if !sleep(ctx, wait) {
			return nil, ctx.Err()
		}
		docs, _, err := s.sample(ctx)
		if err != nil {
			return nil, err
		}
		if time.Now().After(deadline) || allNewer(before, docs) {
			return docs, nil
		}
		wait = min(interval, 100*time.Millisecond)
	}
}

func allNewer(before, docs []api.SignalsView) bool {
	received := make(map[string]time.Time)
	for _, d := range before {
		received[d.Workload] = d.Received
	}
	for _, d := range docs {
		if was, ok := received[d.Workload]; ok && d.Gone.IsZero() && !d.Received.After(was) {
			return false
		}
	}
	return true
}

// ended makes an interruption a good end.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// sleep returns false when the context ends first.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// subjectOf returns whose signals these are: the service that was dialled, else
// the workload that was reached by its address, else the peer.
func subjectOf(d api.SignalsView, s assay.Signals) (namespace, name string) {
	switch {
	case s.Service == assay.Overflow:
		return "", assay.Overflow
	case s.Service != "":
		ns, name, _ := cutKey(s.Service)
		return ns, name
	case s.Direction == assay.Inbound:
		return d.Namespace, d.Name
	case !s.Peer.IsZero():
		return s.Peer.Namespace, s.Peer.Account
	}
	return "", outside
}

const outside = "(outside)"

// statRow is one line of the table: a service and a protocol.
type statRow struct {
	namespace, name string
	protocol        assay.Protocol
	inbound         bool // what its own proxies counted

	requests, failures float64 // per second, or totals
	in, out            float64 // bytes as the service sees them, likewise
	latency            assay.Latency
	open, inFlight     int64
	mtls, carried      uint64 // connections or requests since the proxies started
}

// statRows adds up what docs have more than before; with no before, everything.
func statRows(before, docs []api.SignalsView) []statRow {
	type series struct {
		workload string
		started  time.Time
		key      assay.SignalKey
	}
	type base struct {
		counts   assay.Signals
		received time.Time
	}
	bases := make(map[series]base)
	firsts := make(map[string]api.SignalsView)
	for _, d := range before {
		firsts[d.Workload] = d
		for _, s := range d.Signals {
			bases[series{d.Workload, d.Started, s.SignalKey}] = base{s, d.Received}
		}
	}
	type rowKey struct {
		namespace, name string
		protocol        assay.Protocol
		inbound         bool
	}
	rows := make(map[rowKey]*statRow)
	for _, d := range docs {
		// Seconds between the two counts of this workload; of a new proxy, its life.
		span, scale := counted(d).Sub(d.Started).Seconds(), 1.0
		if first, ok := firsts[d.Workload]; ok && first.Started.Equal(d.Started) {
			span = counted(d).Sub(counted(first)).Seconds()
		}
		if before != nil {
			scale = 0
			if span > 0 {
				scale = 1 / span
			}
		}
		for _, s := range d.Signals {
			namespace, name := subjectOf(d, s)
			key := rowKey{namespace, name, s.Protocol, s.Direction == assay.Inbound}
			r := rows[key]
			if r == nil {
				r = &statRow{namespace: namespace, name: name, protocol: s.Protocol, inbound: key.inbound}
				rows[key] = r
			}
			r.add(s, bases[series{d.Workload, d.Started, s.SignalKey}].counts, scale, d.Gone.IsZero())
		}
	}
	var out []statRow
	for key, r := range rows {
		if _, own := rows[rowKey{key.namespace, key.name, key.protocol, true}]; own && !key.inbound {
			continue
		}
		out = append(out, *r)
	}
	slices.SortFunc(out, func(a, b statRow) int {
		return cmp.Or(cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.name, b.name), cmp.Compare(a.protocol, b.protocol))
	})
	return out
}

// counted is when the numbers were: when control received them, if an older agent does
// not say.
func counted(d api.SignalsView) time.Time {
	if d.Counted.IsZero() {
		return d.Received
	}
	return d.Counted
}

func (r *statRow) add(s, base assay.Signals, scale float64, alive bool) {
	more := func(now, was uint64) float64 { return float64(now-min(was, now)) * scale }
	r.requests += more(s.Requests, base.Requests)
	r.failures += more(s.Failures, base.Failures)
	in, out := more(s.BytesIn, base.BytesIn), more(s.BytesOut, base.BytesOut)
	if s.Direction == assay.Outbound { // the client's view: what it receives, the service sent
		in, out = out, in
	}
	r.in, r.out = r.in+in, r.out+out
	for i := range s.Latency.Buckets {
		r.latency.Buckets[i] += s.Latency.Buckets[i] - min(base.Latency.Buckets[i], s.Latency.Buckets[i])
	}
	if alive {
		r.open += s.Open
		r.inFlight += s.InFlight
	}
	carried := max(s.Opened, s.Requests) // a server opens no connection for requests that share a peer's
	r.carried += carried
	if s.Security == assay.MutualTLS {
		r.mtls += carried
	}
}

func statColumns(totals bool) []column[statRow] {
	per := "/S"
	requests := col("RPS", func(r statRow) string { return rate(r.requests) })
	if totals {
		per = ""
		requests = col("REQUESTS", func(r statRow) string { return strconv.FormatFloat(r.requests, 'f', 0, 64) })
	}
	quantile := func(q float64) func(statRow) string {
		return func(r statRow) string { return latency(r.latency.Quantile(q)) }
	}
	return []column[statRow]{
		col("SERVICE", func(r statRow) string {
			if r.namespace == "" {
				return r.name
			}
			return r.namespace + "/" + r.name
		}),
		col("PROTOCOL", func(r statRow) string { return string(r.protocol) }),
		col("SUCCESS", func(r statRow) string { return percent(max(r.requests-r.failures, 0), r.requests) }),
		requests,
		col("P50", quantile(0.5)), col("P95", quantile(0.95)), col("P99", quantile(0.99)),
		col("IN FLIGHT", func(r statRow) string { return fmt.Sprint(r.inFlight) }),
		col("OPEN", func(r statRow) string { return fmt.Sprint(r.open) }),
		col("IN"+per, func(r statRow) string { return size(r.in) }),
		col("OUT"+per, func(r statRow) string { return size(r.out) }),
		col("MTLS", func(r statRow) string { return percent(float64(r.mtls), float64(r.carried)) }),
		col("COUNTED BY", func(r statRow) string {
			if r.inbound {
				return "service"
			}
			return "clients"
		}),
	}
}

// serviceTotals adds up a service's rows for describe.
func serviceTotals(docs []api.SignalsView, namespace, name string) []statRow {
	all := make(map[assay.Protocol]statRow)
	for _, r := range statRows(nil, docs) {
		if r.namespace == namespace && r.name == name {
			all[r.protocol] = r
		}
	}
	return slices.SortedFunc(maps.Values(all), func(a, b statRow) int { return cmp.Compare(a.protocol, b.protocol) })
}
