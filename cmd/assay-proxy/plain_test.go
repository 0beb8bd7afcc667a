package main

import (
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
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// newCluster is a world without networks of its own: any address may be anybody's, as
// in a cluster that is meshed in part.
func newCluster(t *testing.T) *world {
	w := newWorld(t)
	w.mesh = nil
	return w
}

// unmeshed is the endpoint of a machine without a proxy.
func unmeshed(m *workload, targets ...uint16) assay.Endpoint {
	return assay.Endpoint{Workload: m.ID, Addrs: m.Addrs, Targets: targets}
}

// isMeshed is that of a workload.
func isMeshed(m *workload, targets ...uint16) assay.Endpoint {
	return assay.Endpoint{Workload: m.ID, Identity: m.Identity, Addrs: m.Addrs, Targets: targets}
}

// cluster publishes a service of one port.
func (w *world) cluster(name string, protocol assay.Protocol, list ...assay.Endpoint) netip.AddrPort {
	w.t.Helper()
	s := assay.Service{Namespace: "bank", Name: name, Ports: []assay.Port{{Port: 80, Protocol: protocol}}, Endpoints: list}
	w.mu.Lock()
	if old, ok := w.services[s.Key()]; ok {
		s.VIPs = old.VIPs
	} else {
		s.VIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 182, 0, byte(len(w.services) + 1)})}
	}
	w.services[s.Key()] = s
	w.mu.Unlock()
	w.publish()
	return netip.AddrPortFrom(s.VIPs[0], 80)
}

// plainly is what was counted as plaintext to an endpoint of a service.
func plainly(m *workload, service string) assay.Signals {
	return sum(m.report(), func(k assay.SignalKey) bool {
		return k.Direction == assay.Outbound && k.Service == service && k.Security == assay.Plaintext && k.Reason == assay.ReasonUnmeshed
	})
}

// TestUnmeshedEndpoint: whatever is spoken, an endpoint that is not meshed is reached
// from the workload's own address, and every connection is an exception that is listed.
func TestUnmeshedEndpoint(t *testing.T) {
	w := newCluster(t)
	client, legacy := w.workload("client"), w.bare("legacy")

	t.Run("opaque", func(t *testing.T) {
		from := make(chan string, 1)
		vip := w.cluster("opaque", assay.Detect, unmeshed(legacy, legacy.serve(0, func(c *net.TCPConn) {
			from <- c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().String()
			echo(c)
			c.CloseWrite()
		})))
		c := client.mustDial(vip)
		big := strings.Repeat("\x00opaque", 1<<17)
		go func() { io.WriteString(c, big); c.CloseWrite() }()
		if b, err := io.ReadAll(c); err != nil || string(b) != big {
			t.Errorf("%d of %d bytes came back, %v", len(b), len(big), err)
		}
		if addr := <-from; addr != client.Addrs[0].String() {
			t.Errorf("it saw %s", addr)
		}
		eventually(t, "the connection is counted", func() bool {
			s := plainly(client, "bank/opaque")
			return s.Opened == 1 && s.Open == 0 && s.BytesIn == uint64(len(big)) && s.BytesOut == uint64(len(big))
		})
		s := sum(client.report(), func(k assay.SignalKey) bool { return k.Remote == legacy.Addrs[0].String() && k.Port == 80 })
		if s.Opened != 1 {
			t.Errorf("nothing says where it went: %+v", client.report().Signals)
		}
	})
	t.Run("server speaks first", func(t *testing.T) {
		vip := w.cluster("greeter", assay.Detect, unmeshed(legacy, legacy.serve(0, func(c *net.TCPConn) {
			io.WriteString(c, "220 ready\r\n")
			echo(c)
		})))
		c := client.mustDial(vip)
		b := make([]byte, 11)
		if _, err := io.ReadFull(c, b); err != nil || string(b) != "220 ready\r\n" {
			t.Fatalf("%q, %v", b, err)
		}
		if got := exchange(t, c, "EHLO\r\n"); got != "EHLO\r\n" {
			t.Error(got)
		}
	})
	t.Run("reset", func(t *testing.T) {
		vip := w.cluster("rude", assay.Detect, unmeshed(legacy, legacy.serve(0, func(c *net.TCPConn) {
			io.ReadFull(c, make([]byte, 1))
			c.SetLinger(0)
		})))
		expectReset(t, client.mustDial(vip), "\x00hello")
	})
	t.Run("http1", func(t *testing.T) {
		vip := w.cluster("web", assay.Detect, unmeshed(legacy, legacy.web(0, http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			b, _ := io.ReadAll(r.Body)
			fmt.Fprint(rw, string(b), r.Proto, " ", r.RemoteAddr[:strings.LastIndexByte(r.RemoteAddr, ':')])
		}))))
		c := client.browser()
		for range 20 {
			if code, body := get(t, c, "http://"+vip.String()+"/"); code != 200 || body != "HTTP/1.1 "+client.Addrs[0].String() {
				t.Fatalf("%d %q", code, body)
			}
		}
		big := strings.Repeat("assay ", 1<<18)
		resp, err := c.Post("http://"+vip.String()+"/", "text/plain", io.MultiReader(strings.NewReader(big)))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || !strings.HasPrefix(string(b), big) {
			t.Errorf("%d bytes, %v", len(b), err)
		}
		if s := plainly(client, "bank/web"); s.Requests != 21 || s.Failures != 0 || s.InFlight != 0 || s.BytesIn < uint64(len(big)) {
			t.Errorf("counted %+v", s)
		}
	})
	t.Run("http2", func(t *testing.T) {
		vip := w.cluster("web2", assay.Detect, unmeshed(legacy, legacy.web2(0, func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, r.Proto) })))
		c := client.browser2()
		for range 20 {
			if code, body := get(t, c, "http://"+vip.String()+"/"); code != 200 || body != "HTTP/2.0" {
				t.Fatalf("%d %q", code, body)
			}
		}
		if s := plainly(client, "bank/web2"); s.Requests != 20 || s.Failures != 0 {
			t.Errorf("counted %+v", s)
		}
	})
	t.Run("grpc", func(t *testing.T) {
		port, server, _ := legacy.rpc(0)
		server.SetServingStatus("x", healthpb.HealthCheckResponse_SERVING)
		stub := client.stub(w.cluster("rpc", assay.Detect, unmeshed(legacy, port)))
		if r, err := stub.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "x"}); err != nil || r.Status != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("%v, %v", r, err)
		}
		if _, err := stub.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "y"}); status.Code(err) != codes.NotFound {
			t.Errorf("%v", err)
		}
	})
	if n := client.report().Counters.Handshakes; n != 0 {
		t.Errorf("%d handshakes", n)
	}
}

// TestUnmeshedEndpointsAreBalanced: with the meshed ones, and one that refuses to connect is
// passed over.
func TestUnmeshedEndpointsAreBalanced(t *testing.T) {
	w := newCluster(t)
	client, one, two := w.workload("client"), w.workload("one"), w.bare("two")
	name := func(s string) http.Handler {
		return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, s) })
	}
	port := one.web(0, name("one"))
	two.web(int(port), name("two"))
	closed := two.listen(0)
	nobody := closed.Addr().(*net.TCPAddr).AddrPort().Port()
	closed.Close()
	refuses := unmeshed(two, nobody)
	refuses.Workload = "three"
	vip := w.cluster("web", assay.Detect, isMeshed(one, port), unmeshed(two, port), refuses)
	c := client.browser()
	count := map[string]int{}
	for deadline := time.Now().Add(30 * time.Second); count["one"] < 5 || count["two"] < 5; {
		if time.Now().After(deadline) {
			t.Fatalf("answered by %v", count)
		}
		code, body := get(t, c, "http://"+vip.String()+"/")
		if code != 200 {
			t.Fatalf("%d %q", code, body)
		}
		count[body]++
	}
	if s := plainly(client, "bank/web"); s.Requests != uint64(count["two"]) || s.Failures != 0 {
		t.Errorf("%v, counted %+v", count, s)
	}
	tcp := w.cluster("tcp", assay.Opaque, unmeshed(two, two.serve(0, echo)), refuses)
	for range 20 {
		if got := exchange(t, client.mustDial(tcp), "hello"); got != "hello" {
			t.Fatal(got)
		}
	}
}

// TestMeshedIsNeverPlain: services say that an endpoint is not meshed, and go on to say so,
// while it comes into the mesh. From the moment that the table has its address not a
// byte for it is in plaintext, on connections that were there before neither; and no
// request fails on the way.
func TestMeshedIsNeverPlain(t *testing.T) {
	w := newCluster(t)
	client, server := w.workload("client"), w.bare("server")
	handler := func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, r.URL.Query().Get("q")) }
	web := w.cluster("web", assay.Detect, unmeshed(server, server.web(0, http.HandlerFunc(handler))))
	web2 := w.cluster("web2", assay.Detect, unmeshed(server, server.web2(0, handler)))
	tcp := w.cluster("tcp", assay.Detect, unmeshed(server, server.serve(0, echo)))
	c, c2 := client.browser(), client.browser2()
	ask := func(text string) {
		t.Helper()
		for vip, c := range map[netip.AddrPort]*http.Client{web: c, web2: c2} {
			if code, body := get(t, c, "http://"+vip.String()+"/?q="+text); code != 200 || body != text {
				t.Fatalf("%s: %d %q", vip, code, body)
			}
		}
		if got := exchange(t, client.mustDial(tcp), text); got != text {
			t.Fatalf("%s: %q", tcp, got)
		}
	}
	ask("before")

	// Requests that run all the time, on connections that are older than the change.
	stop := make(chan struct{})
	var load sync.WaitGroup
	for vip, c := range map[netip.AddrPort]*http.Client{web: client.browser(), web2: client.browser2()} {
		load.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				resp, err := c.Get("http://" + vip.String() + "/?q=load")
				if err != nil {
					t.Errorf("request %d to %s: %v", n, vip, err)
					return
				}
				b, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if err != nil || resp.StatusCode != 200 || string(b) != "load" {
					t.Errorf("request %d to %s: %d %q, %v", n, vip, resp.StatusCode, b, err)
					return
				}
			}
		})
	}
	server.capturing()
	server.start()
	server.awaitCertificate()
	wire := w.watch()
	w.mu.Lock()
	server.MeshedSince = time.Now()
	w.mu.Unlock()
	w.publish() // the table: services are as they were
	was := plainly(client, "bank/web").Requests + plainly(client, "bank/web2").Requests + plainly(client, "bank/tcp").Opened
	for range 10 {
		ask(secret)
	}
	close(stop)
	load.Wait()
	if is := plainly(client, "bank/web").Requests + plainly(client, "bank/web2").Requests + plainly(client, "bank/tcp").Opened; is != was {
		t.Errorf("%d requests and connections in plaintext to a meshed address", is-was)
	}
	s := sum(client.report(), func(k assay.SignalKey) bool { return k.Security == assay.MutualTLS && k.Peer == server.Identity })
	if s.Requests < 20 || s.Opened < 10 {
		t.Errorf("under mutual TLS: %+v", s)
	}
	w.expectWatched(wire, client)
}

// TestUnmeshedInStrictEgress: where egress is strict an endpoint that is not meshed is as
// any other destination outside: an Egress names its service or holds its address, or it is
// refused, with a finding. What is meshed is reached all the same.
func TestUnmeshedInStrictEgress(t *testing.T) {
	w := newCluster(t)
	client, one, two := w.workload("client"), w.workload("one"), w.bare("two")
	port := one.serve(0, echo)
	two.serve(int(port), echo)
	vip := w.cluster("web", assay.Opaque, unmeshed(two, port))
	reaches := func(to netip.AddrPort) {
		t.Helper()
		if got := exchange(t, client.mustDial(to), "hello"); got != "hello" {
			t.Error(got)
		}
	}
	set := func(rules ...assay.EgressRule) {
		w.mu.Lock()
		w.settings.Egress, w.settings.Allow = assay.Strict, rules
		w.mu.Unlock()
		w.publish()
	}
	reaches(vip)
	set()
	client.dialExpectReset(vip, "hello")
	if n := client.report().Counters.Refusals["egress-unlisted"]; n != 1 {
		t.Errorf("refused %d", n)
	}
	eventually(t, "the finding arrives", func() bool { return client.found("egress-unlisted") == 1 })
	if s := plainly(client, "bank/web"); s.Opened != 1 {
		t.Errorf("dialled: %+v", s)
	}
	set(assay.EgressRule{Name: "other", Hosts: []string{"other.bank"}, Ports: []uint16{80}},
		assay.EgressRule{Name: "port", Hosts: []string{"web.bank"}, Ports: []uint16{81}})
	client.dialExpectReset(vip, "hello")
	for name, rule := range map[string]assay.EgressRule{
		"name":      {Hosts: []string{"web.bank"}, Ports: []uint16{80}},
		"full name": {Hosts: []string{"web.bank.svc.mesh.test"}, Ports: []uint16{80}},
		"namespace": {Hosts: []string{"*.bank.svc"}, Ports: []uint16{80}},
		"address":   {Addresses: []netip.Prefix{netip.PrefixFrom(two.Addrs[0], 32), netip.PrefixFrom(two.Addrs[1], 128)}, Ports: []uint16{port}},
	} {
		rule.Name = "rule"
		set(rule)
		t.Run(name, func(t *testing.T) { reaches(vip) })
	}
	set()
	w.cluster("web", assay.Opaque, unmeshed(two, port), isMeshed(one, port))
	for range 10 {
		reaches(vip)
	}
	if s := sum(client.report(), func(k assay.SignalKey) bool { return k.Peer == one.Identity && k.Security == assay.MutualTLS }); s.Opened != 10 {
		t.Errorf("meshed: %+v", s)
	}
}

// TestUnmeshedDirect: clients that choose an endpoint of a headless service themselves.
func TestUnmeshedDirect(t *testing.T) {
	w := newCluster(t)
	client, two := w.workload("client"), w.bare("two")
	port := two.serve(0, echo)
	w.mu.Lock()
	s := assay.Service{Namespace: "bank", Name: "db", Headless: true, Ports: []assay.Port{{Port: 5432}}, Endpoints: []assay.Endpoint{unmeshed(two, port)}}
	w.services[s.Key()] = s
	w.mu.Unlock()
	w.publish()
	to := netip.AddrPortFrom(two.Addrs[0], port)
	if got := exchange(t, client.mustDial(to), "hello\n"); got != "hello\n" {
		t.Error(got)
	}
	if s := plainly(client, "bank/db"); s.Opened != 1 {
		t.Errorf("counted %+v", client.report().Signals)
	}
	w.mu.Lock()
	w.settings.Egress = assay.Strict
	w.mu.Unlock()
	w.publish()
	client.dialExpectReset(to, "hello\n")
	w.mu.Lock()
	w.settings.Allow = []assay.EgressRule{{Name: "db", Hosts: []string{"db.bank.svc"}, Ports: []uint16{5432}}}
	w.mu.Unlock()
	w.publish()
	if got := exchange(t, client.mustDial(to), "hello\n"); got != "hello\n" {
		t.Error(got)
	}
}
