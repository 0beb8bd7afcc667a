package http1

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestContinue(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		c := newWorld(t, mode, app.addr).dial()
		const head = "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
		say(t, c, head)
		a := app.accept()
		expect(t, a, head)
		say(t, a, "HTTP/1.1 100 Continue\r\n\r\n")
		expect(t, c, "HTTP/1.1 100 Continue\r\n\r\n")
		swap(t, c, a, "hello", okay)
		swap(t, c, a, getA, okay)
	})
}

func TestContinueDeclined(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		c := newWorld(t, mode, app.addr).dial()
		const head = "POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
		const no = "HTTP/1.1 413 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
		say(t, c, head)
		a := app.accept()
		expect(t, a, head)
		say(t, a, no)
		expect(t, c, no)
		expectEnd(t, c)
		expectGone(t, a)
	})
}

func TestInterim(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		c := newWorld(t, mode, app.addr).dial()
		say(t, c, getA)
		a := app.accept()
		expect(t, a, getA)
		const hints = "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
		say(t, a, hints+hints[:10])
		expect(t, c, hints)
		say(t, a, hints[10:]+okay[:5])
		expect(t, c, hints)
		say(t, a, okay[5:])
		expect(t, c, okay)
		swap(t, c, a, getB, hints+okayB)
	})
}

func TestNoBody(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		w := newWorld(t, mode, app.addr)
		c := w.dial()
		say(t, c, getA)
		a := app.accept()
		expect(t, a, getA)
		say(t, a, okay)
		expect(t, c, okay)
		for _, s := range [][2]string{
			{"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"},
			{"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"},
			{"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n"},
			{getA, "HTTP/1.1 204 None\r\n\r\n"},
			{getA, "HTTP/1.1 304 Same\r\nContent-Length: 500\r\n\r\n"},
			{getA, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"},
			{getB, okayB},
		} {
			swap(t, c, a, s[0], s[1])
		}
		if n := w.dialled(); n != 1 {
			t.Errorf("%d connections to the application, want 1", n)
		}
	})
}

func TestClose(t *testing.T) {
	for name, s := range map[string][2]string{
		"close among others":        {"GET / HTTP/1.1\r\nHost: a\r\nConnection: x, close\r\n\r\n", okay},
		"application says close":    {getA, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: x, Close\r\n\r\nok"},
		"old client":                {"GET / HTTP/1.0\r\n\r\n", okay},
		"old client, keep-alive":    {"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", okay},
		"old application":           {getA, "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok"},
		"chunked, and close":        {getA, "HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"},
		"no body, and close":        {getA, "HTTP/1.1 204 OK\r\nConnection: close\r\n\r\n"},
		"empty body, and close":     {getA, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"},
		"posted, and close":         {"POST / HTTP/1.1\r\nHost: a\r\nConnection: close, x\r\nContent-Length: 2\r\n\r\nhi", okay},
		"old, both say keep-alive.": {"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok"},
	} {
		t.Run(name, func(t *testing.T) {
			each(t, func(t *testing.T, mode string) {
				app := newScript(t)
				c := newWorld(t, mode, app.addr).dial()
				say(t, c, s[0])
				a := app.accept()
				expect(t, a, s[0])
				say(t, a, s[1])
				expect(t, c, s[1])
				if strings.HasSuffix(name, ".") {
					swap(t, c, a, s[0], s[1])
					return
				}
				expectEnd(t, c)
				expectEnd(t, a)
			})
		})
	}
}

// okayClosed is okay to a client that ends its connection with its request.
var okayClosed = strings.Replace(okay, "\r\n\r\n", "\r\nConnection: close\r\n\r\n", 1)

// TestClientCloses: that a client's connection ends with its request is between it and
// its proxy. One connection to the application serves all of them.
func TestClientCloses(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		w := newWorld(t, mode, app.addr)
		const gotA = "GET / HTTP/1.1\r\nHost: a\r\n\r\n"
		var a *net.TCPConn
		one := func(request, got, answer, want string) {
			t.Helper()
			c := w.dial()
			say(t, c, request)
			if a == nil {
				a = app.accept()
			}
			expect(t, a, got)
			say(t, a, answer)
			expect(t, c, want)
			expectEnd(t, c)
		}
		one("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", gotA, okay, okayClosed)
		one("GET / HTTP/1.1\r\nhost: a\r\nCONNECTION:\t, Close ,\r\nX: y\r\n\r\n", "GET / HTTP/1.1\r\nhost: a\r\nX: y\r\n\r\n",
			"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nkeep-alive: x\r\nConnection: Keep-Alive\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n",
			"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n1\r\nx\r\n0\r\n\r\n")
		long := strings.Repeat("x", 100_000)
		one("POST / HTTP/1.1\r\nConnection: close\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"+long,
			"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"+long, okay, okayClosed)
		one("HEAD / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "HEAD / HTTP/1.1\r\nHost: a\r\n\r\n",
			"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\n")
		if n := w.dialled(); n != 1 {
			t.Errorf("%d connections to the application, want 1", n)
		}
		// The application's own word is as good.
		const last = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: x, close\r\n\r\nok"
		one("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", gotA, last, last)
		expectEnd(t, a)
		// One whose end is its body's goes through to the end.
		a = nil
		c := w.dial()
		say(t, c, "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
		a = app.accept()
		expect(t, a, gotA)
		say(t, a, "HTTP/1.1 200 OK\r\n\r\none")
		expect(t, c, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\none")
		say(t, a, "two")
		expect(t, c, "two")
		a.Close()
		expectEnd(t, c)
	})
}

func TestUntilClose(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		w := newWorld(t, mode, app.addr)
		c := w.dial()
		say(t, c, getA)
		a := app.accept()
		expect(t, a, getA)
		const head = "HTTP/1.1 200 OK\r\n\r\n"
		say(t, a, head+"one")
		expect(t, c, head+"one")
		say(t, a, "two")
		expect(t, c, "two")
		a.Close()
		expectEnd(t, c)
		if x := w.servers.wait(t, 1)[0]; x.Failure != "" || x.Status != 200 {
			t.Errorf("%+v", x)
		}
	})
}

func TestHalfClosedClientGetsItsAnswers(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		c := newWorld(t, mode, app.addr).dial()
		say(t, c, getA+getB)
		c.CloseWrite()
		a := app.accept()
		expect(t, a, getA)
		say(t, a, okay)
		expect(t, c, okay)
		expect(t, a, getB)
		say(t, a, okayB)
		expect(t, c, okayB)
		expectEnd(t, c)
	})
}

func TestEarlyAnswerAndClose(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		w := newWorld(t, mode, app.addr)
		c := w.dial()
		const head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100000000\r\n\r\n"
		say(t, c, head)
		a := app.accept()
		expect(t, a, head)
		var sending sync.WaitGroup
		sending.Go(func() {
			piece := make([]byte, 64<<10)
			for range 100000000 / len(piece) {
				if _, err := c.Write(piece); err != nil {
					return
				}
			}
		})
		const no = "HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 2\r\n\r\nno"
		say(t, a, no)
		expect(t, c, no)
		expectEnd(t, c)
		c.Close()
		sending.Wait()
		expectGone(t, a)
		if x := w.servers.wait(t, 1)[0]; x.Status != 413 || x.Failure != "" {
			t.Errorf("%+v", x)
		}
	})
}

func TestEarlyAnswerAndGoOn(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		c := newWorld(t, mode, app.addr).dial()
		const head = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n"
		say(t, c, head)
		a := app.accept()
		expect(t, a, head)
		say(t, a, okay)
		expect(t, c, okay)
		body := strings.Repeat("x", 1000000)
		go io.WriteString(c, body+getB)
		expect(t, a, body+getB)
		say(t, a, okayB)
		expect(t, c, okayB)
		swap(t, c, a, getA, okay)
	})
}

func TestSkippedEmptyLine(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		c := newWorld(t, mode, app.addr).dial()
		say(t, c, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx\r\n"+getA)
		a := app.accept()
		expect(t, a, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx")
		say(t, a, okay)
		expect(t, a, getA)
		say(t, a, okayB)
		expect(t, c, okay+okayB)
	})
}

// TestSkippedEmptyLineInPieces: it may come a byte at a time.
func TestSkippedEmptyLineInPieces(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		c := newWorld(t, mode, app.addr, func(w *world) { w.first = []byte("\r") }).dial()
		say(t, c, "\n"+getA)
		a := app.accept()
		expect(t, a, getA)
		say(t, a, okay)
		expect(t, c, okay)
		swap(t, c, a, getB, okayB)

		other := newWorld(t, mode, app.addr, func(w *world) { w.first = []byte("\r") }).dial()
		say(t, other, getA)
		expectAnswer(t, other, "400", "method")
	})
}

// TestBoundAuthentication: a client connection that authenticates itself gets a
// connection of its own, which nobody else ever uses.
func TestBoundAuthentication(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		w := newWorld(t, mode, app.addr)
		c, other := w.dial(), w.dial()
		say(t, c, getA)
		a := app.accept()
		expect(t, a, getA)
		say(t, a, okay)
		expect(t, c, okay)
		// It takes the kept connection with it.
		const ntlm = "GET /n HTTP/1.1\r\nHost: a\r\nAuthorization: NTLM TlRMTVNTUAAB\r\n\r\n"
		const challenge = "HTTP/1.1 401 No\r\nWWW-Authenticate: NTLM x\r\nContent-Length: 2\r\n\r\nno"
		swap(t, c, a, ntlm, challenge)
		say(t, other, getB)
		b := app.accept()
		expect(t, b, getB)
		say(t, b, okayB)
		expect(t, other, okayB)
		swap(t, c, a, ntlm, okay)
		swap(t, other, b, getB, okayB)
		for range 3 {
			swap(t, c, a, getA, okay) // without credentials: the connection has them
			swap(t, c, a, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi", okay)
			swap(t, other, b, getB, okayB)
		}
		c.Close()
		expectGone(t, a)
		swap(t, other, b, getB, okayB)
		// The application's close ends the client's connection, also while idle.
		swap(t, other, b, ntlm, okay)
		b.Close()
		expectEnd(t, other)
	})
}

func TestHeadTimeout(t *testing.T) {
	w := newWorld(t, meshed, newScript(t).addr, func(w *world) { w.out.Timeouts.Head = 50 * time.Millisecond })
	c := w.dial()
	say(t, c, "GET / HTTP/1.1\r\n")
	expectAnswer(t, c, "408", "head-timeout")
	if err := <-w.served; err != ErrHeadSlow {
		t.Errorf("Serve returned %v", err)
	}
}

func TestIdleConnectionsOutliveTheHeadTimeout(t *testing.T) {
	app := newScript(t)
	w := newWorld(t, meshed, app.addr, func(w *world) { w.out.Timeouts.Head = 30 * time.Millisecond })
	c := w.dial()
	say(t, c, getA[:5])
	say(t, c, getA[5:])
	a := app.accept()
	expect(t, a, getA)
	c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, context.DeadlineExceeded) && !isTimeout(err) {
		t.Fatal(err)
	}
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	say(t, a, okay)
	expect(t, c, okay)
}

func isTimeout(err error) bool {
	e, ok := errors.AsType[net.Error](err)
	return ok && e.Timeout()
}

func TestDrain(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		w := newWorld(t, mode, app.addr)
		idle, busy := w.dial(), w.dial()
		say(t, idle, getA)
		a := app.accept()
		expect(t, a, getA)
		say(t, a, okay)
		expect(t, idle, okay)
		say(t, busy, getB)
		expect(t, a, getB)
		w.out.Drain(nil)
		w.in.Drain(nil)
		expectEnd(t, idle)
		say(t, a, okayB)
		expect(t, busy, okayB)
		expectEnd(t, busy)
		late := w.dial()
		swap(t, late, a, getA, okay)
		expectEnd(t, late)
	})
}

func TestIdleTimeout(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		w := newWorld(t, mode, app.addr, func(w *world) { w.in = NewInbound(w, InboundConfig{IdleTimeout: 20 * time.Millisecond}) })
		c := w.dial()
		say(t, c, getA)
		a := app.accept()
		expect(t, a, getA)
		say(t, a, okay)
		expect(t, c, okay)
		expectEnd(t, a)
		say(t, c, getB)
		b := app.accept()
		expect(t, b, getB)
		say(t, b, okayB)
		expect(t, c, okayB)
	})
}

// TestRandomBytesAreExact sends random messages in random pieces through every path,
// and compares what arrives.
func TestRandomBytesAreExact(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		w := newWorld(t, mode, app.addr)
		rnd := rand.New(rand.NewPCG(1, 2))
		c := w.dial()
		var a net.Conn
		for i := range 200 {
			request := randomMessage(rnd, fmt.Sprintf("POST /%d HTTP/1.1\r\nHost: a\r\n", i))
			response := randomMessage(rnd, "HTTP/1.1 200 OK\r\n")
			go pieces(rnd.Uint64(), c, request)
			if a == nil {
				a = app.accept()
			}
			same(t, a, request)
			go pieces(rnd.Uint64(), a, response)
			same(t, c, response)
		}
	})
}

func randomMessage(rnd *rand.Rand, start string) []byte {
	var b bytes.Buffer
	b.WriteString(start)
	for range rnd.IntN(10) {
		fmt.Fprintf(&b, "X-%x:%s%x\r\n", rnd.Uint64(), strings.Repeat(" ", rnd.IntN(3)), make([]byte, rnd.IntN(1000)))
	}
	size := 1 << rnd.IntN(20)
	if rnd.IntN(2) == 0 {
		fmt.Fprintf(&b, "Content-Length: %d\r\n\r\n", size)
		b.Write(make([]byte, size))
		return b.Bytes()
	}
	b.WriteString("Transfer-Encoding: chunked\r\n\r\n")
	for size > 0 {
		n := min(1+rnd.IntN(70000), size)
		fmt.Fprintf(&b, "%0*x\r\n", rnd.IntN(8), n)
		b.Write(bytes.Repeat([]byte{byte(n)}, n))
		b.WriteString("\r\n")
		size -= n
	}
	b.WriteString("0\r\nT: x\r\n\r\n")
	return b.Bytes()
}

func pieces(seed uint64, c net.Conn, b []byte) {
	rnd := rand.New(rand.NewPCG(seed, 0))
	for len(b) > 0 {
		n := min(1+rnd.IntN(1<<rnd.IntN(18)), len(b))
		if _, err := c.Write(b[:n]); err != nil {
			return
		}
		b = b[n:]
	}
}

func same(t testing.TB, c net.Conn, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if n, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d of %d bytes, %v, equal %v", n, len(want), err, bytes.Equal(got, want))
	}
}
