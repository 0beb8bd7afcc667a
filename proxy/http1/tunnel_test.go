package http1

import (
	"io"
	"strings"
	"testing"
)

const (
	upgrade  = "GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n"
	switched = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
	connect  = "CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n"
	accepted = "HTTP/1.1 200 Connected\r\n\r\n"
)

func TestTunnel(t *testing.T) {
	for _, s := range [][3]string{
		{"upgrade", upgrade, switched},
		{"connect", connect, accepted},
	} {
		t.Run(s[0], func(t *testing.T) {
			each(t, func(t *testing.T, mode string) {
				app := newScript(t)
				w := newWorld(t, mode, app.addr)
				c := w.dial()
				// Bytes that the client sends before it knows, and that come with the answer.
				say(t, c, s[1]+"early")
				a := app.accept()
				expect(t, a, s[1])
				say(t, a, s[2]+"GET / HTTP/1.1\r\n\x00")
				expect(t, c, s[2]+"GET / HTTP/1.1\r\n\x00")
				expect(t, a, "early")
				for range 3 {
					say(t, c, "ping\n")
					expect(t, a, "ping\n")
					say(t, a, "pong\x00")
					expect(t, c, "pong\x00")
				}
				big := strings.Repeat("0123456789abcdef", 1<<17) // more than a window
				go io.WriteString(c, big)
				expect(t, a, big)
				go io.WriteString(a, big)
				expect(t, c, big)
				// Half-close, one way and then the other.
				c.CloseWrite()
				expectEnd(t, a)
				say(t, a, "last words")
				expect(t, c, "last words")
				a.Close()
				expectEnd(t, c)
				x := w.servers.wait(t, 1)[0]
				if !x.Tunnel || x.Failure != "" || x.RequestBytes < 2<<20 || x.ResponseBytes < 2<<20 {
					t.Errorf("%+v", x)
				}
			})
		})
	}
}

func TestTunnelHalfClosedByTheApplication(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		c := newWorld(t, mode, app.addr).dial()
		say(t, c, upgrade)
		a := app.accept()
		expect(t, a, upgrade)
		say(t, a, switched)
		a.CloseWrite()
		expect(t, c, switched)
		expectEnd(t, c)
		say(t, c, "still here")
		expect(t, a, "still here")
		c.Close()
		expectEnd(t, a)
	})
}

func TestTunnelReset(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		for _, byClient := range []bool{true, false} {
			app := newScript(t)
			c := newWorld(t, mode, app.addr).dial()
			say(t, c, upgrade)
			a := app.accept()
			expect(t, a, upgrade)
			say(t, a, switched)
			expect(t, c, switched)
			if byClient {
				reset(c)
				expectGone(t, a)
			} else {
				reset(a)
				expectReset(t, c)
			}
		}
	})
}

func TestUpgradeDeclined(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		w := newWorld(t, mode, app.addr)
		c := w.dial()
		say(t, c, upgrade)
		a := app.accept()
		expect(t, a, upgrade)
		say(t, a, okay)
		expect(t, c, okay)
		swap(t, c, a, getA, okay)
		swap(t, c, a, connect, "HTTP/1.1 403 No\r\nContent-Length: 1\r\n\r\n!")
		swap(t, c, a, getB, okayB)
		if w.dialled() != 1 {
			t.Errorf("%d connections", w.dialled())
		}
	})
}

func TestSwitchThatNobodyAskedFor(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		for name, request := range map[string]string{
			"plain":             getA,
			"without an option": "GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n",
		} {
			t.Run(name, func(t *testing.T) {
				app := newScript(t)
				c := newWorld(t, mode, app.addr).dial()
				say(t, c, request)
				a := app.accept()
				expect(t, a, request)
				say(t, a, switched)
				expectAnswer(t, c, "502", "switch-unasked")
				expectGone(t, a)
			})
		}
		t.Run("early", func(t *testing.T) {
			app := newScript(t)
			c := newWorld(t, mode, app.addr).dial()
			const request = "POST / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: x\r\nContent-Length: 5\r\n\r\n"
			say(t, c, request)
			a := app.accept()
			expect(t, a, request)
			say(t, a, switched)
			expectAnswer(t, c, "502", "switch-early")
			expectGone(t, a)
		})
	})
}

// TestTunnelOnABoundConnection: an upgrade by a connection that authenticated itself.
func TestTunnelOnABoundConnection(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		w := newWorld(t, mode, app.addr)
		c := w.dial()
		const request = "GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Negotiate x\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"
		say(t, c, request)
		a := app.accept()
		expect(t, a, request)
		say(t, a, switched+"hi")
		expect(t, c, switched+"hi")
		say(t, c, "there")
		expect(t, a, "there")
		a.CloseWrite()
		expectEnd(t, c)
		c.Close()
		expectEnd(t, a)
		if x := w.servers.wait(t, 1)[0]; !x.Tunnel || x.Failure != "" {
			t.Errorf("%+v", x)
		}
	})
}
