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
	Idle       map[string]memory   `json:"idle"`  // the pair before any request
	After      map[string]memory   `json:"after"` // the pair after all of them
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
	Memory       memory  `json:"memory"`
	Sockets      int     `json:"sockets"`
	Errors       int     `json:"errors"`
}

func newResults(o options) *results {
	return &results{
		Time: time.Now().UTC(), Machine: machine(), Repeats: o.repeats, Seconds: o.duration.Seconds(),
		Small: map[string][]point{}, Bulk: map[string]point{}, Churn: map[string]point{},
		Idle: map[string]memory{}, After: map[string]memory{}, Mesh: map[string]float64{},
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
	fmt.Fprint(w, "| 50-byte answers | c | CPU us/request | requests/s | p50 us | p99 us | RSS MB | PSS MB | sockets | errors |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	for i, c := range concurrency {
		for _, name := range r.Contenders {
			p, n := r.Small[name][i], r.nginx(i)
			fmt.Fprintf(w, "| %s | %d | %s | %s | %s | %s | %s | %.1f | %d | %d |\n", name, c,
				ratio("%.1f", p.CPU, n.CPU), ratio("%.0f", p.RequestsPerS, n.RequestsPerS), ratio("%.0f", p.P50, n.P50), ratio("%.0f", p.P99, n.P99),
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
	fmt.Fprint(w, "\n| both proxies | RSS idle MB | PSS idle MB | anonymous idle MB | RSS after MB | anonymous after MB |\n|---|--:|--:|--:|--:|--:|\n")
	for _, name := range r.Contenders {
		if name != "direct" {
			a, b := r.Idle[name], r.After[name]
			fmt.Fprintf(w, "| %s | %.1f | %.1f | %.1f | %.1f | %.1f |\n", name, mb(a.RSS), mb(a.PSS), mb(a.Anonymous), mb(b.RSS), mb(b.Anonymous))
		}
	}
	if goals := r.goals(); len(goals) > 0 {
		fmt.Fprintf(w, "\n| assay | goal | measured | met |\n|---|--:|--:|---|\n")
		for _, g := range goals {
			fmt.Fprintf(w, "| %s | <= %g %s | %.2f %s | %v |\n", g.what, g.most, g.unit, g.got, g.unit, g.met())
		}
	}
	fmt.Fprintf(w, "\nThe run took %.0f s.\n", r.Took)
}

// goal is what this release has promised of itself.
type goal struct {
	what      string
	most, got float64
	unit      string
}

func (g goal) met() bool { return g.got <= g.most }

// goals are held against the results; there are none when Assay or nginx did not run.
func (r *results) goals() []goal {
	const c64 = 2 // the index of 64 connections
	assay, nginx := r.Small["assay"], r.Small["nginx"]
	if len(r.Mesh) == 0 || len(assay) <= c64 {
		return nil
	}
	list := []goal{
		{"`assay up` until it is ready", 3, r.Mesh["upReadySeconds"], "s"},
		{"`assay up`, idle, RSS", 120, r.Mesh["upIdleRSS"] / (1 << 20), "MB"},
		{"`assay run` until the command runs, meshed", 1, r.Mesh["runSeconds"], "s"},
		{"one idle proxy, RSS", 10, r.Mesh["proxyIdleRSS"] / (1 << 20), "MB"},
		{"one idle proxy, anonymous", 4, r.Mesh["proxyIdleAnonymous"] / (1 << 20), "MB"},
	}
	if len(nginx) > c64 && nginx[c64].CPU > 0 {
		list = append(list, goal{"CPU per request at c=64", 0.9, assay[c64].CPU / nginx[c64].CPU, "x nginx"})
	}
	return list
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
