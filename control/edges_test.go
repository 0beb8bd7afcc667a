package control

import (
	"slices"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
)

func (a *agent) report(workload string, signals ...assay.Signals) {
	a.send(api.ReportUpdate(api.FromReport(&api.Report{Workload: workload, Started: time.Now().UTC(), Signals: signals})))
}

func signal(d assay.Direction, peer *assay.Workload, requests uint64) assay.Signals {
	now := time.Now().UTC().Truncate(time.Microsecond)
	s := assay.Signals{SignalKey: assay.SignalKey{Direction: d, Service: "bank/server", Port: 80, Protocol: assay.HTTP1, Security: assay.MutualTLS},
		Requests: requests, BytesIn: 10, BytesOut: 20, Open: 1, FirstSeen: now.Add(-time.Minute), LastSeen: now}
	if peer != nil {
		s.Peer, s.PeerArtifacts = peer.Identity, peer.Artifacts.Digest()
	}
	return s
}

// TestEdgesCountOnce: what both ends report is one edge.
func TestEdgesCountOnce(t *testing.T) {
	r := start(t, nil)
	a := syncHost(t, localHosts(t, r), nil)
	client, server := a.workload("c", "bank", "", 1), a.workload("s", "bank", "server", 2, 80)
	server2 := a.workload("s2", "bank", "server", 3, 80)
	server2.Artifacts = server.Artifacts
	for _, w := range []*assay.Workload{client, server, server2} {
		a.up(w)
		a.waitAccepted(w.ID)
	}
	// Two replicas behind one identity; a client outside the mesh; a refusal that
	// only the client saw.
	plain := signal(assay.Inbound, nil, 5)
	plain.Security, plain.Reason = assay.Plaintext, "outside the mesh"
	lone := signal(assay.Outbound, server, 1)
	lone.Service, lone.Failures = "bank/other", 1
	a.report("c", signal(assay.Outbound, server, 100), lone)
	a.report("s", signal(assay.Inbound, client, 60), plain)
	a.report("s2", signal(assay.Inbound, client, 39))
	o := r.operator(t)
	var edges []assay.Edge
	eventually(t, "three edges", func() bool { edges = documents[assay.Edge](t, o, "edges"); return len(edges) == 3 })
	find := func(f func(e assay.Edge) bool) assay.Edge {
		t.Helper()
		i := slices.IndexFunc(edges, f)
		if i < 0 {
			t.Fatalf("not there: %s", show(edges))
		}
		return edges[i]
	}
	both := find(func(e assay.Edge) bool { return len(e.SeenBy) == 2 })
	if both.Requests != 100 || both.BytesUp != 20 || both.BytesDown != 10 || both.Open != 1 || both.Client.Identity != client.Identity ||
		both.Server.Identity != server.Identity || both.Client.Artifacts != client.Artifacts.Digest() || both.Server.Artifacts != server.Artifacts.Digest() {
		t.Errorf("seen by both: %s", show(both))
	}
	outside := find(func(e assay.Edge) bool { return e.Security == assay.Plaintext })
	if !outside.Client.Identity.IsZero() || outside.Requests != 5 || outside.BytesUp != 10 || outside.Reason == "" {
		t.Errorf("from outside: %s", show(outside))
	}
	if e := find(func(e assay.Edge) bool { return e.Service == "bank/other" }); len(e.SeenBy) != 1 || e.SeenBy[0] != assay.Outbound || e.Failures != 1 {
		t.Errorf("seen by the client: %s", show(e))
	}
	check, err := o.Check(t.Context(), &api.CheckRequest{})
	if err != nil || !slices.ContainsFunc(check.Findings, func(f *api.Finding) bool {
		return f.Kind == "plaintext" && f.Subject == "outside the mesh -> bank/server"
	}) {
		t.Errorf("check: %v, %v", check, err)
	}
	// A new report replaces the old; a workload that is gone has nothing open.
	a.report("c", signal(assay.Outbound, server, 120))
	eventually(t, "the new numbers", func() bool {
		edges = documents[assay.Edge](t, o, "edges")
		return slices.ContainsFunc(edges, func(e assay.Edge) bool { return e.Requests == 120 })
	})
	a.gone("c")
	eventually(t, "nothing open", func() bool {
		edges = documents[assay.Edge](t, o, "edges")
		return slices.ContainsFunc(edges, func(e assay.Edge) bool { return e.Requests == 120 && e.Open == 0 })
	})
	if got := documents[api.SignalsView](t, o, "signals"); len(got) != 3 || got[0].Gone.IsZero() || got[1].Signals == nil {
		t.Errorf("signals: %s", show(got))
	}
}

// TestCheck asks what is wrong, in a mesh where things are.
func TestCheck(t *testing.T) {
	c := newClock()
	r := start(t, func(cfg *Config) { cfg.Now = c.now })
	o := r.operator(t)
	kinds := func(expiry time.Duration) []string {
		t.Helper()
		resp, err := o.Check(t.Context(), &api.CheckRequest{ExpirySeconds: int64(expiry / time.Second)})
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, f := range resp.Findings {
			out = append(out, f.Kind)
		}
		return slices.Compact(out)
	}
	if got := kinds(14 * 24 * time.Hour); len(got) != 0 {
		t.Errorf("a new mesh: %v", got)
	}
	hosts := localHosts(t, r)
	a := syncHost(t, hosts, nil)
	a.ack("", 1)
	w := a.workload("w", "bank", "s", 1, 80)
	w.MeshedSince = time.Time{}
	a.up(w)
	a.waitAccepted("w")
	if got := kinds(0); !slices.Equal(got, []string{"proxy-not-ready"}) {
		t.Errorf("not meshed: %v", got)
	}
	w.MeshedSince = c.now()
	a.up(w)
	if _, err := issue(t, hosts, "w"); err != nil {
		t.Fatal(err)
	}
	a.ack("w", 1)
	eventually(t, "a healthy workload", func() bool { return len(kinds(14*24*time.Hour)) == 0 })
	// Eighteen hours later its renewal is overdue; a day later it has expired.
	c.advance(13 * time.Hour)
	if got := kinds(14 * 24 * time.Hour); len(got) != 0 {
		t.Errorf("about to be renewed: %v", got)
	}
	c.advance(5*time.Hour + time.Minute)
	if got := kinds(14 * 24 * time.Hour); !slices.Equal(got, []string{"certificate-expiring"}) {
		t.Errorf("overdue: %v", got)
	}
	c.advance(6 * time.Hour)
	if got := kinds(0); !slices.Contains(got, "proxy-not-ready") {
		t.Errorf("expired: %v", got)
	}
	a.send(&api.HostUpdate{Update: &api.HostUpdate_Finding{Finding: api.FromFinding(&assay.Finding{Time: c.now(), Workload: "w", Kind: "plaintext-from-meshed", Subject: "10.0.0.1", Detail: "d"})}})
	eventually(t, "the proxy's finding", func() bool { return slices.Contains(kinds(0), "plaintext-from-meshed") })
	a.close()
	eventually(t, "the host is away", func() bool { return slices.Contains(kinds(0), "host-not-connected") })
	// Ninety days of intermediates, of which somebody asks for a hundred.
	if got := kinds(100 * 24 * time.Hour); !slices.Contains(got, "intermediate-expiring") || slices.Contains(got, "root-expiring") {
		t.Errorf("far sight: %v", got)
	}
	if got := kinds(20 * 365 * 24 * time.Hour); !slices.Contains(got, "root-expiring") {
		t.Errorf("farther sight: %v", got)
	}
}

func TestListRefusesUnknownKinds(t *testing.T) {
	r := start(t, nil)
	o := r.operator(t)
	_, err := o.List(t.Context(), &api.ListRequest{Kind: "pods"})
	if assay.KindOf(api.StatusError("list", err)) != assay.Invalid {
		t.Errorf("got %v", err)
	}
	for kind := range lists {
		if _, err := o.List(t.Context(), &api.ListRequest{Kind: kind}); err != nil {
			t.Errorf("%s: %v", kind, err)
		}
	}
}

// TestBalance: exceptions are counted, and bytes that belong nowhere are a finding.
func TestBalance(t *testing.T) {
	r := start(t, nil)
	a := syncHost(t, localHosts(t, r), nil)
	w := a.workload("w", "bank", "s", 1, 80)
	a.up(w)
	a.waitAccepted("w")
	o := r.operator(t)
	beside := signal(assay.Outbound, nil, 0)
	beside.Service, beside.Protocol, beside.Security, beside.Reason, beside.Remote = "", assay.UDP, assay.Plaintext, assay.ReasonUDP, "192.0.2.1"
	beside.PacketsOut = 7
	escaped := beside
	escaped.Reason, escaped.Protocol = assay.ReasonEscaped, assay.Opaque
	send := func(b *assay.Balance, list ...assay.Signals) {
		a.send(api.ReportUpdate(api.FromReport(&api.Report{Workload: "w", Started: time.Now().UTC(), Signals: list, Balance: b})))
	}
	findings := func() map[string]*api.Finding {
		t.Helper()
		resp, err := o.Check(t.Context(), &api.CheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		out := map[string]*api.Finding{}
		for _, f := range resp.Findings {
			out[f.Kind] = f
		}
		return out
	}
	link := func(unexplained int64) assay.BalanceWay {
		return assay.BalanceWay{Link: assay.FrameCount{Packets: 10, Bytes: 100_000}, Proxy: assay.FrameCount{Packets: 9, Bytes: 50_000},
			Control: map[string]assay.FrameCount{"arp": {Packets: 1, Bytes: 42}}, Unexplained: unexplained}
	}
	send(&assay.Balance{In: link(0), Out: link(1000)}, beside)
	eventually(t, "the exception is counted", func() bool {
		f := findings()
		return f["exceptions"] != nil && f["unexplained-bytes"] == nil && f["plaintext"] == nil && f["capture-escaped"] == nil
	})
	if e := documents[assay.Edge](t, o, "edges"); len(e) != 1 || e[0].PacketsUp != 7 || e[0].Remote != "192.0.2.1" {
		t.Errorf("edges: %s", show(e))
	}
	send(&assay.Balance{In: link(0), Out: link(50_000)}, beside, escaped)
	eventually(t, "unexplained bytes are found", func() bool {
		f := findings()
		return f["unexplained-bytes"].GetWorkload() == "w" && f["capture-escaped"] != nil
	})
	if got := documents[api.SignalsView](t, o, "signals"); len(got) != 1 || got[0].Balance == nil || got[0].Balance.Out.Unexplained != 50_000 || got[0].Balance.In.Control["arp"].Bytes != 42 {
		t.Errorf("signals: %s", show(got))
	}
	send(&assay.Balance{Problem: "no such hook"})
	eventually(t, "nobody counts", func() bool { return findings()["not-metered"] != nil })
}

// TestNeverMetered: a workload whose host never tells of its link is found, once that has lasted.
func TestNeverMetered(t *testing.T) {
	now := newClock()
	r := start(t, func(cfg *Config) { cfg.Now = now.now })
	a := syncHost(t, localHosts(t, r), nil)
	w := a.workload("w", "bank", "s", 1, 80)
	a.up(w)
	a.waitAccepted("w")
	send := func(b *assay.Balance) {
		t.Helper()
		a.send(api.ReportUpdate(api.FromReport(&api.Report{Workload: "w", Started: now.now(), Balance: b})))
		eventually(t, "the report", func() bool {
			for c := range r.model.counts {
				return (c.Balance == nil) == (b == nil)
			}
			return false
		})
		r.model.findStrays()
	}
	found := func() (n int) {
		t.Helper()
		resp, err := r.Check(t.Context(), &api.CheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range resp.Findings {
			if f.Kind == "not-metered" && f.Workload == "w" && f.Remedy != "" {
				n++
			}
		}
		return n
	}
	send(nil)
	if found() != 0 {
		t.Error("it has just begun")
	}
	now.advance(strayEvery)
	send(nil)
	if found() != 1 {
		t.Error("it is not metered, and that is not found")
	}
	send(&assay.Balance{})
	if found() != 0 {
		t.Error("it is metered, and found")
	}
}

// What a host counts is read when somebody asks: a report that cannot be read says so then, and
// others stand.
func TestUnreadableReport(t *testing.T) {
	r := start(t, nil)
	a := syncHost(t, localHosts(t, r), nil)
	good, bad := a.workload("good", "bank", "payments", 1, 80), a.workload("bad", "bank", "payments", 2, 80)
	a.up(good)
	a.up(bad)
	a.waitAccepted(good.ID)
	a.waitAccepted(bad.ID)
	a.report(good.ID, signal(assay.Inbound, nil, 1))
	a.send(api.ReportUpdate(&api.WorkloadReport{WorkloadId: bad.ID, Signals: []*api.Signals{{Direction: "sideways"}}}))
	eventually(t, "one is read, one is a finding", func() bool {
		read := 0
		for range r.model.counts {
			read++
		}
		return read == 1 && slices.ContainsFunc(r.listFindings(), func(i item) bool { return i.name == "report-unreadable" })
	})
}
