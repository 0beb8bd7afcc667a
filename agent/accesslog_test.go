package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/link"
)

// fifo is a pipe that nobody reads.
func fifo(t *testing.T) *os.File {
	t.Helper()
	name := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(name, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(name, os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// watched is a session whose proxy was asked for everything.
func watched(to io.Writer, collector string) *session {
	a := &Agent{cfg: Config{AccessLog: to, OTLP: collector}, log: slog.New(slog.DiscardHandler), outbox: newOutbox()}
	a.accessLog = newAccessLog(to, &a.unlogged)
	a.spans = newSpans(collector, &a.untraced)
	w := &workload{a: a, id: "web-1", log: a.log}
	w.rec.Workload = assay.Workload{ID: "web-1", Namespace: "bank", Name: "web",
		Identity: assay.Identity{TrustDomain: "bank.test", Namespace: "bank", Account: "web"}}
	return &session{w: w, watches: []assay.Watch{{ID: assay.WatchLog}, {ID: assay.WatchTrace}, {ID: "tap-1"}}}
}

func toldOf(path string) assay.Record {
	return assay.Record{Watches: []string{assay.WatchLog, assay.WatchTrace, "tap-1"}, Time: time.Now(), Method: "GET", Path: path,
		Trace: assay.TraceContext{Trace: "4bf92f3577b34da6a3ce929d0e0e4736", Span: "00f067aa0ba902b7"}}
}

// TestLogThatHangs: a pipe that nobody reads holds up neither who tells of requests nor
// the agent's end; what it does not take is counted, and what it takes is whole lines in
// order.
func TestLogThatHangs(t *testing.T) {
	pipe := fifo(t)
	s := watched(pipe, "http://127.0.0.1:1")
	a := s.w.a
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); a.accessLog.run(ctx) }()
	told := uint64(0)
	for a.unlogged.Load() == 0 { // it would stand still at the first that does not fit
		m := link.Records{}
		for range 50 {
			m.List = append(m.List, toldOf(fmt.Sprintf("/%08d%s", told, strings.Repeat("x", 1000))))
			told++
		}
		s.records(&m)
		if told > 1_000_000 {
			t.Fatal("a million records, and none was left out: the queue has no end")
		}
	}
	// Somebody reads at last.
	lines := bufio.NewReader(pipe)
	for n := range 3000 {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			t.Fatal(err)
		}
		var r assay.Record
		if err := json.Unmarshal(line, &r); err != nil || r.Path[:9] != fmt.Sprintf("/%08d", n) || r.Workload != "web-1" {
			t.Fatalf("line %d: %v %.100q", n, err, line)
		}
	}
	for a.unlogged.Load() < 1000 {
		s.records(&link.Records{List: []assay.Record{toldOf("/" + strings.Repeat("y", 1000))}})
	}
	cancel()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Fatal("the agent's end waits for the pipe")
	}
	pipe.Close() // so does its writer end
}

// TestCollectorThatHangs: nor does a collector that accepts connections and never answers.
func TestCollectorThatHangs(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var accepted atomic.Int64
	held := make(chan []net.Conn, 1)
	go func() {
		var list []net.Conn
		for {
			c, err := l.Accept()
			if err != nil {
				held <- list
				return
			}
			accepted.Add(1)
			list = append(list, c)
		}
	}()
	defer func() {
		l.Close()
		for _, c := range <-held {
			c.Close()
		}
	}()
	s := watched(io.Discard, "http://"+l.Addr().String())
	a := s.w.a
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); a.spans.run(ctx, a.log.Warn) }()
	for told := 0; a.untraced.Load() == 0 || accepted.Load() == 0; told++ {
		s.records(&link.Records{List: []assay.Record{toldOf("/")}})
		if told%1000 == 0 {
			time.Sleep(time.Millisecond) // let the other goroutine run, too
		}
		if told > 10_000_000 {
			t.Fatal("the queue has no end")
		}
	}
	cancel()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Fatal("the agent's end waits for the collector")
	}
}

// TestHostileRecords: a proxy that was taken over tells what it likes. It speaks for its
// own workload alone, within bounds, and what it says can be read and sent on.
func TestHostileRecords(t *testing.T) {
	var log strings.Builder
	s := watched(&log, "http://127.0.0.1:1")
	a := s.w.a
	own := "spiffe://bank.test/ns/bank/sa/web"
	raw := func(text string) {
		var m link.Records
		if err := json.Unmarshal([]byte(text), &m); err == nil {
			s.records(&m)
		}
	}
	const trace = `"trace":{"traceID":"4bf92f3577b34da6a3ce929d0e0e4736","spanID":"00f067aa0ba902b7"}`
	const watches = `"watches":["` + assay.WatchLog + `","` + assay.WatchTrace + `","tap-1"]`
	// Somebody else's name.
	raw(`{"list":[{` + watches + `,` + trace + `,"workload":"db-1","identity":"spiffe://bank.test/ns/bank/sa/db","method":"GET","path":"/forged"}]}`)
	// Text that is none: invalid UTF-8, half a surrogate, NUL, the end of a line.
	raw("{\"list\":[{" + watches + "," + trace + ",\"method\":\"GET\",\"path\":\"/bad\xff\xfe\",\"authority\":\"\\ud800\",\"failure\":\"a\\u0000\\nb\\r\"}]}")
	// More than was asked for, and more than there is.
	m := link.Records{List: []assay.Record{toldOf("/" + strings.Repeat("x", 100_000)), toldOf("/after")}}
	s.records(&m)
	for range 2 * link.MaxRecords {
		m.List = append(m.List, toldOf("/many"))
	}
	m.List = m.List[2:]
	s.records(&m)
	s.records(&link.Records{List: []assay.Record{{Watches: []string{"tap-of-others"}, Path: "/unasked"}}, Dropped: map[string]uint64{"tap-of-others": 1, "x": 1}})
	s.records(&link.Records{List: []assay.Record{{Watches: []string{assay.WatchTrace}, Path: "/no-trace", Trace: assay.TraceContext{Trace: "zz", Span: "'"}}}})

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	a.accessLog.run(ctx) // writes what waits
	n := 0
	for line := range strings.Lines(log.String()) {
		n++
		var r assay.Record
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		if r.Workload != "web-1" || r.Identity.String() != own {
			t.Errorf("%s speaks as %s, %s", r.Path, r.Workload, r.Identity)
		}
		if len(line) > 16<<10 {
			t.Errorf("a line of %d bytes", len(line))
		}
	}
	if n < 3 || n > 2+link.MaxRecords || strings.Contains(log.String(), "/unasked") || strings.Contains(log.String(), "/after") || !strings.Contains(log.String(), "/forged") {
		t.Errorf("%d lines:\n%.2000s", n, log.String())
	}
	batch := a.spans.take()
	if len(batch) < 2 || strings.Contains(fmt.Sprint(batch), "/no-trace") {
		t.Errorf("%d spans", len(batch))
	}
	for _, rs := range batch {
		if got := fmt.Sprint(rs.GetResource()); !strings.Contains(got, own) || strings.Contains(got, "/sa/db") {
			t.Errorf("a span of %s", got)
		}
	}
	if err := a.spans.send(ctx, batch); err == nil || strings.Contains(err.Error(), "UTF-8") {
		t.Errorf("what a proxy says cannot be sent on: %v", err)
	}
}
