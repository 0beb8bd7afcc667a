package control

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/identity"
	"assay.dev/store"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// TestSeveralServe: whatever one of three controls is told the others serve: a token is
// used at another than it was made at, hosts of different controls see each other, any of them
// signs, people see the same everywhere, and what is removed at one is cut off at another.
func TestSeveralServe(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 3, nil)
	a, b, c := m.controls[0], m.controls[1], m.controls[2]
	h1, err := b.tryJoin(t, a.token(t, "bank/*"), newKey(t), "one")
	if err != nil {
		t.Fatal(err)
	}
	h2 := c.join(t, "two", "bank/*")
	s1 := syncHost(t, h1.at(t, a).hosts, nil) // joined at b a moment ago
	s2 := syncHost(t, h2.at(t, b).hosts, nil)
	w1 := s1.workload("w1", "bank", "payments", 1, 8080)
	s1.up(w1)
	s1.synced()
	s1.waitAccepted("w1")
	began := time.Now()
	s2.waitFor("workload/w1")
	t.Logf("a workload of one control's host was another's after %v", time.Since(began).Round(time.Millisecond))
	service := s2.waitFor("service/bank/payments").GetService()
	eventually(t, "the third knows it", func() bool { return c.knows("w1") })
	for i, r := range m.controls {
		if _, err := issue(t, h1.at(t, r).hosts, "w1"); err != nil {
			t.Errorf("control %d signs nothing: %v", i, err)
		}
		if _, err := issue(t, h2.at(t, r).hosts, "w1"); assay.KindOf(err) != assay.Denied {
			t.Errorf("control %d: another host's certificate: %v", i, err)
		}
	}
	// One virtual address for all.
	s1again := s1.waitFor("service/bank/payments").GetService()
	if got, want := fmt.Sprint(s1again.GetVips()), fmt.Sprint(service.GetVips()); got != want || got == "[]" {
		t.Errorf("virtual addresses %s and %s", got, want)
	}
	// Numbers are shown wherever people look.
	s1.send(api.ReportUpdate(&api.WorkloadReport{WorkloadId: "w1", Started: 1, Handshakes: 7}))
	for i, r := range m.controls {
		eventually(t, fmt.Sprintf("control %d shows the numbers", i), func() bool {
			for _, v := range documents[api.SignalsView](t, r.operator(t), "signals") {
				if v.Workload == "w1" && v.Counters.Handshakes == 7 {
					return true
				}
			}
			return false
		})
		eventually(t, fmt.Sprintf("control %d shows all three certificates", i), func() bool {
			n := 0
			for _, v := range documents[api.CertificateView](t, r.operator(t), "certificates") {
				if v.Workload == "w1" {
					n++
				}
			}
			return n == 3
		})
		for _, f := range checked(t, r) {
			if f.GetKind() == "host-not-connected" || f.GetKind() == "control-away" {
				t.Errorf("control %d: %v", i, f)
			}
		}
	}
	// The workload goes; a host is removed elsewhere.
	s1.gone("w1")
	eventually(t, "the workload is gone everywhere", func() bool { return !b.knows("w1") && !c.knows("w1") && s2.get("workload/w1") == nil })
	if _, err := c.operator(t).Delete(t.Context(), &api.DeleteRequest{Kind: "host", Name: h1.id}); err != nil {
		t.Fatal(err)
	}
	s1.waitEnd()
	if _, err := h1.at(t, b).hosts.Renew(t.Context(), &api.RenewRequest{Csr: csr(t, newKey(t))}); err == nil {
		eventually(t, "the removed host is denied", func() bool {
			_, err := h1.at(t, b).hosts.Renew(t.Context(), &api.RenewRequest{Csr: csr(t, newKey(t))})
			return err != nil
		})
	}
}

func checked(t *testing.T, r *running) []*api.Finding {
	t.Helper()
	resp, err := r.operator(t).Check(t.Context(), &api.CheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetFindings()
}

// TestControlDies: the hosts of a control that dies go on at another without having
// forgotten anything; those that do not come lose their lease; the rest notices nothing.
func TestControlDies(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 2, func(cfg *Config) { cfg.Lease = 2 * time.Second })
	a, b := m.controls[0], m.controls[1]
	var hosts []*remoteHost
	var streams []*agent
	for i, r := range []*running{a, a, b, b, b, b} { // most of them stay
		h := r.join(t, fmt.Sprint("host", i), "bank/*")
		s := syncHost(t, h.hosts, nil)
		id := fmt.Sprint("w", i)
		s.up(s.workload(id, "bank", "payments", 1, 8080))
		s.synced()
		s.waitAccepted(id)
		hosts, streams = append(hosts, h), append(streams, s)
	}
	for i := range hosts {
		streams[0].waitFor(fmt.Sprint("workload/w", i))
		eventually(t, "b knows all", func() bool { return b.knows(fmt.Sprint("w", i)) })
	}
	m.crash(0)
	streams[0].waitEnd()
	// The first goes to the other control, at once.
	moved := syncHost(t, hosts[0].at(t, b).hosts, streams[0])
	for _, key := range moved.first {
		if moved.get(key) == nil {
			t.Errorf("%s is gone", key)
		}
	}
	for i := range hosts {
		if !slices.Contains(moved.first, fmt.Sprint("workload/w", i)) {
			t.Errorf("workload w%d is not in the first snapshot of the other control", i)
		}
	}
	moved.up(moved.workload("w0", "bank", "payments", 1, 8080))
	moved.synced()
	moved.waitAccepted("w0")
	if _, err := issue(t, hosts[0].at(t, b).hosts, "w0"); err != nil {
		t.Error(err)
	}
	eventually(t, "the host that does not come back is lost", func() bool { _, lost, _ := b.hostState(hosts[1].id); return lost })
	for i, h := range hosts {
		if present, lost, _ := b.hostState(h.id); i != 1 && (!present || lost) {
			t.Errorf("host %d: present %v, lost %v", i, present, lost)
		}
	}
	away := false
	for _, f := range checked(t, b) {
		away = away || f.GetKind() == "control-away"
	}
	if !away {
		t.Error("check does not say that a control is away")
	}
	// A new one has everything.
	c := m.add()
	for i := range hosts {
		if !c.knows(fmt.Sprint("w", i)) {
			t.Errorf("a new control does not know workload w%d", i)
		}
	}
}

// TestControlForgotten: the hosts of a control that died with it stay away when the control is
// forgotten, at the one that forgets it as well.
func TestControlForgotten(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 2, nil)
	a, b := m.controls[0], m.controls[1]
	h := b.join(t, "one", "bank/*")
	s := syncHost(t, h.hosts, nil)
	s.up(s.workload("w1", "bank", "payments", 1, 8080))
	s.synced()
	s.waitAccepted("w1")
	eventually(t, "a knows the workload, and that the host is there", func() bool { present, _, _ := a.hostState(h.id); return present && a.knows("w1") })
	m.crash(1)
	eventually(t, "the host is away", func() bool { present, _, _ := a.hostState(h.id); return !present })
	eventually(t, "the other control is forgotten", func() bool {
		a.several.mu.Lock()
		for _, o := range a.several.others {
			o.grew = o.grew.Add(-time.Hour) // as it would be then
		}
		a.several.mu.Unlock()
		list, err := a.store.ListReplicas(t.Context())
		return err == nil && len(list) == 1
	})
	for range 3 {
		a.several.mu.Lock()
		was := a.several.beaten
		a.several.mu.Unlock()
		eventually(t, "another look at who lives", func() bool { a.several.mu.Lock(); defer a.several.mu.Unlock(); return a.several.beaten != was })
	}
	if present, _, _ := a.hostState(h.id); present {
		t.Error("the host of a control that is forgotten is present")
	}
	if f := checked(t, a); slices.ContainsFunc(f, func(f *api.Finding) bool { return f.GetKind() == "control-away" }) {
		t.Errorf("it is still spoken of: %v", f)
	}
}

// TestDetachHeardEarly: that another control has lost a host's stream counts, though it is heard
// before the store knows that this one has it.
func TestDetachHeardEarly(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 2, nil)
	a, b := m.controls[0], m.controls[1]
	h := b.join(t, "one", "bank/*")
	syncHost(t, h.hosts, nil)
	eventually(t, "a knows that the host is there", func() bool { present, _, _ := a.hostState(h.id); return present })
	stored, _ := a.model.host(h.id)
	m.lines[0].set(true) // it stores nothing
	s := syncHost(t, h.at(t, a).hosts, nil)
	stored.Replica = ""
	a.model.hear(&news{changed: map[store.Kind][]string{store.OfHost: {h.id}}, hosts: map[string]store.Host{h.id: stored}})
	if present, _, _ := a.hostState(h.id); !present {
		t.Fatal("it has the stream")
	}
	s.close()
	eventually(t, "the host is away", func() bool { present, _, _ := a.hostState(h.id); return !present })
	m.lines[0].set(false)
}

// TestHostMoves: the newest stream of a host counts, wherever it is; what the old one's control
// still has to say of it does not.
func TestHostMoves(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 2, nil)
	a, b := m.controls[0], m.controls[1]
	h := a.join(t, "one", "bank/*")
	last := syncHost(t, h.hosts, nil)
	for i := range 6 {
		id := fmt.Sprint("w", i)
		last.up(last.workload(id, "bank", "payments", byte(i), 8080))
		last.synced()
		last.waitAccepted(id)
		for j, r := range m.controls {
			eventually(t, fmt.Sprintf("control %d has %s alone", j, id), func() bool {
				r.model.mu.Lock()
				defer r.model.mu.Unlock()
				return slices.Equal(r.model.workloadsOf(h.id), []string{id})
			})
		}
		next := syncHost(t, h.at(t, m.controls[(i+1)%2]).hosts, last)
		last.waitEnd()
		last = next
	}
	for j, r := range []*running{a, b} {
		if present, _, _ := r.hostState(h.id); !present {
			t.Errorf("control %d takes the host for away", j)
		}
	}
}

// TestOneAddressOfTwoNodes: of two nodes that say at two controls that a pod of theirs has an
// address one is believed, by both controls.
func TestOneAddressOfTwoNodes(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 2, func(cfg *Config) { cfg.Cluster = testCluster() })
	a, b := m.controls[0], m.controls[1]
	for _, r := range m.controls {
		r.follow(t, twoNodes(pod("p1", "node-1"), pod("p2", "node-2"), pod("p3", "node-1")))
	}
	h1, h2 := a.joinNode(t, "node-1"), b.joinNode(t, "node-2")
	s1, s2 := syncHost(t, h1.hosts, nil), syncHost(t, h2.hosts, nil)
	s1.up(a.meshed(h1, "p1", "10.1.0.7"))
	s2.up(b.meshed(h2, "p2", "10.1.0.7"))
	s1.up(a.meshed(h1, "p3", "10.1.0.8"))
	address := netip.MustParseAddr("10.1.0.7")
	owner := func(r *running) string {
		r.model.mu.Lock()
		defer r.model.mu.Unlock()
		return r.model.owner[address]
	}
	eventually(t, "both controls have one owner, and the other has none", func() bool {
		one := owner(a)
		return one != "" && owner(b) == one && a.knows("p1") != a.knows("p2") && b.knows("p1") != b.knows("p2") && b.knows("p3")
	})
	// The one that lost gets it when the other has gone.
	won, lost, waits := s1, b, "p2"
	gone := owner(a)
	if gone == "p2" {
		won, lost, waits = s2, a, "p1"
	}
	won.gone(gone)
	eventually(t, "the other pod has its address", func() bool { return owner(lost) == waits && owner(a) == owner(b) })
}

// TestHeardBeforeStored: a workload whose address another control has stored is withdrawn when
// that is heard, before the own word reaches the store, and taken when the other has gone.
func TestHeardBeforeStored(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 1, func(cfg *Config) { cfg.Cluster = testCluster() })
	a := m.controls[0]
	a.follow(t, twoNodes(pod("p1", "node-1"), pod("p2", "node-2")))
	h1, h2 := a.joinNode(t, "node-1"), a.joinNode(t, "node-2")
	s := syncHost(t, h1.hosts, nil)
	s.up(a.meshed(h1, "p1", "10.1.0.7"))
	s.waitAccepted("p1")
	other := a.meshed(h2, "p2", "10.1.0.7")
	a.model.hear(&news{changed: map[store.Kind][]string{store.OfWorkload: {"p2"}}, workloads: map[string]*assay.Workload{"p2": other}})
	waits := func() bool {
		a.model.mu.Lock()
		defer a.model.mu.Unlock()
		return a.model.cluster.waiting["p1"] != nil
	}
	if a.knows("p1") || !a.knows("p2") || !waits() {
		t.Fatalf("p1: %v, p2: %v, p1 waits: %v", a.knows("p1"), a.knows("p2"), waits())
	}
	a.model.hear(&news{changed: map[store.Kind][]string{store.OfWorkload: {"p2"}}})
	eventually(t, "p1 is taken again", func() bool { return a.knows("p1") && !waits() })
}

// TestClaimsAreShared: nobody is sent in plaintext to a pod that a node has reported to another
// control, which has not taken it.
func TestClaimsAreShared(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 2, func(cfg *Config) { cfg.Cluster = testCluster() })
	a, b := m.controls[0], m.controls[1]
	for _, r := range m.controls {
		r.follow(t, twoNodes(pod("p1", "node-1", "10.1.0.9")))
	}
	claimed := func(r *running) bool {
		r.model.mu.Lock()
		defer r.model.mu.Unlock()
		_, ok := r.model.cluster.claims["p1"]
		return ok
	}
	h := a.joinNode(t, "node-1")
	s := syncHost(t, h.hosts, nil)
	s.up(a.meshed(h, "p1", "10.1.0.7")) // the API server says otherwise, so far
	eventually(t, "both know the claim", func() bool { return claimed(a) && claimed(b) })
	s.released("p1")
	eventually(t, "both know that it was released", func() bool { return !claimed(a) && !claimed(b) })
}

// TestNodesOfSeveral: a node that only one control has seen go is forgotten, whichever that is; one
// of which another control has not heard yet stays.
func TestNodesOfSeveral(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 2, func(cfg *Config) { cfg.Cluster = testCluster() })
	for _, r := range m.controls {
		r.follow(t, twoNodes())
	}
	for i, r := range m.controls {
		other := m.controls[1-i]
		name := fmt.Sprint("node-", 5+i)
		known := func(r *running) bool { _, ok := r.model.host(nodeID(name)); return ok }
		r.follow(t, ClusterChanges{Nodes: []Node{{Name: name}}})
		r.joinNode(t, name)
		eventually(t, "the other control knows the host", func() bool { return known(other) })
		if gone := other.model.gone(); len(gone) > 0 {
			t.Errorf("control %d would forget a node that it has not heard of yet: %v", 1-i, gone)
		}
		r.follow(t, ClusterChanges{RemovedNodes: []string{name}})
		eventually(t, "the host is gone", func() bool { return !known(r) && !known(other) })
	}
}

// TestSeveralRotate: a root that was asked for at one control signs after hosts acknowledged it
// to others, once for all; a replaced intermediate signs nowhere.
func TestSeveralRotate(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 3, nil)
	var hosts []*remoteHost
	var streams []*agent
	for i, r := range m.controls {
		h := r.join(t, fmt.Sprint("host", i), "bank/*")
		s := syncHost(t, h.hosts, nil)
		s.up(s.workload(fmt.Sprint("w", i), "bank", "payments", 1, 8080))
		s.synced()
		s.waitAccepted(fmt.Sprint("w", i))
		hosts, streams = append(hosts, h), append(streams, s)
	}
	old := m.controls[0].authority.State()
	resp, err := m.controls[0].operator(t).Rotate(t.Context(), &api.RotateRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for i, s := range streams {
		eventually(t, fmt.Sprintf("host %d hears of the bundle", i), func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.bundle.GetVersion() == resp.BundleVersion })
	}
	for i, s := range streams {
		if got := m.controls[2].authority.State().Infrastructure.Root; got != old.Infrastructure.Root {
			t.Fatalf("a new root signs before host %d has acknowledged it", i)
		}
		s.ack(fmt.Sprint("w", i), resp.BundleVersion)
		s.ack("", resp.BundleVersion)
	}
	for i, r := range m.controls {
		eventually(t, fmt.Sprintf("control %d signs beneath the new root", i), func() bool { return r.authority.State().Infrastructure.Root != old.Infrastructure.Root })
		chain, err := issue(t, hosts[i].heard(streams[i]).at(t, r).hosts, fmt.Sprint("w", i))
		if err != nil {
			t.Fatal(err)
		}
		if got, want := r.authority.State(), m.controls[0].authority.State(); got.Workload.ID != want.Workload.ID || got.Made != want.Made {
			t.Errorf("control %d has %+v, another %+v", i, got, want)
		}
		if cn := chain[1].Subject.CommonName; cn != m.controls[0].authority.State().Workload.ID {
			t.Errorf("control %d signs with %s", i, cn)
		}
	}
}

// TestSeveralUnderLoad: while workloads come and go at three controls one dies, and another
// starts; in the end all of them and the database say the same.
func TestSeveralUnderLoad(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 3, nil)
	const each, rounds = 2, 12
	type place struct {
		h *remoteHost
		s *agent
	}
	var places []*place
	for i := range each * 3 {
		h := m.controls[i%3].join(t, fmt.Sprint("host", i), "bank/*")
		places = append(places, &place{h, syncHost(t, h.hosts, nil)})
	}
	want := map[string]bool{}
	for round := range rounds {
		if round == rounds/2 {
			m.crash(0)
			for i := 0; i < len(places); i += 3 {
				p := places[i]
				p.s.waitEnd()
				p.s = syncHost(t, p.h.at(t, m.controls[1+i%2]).hosts, p.s)
				for id := range want { // it tells again what it runs
					var host, n int
					if fmt.Sscanf(id, "w-%d-%d", &host, &n); host == i {
						p.s.up(p.s.workload(id, "bank", "payments", byte(n), 8080))
					}
				}
				p.s.synced()
			}
			m.add()
		}
		for i, p := range places {
			id := fmt.Sprintf("w-%d-%d", i, round)
			p.s.up(p.s.workload(id, "bank", "payments", byte(round), 8080))
			want[id] = true
			if round%3 == 2 {
				old := fmt.Sprintf("w-%d-%d", i, round-1)
				p.s.gone(old)
				delete(want, old)
			}
		}
	}
	ids := slices.Sorted(maps.Keys(want))
	all := func(r *running) []string {
		r.model.mu.Lock()
		defer r.model.mu.Unlock()
		var out []string
		for _, w := range r.model.catalog.Workloads() {
			out = append(out, w.ID)
		}
		return out
	}
	for i, r := range m.controls[1:] {
		eventually(t, fmt.Sprintf("control %d has what there is", i+1), func() bool { return slices.Equal(all(r), ids) })
	}
	db, err := store.Open(t.Context(), m.server.url())
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	eventually(t, "the store has what there is", func() bool {
		list, err := db.ListWorkloads(t.Context(), "")
		var stored []string
		for _, w := range list {
			stored = append(stored, w.ID)
		}
		slices.Sort(stored)
		return err == nil && slices.Equal(stored, ids)
	})
}

// TestSeveralChangeIntent: people declare at one control and remove at another, at the same time.
// Nobody is told that there was another, and all come to the same.
func TestSeveralChangeIntent(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 2, withIntent)
	a, b := m.controls[0], m.controls[1]
	apply := func(r *running, name string) error {
		_, err := r.operator(t).Apply(t.Context(), &api.ApplyRequest{Files: []*api.File{{Name: name + ".yaml", Yaml: []byte(
			"apiVersion: v1\nkind: Service\nmetadata: {namespace: bank, name: " + name + "}\nspec: {ports: [{port: 80}]}\n")}}})
		return err
	}
	remove := func(r *running, name string) error {
		_, err := r.operator(t).Delete(t.Context(), &api.DeleteRequest{Kind: "Service", Namespace: "bank", Name: name})
		return err
	}
	for round := range 6 {
		one, two := fmt.Sprint("one", round), fmt.Sprint("two", round)
		if err := apply(a, one); err != nil {
			t.Fatal(err)
		}
		b.catchUp(t.Context())
		b.intent.mu.Lock() // so that it hears of nothing, and plans with what it knew
		removed := make(chan error, 1)
		go func() { removed <- remove(b, one) }()
		err := apply(a, two)
		b.intent.mu.Unlock()
		if err := errors.Join(err, <-removed); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
	if err := apply(a, "last"); err != nil {
		t.Fatal(err)
	}
	if err := remove(b, "last"); err != nil { // declared at the other a moment ago
		t.Error(err)
	}
	if err := remove(a, "last"); assay.KindOf(api.StatusError("delete", err)) != assay.NotFound {
		t.Errorf("removed at the other a moment ago: %v", err)
	}
	want := []string{"two0", "two1", "two2", "two3", "two4", "two5"}
	for i, r := range m.controls {
		eventually(t, fmt.Sprintf("control %d has what there is", i), func() bool {
			var got []string
			for _, v := range documents[api.ServiceView](t, r.operator(t), "services") {
				got = append(got, v.Name)
			}
			return slices.Equal(got, want)
		})
	}
}

// TestIntoTheStore: the authority of a folder goes into the store, and from then on no control
// without the key has the store, nor one with another key.
func TestIntoTheStore(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	key, err := identity.ParseSealingKeys([]byte(identity.NewSealingKey()))
	if err != nil {
		t.Fatal(err)
	}
	alone := start(t, func(cfg *Config) { cfg.Store, cfg.takeover = s.url(), time.Second })
	h := alone.join(t, "one", "bank/*")
	root := alone.authority.SigningRoot()
	moved := alone.restart(func(cfg *Config) { cfg.Authority = key })
	if string(moved.authority.SigningRoot()) != string(root) {
		t.Error("it is another authority")
	}
	syncHost(t, h.at(t, moved).hosts, nil)
	other, err := identity.ParseSealingKeys([]byte(identity.NewSealingKey()))
	if err != nil {
		t.Fatal(err)
	}
	for what, keys := range map[string]*identity.SealingKeys{"no key": nil, "another key": other} {
		c, err := Open(t.Context(), Config{Data: t.TempDir(), Store: s.url(), Authority: keys, TrustDomain: "bank.test", takeover: time.Second})
		if err == nil {
			c.Close()
			t.Errorf("%s: it opened", what)
		}
		if k := assay.KindOf(err); k != assay.Conflict && k != assay.Denied {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestTapElsewhere: a tap shows what hosts of all controls see.
func TestTapElsewhere(t *testing.T) {
	t.Parallel()
	m := newMesh(t, 2, nil)
	a, b := m.controls[0], m.controls[1]
	h := a.join(t, "one", "bank/*")
	s := syncHost(t, h.hosts, nil)
	s.up(s.workload("w1", "bank", "payments", 1, 8080))
	s.synced()
	s.waitAccepted("w1")
	eventually(t, "b knows the service", func() bool { return b.model.hasService("bank/payments") && len(b.reach(alive)) == 1 })
	conn, err := grpc.NewClient("unix:"+b.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stream, err := api.NewOperatorClient(conn).Tap(t.Context(), &api.TapRequest{Watch: []byte(`{"service":"bank/payments","direction":"inbound"}`)})
	if err != nil {
		t.Fatal(err)
	}
	var watch string
	eventually(t, "a has the tap", func() bool {
		a.model.mu.Lock()
		defer a.model.mu.Unlock()
		for _, one := range a.model.taps.list {
			watch = one.watch.ID
		}
		return watch != ""
	})
	s.send(&api.HostUpdate{Update: &api.HostUpdate_Records{Records: &api.Records{Json: [][]byte{fmt.Appendf(nil, `{"workload":"w1","watches":[%q]}`, watch)}}}})
	e, err := stream.Recv()
	if err != nil || len(e.GetRecord()) == 0 {
		t.Fatalf("%v, %v", e, err)
	}
}
