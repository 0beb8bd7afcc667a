package control

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/discovery"
	"assay.dev/store"
)

// startCluster starts the control of a cluster with two nodes. A token "NODE" is that of the
// node's agent, "pod UID" that of an agent's pod whose node it does not name.
func startCluster(t *testing.T, change func(*Config)) *running {
	return start(t, func(cfg *Config) {
		cfg.Cluster = testCluster()
		if change != nil {
			change(cfg)
		}
	})
}

func testCluster() *Cluster {
	return &Cluster{Bearer: func(_ context.Context, token string) (Bearer, error) {
		if uid, ok := strings.CutPrefix(token, "pod "); ok {
			return Bearer{Pod: uid}, nil
		}
		if uid, ok := strings.CutPrefix(token, "own "); ok {
			return Bearer{Pod: uid, Account: "shop/web"}, nil
		}
		if !strings.HasPrefix(token, "node-") {
			return Bearer{}, &assay.Error{Kind: assay.Denied, Op: "join", Err: errors.New("it is not an agent's")}
		}
		return Bearer{Node: token}, nil
	}}
}

func (r *running) follow(t *testing.T, ch ClusterChanges) {
	t.Helper()
	if err := r.Follow(ch); err != nil {
		t.Fatal(err)
	}
}

func pod(uid, node string, addrs ...string) Pod {
	p := Pod{UID: uid, Namespace: "shop", Account: "web", Node: node, Labels: map[string]string{"app": "web"}}
	for _, a := range addrs {
		p.Addrs = append(p.Addrs, netip.MustParseAddr(a))
	}
	return p
}

func (r *running) tryJoinNode(t *testing.T, token string) (*remoteHost, error) {
	t.Helper()
	b := r.authority.Bundle()
	h := &remoteHost{bundle: api.FromBundle(b.Version, b.Roots)}
	conn := r.dial(t, api.ClientTLS(api.Credentials{Roots: h.pool(t), Certificate: func() (*tls.Certificate, error) { return &tls.Certificate{}, nil }}))
	key := newKey(t)
	resp, err := api.NewHostsClient(conn).Join(t.Context(), &api.JoinRequest{Token: token, Csr: csr(t, key), HostName: "whatever"})
	if err != nil {
		return nil, api.StatusError("join", err)
	}
	h.id, h.cert = resp.HostId, tls.Certificate{Certificate: resp.Chain, PrivateKey: key}
	h.connect(t, r)
	return h, nil
}

func (r *running) joinNode(t *testing.T, token string) *remoteHost {
	t.Helper()
	h, err := r.tryJoinNode(t, token)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// meshed is what the agent of a node says of a pod.
func (r *running) meshed(h *remoteHost, uid string, addrs ...string) *assay.Workload {
	w := &assay.Workload{ID: uid, Namespace: "shop", Name: "web", Host: h.id, Identity: assay.Identity{TrustDomain: r.TrustDomain(), Namespace: "shop", Account: "web"},
		MeshedSince: time.Now().UTC().Truncate(time.Microsecond), Labels: map[string]string{"app": "what the agent likes"}}
	for _, a := range addrs {
		w.Addrs = append(w.Addrs, netip.MustParseAddr(a))
	}
	return w
}

func (a *agent) refusedFor(id, why string) {
	a.t.Helper()
	eventually(a.t, "workload "+id+" refused: "+why, func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.refused[id] != nil && strings.Contains(a.refused[id].Reason, why)
	})
}

// forget forgets what was refused so far.
func (a *agent) forget() {
	a.mu.Lock()
	defer a.mu.Unlock()
	clear(a.refused)
}

func (r *running) findings(kind string) (n int) {
	r.model.mu.Lock()
	defer r.model.mu.Unlock()
	for _, f := range r.model.findings {
		if f.Kind == kind {
			n++
		}
	}
	return n
}

func twoNodes(pods ...Pod) ClusterChanges {
	return ClusterChanges{Nodes: []Node{{Name: "node-1"}, {Name: "node-2"}}, Pods: pods}
}

// TestNodesJoin: who joins is the node that the platform says, and nobody else.
func TestNodesJoin(t *testing.T) {
	r := startCluster(t, nil)
	if _, err := r.tryJoinNode(t, "node-1"); assay.KindOf(err) != assay.Unavailable {
		t.Errorf("before the API server has told what there is: %v", err)
	}
	r.follow(t, twoNodes(pod("agent-2", "node-2")))
	for token, want := range map[string]assay.Kind{
		"": assay.Invalid, strings.Repeat("x", maxBearer+1): assay.Invalid, "somebody": assay.Denied, "pod nobody": assay.Denied,
		"node-3": assay.Unavailable, // of which the watch has not told yet
	} {
		if _, err := r.tryJoinNode(t, token); assay.KindOf(err) != want {
			t.Errorf("token %.20q: %v, want %s", token, err, want)
		}
	}
	one, two := r.joinNode(t, "node-1"), r.joinNode(t, "pod agent-2")
	if one.id != nodeID("node-1") || two.id != nodeID("node-2") {
		t.Errorf("hosts %s and %s", one.id, two.id)
	}
	again := r.joinNode(t, "node-1")
	if again.id != one.id {
		t.Errorf("the same node again is %s", again.id)
	}
	a := syncHost(t, one.hosts, nil)
	if a.err != nil || len(a.welcome.Prefixes)+len(a.welcome.MeshPrefixes) != 0 {
		t.Errorf("the welcome of a node: %v %v", a.welcome, a.err)
	}
	if h, _ := r.model.host(one.id); h.Name != "node-1" || h.Node != "node-1" || len(h.Covers) != 0 || len(h.Prefixes) != 0 {
		t.Errorf("the host: %+v", h)
	}
	_, err := r.operator(t).CreateToken(t.Context(), &api.CreateTokenRequest{Covers: []string{"*/*"}, TtlSeconds: 3600})
	if assay.KindOf(api.StatusError("token", err)) != assay.Invalid {
		t.Errorf("a join token: %v", err)
	}
}

// TestNodeSpeaksForItsPods: a stolen agent's token is worth the pods of its node, and
// those only as the platform knows them.
func TestNodeSpeaksForItsPods(t *testing.T) {
	r := startCluster(t, nil)
	hidden := pod("hidden", "node-1", "192.0.2.1")
	hidden.HostNetwork = true
	r.follow(t, ClusterChanges{
		Nodes: []Node{{Name: "node-1"}, {Name: "node-2"}},
		Pods:  []Pod{pod("own", "node-1", "10.0.1.1", "fd00::11"), pod("new", "node-1"), pod("other", "node-2", "10.0.2.1"), hidden},
		Services: []Placed{{DeclaredService: discovery.DeclaredService{Namespace: "shop", Name: "web", ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1")},
			Ports: []discovery.DeclaredPort{{Port: assay.Port{Port: 80}}}}}},
	})
	h := r.joinNode(t, "node-1")
	a := syncHost(t, h.hosts, nil)
	a.up(r.meshed(h, "own", "10.0.1.1", "fd00::11"))
	a.up(r.meshed(h, "new", "10.0.1.2"))
	a.waitAccepted("own")
	a.waitAccepted("new")
	if w := a.waitFor("workload/own").GetWorkload(); w.Labels["app"] != "web" {
		t.Errorf("labels are the platform's to say: %v", w.Labels)
	}
	if chain, err := issue(t, h.hosts, "own"); err != nil || chain[0].URIs[0].String() != "spiffe://bank.test/ns/shop/sa/web" {
		t.Errorf("a certificate for a pod of the node: %v", err)
	}
	for why, change := range map[string]func(w *assay.Workload){
		"is on node node-2":             func(w *assay.Workload) { w.ID = "other" },
		"its node's network":            func(w *assay.Workload) { w.ID = "hidden" },
		"service account web, not shop": func(w *assay.Workload) { w.Name, w.Identity.Account = "bank", "bank" },
		"of namespace shop":             func(w *assay.Workload) { w.Namespace, w.Identity.Namespace = "bank", "bank" },
		"not its node's to say":         func(w *assay.Workload) { w.Service = "bank" },
		"no pod's address":              func(w *assay.Workload) { w.ID, w.Addrs = "new", []netip.Addr{netip.MustParseAddr("169.254.9.9")} },
		"said to be on host":            func(w *assay.Workload) { w.Host = nodeID("node-2") },
	} {
		w := r.meshed(h, "own", "10.0.1.1")
		change(w)
		a.forget()
		a.up(w)
		a.refusedFor(w.ID, why)
	}
	if _, err := issue(t, h.hosts, "other"); err == nil {
		t.Error("a certificate for a pod of another node")
	}
	if r.findings("workload-refused") == 0 {
		t.Error("no finding tells of it")
	}
}

// TestAddressOfAnother: a pod without an address in the API server has what its node says,
// unless that is somebody else's.
func TestAddressOfAnother(t *testing.T) {
	now := newClock()
	r := startCluster(t, func(cfg *Config) { cfg.Now = now.now })
	hidden := pod("hidden", "node-1", "192.0.2.1")
	hidden.HostNetwork = true
	r.follow(t, ClusterChanges{
		Nodes: []Node{{Name: "node-1"}, {Name: "node-2"}}, Pods: []Pod{pod("a", "node-1"), pod("b", "node-1"), pod("c", "node-1"), pod("d", "node-1"), pod("ended", "node-1", "10.0.1.9"), pod("other", "node-2", "10.0.2.1"), hidden},
		Services: []Placed{{DeclaredService: discovery.DeclaredService{Namespace: "shop", Name: "web", ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1")},
			Ports: []discovery.DeclaredPort{{Port: assay.Port{Port: 80}}}}}},
	})
	h := r.joinNode(t, "node-1")
	a := syncHost(t, h.hosts, nil)
	a.up(r.meshed(h, "a", "10.96.0.1"))
	a.up(r.meshed(h, "b", "10.0.2.1"))
	a.up(r.meshed(h, "c", "192.0.2.1"))
	a.up(r.meshed(h, "d", "10.0.1.9")) // of the node's own pods the node knows which has ended
	a.waitAccepted("d")
	now.advance(waitFor)
	a.refusedFor("a", "service shop/web")
	a.refusedFor("b", "pod other on node node-2")
	a.refusedFor("c", "pod hidden on node node-1")
	a.forget()
	// It is taken as soon as the other one is gone, and nobody has to ask again.
	r.follow(t, ClusterChanges{RemovedPods: []string{"other"}})
	a.waitAccepted("b")
}

// TestReportWaits: a pod that the platform has not told of yet is taken when it has.
func TestReportWaits(t *testing.T) {
	now := newClock()
	r := startCluster(t, func(cfg *Config) { cfg.Now = now.now })
	r.follow(t, twoNodes())
	h := r.joinNode(t, "node-1")
	a := syncHost(t, h.hosts, nil)
	waits := func(n int) {
		t.Helper()
		eventually(t, "reports wait", func() bool {
			r.model.mu.Lock()
			defer r.model.mu.Unlock()
			return len(r.model.cluster.waiting) == n
		})
	}
	a.up(r.meshed(h, "early", "10.0.1.1"))
	a.up(r.meshed(h, "brief", "10.0.1.2"))
	waits(2)
	a.gone("brief")
	waits(1)
	if _, err := issue(t, h.hosts, "early"); assay.KindOf(err) != assay.NotFound {
		t.Errorf("a certificate for it: %v", err)
	}
	now.advance(waitFor)
	a.refusedFor("early", "knows of no such pod")
	a.forget()
	r.follow(t, ClusterChanges{Pods: []Pod{pod("early", "node-1")}})
	a.waitAccepted("early")
	waits(0)
	if _, err := issue(t, h.hosts, "early"); err != nil {
		t.Error(err)
	}
	// What waits ends with the stream.
	a.up(r.meshed(h, "other", "10.0.1.3"))
	waits(1)
	a.close()
	waits(0)
}

// TestContradicted: what the platform denies later is withdrawn, is found, gets no
// certificate, and comes back when the platform agrees.
func TestContradicted(t *testing.T) {
	r := startCluster(t, nil)
	r.follow(t, twoNodes(pod("a", "node-1"), pod("b", "node-1")))
	h := r.joinNode(t, "node-1")
	a := syncHost(t, h.hosts, nil)
	a.up(r.meshed(h, "a", "10.0.1.1"))
	a.up(r.meshed(h, "b", "10.0.1.2"))
	a.waitFor("workload/a")
	a.waitFor("workload/b")
	gone := func(id string) {
		t.Helper()
		eventually(t, id+" is withdrawn", func() bool { return a.get("workload/"+id) == nil })
		if _, err := issue(t, h.hosts, id); err == nil {
			t.Errorf("a certificate for %s", id)
		}
	}
	// The pod has another address; another node's pod has it.
	r.follow(t, ClusterChanges{Pods: []Pod{pod("a", "node-1", "10.0.1.7")}})
	gone("a")
	r.follow(t, ClusterChanges{Pods: []Pod{pod("c", "node-2", "10.0.1.2")}})
	gone("b")
	if n := r.findings("workload-withdrawn"); n != 2 {
		t.Errorf("%d findings", n)
	}
	r.follow(t, ClusterChanges{Pods: []Pod{pod("a", "node-1", "10.0.1.1")}, RemovedPods: []string{"c"}})
	a.waitFor("workload/a")
	a.waitFor("workload/b")
	// A pod that has ended contradicts nobody.
	r.follow(t, ClusterChanges{RemovedPods: []string{"a"}})
	gone("a")
	if n := r.findings("workload-withdrawn"); n != 2 {
		t.Errorf("%d findings after a pod's end", n)
	}
	// Its labels are what the platform says now.
	labelled := pod("b", "node-1", "10.0.1.2")
	labelled.Labels = map[string]string{"app": "v2"}
	r.follow(t, ClusterChanges{Pods: []Pod{labelled}})
	eventually(t, "the new label", func() bool { w := a.get("workload/b").GetWorkload(); return w != nil && w.Labels["app"] == "v2" })
}

// TestNodeGone: with the node goes its host, with everything that it said, and its
// certificates are worth nothing to the next node of that name.
func TestNodeGone(t *testing.T) {
	r := startCluster(t, nil)
	r.follow(t, twoNodes(pod("a", "node-1"), pod("b", "node-2")))
	h, other := r.joinNode(t, "node-1"), r.joinNode(t, "node-2")
	a, b := syncHost(t, h.hosts, nil), syncHost(t, other.hosts, nil)
	a.up(r.meshed(h, "a", "10.0.1.1"))
	b.waitFor("workload/a")
	r.follow(t, ClusterChanges{RemovedNodes: []string{"node-1"}})
	eventually(t, "its workload is gone", func() bool { return b.get("workload/a") == nil && b.get("host/"+h.id) == nil })
	eventually(t, "its stream is cut", func() bool { a.mu.Lock(); defer a.mu.Unlock(); return a.err != nil })
	r.follow(t, ClusterChanges{Nodes: []Node{{Name: "node-1"}}})
	next := r.joinNode(t, "node-1")
	if next.id != h.id {
		t.Errorf("the node of the same name is %s", next.id)
	}
	if _, err := h.hosts.Renew(t.Context(), &api.RenewRequest{Csr: csr(t, newKey(t))}); err == nil {
		t.Error("the old node's certificate is taken for the new one's")
	}
	if _, err := next.hosts.Renew(t.Context(), &api.RenewRequest{Csr: csr(t, newKey(t))}); err != nil {
		t.Error(err)
	}
	if audit := documents[store.Audit](t, r.operator(t), "audit"); !slices.ContainsFunc(audit, func(l store.Audit) bool { return l.Who == "the API server" && l.Call == "Delete" }) {
		t.Errorf("the audit trail does not tell: %+v", audit)
	}
}

// TestNodeGoneCertificateNotHeard: what another control signed for a node, of which the one that
// forgets the node has not heard, is worth nothing to the next node of that name either.
func TestNodeGoneCertificateNotHeard(t *testing.T) {
	clock := newClock()
	r := startCluster(t, func(cfg *Config) { cfg.Now = clock.now })
	r.follow(t, twoNodes())
	h := r.joinNode(t, "node-1")
	key := newKey(t)
	unheard, err := r.authority.IssueHost(csr(t, key), h.id) // in nobody's inventory here
	if err != nil {
		t.Fatal(err)
	}
	r.follow(t, ClusterChanges{RemovedNodes: []string{"node-1"}})
	eventually(t, "the host is gone", func() bool { _, ok := r.model.host(h.id); return !ok })
	clock.advance(10 * time.Second)
	r.follow(t, ClusterChanges{Nodes: []Node{{Name: "node-1"}}})
	next := r.joinNode(t, "node-1")
	old := &remoteHost{id: h.id, bundle: h.bundle, cert: tls.Certificate{Certificate: unheard.Chain, PrivateKey: key}}
	old.connect(t, r)
	for what, call := range map[string]func() error{
		"renew": func() error {
			_, err := old.hosts.Renew(t.Context(), &api.RenewRequest{Csr: csr(t, newKey(t))})
			return api.StatusError("renew", err)
		},
		"issue": func() error { _, err := issue(t, old.hosts, "a"); return err },
		"sync":  func() error { return syncHost(t, old.hosts, nil).waitEnd() },
	} {
		if err := call(); assay.KindOf(err) != assay.Denied || !strings.Contains(err.Error(), "before") {
			t.Errorf("%s with the certificate of the node of before: %v", what, err)
		}
	}
	if _, err := next.hosts.Renew(t.Context(), &api.RenewRequest{Csr: csr(t, newKey(t))}); err != nil {
		t.Error(err)
	}
}

// TestClusterRestart: a control that has restarted serves nobody until it knows what there
// is, renews for what ran, and then forgets what ended meanwhile.
func TestClusterRestart(t *testing.T) {
	r := startCluster(t, nil)
	r.follow(t, twoNodes(pod("a", "node-1", "10.0.1.1"), pod("b", "node-1", "10.0.1.2")))
	h := r.joinNode(t, "node-1")
	a := syncHost(t, h.hosts, nil)
	a.up(r.meshed(h, "a", "10.0.1.1"))
	a.up(r.meshed(h, "b", "10.0.1.2"))
	a.waitFor("workload/a")
	a.waitFor("workload/b")
	a.close()
	r = r.restart(nil)
	h.connect(t, r)
	if early := dialSync(t, h.hosts, nil); assay.KindOf(api.StatusError("sync", early.err)) != assay.Unavailable {
		t.Errorf("a stream before the API server was heard: %v", early.err)
	}
	if _, err := issue(t, h.hosts, "a"); err != nil {
		t.Errorf("a renewal before the API server was heard: %v", err)
	}
	resp, err := r.operator(t).Check(t.Context(), &api.CheckRequest{})
	if err != nil || !slices.ContainsFunc(resp.Findings, func(f *api.Finding) bool { return f.Kind == "cluster-not-heard" }) {
		t.Errorf("check does not tell: %v %v", resp, err)
	}
	r.follow(t, twoNodes(pod("a", "node-1", "10.0.1.1")))
	a = syncHost(t, h.hosts, nil)
	if keys := a.keys(); !slices.Contains(keys, "workload/a") || slices.Contains(keys, "workload/b") {
		t.Errorf("it serves %v", keys)
	}
}

// TestVerdicts: what became of an object is told with the reason, and follows what there is.
func TestVerdicts(t *testing.T) {
	r := startCluster(t, nil)
	object := func(kind, name, spec string) store.Object {
		return store.Object{Kind: kind, Namespace: "shop", Name: name, Spec: []byte(`{"spec":` + spec + `}`), Generation: 3, Created: time.Unix(1e9, 0)}
	}
	service := func(name, addr string) Placed {
		return Placed{DeclaredService: discovery.DeclaredService{Namespace: "shop", Name: name, ClusterIPs: []netip.Addr{netip.MustParseAddr(addr)},
			Ports: []discovery.DeclaredPort{{Port: assay.Port{Port: 80}}}}}
	}
	good, bad, slip := object("MeshConfig", "default", `{}`), object("Egress", "bad", `{}`), object("MeshConfig", "slip", `{}`)
	half, none, both := object("TrafficPolicy", "half", `{"targetRefs":[{"name":"web"},{"name":"lost"}]}`), object("TrafficPolicy", "none", `{"targetRefs":[{"name":"lost"},{"name":"gone"}]}`), object("TrafficPolicy", "both", `{}`)
	r.follow(t, ClusterChanges{
		Services: []Placed{service("web", "10.96.0.1")},
		Declared: &Declared{
			Objects:  []store.Object{good, bad, slip, half, none, both},
			Problems: map[store.Key]Unsound{bad.Key(): {"Invalid", "no ports"}, slip.Key(): {"Invalid", "no share"}, both.Key(): {"Conflicted", "half is older"}},
		},
	})
	check := func(o store.Object, want Verdict) {
		t.Helper()
		want.Generation = 3
		eventually(t, fmt.Sprintf("%s: %+v", o.Name, want), func() bool { // services are published some moments later
			got, _ := r.Verdict(o.Key())
			return got == want
		})
	}
	check(good, Verdict{Accepted: true, Reason: "Accepted"})
	check(bad, Verdict{Reason: "Invalid", Message: "no ports (it has no effect until that is corrected)"})
	check(slip, Verdict{Reason: "Invalid", Message: "no share (of it only mode and egress are in effect until that is corrected)"})
	check(both, Verdict{Reason: "Conflicted", Message: "half is older (it has no effect: delete one of the two, or take out of one what both say)"})
	check(half, Verdict{Accepted: true, Reason: "Accepted", Message: "there is no Service shop/lost (it is in effect for the others; make the Service, or correct targetRefs)"})
	check(none, Verdict{Reason: "TargetNotFound", Message: "there is no Service shop/lost, shop/gone (it has no effect: make the Service, or correct targetRefs)"})
	if v, ok := r.Verdict(store.Key{Kind: "Egress", Namespace: "shop", Name: "unheard"}); ok {
		t.Errorf("of what nobody declared: %+v", v)
	}
	r.follow(t, ClusterChanges{Services: []Placed{service("lost", "10.96.0.2")}})
	check(half, Verdict{Accepted: true, Reason: "Accepted"})
	check(none, Verdict{Accepted: true, Reason: "Accepted", Message: "there is no Service shop/gone (it is in effect for the others; make the Service, or correct targetRefs)"})
}

// TestDeclaredToPlatform: what people declare to the platform is in effect, is shown, and is
// nobody else's to change.
func TestDeclaredToPlatform(t *testing.T) {
	r := startCluster(t, nil)
	strict := store.Object{Kind: "MeshConfig", Namespace: "shop", Name: "default", Spec: []byte(`{}`), Generation: 3, Created: time.Unix(1e9, 0)}
	bad := store.Object{Kind: "Egress", Namespace: "shop", Name: "bad", Spec: []byte(`{}`), Generation: 1, Created: time.Unix(1e9, 0)}
	r.follow(t, ClusterChanges{
		Nodes: []Node{{Name: "node-1"}}, Pods: []Pod{pod("a", "node-1")},
		Declared: &Declared{
			Intent:  discovery.Intent{Namespaces: []assay.NamespaceConfig{{Namespace: "shop", Mode: assay.Strict}}},
			Objects: []store.Object{strict, bad}, Problems: map[store.Key]Unsound{bad.Key(): {"Invalid", "no ports"}},
		},
	})
	h := r.joinNode(t, "node-1")
	a := syncHost(t, h.hosts, nil)
	if n := a.waitFor("namespace/shop").GetNamespace(); n.Mode != "strict" {
		t.Errorf("the namespace: %v", n)
	}
	o := r.operator(t)
	if list := documents[api.ObjectView](t, o, "meshconfigs"); len(list) != 1 || list[0].Source != "cluster" || list[0].Generation != 3 || !list[0].Status.InEffect {
		t.Errorf("the list: %+v", list)
	}
	if list := documents[api.ObjectView](t, o, "egresses"); len(list) != 1 || list[0].Status.InEffect || list[0].Status.Problem != "no ports" {
		t.Errorf("what has no effect: %+v", list)
	}
	_, err := o.Apply(t.Context(), &api.ApplyRequest{Files: []*api.File{{Name: "x.yaml", Yaml: []byte("kind: Service")}}})
	if e, ok := errors.AsType[*assay.Error](api.StatusError("apply", err)); !ok || e.Kind != assay.Conflict || !strings.Contains(e.Remedy, "kubectl apply") {
		t.Errorf("apply: %v", err)
	}
	_, err = o.Delete(t.Context(), &api.DeleteRequest{Kind: "MeshConfig", Namespace: "shop", Name: "default"})
	if e, ok := errors.AsType[*assay.Error](api.StatusError("delete", err)); !ok || e.Kind != assay.Conflict || !strings.Contains(e.Remedy, "kubectl delete meshconfig") {
		t.Errorf("delete: %v", err)
	}
	// What is not sound as a whole leaves the last in effect.
	r.follow(t, ClusterChanges{Declared: &Declared{Intent: discovery.Intent{Namespaces: []assay.NamespaceConfig{{Namespace: "shop", Mode: "loose"}}}}})
	if n := a.get("namespace/shop").GetNamespace(); n.Mode != "strict" {
		t.Errorf("the namespace: %v", n)
	}
	resp, err := o.Check(t.Context(), &api.CheckRequest{})
	if err != nil || !slices.ContainsFunc(resp.Findings, func(f *api.Finding) bool { return f.Kind == "intent-not-in-effect" }) {
		t.Errorf("check does not tell: %v %v", resp, err)
	}
}

// TestFoundOfPods: a node tells what it finds about its pods, also of one that is no workload
// because it cannot be meshed; about others it is not heard.
func TestFoundOfPods(t *testing.T) {
	r := startCluster(t, nil)
	r.follow(t, twoNodes(pod("odd", "node-1", "10.0.1.1"), pod("other", "node-2", "10.0.2.1")))
	r.follow(t, ClusterChanges{Nodes: []Node{{Name: "node-3", Agentless: true}}})
	h := r.joinNode(t, "node-1")
	a := syncHost(t, h.hosts, nil)
	_, none := r.Found(0)
	for _, uid := range []string{"other", "nobody", "odd"} {
		f := assay.Finding{Time: time.Now(), Workload: uid, Kind: "pod-not-meshed", Subject: "shop/" + uid, Detail: "it cannot be"}
		a.send(&api.HostUpdate{Update: &api.HostUpdate_Finding{Finding: api.FromFinding(&f)}})
	}
	eventually(t, "the finding is known", func() bool { return r.findings("pod-not-meshed") > 0 })
	check, err := r.Check(t.Context(), &api.CheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{}
	for _, f := range check.Findings {
		found[f.Kind] += f.Subject
	}
	if found["node-without-agent"] != "node node-2" || found["pod-not-meshed"] != "shop/odd" {
		t.Errorf("check finds %v", found)
	}
	list, number := r.Found(none)
	if len(list) != 1 || list[0].Workload != "odd" || list[0].Count != 1 || number == none {
		t.Errorf("%d, then %d: %+v", none, number, list)
	}
	if list, again := r.Found(number); list != nil || again != number {
		t.Errorf("nothing new: %+v", list)
	}
}

// TestStraysOfPods: bytes that belong nowhere and TCP that avoids its capture are found at the
// pod whose host counts them, and again when there are more.
func TestStraysOfPods(t *testing.T) {
	r := startCluster(t, nil)
	r.follow(t, twoNodes(pod("odd", "node-1", "10.0.1.1"), pod("even", "node-1", "10.0.1.2")))
	h := r.joinNode(t, "node-1")
	a := syncHost(t, h.hosts, nil)
	for uid, addr := range map[string]string{"odd": "10.0.1.1", "even": "10.0.1.2"} {
		a.up(r.meshed(h, uid, addr))
		a.waitAccepted(uid)
	}
	seen := time.Now().UTC().Truncate(time.Microsecond)
	// send waits until control has a report that says that so many packets escaped.
	send := func(uid string, unexplained int64, packets uint64) {
		t.Helper()
		escaped := signal(assay.Outbound, nil, 0)
		escaped.Service, escaped.Protocol, escaped.Security, escaped.Reason, escaped.Remote, escaped.Port = "", assay.Opaque, assay.Plaintext, assay.ReasonEscaped, "192.0.2.1", 443
		escaped.PacketsOut, escaped.BytesOut, escaped.BytesIn, escaped.LastSeen = packets, 60*packets, 0, seen
		signals := []assay.Signals{escaped}
		if packets == 0 {
			signals = nil
		}
		a.send(api.ReportUpdate(api.FromReport(&api.Report{Workload: uid, Started: seen, Signals: signals, Balance: &assay.Balance{Out: assay.BalanceWay{Unexplained: unexplained}}})))
		eventually(t, "the report", func() bool {
			for c := range r.model.counts {
				if c.workload.ID == uid && c.Balance.Out.Unexplained == unexplained && (packets == 0 || len(c.Signals) == 1 && c.Signals[0].PacketsOut == packets) {
					return true
				}
			}
			return false
		})
		r.model.findStrays()
	}
	_, none := r.Found(0)
	send("even", 100, 0)
	if list, number := r.Found(none); list != nil {
		t.Errorf("noise is found, %d: %+v", number, list)
	}
	send("odd", 50_000, 7)
	list, number := r.Found(none)
	found := map[string]Found{}
	for _, f := range list {
		found[f.Workload+" "+f.Kind] = f
	}
	bytes, tcp := found["odd unexplained-bytes"], found["odd capture-escaped"]
	if len(list) != 2 || bytes.Count != 1 || bytes.Remedy == "" || tcp.Count != 1 || !tcp.Time.Equal(seen) || tcp.Subject != "192.0.2.1:443" || !strings.Contains(tcp.Detail, "7 packets, 420 bytes") {
		t.Fatalf("found %+v", list)
	}
	send("odd", 50_000, 7)
	if list, again := r.Found(number); list != nil || again != number {
		t.Errorf("the same: %+v", list)
	}
	send("odd", 50_000, 9)
	list, _ = r.Found(number)
	i := slices.IndexFunc(list, func(f Found) bool { return f.Kind == "capture-escaped" })
	if len(list) != 2 || list[i].Count != 2 || !list[1-i].Time.Equal(bytes.Time) {
		t.Errorf("more: %+v", list)
	}
	send("odd", 0, 0)
	if list, _ := r.Found(0); len(list) != 0 {
		t.Errorf("of a proxy that begins anew: %+v", list)
	}
}
