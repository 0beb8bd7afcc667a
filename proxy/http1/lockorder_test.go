package http1

import (
	"bytes"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// A socket's callbacks (RawConn.Read and Write) take the lock of who owns it, and
// TCPConn.Close waits for callbacks to return: whoever closes a socket while he holds
// that lock waits for himself. These tests stop a callback at the lock and then end
// the connection in every way that is called with the lock held.

// blockedIn waits until a goroutine waits for a mutex below a method.
func blockedIn(t *testing.T, method string) { t.Helper(); waits(t, method, "sync.Mutex.Lock") }

// waits waits until a goroutine waits for something, as the runtime calls it, below a
// method.
func waits(t *testing.T, method, reason string) {
	t.Helper()
	buf := make([]byte, 1<<20)
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); runtime.Gosched() {
		for stack := range bytes.SplitSeq(buf[:runtime.Stack(buf, true)], []byte("\n\n")) {
			head, calls, _ := strings.Cut(string(stack), "\n")
			if strings.Contains(head, "["+reason) && strings.Contains(calls, method) {
				return
			}
		}
	}
	t.Fatalf("nobody waits in %s for %s", method, reason)
}

// lock returns what unlocks, once.
func lock(mu *sync.Mutex) (unlock func()) {
	mu.Lock()
	return sync.OnceFunc(mu.Unlock)
}

// returns fails the test when f waits for what the test holds.
func returns(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Errorf("%s waits for a callback that waits for its caller's lock", what)
	}
	t.Cleanup(func() { <-done })
}

// onlyClient is the application's connection that an Outbound serves.
func (w *world) onlyClient() *client {
	w.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); runtime.Gosched() {
		w.out.mu.Lock()
		for c := range w.out.conns {
			w.out.mu.Unlock()
			return c
		}
		w.out.mu.Unlock()
	}
	w.t.Fatal("no connection is served")
	return nil
}

func TestAbortWhileTheSocketIsRead(t *testing.T) {
	w := newWorld(t, meshed, newScript(t).addr)
	peer := w.dial()
	say(t, peer, "GET /unfinished HT")
	c := w.onlyClient()
	waits(t, "(*client).fill", "IO wait")
	unlock := lock(&c.mu)
	defer unlock()
	say(t, peer, "TP/1.1\r\n")
	blockedIn(t, "(*client).readFD")
	returns(t, "abort", c.abort)
	unlock()
	expectReset(t, peer)
}

func TestAbortWhileTheSocketIsWritten(t *testing.T) {
	app := newScript(t)
	w := newWorld(t, meshed, app.addr)
	peer := w.dial()
	peer.SetReadBuffer(64 << 10)
	say(t, peer, getA)
	a := app.accept()
	expect(t, a, getA)
	say(t, a, "HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
	stuffed(t, a.Write)
	c := w.onlyClient()
	unlock := lock(&c.mu)
	defer unlock()
	// Room in the client's buffers calls the writer, which reports what has left.
	unblock := make(chan struct{})
	go func() {
		defer close(unblock)
		buf := make([]byte, 1<<20)
		for {
			if _, err := peer.Read(buf); err != nil {
				return
			}
		}
	}()
	blockedIn(t, "(*outlet).dripFD")
	returns(t, "abort", c.abort)
	unlock()
	<-unblock
	expectGone(t, a)
}

func TestApplicationIsGivenUpWhileItIsWritten(t *testing.T) {
	app := newScript(t)
	w := newWorld(t, meshed, app.addr)
	peer := w.dial()
	const head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n"
	say(t, peer, head)
	a := app.accept()
	expect(t, a, head)
	stuffed(t, peer.Write)
	x := w.onlyServed()
	unlock := lock(&x.mu)
	defer unlock()
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		buf := make([]byte, 1<<20)
		for {
			if _, err := a.Read(buf); err != nil {
				return
			}
		}
	}()
	blockedIn(t, "(*outlet).dripFD")
	b := x.b
	returns(t, "shut", b.shut)
	unlock()
	<-drained
	expectGone(t, peer)
}

// onlyServed is the exchange that an Inbound carries.
func (w *world) onlyServed() *served {
	w.t.Helper()
	w.in.mu.Lock()
	defer w.in.mu.Unlock()
	for b := range w.in.conns {
		if x := b.x.Load(); x != nil {
			return x
		}
	}
	w.t.Fatal("no exchange is carried")
	return nil
}

// stuffed writes until nothing on the way takes any more.
func stuffed(t *testing.T, write func([]byte) (int, error)) {
	t.Helper()
	piece := make([]byte, 64<<10)
	for full := false; !full; {
		done := make(chan error, 1)
		go func() {
			_, err := write(piece)
			done <- err
		}()
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
		case <-time.After(300 * time.Millisecond):
			full = true
			t.Cleanup(func() { <-done })
		}
	}
}
