package http2

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
)

// serveHTTP starts an application of net/http that speaks HTTP/2 with prior knowledge.
func serveHTTP(t testing.TB, h http.HandlerFunc) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h, Protocols: priorKnowledge(), HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 250}}
	var running sync.WaitGroup
	running.Go(func() { s.Serve(l) })
	t.Cleanup(func() { s.Close(); running.Wait() })
	return l.Addr().String()
}

func priorKnowledge() *http.Protocols {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	return p
}

// httpClient is net/http's client with prior knowledge.
func httpClient(t testing.TB) *http.Client {
	tr := &http.Transport{Protocols: priorKnowledge(), DisableCompression: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func TestNetHTTP(t *testing.T) {
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		w.Header().Set("Trailer", "X-Sum")
		w.Header().Set("X-Got", r.Trailer.Get("X-Sent"))
		fmt.Fprintf(w, "%s %s %s %d", r.Method, r.URL, r.Host, len(body))
		w.Write(body)
		w.Header().Set("X-Sum", fmt.Sprintf("%x", sha256.Sum256(body)))
	})
	for _, slow := range []bool{false, true} {
		t.Run(fmt.Sprint("slow=", slow), func(t *testing.T) {
			w := newWorld(t, app, func(w *world) { w.slow = slow })
			client := httpClient(t)
			var clients sync.WaitGroup
			for i := range 8 {
				clients.Go(func() {
					for j := range 25 {
						size := 1 << (j % 21)
						body := bytes.Repeat([]byte{byte('a' + i)}, size)
						req, _ := http.NewRequest("POST", fmt.Sprintf("http://%s/x?i=%d&j=%d", w.addr, i, j), bytes.NewReader(body))
						if j%2 == 1 {
							req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), -1
							req.Trailer = http.Header{"X-Sent": {"yes"}}
						}
						resp, err := client.Do(req)
						if err != nil {
							t.Error(err)
							return
						}
						got, err := io.ReadAll(resp.Body)
						resp.Body.Close()
						want := fmt.Sprintf("POST /x?i=%d&j=%d %s %d%s", i, j, w.addr, size, body)
						if err != nil || string(got) != want {
							t.Errorf("%v: got %d bytes want %d", err, len(got), len(want))
						}
						if sum := resp.Trailer.Get("X-Sum"); sum != fmt.Sprintf("%x", sha256.Sum256(body)) {
							t.Errorf("trailer %q", sum)
						}
						if j%2 == 1 && resp.Header.Get("X-Got") != "yes" {
							t.Errorf("the request's trailer did not arrive")
						}
					}
				})
			}
			clients.Wait()
			for _, r := range []*record{&w.clients, &w.servers} {
				for _, x := range r.wait(t, 200) {
					if x.Failure != "" || x.Status != 200 || x.Duration <= 0 || x.RequestBytes == 0 || x.ResponseBytes == 0 {
						t.Errorf("%+v", x)
					}
				}
			}
		})
	}
}

func TestBulk(t *testing.T) {
	big := strings.Repeat("0123456789abcdef", 4<<20/16)
	app := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })
	w := newWorld(t, app)
	client := httpClient(t)
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for range 3 {
				resp, err := client.Post("http://"+w.addr+"/", "text/plain", strings.NewReader(big))
				if err != nil {
					t.Error(err)
					return
				}
				got, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if err != nil || string(got) != big {
					t.Errorf("%d bytes of %d, %v", len(got), len(big), err)
				}
			}
		})
	}
	clients.Wait()
}
