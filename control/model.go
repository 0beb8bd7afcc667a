package control

import (
	"cmp"
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/discovery"
	"assay.dev/store"
)

// Bounds of what is remembered for people. What a service serves has none but the
// size of the mesh.
const (
	keptFindings = 2000
	keptAudit    = 2000
	keptReports  = 4096 // of workloads that are gone
)

// maxRunning bounds the workloads of one host.
const maxRunning = 4096

// rememberFor is how long an implicit service without a workload keeps its name
// and address, and how long the numbers of a workload that is gone are shown.
const rememberFor = 24 * time.Hour

// model is everything that control knows of the mesh. All of it is guarded by mu;
// nothing under mu waits for anything.
type model struct {
	trustDomain string
	network     Network
	now         func() time.Time
	behind      *behind // the store, behind
	leases      leases
	hold        time.Duration // see the constant
	changed     chan struct{} // capacity 1: something was touched and is not published

	mu       sync.Mutex
	catalog  *discovery.Catalog
	snapshot *snapshot
	hosts    map[string]*host
	owner    map[netip.Addr]string // address -> workload ID
	vips     map[string]int64      // service key -> number
	idle     map[string]time.Time  // implicit services without a workload, since when
	acks     map[string]uint64     // workload ID -> bundle version
	certs    map[string][]store.Certificate
	reports  map[string]*report
	findings []store.Finding // the oldest first
	audit    []store.Audit
	sessions map[*session]bool
	taps     taps
	tokens   map[string]store.Token
	bundle   *api.Bundle
	routes   map[string][]assay.RouteParentStatus // by Route.Key, with the times of changes
}

// host is what is known of a host besides its noun.
type host struct {
	store.Host
	session *session  // nil while its stream is down
	away    time.Time // since when
	lost    bool      // away for longer than the lease
	bundle  uint64    // acknowledged by the agent
	running int       // workloads in the catalog
}

// report is the latest numbers of a workload and who it was when it sent them.
type report struct {
	api.Report
	workload *assay.Workload
	received time.Time
	gone     time.Time // when the workload went; zero while it is there
}

func newModel(trustDomain string, network Network, epoch uint64, lease time.Duration, now func() time.Time, b *behind) *model {
	m := &model{
		trustDomain: trustDomain, network: network, now: now, behind: b, leases: leases{life: lease}, hold: hold, changed: make(chan struct{}, 1),
		catalog: discovery.New(), snapshot: newSnapshot(epoch), hosts: map[string]*host{}, owner: map[netip.Addr]string{},
		vips: map[string]int64{}, idle: map[string]time.Time{}, acks: map[string]uint64{}, certs: map[string][]store.Certificate{},
		reports: map[string]*report{}, sessions: map[*session]bool{}, tokens: map[string]store.Token{},
		routes: map[string][]assay.RouteParentStatus{},
	}
	// A host may run what its token covers, so that is also what it may serve: labels
	// that a selector matches make nobody another service.
	m.catalog.Restrict(func(w *assay.Workload, service string) bool {
		h := m.hosts[w.Host]
		return h != nil && covers(h.Covers, w.Namespace, service)
	})
	return m
}

func workloadKey(id string) string { return "workload/" + id }
func hostKey(id string) string     { return "host/" + id }

// covers reports whether one of the patterns allows namespace/name.
func covers(patterns []string, namespace, name string) bool {
	for _, p := range patterns {
		ns, n, _ := strings.Cut(p, "/")
		if (ns == "*" || ns == namespace) && (n == "*" || n == name) {
			return true
		}
	}
	return false
}

// admit decides whether a host may report w. It returns the IDs of workloads that
// w pushes out, because they have w's address and their host, the same, has not
// mentioned them since it came back.
func (m *model) admit(h *host, w *assay.Workload, seen map[string]bool) (stale []string, err error) {
	refuse := func(kind assay.Kind, cause error, remedy string) ([]string, error) {
		return nil, &assay.Error{Kind: kind, Op: "take workload " + w.ID, Err: cause, Remedy: remedy}
	}
	if w.Host != h.ID {
		return refuse(assay.Denied, fmt.Errorf("it is said to be on host %s, reported by %s", w.Host, h.ID), "")
	}
	if w.Identity.TrustDomain != m.trustDomain {
		return refuse(assay.Invalid, fmt.Errorf("identity %s is not of trust domain %s", w.Identity, m.trustDomain), "")
	}
	for _, name := range []string{w.Name, w.Service} {
		if name != "" && !covers(h.Covers, w.Namespace, name) {
			return refuse(assay.Denied, fmt.Errorf("host %s may run %s, not %s/%s", cmp.Or(h.Name, h.ID), strings.Join(h.Covers, " "), w.Namespace, name),
				fmt.Sprintf("join the host with a token made by: assay token create --cover %s/%s", w.Namespace, name))
		}
	}
	if old, ok := m.catalog.Workload(w.ID); ok {
		if old.Host != h.ID {
			return refuse(assay.Denied, fmt.Errorf("host %s has a workload of this ID", old.Host), "")
		}
		if old.Identity != w.Identity {
			return refuse(assay.Conflict, fmt.Errorf("its identity was %s and would be %s", old.Identity, w.Identity), "give the new workload an ID of its own")
		}
	} else if h.running >= maxRunning {
		return refuse(assay.Unavailable, fmt.Errorf("host %s has %d workloads already", h.ID, h.running), "run it on another host")
	}
	for _, a := range w.Addrs {
		if !slices.ContainsFunc(h.Prefixes, func(p netip.Prefix) bool { return p.Contains(a) }) {
			return refuse(assay.Denied, fmt.Errorf("address %s is not of host %s, which has %v", a, h.ID, h.Prefixes), "")
		}
		owner, taken := m.owner[a]
		if !taken || owner == w.ID {
			continue
		}
		if other, ok := m.catalog.Workload(owner); ok && (other.Host != h.ID || seen[owner]) {
			return refuse(assay.Conflict, fmt.Errorf("address %s belongs to workload %s", a, owner), "report that one gone first")
		}
		stale = append(stale, owner)
	}
	return stale, nil
}

// setWorkload takes a workload that was admitted.
func (m *model) setWorkload(w *assay.Workload) {
	if old, ok := m.catalog.Workload(w.ID); ok {
		for _, a := range old.Addrs {
			delete(m.owner, a)
		}
	} else if h := m.hosts[w.Host]; h != nil {
		h.running++
	}
	for _, a := range w.Addrs {
		m.owner[a] = w.ID
	}
	m.catalog.SetWorkload(w)
	if r := m.reports[w.ID]; r != nil {
		r.workload, r.gone = w, time.Time{}
	}
	m.snapshot.put(workloadKey(w.ID), &api.Resource{Body: &api.Resource_Workload{Workload: api.FromWorkload(w)}})
}

// removeWorkload forgets a workload. Its numbers are shown for a while.
func (m *model) removeWorkload(id string) bool {
	w, ok := m.catalog.Workload(id)
	if !ok {
		return false
	}
	for _, a := range w.Addrs {
		if m.owner[a] == id {
			delete(m.owner, a)
		}
	}
	if h := m.hosts[w.Host]; h != nil {
		h.running--
	}
	delete(m.acks, id)
	m.catalog.RemoveWorkload(id)
	m.snapshot.remove(workloadKey(id))
	if r := m.reports[id]; r != nil {
		r.gone = m.now()
		// Nothing is open any more, whatever it said last.
		r.Signals = slices.Clone(r.Signals)
		for i := range r.Signals {
			r.Signals[i].Open, r.Signals[i].InFlight = 0, 0
		}
	}
	return true
}

// publishEvery is the least time between two computations of what hosts' facts
// have touched: a host that starts a thousand replicas of one service costs a few
// computations of that service, not a thousand.
const publishEvery = 10 * time.Millisecond

// publishSoon has publisher publish.
func (m *model) publishSoon() {
	select {
	case m.changed <- struct{}{}:
	default:
	}
}

// publisher publishes what was touched, at once and then at most every
// publishEvery, until ctx ends.
func (m *model) publisher(ctx context.Context) error {
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-m.changed:
		}
		m.mu.Lock()
		m.publish()
		m.mu.Unlock()
		t.Reset(publishEvery)
	}
}

// publish recomputes what was touched, puts it into the snapshot and wakes the
// streams.
func (m *model) publish() {
	ch := m.catalog.Changes(func(key string) ([]netip.Addr, bool) {
		n, ok := m.vips[key]
		if !ok {
			return nil, false
		}
		addrs, err := m.network.vips(n)
		return addrs, err == nil
	})
	for i := range ch.Services {
		s := &ch.Services[i]
		m.snapshot.put("service/"+s.Key(), &api.Resource{Body: &api.Resource_Service{Service: api.FromService(s)}})
	}
	for _, key := range ch.RemovedServices {
		m.snapshot.remove("service/" + key)
		m.behind.vip(key, false)
	}
	for _, key := range ch.Pending {
		m.behind.vip(key, true)
	}
	for i := range ch.Namespaces {
		n := &ch.Namespaces[i]
		m.snapshot.put("namespace/"+n.Namespace, &api.Resource{Body: &api.Resource_Namespace{Namespace: api.FromNamespaceConfig(n)}})
	}
	for _, ns := range ch.RemovedNamespaces {
		m.snapshot.remove("namespace/" + ns)
	}
	for i := range ch.Routes {
		r := &ch.Routes[i]
		m.snapshot.put("route/"+r.Key(), &api.Resource{Body: &api.Resource_Route{Route: api.FromRoute(r)}})
	}
	for _, key := range ch.RemovedRoutes {
		m.snapshot.remove("route/" + key)
	}
	for _, key := range ch.RouteStatus {
		m.noteRoute(key)
	}
	m.noteIdle()
	for s := range m.sessions {
		s.wake()
	}
}

// noteRoute keeps the status of a route, and since when it is so.
func (m *model) noteRoute(key string) {
	status := m.catalog.RouteStatus(key)
	if len(status) == 0 {
		delete(m.routes, key)
		return
	}
	since := map[string]time.Time{}
	name := func(p *assay.RouteParentStatus, c *assay.RouteCondition) string {
		return fmt.Sprint(p.ParentRef, c.Type, c.Status)
	}
	for i := range m.routes[key] {
		p := &m.routes[key][i]
		for j := range p.Conditions {
			since[name(p, &p.Conditions[j])] = p.Conditions[j].LastTransitionTime
		}
	}
	now := m.now().UTC().Truncate(time.Second)
	for i := range status {
		p := &status[i]
		for j := range p.Conditions {
			c := &p.Conditions[j]
			if c.LastTransitionTime = since[name(p, c)]; c.LastTransitionTime.IsZero() {
				c.LastTransitionTime = now
			}
		}
	}
	m.routes[key] = status
}

// noteIdle keeps since when an implicit service has no workload.
func (m *model) noteIdle() {
	now := m.now()
	list := m.catalog.Remembered()
	changed := false
	for _, key := range list {
		if _, ok := m.idle[key]; !ok {
			m.idle[key] = now
			changed = true
		}
	}
	for key := range m.idle {
		if !slices.Contains(list, key) {
			delete(m.idle, key)
			changed = true
		}
	}
	if changed {
		m.behind.idle(m.idleServices())
	}
}

// idleService is how a remembered service is stored.
type idleService struct {
	Since time.Time    `json:"since"`
	Ports []assay.Port `json:"ports"`
}

func (m *model) idleServices() map[string]idleService {
	out := map[string]idleService{}
	for key, since := range m.idle {
		if r := m.snapshot.get("service/" + key); r != nil {
			if s, err := r.GetService().Noun(); err == nil {
				out[key] = idleService{since, s.Ports}
			}
		}
	}
	return out
}

// allocated takes the number of a service's virtual address.
func (m *model) allocated(key string, n int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.vips[key] = n
	m.publishSoon()
}

// released forgets a number; false when the service is there again.
func (m *model) released(key string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.snapshot.get("service/"+key) != nil {
		return false
	}
	delete(m.vips, key)
	return true
}

// publishHost puts a host's resource into the snapshot.
func (m *model) publishHost(h *host) {
	m.snapshot.put(hostKey(h.ID), &api.Resource{Body: &api.Resource_Host{Host: api.FromHost(&h.Host.Host)}})
}

// tick does what follows from time alone.
func (m *model) tick() {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.now()
	list := make([]lease, 0, len(m.hosts))
	for _, h := range m.hosts {
		list = append(list, lease{id: h.ID, connected: h.session != nil, away: h.away, lost: h.lost, idle: h.running == 0})
	}
	for _, id := range m.leases.expire(list, now) {
		m.hosts[id].lost = true
		m.catalog.SetHostLost(id, true)
	}
	for key, since := range m.idle {
		if now.Sub(since) >= rememberFor {
			m.catalog.Forget(key)
		}
	}
	m.forgetReports(now)
	for id, list := range m.certs {
		ended := func(c store.Certificate) bool { return !now.Before(c.NotAfter) }
		if !slices.ContainsFunc(list, ended) {
			continue
		}
		kept := slices.DeleteFunc(slices.Clone(list), ended)
		if len(kept) == 0 {
			delete(m.certs, id)
		} else {
			m.certs[id] = kept
		}
	}
	least := m.snapshot.version
	for s := range m.sessions {
		least = min(least, s.version)
		if !s.expires.IsZero() && !now.Before(s.expires) {
			s.cancel(errExpired)
		}
	}
	m.snapshot.prune(least)
	m.publish()
}

func (m *model) forgetReports(now time.Time) {
	var gone []*report
	for id, r := range m.reports {
		switch {
		case r.gone.IsZero():
		case now.Sub(r.gone) >= rememberFor:
			delete(m.reports, id)
		default:
			gone = append(gone, r)
		}
	}
	if len(gone) > keptReports {
		slices.SortFunc(gone, func(a, b *report) int { return a.gone.Compare(b.gone) })
		for _, r := range gone[:len(gone)-keptReports] {
			delete(m.reports, r.Workload)
		}
	}
}

// finding records something that a person should look at.
func (m *model) finding(f assay.Finding) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.findingLocked(f)
}

func (m *model) findingLocked(f assay.Finding) {
	if f.Time.IsZero() {
		f.Time = m.now()
	}
	m.behind.finding(f)
	i := slices.IndexFunc(m.findings, func(o store.Finding) bool {
		return o.Workload == f.Workload && o.Kind == f.Kind && o.Subject == f.Subject
	})
	n := store.Finding{Finding: f, First: f.Time, Count: 1}
	if i >= 0 {
		n.First, n.Count = m.findings[i].First, m.findings[i].Count+1
		m.findings = slices.Delete(m.findings, i, i+1)
	}
	m.findings = append(m.findings, n)
	if over := len(m.findings) - keptFindings; over > 0 {
		m.findings = slices.Delete(m.findings, 0, over)
	}
}

// audited adds a line to what List shows.
func (m *model) audited(a store.Audit) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.audit = append(m.audit, a)
	if over := len(m.audit) - keptAudit; over > 0 {
		m.audit = slices.Delete(m.audit, 0, over)
	}
}

// issued keeps a certificate in the inventory and has it stored behind.
func (m *model) issued(c store.Certificate) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.issuedLocked(c)
	m.behind.certificate(c)
}

func (m *model) issuedLocked(c store.Certificate) {
	m.certs[c.Subject] = append(m.certs[c.Subject], c)
}

// current returns the newest certificate of a workload, or of a host's subject.
func (m *model) current(subject, workload string) (store.Certificate, bool) {
	var newest store.Certificate
	for _, c := range m.certs[subject] {
		if c.Workload == workload && (newest.Serial == "" || newest.IssuedAt.Before(c.IssuedAt)) {
			newest = c
		}
	}
	return newest, newest.Serial != ""
}

// consumed takes a token as the store has it.
func (m *model) consumed(t store.Token) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.tokens[t.ID] = t
}

// knowsToken reports whether there is a token with this ID and hash.
func (m *model) knowsToken(id string, hash []byte) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	t, ok := m.tokens[id]
	return ok && subtle.ConstantTimeCompare(t.Hash, hash) == 1
}

// tokenOf returns the ID of the token with which a host joined.
func (m *model) tokenOf(host string) (string, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, t := range m.tokens {
		if t.Consumer == host {
			return id, true
		}
	}
	return "", false
}

// setIntent replaces what people declared.
func (m *model) setIntent(in discovery.Intent) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := m.catalog.SetIntent(in); err != nil {
		return &assay.Error{Kind: assay.Invalid, Op: "apply", Err: err}
	}
	m.publish()
	return nil
}

// host returns a copy of a host.
func (m *model) host(id string) (store.Host, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	h := m.hosts[id]
	if h == nil {
		return store.Host{}, false
	}
	return h.Host, true
}

// setHost adds a host or changes what it was joined with.
func (m *model) setHost(h store.Host) {
	m.mu.Lock()
	defer m.mu.Unlock()
	known := m.hosts[h.ID]
	if known == nil {
		known = &host{away: m.now()}
		m.hosts[h.ID] = known
	}
	h.Ready = known.session != nil
	known.Host = h
	m.publishHost(known)
	m.publish()
}

// removeHost forgets a host with all its workloads and cuts its stream.
func (m *model) removeHost(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	h := m.hosts[id]
	if h == nil {
		return false
	}
	for _, w := range m.workloadsOf(id) {
		m.removeWorkload(w)
	}
	if h.session != nil {
		h.session.cancel(errors.New("the host was removed"))
	}
	delete(m.hosts, id)
	m.snapshot.remove(hostKey(id))
	m.publish()
	return true
}

// workloadsOf returns the IDs of a host's workloads, sorted.
func (m *model) workloadsOf(host string) []string {
	var out []string
	for _, w := range m.catalog.Workloads() {
		if w.Host == host {
			out = append(out, w.ID)
		}
	}
	return out
}
