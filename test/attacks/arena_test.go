// Package attacks tries to make the mesh send or take plaintext, or talk to
// somebody else than it thinks. Every packet between the hosts is watched: the
// marker that the attacked application sends must never be among them, and each
// attempt must end in a refusal that is counted.
package attacks

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"assay.dev/test/lab"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { lab.Main(m) }

// marker is what the client's application sends, again and again.
const marker = "PLAINTEXT-7f3a91-MARKER"

const port = 6000

// metricsAddress is where agents serve metrics: the default of `assay agent`.
const metricsAddress = "127.0.0.1:9181"

var arenas atomic.Int32

// arena is a client, a server behind it, and the wire between them.
type arena struct {
	*lab.World
	client  *lab.Workload
	server  *lab.Workload
	capture *lab.Capture
	to      netip.AddrPort // the service, as the client finds it
	served  atomic.Int64   // bytes that the server's application has received
	before  tallies        // what was counted when the attack began
}

// newArena starts a pair of workloads that have talked, so that nothing is left to
// be learned, and begins to watch the wire.
func newArena(t *testing.T, w *lab.World) *arena {
	n := arenas.Add(1)
	a := &arena{World: w}
	a.server = w.Workload(t, fmt.Sprintf("victim%d", n), lab.Spec{Ports: []int{port}})
	a.client = w.Workload(t, fmt.Sprintf("caller%d", n), lab.Spec{})
	a.server.Serve(t, port, a.application)
	a.to = w.AwaitService(t, a.client, a.server.Name, port)
	if sent, end := a.attempt(); a.served.Load() == 0 {
		t.Fatalf("before any attack the server received nothing (%d bytes sent, %s); counted: %v", sent, end, takeTallies(t, w.Mesh))
	}
	a.served.Store(0)
	a.before = takeTallies(t, w.Mesh)
	a.capture = w.Capture(t, marker)
	return a
}

// application is the server's: it echoes.
func (a *arena) application(c *net.TCPConn) {
	buf := make([]byte, 4096)
	for {
		n, err := c.Read(buf)
		a.served.Add(int64(n))
		if n > 0 {
			c.Write(buf[:n])
		}
		if err != nil {
			return
		}
	}
}

// attempt connects from the client's application and sends the marker for a
// while, and tells how that ended.
func (a *arena) attempt() (sent int, end string) { return send(a.client.Space, a.to) }

func send(from *lab.Space, to netip.AddrPort) (sent int, end string) {
	c, err := from.Dial(to)
	if err != nil {
		return 0, ending(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(4 * time.Second))
	answer := make(chan error, 1)
	go func() {
		// An application that answers is as good an end as one that refuses.
		_, err := c.Read(make([]byte, 1))
		answer <- err
	}()
	pause := time.NewTicker(2 * time.Millisecond)
	defer pause.Stop()
	for range 100 {
		n, err := io.WriteString(c, marker)
		sent += n
		if err != nil {
			return sent, ending(err)
		}
		<-pause.C
	}
	err = <-answer
	if err == nil {
		// To the end, so that nothing of it is on its way later.
		c.CloseWrite()
		io.Copy(io.Discard, c)
	}
	return sent, ending(err)
}

func ending(err error) string {
	var errno syscall.Errno
	switch {
	case err == nil:
		return "answered"
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	case errors.Is(err, io.EOF):
		return "EOF"
	}
	return err.Error()
}

// mustRefuse attempts several times: each ends badly, no byte reaches the server's
// application, and none is on the wire.
func (a *arena) mustRefuse(t *testing.T) {
	t.Helper()
	for i := range 3 {
		if _, end := a.attempt(); end == "answered" || end == "EOF" {
			t.Errorf("attempt %d ended with %q, want a refusal or a reset", i, end)
		}
	}
	a.nothingPassed(t)
}

func (a *arena) nothingPassed(t *testing.T) {
	t.Helper()
	if n := a.served.Load(); n > 0 {
		t.Errorf("%d bytes reached the server's application", n)
	}
	a.capture.ExpectNone(t)
}

// mustBeCounted waits until refusals by a workload's proxy, or by the kernel on its
// behalf, have been counted for one of the reasons: in the host's metrics, which need
// the agent, and in control's signals.
func (a *arena) mustBeCounted(t *testing.T, by *lab.Workload, reasons ...string) {
	t.Helper()
	for _, where := range []struct {
		name   string
		read   func(*testing.T, *lab.Mesh) (tally, error)
		before tally
	}{
		{"the host's metrics", scraped, a.before.metrics},
		{"control's signals", signalled, a.before.signals},
	} {
		lab.Eventually(t, 20*time.Second, "the refusal is counted in "+where.name, func() error {
			now, err := where.read(t, a.Mesh)
			if err != nil {
				return err
			}
			for _, reason := range reasons {
				if key := (counted{by.Name, reason}); now[key] > where.before[key] {
					t.Logf("%s: %s %q: %d, %d before", where.name, by.Name, reason, now[key], where.before[key])
					return nil
				}
			}
			return fmt.Errorf("by %s no %q: %v, before %v", by.Name, reasons, now.of(by, a.client, a.server), where.before.of(by, a.client, a.server))
		})
	}
}

// counted is what is counted: refusals and failed handshakes of a workload.
type counted struct{ workload, reason string }

type tally map[counted]uint64

// of is the part that is about some workloads.
func (t tally) of(workloads ...*lab.Workload) tally {
	part := tally{}
	for key, n := range t {
		for _, w := range workloads {
			if w.Name == key.workload {
				part[key] = n
			}
		}
	}
	return part
}

// tallies are what two places have counted at one time.
type tallies struct{ metrics, signals tally }

func takeTallies(t *testing.T, m *lab.Mesh) (both tallies) {
	t.Helper()
	lab.Eventually(t, 30*time.Second, "the counts can be read", func() (err error) {
		if both.metrics, err = scraped(t, m); err == nil {
			both.signals, err = signalled(t, m)
		}
		return err
	})
	return both
}

// signalled is what control knows.
func signalled(t *testing.T, m *lab.Mesh) (tally, error) {
	t.Helper()
	var list []struct {
		Name     string
		Counters struct{ HandshakeFailures, Refusals map[string]uint64 }
	}
	out, err := m.Try(t.Context(), m.Assay, "get", "signals", "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &list)
	}
	sum := tally{}
	for _, s := range list {
		for _, by := range []map[string]uint64{s.Counters.HandshakeFailures, s.Counters.Refusals} {
			for reason, n := range by {
				sum[counted{s.Name, reason}] += n
			}
		}
	}
	return sum, err
}

var sample = regexp.MustCompile(`(?m)^assay_(?:refusals|tls_handshake_failures)_total{.*name="([^"]*)",reason="([^"]*)"} (\d+)$`)

// scraped is what Prometheus would be told by the agent.
func scraped(t *testing.T, m *lab.Mesh) (tally, error) {
	t.Helper()
	c, err := m.Host.Dial(netip.MustParseAddrPort(metricsAddress))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	io.WriteString(c, "GET /metrics HTTP/1.0\r\n\r\n")
	text, err := io.ReadAll(c)
	sum := tally{}
	for _, m := range sample.FindAllStringSubmatch(string(text), -1) {
		n, err := strconv.ParseUint(m[3], 10, 64)
		if err != nil {
			return nil, err
		}
		sum[counted{m[1], m[2]}] += n
	}
	return sum, err
}

// freeze stops `assay up` as it is, until the test ends or thaw is called.
func (a *arena) freeze(t *testing.T) (thaw func()) {
	t.Helper()
	up := a.Mesh.Up
	if err := up.Signal(unix.SIGSTOP); err != nil {
		t.Fatalf("stop assay up: %v", err)
	}
	thaw = sync.OnceFunc(func() { up.Signal(unix.SIGCONT) })
	t.Cleanup(thaw)
	return thaw
}

// killProxy ends a workload's proxy for good.
func (a *arena) killProxy(t *testing.T, w *lab.Workload) {
	t.Helper()
	pid := a.Mesh.Proxy(w)
	if pid == 0 {
		t.Fatalf("%s has no proxy", w.Name)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatalf("kill the proxy of %s: %v", w.Name, err)
	}
	lab.Eventually(t, 30*time.Second, "the proxy is gone", func() error {
		if a.Mesh.Proxy(w) == pid {
			return fmt.Errorf("%d is still there", pid)
		}
		return nil
	})
}

// unguard removes the capture of a workload, as an attacker does who has its
// namespace.
func unguard(t *testing.T, w *lab.Workload) {
	t.Helper()
	w.MustExec(t, "nft", "flush", "ruleset")
}

// dialPast connects from a workload past its own capture, with the mark that its
// proxy uses.
func dialPast(w *lab.Workload, to netip.AddrPort) (net.Conn, error) {
	var c net.Conn
	err := w.In(func() (err error) {
		d := net.Dialer{Timeout: 5 * time.Second, Control: func(_, _ string, raw syscall.RawConn) error {
			var serr error
			err := raw.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, ownMark) })
			return errors.Join(err, serr)
		}}
		c, err = d.Dial("tcp", to.String())
		return err
	})
	return c, err
}

// ownMark is what proxies set on the sockets that they dial with.
const ownMark = 0x41535301
