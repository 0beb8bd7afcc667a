package agent

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
	"weak"

	"assay.dev"
	"assay.dev/agent/internal/lab"
	"assay.dev/api"
	"assay.dev/link"
)

// mesh makes what control could say, at random but the same in each run.
type mesh struct {
	*rand.Rand
	epoch, version uint64
	has            map[string]*api.Resource
}

func (m *mesh) one(of ...string) string { return of[m.IntN(len(of))] }

// piece makes a piece of a kind, perhaps one that there was.
func (m *mesh) piece() *api.Resource {
	n := m.IntN(8)
	id := func() assay.Identity {
		return assay.Identity{TrustDomain: "test", Namespace: "a", Account: m.one("x", "y")}
	}
	addr := func(net byte) netip.Addr { return netip.AddrFrom4([4]byte{10, net, 0, byte(m.IntN(8))}) }
	r := &api.Resource{}
	switch m.IntN(6) {
	case 0:
		w := assay.Workload{ID: fmt.Sprint("w", n), Namespace: "a", Host: "h1", Identity: id(), Addrs: []netip.Addr{addr(1)}}
		w.Name = w.Identity.Account
		if m.IntN(4) > 0 {
			w.MeshedSince = time.Unix(int64(m.IntN(1000)), 0).UTC()
		}
		r.Key, r.Body = "workload/"+w.ID, &api.Resource_Workload{Workload: api.FromWorkload(&w)}
	case 1, 2:
		s := assay.Service{Namespace: m.one("a", "b"), Name: fmt.Sprint("s", n), VIPs: []netip.Addr{addr(2)}, Ports: []assay.Port{{Port: 80}, {Port: 81}}, Local: m.IntN(4) == 0}
		if m.IntN(2) == 0 { // as it is most of the time, but for its endpoints
			s.Namespace, s.VIPs, s.Local = "a", []netip.Addr{netip.AddrFrom4([4]byte{10, 2, 0, byte(n)})}, false
		}
		for range m.IntN(3) {
			s.Endpoints = append(s.Endpoints, assay.Endpoint{Workload: "w1", Identity: id(), Host: m.one("h1", "h2"), Addrs: []netip.Addr{addr(1)}, Targets: []uint16{uint16(m.IntN(2)), uint16(m.IntN(2))}})
		}
		r.Key, r.Body = "service/"+s.Key(), &api.Resource_Service{Service: api.FromService(&s)}
	case 3:
		x := assay.Route{Kind: assay.HTTPRoute, Namespace: m.one("a", "b"), Name: fmt.Sprint("r", n%3)}
		for range 1 + m.IntN(2) {
			x.Parents = append(x.Parents, assay.RouteParent{Service: m.one("a", "b") + fmt.Sprint("/s", m.IntN(8)), Port: []uint16{0, 80, 81}[m.IntN(3)]})
		}
		r.Key, r.Body = "route/"+x.Key(), &api.Resource_Route{Route: api.FromRoute(&x)}
	case 4:
		c := assay.NamespaceConfig{Namespace: m.one("a", "b", "c"), Mode: assay.Mode(m.one(string(assay.Observe), string(assay.Strict)))}
		r.Key, r.Body = "namespace/"+c.Namespace, &api.Resource_Namespace{Namespace: api.FromNamespaceConfig(&c)}
	case 5:
		h := assay.Host{ID: fmt.Sprint("h", n%3), Zone: m.one("", "east"), Addrs: []netip.Addr{addr(3)}, Advertise: addr(3), Prefixes: []netip.Prefix{netip.PrefixFrom(addr(4), 24).Masked()}}
		r.Key, r.Body = "host/"+h.ID, &api.Resource_Host{Host: api.FromHost(&h)}
	}
	return r
}

// say is what control says next.
func (m *mesh) say(t *testing.T) *news {
	d := &api.Delta{}
	n := &news{}
	if m.IntN(25) == 0 { // it was started again
		m.epoch, m.version, n.anew = m.epoch+1, 0, true
		n.epoch = m.epoch
		for _, key := range slices.Sorted(maps.Keys(m.has)) {
			if m.IntN(8) == 0 {
				delete(m.has, key)
				continue
			}
			m.version++
			m.has[key] = &api.Resource{Key: key, Version: m.version, Body: m.has[key].Body}
			d.Upsert = append(d.Upsert, m.has[key])
		}
	}
	for range m.IntN(6) {
		if keys := slices.Sorted(maps.Keys(m.has)); len(keys) > 0 && m.IntN(3) == 0 {
			key := keys[m.IntN(len(keys))]
			d.Remove = append(d.Remove, key)
			d.Upsert = slices.DeleteFunc(d.Upsert, func(r *api.Resource) bool { return r.Key == key })
			delete(m.has, key)
			continue
		}
		r := m.piece()
		m.version++
		r.Version = m.version
		d.Upsert = slices.DeleteFunc(d.Upsert, func(old *api.Resource) bool { return old.Key == r.Key })
		d.Upsert = append(d.Upsert, r)
		m.has[r.Key] = r
	}
	if err := n.apply(d); err != nil {
		t.Fatal(err)
	}
	return n
}

// fromScratch is the view of a snapshot without anything that was before.
func fromScratch(b basis, all map[string]*resource) (*publisher, *view) {
	p := newPublisher()
	return p, p.anew(b, all)
}

// told is a proxy that does as it is told.
type told struct {
	s         *session
	far       *link.Conn
	namespace string
	services  map[string]assay.Service
	routes    map[string]assay.Route
	config    assay.NamespaceConfig
	version   uint64
	patches   int
}

func newTold(t *testing.T, a *Agent, namespace string) *told {
	near, f, err := link.Pair()
	if err != nil {
		t.Fatal(err)
	}
	far, err := link.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close(); far.Close() })
	w := a.newWorkload(record{Workload: assay.Workload{ID: "w-" + namespace, Namespace: namespace}}, nil)
	p := &told{s: newSession(w, newGeneration(nil, "", ""), near), far: far, namespace: namespace, services: map[string]assay.Service{}, routes: map[string]assay.Route{}}
	p.follow(t, a.view.Load(), true)
	return p
}

// follow has the session tell of a view, and takes in what comes.
func (p *told) follow(t *testing.T, v *view, full bool) {
	t.Helper()
	if err := p.s.updateServices(v, full); err != nil {
		t.Fatal(err)
	}
	if err := p.s.conn.Send(link.KindReportNow, 1, nil); err != nil { // that was all
		t.Fatal(err)
	}
	for {
		m, err := p.far.Receive()
		if err != nil {
			t.Fatal(err)
		}
		if m.Kind == link.KindReportNow {
			return
		}
		var d link.Services
		if err := m.Decode(&d); err != nil {
			t.Fatal(err)
		}
		if p.version = d.Version; d.Version != v.number || d.Full != full {
			t.Fatalf("view %d is told as %d, %v", v.number, d.Version, d.Full)
		}
		for _, key := range d.Remove {
			if _, there := p.services[key]; !there {
				t.Errorf("view %d: %s is removed, and was not there", v.number, key)
			}
			delete(p.services, key)
		}
		for _, s := range d.Upsert {
			p.services[s.Key()] = s
		}
		for _, patch := range d.Patch {
			was, there := p.services[patch.Service]
			is, err := patch.Apply(&was)
			if err != nil || !there || !p.s.patches {
				t.Fatalf("view %d: a patch of %s: %v", v.number, patch.Service, err)
			}
			p.services[patch.Service] = is
			p.patches++
		}
		for _, key := range d.RemoveRoutes {
			delete(p.routes, key)
		}
		for _, r := range d.Routes {
			p.routes[r.Key()] = r
		}
		if d.Config != nil {
			p.config = *d.Config
		}
	}
}

// TestChangesAddUp: views that were made of what changed are those that would have been made of
// everything, and so is what proxies were told by way of some of them.
func TestChangesAddUp(t *testing.T) {
	const rounds = 1500
	m := &mesh{Rand: rand.New(rand.NewPCG(1, 2)), has: map[string]*api.Resource{}}
	a, err := New(testConfig(t.TempDir(), io.Discard))
	if err != nil {
		t.Fatal(err)
	}
	if a.store, err = openStore(a.cfg.DataDir); err != nil {
		t.Fatal(err)
	}
	defer a.store.Close()
	a.publish()
	var proxies []*told
	for i, namespace := range []string{"a", "a", "b", "c"} {
		proxies = append(proxies, newTold(t, a, namespace))
		proxies[i].s.patches = i > 0 // the first one is older
	}
	var made, anew int
	for i := range rounds {
		a.take(m.say(t))
		if m.IntN(3) == 0 {
			continue // two at once
		}
		switch m.IntN(60) {
		case 0:
			a.leaving = Leaving{Serve: m.IntN(2) == 0, Dial: m.IntN(2) == 0}
		case 1:
			a.state.HostID = m.one("h0", "h1", "h2")
		}
		a.publish()
		v := a.view.Load()
		if made++; len(v.history) == 0 {
			anew++
		}
		p, want := fromScratch(a.publisher.basis, a.snapshot.resources)
		for _, x := range []struct {
			what      string
			got, want any
		}{
			{"services", v.services, want.services}, {"routes", v.routes, want.routes}, {"settings", v.namespaces, want.namespaces},
			{"open ports", v.open, want.open}, {"zone", v.zone, want.zone}, {"nodes", v.nodes, want.nodes},
			{"owners", a.publisher.owners.of, p.owners.of}, {"table", tabled(t, a.publisher), tabled(t, p)},
			{"who has it open", a.publisher.openers, p.openers}, {"routes of services", a.publisher.routed, p.routed}, {"hosts", a.publisher.hosts, p.hosts},
		} {
			if !reflect.DeepEqual(x.got, x.want) {
				t.Fatalf("round %d: %s are\n%v, want\n%v", i, x.what, x.got, x.want)
			}
		}
		for _, p := range proxies {
			if m.IntN(4) == 0 || m.IntN(100) > 0 && p.s.told.number+3*remembered/2 > v.number && p.namespace == "c" {
				continue // it is slow, and one of them very
			}
			p.follow(t, v, false)
			whole := v.full(p.namespace)
			is, want := keyed(p.services, p.routes), keyed(byKey(whole.Upsert, (*assay.Service).Key), byKey(whole.Routes, (*assay.Route).Key))
			if !slices.Equal(is, want) || !reflect.DeepEqual(p.config, *whole.Config) {
				t.Fatalf("round %d: a proxy in %s knows\n%s\n%+v, want\n%s\n%+v", i, p.namespace, strings.Join(is, "\n"), p.config, strings.Join(want, "\n"), *whole.Config)
			}
		}
	}
	if made < rounds/2 || anew == 0 || anew > made/4 {
		t.Errorf("of %d views %d were made anew", made, anew)
	}
	if patches := proxies[1].patches; patches < 50 {
		t.Errorf("%d patches were sent", patches)
	}
}

// TestOpenFollows: what a kernel is told to open and to close comes to what is open in the newest
// view of what the proxy uses.
func TestOpenFollows(t *testing.T) {
	m := &mesh{Rand: rand.New(rand.NewPCG(3, 4)), has: map[string]*api.Resource{}}
	p := newPublisher()
	all := newSnapshot(0)
	var of opened
	kernel, want := map[netip.AddrPort]bool{}, map[netip.AddrPort]bool{}
	var views []*view
	followed, opens := 0, 0
	for i := range 5000 {
		n := m.say(t)
		all.take(n)
		v := (*view)(nil)
		if n.anew || i == 0 {
			v = p.anew(basis{epoch: n.epoch, near: "h1"}, all.resources)
		} else {
			v = p.next(n.pieces)
		}
		views = append(views, v)
		if i%1000 > 800 && m.IntN(80) > 0 || m.IntN(3) == 0 { // it is late, and for a while very

			continue
		}
		// The proxy says that it uses this one, an older one that it had not used, or nothing.
		var used *view
		switch m.IntN(4) {
		case 0:
			used = v
		case 1:
			used = views[max(0, len(views)-1-m.IntN(5))]
			if of.used != nil && used.number <= of.used.number {
				used = nil
			}
		}
		if used != nil {
			want = used.open
		}
		want = maps.Clone(both(want, v.open))
		open, closed, known := of.changed(used, v)
		if known {
			followed++
			opens += len(open)
			for _, at := range open {
				kernel[at] = true
			}
			for _, at := range closed {
				delete(kernel, at)
			}
		} else {
			kernel = maps.Clone(want)
		}
		of.are(used, v)
		if !maps.Equal(kernel, want) {
			t.Fatalf("view %d: open are %v, want %v", v.number, kernel, want)
		}
	}
	if followed < 1000 || opens < 100 {
		t.Errorf("%d views were followed, with %d openings", followed, opens)
	}
}

// A workload of another host that claims an address that was used before wins when it
// is newer, and never breaks the table.
func TestTableOfReusedAddress(t *testing.T) {
	old := time.Now().Add(-time.Hour)
	w := func(id string, since time.Time) assay.Workload {
		return assay.Workload{ID: id, Identity: assay.Identity{TrustDomain: "x", Namespace: "n", Account: id}, Addrs: lab.Addrs("10.181.1.2"), MeshedSince: since}
	}
	p := newPublisher()
	all := map[string]*resource{}
	for _, w := range []assay.Workload{w("newer", old.Add(time.Minute)), w("older", old), w("unmeshed", time.Time{})} {
		all["workload/"+w.ID] = &resource{workload: &w}
	}
	is := func(want string) {
		t.Helper()
		if got := tabled(t, p)[netip.MustParseAddr("10.181.1.2")].Workload; got != want {
			t.Errorf("in the table is %q, want %q", got, want)
		}
	}
	p.anew(basis{}, all)
	is("newer")
	p.next(map[string]*resource{"workload/newer": nil})
	is("older")
	p.next(map[string]*resource{"workload/older": nil})
	is("")
}

// tabled is what a publisher's table says.
func tabled(t *testing.T, p *publisher) map[netip.Addr]link.Meshed {
	t.Helper()
	fd, err := p.table.Build(1)
	if err != nil {
		t.Fatal(err)
	}
	table, err := link.OpenTable(fd)
	if err != nil {
		t.Fatal(err)
	}
	all := map[netip.Addr]link.Meshed{}
	for _, at := range p.owners.addrs() {
		if m, there := table.Lookup(at); there {
			all[at] = m
		}
	}
	if len(all) != table.Len() {
		t.Errorf("%d addresses are in the table, of which %d are somebody's", table.Len(), len(all))
	}
	return all
}

func byKey[T any](list []T, key func(*T) string) map[string]T {
	m := map[string]T{}
	for i := range list {
		m[key(&list[i])] = list[i]
	}
	return m
}

// keyed is what a proxy knows in a form that can be compared: not all empty lists are nil.
func keyed(services map[string]assay.Service, routes map[string]assay.Route) (lines []string) {
	for key, s := range services {
		lines = append(lines, fmt.Sprintf("service %s %+v", key, s))
	}
	for key, r := range routes {
		lines = append(lines, fmt.Sprintf("route %s %+v", key, r))
	}
	slices.Sort(lines)
	return lines
}

// largeMesh is one of many services with five endpoints each, as control tells it.
func largeMesh(b *testing.B, services int) *news {
	n := &news{anew: true, epoch: 1}
	d := &api.Delta{}
	for i := range services {
		d.Upsert = append(d.Upsert, largePiece(i, 0, 1))
		for j := range 5 {
			w := assay.Workload{
				ID: fmt.Sprintf("%08d-3a5f-4b1e-9c64-%012d", i, j), Namespace: fmt.Sprint("team-", i%20), Name: fmt.Sprint("service-", i), Host: fmt.Sprint("node-", j),
				Identity: assay.Identity{TrustDomain: "bank.example", Namespace: fmt.Sprint("team-", i%20), Account: fmt.Sprint("service-", i)},
				Addrs:    []netip.Addr{netip.AddrFrom4([4]byte{10, byte(j), byte(i >> 8), byte(i)})}, MeshedSince: time.Unix(1e9, 0),
			}
			d.Upsert = append(d.Upsert, &api.Resource{Key: "workload/" + w.ID, Version: 1, Body: &api.Resource_Workload{Workload: api.FromWorkload(&w)}})
		}
	}
	if err := n.apply(d); err != nil {
		b.Fatal(err)
	}
	return n
}

// largePiece is one of its services, with a port that says how often it has changed.
func largePiece(i, unready int, version uint64) *api.Resource {
	s := assay.Service{
		Namespace: fmt.Sprint("team-", i%20), Name: fmt.Sprint("service-", i), VIPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 96, byte(i >> 8), byte(i)})},
		Ports: []assay.Port{{Name: "http", Port: 80}},
	}
	for j := range 5 {
		e := assay.Endpoint{
			Workload: fmt.Sprintf("%08d-3a5f-4b1e-9c64-%012d", i, j), Identity: assay.Identity{TrustDomain: "bank.example", Namespace: s.Namespace, Account: s.Name},
			Host: fmt.Sprint("node-", j), Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(j), byte(i >> 8), byte(i)})}, Targets: []uint16{8080},
		}
		if j < unready {
			e.Targets = []uint16{0}
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	return &api.Resource{Key: "service/" + s.Key(), Version: version, Body: &api.Resource_Service{Service: api.FromService(&s)}}
}

// BenchmarkChange is what one change of an endpoint costs the agent of a mesh of 1,000 services
// with 5,000 workloads: the view, and what is told to 96 proxies.
func BenchmarkChange(b *testing.B) {
	for _, proxies := range []int{0, 96} {
		b.Run(fmt.Sprintf("proxies=%d", proxies), func(b *testing.B) {
			a, err := New(testConfig(b.TempDir(), io.Discard))
			if err != nil {
				b.Fatal(err)
			}
			if a.store, err = openStore(a.cfg.DataDir); err != nil {
				b.Fatal(err)
			}
			defer a.store.Close()
			a.take(largeMesh(b, 1000))
			a.publish()
			ctx, cancel := context.WithCancel(b.Context())
			defer cancel()
			var sessions []*session
			for i := range proxies {
				near, far, err := link.Pair()
				if err != nil {
					b.Fatal(err)
				}
				defer near.Close()
				defer far.Close()
				go drain(ctx, far)
				w := a.newWorkload(record{Workload: assay.Workload{ID: fmt.Sprint("w-", i), Namespace: fmt.Sprint("team-", i%20)}}, nil)
				s := newSession(w, newGeneration(nil, "", ""), near)
				s.patches = true
				if err := s.updateServices(a.view.Load(), true); err != nil {
					b.Fatal(err)
				}
				sessions = append(sessions, s)
			}
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				i++
				n := &news{}
				if err := n.apply(&api.Delta{Upsert: []*api.Resource{largePiece(i%1000, i/1000%6, uint64(i+1))}}); err != nil {
					b.Fatal(err)
				}
				a.take(n)
				a.publish()
				v := a.view.Load()
				for _, s := range sessions {
					if err := s.updateServices(v, false); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

// drain reads whatever comes.
func drain(ctx context.Context, f *os.File) {
	c, err := link.FileConn(f)
	if err != nil {
		return
	}
	defer c.Close()
	for ctx.Err() == nil {
		m, err := c.Receive()
		if err != nil {
			return
		}
		m.Discard()
	}
}

// TestOldViewsAreGone: nobody keeps a view when there are newer ones, but for who uses it.
func TestOldViewsAreGone(t *testing.T) {
	p := newPublisher()
	p.anew(basis{}, nil)
	var old []weak.Pointer[view]
	for range 5 {
		p.next(map[string]*resource{"service/a/b": nil})
		old = append(old, weak.Make(p.view))
	}
	for deadline := time.Now().Add(time.Minute); slices.ContainsFunc(old[:4], func(v weak.Pointer[view]) bool { return v.Value() != nil }); runtime.GC() {
		if time.Now().After(deadline) {
			t.Fatal("old views are kept")
		}
	}
	if old[4].Value() != p.view {
		t.Error("the newest view is another one")
	}
}

// TestAcknowledgedByNumbersOfAnotherAgent: an adopted proxy acknowledges its new table with the
// number of the services that the agent before told it. That is none of this agent's views.
func TestAcknowledgedByNumbersOfAnotherAgent(t *testing.T) {
	a, err := New(testConfig(t.TempDir(), io.Discard))
	if err != nil {
		t.Fatal(err)
	}
	if a.store, err = openStore(a.cfg.DataDir); err != nil {
		t.Fatal(err)
	}
	defer a.store.Close()
	first := a.view.Load().number
	a.publish()
	v := a.view.Load()
	p := newTold(t, a, "a")
	p.s.current = v.number // as update notes
	for _, other := range []uint64{1, 5000, first - 1, v.number - 1, v.number + 1, v.number + 5000, 1 << 60} {
		if p.s.acknowledged(link.Ack{Services: other, Table: v.number}); p.s.uses(v.number) || p.s.uses(1) {
			t.Fatalf("view %d counts as used by an acknowledgement of %d", v.number, other)
		}
	}
	if p.s.acknowledged(link.Ack{Services: v.number}); !p.s.uses(v.number) {
		t.Errorf("view %d is not used", v.number)
	}
}

// TestEveryProxyHearsOfViews: those that drain, and a successor that accepts soon.
func TestEveryProxyHearsOfViews(t *testing.T) {
	a := &Agent{log: slog.New(slog.DiscardHandler), outbox: newOutbox()}
	w := a.newWorkload(record{Workload: assay.Workload{ID: "web-1", Namespace: "default"}}, nil)
	generations := map[string]*generation{}
	for _, what := range []string{"current", "next", "older"} {
		near, far, err := link.Pair()
		if err != nil {
			t.Fatal(err)
		}
		defer near.Close()
		defer far.Close()
		g := newGeneration(nil, "", "")
		g.session = newSession(w, g, near)
		generations[what] = g
	}
	w.current, w.next, w.older, w.session = generations["current"], generations["next"], []*generation{generations["older"]}, generations["current"].session
	a.workloads.m = map[string]*workload{w.id: w}
	for what, hear := range map[string]func(){
		"of a view":                   w.wakeOthers, // the current one hears of it by distribute
		"that its transition is over": func() { w.setTransition(false) },
		"of the host's addresses":     a.lookAtAddresses,
	} {
		a.addresses = lab.Addrs("192.0.2.1") // not this host's
		hear()
		for who, g := range generations {
			select {
			case <-g.session.wake:
			default:
				if who != "current" || what != "of a view" {
					t.Errorf("the %s proxy does not hear %s", who, what)
				}
			}
		}
	}
}
