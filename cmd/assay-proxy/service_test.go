package main

import (
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"assay.dev"
)

// say publishes a service of a port for each protocol, to which say adds what it says.
func (w *world) say(name string, say func(*assay.Service), list ...assay.Endpoint) (vip netip.Addr) {
	w.t.Helper()
	s := assay.Service{Namespace: "bank", Name: name, Endpoints: list, Ports: []assay.Port{
		{Name: "http", Port: 80, Protocol: assay.HTTP1}, {Name: "grpc", Port: 81, Protocol: assay.HTTP2}, {Name: "tcp", Port: 82, Protocol: assay.Opaque}}}
	say(&s)
	w.mu.Lock()
	s.VIPs = []netip.Addr{netip.AddrFrom4([4]byte{10, 182, 1, byte(len(w.services) + 1)})}
	if old, ok := w.services[s.Key()]; ok {
		s.VIPs = old.VIPs
	}
	w.services[s.Key()] = s
	w.mu.Unlock()
	w.publish()
	return s.VIPs[0]
}

// three are workloads that say their names in each protocol.
func (w *world) three() (list []assay.Endpoint) {
	for i := range 3 {
		m := w.workload(fmt.Sprint("server-", i))
		name := func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, m.ID) }
		list = append(list, isMeshed(m, m.web(0, http.HandlerFunc(name)), m.web2(0, name), m.serve(0, func(c *net.TCPConn) { io.WriteString(c, m.ID) })))
	}
	return list
}

// answers returns who answers in each protocol, by n requests or connections, "" being nobody.
func (m *workload) answers(at netip.Addr, n int) (http1, http2, opaque map[string]bool) {
	http1, http2, opaque = map[string]bool{}, map[string]bool{}, map[string]bool{}
	read := func(c *http.Client, port uint16) string {
		resp, err := c.Get("http://" + netip.AddrPortFrom(at, port).String() + "/")
		if err != nil {
			return ""
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		if resp.StatusCode != 200 {
			return ""
		}
		return string(b)
	}
	one, two := m.browser(), m.browser2()
	for range n {
		http1[read(one, 80)], http2[read(two, 81)] = true, true
		b := []byte(nil)
		if c, err := m.dial(netip.AddrPortFrom(at, 82)); err == nil {
			c.SetReadDeadline(time.Now().Add(20 * time.Second))
			b, _ = io.ReadAll(c)
			c.Close()
		}
		opaque[string(b)] = true
	}
	return http1, http2, opaque
}

// TestAffinity: whatever is spoken, a client stays at its endpoint until that is gone.
func TestAffinity(t *testing.T) {
	w := newWorld(t)
	client, servers := w.workload("client"), w.three()
	one := func(vip netip.Addr) (who []string) {
		t.Helper()
		a, b, c := client.answers(vip, 30)
		for i, m := range []map[string]bool{a, b, c} {
			if len(m) != 1 || m[""] {
				t.Fatalf("port %d: %v answer one client", 80+i, m)
			}
			for name := range m {
				who = append(who, name)
			}
		}
		return who
	}
	sticky := func(s *assay.Service) { s.Affinity = time.Hour }
	vip := w.say("sticky", sticky, servers...)
	first := one(vip)
	if again := one(vip); fmt.Sprint(again) != fmt.Sprint(first) {
		t.Errorf("%v, then %v", first, again)
	}
	// Without the one of its requests, and with the others where they were.
	var left []assay.Endpoint
	for _, e := range servers {
		if e.Workload == first[0] {
			e.Targets = []uint16{0, e.Targets[1], e.Targets[2]}
		}
		left = append(left, e)
	}
	w.say("sticky", sticky, left...)
	moved := one(vip)
	if moved[0] == first[0] || moved[1] != first[1] || moved[2] != first[2] {
		t.Errorf("%v, then without the first's port 80 %v", first, moved)
	}
	w.say("sticky", sticky, servers...)
	if now := one(vip); fmt.Sprint(now) != fmt.Sprint(moved) {
		t.Errorf("it was back, and the client went from %v to %v", moved, now)
	}
	w.say("sticky", func(*assay.Service) {}, servers...)
	eventually(t, "without affinity others answer, too", func() bool {
		a, b, c := client.answers(vip, 20)
		return len(a) > 1 && len(b) > 1 && len(c) > 1
	})
}

// TestLocal: endpoints of the client's host, and no other's; without any the refusal says why.
func TestLocal(t *testing.T) {
	w := newWorld(t)
	client := w.prepare("client")
	client.Host = "host-1"
	client.start()
	client.awaitCertificate()
	servers := w.three()
	for i := range servers {
		servers[i].Host = fmt.Sprint("host-", i)
	}
	local := func(s *assay.Service) { s.Local = true }
	vip := w.say("local", local, servers...)
	for i, who := range func() []map[string]bool { a, b, c := client.answers(vip, 20); return []map[string]bool{a, b, c} }() {
		if len(who) != 1 || !who[servers[1].Workload] {
			t.Errorf("port %d: %v answer", 80+i, who)
		}
	}
	w.say("local", local, servers[0], servers[2])
	if a, b, c := client.answers(vip, 3); len(a)+len(b)+len(c) != 3 || !a[""] || !b[""] || !c[""] {
		t.Errorf("other hosts' endpoints answer: %v, %v, %v", a, b, c)
	}
	if n := client.report().Counters.Refusals["no-local-endpoint"]; n < 9 {
		t.Errorf("%d refusals say why: %v", n, client.report().Counters.Refusals)
	}
	// It is told that it is on another host.
	w.say("local", local, servers...)
	client.Host = "host-2"
	client.mu.Lock()
	conn := client.conn
	client.mu.Unlock()
	client.configure(conn, false)
	eventually(t, "it is on another host", func() bool {
		a, b, c := client.answers(vip, 5)
		return len(a)+len(b)+len(c) == 3 && a[servers[2].Workload] && b[servers[2].Workload] && c[servers[2].Workload]
	})
}

// TestHints: hints for hosts before those for zones, and none where none is for the client.
func TestHints(t *testing.T) {
	w := newWorld(t)
	client := w.prepare("client")
	client.Host, client.Zone = "host-1", "west"
	client.start()
	client.awaitCertificate()
	servers := w.three()
	// Who answered slowly once is left alone for a while.
	ask := func(change func(i int, e *assay.Endpoint), want string) (got string) {
		list := make([]assay.Endpoint, len(servers))
		for i, e := range servers {
			change(i, &e)
			list[i] = e
		}
		vip, all := w.say("web", func(*assay.Service) {}, list...), map[string]bool{}
		eventually(t, "everybody who may answers", func() bool {
			who, _, _ := client.answers(vip, 20)
			maps.Copy(all, who)
			got = ""
			for i, e := range servers {
				if all[e.Workload] {
					got += fmt.Sprint(i, " ")
				}
			}
			return len(got) >= len(want)
		})
		return got
	}
	for name, tc := range map[string]struct {
		change func(i int, e *assay.Endpoint)
		want   string
	}{
		"for hosts": {func(i int, e *assay.Endpoint) { e.Hosts, e.Zones = []string{fmt.Sprint("host-", i)}, []string{"west"} }, "1 "},
		"for zones": {func(i int, e *assay.Endpoint) {
			e.Hosts, e.Zones = []string{"host-9"}, []string{"west", "north", "west"}[i:i+1]
		}, "0 2 "},
		"for none": {func(_ int, e *assay.Endpoint) { e.Hosts, e.Zones = []string{"host-9"}, []string{"south"} }, "0 1 2 "},
	} {
		if got := ask(tc.change, tc.want); got != tc.want {
			t.Errorf("hints %s: %s answer, want %s", name, got, tc.want)
		}
	}
}

// TestExternals: at its balancer's address or a node's port a service is reached as at its own; where a
// workload has that address, it is that one which is meant.
func TestExternals(t *testing.T) {
	w := newWorld(t)
	client, servers := w.workload("client"), w.three()
	balancer := netip.MustParseAddr("203.0.113.7")
	other := w.workload("other")
	port := other.serve(80, func(c *net.TCPConn) { io.ReadFull(c, make([]byte, 1)); io.WriteString(c, "other") })
	w.say("web", func(s *assay.Service) {
		s.Externals, s.Ports[0].NodePort = []netip.Addr{balancer, other.Addrs[0]}, 30080
	}, servers[0])
	for i, who := range func() []map[string]bool { a, b, c := client.answers(balancer, 5); return []map[string]bool{a, b, c} }() {
		if len(who) != 1 || !who[servers[0].Workload] {
			t.Errorf("port %d: %v answer", 80+i, who)
		}
	}
	resp, err := client.browser().Get("http://203.0.113.9:30080/")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(resp.Body); string(b) != servers[0].Workload {
		t.Errorf("at a node's port %q answers, %v", b, err)
	}
	resp.Body.Close()
	s := sum(client.report(), func(k assay.SignalKey) bool { return k.Service == "bank/web" && k.Security == assay.MutualTLS })
	if s.Requests < 10 || s.Opened < 5 {
		t.Errorf("under mutual TLS: %+v", s)
	}
	if s := sum(client.report(), func(k assay.SignalKey) bool { return k.Security == assay.Plaintext }); s.Opened > 0 {
		t.Errorf("in plaintext: %+v", s)
	}
	if got := exchange(t, client.mustDial(netip.AddrPortFrom(other.Addrs[0], port)), "?????"); got != "other" {
		t.Errorf("a workload's own address: %q", got)
	}
}

// TestServiceOfAnotherNamespace: who may write services, endpoints and routes in one namespace
// says nothing about what is at the addresses of another, or outside: those who dial them are not
// led elsewhere, nothing is read as what it is not, and no application is told who comes.
func TestServiceOfAnotherNamespace(t *testing.T) {
	w := newCluster(t)
	client, victim, legacy, mitm := w.workload("client"), w.workload("victim"), w.bare("legacy"), w.workload("mitm")
	name := func(s string) http.Handler {
		return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, s) })
	}
	metrics, far, raw := victim.web(0, name("victim")), legacy.web(0, name("legacy")), victim.serve(0, echo)
	addr := func(m *workload, port uint16) netip.AddrPort { return netip.AddrPortFrom(m.Addrs[0], port) }
	w.mu.Lock()
	evil := func(name string, protocol assay.Protocol, list ...assay.Endpoint) assay.Service {
		s := assay.Service{Namespace: "a-evil", Name: name, Ports: []assay.Port{{Port: 80, Protocol: protocol}}, Endpoints: list}
		w.services[s.Key()] = s
		return s
	}
	parent := evil("lure", assay.Detect, isMeshed(victim, metrics), assay.Endpoint{Addrs: legacy.Addrs, Targets: []uint16{far}})
	to := evil("mitm", assay.Detect, isMeshed(mitm, mitm.web(0, name("mitm"))))
	reads := evil("reads", assay.HTTP1, isMeshed(victim, raw))
	tells := evil("tells", assay.Opaque, isMeshed(victim, raw))
	for _, s := range []assay.Service{reads, tells} {
		s.Ports[0].ProxyProtocol, s.Ports[0].ForwardClientCert = s.Name == "tells", s.Name == "reads"
	}
	own := assay.Service{Namespace: "bank", Name: "own", Ports: []assay.Port{{Port: 80}}, Endpoints: []assay.Endpoint{isMeshed(victim, metrics)}}
	any := []assay.RouteMatch{{Path: assay.PathMatch{Type: assay.PathPrefix, Value: "/"}}}
	route := func(namespace, parent string) assay.Route {
		return assay.Route{Kind: assay.HTTPRoute, Namespace: namespace, Name: "r", Parents: []assay.RouteParent{{Service: parent}},
			Rules: []assay.RouteRule{{Matches: any, Backends: []assay.RouteBackend{{Service: to.Key(), Port: 80, Weight: 1}}}}}
	}
	w.routes = []assay.Route{route("a-evil", parent.Key())}
	w.mu.Unlock()
	w.publish()
	c := client.browser()
	for want, at := range map[string]netip.AddrPort{"victim": addr(victim, metrics), "legacy": addr(legacy, far)} {
		if code, body := get(t, c, "http://"+at.String()+"/"); code != 200 || body != want {
			t.Errorf("%d %q, want %q", code, body, want)
		}
	}
	if got := exchange(t, client.mustDial(addr(victim, raw)), "\x00raw"); got != "\x00raw" {
		t.Errorf("%q", got)
	}
	if got := exchange(t, legacy.mustDial(addr(victim, raw)), "\x00raw"); got != "\x00raw" {
		t.Errorf("from outside: %q", got)
	}

	// Its own routes hold for who dials it, and nobody else takes them away.
	w.mu.Lock()
	w.services[own.Key()] = own
	w.routes = append(w.routes, route("bank", own.Key()))
	w.mu.Unlock()
	w.publish()
	if code, body := get(t, client.browser(), "http://"+addr(victim, metrics).String()+"/"); code != 200 || body != "mitm" {
		t.Errorf("a route of its own namespace: %d %q", code, body)
	}
}
