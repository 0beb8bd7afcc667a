package main

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"
)

const wrkOutput = `Running 2s test @ http://10.90.0.12:8081/
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.94ms  711.95us  15.43ms   86.31%
    Req/Sec    31.31k     1.50k   33.01k    80.00%
  Latency Distribution
     50%    1.94ms
     75%    2.15ms
     90%    2.50ms
     99%    5.77ms
  62632 requests in 2.00s, 15.11MB read
  Socket errors: connect 0, read 3, write 0, timeout 1
  Non-2xx or 3xx responses: 2
Requests/sec:  31316.00
Transfer/sec:      7.56MB
`

func TestParseWrk(t *testing.T) {
	var s sample
	requests, bytes, seconds := s.parse(newRun(context.Background(), false), wrkOutput)
	if requests != 62632 || seconds != 2 || bytes != 15.11*(1<<20) {
		t.Errorf("%v requests, %v bytes, %v s", requests, bytes, seconds)
	}
	if s.P50 != 1940 || s.P99 != 5770 || s.Errors != 6 {
		t.Errorf("p50 %v, p99 %v, %d errors", s.P50, s.P99, s.Errors)
	}
}

func TestReport(t *testing.T) {
	r := newResults(options{repeats: 3, duration: time.Second})
	for i := range 3 {
		for _, c := range concurrency {
			r.small("assay", c, sample{CPU: float64(10 + i), Requests: 100})
			r.small("nginx", c, sample{CPU: float64(20 + 10*i), Requests: 50})
		}
	}
	r.finish()
	if got := r.Small["assay"][0].CPU; got != 11 {
		t.Errorf("median %v, want 11", got)
	}
	var md bytes.Buffer
	r.markdown(&md)
	if want := "| assay | 64 | 11.0 (0.37) | 100 (2.00) |"; !strings.Contains(md.String(), want) {
		t.Errorf("no %q in\n%s", want, md.String())
	}
	if strings.Index(md.String(), "| nginx | 1 |") > strings.Index(md.String(), "| assay | 1 |") {
		t.Errorf("nginx should stand before assay")
	}
	if _, err := json.Marshal(r); err != nil {
		t.Error(err)
	}
}

// Whatever happens in a run, what was to be cleaned up is.
func TestRunCleansUp(t *testing.T) {
	for name, fn := range map[string]func(r *run){
		"success": func(*run) {},
		"fatal":   func(r *run) { r.Fatalf("over") },
		"skip":    func(r *run) { r.Skipf("not here") },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRun(context.Background(), false)
			var order []int
			err := r.do(func() {
				r.Cleanup(func() { order = append(order, 1) })
				r.Cleanup(func() { order = append(order, 2) })
				fn(r)
			})
			if len(order) != 2 || order[0] != 2 {
				t.Errorf("cleaned up in the order %v, want [2 1]", order)
			}
			if (err == nil) != (name == "success") {
				t.Errorf("%v", err)
			}
		})
	}
}
