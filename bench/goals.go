package main

import "fmt"

// goal is what the project has promised of itself.
type goal struct {
	what      string
	most, got float64 // or least, when more is better
	unit      string
	more      bool
}

func (g goal) met() bool { return g.more && g.got >= g.most || !g.more && g.got <= g.most }

func (g goal) sign() string {
	if g.more {
		return ">="
	}
	return "<="
}

// goals are held against the results; there are none when Assay did not run, and none
// against nginx when that did not.
func (r *results) goals() []goal {
	assay := r.Small["assay"]
	if len(r.Mesh) == 0 || len(assay) < len(concurrency) {
		return nil
	}
	most := func(what string, most, got float64, unit string) goal { return goal{what, most, got, unit, false} }
	list := []goal{
		most("`assay up` until it is ready", 3, r.Mesh["upReadySeconds"], "s"),
		most("`assay up`, idle, RSS", 120, r.Mesh["upIdleRSS"]/(1<<20), "MB"),
		most("`assay run` until the command runs, meshed", 1, r.Mesh["runSeconds"], "s"),
		most("one idle proxy, RSS", 10, r.Mesh["proxyIdleRSS"]/(1<<20), "MB"),
		most("one idle proxy, anonymous", 3, r.Mesh["proxyIdleAnonymous"]/(1<<20), "MB"),
	}
	if v := r.PerIdle["assay"]; v > 0 {
		list = append(list, most("an idle connection, both proxies", 16, v/(1<<10), "KB"))
	}
	for i, g := range []struct{ cpu, p50, p99 float64 }{{0.9, 1.05, 1.05}, {0.7, 0.85, 0.85}, {0.55, 0.7, 0.7}, {0.5, 0.7, 0.7}} {
		a, n, c := assay[i], r.nginx(i), concurrency[i]
		if a.CPU > 0 && n.CPU > 0 {
			list = append(list,
				most(fmt.Sprintf("CPU per request at c=%d", c), g.cpu, a.CPU/n.CPU, "x nginx"),
				most(fmt.Sprintf("p50 at c=%d", c), g.p50, a.P50/n.P50, "x nginx"),
				most(fmt.Sprintf("p99 at c=%d", c), g.p99, a.P99/n.P99, "x nginx"))
		}
	}
	if a := assay[len(concurrency)-1]; a.CPU > 0 {
		list = append(list, most("sockets between the proxies at c=1000", 8, float64(a.Sockets), ""),
			most("both proxies at c=1000, RSS", 40, mb(a.Memory.RSS), "MB"),
			most("both proxies at c=1000, pages that both have counted once", 40, mb(a.Memory.PSS), "MB"))
	}
	if a, n := r.Bulk["assay"], r.Bulk["nginx"]; a.CPU > 0 && n.CPU > 0 {
		list = append(list, goal{"bulk throughput", 1.2, a.BytesPerS / n.BytesPerS, "x nginx", true},
			most("CPU per MB of bulk", 0.85, a.CPUPerMB/n.CPUPerMB, "x nginx"))
	}
	if a, n := r.Churn["assay"], r.Churn["nginx"]; a.CPU > 0 && n.CPU > 0 {
		list = append(list, goal{"connections per second, one for each request of HTTP", 2, a.RequestsPerS / n.RequestsPerS, "x nginx", true})
	}
	for i, p := range wirePoints {
		if a, n := r.wire("assay", i), r.wire("nginx", i); p.mode == "churn" && a.CPU > 0 && n.CPU > 0 {
			list = append(list, goal{"connections per second, opaque", 2, a.RequestsPerS / n.RequestsPerS, "x nginx", true})
		}
		if a, h := r.wire("assay", i), r.wire("haproxy", i); p.kind == kindGRPC && p.conns*p.streams == 64 && a.CPU > 0 && h.CPU > 0 {
			list = append(list, most("CPU: "+p.title, 0.7, a.CPU/h.CPU, "x HAProxy"))
		}
	}
	return list
}
