package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/proxy/detect"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func priorKnowledge() *http.Protocols {
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	return p
}

// web2 runs a net/http server that speaks HTTP/2 in the workload.
func (m *workload) web2(port int, h http.HandlerFunc) uint16 {
	m.w.t.Helper()
	l := m.listen(port)
	s := &http.Server{Handler: h, Protocols: priorKnowledge()}
	var wg sync.WaitGroup
	wg.Go(func() { s.Serve(l) })
	m.w.t.Cleanup(func() { s.Close(); wg.Wait() })
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

// browser2 is a net/http client of HTTP/2 in the workload.
func (m *workload) browser2() *http.Client {
	tr := &http.Transport{Protocols: priorKnowledge(), DialContext: func(_ context.Context, _, addr string) (net.Conn, error) {
		c, err := m.dial(netip.MustParseAddrPort(addr))
		if err == nil {
			c.SetDeadline(time.Time{})
		}
		return c, err
	}}
	m.w.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: time.Minute}
}

func TestHTTP2(t *testing.T) {
	w := newWorld(t)
	client, one, two := w.workload("client"), w.workload("server"), w.workload("server")
	handler := func(name string) http.HandlerFunc {
		return func(rw http.ResponseWriter, r *http.Request) {
			host, _, _ := net.SplitHostPort(r.RemoteAddr)
			switch r.URL.Path {
			case "/who":
				fmt.Fprint(rw, name, " ", netip.MustParseAddr(host).Unmap(), " ", r.Proto)
			case "/echo":
				io.Copy(rw, r.Body)
			default:
				rw.WriteHeader(500)
			}
		}
	}
	port := one.web2(0, handler("one"))
	two.web2(int(port), handler("two"))
	vip := w.service("web", 80, assay.Detect, port, one, two)
	base := "http://" + vip.String()
	c := client.browser2()
	count := map[string]int{}
	requests := uint64(0)
	// One connection of the client's, both endpoints: requests are balanced.
	for deadline := time.Now().Add(time.Minute); count["one"] < 5 || count["two"] < 5; requests++ {
		if time.Now().After(deadline) {
			t.Fatalf("answered by %v", count)
		}
		code, body := get(t, c, base+"/who")
		f := strings.Fields(body)
		if code != 200 || len(f) != 3 || f[1] != client.Addrs[0].String() || f[2] != "HTTP/2.0" {
			t.Fatalf("%d %q", code, body)
		}
		count[f[0]]++
	}
	big := strings.Repeat("assay ", 1<<19)
	resp, err := c.Post(base+"/echo", "text/plain", strings.NewReader(big))
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(resp.Body); err != nil || string(b) != big {
		t.Errorf("%d of %d bytes came back, %v", len(b), len(big), err)
	}
	resp.Body.Close()
	if code, _ := get(t, c, base+"/fail"); code != 500 {
		t.Errorf("status %d", code)
	}
	var s assay.Signals
	eventually(t, "the client's proxy has counted everything", func() bool {
		s = sum(client.report(), func(k assay.SignalKey) bool {
			return k.Direction == assay.Outbound && k.Service == "bank/web" && k.Protocol == assay.HTTP2 && k.Peer == one.Identity
		})
		return s.Requests == requests+2 && s.InFlight == 0
	})
	if s.Failures != 1 || s.BytesIn < uint64(len(big)) || s.BytesOut < uint64(len(big)) {
		t.Errorf("client counted %+v", s)
	}
	if n := client.report().Counters.Detections[string(detect.ClientHTTP2)]; n != 1 {
		t.Errorf("%d detections, want one connection", n)
	}
	var in assay.Signals
	for _, m := range []*workload{one, two} {
		s := sum(m.report(), func(k assay.SignalKey) bool {
			return k.Direction == assay.Inbound && k.Service == "bank/web" && k.Protocol == assay.HTTP2 && k.Peer == client.Identity && k.Port == 80
		})
		in.Requests += s.Requests
		in.Failures += s.Failures
		in.InFlight += s.InFlight
	}
	if in.Requests != requests+2 || in.Failures != 1 || in.InFlight != 0 {
		t.Errorf("servers counted %+v", in)
	}
}

// rpc runs a gRPC server in the workload.
func (m *workload) rpc(port int, options ...grpc.ServerOption) (uint16, *health.Server, *grpc.Server) {
	m.w.t.Helper()
	l := m.listen(port)
	s := grpc.NewServer(options...)
	h := health.NewServer()
	healthpb.RegisterHealthServer(s, h)
	s.RegisterService(&bulk, nil)
	var wg sync.WaitGroup
	wg.Go(func() { s.Serve(l) })
	m.w.t.Cleanup(func() { s.Stop(); wg.Wait() })
	return l.Addr().(*net.TCPAddr).AddrPort().Port(), h, s
}

func (m *workload) stub(to netip.AddrPort) healthpb.HealthClient {
	return healthpb.NewHealthClient(m.channel(to))
}

// channel is a gRPC connection of the workload's.
func (m *workload) channel(to netip.AddrPort) *grpc.ClientConn {
	m.w.t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+to.String(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			c, err := m.dial(to)
			if err == nil {
				c.SetDeadline(time.Time{})
			}
			return c, err
		}))
	if err != nil {
		m.w.t.Fatal(err)
	}
	m.w.t.Cleanup(func() { conn.Close() })
	return conn
}

// bulk is a gRPC service that returns every message, or counts the bytes of all.
var bulk = grpc.ServiceDesc{ServiceName: "test.Bulk", HandlerType: (*any)(nil), Streams: []grpc.StreamDesc{
	{StreamName: "Echo", ClientStreams: true, ServerStreams: true, Handler: func(_ any, s grpc.ServerStream) error {
		for {
			var m wrapperspb.BytesValue
			if err := s.RecvMsg(&m); err != nil {
				return eof(err)
			}
			if err := s.SendMsg(&m); err != nil {
				return err
			}
		}
	}},
	{StreamName: "Count", ClientStreams: true, Handler: func(_ any, s grpc.ServerStream) error {
		for n := uint64(0); ; {
			var m wrapperspb.BytesValue
			if err := s.RecvMsg(&m); err == io.EOF {
				return s.SendMsg(wrapperspb.UInt64(n))
			} else if err != nil {
				return err
			}
			n += uint64(len(m.Value))
		}
	}},
}}

func eof(err error) error {
	if err == io.EOF {
		return nil
	}
	return err
}

// TestGRPCBulk carries what is larger than every window on the way, in both directions at
// once, and streams of thousands of messages.
func TestGRPCBulk(t *testing.T) {
	w := newWorld(t)
	client, server := w.workload("client"), w.workload("server")
	const largest = 8 << 20
	port, _, _ := server.rpc(0, grpc.MaxRecvMsgSize(largest+100))
	vip := w.service("bulk", 50051, assay.Detect, port, server)
	conn := client.channel(vip)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	open := func(method string) grpc.ClientStream {
		st, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/test.Bulk/"+method, grpc.MaxCallRecvMsgSize(largest+100), grpc.MaxCallSendMsgSize(largest+100))
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	// exchange sends messages of these sizes, and reads each of them back meanwhile.
	exchange := func(sizes []int) {
		st := open("Echo")
		var sending sync.WaitGroup
		defer sending.Wait()
		sending.Go(func() {
			for i, n := range sizes {
				if err := st.SendMsg(wrapperspb.Bytes(bytes.Repeat([]byte{byte(i)}, n))); err != nil {
					t.Errorf("message %d: %v", i, err)
					return
				}
			}
			st.CloseSend()
		})
		for i, n := range sizes {
			var m wrapperspb.BytesValue
			if err := st.RecvMsg(&m); err != nil || len(m.Value) != n || bytes.Count(m.Value, []byte{byte(i)}) != n {
				t.Errorf("message %d of %d bytes came back with %d, %v", i, n, len(m.Value), err)
				return
			}
		}
		if err := st.RecvMsg(&wrapperspb.BytesValue{}); err != io.EOF {
			t.Errorf("the end: %v", err)
		}
	}
	many := make([]int, 3000)
	for i := range many {
		many[i] = i * 37 % 5000
	}
	var streams sync.WaitGroup
	for range 3 {
		streams.Go(func() { exchange([]int{largest, 0, largest, 1}) })
		streams.Go(func() { exchange(many) })
		streams.Go(func() {
			st, total := open("Count"), uint64(0)
			for i := range 2000 {
				if err := st.SendMsg(wrapperspb.Bytes(make([]byte, i))); err != nil {
					t.Errorf("message %d: %v", i, err)
					return
				}
				total += uint64(i)
			}
			st.CloseSend()
			var n wrapperspb.UInt64Value
			if err := st.RecvMsg(&n); err != nil || n.Value != total {
				t.Errorf("%d of %d bytes were counted, %v", n.Value, total, err)
			}
		})
	}
	streams.Wait()
	eventually(t, "every message is counted", func() bool {
		var sent, got uint64
		for _, s := range client.report().Signals {
			sent, got = sent+s.MessagesOut, got+s.MessagesIn
		}
		return sent == 3*(4+3000+2000) && got == 3*(4+3000+1)
	})
}

// TestGRPC balances the calls of one connection, and counts what they ended with.
func TestGRPC(t *testing.T) {
	w := newWorld(t)
	client, one, two := w.workload("client"), w.workload("server"), w.workload("server")
	var mu sync.Mutex
	from := map[string]int{}
	seen := func(name string) grpc.ServerOption {
		return grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
			p, _ := peer.FromContext(ctx)
			host, _, _ := net.SplitHostPort(p.Addr.String())
			mu.Lock()
			from[name+" "+netip.MustParseAddr(host).Unmap().String()]++
			mu.Unlock()
			grpc.SetTrailer(ctx, metadata.Pairs("x-name", name))
			return handle(ctx, req)
		})
	}
	port, h1, _ := one.rpc(0, seen("one"))
	two.rpc(int(port), seen("two"))
	vip := w.service("rpc", 50051, assay.Detect, port, one, two)
	stub := client.stub(vip)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	const n = 400
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range n / 8 {
				var tr metadata.MD
				if _, err := stub.Check(ctx, &healthpb.HealthCheckRequest{}, grpc.Trailer(&tr)); err != nil || len(tr["x-name"]) != 1 {
					t.Error(tr, err)
					return
				}
			}
		})
	}
	wg.Wait()
	mu.Lock()
	if a := client.Addrs[0].String(); from["one "+a] < 5 || from["two "+a] < 5 || from["one "+a]+from["two "+a] != n {
		t.Errorf("calls came from %v", from)
	}
	mu.Unlock()
	if _, err := stub.Check(ctx, &healthpb.HealthCheckRequest{Service: "nothing"}); status.Code(err) != codes.NotFound {
		t.Errorf("status of an unknown service: %v", err)
	}
	watch, err := stub.Watch(ctx, &healthpb.HealthCheckRequest{Service: "till"})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := watch.Recv(); err != nil || m.Status != healthpb.HealthCheckResponse_SERVICE_UNKNOWN {
		t.Fatal(m, err)
	}
	h1.Shutdown()
	short, stop := context.WithTimeout(ctx, 100*time.Millisecond)
	defer stop()
	quiet, err := stub.Watch(short, &healthpb.HealthCheckRequest{Service: "other"})
	for err == nil {
		_, err = quiet.Recv()
	}
	if status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("after the deadline: %v", err)
	}
	eventually(t, "everything is counted", func() bool {
		var sent, got uint64
		ok, notFound := uint64(0), uint64(0)
		for _, s := range client.report().Signals {
			if s.Direction == assay.Outbound && s.Protocol == assay.HTTP2 {
				sent, got = sent+s.MessagesOut, got+s.MessagesIn
				ok, notFound = ok+s.GRPC["OK"], notFound+s.GRPC["NOT_FOUND"]
			}
		}
		return ok == n && notFound == 1 && sent >= n+1 && got >= n
	})
	// Nobody is left: the call says so in gRPC's way.
	w.service("rpc", 50051, assay.Detect, 0, one, two)
	if _, err := stub.Check(ctx, &healthpb.HealthCheckRequest{}); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "no-ready-endpoint") {
		t.Errorf("without endpoints: %v", err)
	}
}

// TestHTTP2Renewal renews both sides' certificates while requests and a stream run.
func TestHTTP2Renewal(t *testing.T) {
	w := newWorld(t)
	fast := func(time.Time) time.Time { return time.Now().Add(150 * time.Millisecond) }
	client, server := w.prepare("client"), w.prepare("server")
	client.renewAt, server.renewAt = fast, fast
	client.start()
	server.start()
	client.awaitCertificate()
	server.awaitCertificate()
	port := server.web2(0, func(rw http.ResponseWriter, r *http.Request) { io.Copy(rw, r.Body) })
	vip := w.service("web", 80, assay.Detect, port, server)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	defer wg.Wait()
	defer close(stop)
	c := client.browser2()
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
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
			}
		})
	}
	eventually(t, "certificates were renewed some times", func() bool {
		return t.Failed() || client.report().Counters.Handshakes >= 5
	})
}

func TestGuestHTTP2(t *testing.T) {
	w := newWorld(t)
	server, outsider := w.workload("server"), w.outsider()
	port := server.web2(0, func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, r.RemoteAddr) })
	w.service("web", 80, assay.Detect, port, server)
	c := outsider.browser2()
	for range 3 {
		code, body := get(t, c, fmt.Sprintf("http://%s:%d/", server.Addrs[0], port))
		if code != 200 || !strings.Contains(body, outsider.Addrs[0].String()) {
			t.Errorf("%d %q", code, body)
		}
	}
	var s assay.Signals
	eventually(t, "three requests are counted", func() bool {
		s = sum(server.report(), func(k assay.SignalKey) bool {
			return k.Service == "bank/web" && k.Protocol == assay.HTTP2 && k.Security == assay.Plaintext && k.Reason == "outside"
		})
		return s.Requests == 3
	})
	if s.Failures != 0 {
		t.Errorf("counted %+v", s)
	}
}

// TestHTTP2ToItself: requests to a service of which the client is an endpoint.
func TestHTTP2ToItself(t *testing.T) {
	w := newWorld(t)
	self := w.workload("self")
	port := self.web2(0, func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "me") })
	vip := w.service("web", 80, assay.Detect, port, self)
	c := self.browser2()
	for range 3 {
		if code, body := get(t, c, "http://"+vip.String()+"/"); code != 200 || body != "me" {
			t.Errorf("%d %q", code, body)
		}
	}
}

// TestHTTP2Refused: what breaks the protocol ends its connection with a reason, and counts.
func TestHTTP2Refused(t *testing.T) {
	w := newWorld(t)
	client, server := w.workload("client"), w.workload("server")
	port := server.web2(0, func(rw http.ResponseWriter, r *http.Request) {})
	vip := w.service("web", 80, assay.HTTP2, port, server)
	c := client.mustDial(vip)
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: web\r\n\r\n")
	b, err := io.ReadAll(c)
	if err != nil || !bytes.Contains(b, []byte("preface")) {
		t.Errorf("%q, %v", b, err)
	}
	eventually(t, "it is counted", func() bool { return client.report().Counters.Refusals["http2-preface"] == 1 })
	// An application that does not listen.
	vip = w.service("none", 80, assay.HTTP2, 1, server)
	if code, body := get(t, client.browser2(), "http://"+vip.String()+"/"); code != 503 || !strings.Contains(body, "refused the connection") {
		t.Errorf("%d %q", code, body)
	}
}
