package http1

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"assay.dev/proxy/mux"
)

// What hostile ends can do with little: each test says how much it may cost.

// usage is what the process holds.
type usage struct{ stack, heap, goroutines int64 }

func used() usage {
	stack, heap := memory()
	return usage{stack, heap, int64(runtime.NumGoroutine())}
}

// cheap wants that n of something cost at most so many bytes and goroutines each.
func cheap(t *testing.T, before usage, n, size, goroutines int64) {
	t.Helper()
	after := used()
	bytes := (after.stack + after.heap - before.stack - before.heap) / n
	t.Logf("each costs %d bytes and %.1f goroutines", bytes, float64(after.goroutines-before.goroutines)/float64(n))
	if pooled && bytes > size {
		t.Errorf("each costs %d bytes, want at most %d", bytes, size)
	}
	if after.goroutines-before.goroutines > n*goroutines+20 {
		t.Errorf("%d goroutines for %d of them, want at most %d each", after.goroutines-before.goroutines, n, goroutines)
	}
}

// settled waits until no more goroutines are left than before.
func settled(t *testing.T, before usage) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for int64(runtime.NumGoroutine()) > before.goroutines+10 {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines are left, there were %d", runtime.NumGoroutine(), before.goroutines)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// TestSlowHeads: connections that never finish their head cost a goroutine and a small
// buffer, or what they have sent.
func TestSlowHeads(t *testing.T) {
	for _, s := range []struct {
		name, start string
		size        int64
	}{
		{"many fields", "GET / HTTP/1.1\r\nHost: a\r\n" + strings.Repeat("X: 1\r\n", 250), 10 << 10},
		{"a long field", "GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 60<<10), 80 << 10},
	} {
		t.Run(s.name, func(t *testing.T) {
			each(t, func(t *testing.T, mode string) {
				w := newWorld(t, mode, newScript(t).addr, quiet, hurried(Timeouts{Head: long}))
				conns := w.dialMany()
				before := used()
				for _, c := range conns {
					say(t, c, s.start)
				}
				for _, c := range conns[:3] {
					wait(t, c, 100*time.Millisecond)
				}
				cheap(t, before, int64(len(conns)), s.size, 1)
				for _, c := range conns {
					c.Close()
				}
				w.expectServed(len(conns))
			})
		})
	}
}

// TestSlowHeadsEnd: they all end after the timeout.
func TestSlowHeadsEnd(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		w := newWorld(t, mode, newScript(t).addr, quiet, hurried(Timeouts{Head: short}))
		conns := w.dialMany()
		for _, c := range conns {
			say(t, c, "GET / HTTP/1.1\r\nHost: a\r\nX: 1")
		}
		for _, c := range conns {
			if b, err := io.ReadAll(c); err != nil || !bytes.HasPrefix(b, []byte("HTTP/1.1 408 ")) {
				t.Fatalf("%q %v", b, err)
			}
			c.Close()
		}
		w.expectServed(len(conns))
	})
}

func (w *world) dialMany() []net.Conn {
	conns := make([]net.Conn, 200)
	for i := range conns {
		conns[i] = w.dial()
	}
	return conns
}

// expectServed waits for the end of n connections of which the application has not heard.
func (w *world) expectServed(n int) {
	w.t.Helper()
	for range n {
		<-w.served
	}
	if w.dialled() > 0 {
		w.t.Error("the application was connected to")
	}
}

// TestSlowBodies: requests whose bodies trickle cost both sides no more than their
// connections.
func TestSlowBodies(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		w := newWorld(t, mode, app.addr, quiet)
		const n = 80
		idle := used()
		conns, apps := make([]net.Conn, n), make([]net.Conn, n)
		before := used()
		for i := range conns {
			conns[i] = w.dial()
			say(t, conns[i], "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
			apps[i] = app.accept()
		}
		for range 20 {
			for _, c := range conns {
				say(t, c, "1\r\nx\r\n")
			}
		}
		for _, a := range apps {
			expect(t, a, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"+strings.Repeat("1\r\nx\r\n", 20))
		}
		cheap(t, before, n, 40<<10, 3)
		for _, c := range conns {
			reset(c.(*net.TCPConn))
		}
		for range conns {
			<-w.served
		}
		settled(t, idle)
	})
}

// TestHugePipeline: a client that sends requests and reads no answers is read no
// further than buffers go; it gets all its answers when it reads.
func TestHugePipeline(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		w := newWorld(t, mode, answers(t), quiet)
		c := w.dial()
		c.SetDeadline(time.Now().Add(time.Minute))
		const n = 20_000
		var sending sync.WaitGroup
		grown := sampled(func() {
			sending.Go(func() { c.Write(bytes.Repeat(get, n)) })
			time.Sleep(300 * time.Millisecond) // it would be read meanwhile
		})
		if pooled && grown > 2<<20+uint64(n*len(get)) {
			t.Errorf("the heap grew by %d bytes", grown)
		}
		got, err := io.CopyN(io.Discard, c, n*int64(len(response)))
		if err != nil {
			t.Errorf("%d of %d answers: %v", got/int64(len(response)), n, err)
		}
		sending.Wait()
	})
}

// TestResponseFloods: an application that says more than it was asked is cut off soon.
func TestResponseFloods(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		for name, flood := range map[string]string{
			"an endless head":         "HTTP/1.1 200 OK\r\n" + strings.Repeat("X: y\r\n", 1000),
			"an endless line":         "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 100<<10),
			"an endless reason":       "HTTP/1.1 200 " + strings.Repeat("x", 100<<10),
			"endless interim answers": strings.Repeat("HTTP/1.1 103 E\r\n\r\n", 2000),
			"endless extensions":      "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("1;"+strings.Repeat("x", 100)+"\r\nx\r\n", 1000),
			"endless trailers":        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + strings.Repeat("X: y\r\n", 1000),
			"unasked answers":         strings.Repeat(okay, 1000),
			"a body of HEAD's":        "",
		} {
			t.Run(name, func(t *testing.T) {
				app := newScript(t)
				w := newWorld(t, mode, app.addr)
				c := w.dial()
				request := getA
				if flood == "" {
					request, flood = "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n"+strings.Repeat("x", 100<<10)
				}
				say(t, c, request)
				a := app.accept()
				expect(t, a, request)
				grown := sampled(func() {
					a.SetWriteDeadline(time.Now().Add(10 * time.Second))
					for sent := 0; ; {
						m, err := io.WriteString(a, flood)
						if sent += m; isTimeout(err) || sent > 64<<20 {
							t.Fatalf("%d bytes were taken", sent)
						}
						if err != nil {
							return // cut off
						}
					}
				})
				if pooled && grown > 8<<20 {
					t.Errorf("the heap grew by %d bytes", grown)
				}
				c.Close()
				w.servers.wait(t, 1)
			})
		}
	})
}

// TestHeadsOfAPeer: another proxy may begin ten thousand requests with most of a head
// each. The first ones have a minute, the others are refused, and nothing is kept of
// those that were.
func TestHeadsOfAPeer(t *testing.T) {
	const most = 1 << 20
	w := newWorld(t, unencrypted, newScript(t).addr, quiet, func(w *world) {
		w.in = NewInbound(w, InboundConfig{MaxHeads: most})
	})
	part := []byte("GET / HTTP/1.1\r\nHost: a\r\nX: " + strings.Repeat("x", 12<<10))
	const n = 2000
	codes := make(chan mux.Code, n)
	before := used()
	for range n {
		st, _, err := w.sessions[0].Open(testHeader, nil, false, deaf{codes})
		if err != nil {
			t.Fatal(err)
		}
		if err := st.Write(part, false); err != nil {
			t.Fatal(err)
		}
	}
	for range n - most/len(part) {
		if code := <-codes; code != mux.Overloaded {
			t.Fatal(code)
		}
	}
	after := used()
	if grown := after.heap - before.heap; pooled && grown > 4*most {
		t.Errorf("the heap grew by %d bytes", grown)
	}
	w.in.mu.Lock()
	held, heads := w.in.held, len(w.in.heads)
	w.in.mu.Unlock()
	if held > most || heads == 0 {
		t.Errorf("%d bytes of %d heads are held, want at most %d", held, heads, most)
	}
	// Others are served meanwhile.
	c := w.dial()
	say(t, c, "GET / HTTP/1.1\r\nHost: a\r\n\r\n")
	w.sessions[0].Close(fmt.Errorf("the peer goes"))
	deadline := time.Now().Add(10 * time.Second)
	for {
		w.in.mu.Lock()
		held = w.in.held
		w.in.mu.Unlock()
		if held == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes of heads are held for nobody", held)
		}
		time.Sleep(time.Millisecond)
	}
}
