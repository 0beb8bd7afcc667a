package http1

import (
	"errors"
	"net"
	"strings"
	"testing"
)

// TestApplicationDies ends the application's connection at each stage: what the client
// sees is what it would see without the mesh.
func TestApplicationDies(t *testing.T) {
	const begun = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsome"
	for _, s := range []struct {
		name, said string
		reset      bool
		failure    string
	}{
		{"closes before it answers", "", false, "no-response"},
		{"resets before it answers", "", true, "app-reset"},
		{"closes in a head", "HTTP/1.1 200", false, "no-response"},
		{"closes in a body", begun, false, "truncated"},
		{"resets in a body", begun, true, "app-reset"},
		{"closes in chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", false, "truncated"},
		{"resets a body until close", "HTTP/1.1 200 OK\r\n\r\nsome", true, "app-reset"},
	} {
		t.Run(s.name, func(t *testing.T) {
			each(t, func(t *testing.T, mode string) {
				app := newScript(t)
				w := newWorld(t, mode, app.addr)
				c := w.dial()
				say(t, c, getA)
				a := app.accept()
				expect(t, a, getA)
				say(t, a, s.said)
				if !strings.HasSuffix(s.name, "head") {
					expect(t, c, s.said)
				}
				if s.reset {
					reset(a)
					expectReset(t, c)
				} else {
					a.Close()
					expectEnd(t, c)
				}
				if x := w.servers.wait(t, 1)[0]; x.Failure != s.failure {
					t.Errorf("failure %q, want %q", x.Failure, s.failure)
				}
				if mode == meshed {
					if x := w.clients.wait(t, 1)[0]; x.Failure != s.failure {
						t.Errorf("client's side: failure %q, want %q", x.Failure, s.failure)
					}
				}
			})
		})
	}
}

func TestApplicationRefuses(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addr := l.Addr().String()
		l.Close()
		w := newWorld(t, mode, addr)
		c := w.dial()
		say(t, c, getA)
		expectReset(t, c)
		if x := w.servers.wait(t, 1)[0]; x.Failure != "unreachable" {
			t.Errorf("%+v", x)
		}
	})
}

// TestClientDies ends the client's connection at each stage: the application is told.
func TestClientDies(t *testing.T) {
	const post = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nsome"
	const begun = "HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\nsome"
	for _, s := range []struct {
		name, request, response string
		reset                   bool
	}{
		{"resets before the answer", getA, "", true},
		{"resets in its body", post, "", true},
		{"closes in its body", post, "", false},
		{"resets in the answer", getA, begun, true},
		{"closes in the answer", getA, begun, false},
	} {
		t.Run(s.name, func(t *testing.T) {
			each(t, func(t *testing.T, mode string) {
				app := newScript(t)
				w := newWorld(t, mode, app.addr)
				c := w.dial()
				say(t, c, s.request)
				a := app.accept()
				expect(t, a, s.request)
				say(t, a, s.response)
				expect(t, c, s.response)
				if s.reset {
					reset(c)
				} else {
					c.Close()
				}
				if s.response != "" {
					piece := make([]byte, 64<<10)
					for {
						if _, err := a.Write(piece); err != nil {
							break
						}
					}
				} else if s.reset {
					expectReset(t, a)
				} else {
					expectEnd(t, a)
				}
				a.Close()
				if x := w.servers.wait(t, 1)[0]; x.Failure != "client-gone" {
					t.Errorf("%+v", x)
				}
				if mode == meshed {
					if x := w.clients.wait(t, 1)[0]; x.Failure != "client-gone" {
						t.Errorf("client's side: %+v", x)
					}
				}
			})
		})
	}
}

func TestIncompleteHeadIsNotCarried(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		w := newWorld(t, mode, newScript(t).addr)
		c := w.dial()
		say(t, c, "GET / HTTP/1.1\r\nHos")
		c.CloseWrite()
		expectEnd(t, c)
		if w.dialled() != 0 {
			t.Error("the application was connected to")
		}
	})
}

// TestKeptConnectionDies: the application closes a kept connection as it is used.
func TestKeptConnectionDies(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		for name, s := range map[string]struct {
			request string
			again   bool
			reset   bool
		}{
			"GET, closed":       {getB, true, false},
			"GET, reset":        {getB, true, true},
			"DELETE":            {"DELETE / HTTP/1.1\r\nHost: a\r\n\r\n", true, false},
			"POST":              {"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi", false, false},
			"POST without body": {"POST / HTTP/1.1\r\nHost: a\r\n\r\n", false, false},
			"PUT with body":     {"PUT / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi", false, false},
		} {
			t.Run(name, func(t *testing.T) {
				app := newScript(t)
				c := newWorld(t, mode, app.addr).dial()
				say(t, c, getA)
				a := app.accept()
				expect(t, a, getA)
				say(t, a, okay)
				expect(t, c, okay)
				say(t, c, s.request)
				expect(t, a, s.request)
				if s.reset {
					reset(a)
				} else {
					a.Close()
				}
				if !s.again {
					expectEnd(t, c)
					return
				}
				b := app.accept()
				expect(t, b, s.request)
				say(t, b, okayB)
				expect(t, c, okayB)
				// A fresh connection is not tried twice.
				say(t, c, s.request)
				expect(t, b, s.request)
				b.Close()
				d := app.accept()
				expect(t, d, s.request)
				d.Close()
				expectEnd(t, c)
			})
		}
	})
}

func TestSessionBreaks(t *testing.T) {
	app := newScript(t)
	w := newWorld(t, meshed, app.addr)
	c := w.dial()
	say(t, c, getA)
	a := app.accept()
	expect(t, a, getA)
	const begun = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsome"
	say(t, a, begun)
	expect(t, c, begun)
	w.sessions[1].Close(errors.New("test"))
	expectReset(t, c)
	expectGone(t, a)
}
