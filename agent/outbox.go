package agent

import (
	"encoding/json"
	"sync"

	"assay.dev"
	"assay.dev/api"
)

// maxFindings bounds the findings that wait for control; the oldest are dropped.
const maxFindings = 256

// outbox is what control has to be told. It holds what changed and not what
// happened: a workload that changed ten times while control was away is sent once.
type outbox struct {
	wake chan struct{} // holds one token when there may be something

	mu       sync.Mutex
	up       map[string]bool // IDs of workloads to send
	gone     map[string]departure
	acks     map[string]uint64 // workload -> bundle version; "" is the agent
	reports  map[string]bool
	findings []*api.Finding
	dropped  int
	records  *api.Records // nil: none
}

func newOutbox() *outbox {
	return &outbox{
		wake: make(chan struct{}, 1),
		up:   map[string]bool{}, gone: map[string]departure{}, acks: map[string]uint64{}, reports: map[string]bool{},
	}
}

func (o *outbox) signal() {
	select {
	case o.wake <- struct{}{}:
	default:
	}
}

func (o *outbox) workloadUp(id string) {
	o.mu.Lock()
	o.up[id] = true
	o.mu.Unlock()
	o.signal()
}

// departure is how a workload left.
type departure struct {
	last     *api.WorkloadReport // its last numbers, or nil
	released bool                // it runs on without the mesh
}

func (o *outbox) workloadGone(id string, d departure) {
	o.mu.Lock()
	delete(o.up, id)
	delete(o.acks, id)
	delete(o.reports, id)
	o.gone[id] = d
	o.mu.Unlock()
	o.signal()
}

func (o *outbox) ack(id string, version uint64) {
	o.mu.Lock()
	o.acks[id] = version
	o.mu.Unlock()
	o.signal()
}

// report marks a report; it is sent with the next tick and wakes nobody.
func (o *outbox) report(id string) {
	o.mu.Lock()
	o.reports[id] = true
	o.mu.Unlock()
}

func (o *outbox) finding(f *assay.Finding) {
	o.mu.Lock()
	if len(o.findings) == maxFindings {
		o.findings = o.findings[1:]
		o.dropped++
	}
	o.findings = append(o.findings, api.FromFinding(f))
	o.mu.Unlock()
	o.signal()
}

// batch is what an outbox held.
type batch struct {
	up, reports []string
	gone        map[string]departure
	acks        map[string]uint64
	findings    []*api.Finding
	records     *api.Records
}

// take empties the outbox; reports only when they are due.
func (o *outbox) take(reports bool) batch {
	o.mu.Lock()
	defer o.mu.Unlock()
	b := batch{gone: o.gone, acks: o.acks, findings: o.findings, records: o.records}
	o.records = nil
	for id := range o.up {
		b.up = append(b.up, id)
	}
	if reports {
		for id := range o.reports {
			b.reports = append(b.reports, id)
		}
		clear(o.reports)
	}
	clear(o.up)
	o.gone, o.acks, o.findings = map[string]departure{}, map[string]uint64{}, nil
	return b
}

// restore puts back what a broken stream did not carry and a new one will not send
// anyway. Workloads and acknowledgements are all sent at its beginning.
func (o *outbox) restore(findings []*api.Finding) {
	o.mu.Lock()
	o.findings = append(findings, o.findings...)
	if over := len(o.findings) - maxFindings; over > 0 {
		o.findings = o.findings[over:]
		o.dropped += over
	}
	o.mu.Unlock()
}

// maxOutRecords bounds the records that wait for the stream.
const maxOutRecords = 1024

// seen takes requests that taps asked for. Those that find no room are counted.
func (o *outbox) seen(records []assay.Record, dropped map[string]uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.records == nil {
		o.records = &api.Records{Dropped: map[string]uint64{}}
	}
	for id, n := range dropped {
		o.records.Dropped[id] += n
	}
	for i := range records {
		raw, err := json.Marshal(&records[i])
		if err == nil && len(o.records.Json) < maxOutRecords {
			o.records.Json = append(o.records.Json, raw)
			continue
		}
		for _, id := range records[i].Watches {
			o.records.Dropped[id]++
		}
	}
	o.signal()
}
