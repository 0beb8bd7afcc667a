package http1

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"assay.dev/proxy/mux"
)

// TestHalfClose: a client that half-closes after its request does so for the
// application, too, and gets its answer.
func TestHalfClose(t *testing.T) {
	const post = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
	filler := "GET / HTTP/1.1\r\nHost: a\r\nX: "
	for name, request := range map[string]string{
		"GET":       getA,
		"POST":      post,
		"chunked":   "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
		"close":     "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
		"old":       "GET / HTTP/1.0\r\n\r\n",
		"a buffer":  filler + strings.Repeat("x", classes[small]-len(filler)-4) + "\r\n\r\n",
		"upgrade":   upgrade,
		"connect":   connect,
		"Negotiate": "GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Negotiate x\r\n\r\n",
		"large":     fmt.Sprintf("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s", 1<<20, strings.Repeat("x", 1<<20)),
	} {
		t.Run(name, func(t *testing.T) {
			each(t, func(t *testing.T, mode string) {
				for _, together := range []bool{true, false} {
					app := newScript(t)
					w := newWorld(t, mode, app.addr)
					c := w.dial()
					go func() {
						c.Write([]byte(request))
						if together {
							c.CloseWrite()
						}
					}()
					a := app.accept()
					expect(t, a, strings.Replace(request, "Connection: close\r\n", "", 1))
					if !together {
						c.CloseWrite()
					}
					expectEnd(t, a)
					say(t, a, okay)
					if name == "close" {
						expect(t, c, okayClosed)
					} else {
						expect(t, c, okay)
					}
					if name == "connect" {
						a.Close() // it is a tunnel now
					}
					expectEnd(t, c)
					a.SetReadDeadline(time.Now().Add(10 * time.Second))
					c.Close()
					if x := w.servers.wait(t, 1)[0]; x.Failure != "" || x.Status != 200 {
						t.Errorf("%+v", x)
					}
					// The connection is nobody else's.
					d := w.dial()
					say(t, d, getB)
					b := app.accept()
					expect(t, b, getB)
					say(t, b, okayB)
					expect(t, d, okayB)
				}
			})
		})
	}
}

// TestHalfCloseWhilePipelining: only the last request is followed by the half-close.
func TestHalfCloseWhilePipelining(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		c := newWorld(t, mode, app.addr).dial()
		say(t, c, getA+getB)
		c.CloseWrite()
		a := app.accept()
		expect(t, a, getA)
		a.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if _, err := a.Read(make([]byte, 1)); !isTimeout(err) {
			t.Fatalf("%v after the first request, want nothing", err)
		}
		a.SetReadDeadline(time.Now().Add(10 * time.Second))
		say(t, a, okay)
		expect(t, c, okay)
		expect(t, a, getB)
		expectEnd(t, a)
		say(t, a, okayB)
		expect(t, c, okayB)
		expectEnd(t, c)
	})
}

// TestHalfCloseInABody: the application sees the end at the same byte, and may still
// answer.
func TestHalfCloseInABody(t *testing.T) {
	for _, request := range []string{
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nsome",
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe",
		"POST / HTTP/1.1\r\nHost: a\r\nAuthorization: Negotiate x\r\nContent-Length: 100\r\n\r\nsome",
	} {
		each(t, func(t *testing.T, mode string) {
			for _, answered := range []string{"before", "after", "never"} {
				t.Run(answered, func(t *testing.T) {
					app := newScript(t)
					w := newWorld(t, mode, app.addr)
					c := w.dial()
					say(t, c, request)
					a := app.accept()
					expect(t, a, request)
					const bad = "HTTP/1.1 400 Bad\r\nContent-Length: 3\r\n\r\nbad"
					if answered == "before" {
						say(t, a, bad)
						expect(t, c, bad)
					}
					c.CloseWrite()
					expectEnd(t, a)
					if answered == "after" {
						say(t, a, bad)
						expect(t, c, bad)
					}
					a.Close()
					expectEnd(t, c)
					want := ""
					if answered == "never" {
						want = "client-gone"
					}
					if x := w.servers.wait(t, 1)[0]; x.Failure != want {
						t.Errorf("%+v", x)
					}
					if mode == meshed {
						if x := w.clients.wait(t, 1)[0]; x.Failure != want {
							t.Errorf("client's side: %+v", x)
						}
					}
					d := w.dial() // the broken connection is used for nobody else
					say(t, d, getB)
					b := app.accept()
					expect(t, b, getB)
					say(t, b, okayB)
					expect(t, d, okayB)
				})
			}
		})
	}
}

// TestClientStopsWaiting: a client that closes while it waits is what many servers
// look for to stop working; what they do then is not their failure.
func TestClientStopsWaiting(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		for _, end := range []string{"close", "reset"} {
			app := newScript(t)
			w := newWorld(t, mode, app.addr)
			c := w.dial()
			say(t, c, getA)
			a := app.accept()
			expect(t, a, getA)
			c.Close()
			expectEnd(t, a)
			if end == "reset" {
				reset(a)
			} else {
				a.Close()
			}
			if x := w.servers.wait(t, 1)[0]; x.Failure != "client-gone" {
				t.Errorf("%+v", x)
			}
			if mode == meshed {
				if x := w.clients.wait(t, 1)[0]; x.Failure != "client-gone" {
					t.Errorf("client's side: %+v", x)
				}
			}
		}
	})
}

// TestNetHTTPStopsWorking: net/http ends the request's context, as without a mesh.
func TestNetHTTPStopsWorking(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		working, stopped := make(chan bool), make(chan bool)
		app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/work" {
				return
			}
			working <- true
			<-r.Context().Done()
			stopped <- true
		})
		c := newWorld(t, mode, app).dial()
		say(t, c, "GET /work HTTP/1.1\r\nHost: a\r\n\r\n")
		<-working
		c.Close()
		select {
		case <-stopped:
		case <-time.After(10 * time.Second):
			t.Fatal("it still works")
		}
	})
}

// TestHalfCloseOnAKeptConnectionThatDies: the second try half-closes, too.
func TestHalfCloseOnAKeptConnectionThatDies(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		c := newWorld(t, mode, app.addr).dial()
		say(t, c, getA)
		a := app.accept()
		expect(t, a, getA)
		say(t, a, okay)
		expect(t, c, okay)
		say(t, c, getB)
		c.CloseWrite()
		expect(t, a, getB)
		expectEnd(t, a)
		a.Close()
		b := app.accept()
		expect(t, b, getB)
		expectEnd(t, b)
		say(t, b, okayB)
		expect(t, c, okayB)
		expectEnd(t, c)
	})
}

// TestHalfCloseIsCarriedToAnotherUpstream: also by the attempt that finds one.
func TestHalfCloseIsCarriedToAnotherUpstream(t *testing.T) {
	app := newScript(t)
	w := newWorld(t, meshed, app.addr, func(w *world) { w.refuse = []mux.Code{mux.Refused, mux.Refused} })
	c := w.dial()
	say(t, c, getA)
	c.CloseWrite()
	a := app.accept()
	expect(t, a, getA)
	expectEnd(t, a)
	say(t, a, okay)
	expect(t, c, okay)
	expectEnd(t, c)
}

// TestHalfCloseChurn half-closes at every moment of short exchanges: nobody's
// half-close may end somebody else's connection.
func TestHalfCloseChurn(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) })
		w := newWorld(t, mode, app, quiet)
		done := make(chan error)
		const workers = 8
		for i := range workers {
			go func() {
				var err error
				for j := 0; j < 150 && err == nil; j++ {
					err = halfCloser(w.addr, fmt.Sprintf("/%d/%d", i, j), i%2 == 0, time.Duration(j)*time.Microsecond)
				}
				done <- err
			}()
		}
		for range workers {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
}

// halfCloser makes one exchange. One that stays must have its answer.
func halfCloser(addr, path string, leaves bool, after time.Duration) error {
	nc, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	c := nc.(*net.TCPConn)
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: a\r\n\r\n", path)
	if leaves {
		if after > 0 {
			c.SetReadDeadline(time.Now().Add(after))
			c.Read(make([]byte, 1))
		}
		return nil
	}
	var got []byte
	for buf := make([]byte, 1024); !strings.HasSuffix(string(got), path); {
		n, err := c.Read(buf)
		if err != nil {
			return fmt.Errorf("%s: %q %w", path, got, err)
		}
		got = append(got, buf[:n]...)
	}
	return nil
}
