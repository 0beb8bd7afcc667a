package control

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
)

// TestOneHost is a day of `assay up`: the local host joins without a token, runs
// a workload, gets its certificate, and sees the service that follows.
func TestOneHost(t *testing.T) {
	r := start(t, nil)
	hosts := localHosts(t, r)
	a := syncHost(t, hosts, nil)
	if a.welcome.HostId != "local" || a.welcome.TrustDomain != "bank.test" || len(a.welcome.Prefixes) != 2 || len(a.welcome.MeshPrefixes) != 4 {
		t.Fatalf("welcome: %v", a.welcome)
	}
	a.synced()
	w := a.workload("pay-1", "bank", "payments", 1, 8080)
	a.up(w)
	a.waitAccepted("pay-1")
	svc := a.waitFor("service/bank/payments").GetService()
	if len(svc.Vips) != 2 || len(svc.Endpoints) != 1 || svc.Endpoints[0].Targets[0] != 8080 {
		t.Errorf("service: %v", svc)
	}
	if got := a.waitFor("workload/pay-1").GetWorkload(); show(got) != show(api.FromWorkload(w)) {
		t.Errorf("workload: %v", got)
	}
	if got := a.waitFor("namespace/bank").GetNamespace(); got.Mode != "observe" {
		t.Errorf("namespace: %v", got)
	}
	eventually(t, "the bundle", func() bool { a.mu.Lock(); defer a.mu.Unlock(); return a.bundle != nil })
	chain, err := issue(t, hosts, "pay-1")
	if err != nil {
		t.Fatal(err)
	}
	if id, err := assay.CertificateIdentity(chain[0]); err != nil || id != w.Identity {
		t.Errorf("identity: %v, %v", id, err)
	}
	o := r.operator(t)
	if got := documents[api.WorkloadView](t, o, "workloads"); len(got) != 1 || !got[0].Ready || got[0].Serial == "" {
		t.Errorf("workloads: %s", show(got))
	}
	if got := documents[api.ServiceView](t, o, "services"); len(got) != 1 || got[0].Ready[0] != 1 || got[0].Declared {
		t.Errorf("services: %s", show(got))
	}
	certs := documents[api.CertificateView](t, o, "certificates")
	i := slices.IndexFunc(certs, func(c api.CertificateView) bool { return c.Workload == "pay-1" })
	if i < 0 || certs[i].Artifacts != artifacts("pay-1").Digest() || certs[i].Use != "workload" || !certs[i].Current {
		t.Errorf("certificates: %s", show(certs))
	}
	a.gone("pay-1")
	eventually(t, "workload gone", func() bool { return a.get("workload/pay-1") == nil })
	// The name stays; nothing is behind it.
	eventually(t, "no endpoint", func() bool { return len(a.get("service/bank/payments").GetService().GetEndpoints()) == 0 })
}

// TestFirstDelta: a host whose workloads ended while nobody looked never hears that
// they live, and one whose workloads go on hears nothing else.
func TestFirstDelta(t *testing.T) {
	r := start(t, nil)
	r.model.mu.Lock()
	r.model.hold = time.Hour
	r.model.mu.Unlock()
	hosts := localHosts(t, r)
	before := dialSync(t, hosts, nil)
	before.ended.Go(before.read)
	dead, alive := before.workload("dead-1", "bank", "payments", 1, 80), before.workload("alive-1", "bank", "payments", 2, 80)
	before.up(dead)
	before.up(alive)
	before.synced()
	before.waitFor("workload/dead-1")
	before.waitFor("workload/alive-1")
	eventually(t, "both endpoints", func() bool { return len(before.get("service/bank/payments").GetService().GetEndpoints()) == 2 })
	before.close()

	a := dialSync(t, hosts, before)
	a.ended.Go(a.read)
	alive.Listening = nil
	a.up(alive)
	a.waitAccepted("alive-1")
	a.mu.Lock()
	if a.complete > 0 {
		t.Error("a delta came before the host had said what it runs")
	}
	a.mu.Unlock()
	a.synced()
	eventually(t, "the first delta", func() bool { a.mu.Lock(); defer a.mu.Unlock(); return a.complete > 0 })
	a.mu.Lock()
	first := slices.Clone(a.first)
	a.mu.Unlock()
	if slices.Contains(first, "workload/dead-1") || !slices.Contains(first, "workload/alive-1") {
		t.Errorf("the first delta makes it %v", first)
	}
	if e := a.get("service/bank/payments").GetService().GetEndpoints(); len(e) != 1 || e[0].Targets[0] != 0 {
		t.Fatalf("endpoints: %v", e)
	}
	// What comes later does not wait.
	alive.Listening = alive.Ports
	a.up(alive)
	eventually(t, "a ready endpoint", func() bool { return a.get("service/bank/payments").GetService().GetEndpoints()[0].Targets[0] != 0 })
}

// TestTwoHosts joins a second machine and crosses lines.
func TestTwoHosts(t *testing.T) {
	r := start(t, nil)
	local := localHosts(t, r)
	la := syncHost(t, local, nil)
	la.up(la.workload("pay-1", "bank", "payments", 1, 80))
	la.waitAccepted("pay-1")

	h := r.join(t, "node-2", "bank/ledger", "shop/*")
	ha := syncHost(t, h.hosts, nil)
	if ha.welcome.Prefixes[0] == la.welcome.Prefixes[0] || ha.welcome.Prefixes[1] == la.welcome.Prefixes[1] {
		t.Errorf("the same prefixes: %v %v", ha.welcome.Prefixes, la.welcome.Prefixes)
	}
	// Each host knows everything.
	ha.waitFor("workload/pay-1")
	ha.waitFor("host/local")
	ha.up(ha.workload("led-1", "bank", "ledger", 1, 80))
	ha.waitAccepted("led-1")
	la.waitFor("workload/led-1")
	if got := la.waitFor("host/" + h.id).GetHost(); !got.Ready || got.Name != "node" {
		t.Errorf("host: %v", got)
	}

	refused := func(name, want string, change func(w *assay.Workload)) {
		t.Helper()
		w := ha.workload(name, "bank", "ledger", 9, 80)
		change(w)
		ha.up(w)
		if got := ha.waitRefused(w.ID); !strings.Contains(got.Reason, want) {
			t.Errorf("%s: %v", name, got)
		}
		if w.ID == name && la.get("workload/"+name) != nil {
			t.Errorf("%s: is in the snapshot", name)
		}
	}
	refused("not-covered", "bank/ledger shop/*, not bank/payments", func(w *assay.Workload) {
		w.Name, w.Service, w.Identity.Account = "payments", "payments", "payments"
	})
	refused("other-service", "not bank/payments", func(w *assay.Workload) { w.Service = "payments" })
	refused("other-domain", "not of trust domain", func(w *assay.Workload) { w.Identity.TrustDomain = "evil.test" })
	refused("others-address", "is not of host", func(w *assay.Workload) { w.Addrs = la.workload("", "", "", 1).Addrs })
	refused("taken-address", "belongs to workload led-1", func(w *assay.Workload) { w.Addrs = ha.workload("", "", "", 1).Addrs })
	refused("other-host", "is said to be on host", func(w *assay.Workload) { w.Host = "local" })
	refused("stolen-id", "host local has a workload of this ID", func(w *assay.Workload) { w.ID = "pay-1" })
	refused("changed-identity", "its identity was", func(w *assay.Workload) {
		w.ID, w.Namespace, w.Identity.Namespace = "led-1", "shop", "shop"
	})

	// A stolen host certificate is good for that host's workloads alone.
	la.up(la.workload("web-1", "shop", "web", 2, 80)) // which h's token covers too
	la.waitAccepted("web-1")
	for _, id := range []string{"pay-1", "web-1"} {
		if _, err := issue(t, h.hosts, id); assay.KindOf(err) != assay.Denied {
			t.Errorf("another host's workload %s: %v", id, err)
		}
	}
	if _, err := issue(t, h.hosts, "led-1"); err != nil {
		t.Errorf("its own workload: %v", err)
	}
	if _, err := issue(t, h.hosts, "nobody"); assay.KindOf(err) != assay.NotFound {
		t.Errorf("nobody's workload: %v", err)
	}
	if resp, err := h.hosts.Issue(t.Context(), &api.IssueRequest{WorkloadId: "led-1", Csr: csr(t, newKey(t))}); err != nil || resp.Refused == "" || resp.Remedy == "" {
		t.Errorf("without artifacts: %v, %v", resp, err)
	}
	// It cannot speak for others on its stream either.
	ha.gone("pay-1")
	ha.ack("pay-1", 99)
	ha.synced()
	ha.up(ha.workload("led-2", "bank", "ledger", 2, 80))
	ha.waitAccepted("led-2")
	if la.get("workload/pay-1") == nil {
		t.Error("one host removed another's workload")
	}
	if kinds := documents[assay.Finding](t, r.operator(t), "findings"); len(kinds) < 8 {
		t.Errorf("findings: %s", show(kinds))
	}
	// A removed host is out at once, and its workloads with it.
	if _, err := r.operator(t).Delete(t.Context(), &api.DeleteRequest{Kind: "host", Name: h.id}); err != nil {
		t.Fatal(err)
	}
	ha.waitEnd()
	eventually(t, "its workloads are gone", func() bool { return la.get("workload/led-1") == nil && la.get("host/"+h.id) == nil })
	if _, err := issue(t, h.hosts, "led-1"); assay.KindOf(err) != assay.Denied {
		t.Errorf("a removed host: %v", err)
	}
}

// TestResume: a host that comes back gets what it does not have.
func TestResume(t *testing.T) {
	r := start(t, nil)
	hosts := localHosts(t, r)
	a := syncHost(t, hosts, nil)
	for i := range byte(20) {
		id := fmt.Sprint("w", i)
		a.up(a.workload(id, "bank", fmt.Sprint("s", i), i+1, 80))
		a.waitAccepted(id)
		a.waitFor(fmt.Sprint("service/bank/s", i))
	}
	a.close()
	h := r.join(t, "node-2", "*/*")
	before := syncHost(t, h.hosts, nil)
	before.waitFor("workload/w19")
	eventually(t, "local is away", func() bool { return !before.get("host/local").GetHost().GetReady() })
	before.close()

	b := syncHost(t, hosts, a)
	b.gone("w3")
	eventually(t, "w3 gone", func() bool { return b.get("workload/w3") == nil })
	again := syncHost(t, h.hosts, before)
	again.waitFor("workload/w4")
	if again.get("workload/w3") != nil {
		t.Error("a workload that went meanwhile is still known")
	}
	// w3's service, and the two hosts that came back.
	if again.upserts > 4 {
		t.Errorf("%d resources were sent again", again.upserts)
	}
	again.close()

	// Another epoch: versions mean nothing, everything is sent, and what is gone is
	// taken away.
	b.close()
	r = r.restart(nil)
	h.connect(t, r)
	third := syncHost(t, h.hosts, again)
	if third.welcome.Epoch == again.welcome.Epoch {
		t.Error("the same epoch")
	}
	third.waitFor("workload/w4")
	if third.upserts < 40 || third.get("workload/w3") != nil {
		t.Errorf("after a restart: %d resources, %v", third.upserts, third.keys())
	}
}

// TestReconcile: what a host does not mention any more is gone, and an address that
// it uses again belongs to the new workload.
func TestReconcile(t *testing.T) {
	r := start(t, nil)
	hosts := localHosts(t, r)
	a := syncHost(t, hosts, nil)
	a.up(a.workload("old-1", "bank", "old", 1, 80))
	a.up(a.workload("old-2", "bank", "old", 2, 80))
	a.up(a.workload("kept", "bank", "kept", 3, 80))
	a.waitAccepted("kept")
	a.close()
	r = r.restart(nil)
	hosts = localHosts(t, r)
	b := syncHost(t, hosts, nil)
	b.waitFor("workload/old-1") // known from before
	b.up(b.workload("new", "bank", "new", 1, 80))
	b.waitAccepted("new")
	eventually(t, "the address moved", func() bool { return b.get("workload/old-1") == nil })
	if b.get("workload/old-2") == nil {
		t.Error("forgotten before the host said that it had told all")
	}
	b.up(b.workload("kept", "bank", "kept", 3, 80))
	b.synced()
	eventually(t, "the rest is forgotten", func() bool { return b.get("workload/old-2") == nil })
	if b.get("workload/kept") == nil || b.get("workload/new") == nil {
		t.Errorf("lost: %v", b.keys())
	}
	// And it stays so.
	b.close()
	r = r.restart(nil)
	if got := documents[api.WorkloadView](t, r.operator(t), "workloads"); len(got) != 2 || got[0].ID != "kept" || got[1].ID != "new" {
		t.Errorf("after another restart: %s", show(got))
	}
}

// TestLease: the workloads of a host that is away stay meshed, and after a while
// are ready nowhere, until it comes back.
func TestLease(t *testing.T) {
	r := start(t, func(cfg *Config) { cfg.Lease = 50 * time.Millisecond })
	h := r.join(t, "node-2", "*/*")
	ha := syncHost(t, h.hosts, nil)
	ha.up(ha.workload("w1", "bank", "s", 1, 80))
	ha.waitAccepted("w1")
	la := syncHost(t, localHosts(t, r), nil)
	target := func() uint32 { return la.waitFor("service/bank/s").GetService().GetEndpoints()[0].GetTargets()[0] }
	eventually(t, "ready", func() bool { return target() == 80 })
	ha.close()
	eventually(t, "not ready", func() bool { return target() == 0 })
	if la.get("workload/w1") == nil {
		t.Error("its address is not meshed any more")
	}
	if got := documents[api.HostView](t, r.operator(t), "hosts"); !slices.ContainsFunc(got, func(v api.HostView) bool { return v.ID == h.id && v.Lost }) {
		t.Errorf("hosts: %s", show(got))
	}
	hb := syncHost(t, h.hosts, ha)
	eventually(t, "ready again", func() bool { return target() == 80 })
	hb.close()
}

// TestLeasesOfMost: when most hosts are away at once their endpoints stay, and it is
// said; when they are back, the one that is not is lost.
func TestLeasesOfMost(t *testing.T) {
	r := start(t, func(cfg *Config) { cfg.Lease = 200 * time.Millisecond })
	la := syncHost(t, localHosts(t, r), nil)
	var hosts []*remoteHost
	var agents []*agent
	for i := range 4 {
		h := r.join(t, fmt.Sprintf("node-%d", i), "*/*")
		a := syncHost(t, h.hosts, nil)
		name := fmt.Sprintf("w%d", i)
		a.up(a.workload(name, "bank", "s", byte(1+i), 80))
		a.waitAccepted(name)
		hosts, agents = append(hosts, h), append(agents, a)
	}
	ready := func() (n int) {
		for _, e := range la.waitFor("service/bank/s").GetService().GetEndpoints() {
			if e.GetTargets()[0] == 80 {
				n++
			}
		}
		return n
	}
	finding := func() bool {
		resp, err := r.operator(t).Check(t.Context(), &api.CheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return slices.ContainsFunc(resp.Findings, func(f *api.Finding) bool { return f.GetKind() == "hosts-away-at-once" })
	}
	eventually(t, "all are ready", func() bool { return ready() == 4 })
	for _, a := range agents {
		a.close()
	}
	eventually(t, "the panic is told", finding)
	if n := ready(); n != 4 {
		t.Errorf("%d of 4 endpoints are ready", n)
	}
	for i := range 3 {
		agents[i] = syncHost(t, hosts[i].hosts, agents[i])
		agents[i].up(agents[i].workload(fmt.Sprintf("w%d", i), "bank", "s", byte(1+i), 80))
	}
	eventually(t, "the one that stays away is lost", func() bool { return ready() == 3 && !finding() })
}

// TestSlowStream: a stream that nobody reads costs nothing, holds up no other, and
// skips to the newest when it is read.
func TestSlowStream(t *testing.T) {
	r := start(t, nil)
	h := r.join(t, "node-2", "*/*")
	slow := dialSync(t, h.hosts, nil) // reads no further than the welcome
	hosts := localHosts(t, r)
	a := syncHost(t, hosts, nil)
	w := a.workload("w1", "bank", "s", 1, 80)
	big := strings.Repeat("x", 60)
	const rounds = 300
	for i := range rounds {
		next := *w
		next.Labels = map[string]string{}
		for j := range 100 {
			next.Labels[fmt.Sprint("label-", j)] = fmt.Sprint(i, "-", big[:50])
		}
		a.up(&next)
		if i%50 == 0 {
			eventually(t, "the fast stream follows", func() bool {
				got := a.get("workload/w1").GetWorkload().GetLabels()["label-0"]
				return strings.HasPrefix(got, fmt.Sprint(i, "-"))
			})
		}
	}
	last := fmt.Sprint(rounds-1, "-", big[:50])
	eventually(t, "the fast stream has the last", func() bool { return a.get("workload/w1").GetWorkload().GetLabels()["label-0"] == last })
	slow.ended.Go(slow.read)
	eventually(t, "the slow stream has the last", func() bool { return slow.get("workload/w1").GetWorkload().GetLabels()["label-0"] == last })
	slow.mu.Lock()
	defer slow.mu.Unlock()
	if slow.upserts > rounds/2 {
		t.Errorf("the slow stream got %d resources of %d changes", slow.upserts, rounds)
	}
}

// TestCoalesce: many changes within 50 ms are few messages.
func TestCoalesce(t *testing.T) {
	r := start(t, nil)
	hosts := localHosts(t, r)
	a := syncHost(t, hosts, nil)
	h := r.join(t, "node-2", "*/*")
	b := syncHost(t, h.hosts, nil)
	began := time.Now()
	for i := range 200 {
		a.up(a.workload(fmt.Sprint("w", i), "bank", "s", byte(i+1), 80))
	}
	eventually(t, "all there", func() bool { return len(b.get("service/bank/s").GetService().GetEndpoints()) == 200 })
	limit := int(time.Since(began)/coalesce) + 3
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.complete > limit {
		t.Errorf("%d deltas in %v, want at most %d", b.complete, time.Since(began), limit)
	}
}

// TestOneStreamPerHost: the newest stream of a host wins.
func TestOneStreamPerHost(t *testing.T) {
	r := start(t, nil)
	hosts := localHosts(t, r)
	a := syncHost(t, hosts, nil)
	b := syncHost(t, hosts, nil)
	if err := a.waitEnd(); assay.KindOf(err) != assay.Unavailable || !strings.Contains(err.Error(), "another stream") {
		t.Errorf("the first stream ended with %v", err)
	}
	b.up(b.workload("w1", "bank", "s", 1, 80))
	b.waitAccepted("w1")
	if got := documents[api.HostView](t, r.operator(t), "hosts"); !got[0].Ready {
		t.Errorf("the host is away: %s", show(got))
	}
}

func TestMalformedWorkloadIsAnswered(t *testing.T) {
	r := start(t, nil)
	a := syncHost(t, localHosts(t, r), nil)
	m := api.FromWorkload(a.workload("w1", "bank", "s", 1, 80))
	m.Addrs = [][]byte{{1}}
	a.send(&api.HostUpdate{Update: &api.HostUpdate_WorkloadUp{WorkloadUp: m}})
	if got := a.waitRefused("w1"); !strings.Contains(got.Reason, "1 bytes") {
		t.Errorf("%v", got)
	}
	a.up(a.workload("w1", "bank", "s", 1, 80))
	a.waitTaken("w1")
	a.send(&api.HostUpdate{Update: &api.HostUpdate_Hello{Hello: &api.HostHello{}}})
	if err := a.waitEnd(); err == nil {
		t.Error("a second hello is taken")
	}
}

// waitTaken waits whatever was refused before.
func (a *agent) waitTaken(id string) {
	a.t.Helper()
	eventually(a.t, id+" accepted", func() bool { a.mu.Lock(); defer a.mu.Unlock(); return a.accepted[id] > 0 })
}
