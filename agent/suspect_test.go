package agent

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/agent/internal/lab"
	"assay.dev/link"
	"golang.org/x/sys/unix"
)

// A proxy that somebody took over says whatever may hurt: its agent goes on, control
// gets nothing that it would refuse, and other workloads are heard.
func TestProxyThatWasTakenOver(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts, cfg.EndWorkloads = c.client(t), true
	a := startAgent(t, cfg)
	web := startApp(t, a.socket(), RunRequest{Service: "web"}, ":8080")
	other := startApp(t, a.socket(), RunRequest{Service: "other"}, ":8080")
	lab.Eventually(t, "both are certified", func() bool { return c.certified("web") != nil && c.certified("other") != nil })

	near, far, err := link.Pair()
	if err != nil {
		t.Fatal(err)
	}
	evil, err := link.FileConn(far)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	w := a.workload(web.Workload)
	w.mu.Lock()
	taken := w.current // the proxy that somebody else speaks for
	w.mu.Unlock()
	go func() { ended <- newSession(w, taken, near).run(t.Context(), link.Message{}) }()
	if err := evil.Send(link.KindHello, 0, link.Hello{PID: os.Getpid()}); err != nil {
		t.Fatal(err)
	}
	reports := make(chan uint64, 64)
	go func() {
		defer close(reports)
		for {
			m, err := evil.Receive()
			if err != nil {
				return
			}
			m.Discard()
			if m.Kind == link.KindReportNow {
				select {
				case reports <- m.ID:
				default:
				}
			}
		}
	}()
	say := func(kind link.Kind, id uint64, body any, files ...int) {
		t.Helper()
		if err := evil.Send(kind, id, body, files...); err != nil {
			t.Fatalf("%s: %v", kind, err)
		}
	}

	// Reports: unasked for, then one that control refuses.
	for range 50 {
		say(link.KindReport, 1<<40, link.Report{Started: time.Now(), Signals: make([]assay.Signals, 100)})
	}
	bad := link.Report{Started: time.Now(), Signals: []assay.Signals{{SignalKey: assay.SignalKey{Direction: "sideways"}}}}
	say(link.KindReport, <-reports, bad)
	// Findings: about another workload, of a kind that is none, at an impossible time,
	// too long; then a flood.
	say(link.KindFinding, 0, assay.Finding{Kind: "no kind at all", Subject: "x"})
	say(link.KindFinding, 0, assay.Finding{Time: time.Unix(-1e9, 0), Kind: "old"})
	say(link.KindFinding, 0, assay.Finding{Workload: other.Workload, Kind: "long", Subject: strings.Repeat("s", 5000), Detail: strings.Repeat("d", 5000)})
	for i := range 500 {
		say(link.KindFinding, 0, assay.Finding{Kind: "flood", Subject: fmt.Sprint(i)})
	}
	a.outbox.finding(&assay.Finding{Time: time.Now(), Workload: other.Workload, Kind: "true"})
	// Descriptors that linger, which nobody asked for.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	tcp, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	file, err := tcp.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	say(link.KindAck, 0, link.Ack{Services: 1}, int(file.Fd()))
	// Requests for certificates.
	c.mu.Lock()
	before := c.requests
	c.mu.Unlock()
	for i := range 200 {
		say(link.KindCSR, uint64(i), link.CSR{DER: []byte("none")})
	}
	// All of it was read once the agent has read this.
	say(link.KindAck, 0, link.Ack{Bundle: 77})
	lab.Eventually(t, "the agent has read everything", func() bool { return w.bundleInUse() == 77 })

	lab.Eventually(t, "the other workload's finding arrives", func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, f := range c.findings {
			if f.GetKind() == "true" {
				return true
			}
		}
		return false
	})
	c.mu.Lock()
	if len(c.invalid) > 0 {
		t.Errorf("control was sent what it refuses: %v", c.invalid)
	}
	if len(c.hellos) != 1 {
		t.Errorf("the stream was opened %d times", len(c.hellos))
	}
	if n := len(c.findings); n > findingBurst+5 {
		t.Errorf("%d findings were passed on", n)
	}
	for _, f := range c.findings {
		if f.GetKind() == "long" && (f.GetWorkload() != web.Workload || len(f.GetSubject()) > maxSubject) {
			t.Errorf("a finding about %s with a subject of %d bytes", f.GetWorkload(), len(f.GetSubject()))
		}
	}
	if n := c.requests - before; n > requestBurst+2 {
		t.Errorf("%d requests for certificates were passed on", n)
	}
	c.mu.Unlock()

	// A report that would fill the agent's memory ends the session.
	bomb := rawJSON(`{"signals":[` + strings.Repeat("{},", 1<<20) + `{}]}`)
	for late, over := time.After(time.Minute), false; !over; {
		select {
		case id, more := <-reports:
			if !more {
				reports = nil // the session's end is on its way
				continue
			}
			evil.Send(link.KindReport, id, bomb) // one that comes too late is unasked for; then the next one counts
		case err := <-ended:
			if over = true; err == nil || !strings.Contains(err.Error(), "series") {
				t.Errorf("the session ended with %v", err)
			}
		case <-late:
			over = true
			t.Error("the session goes on after a report of a million series")
		}
	}
	evil.Close()
}

type rawJSON string

func (r rawJSON) MarshalJSON() ([]byte, error) { return []byte(r), nil }

// Listeners of a proxy whose agent is gone are taken over only if they are those.
func TestForeignListenersAreRefused(t *testing.T) {
	ns := lab.Namespace(t)
	l, out, in, err := listen(ns, (&record{}).roles(), 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.verify(ns, (&record{}).roles(), out, in); err != nil {
		t.Errorf("the right ones: %v", err)
	}
	elsewhere, _, _, err := listen(lab.Namespace(t), (&record{}).roles(), out, in)
	if err != nil {
		t.Fatal(err)
	}
	defer elsewhere.Close()
	tcp, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(tcp)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	with := func(i, fd int) *listeners {
		fds := slices.Clone(l.fds)
		fds[i] = fd
		return &listeners{roles: l.roles, fds: fds}
	}
	for name, x := range map[string]*listeners{
		"of another namespace":     elsewhere,
		"one of another's":         with(3, elsewhere.fds[3]),
		"exchanged":                {roles: []string{l.roles[1], l.roles[0], l.roles[2], l.roles[3]}, fds: l.fds},
		"a socket that is none":    with(0, tcp),
		"a file":                   with(2, int(null.Fd())),
		"a descriptor that is not": with(1, 1<<20),
		"one too many":             {roles: append(slices.Clone(l.roles), link.ListenInbound), fds: append(slices.Clone(l.fds), l.fds[1])},
	} {
		if err := x.verify(ns, (&record{}).roles(), out, in); err == nil {
			t.Errorf("%s: they are taken for the workload's", name)
		}
	}
}

// runTestStranger is an ordinary user who opens as many connections as it can and
// keeps them, and sends large messages.
func runTestStranger() {
	path := os.Getenv("ASSAY_TEST_STRANGER")
	var kept []*link.Conn
	large := link.Hello{Workload: strings.Repeat("w", 4<<20)}
	for range 8 {
		c, err := link.Dial(path)
		if err != nil {
			continue
		}
		c.Send(link.KindHello, 0, large)
		kept = append(kept, c)
	}
	for range 200 {
		if c, err := link.Dial(path); err == nil {
			kept = append(kept, c)
		}
	}
	fmt.Println("held")
	io.Copy(io.Discard, os.Stdin)
	for _, c := range kept {
		c.Close()
	}
}

// An ordinary user can neither fill the agent's memory nor keep others out.
func TestStrangersAreBounded(t *testing.T) {
	c := newTestControl(t)
	c.start(t)
	cfg := testConfig(t.TempDir(), logs(t))
	cfg.Hosts, cfg.EndWorkloads = c.client(t), true
	a := startAgent(t, cfg)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for uid := range uint32(12) {
		cmd := child(t, io.Discard, "ASSAY_TEST_STRANGER="+a.socket())
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 20000 + uid, Gid: 20000}, Pdeathsig: syscall.SIGKILL}
		cmd.Stdin = nil
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		begin(t, cmd)
		defer in.Close()
		if line, err := bufio.NewReader(out).ReadString('\n'); line != "held\n" {
			t.Fatal(line, err)
		}
	}
	runtime.ReadMemStats(&after)
	if used := after.TotalAlloc - before.TotalAlloc; used > 64<<20 {
		t.Errorf("the agent took %d MiB for what strangers sent", used>>20)
	}
	if _, err := Locate(a.socket()); err != nil {
		t.Errorf("root does not reach the agent: %v", err)
	}
	startApp(t, a.socket(), RunRequest{Service: "web"}, ":8080").stop()
}

func TestPace(t *testing.T) {
	now := time.Unix(0, 0)
	p := newPace(time.Second, 3)
	p.now = func() time.Time { return now }
	through := func() (n int) {
		for p.allow() {
			n++
		}
		return n
	}
	for i, step := range []struct {
		after time.Duration
		want  int
	}{{0, 3}, {0, 0}, {time.Second, 1}, {2500 * time.Millisecond, 2}, {500 * time.Millisecond, 1}, {time.Hour, 3}} {
		now = now.Add(step.after)
		if got := through(); got != step.want {
			t.Errorf("step %d: %d get through, want %d", i, got, step.want)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if p.wait(ctx) {
		t.Error("it does not wait")
	}
}

// TestProbesHaveTheirOwnPace: whoever makes a proxy ask about much leaves it the rest of what it
// says, and the other way round.
func TestProbesHaveTheirOwnPace(t *testing.T) {
	now := time.Now()
	for _, x := range [][2]link.Kind{{link.KindProbe, link.KindAck}, {link.KindCSR, link.KindProbe}} {
		s := newSpeech()
		s.messages.now, s.probes.now = func() time.Time { return now }, func() time.Time { return now }
		n := 0
		for ; s.of(x[0]).allow(); n++ {
		}
		if n == 0 || !s.of(x[1]).allow() {
			t.Errorf("after %d of %s no %s", n, x[0], x[1])
		}
	}
}
