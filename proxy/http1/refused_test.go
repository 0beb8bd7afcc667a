package http1

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"assay.dev/proxy/mux"
)

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
