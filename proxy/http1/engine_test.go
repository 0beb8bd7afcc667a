package http1

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
)

// each runs a test through both forms of the engine.
func each(t *testing.T, f func(t *testing.T, mode string)) {
	for _, mode := range []string{meshed, plain} {
		t.Run(mode, func(t *testing.T) { f(t, mode) })
	}
}

// serveHTTP starts a net/http application.
func serveHTTP(t testing.TB, h http.HandlerFunc) string {
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func httpClient(t testing.TB) *http.Client {
	tr := &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func TestNetHTTP(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil {
				t.Error(err)
			}
			w.Header().Set("X-Trailer", r.Trailer.Get("Digest"))
			fmt.Fprintf(w, "%s %s %s %x", r.Method, r.URL, r.Host, sha256.Sum256(body))
		})
		w := newWorld(t, mode, app)
		client := httpClient(t)
		var clients sync.WaitGroup
		for i := range 8 {
			clients.Go(func() {
				for j := range 25 {
					size := 1 << (j % 20)
					body := bytes.Repeat([]byte{byte(i)}, size)
					var reader io.Reader = bytes.NewReader(body)
					if j%2 == 1 {
						reader = io.MultiReader(reader) // chunked
					}
					resp, err := client.Post(fmt.Sprintf("http://%s/x?i=%d&j=%d", w.addr, i, j), "text/plain", reader)
					if err != nil {
						t.Error(err)
						return
					}
					got, err := io.ReadAll(resp.Body)
					resp.Body.Close()
					want := fmt.Sprintf("POST /x?i=%d&j=%d %s %x", i, j, w.addr, sha256.Sum256(body))
					if err != nil || string(got) != want {
						t.Errorf("%v: got %s want %s", err, got, want)
					}
				}
			})
		}
		clients.Wait()
		for _, x := range w.servers.wait(t, 200) {
			if x.Failure != "" || x.Status != 200 || x.Duration <= 0 || x.RequestBytes == 0 || x.ResponseBytes == 0 {
				t.Errorf("%+v", x)
			}
		}
	})
}

func TestBytesAreExact(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := newScript(t)
		w := newWorld(t, mode, app.addr)
		c := w.dial()
		const request = "POST /a%20b?x=|y HTTP/1.1\r\nhOsT:  x \r\nX-Odd:\tcaf\xe9\t\r\nConnection: keep-alive, x-hop\r\nX-Hop: 1\r\ntransfer-ENCODING: chunked\r\n\r\n" +
			"0005;sig=\"a b\"\r\nhello\r\n1\r\n!\r\n000\r\nDigest: d\r\nx:\r\n\r\n"
		const response = "HTTP/1.1 200 Fine thanks\r\nserver:x\r\nTransfer-Encoding: chunked\r\nKeep-Alive: timeout=5\r\n\r\n3\r\nabc\r\n0\r\nT: 1\r\n\r\n"
		say(t, c, request)
		a := app.accept()
		expect(t, a, request)
		say(t, a, response)
		expect(t, c, response)
		for range 3 { // the same connections go on
			say(t, c, request)
			expect(t, a, request)
			say(t, a, response)
			expect(t, c, response)
		}
	})
}

func TestPipelining(t *testing.T) {
	each(t, func(t *testing.T, mode string) {
		app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			fmt.Fprintf(w, "%s:%s", r.URL.Path, body)
		})
		w := newWorld(t, mode, app)
		c := w.dial()
		var all strings.Builder
		const n = 300
		for i := range n {
			fmt.Fprintf(&all, "POST /%d HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n%03d", i, i)
		}
		go io.WriteString(c, all.String())
		in := bufio.NewReader(c)
		for i := range n {
			resp, err := http.ReadResponse(in, nil)
			if err != nil {
				t.Fatal(i, err)
			}
			body, err := io.ReadAll(resp.Body)
			if want := fmt.Sprintf("/%d:%03d", i, i); string(body) != want || err != nil {
				t.Fatalf("%d: %s %v, want %s", i, body, err, want)
			}
		}
	})
}
