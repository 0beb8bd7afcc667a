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

	"assay.dev/proxy/mux"
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
		"client says close":         {"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", okay},
		"application says close":    {getA, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: x, Close\r\n\r\nok"},
		"old client":                {"GET / HTTP/1.0\r\n\r\n", okay},
		"old client, keep-alive":    {"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", okay},
		"old application":           {getA, "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok"},
		"chunked, and close":        {getA, "HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"},
		"no body, and close":        {getA, "HTTP/1.1 204 OK\r\nConnection: close\r\n\r\n"},
		"empty body, and close":     {getA, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"},
		"posted, and close":         {"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi", okay},
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

func TestRefusedRequests(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		w := newWorld(t, mode, app.addr)
		n := 0
		for _, c := range corpus {
			if c.want == nil {
				continue
			}
			if strings.HasPrefix(c.head, "\r\n") {
				continue // skipped between requests
			}
			t.Run(c.name, func(t *testing.T) {
				conn := w.dial()
				go io.WriteString(conn, c.head)
				expectAnswer(t, conn, fmt.Sprint(c.want.Status), c.want.Reason)
				n++
			})
		}
		record := &w.servers
		if mode == meshed {
			record = &w.clients
		}
		for _, x := range record.wait(t, n) {
			if x.Failure == "" || x.Status < 400 {
				t.Errorf("%+v", x)
			}
		}
		if w.dialled() != 0 {
			t.Errorf("the application was connected to")
		}
	})
}

func TestRefusedBodies(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		const head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
		t.Run("at once", func(t *testing.T) {
			w := newWorld(t, mode, newScript(t).addr)
			c := w.dial()
			say(t, c, head+"5\nhello")
			expectAnswer(t, c, "400", "chunk-size")
			if w.dialled() != 0 {
				t.Error("the application was connected to")
			}
		})
		t.Run("later", func(t *testing.T) {
			app := newScript(t)
			w := newWorld(t, mode, app.addr)
			c := w.dial()
			say(t, c, head+"5\r\nhello\r\n")
			a := app.accept()
			expect(t, a, head+"5\r\nhello\r\n")
			say(t, c, "5\r\nhelloX")
			expectAnswer(t, c, "400", "chunk-end")
			if rest, _ := io.ReadAll(a); strings.Contains(string(rest), "X") {
				t.Errorf("the application got %q", rest)
			}
		})
		t.Run("after the answer began", func(t *testing.T) {
			app := newScript(t)
			c := newWorld(t, mode, app.addr).dial()
			say(t, c, head+"5\r\nhello\r\n")
			a := app.accept()
			expect(t, a, head+"5\r\nhello\r\n")
			const begun = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nsome"
			say(t, a, begun)
			expect(t, c, begun)
			say(t, c, "zzz\r\n")
			expectReset(t, c)
			expectGone(t, a)
		})
	})
}

func TestRefusedResponses(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		for text, reason := range map[string]string{
			"HTTP/1.1 200 OK\nX: y\r\n\r\n":                                               "bare-lf",
			"SSH-2.0-OpenSSH_9.2\r\n":                                                     "status-line",
			"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx":          "content-length-duplicate",
			"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\nx": "length-and-coding",
			"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n":                                       "obs-fold",
			"HTTP/1.1 103 X\r\n\r\nHTTP/1.1 204 X\r\nContent-Length: 5\r\n\r\n":           "body-forbidden",
			"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 70<<10):                        "head-length",
		} {
			t.Run(reason, func(t *testing.T) {
				app := newScript(t)
				w := newWorld(t, mode, app.addr)
				c := w.dial()
				say(t, c, getA)
				a := app.accept()
				expect(t, a, getA)
				go io.WriteString(a, text)
				expectAnswer(t, c, "502", reason)
				expectGone(t, a)
				if x := w.servers.wait(t, 1)[0]; x.Status != 502 || x.Failure != reason {
					t.Errorf("%+v", x)
				}
			})
		}
		t.Run("in the body", func(t *testing.T) {
			app := newScript(t)
			c := newWorld(t, mode, app.addr).dial()
			say(t, c, getA)
			a := app.accept()
			expect(t, a, getA)
			const begun = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"
			say(t, a, begun)
			expect(t, c, begun)
			say(t, a, "5 \r\nhello")
			expectReset(t, c)
			expectGone(t, a)
		})
	})
}

func TestUnaskedBytes(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		t.Run("after a response", func(t *testing.T) {
			app := newScript(t)
			w := newWorld(t, mode, app.addr)
			c := w.dial()
			say(t, c, getA)
			a := app.accept()
			expect(t, a, getA)
			say(t, a, okay+"HTTP/1.1 200 OK\r\n\r\nhidden")
			expect(t, c, okay)
			expectGone(t, a)
			say(t, c, getB)
			b := app.accept()
			expect(t, b, getB)
			say(t, b, okayB)
			expect(t, c, okayB)
		})
		t.Run("while idle", func(t *testing.T) {
			app := newScript(t)
			w := newWorld(t, mode, app.addr)
			c := w.dial()
			say(t, c, getA)
			a := app.accept()
			expect(t, a, getA)
			say(t, a, okay)
			expect(t, c, okay)
			say(t, a, "HTTP/1.1 408 Timeout\r\n\r\n")
			expectGone(t, a)
			say(t, c, getB)
			b := app.accept()
			expect(t, b, getB)
			say(t, b, okayB)
			expect(t, c, okayB)
		})
	})
}

// TestApplicationDies ends the application's connection at each stage: what the
// client sees is what it would see without the mesh.
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
				}
				expectGone(t, a)
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

// TestRefusedStreams: what nobody has read goes elsewhere; the rest is answered.
func TestRefusedStreams(t *testing.T) {
	const post = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"
	for _, s := range []struct {
		name    string
		request string
		codes   []mux.Code
		status  string
		reason  string
	}{
		{"twice, then taken", post, []mux.Code{mux.Refused, mux.Overloaded}, "", ""},
		{"always", post, []mux.Code{mux.Refused, mux.Refused, mux.Refused}, "503", "refused"},
		{"overloaded", getA, []mux.Code{mux.Overloaded, mux.Overloaded, mux.Overloaded}, "503", "overloaded"},
		{"denied", getA, []mux.Code{mux.Denied}, "403", "denied"},
		{"broken, safe", getA, []mux.Code{mux.Broken}, "", ""},
		{"broken, unsafe", post, []mux.Code{mux.Broken}, "502", "broken"},
	} {
		t.Run(s.name, func(t *testing.T) {
			app := newScript(t)
			w := newWorld(t, meshed, app.addr, func(w *world) { w.refuse = s.codes })
			c := w.dial()
			say(t, c, s.request)
			if s.status == "" {
				a := app.accept()
				expect(t, a, s.request)
				say(t, a, okay)
				expect(t, c, okay)
				swap(t, c, a, getB, okayB)
			} else {
				// The request was whole, so the connection goes on.
				c.CloseWrite()
				text, err := io.ReadAll(c)
				if err != nil || !strings.HasPrefix(string(text), "HTTP/1.1 "+s.status+" ") || !strings.Contains(string(text), "\r\nAssay-Error: "+s.reason+"\r\n") {
					t.Fatalf("%q %v", text, err)
				}
			}
			if x := w.clients.wait(t, 1)[0]; x.Failure != s.reason || x.Attempt != min(len(s.codes), 2) && s.status == "" {
				t.Errorf("%+v", x)
			}
		})
	}
}

func TestNoUpstream(t *testing.T) {
	for _, s := range []struct {
		err    error
		status string
		reason string
	}{
		{errors.New("no endpoint is ready"), "503", "unavailable"},
		{&Failure{Status: 504, Reason: "certificate-wait", Text: "no certificate yet"}, "504", "certificate-wait"},
		{&Failure{Reset: true, Reason: "unreachable"}, "", "unreachable"},
	} {
		t.Run(s.reason, func(t *testing.T) {
			w := newWorld(t, meshed, "127.0.0.1:1", func(w *world) { w.noDial = s.err })
			c := w.dial()
			say(t, c, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\nhi")
			if s.status == "" {
				expectReset(t, c)
			} else {
				expectAnswer(t, c, s.status, s.reason)
			}
			if x := w.clients.wait(t, 1)[0]; x.Failure != s.reason {
				t.Errorf("%+v", x)
			}
		})
	}
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
	w := newWorld(t, meshed, newScript(t).addr, func(w *world) { w.out.HeadTimeout = 50 * time.Millisecond })
	c := w.dial()
	say(t, c, "GET / HTTP/1.1\r\n")
	expectAnswer(t, c, "408", "head-timeout")
	if err := <-w.served; err != ErrHeadSlow {
		t.Errorf("Serve returned %v", err)
	}
}

func TestIdleConnectionsOutliveTheHeadTimeout(t *testing.T) {
	app := newScript(t)
	w := newWorld(t, meshed, app.addr, func(w *world) { w.out.HeadTimeout = 30 * time.Millisecond })
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
		w.out.Drain()
		w.in.Drain()
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
