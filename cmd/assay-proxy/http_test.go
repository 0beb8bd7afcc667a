package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/proxy/detect"
)

// web runs a net/http server in the workload.
func (m *workload) web(port int, h http.Handler) uint16 {
	m.w.t.Helper()
	l := m.listen(port)
	s := &http.Server{Handler: h}
	var wg sync.WaitGroup
	wg.Go(func() { s.Serve(l) })
	m.w.t.Cleanup(func() { s.Close(); wg.Wait() })
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

// browser is a net/http client in the workload.
func (m *workload) browser() *http.Client {
	tr := &http.Transport{DialContext: func(_ context.Context, _, addr string) (net.Conn, error) {
		return m.dial(netip.MustParseAddrPort(addr))
	}}
	m.w.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second}
}

func get(t testing.TB, c *http.Client, url string) (int, string) {
	t.Helper()
	resp, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestHTTP(t *testing.T) {
	w := newWorld(t)
	client, one, two := w.workload("client"), w.workload("server"), w.workload("server")
	handler := func(name string) http.Handler {
		mux := http.NewServeMux()
		mux.HandleFunc("/who", func(rw http.ResponseWriter, r *http.Request) {
			host, _, _ := net.SplitHostPort(r.RemoteAddr)
			fmt.Fprint(rw, name, " ", netip.MustParseAddr(host).Unmap())
		})
		mux.HandleFunc("/echo", func(rw http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			rw.Write(b)
		})
		mux.HandleFunc("/fail", func(rw http.ResponseWriter, r *http.Request) { rw.WriteHeader(500) })
		return mux
	}
	port := one.web(0, handler("one"))
	two.web(int(port), handler("two"))
	vip := w.service("web", 80, assay.Detect, port, one, two)
	base := "http://" + vip.String()
	c := client.browser()
	count := map[string]int{}
	requests := uint64(0)
	// One connection of the client's, both endpoints: requests are balanced. One whose
	// first answer was slow gets its next request when that is forgotten.
	for deadline := time.Now().Add(15 * time.Second); count["one"] < 5 || count["two"] < 5; requests++ {
		if time.Now().After(deadline) {
			t.Fatalf("answered by %v", count)
		}
		status, body := get(t, c, base+"/who")
		name, addr, _ := strings.Cut(body, " ")
		if status != 200 || addr != client.Addrs[0].String() {
			t.Fatalf("%d %q", status, body)
		}
		count[name]++
	}
	big := strings.Repeat("assay ", 1<<19)
	resp, err := c.Post(base+"/echo", "text/plain", io.MultiReader(strings.NewReader(big))) // chunked
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != big {
		t.Errorf("%d of %d bytes came back, %v", len(b), len(big), err)
	}
	resp.Body.Close()
	if status, _ := get(t, c, base+"/fail"); status != 500 {
		t.Errorf("status %d", status)
	}
	r := client.report()
	s := sum(r, func(k assay.SignalKey) bool {
		return k.Direction == assay.Outbound && k.Service == "bank/web" && k.Protocol == assay.HTTP1 && k.Peer == one.Identity
	})
	if s.Requests != requests+2 || s.Failures != 1 || s.InFlight != 0 || s.BytesIn < uint64(len(big)) || s.BytesOut < uint64(len(big)) {
		t.Errorf("client counted %+v", s)
	}
	if n := r.Counters.Detections[string(detect.ClientHTTP1)]; n != 1 {
		t.Errorf("%d detections, want one connection", n)
	}
	var in assay.Signals
	for _, m := range []*workload{one, two} {
		s := sum(m.report(), func(k assay.SignalKey) bool {
			return k.Direction == assay.Inbound && k.Service == "bank/web" && k.Protocol == assay.HTTP1 && k.Peer == client.Identity && k.Port == 80
		})
		in.Requests += s.Requests
		in.Failures += s.Failures
		in.InFlight += s.InFlight
	}
	if in.Requests != requests+2 || in.Failures != 1 || in.InFlight != 0 {
		t.Errorf("servers counted %+v", in)
	}
}

// TestLateHTTP: a client that connects early and asks late is still understood.
func TestLateHTTP(t *testing.T) {
	w := newWorld(t)
	client, server := w.workload("client"), w.workload("server")
	port := server.web(0, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "hello") }))
	vip := w.service("web", 80, assay.Detect, port, server)
	c := client.mustDial(vip)
	eventually(t, "the silent connection has reached the server", func() bool {
		return sum(server.report(), func(k assay.SignalKey) bool { return k.Direction == assay.Inbound }).Open == 1
	})
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: web\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || resp.StatusCode != 200 {
		t.Fatal(resp, err)
	}
	if n := client.report().Counters.Detections[string(detect.ClientHTTP1)]; n != 1 {
		t.Errorf("it was not recognised: %v", client.report().Counters.Detections)
	}
	eventually(t, "the server's proxy counts one HTTP connection and no other", func() bool {
		for _, s := range server.report().Signals {
			if s.Protocol != assay.HTTP1 || s.Requests != 1 {
				return false
			}
		}
		return true
	})
}

// TestHTTPFollowsEndpoints changes a service's endpoints under a connection that
// stays.
func TestHTTPFollowsEndpoints(t *testing.T) {
	w := newWorld(t)
	client, one, two := w.workload("client"), w.workload("server"), w.workload("server")
	port := one.web(0, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "one") }))
	two.web(int(port), http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "two") }))
	vip := w.service("web", 80, assay.Detect, port, one)
	c := client.browser()
	url := "http://" + vip.String() + "/"
	if _, body := get(t, c, url); body != "one" {
		t.Error(body)
	}
	w.service("web", 80, assay.Detect, port, two)
	if _, body := get(t, c, url); body != "two" {
		t.Error(body)
	}
	// Nobody is left: the request is answered, and says why.
	w.service("web", 80, assay.Detect, 0, two)
	if status, _ := get(t, c, url); status != 503 {
		t.Errorf("without endpoints: status %d", status)
	}
	if n := client.report().Counters.Refusals["no-ready-endpoint"]; n != 1 {
		t.Errorf("%d refusals, want 1", n)
	}
}

// TestHTTPRenewalUnderLoad renews both sides' certificates while requests run.
func TestHTTPRenewalUnderLoad(t *testing.T) {
	w := newWorld(t)
	fast := func(time.Time) time.Time { return time.Now().Add(150 * time.Millisecond) }
	client, server := w.prepare("client"), w.prepare("server")
	client.renewAt, server.renewAt = fast, fast
	client.start()
	server.start()
	client.awaitCertificate()
	server.awaitCertificate()
	port := server.web(0, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { io.Copy(rw, r.Body) }))
	vip := w.service("web", 80, assay.Detect, port, server)
	var requests atomic.Int64
	var wg sync.WaitGroup
	stop := time.Now().Add(3 * time.Second)
	for range 4 {
		c := client.browser()
		wg.Go(func() {
			for time.Now().Before(stop) {
				resp, err := c.Post("http://"+vip.String()+"/", "text/plain", strings.NewReader("renew"))
				if err != nil {
					t.Error(err)
					return
				}
				b, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if err != nil || string(b) != "renew" || resp.StatusCode != 200 {
					t.Errorf("%d %q, %v", resp.StatusCode, b, err)
					return
				}
				requests.Add(1)
			}
		})
	}
	wg.Wait()
	r := client.report()
	if r.Counters.Handshakes < 5 {
		t.Errorf("%d handshakes: too few to prove anything", r.Counters.Handshakes)
	}
	t.Logf("%d requests over %d handshakes", requests.Load(), r.Counters.Handshakes)
}

func TestGuestHTTP(t *testing.T) {
	w := newWorld(t)
	server, outsider := w.workload("server"), w.outsider()
	port := server.web(0, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, r.RemoteAddr) }))
	w.service("web", 80, assay.Detect, port, server)
	c := outsider.browser()
	for range 3 {
		status, body := get(t, c, fmt.Sprintf("http://%s:%d/", server.Addrs[0], port))
		if status != 200 || !strings.Contains(body, outsider.Addrs[0].String()) {
			t.Errorf("%d %q", status, body)
		}
	}
	s := sum(server.report(), func(k assay.SignalKey) bool {
		return k.Service == "bank/web" && k.Protocol == assay.HTTP1 && k.Security == assay.Plaintext && k.Reason == "outside"
	})
	if s.Requests != 3 || s.Failures != 0 {
		t.Errorf("counted %+v", s)
	}
}

// TestHTTPToItself: requests to a service of which the client is an endpoint.
func TestHTTPToItself(t *testing.T) {
	w := newWorld(t)
	self := w.workload("self")
	port := self.web(0, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "me") }))
	vip := w.service("web", 80, assay.Detect, port, self)
	c := self.browser()
	for range 3 {
		if status, body := get(t, c, "http://"+vip.String()+"/"); status != 200 || body != "me" {
			t.Errorf("%d %q", status, body)
		}
	}
}

// TestLateGuestHTTP: a plaintext client from outside that is silent for longer than it
// is waited for, and then speaks HTTP, is counted as that, in pieces too; the
// application's connection is the one that was made for it meanwhile.
func TestLateGuestHTTP(t *testing.T) {
	w := newWorld(t)
	server, outsider := w.workload("server"), w.outsider()
	accepted := make(chan net.Conn, 10)
	app := &http.Server{
		Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, r.RemoteAddr) }),
		ConnState: func(c net.Conn, state http.ConnState) {
			if state == http.StateNew {
				accepted <- c
			}
		},
	}
	l := server.listen(0)
	var serving sync.WaitGroup
	serving.Go(func() { app.Serve(l) })
	t.Cleanup(func() { app.Close(); serving.Wait() })
	port := l.Addr().(*net.TCPAddr).AddrPort().Port()
	w.service("web", 80, assay.Detect, port, server)
	const rest = " /late HTTP/1.1\r\nHost: web\r\n\r\n"
	for n, pieces := range [][]string{{"GET" + rest}, {"GE", "T" + rest}, {"GET /la", "te HTTP/1.", "1\r\nHost: web\r\n\r\n"}} {
		c := outsider.mustDial(netip.AddrPortFrom(server.Addrs[0], port))
		<-accepted // the proxy has stopped waiting
		r := bufio.NewReader(c)
		for i, p := range append(pieces, "GET"+rest) {
			io.WriteString(c, p)
			if i < len(pieces)-1 {
				continue
			}
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatalf("%q: %v", pieces, err)
			}
			body, err := io.ReadAll(resp.Body)
			if resp.StatusCode != 200 || err != nil || !strings.Contains(string(body), outsider.Addrs[0].String()) {
				t.Errorf("%q: %d %q, %v; the client is %s", pieces, resp.StatusCode, body, err, c.LocalAddr())
			}
		}
		c.Close()
		want := uint64(2 * (n + 1))
		eventually(t, "the requests are counted", func() bool {
			s := sum(server.report(), func(k assay.SignalKey) bool {
				return k.Service == "bank/web" && k.Protocol == assay.HTTP1 && k.Security == assay.Plaintext && k.Reason == "outside"
			})
			return s.Requests == want && s.Failures == 0 && s.Open == 0
		})
	}
	if len(accepted) > 0 {
		t.Errorf("the application was connected to %d times more", len(accepted))
	}
	// What only begins like HTTP is relayed as it came.
	c := outsider.mustDial(netip.AddrPortFrom(server.Addrs[0], port))
	<-accepted
	io.WriteString(c, "GET me nothing\r\n\r\n")
	if b, err := io.ReadAll(c); !strings.HasPrefix(string(b), "HTTP/1.1 400") || err != nil {
		t.Errorf("the application's own answer is %q, %v", b, err)
	}
	s := sum(server.report(), func(k assay.SignalKey) bool { return k.Protocol == assay.Opaque && k.Reason == "outside" })
	if s.Opened != 1 {
		t.Errorf("%d opaque connections, want 1", s.Opened)
	}
}
