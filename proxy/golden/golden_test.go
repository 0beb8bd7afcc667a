package golden

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"assay.dev"
)

func TestOverflowKeepsTotals(t *testing.T) {
	r := New(10)
	now := time.Now()
	for i := range 100 {
		s := r.Series(assay.SignalKey{Direction: assay.Outbound, Service: fmt.Sprintf("bank/s%d", i), Protocol: assay.HTTP1, Security: assay.MutualTLS})
		s.Opened(now)
		s.Begin()
		s.End(time.Millisecond, i%2 == 0, now)
		s.In(10)
		s.Closed()
	}
	list := r.Signals()
	if len(list) != 11 {
		t.Fatalf("%d series, want 10 and the overflow", len(list))
	}
	var requests, failures, in uint64
	for _, s := range list {
		requests += s.Requests
		failures += s.Failures
		in += s.BytesIn
		if s.Service == assay.Overflow && s.Requests != 90 {
			t.Errorf("overflow holds %d requests, want 90", s.Requests)
		}
		if s.Open != 0 || s.InFlight != 0 {
			t.Errorf("%s: %d open, %d in flight at the end", s.Service, s.Open, s.InFlight)
		}
	}
	if requests != 100 || failures != 50 || in != 1000 {
		t.Errorf("totals %d, %d, %d; want 100, 50, 1000", requests, failures, in)
	}
}

func TestForget(t *testing.T) {
	r := New(0)
	s := r.Series(assay.SignalKey{Service: "bank/ledger"})
	s.Opened(time.Now())
	s.Begin()
	if list := r.Signals(); len(list) != 1 || list[0].Open != 1 {
		t.Errorf("an open stream is reported as %v", list)
	}
	s.Forget()
	if list := r.Signals(); len(list) != 0 {
		t.Errorf("a forgotten stream is reported as %v", list)
	}
}

func TestConcurrentCountsAddUp(t *testing.T) {
	r := New(0)
	key := assay.SignalKey{Direction: assay.Inbound, Service: "bank/ledger"}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 1000 {
				s := r.Series(key)
				s.Begin()
				s.End(time.Duration(i)*time.Microsecond, false, time.Now())
				r.Refusals.Inc("no-endpoint")
			}
		})
	}
	wg.Wait()
	got := r.Signals()
	if len(got) != 1 || got[0].Requests != 8000 || got[0].Latency.Count() != 8000 {
		t.Errorf("series %+v", got)
	}
	if n := r.Counters().Refusals["no-endpoint"]; n != 8000 {
		t.Errorf("%d refusals, want 8000", n)
	}
}

func TestRequestAllocatesNothing(t *testing.T) {
	s := New(0).Series(assay.SignalKey{Service: "bank/ledger"})
	now := time.Now()
	if n := testing.AllocsPerRun(1000, func() {
		s.Begin()
		s.In(100)
		s.Out(1000)
		s.End(time.Millisecond, false, now)
	}); n != 0 {
		t.Errorf("%v allocations per request", n)
	}
}
