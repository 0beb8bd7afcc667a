// Package attacks tries to make the mesh send or take plaintext, or talk to
// somebody else than it thinks. Every packet between the hosts is watched: the
// marker that the attacked application sends must never be among them, and each
// attempt must end in a refusal that is counted.
package attacks

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
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

var arenas atomic.Int32

// arena is a client, a server behind it, and the wire between them.
type arena struct {
	*lab.World
	client  *lab.Workload
	server  *lab.Workload
	capture *lab.Capture
	to      netip.AddrPort // the service, as the client finds it
	served  atomic.Int64   // bytes that the server's application has received
	before  uint64         // refusals counted when the attack began
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
		t.Fatalf("before any attack the server received nothing (%d bytes sent, %s); refusals: %v", sent, end, refusals(t, w.Mesh))
	}
	a.served.Store(0)
	a.before = total(refusals(t, w.Mesh))
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

// mustBeCounted waits for the refusals in the signals.
func (a *arena) mustBeCounted(t *testing.T) {
	t.Helper()
	lab.Eventually(t, 20*time.Second, "the refusal is counted", func() error {
		now := refusals(t, a.Mesh)
		if total(now) <= a.before {
			return fmt.Errorf("%d before and now: %v", a.before, now)
		}
		return nil
	})
}

// refusals sums the refusals and failed handshakes of all workloads by reason.
func refusals(t *testing.T, m *lab.Mesh) map[string]uint64 {
	t.Helper()
	var doc any
	m.Get(t, "signals", &doc)
	sum := map[string]uint64{}
	var walk func(v any, counting bool)
	walk = func(v any, counting bool) {
		switch v := v.(type) {
		case []any:
			for _, e := range v {
				walk(e, counting)
			}
		case map[string]any:
			for key, e := range v {
				if n, ok := e.(float64); ok && counting {
					sum[key] += uint64(n)
					continue
				}
				walk(e, key == "refusals" || key == "handshakeFailures")
			}
		}
	}
	walk(doc, false)
	return sum
}

func total(by map[string]uint64) uint64 {
	var n uint64
	for _, v := range by {
		n += v
	}
	return n
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
	lab.Eventually(t, 5*time.Second, "the proxy is gone", func() error {
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
