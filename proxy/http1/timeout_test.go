package http1

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"assay.dev/proxy/mux"
)

// hurried makes every timeout short. Tests of what must not happen wait for some of
// them to pass.
func hurried(t Timeouts) option {
	return func(w *world) {
		w.out.Timeouts = t
		w.in = NewInbound(w, InboundConfig{Timeouts: t, IdleTimeout: 60 * time.Millisecond})
	}
}

const short, long = 150 * time.Millisecond, time.Hour

func TestBodyTimeout(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		for name, request := range map[string]string{
			"length":  "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nsome",
			"chunked": "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe",
		} {
			t.Run(name, func(t *testing.T) {
				app := newScript(t)
				w := newWorld(t, mode, app.addr, hurried(Timeouts{Body: short, Stall: long}))
				c := w.dial()
				say(t, c, request)
				a := app.accept()
				expect(t, a, request)
				if mode == plain {
					// Both sides of the engine watch; either may be first.
					b, _ := io.ReadAll(c)
					if s := string(b); !strings.Contains(s, "Assay-Error: body-timeout") && !strings.Contains(s, "Assay-Error: stalled") {
						t.Fatalf("%q", s)
					}
				} else {
					expectTimeout(t, c)
				}
				expectReset(t, a)
			})
		}
	})
}

// expectTimeout wants an answer that either proxy's clock may have made.
func expectTimeout(t *testing.T, c io.Reader) {
	t.Helper()
	b, err := io.ReadAll(c)
	if s := string(b); err != nil || !strings.HasPrefix(s, "HTTP/1.1 408 ") && !strings.HasPrefix(s, "HTTP/1.1 504 ") {
		t.Fatalf("%q %v", s, err)
	}
}

// TestWhatMayTakeLong: timeouts end nothing that makes progress, and no silence of an
// application.
func TestWhatMayTakeLong(t *testing.T) {
	const pace = time.Second // far more than a busy machine holds up what must be in time
	each(t, func(t *testing.T, mode string) {
		quick := hurried(Timeouts{Head: pace, Body: pace, Stall: pace})
		t.Parallel()
		var all sync.WaitGroup // at once: they wait, and do not work
		defer all.Wait()
		run := func(name string, f func(t *testing.T)) { all.Go(func() { t.Run(name, f) }) }
		run("trickle", func(t *testing.T) {
			app := newScript(t)
			c := newWorld(t, mode, app.addr, quick).dial()
			const head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 12\r\n\r\n"
			say(t, c, head)
			a := app.accept()
			expect(t, a, head)
			for range 12 {
				wait(t, c, pace/3)
				say(t, c, "x")
				expect(t, a, "x")
			}
			say(t, a, okay)
			expect(t, c, okay)
		})
		run("response moves, request does not", func(t *testing.T) {
			app := newScript(t)
			c := newWorld(t, mode, app.addr, quick).dial()
			const head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 12\r\n\r\n"
			say(t, c, head)
			a := app.accept()
			expect(t, a, head)
			say(t, a, "HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n")
			expect(t, c, "HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n")
			for range 12 {
				wait(t, a, pace/3)
				say(t, a, "y")
				expect(t, c, "y")
			}
			say(t, c, strings.Repeat("x", 12))
			expect(t, a, strings.Repeat("x", 12))
		})
		run("silent application", func(t *testing.T) {
			app := newScript(t)
			c := newWorld(t, mode, app.addr, quick).dial()
			say(t, c, getA)
			a := app.accept()
			expect(t, a, getA)
			wait(t, c, 2*pace) // long poll
			say(t, a, "HTTP/1.1 200 OK\r\n\r\n")
			expect(t, c, "HTTP/1.1 200 OK\r\n\r\n")
			for range 2 { // an event stream
				wait(t, c, 2*pace)
				say(t, a, "data: x\n\n")
				expect(t, c, "data: x\n\n")
			}
			a.Close()
			expectEnd(t, c)
		})
		run("idle client", func(t *testing.T) {
			app := newScript(t)
			c := newWorld(t, mode, app.addr, quick).dial()
			for range 2 {
				say(t, c, getA)
				a := app.accept()
				expect(t, a, getA)
				say(t, a, okay)
				expect(t, c, okay)
				wait(t, c, 2*pace)
			}
		})
		run("silent tunnel", func(t *testing.T) {
			app := newScript(t)
			c := newWorld(t, mode, app.addr, quick).dial()
			say(t, c, upgrade)
			a := app.accept()
			expect(t, a, upgrade)
			say(t, a, switched)
			expect(t, c, switched)
			piece := strings.Repeat("x", 8<<20) // more than all buffers hold
			done := make(chan error, 1)
			go func() {
				_, err := io.WriteString(a, piece)
				done <- err
			}()
			time.Sleep(3 * pace) // nobody reads
			expect(t, c, piece)
			if err := <-done; err != nil {
				t.Error(err)
			}
			say(t, c, "still")
			expect(t, a, "still")
		})
		run("slow reader", func(t *testing.T) {
			app := newScript(t)
			c := newWorld(t, mode, app.addr, quick).dial()
			say(t, c, getA)
			a := app.accept()
			expect(t, a, getA)
			const size = 16 << 20
			head := fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size)
			say(t, a, head)
			expect(t, c, head)
			go fill(a, size)
			for left := int64(size); left > 0; left -= 2 << 20 {
				zeros(t, c, 2<<20)
				time.Sleep(pace / 3)
			}
		})
	})
}

// wait wants silence for a while.
func wait(t *testing.T, c interface {
	io.Reader
	SetReadDeadline(time.Time) error
}, d time.Duration) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(d))
	if n, err := c.Read(make([]byte, 1)); n != 0 || !isTimeout(err) {
		t.Fatalf("%d bytes and %v, want nothing", n, err)
	}
	c.SetReadDeadline(time.Now().Add(20 * time.Second))
}

// TestStalledReceivers: a client that never reads its response, and an application
// that never reads its request, are reset.
func TestStalledReceivers(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		quick := hurried(Timeouts{Body: long, Stall: short})
		const size = 64 << 20
		t.Run("client", func(t *testing.T) {
			app := newScript(t)
			w := newWorld(t, mode, app.addr, quick)
			c := w.dial()
			say(t, c, getA)
			a := app.accept()
			expect(t, a, getA)
			say(t, a, fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size))
			if err := fill(a, size); err == nil {
				t.Error("the application could send everything")
			}
			if x := w.servers.wait(t, 1)[0]; x.Failure != "client-gone" && x.Failure != "stalled" {
				t.Errorf("%+v", x)
			}
			expectReset(t, c)
		})
		t.Run("application", func(t *testing.T) {
			app := newScript(t)
			w := newWorld(t, mode, app.addr, quick)
			c := w.dial()
			head := fmt.Sprintf("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n", size)
			say(t, c, head)
			a := app.accept()
			expect(t, a, head)
			go fill(c, size)
			expectAnswer(t, c, "504", "stalled")
			if x := w.servers.wait(t, 1)[0]; x.Failure != "client-gone" && x.Failure != "stalled" {
				t.Errorf("%+v", x)
			}
			expectGone(t, a)
		})
	})
}

// deaf is a peer's end of a stream that takes nothing.
type deaf struct{ gone chan mux.Code }

func (d deaf) Received(mux.Stream, []byte, bool) {}
func (d deaf) Writable(mux.Stream)               {}
func (d deaf) Reset(_ mux.Stream, code mux.Code) { d.gone <- code }

// TestPeersThatDoNothing: what another proxy may do is bounded as well.
func TestPeersThatDoNothing(t *testing.T) {
	open := func(w *world, text string, fin bool) deaf {
		d := deaf{make(chan mux.Code, 1)}
		if _, n, err := w.sessions[0].Open(testHeader, []byte(text), fin, d); err != nil || n != len(text) {
			w.t.Fatal(n, err)
		}
		return d
	}
	t.Run("no credit", func(t *testing.T) {
		app := newScript(t)
		w := newWorld(t, meshed, app.addr, hurried(Timeouts{Stall: short}))
		d := open(w, getA, true)
		a := app.accept()
		expect(t, a, getA)
		say(t, a, "HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\n")
		if err := fill(a, 10000000); err == nil {
			t.Error("the application could send everything")
		}
		if code := <-d.gone; code != mux.Stalled {
			t.Error(code)
		}
	})
	t.Run("no credit at the end", func(t *testing.T) {
		app := newScript(t)
		w := newWorld(t, meshed, app.addr, hurried(Timeouts{Stall: short}))
		d := open(w, getA, true)
		a := app.accept()
		expect(t, a, getA)
		const size = 256<<10 + 1000 // a little more than the window: the rest is one buffer
		go func() {
			say(t, a, fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n", size))
			fill(a, size)
		}()
		if code := <-d.gone; code != mux.Stalled {
			t.Error(code)
		}
	})
	t.Run("half a head", func(t *testing.T) {
		w := newWorld(t, meshed, newScript(t).addr, hurried(Timeouts{Head: short}))
		if code := <-open(w, "GET / HTTP/1.1\r\nHo", false).gone; code != mux.BadRequest {
			t.Error(code)
		}
		if x := w.servers.wait(t, 1)[0]; x.Failure != "head-timeout" {
			t.Errorf("%+v", x)
		}
	})
	t.Run("half a body", func(t *testing.T) {
		app := newScript(t)
		w := newWorld(t, meshed, app.addr, hurried(Timeouts{Body: short}))
		d := open(w, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhe", false)
		a := app.accept()
		if code := <-d.gone; code != mux.Stalled {
			t.Error(code)
		}
		expectReset(t, a)
	})
}

func TestInterimLimits(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		for name, flood := range map[string]string{
			"count": strings.Repeat("HTTP/1.1 102 P\r\n\r\n", 1001),
			"bytes": strings.Repeat("HTTP/1.1 103 E\r\nLink: "+strings.Repeat("x", 60<<10)+"\r\n\r\n", 18),
		} {
			t.Run(name, func(t *testing.T) {
				app := newScript(t)
				w := newWorld(t, mode, app.addr)
				c := w.dial()
				say(t, c, getA)
				a := app.accept()
				expect(t, a, getA)
				go io.WriteString(a, flood)
				b, err := io.ReadAll(c)
				i := strings.LastIndex(string(b), "HTTP/1.1 ")
				if err != nil || !strings.HasPrefix(string(b[max(i, 0):]), "HTTP/1.1 502 ") || !strings.Contains(string(b), "Assay-Error: interim-limit\r\n") || !strings.HasPrefix(flood, string(b[:max(i, 0)])) {
					t.Fatalf("%d bytes, %v, end %q", len(b), err, b[max(i, 0):])
				}
				expectGone(t, a)
			})
		}
		t.Run("as many as may be", func(t *testing.T) {
			app := newScript(t)
			c := newWorld(t, mode, app.addr).dial()
			say(t, c, getA)
			a := app.accept()
			expect(t, a, getA)
			many := strings.Repeat("HTTP/1.1 102 P\r\n\r\n", 1000) + okay
			go io.WriteString(a, many)
			expect(t, c, many)
			swap(t, c, a, getB, okayB)
		})
	})
}
