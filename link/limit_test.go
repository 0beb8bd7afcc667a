package link

import (
	"encoding/json"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"assay.dev"
)

// A body that its receiver did not agree to is not copied, and its descriptor is closed.
func TestLimit(t *testing.T) {
	near, far := pair(t)
	before := descriptors(t)
	body := struct{ Text string }{strings.Repeat("x", 100<<10)}
	far.Limit(64 << 10)
	if err := near.Send(KindReport, 1, body); err != nil {
		t.Fatal(err)
	}
	if m, err := far.Receive(); err == nil || !strings.Contains(err.Error(), "at most 65536") {
		t.Errorf("a body of 100 KiB arrived as %d bytes, %v", len(m.Body), err)
	}
	far.Limit(128 << 10)
	if err := near.Send(KindReport, 2, body); err != nil {
		t.Fatal(err)
	}
	if m, err := far.Receive(); err != nil || m.ID != 2 {
		t.Errorf("then: %d, %v", m.ID, err)
	}
	if n := descriptors(t); n != before {
		t.Errorf("%d descriptors, %d before", n, before)
	}
}

// Three bytes of JSON make a series of several hundred: a report is read no further
// than to its bound.
func TestReportIsBounded(t *testing.T) {
	bomb := `{"started":"2026-01-02T03:04:05Z","counters":{"handshakes":7},"signals":[` + strings.Repeat("{},", 4<<20) + `{}]}`
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	var r Report
	err := json.Unmarshal([]byte(bomb), &r)
	runtime.ReadMemStats(&after)
	if err == nil || len(r.Signals) > MaxSignals {
		t.Errorf("a report of four million series: %v, %d are kept", err, len(r.Signals))
	}
	if used := after.TotalAlloc - before.TotalAlloc; used > 256<<20 {
		t.Errorf("reading it took %d MiB", used>>20)
	}
	want := Report{Started: time.Unix(1, 0).UTC(), Signals: []assay.Signals{{Requests: 1}, {Requests: 2}}, Counters: assay.Counters{Handshakes: 3}}
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	r = Report{Signals: []assay.Signals{{}}}
	if err := json.Unmarshal(b, &r); err != nil || !reflect.DeepEqual(r, want) {
		t.Errorf("%s was read as %+v, %v", b, r, err)
	}
	r = Report{}
	if err := json.Unmarshal([]byte(`{"signals":null}`), &r); err != nil || r.Signals != nil {
		t.Errorf("without series: %+v, %v", r, err)
	}
}
