package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"time"
)

// results are what a run has found. Times are microseconds, memory is bytes.
type results struct {
	Time       time.Time           `json:"time"`
	Machine    string              `json:"machine"`
	Repeats    int                 `json:"repeats"`
	Seconds    float64             `json:"secondsPerLoad"`
	Contenders []string            `json:"contenders"`
	Small      map[string][]point  `json:"small"` // 50 bytes, by contender, in the order of Concurrency
	Bulk       map[string]point    `json:"bulk"`  // 1 MiB, four connections
	Churn      map[string]point    `json:"churn"` // a connection for each request, sixteen at a time
	Wire       map[string][]point  `json:"wire"`  // HTTP/2, gRPC, opaque TCP: by contender, in the order of WireNames
	WireNames  []string            `json:"wireNames"`
	PerIdle    map[string]float64  `json:"perIdleConnection"` // bytes of the pair, at rest
	Idle       map[string]memory   `json:"idle"`              // the pair before any request
	After      map[string]memory   `json:"after"`             // the pair after all of them
	Mesh       map[string]float64  `json:"mesh,omitempty"`
	Took       float64             `json:"seconds"`
	samples    map[string][]sample // by contender and point
}

// point is the median of the samples of one point.
type point struct {
	Concurrency  int     `json:"concurrency"`
	CPU          float64 `json:"cpuPerRequest"`
	CPUPerMB     float64 `json:"cpuMillisPerMB"`
	RequestsPerS float64 `json:"requestsPerSecond"`
	BytesPerS    float64 `json:"bytesPerSecond"`
	P50          float64 `json:"p50"`
	P99          float64 `json:"p99"`
	P999         float64 `json:"p999"`
	Memory       memory  `json:"memory"`
	Sockets      int     `json:"sockets"`
	Errors       int     `json:"errors"`
}

func newResults(o options) *results {
	return &results{
		Time: time.Now().UTC(), Machine: machine(), Repeats: o.repeats, Seconds: o.duration.Seconds(),
		Small: map[string][]point{}, Bulk: map[string]point{}, Churn: map[string]point{}, Wire: map[string][]point{},
		PerIdle: map[string]float64{}, Idle: map[string]memory{}, After: map[string]memory{}, Mesh: map[string]float64{},
		samples: map[string][]sample{},
	}
}

func machine() string {
	release, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return fmt.Sprintf("%d CPUs, Linux %s, %s", runtime.NumCPU(), string(release[:max(0, len(release)-1)]), runtime.Version())
}

func (r *results) add(contender, point string, s sample) {
	if !slices.Contains(r.Contenders, contender) {
		r.Contenders = append(r.Contenders, contender)
	}
	key := contender + " " + point
	r.samples[key] = append(r.samples[key], s)
}

func (r *results) small(contender string, c int, s sample) {
	r.add(contender, fmt.Sprint("small ", c), s)
}
func (r *results) bulk(contender string, s sample)  { r.add(contender, "bulk", s) }
func (r *results) churn(contender string, s sample) { r.add(contender, "churn", s) }

// finish takes the medians.
func (r *results) finish() {
	slices.SortFunc(r.Contenders, func(a, b string) int { return rank(a) - rank(b) })
	for _, name := range r.Contenders {
		for _, c := range concurrency {
			r.Small[name] = append(r.Small[name], r.median(name, fmt.Sprint("small ", c), c))
		}
		r.Bulk[name] = r.median(name, "bulk", bulkConcurrency)
		r.Churn[name] = r.median(name, "churn", 16)
		for _, p := range wirePoints {
			r.Wire[name] = append(r.Wire[name], r.median(name, p.name(), p.conns*p.streams))
		}
	}
	for _, p := range wirePoints {
		r.WireNames = append(r.WireNames, p.name())
	}
	r.Took = time.Since(r.Time).Seconds()
}

func rank(name string) int {
	return slices.Index([]string{"direct", "nginx", "haproxy", "assay"}, name)
}

func (r *results) median(contender, which string, c int) point {
	list := r.samples[contender+" "+which]
	of := func(value func(sample) float64) float64 {
		if len(list) == 0 {
			return 0
		}
		v := make([]float64, len(list))
		for i, s := range list {
			v[i] = value(s)
		}
		slices.Sort(v)
		n := len(v)
		return (v[(n-1)/2] + v[n/2]) / 2
	}
	p := point{
		Concurrency:  c,
		CPU:          of(func(s sample) float64 { return s.CPU }),
		CPUPerMB:     of(func(s sample) float64 { return s.PerMB }),
		RequestsPerS: of(func(s sample) float64 { return s.Requests }),
		BytesPerS:    of(func(s sample) float64 { return s.Bytes }),
		P50:          of(func(s sample) float64 { return s.P50 }),
		P99:          of(func(s sample) float64 { return s.P99 }),
		P999:         of(func(s sample) float64 { return s.P999 }),
		Sockets:      int(of(func(s sample) float64 { return float64(s.Sockets) })),
		Memory: memory{
			RSS:       int64(of(func(s sample) float64 { return float64(s.Memory.RSS) })),
			PSS:       int64(of(func(s sample) float64 { return float64(s.Memory.PSS) })),
			Anonymous: int64(of(func(s sample) float64 { return float64(s.Memory.Anonymous) })),
		},
	}
	for _, s := range list {
		p.Errors += s.Errors
	}
	return p
}

func (r *results) writeJSON(file string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o644)
}

// markdown prints the tables. A number in parentheses is the ratio to nginx's.
func (r *results) markdown(w io.Writer) {
	fmt.Fprintf(w, "Two proxies with mutual TLS 1.3 between them; %s; %s; median of %d, %gs each, in turn; (ratio to nginx).\n\n",
		r.Time.Format(time.DateOnly), r.Machine, r.Repeats, r.Seconds)
	fmt.Fprint(w, "| 50-byte answers | c | CPU us/request | requests/s | p50 us | p99 us | p99.9 us | RSS MB | PSS MB | sockets | errors |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for i, c := range concurrency {
		for _, name := range r.Contenders {
			p, n := r.Small[name][i], r.nginx(i)
			if p.RequestsPerS == 0 {
				continue
			}
			fmt.Fprintf(w, "| %s | %d | %s | %s | %s | %s | %s | %s | %.1f | %d | %d |\n", name, c,
				ratio("%.1f", p.CPU, n.CPU), ratio("%.0f", p.RequestsPerS, n.RequestsPerS), ratio("%.0f", p.P50, n.P50), ratio("%.0f", p.P99, n.P99), ratio("%.0f", p.P999, n.P999),
				ratio("%.1f", mb(p.Memory.RSS), mb(n.Memory.RSS)), mb(p.Memory.PSS), p.Sockets, p.Errors)
		}
	}
	fmt.Fprint(w, "\n| 1 MiB bodies, c=4 | GB/s | CPU ms/MB | p99 us | RSS MB | errors |\n|---|--:|--:|--:|--:|--:|\n")
	for _, name := range r.Contenders {
		p, n := r.Bulk[name], r.Bulk["nginx"]
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s | %d |\n", name, ratio("%.2f", p.BytesPerS/1e9, n.BytesPerS/1e9),
			ratio("%.2f", p.CPUPerMB, n.CPUPerMB), ratio("%.0f", p.P99, n.P99), ratio("%.1f", mb(p.Memory.RSS), mb(n.Memory.RSS)), p.Errors)
	}
	fmt.Fprint(w, "\n| a connection for each request, c=16 | connections/s | CPU us/connection | p50 us | p99 us | errors |\n|---|--:|--:|--:|--:|--:|\n")
	for _, name := range r.Contenders {
		p, n := r.Churn[name], r.Churn["nginx"]
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s | %d |\n", name, ratio("%.0f", p.RequestsPerS, n.RequestsPerS),
			ratio("%.1f", p.CPU, n.CPU), ratio("%.0f", p.P50, n.P50), ratio("%.0f", p.P99, n.P99), p.Errors)
	}
	for i, p := range wirePoints {
		if r.measured(i) {
			r.wireTable(w, i, p)
		}
	}
	fmt.Fprint(w, "\n| both proxies | RSS idle MB | PSS idle MB | anonymous idle MB | RSS after MB | anonymous after MB | KB for an idle connection |\n|---|--:|--:|--:|--:|--:|--:|\n")
	for _, name := range r.Contenders {
		if name != "direct" {
			a, b := r.Idle[name], r.After[name]
			fmt.Fprintf(w, "| %s | %.1f | %.1f | %.1f | %.1f | %.1f | %.1f |\n", name, mb(a.RSS), mb(a.PSS), mb(a.Anonymous), mb(b.RSS), mb(b.Anonymous), r.PerIdle[name]/(1<<10))
		}
	}
	if goals := r.goals(); len(goals) > 0 {
		fmt.Fprintf(w, "\n| assay | goal | measured | met |\n|---|--:|--:|---|\n")
		for _, g := range goals {
			fmt.Fprintf(w, "| %s | %s %g %s | %.2f %s | %v |\n", g.what, g.sign(), g.most, g.unit, g.got, g.unit, g.met())
		}
	}
	fmt.Fprint(w, "\nNot compared: Envoy, linkerd2-proxy, ztunnel (no package has them).\n")
	fmt.Fprintf(w, "\nThe run took %.0f s.\n", r.Took)
}

// measured reports whether anybody has the wire point i.
func (r *results) measured(i int) bool {
	return slices.ContainsFunc(r.Contenders, func(name string) bool { return r.Wire[name][i].RequestsPerS > 0 })
}

// wireTable writes the table of the wire point i. Ratios are to HAProxy where there is no
// nginx.
func (r *results) wireTable(w io.Writer, i int, p wirePoint) {
	base := r.wire("nginx", i)
	if base.RequestsPerS == 0 {
		base = r.wire("haproxy", i)
	}
	what, cpu := "requests/s", "CPU us/request"
	if p.mode != "" {
		what, cpu = "messages/s", "CPU us/message"
	}
	fmt.Fprintf(w, "\n| %s | %s | %s | GB/s | CPU ms/MB | p50 us | p99 us | p99.9 us | RSS MB | sockets | errors |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n", p.title, cpu, what)
	for _, name := range r.Contenders {
		if q := r.wire(name, i); q.RequestsPerS > 0 {
			fmt.Fprintf(w, "| %s | %s | %s | %s | %s | %s | %s | %s | %s | %d | %d |\n", name,
				ratio("%.1f", q.CPU, base.CPU), ratio("%.0f", q.RequestsPerS, base.RequestsPerS), ratio("%.2f", q.BytesPerS/1e9, 0), ratio("%.2f", q.CPUPerMB, 0),
				ratio("%.0f", q.P50, base.P50), ratio("%.0f", q.P99, base.P99), ratio("%.0f", q.P999, base.P999), ratio("%.1f", mb(q.Memory.RSS), mb(base.Memory.RSS)), q.Sockets, q.Errors)
		}
	}
}

// wire returns what a contender has of the wire point i.
func (r *results) wire(name string, i int) point {
	if list := r.Wire[name]; i < len(list) {
		return list[i]
	}
	return point{}
}

func (r *results) nginx(i int) point {
	if list := r.Small["nginx"]; i < len(list) {
		return list[i]
	}
	return point{}
}

func mb(b int64) float64 { return float64(b) / (1 << 20) }

func ratio(format string, v, base float64) string {
	s := fmt.Sprintf(format, v)
	if base > 0 && v > 0 {
		s += fmt.Sprintf(" (%.2f)", v/base)
	}
	return s
}
