package control

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/discovery"
	"assay.dev/identity"
)

// startSidecars starts the control of a cluster whose pods may speak for themselves. A token
// "own UID" is that of a pod of shop/web.
func startSidecars(t *testing.T, change func(*Config)) *running {
	return startCluster(t, func(cfg *Config) {
		cfg.Cluster.Sidecars = true
		if change != nil {
			change(cfg)
		}
	})
}

// injected is a pod with a sidecar, which runs images of these digests.
func injected(uid, node, addr string, images ...string) Pod {
	p := pod(uid, node)
	p.Name, p.Sidecar, p.Asks = uid, "assay:1", true
	if addr != "" {
		p.Addrs = []netip.Addr{netip.MustParseAddr(addr)}
	}
	for _, i := range images {
		p.Artifacts = append(p.Artifacts, assay.Artifact{Kind: assay.Image, Name: i, Digest: assay.DigestOf([]byte(i)), Evidence: assay.ByAPIServer})
	}
	return p
}

// TestPodsJoin: a pod joins as itself, if it was injected and its token says so; and on no mesh
// that has no sidecars.
func TestPodsJoin(t *testing.T) {
	without := startCluster(t, nil)
	without.follow(t, twoNodes(injected("a", "node-1", "10.0.1.1")))
	if _, err := without.tryJoinNode(t, "own a"); assay.KindOf(err) != assay.Denied || !strings.Contains(err.Error(), "do not speak for themselves") {
		t.Errorf("without an injector: %v", err)
	}

	r := startSidecars(t, nil)
	hidden, bank := injected("hidden", "node-1", "192.0.2.1"), injected("bank", "node-1", "10.0.1.9")
	forged := injected("forged", "node-1", "10.0.1.8")
	hidden.HostNetwork, bank.Account, forged.Asks = true, "bank", false
	r.follow(t, ClusterChanges{Nodes: []Node{{Name: "node-1", Zone: "z-1"}, {Name: "node-2"}}, Pods: []Pod{injected("a", "node-1", "10.0.1.1"), pod("plain", "node-1", "10.0.1.2"), hidden, bank, forged}})
	for token, want := range map[string]assay.Kind{
		"own nobody": assay.Unavailable, "own plain": assay.Denied, "own hidden": assay.Denied, "own bank": assay.Denied, // whose account is another one
		"own forged": assay.Unavailable, // which has what is injected, and asks for nothing
	} {
		if _, err := r.tryJoinNode(t, token); assay.KindOf(err) != want {
			t.Errorf("token %q: %v, want %s", token, err, want)
		}
	}
	a := r.joinNode(t, "own a")
	if a.id != podID("a") || r.joinNode(t, "own a").id != a.id {
		t.Errorf("host %s", a.id)
	}
	if h, _ := r.model.host(a.id); h.Name != "shop/a" || h.Pod != "a" || h.Node != "node-1" || h.Zone != "z-1" || len(h.Covers) != 0 {
		t.Errorf("the host: %+v", h)
	}
	if leaf, err := x509.ParseCertificate(a.cert.Certificate[0]); err != nil || time.Until(leaf.NotAfter) > 25*time.Hour {
		t.Errorf("its certificate: %v %v", leaf, err)
	}
	resp, err := a.hosts.Renew(t.Context(), &api.RenewRequest{Csr: csr(t, newKey(t))})
	if err != nil || resp.HostId != a.id {
		t.Errorf("a renewal: %v %v", resp, err)
	}
	r.follow(t, ClusterChanges{Nodes: []Node{{Name: "node-1", Zone: "z-2"}}})
	if h, _ := r.model.host(a.id); h.Zone != "z-2" {
		t.Errorf("its node is in another zone now, and it is in %s", h.Zone)
	}
	unlabelled := injected("a", "node-1", "10.0.1.1")
	unlabelled.Asks = false
	r.follow(t, ClusterChanges{Pods: []Pod{unlabelled}})
	if r.joinNode(t, "own a").id != a.id {
		t.Error("its namespace's label is gone, and it cannot join again")
	}
}

// TestPodSpeaksForItself: a stolen token of a pod is worth that pod, as the platform knows it;
// and that of a node's agent is not worth a pod that has a sidecar.
func TestPodSpeaksForItself(t *testing.T) {
	now := newClock()
	r := startSidecars(t, func(cfg *Config) { cfg.Now = now.now })
	r.follow(t, twoNodes(injected("a", "node-1", "10.0.1.1", "app"), injected("b", "node-1", "10.0.1.2", "app"), injected("new", "node-1", ""), pod("plain", "node-1", "10.0.1.3")))
	h, other, node := r.joinNode(t, "own a"), r.joinNode(t, "own b"), r.joinNode(t, "node-1")
	a, b, n := syncHost(t, h.hosts, nil), syncHost(t, other.hosts, nil), syncHost(t, node.hosts, nil)
	a.up(r.meshed(h, "a", "10.0.1.1"))
	a.waitAccepted("a")
	n.up(r.meshed(node, "plain", "10.0.1.3"))
	n.waitAccepted("plain")
	for why, w := range map[string]*assay.Workload{
		"speaks for itself alone": r.meshed(h, "b", "10.0.1.2"), "shop/a speaks for itself": r.meshed(h, "plain", "10.0.1.3"),
		"said to be on host": func() *assay.Workload { w := r.meshed(h, "b", "10.0.1.2"); w.Host = other.id; return w }(),
		"service account web, not shop": func() *assay.Workload {
			w := r.meshed(h, "a", "10.0.1.1")
			w.Name, w.Identity.Account = "bank", "bank"
			return w
		}(),
	} {
		a.forget()
		a.up(w)
		a.refusedFor(w.ID, why)
	}
	n.up(r.meshed(node, "b", "10.0.1.2"))
	n.refusedFor("b", "has a sidecar")
	for _, uid := range []string{"b", "plain"} {
		if _, err := issue(t, h.hosts, uid); err == nil {
			t.Errorf("a certificate for %s", uid)
		}
	}
	if _, err := issue(t, node.hosts, "a"); err == nil {
		t.Error("a certificate for the agent of the pod's node")
	}
	// Another's address is not taken by who is first to say so.
	fresh := r.joinNode(t, "own new")
	f := syncHost(t, fresh.hosts, nil)
	f.up(r.meshed(fresh, "new", "10.0.1.2"))
	eventually(t, "it waits", func() bool {
		r.model.mu.Lock()
		defer r.model.mu.Unlock()
		return r.model.cluster.waiting["new"] != nil
	})
	now.advance(waitFor)
	f.refusedFor("new", "10.0.1.2")
	f.forget()
	r.follow(t, ClusterChanges{Pods: []Pod{injected("new", "node-1", "10.0.1.4")}})
	f.up(r.meshed(fresh, "new", "10.0.1.4"))
	f.waitAccepted("new")
	b.up(r.meshed(other, "b", "10.0.1.2"))
	b.waitAccepted("b")
	// Nor is a word about another's.
	found := assay.Finding{Time: time.Now(), Workload: "plain", Kind: "made-up", Subject: "shop/plain"}
	a.send(&api.HostUpdate{Update: &api.HostUpdate_Finding{Finding: api.FromFinding(&found)}})
	found.Workload, found.Kind = "a", "its-own"
	a.send(&api.HostUpdate{Update: &api.HostUpdate_Finding{Finding: api.FromFinding(&found)}})
	eventually(t, "its own finding", func() bool { return r.findings("its-own") > 0 })
	if r.findings("made-up") > 0 {
		t.Error("a finding about another pod is taken")
	}
}

// TestEvidenceOfTheAPIServer: what a pod runs that speaks for itself is what the platform says,
// and it has no certificate before that.
func TestEvidenceOfTheAPIServer(t *testing.T) {
	r := startSidecars(t, nil)
	r.follow(t, twoNodes(injected("a", "node-1", "10.0.1.1"), pod("plain", "node-2", "10.0.2.1")))
	h, node := r.joinNode(t, "own a"), r.joinNode(t, "node-2")
	a, n := syncHost(t, h.hosts, nil), syncHost(t, node.hosts, nil)
	w := r.meshed(h, "a", "10.0.1.1")
	w.Artifacts = assay.ArtifactSet{{Kind: assay.Image, Name: "made up", Digest: assay.DigestOf([]byte("made up"))}}
	a.up(w)
	a.waitAccepted("a")
	if _, err := issue(t, h.hosts, "a"); assay.KindOf(err) != assay.NotFound || !strings.Contains(err.Error(), "no image") {
		t.Errorf("before the platform knows an image: %v", err)
	}
	artifacts := func(images ...string) {
		t.Helper()
		want := injected("", "", "", images...).Artifacts
		eventually(t, fmt.Sprint("it runs ", images), func() bool {
			set, err := api.Artifacts(n.get("workload/a").GetWorkload().GetArtifacts())
			return err == nil && slices.Equal(set, want)
		})
		chain, err := issue(t, h.hosts, "a")
		if err != nil {
			t.Fatal(err)
		}
		if digest, err := assay.CertificateArtifacts(chain[0]); err != nil || digest != want.Digest() {
			t.Errorf("the certificate says %s, %v", digest, err)
		}
	}
	r.follow(t, ClusterChanges{Pods: []Pod{injected("a", "node-1", "10.0.1.1", "init")}})
	artifacts("init")
	r.follow(t, ClusterChanges{Pods: []Pod{injected("a", "node-1", "10.0.1.1", "init", "app")}})
	artifacts("init", "app")
	// An agent's word is its own.
	p := r.meshed(node, "plain", "10.0.2.1")
	p.Artifacts = injected("", "", "", "app").Artifacts
	p.Artifacts[0].Config, p.Artifacts[0].Index = assay.DigestOf([]byte("config")), assay.DigestOf([]byte("index"))
	n.up(p)
	n.waitAccepted("plain")
	if x := n.waitFor("workload/plain").GetWorkload().GetArtifacts(); len(x) != 1 || x[0].GetDigest() != string(p.Artifacts[0].Digest) || x[0].GetIndex() != "" {
		t.Errorf("every host hears of what contains the image: %v", x)
	}
	for _, v := range documents[api.WorkloadView](t, r.operator(t), "workloads") {
		want := assay.ByAPIServer
		if v.ID == "plain" {
			want = assay.ByAgent
			if x := v.Artifacts[0]; x.Config != p.Artifacts[0].Config || x.Index != p.Artifacts[0].Index || v.ArtifactSet != assay.DigestOf([]byte(x.Digest+"\n")) {
				t.Errorf("what contains the image, and what it contains: %+v, set %s", x, v.ArtifactSet)
			}
		}
		for _, x := range v.Artifacts {
			if x.Evidence != want {
				t.Errorf("%s: %+v", v.ID, x)
			}
		}
	}
}

// TestNobodyInPlaintext: a pod with a sidecar is nobody's endpoint before it has joined, nor when
// it has said that it ends; it is forgotten when it has ended, and check tells of what does not join.
func TestNobodyInPlaintext(t *testing.T) {
	now := newClock()
	r := startSidecars(t, func(cfg *Config) { cfg.Now = now.now })
	p, late := injected("a", "node-1", "10.0.1.1", "app"), pod("late", "node-2", "10.0.2.1")
	late.Name, late.Asks = "late", true
	hidden := pod("hidden", "node-2", "192.0.2.1")
	hidden.Name, hidden.Asks, hidden.HostNetwork = "hidden", true, true
	changes := twoNodes(p, late, hidden)
	changes.Services = []Placed{{DeclaredService: discovery.DeclaredService{Namespace: "shop", Name: "web", ClusterIPs: []netip.Addr{netip.MustParseAddr("10.96.0.1")},
		Ports: []discovery.DeclaredPort{{Port: assay.Port{Port: 80}}}}, Places: []discovery.Place{
		{Workload: "a", Addrs: p.Addrs, Targets: []uint16{8080}, Ready: true, Serving: true}, {Workload: "late", Addrs: late.Addrs, Targets: []uint16{8080}, Ready: true, Serving: true},
	}}}
	r.follow(t, changes)
	other := r.joinNode(t, "node-2")
	n := syncHost(t, other.hosts, nil)
	endpoints := func(want ...string) {
		t.Helper()
		eventually(t, fmt.Sprint("endpoints ", want), func() bool {
			var got []string
			for _, e := range n.get("service/shop/web").GetService().GetEndpoints() {
				got = append(got, e.GetWorkload()+" "+e.GetIdentity())
			}
			return slices.Equal(got, want)
		})
	}
	const plain, meshed = "late ", "a spiffe://bank.test/ns/shop/sa/web"
	endpoints(plain)
	check := func() map[string]string {
		t.Helper()
		resp, err := r.Check(t.Context(), &api.CheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		found := map[string]string{}
		for _, f := range resp.Findings {
			found[f.Kind] += f.Subject + " "
		}
		return found
	}
	if found := check(); found["pod-without-sidecar"] != "shop/hidden shop/late " || found["sidecar-not-joined"] != "" {
		t.Errorf("check finds %v", found)
	}
	now.advance(settleIn)
	if found := check(); found["sidecar-not-joined"] != "shop/a " {
		t.Errorf("check finds %v", found)
	}
	h := r.joinNode(t, "own a")
	a := syncHost(t, h.hosts, nil)
	a.synced()
	endpoints(plain)
	a.up(r.meshed(h, "a", "10.0.1.1"))
	a.waitAccepted("a")
	endpoints(meshed, plain)
	if found := check(); found["sidecar-not-joined"] != "" {
		t.Errorf("check finds %v", found)
	}
	a.gone("a")
	endpoints(plain)
	r.follow(t, ClusterChanges{RemovedPods: []string{"a"}})
	eventually(t, "its host is forgotten", func() bool { _, there := r.model.host(h.id); return !there })
	eventually(t, "by the store, too", func() bool {
		hosts, err := r.store.ListHosts(t.Context())
		return err == nil && len(hosts) == 1
	})
	endpoints(plain)
	if _, err := h.hosts.Renew(t.Context(), &api.RenewRequest{Csr: csr(t, newKey(t))}); assay.KindOf(api.StatusError("renew", err)) != assay.Denied {
		t.Errorf("the certificate of a pod that has ended: %v", err)
	}
	if _, err := r.tryJoinNode(t, "own a"); assay.KindOf(err) != assay.Unavailable {
		t.Errorf("the token of a pod that has ended: %v", err)
	}
}

// TestMeshOfSidecars: without agents no node lacks one; a control that restarts knows whose hosts are
// pods, and forgets those that ended meanwhile.
func TestMeshOfSidecars(t *testing.T) {
	r := startSidecars(t, nil)
	r.follow(t, twoNodes(injected("a", "node-1", "10.0.1.1", "app"), injected("b", "node-1", "10.0.1.2", "app")))
	h, other := r.joinNode(t, "own a"), r.joinNode(t, "own b")
	a := syncHost(t, h.hosts, nil)
	a.up(r.meshed(h, "a", "10.0.1.1"))
	a.waitAccepted("a")
	resp, err := r.Check(t.Context(), &api.CheckRequest{})
	if err != nil || slices.ContainsFunc(resp.Findings, func(f *api.Finding) bool { return f.Kind == "node-without-agent" }) {
		t.Errorf("check: %v %v", resp, err)
	}
	a.close()
	r = r.restart(nil)
	h.connect(t, r)
	if _, err := issue(t, h.hosts, "a"); err != nil {
		t.Errorf("a renewal before the API server was heard: %v", err)
	}
	r.follow(t, twoNodes(injected("a", "node-1", "10.0.1.1", "app")))
	eventually(t, "the other is forgotten", func() bool { _, there := r.model.host(other.id); return !there })
	a = syncHost(t, h.hosts, nil)
	a.up(r.meshed(h, "a", "10.0.1.1"))
	a.waitAccepted("a")
}

// TestKnownByName: who knows control's roots and its name, and has no certificate, may ask it over
// HTTPS, before and after a rotation; by another name nobody does.
func TestKnownByName(t *testing.T) {
	const name = "assay-control.assay-system.svc"
	r := start(t, func(cfg *Config) { cfg.Names = []string{name} })
	l, err := tls.Listen("tcp", "127.0.0.1:0", r.WebTLS())
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "it is") })}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	ask := func(name string) error {
		roots := x509.NewCertPool()
		for _, der := range r.Roots() {
			root, err := x509.ParseCertificate(der)
			if err != nil {
				t.Fatal(err)
			}
			roots.AddCert(root)
		}
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: name}}}
		resp, err := client.Get("https://" + l.Addr().String())
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	if err := ask(name); err != nil {
		t.Error(err)
	}
	if err := ask("assay-control.other.svc"); err == nil {
		t.Error("it is known by another name")
	}
	before := r.authority.State().Infrastructure.Root
	if _, err := r.operator(t).Rotate(t.Context(), &api.RotateRequest{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the new root signs", func() bool { return r.authority.State().Infrastructure.Root != before })
	if err := ask(name); err != nil {
		t.Errorf("after a rotation: %v", err)
	}
}

// TestNoAgentForPods: pods that are labelled for an agent, where there is none, are named, but by
// their node where others have one.
func TestNoAgentForPods(t *testing.T) {
	r := startSidecars(t, nil)
	labelled, hidden, virtual := pod("a", "node-1", "10.0.1.1"), pod("h", "node-1", "192.0.2.1"), pod("v", "virtual", "10.0.3.1")
	for _, p := range []*Pod{&labelled, &hidden, &virtual} {
		p.Name, p.Wants = p.UID, true
	}
	hidden.HostNetwork = true
	changes := twoNodes(labelled, hidden, virtual, pod("other", "node-1", "10.0.1.2"))
	changes.Nodes = append(changes.Nodes, Node{Name: "virtual", Agentless: true})
	r.follow(t, changes)
	found := func() (list []string) {
		t.Helper()
		resp, err := r.Check(t.Context(), &api.CheckRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range resp.Findings {
			if f.Kind == "pod-without-agent" || f.Kind == "node-without-agent" {
				list = append(list, f.Subject)
			}
		}
		return list
	}
	if got := found(); !slices.Equal(got, []string{"shop/a", "shop/h", "shop/v"}) {
		t.Errorf("without agents: %v", got)
	}
	r.model.findStrays()
	list, number := r.Found(^uint64(0))
	var pods []string
	for _, f := range list {
		pods = append(pods, f.Workload+" "+f.Kind)
	}
	if slices.Sort(pods); !slices.Equal(pods, []string{"a pod-without-agent", "h pod-without-agent", "v pod-without-agent"}) {
		t.Errorf("found at pods: %+v", list)
	}
	r.joinNode(t, "node-2")
	if got := found(); !slices.Equal(got, []string{"node node-1", "shop/v"}) {
		t.Errorf("with an agent elsewhere: %v", got)
	}
	r.joinNode(t, "node-1")
	if got := found(); !slices.Equal(got, []string{"shop/v"}) {
		t.Errorf("with agents: %v", got)
	}
	r.model.findStrays()
	if list, _ := r.Found(number - 1); len(list) != 1 || list[0].Workload != "v" {
		t.Errorf("found at pods with agents: %+v", list)
	}
}

// TestPodHoldsBackNoRoot: a new root waits for pods that are hosts, but only for a day: who writes
// what runs in a pod does not decide when the mesh's root is replaced.
func TestPodHoldsBackNoRoot(t *testing.T) {
	now := newClock()
	r := startSidecars(t, func(cfg *Config) { cfg.Now = now.now })
	r.follow(t, twoNodes(injected("a", "node-1", "10.0.1.1", "app"), pod("plain", "node-2", "10.0.2.1")))
	h, node := r.joinNode(t, "own a"), r.joinNode(t, "node-2")
	a, n := syncHost(t, h.hosts, nil), syncHost(t, node.hosts, nil)
	a.up(r.meshed(h, "a", "10.0.1.1"))
	a.waitAccepted("a")
	n.up(r.meshed(node, "plain", "10.0.2.1"))
	n.waitAccepted("plain")
	old := r.authority.State().Workload.Root
	if _, err := r.operator(t).Rotate(t.Context(), &api.RotateRequest{}); err != nil {
		t.Fatal(err)
	}
	published := r.authority.State().Bundle
	signs := func() bool { return r.authority.State().Workload.Root != old }
	least := func() uint64 { return r.model.leastAcknowledged(r.authority.State()) }
	n.ack("", published)
	n.ack("plain", published)
	now.advance(identity.PodLife - time.Hour)
	if _, err := h.hosts.Renew(t.Context(), &api.RenewRequest{Csr: csr(t, newKey(t))}); err != nil {
		t.Fatal(err)
	}
	if signs() || least() >= published {
		t.Error("the root does not wait for the pod")
	}
	n.ack("", published-1) // its node's agent is waited for
	eventually(t, "the agent is heard", func() bool {
		r.model.mu.Lock()
		defer r.model.mu.Unlock()
		return r.model.hosts[node.id].bundle == published-1
	})
	now.advance(time.Hour)
	if signs() || least() != published-1 {
		t.Errorf("the root does not wait for the agent of a node: %d", least())
	}
	n.ack("", published)
	eventually(t, "the new root signs, whatever the pod says", signs)
}
