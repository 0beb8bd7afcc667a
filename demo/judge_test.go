package demo

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/demo/wire"
)

// perfect is the evidence of a play in which nothing went wrong.
func perfect() *evidence {
	const td = "assay.local"
	artifact := assay.DigestOf([]byte("the bank"))
	gateway := netip.MustParseAddr("10.181.0.1")
	ev := &evidence{
		trustDomain: td, artifact: artifact, ready: time.Second, meshed: time.Second,
		addresses: map[netip.Addr]map[name]struct{}{},
		presented: map[netip.AddrPort]presentation{},
		outside:   map[string]attempt{},
		gateway:   map[netip.Addr]struct{}{gateway: {}},
		loads:     []loadResult{{act: "load", summary: loadSummary{Requests: 100}}},
		first: []probeResult{
			{Probed: times{MS: []float64{90, 60}, P50: 60}, Direct: times{MS: []float64{1, 1}, P50: 1}}, // a busy moment
			{Probed: times{MS: []float64{3, 1}, P50: 1}, Direct: times{MS: []float64{1, 0.2}, P50: 0.2}},
		},
		outage: outage{length: 5 * time.Second, before: map[int]string{7: "100"}, after: map[int]string{7: "100", 9: "300"}},
		script: assay.Workload{ID: "s1", Name: "script", Artifacts: assay.ArtifactSet{{Unproven: "an interpreter"}}},
	}
	identity := func(n name) assay.Identity {
		return assay.Identity{TrustDomain: td, Namespace: n.namespace, Account: n.account}
	}
	next := gateway
	home := map[name]netip.Addr{}
	live := func(n name, port uint16) {
		next = next.Next()
		ev.addresses[next] = map[name]struct{}{n: {}}
		home[n] = next
		if port == 0 {
			return
		}
		ev.members = append(ev.members, assay.Workload{ID: n.account + next.String(), Identity: identity(n), Addrs: []netip.Addr{next},
			Ports: []uint16{port}, MeshedSince: time.Unix(1, 0)})
		ev.presented[netip.AddrPortFrom(next, port)] = presentation{Identity: identity(n), Artifacts: artifact}
	}
	for _, m := range cast {
		for range m.replicas {
			live(name{m.namespace, m.name}, m.port)
		}
	}
	live(load, 0)
	live(probe, 0)
	ev.wire.Packets = 1000
	for i, w := range wanted {
		ev.edges = append(ev.edges, assay.Edge{
			Client: assay.Party{Identity: identity(w.client), Artifacts: artifact},
			Server: assay.Party{Identity: identity(w.server), Artifacts: artifact},
			Port:   w.port, Security: assay.MutualTLS, SeenBy: []assay.Direction{assay.Outbound, assay.Inbound}, Requests: 10,
		})
		ev.wire.Conns = append(ev.wire.Conns, wire.Conn{
			Client: netip.AddrPortFrom(home[w.client], uint16(40000+i)), Server: netip.AddrPortFrom(home[w.server], w.port),
			Up: wire.Direction{Bytes: 500, Speaks: "tls", Application: 5}, Down: wire.Direction{Bytes: 500, Speaks: "tls", Application: 5},
			Hello: wire.Hello{ALPN: []string{"assay/1"}}, Version: tls13,
		})
	}
	member := func(n name) assay.Workload {
		return ev.members[slices.IndexFunc(ev.members, func(w assay.Workload) bool { return nameOf(w.Identity) == n })]
	}
	ev.edges = append(ev.edges, assay.Edge{Server: assay.Party{Identity: identity(web), Artifacts: artifact}, Port: 8080,
		Security: assay.Plaintext, Reason: "the client is not in the mesh", SeenBy: []assay.Direction{assay.Inbound}, Requests: 1})
	ev.outside[web.String()] = attempt{answer: "HTTP/1.1 200 OK"}
	ev.outside[payments.String()] = attempt{err: errors.New("connection reset by peer")}
	ev.findings = []assay.Finding{{Workload: member(payments).ID, Kind: "plaintext", Subject: gateway.String(), Detail: "refused", Remedy: "join the mesh"}}
	ev.wire.Conns = append(ev.wire.Conns,
		wire.Conn{Client: netip.AddrPortFrom(gateway, 50000), Server: netip.AddrPortFrom(home[web], 8080),
			Up: wire.Direction{Bytes: 9, Speaks: "http/1"}, Down: wire.Direction{Bytes: 9, Speaks: "http/1"}, Found: []string{Marker}},
		wire.Conn{Client: netip.AddrPortFrom(gateway, 50001), Server: netip.AddrPortFrom(home[payments], 50051),
			Up: wire.Direction{Bytes: 9, Speaks: "http/2"}, Reset: true})
	return ev
}

func bad(list []Verdict) (checks []string) {
	for _, v := range list {
		if !v.OK {
			checks = append(checks, v.Check)
		}
	}
	return checks
}

func TestJudge(t *testing.T) {
	if list := judge(perfect()); bad(list) != nil {
		t.Fatalf("a perfect play fails: %+v", list)
	}
	other := assay.Identity{TrustDomain: "assay.local", Namespace: "front", Account: "other"}
	cases := []struct {
		name  string
		spoil func(ev *evidence)
		want  string // checks that must fail, and no others
	}{
		{"slow start", func(ev *evidence) { ev.ready = 4 * time.Second }, "ready in time"},
		{"replica missing", func(ev *evidence) { ev.members[2].MeshedSince = time.Time{} }, "every service is meshed"},
		{"edge missing", func(ev *evidence) { ev.edges = ev.edges[1:] }, "every expected edge"},
		{"edge idle", func(ev *evidence) { ev.edges[0].Requests = 0 }, "every expected edge"},
		{"one end silent", func(ev *evidence) { ev.edges[0].SeenBy = ev.edges[0].SeenBy[:1] }, "every expected edge"},
		{"foreign trust domain", func(ev *evidence) { ev.edges[0].Server.Identity.TrustDomain = "evil.local" }, "every expected edge, no other edge"},
		{"other edge", func(ev *evidence) {
			e := ev.edges[0]
			e.Client.Identity = other
			ev.edges = append(ev.edges, e)
		}, "no other edge"},
		{"plaintext from outside to another", func(ev *evidence) {
			ev.edges = append(ev.edges, assay.Edge{Server: ev.edges[4].Server, Security: assay.Plaintext, Reason: "outside", Requests: 2, Failures: 1})
		}, "no other edge"},
		{"edge in clear", func(ev *evidence) { ev.edges[3].Security = assay.Plaintext }, "mutual TLS on every edge"},
		{"other artifact", func(ev *evidence) { ev.edges[3].Client.Artifacts = assay.DigestOf(nil) }, "artifacts at both ends"},
		{"no artifact", func(ev *evidence) { ev.edges[3].Server.Artifacts = "" }, "artifacts at both ends"},
		{"wrong identity", func(ev *evidence) {
			for at, p := range ev.presented {
				p.Identity = other
				ev.presented[at] = p
			}
		}, "identities, as a peer sees them"},
		{"certificate of nobody", func(ev *evidence) {
			for at := range ev.presented {
				ev.presented[at] = presentation{Err: errors.New("unknown authority")}
			}
		}, "identities, as a peer sees them"},
		{"certificate not read", func(ev *evidence) { clear(ev.presented) }, "identities, as a peer sees them"},
		{"failed requests", func(ev *evidence) { ev.loads[0].summary.Failures = 1 }, "no request failed"},
		{"failures that only the mesh saw", func(ev *evidence) { ev.edges[1].Failures = 1 }, "no request failed"},
		{"no load", func(ev *evidence) { ev.loads = nil }, "no request failed"},
		{"load broke", func(ev *evidence) { ev.loads[0].err = errors.New("exit status 1") }, "no request failed"},
		{"marker on the wire", func(ev *evidence) { ev.wire.Conns[2].Found = []string{Marker} }, "nothing readable on the links"},
		{"clear protocol", func(ev *evidence) { ev.wire.Conns[2].Down.Speaks = "nats" }, "nothing readable on the links, TLS 1.3 seen on the links"},
		{"marker in UDP", func(ev *evidence) { ev.wire.Other = []string{Marker} }, "nothing readable on the links"},
		{"packets missed", func(ev *evidence) { ev.wire.Missed = 1 }, "nothing readable on the links"},
		{"hole", func(ev *evidence) { ev.wire.Conns[0].Incomplete = true }, "nothing readable on the links"},
		{"name in the hello", func(ev *evidence) { ev.wire.Conns[0].Hello.Name = "web" }, "nothing readable on the links"},
		{"stranger", func(ev *evidence) { ev.wire.Conns[0].Client = netip.MustParseAddrPort("10.9.9.9:1") },
			"nothing readable on the links, TLS 1.3 seen on the links"},
		{"nothing captured", func(ev *evidence) { ev.wire = wire.Report{} }, "nothing readable on the links, TLS 1.3 seen on the links"},
		{"TLS 1.2", func(ev *evidence) { ev.wire.Conns[0].Version = 0x0303 }, "TLS 1.3 seen on the links"},
		{"other ALPN", func(ev *evidence) { ev.wire.Conns[0].Hello.ALPN = []string{"h2", "assay/1"} }, "TLS 1.3 seen on the links"},
		{"handshake without traffic", func(ev *evidence) { ev.wire.Conns[0].Down.Application = 0 }, "TLS 1.3 seen on the links"},
		{"other port", func(ev *evidence) {
			ev.wire.Conns[0].Server = netip.AddrPortFrom(ev.wire.Conns[0].Server.Addr(), 15008)
		},
			"TLS 1.3 seen on the links"},
		{"stall", func(ev *evidence) { ev.first[1].Probed.MS[0] = 21.5 }, "server speaks first"},
		{"stall on later connections", func(ev *evidence) { ev.first[1].Probed.P50 = 5.5 }, "server speaks first"},
		{"probe broke", func(ev *evidence) { ev.first[1].err = errors.New("exit status 1") }, "server speaks first"},
		{"nothing measured", func(ev *evidence) { ev.first[0].Probed.MS = nil }, "server speaks first"},
		{"nobody listened", func(ev *evidence) { ev.first = nil }, "server speaks first"},
		{"strict serves", func(ev *evidence) { ev.outside[payments.String()] = attempt{answer: "\x00"} }, "strict refuses plaintext"},
		{"strict serves on the wire", func(ev *evidence) { ev.wire.Conns[len(ev.wire.Conns)-1].Down.Bytes = 5 }, "nothing readable on the links"},
		{"refusal without a finding", func(ev *evidence) { ev.findings = nil }, "strict refuses plaintext"},
		{"refusal without a remedy", func(ev *evidence) { ev.findings[0].Remedy = "" }, "strict refuses plaintext"},
		{"observe refuses", func(ev *evidence) { ev.outside[web.String()] = attempt{err: errors.New("reset")} }, "observe serves and lists it"},
		{"exception not listed", func(ev *evidence) { ev.edges = ev.edges[:len(wanted)] }, "observe serves and lists it"},
		{"exception without reason", func(ev *evidence) { ev.edges[len(wanted)].Reason = "" }, "observe serves and lists it"},
		{"shell passes for proven", func(ev *evidence) { ev.script.Artifacts[0].Unproven = "" }, "an interpreter proves nothing"},
		{"proxy replaced", func(ev *evidence) { ev.outage.after[7] = "200" }, "control and agent killed"},
		{"proxy gone", func(ev *evidence) { ev.outage.after = nil }, "control and agent killed"},
		{"nobody killed", func(ev *evidence) { ev.outage = outage{} }, "control and agent killed"},
		{"somebody answered", func(ev *evidence) { ev.outage.started = true }, "control and agent killed"},
		{"left behind", func(ev *evidence) { ev.left = []string{"link assay0"} }, "nothing left behind"},
	}
	for _, c := range cases {
		ev := perfect()
		c.spoil(ev)
		if got := strings.Join(bad(judge(ev)), ", "); got != c.want {
			t.Errorf("%s: fails %q, want %q", c.name, got, c.want)
		}
	}
	// Nothing known is nothing proven.
	for _, v := range judge(&evidence{}) {
		if v.OK && v.Check != "nothing left behind" && v.Check != "no other edge" {
			t.Errorf("without evidence %q is ok", v.Check)
		}
	}
}

func TestSummary(t *testing.T) {
	var b strings.Builder
	ok, err := WriteSummary(&b, []Verdict{{"one", true, "fine"}, {"another", false, "it\nbroke"}}, 1234*time.Millisecond)
	want := "ok    one      fine\nFAIL  another  it broke\n\n1 of 2 checks failed, in 1.2s\n"
	if ok || err != nil || b.String() != want {
		t.Errorf("%v %v\n%s", ok, err, b.String())
	}
	b.Reset()
	if ok, _ := WriteSummary(&b, []Verdict{{"one", true, "fine"}}, time.Second); !ok || !strings.Contains(b.String(), "all 1 checks passed") {
		t.Error(b.String())
	}
	if ok, _ := WriteSummary(&b, nil, 0); ok {
		t.Error("nothing checked passes")
	}
}
