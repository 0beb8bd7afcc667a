package main

import (
	"fmt"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
)

// TestRatesAreOverCounts: numbers travel by way of agent and control, and arrive when
// they arrive; a rate is over the time that lies between the counts.
func TestRatesAreOverCounts(t *testing.T) {
	start := time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)
	at := func(s float64) time.Time { return start.Add(time.Duration(s * float64(time.Second))) }

	edge := func(requests uint64, counted time.Time) []assay.Edge {
		return []assay.Edge{{Service: "bank/web", Requests: requests, Counted: counted, LastSeen: counted}}
	}
	// A hundred a second, counted two seconds apart, looked at one second apart.
	if rows := edgeRows(edge(1000, at(0.1)), edge(1200, at(2.1)), time.Second); rows[0].rps != 100 {
		t.Errorf("%.1f a second, want 100", rows[0].rps)
	}
	// An older control does not say when.
	if rows := edgeRows(edge(1000, time.Time{}), edge(1200, time.Time{}), time.Second); rows[0].rps != 200 {
		t.Errorf("%.1f a second, want 200", rows[0].rps)
	}
	if countedAgain(edge(1000, at(1)), edge(1000, at(1))) || !countedAgain(edge(1000, at(1)), edge(1100, at(2))) {
		t.Error("an edge in use is waited for until it is counted again")
	}
	idle := edge(1000, at(60))
	idle[0].LastSeen = at(1)
	if !countedAgain(idle, idle) {
		t.Error("an idle edge is waited for")
	}

	signals := func(requests uint64, counted, received time.Time) []api.SignalsView {
		return []api.SignalsView{{
			Workload: "web-1", Namespace: "bank", Name: "web", Service: "web", Started: start, Counted: counted, Received: received,
			Signals: []assay.Signals{{SignalKey: assay.SignalKey{Direction: assay.Inbound, Service: "bank/web", Protocol: assay.HTTP1}, Requests: requests}},
		}}
	}
	rows := statRows(signals(1000, at(10), at(10.9)), signals(1200, at(12), at(12.1)))
	if len(rows) != 1 || rows[0].requests != 100 {
		t.Errorf("%+v, want 100 a second", rows)
	}
	rows = statRows(signals(1000, time.Time{}, at(10)), signals(1200, time.Time{}, at(11)))
	if len(rows) != 1 || rows[0].requests != 200 {
		t.Errorf("of an older agent: %+v, want 200 a second", rows)
	}
}

// TestDecisionsOfAnInterval: what stat shows of a service's protection is what was
// decided since it looked first, by all proxies together.
func TestDecisionsOfAnInterval(t *testing.T) {
	start := time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)
	view := func(workload string, started time.Time, list ...assay.Decided) api.SignalsView {
		return api.SignalsView{Workload: workload, Started: started, Counters: assay.Counters{Decisions: list}}
	}
	web := func(decision string, n uint64) assay.Decided {
		return assay.Decided{Service: "bank/web", Decision: decision, Count: n}
	}
	base := []api.SignalsView{view("a", start, web("shed", 5), web("eject", 1)), view("b", start, web("shed", 7))}
	docs := []api.SignalsView{
		view("a", start, web("shed", 8), web("eject", 1), assay.Decided{Service: "bank/db", Decision: "panic", Count: 2}),
		view("b", start.Add(time.Second), web("shed", 4)), // another process: it counts from nothing
	}
	for _, c := range []struct {
		service string
		want    string
	}{
		{"", "[{bank/db panic 2} {bank/web shed 7}]"},
		{"web", "[{bank/web shed 7}]"},
		{"other", "[]"},
	} {
		if got := fmt.Sprint(decisionRows(base, docs, "", c.service)); got != c.want {
			t.Errorf("service %q: %s, want %s", c.service, got, c.want)
		}
	}
	if got := fmt.Sprint(decisionRows(nil, base, "bank", "")); got != "[{bank/web eject 1} {bank/web shed 12}]" {
		t.Errorf("in all: %s", got)
	}
}
