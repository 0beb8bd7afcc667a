// Package soak runs every protocol for a long time on a bad network, beside clients and
// servers that misbehave. What behaves must lose nothing, and the proxies must not grow.
package soak

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"assay.dev/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

// soakEnv is how long the soak lasts; without it a short one shows that it works.
const soakEnv = "ASSAY_SOAK"

const (
	portHTTP = 8080
	portEcho = 7000 // the server speaks first, then echoes
	portGRPC = 9000
	greeting = "hello from the server\n"
	large    = 2 << 20
)

// bounds of growth, from the end of the first quarter to the end.
const (
	moreDescriptors = 24
	moreMemory      = 8 << 20 // anonymous
)

func TestSoak(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent")
	length := 24 * time.Second
	if s := os.Getenv(soakEnv); s != "" {
		var err error
		if length, err = time.ParseDuration(s); err != nil {
			t.Fatalf("%s: %v", soakEnv, err)
		}
	}
	w := lab.NewWorld(t, lab.Meshed)
	server := w.Workload(t, "shop", lab.Spec{Ports: []int{portHTTP, portEcho, portGRPC}})
	client := w.Workload(t, "buyer", lab.Spec{})
	serve(t, server)
	for _, port := range []int{portHTTP, portEcho, portGRPC} {
		w.AwaitService(t, client, "shop", port)
	}
	proxies := map[string]int{"shop": w.Mesh.Proxy(server), "buyer": w.Mesh.Proxy(client)}

	s := &soak{t: t, client: client, at: client.Target(t, "shop", portHTTP).Addr()}
	ctx, stop := context.WithCancel(t.Context())
	t.Cleanup(func() { stop(); s.wg.Wait() })
	s.begin(ctx)
	w.MustExec(t, "nft", "-f", w.Write(t, "/tmp/loss.nft", loss))
	defer os.Remove(w.Path("/tmp/loss.nft"))
	defer w.Exec(t, "nft", "delete", "table", "bridge", "soak")

	wait := func(d time.Duration) {
		select {
		case <-time.After(d):
		case <-ctx.Done():
		}
	}
	wait(length / 4)
	first := measure(t, proxies)
	worst := first
	for end := time.Now().Add(length - length/4); time.Now().Before(end) && !t.Failed(); {
		wait(length / 20)
		now := measure(t, proxies)
		for name, m := range now {
			x := worst[name]
			worst[name] = use{max(x.memory, m.memory), max(x.descriptors, m.descriptors), max(x.threads, m.threads)}
		}
	}
	last := measure(t, proxies)
	stop()
	s.wg.Wait()
	var quiet map[string]use
	lab.Eventually(t, 60*time.Second, "everything that was opened is closed", func() error {
		quiet = measure(t, proxies)
		for name, m := range quiet {
			if m.descriptors > 48 {
				return fmt.Errorf("%s has %d descriptors", name, m.descriptors)
			}
		}
		return nil
	})
	for name, a := range first {
		b := last[name]
		t.Logf("%s: after a quarter %s, worst %s, at the end %s, idle %s", name, a, worst[name], b, quiet[name])
		if b.memory > a.memory+a.memory/4+moreMemory {
			t.Errorf("%s grew from %s to %s", name, a, b)
		}
		if b.descriptors > a.descriptors+a.descriptors/2+moreDescriptors {
			t.Errorf("%s had %d descriptors, and %d at the end", name, a.descriptors, b.descriptors)
		}
	}
	var all int64
	for _, k := range s.kinds {
		t.Logf("%-12s %7d done, %d lost", k.name, k.done.Load(), k.lost.Load())
		all += k.done.Load()
		if k.done.Load() == 0 {
			t.Errorf("%s did nothing", k.name)
		}
	}
	out := w.Exec(t, "nft", "list", "table", "bridge", "soak").Stdout
	t.Logf("%d in all over %s, %d misbehaviours; the network: %s", all, length, s.mischief.Load(), strings.Join(strings.Fields(out), " "))
}

// loss drops one packet in two hundred between the workloads. The kernel of a test
// machine often has no netem; what waits for a retransmission is delayed enough.
const loss = `table bridge soak {
	counter lost {}
	chain forward {
		type filter hook forward priority 0; policy accept;
		ether type { ip, ip6 } numgen random mod 200 < 1 counter name lost drop
	}
}
`

// use is what a proxy holds.
type use struct {
	memory      int64 // anonymous, bytes
	descriptors int
	threads     int
}

func (u use) String() string {
	return fmt.Sprintf("%.1f MB, %d descriptors, %d threads", float64(u.memory)/1e6, u.descriptors, u.threads)
}

func measure(t *testing.T, proxies map[string]int) map[string]use {
	t.Helper()
	out := map[string]use{}
	for name, pid := range proxies {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			t.Fatalf("the proxy of %s is gone: %v", name, err)
		}
		var u use
		for line := range strings.Lines(string(status)) {
			f := strings.Fields(line)
			switch f[0] {
			case "RssAnon:":
				n, _ := strconv.ParseInt(f[1], 10, 64)
				u.memory = n << 10
			case "Threads:":
				u.threads, _ = strconv.Atoi(f[1])
			}
		}
		list, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil {
			t.Fatal(err)
		}
		u.descriptors = len(list)
		out[name] = u
	}
	return out
}

// serve is a server of all protocols. Some of its paths misbehave.
func serve(t *testing.T, w *lab.Workload) {
	w.Serve(t, portEcho, func(c *net.TCPConn) {
		io.WriteString(c, greeting)
		io.Copy(c, c)
		c.CloseWrite()
	})
	block := bytes.Repeat([]byte("assay"), large/5)
	mux := http.NewServeMux()
	mux.HandleFunc("/small", func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "ok\n") })
	mux.HandleFunc("/large", func(rw http.ResponseWriter, r *http.Request) { rw.Write(block) })
	mux.HandleFunc("/upload", func(rw http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		fmt.Fprintf(rw, "%d\n", n)
	})
	mux.HandleFunc("/events", func(rw http.ResponseWriter, r *http.Request) { // a stream without a length
		for i := range 10 {
			fmt.Fprintf(rw, "data: %d\n\n", i)
			rw.(http.Flusher).Flush()
			select {
			case <-r.Context().Done():
				return
			case <-time.After(20 * time.Millisecond):
			}
		}
	})
	mux.HandleFunc("/never", func(rw http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	mux.HandleFunc("/reset", func(rw http.ResponseWriter, r *http.Request) {
		c, _, err := rw.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	})
	web := &http.Server{Handler: mux}
	rpc := grpc.NewServer()
	healthpb.RegisterHealthServer(rpc, health.NewServer())
	l, l2 := w.Listen(t, portHTTP), w.Listen(t, portGRPC)
	var done sync.WaitGroup
	done.Go(func() { web.Serve(l) })
	done.Go(func() { rpc.Serve(l2) })
	t.Cleanup(func() { web.Close(); rpc.Stop(); done.Wait() })
}

// soak is the load and the mischief.
type soak struct {
	t        *testing.T
	client   *lab.Workload
	at       netip.Addr
	wg       sync.WaitGroup
	kinds    []*kind
	mischief atomic.Int64
}

// kind is one sort of well-behaved work.
type kind struct {
	name       string
	done, lost atomic.Int64
}

func (s *soak) dial(port uint16) (net.Conn, error) {
	return s.client.Dial(netip.AddrPortFrom(s.at, port))
}

func (s *soak) begin(ctx context.Context) {
	kept := s.http(false)
	single := s.http(true)
	body := bytes.Repeat([]byte("upload"), large/6)
	s.work(ctx, "requests", 4, 2*time.Millisecond, func(ctx context.Context) error { return get(ctx, kept, "/small", 3) })
	s.work(ctx, "connections", 2, 10*time.Millisecond, func(ctx context.Context) error { return get(ctx, single, "/small", 3) })
	s.work(ctx, "downloads", 1, 50*time.Millisecond, func(ctx context.Context) error { return get(ctx, kept, "/large", large/5*5) })
	s.work(ctx, "events", 2, 10*time.Millisecond, func(ctx context.Context) error { return get(ctx, kept, "/events", -1) })
	s.work(ctx, "uploads", 1, 50*time.Millisecond, func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, "POST", "http://shop/upload", struct{ io.Reader }{bytes.NewReader(body)}) // chunked
		if err != nil {
			return err
		}
		return do(kept, req, len(fmt.Sprintln(len(body))))
	})
	s.work(ctx, "sessions", 2, 5*time.Millisecond, s.session)
	s.calls(ctx)

	s.misbehave(ctx, 20*time.Millisecond, func(c net.Conn) { // goes away in the middle of a request
		io.WriteString(c, "POST /upload HTTP/1.1\r\nHost: shop\r\nContent-Length: 100000\r\n\r\nabc")
		c.(*net.TCPConn).SetLinger(0)
	})
	s.misbehave(ctx, 50*time.Millisecond, func(c net.Conn) { // its server dies in the middle of an answer
		io.WriteString(c, "GET /reset HTTP/1.1\r\nHost: shop\r\n\r\n")
		io.Copy(io.Discard, c)
	})
	s.misbehave(ctx, 50*time.Millisecond, func(c net.Conn) { io.WriteString(c, "GET / HTTP/1.1\nHost: shop\r\n\r\n"); io.Copy(io.Discard, c) })
	s.misbehave(ctx, 200*time.Millisecond, func(c net.Conn) { // asks for much and reads little of it
		io.WriteString(c, "GET /large HTTP/1.1\r\nHost: shop\r\n\r\n")
		io.ReadFull(c, make([]byte, 1000))
		pause(ctx, 2*time.Second)
	})
	for range 8 { // slowloris, and clients whose server never answers
		s.misbehave(ctx, 100*time.Millisecond, func(c net.Conn) {
			for _, b := range []byte("GET /small HTTP/1.1\r\nHost: sh") {
				if _, err := c.Write([]byte{b}); err != nil || !pause(ctx, 100*time.Millisecond) {
					return
				}
			}
		})
		s.misbehave(ctx, 100*time.Millisecond, func(c net.Conn) {
			io.WriteString(c, "GET /never HTTP/1.1\r\nHost: shop\r\n\r\n")
			pause(ctx, time.Second)
		})
	}
	s.misbehave(ctx, 30*time.Millisecond, func(c net.Conn) {}) // connects, and that is all
}

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// work runs f again and again. None may fail.
func (s *soak) work(ctx context.Context, name string, n int, every time.Duration, f func(context.Context) error) {
	k := &kind{name: name}
	s.kinds = append(s.kinds, k)
	for range n {
		s.wg.Go(func() {
			for ctx.Err() == nil {
				one, cancel := context.WithTimeout(context.WithoutCancel(ctx), 60*time.Second)
				err := f(one)
				cancel()
				if err == nil {
					k.done.Add(1)
				} else if k.lost.Add(1) < 5 {
					s.t.Errorf("%s: %v", name, err)
				}
				pause(ctx, every)
			}
		})
	}
}

// misbehave does what a server or a client should not, on the port of HTTP.
func (s *soak) misbehave(ctx context.Context, every time.Duration, f func(net.Conn)) {
	s.wg.Go(func() {
		for pause(ctx, every) {
			c, err := s.dial(portHTTP)
			if err != nil {
				continue
			}
			c.SetDeadline(time.Now().Add(5 * time.Second))
			f(c)
			c.Close()
			s.mischief.Add(1)
		}
	})
}

func (s *soak) http(single bool) *http.Client {
	tr := &http.Transport{DisableKeepAlives: single, MaxIdleConnsPerHost: 16, DialContext: func(context.Context, string, string) (net.Conn, error) { return s.dial(portHTTP) }}
	s.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func get(ctx context.Context, c *http.Client, path string, want int) error {
	req, err := http.NewRequestWithContext(ctx, "GET", "http://shop"+path, nil)
	if err != nil {
		return err
	}
	return do(c, req, want)
}

func do(c *http.Client, req *http.Request, want int) error {
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	n, err := io.Copy(io.Discard, resp.Body)
	if err != nil {
		return fmt.Errorf("after %d bytes: %w", n, err)
	}
	if resp.StatusCode != 200 || want >= 0 && int(n) != want {
		return fmt.Errorf("%s with %d bytes, want %d", resp.Status, n, want)
	}
	return nil
}

// session is a server-first conversation with a half-close at its end.
func (s *soak) session(ctx context.Context) error {
	c, err := s.dial(portEcho)
	if err != nil {
		return err
	}
	defer c.Close()
	deadline, _ := ctx.Deadline()
	c.SetDeadline(deadline)
	got := make([]byte, len(greeting))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != greeting {
		return fmt.Errorf("greeting %q: %w", got, err)
	}
	sent := bytes.Repeat([]byte("x"), 30_000)
	if _, err := c.Write(sent); err != nil {
		return err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	back, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(back, sent) {
		return fmt.Errorf("%d of %d bytes came back: %w", len(back), len(sent), err)
	}
	return nil
}

// calls are unary, and a stream that lives as long as the soak.
func (s *soak) calls(ctx context.Context) {
	conn, err := grpc.NewClient("passthrough:///shop", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return s.dial(portGRPC) }))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	h := healthpb.NewHealthClient(conn)
	s.work(ctx, "calls", 2, 5*time.Millisecond, func(ctx context.Context) error {
		_, err := h.Check(ctx, &healthpb.HealthCheckRequest{})
		return err
	})
	k := &kind{name: "streams"}
	s.kinds = append(s.kinds, k)
	s.wg.Go(func() {
		watch, err := h.Watch(ctx, &healthpb.HealthCheckRequest{})
		if err == nil {
			_, err = watch.Recv()
		}
		if err != nil {
			s.t.Errorf("streams: %v", err)
			return
		}
		k.done.Add(1)
		if _, err := watch.Recv(); ctx.Err() == nil {
			k.lost.Add(1)
			s.t.Errorf("a stream ended: %v", err)
		}
	})
}
