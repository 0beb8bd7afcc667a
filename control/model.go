package control

import (
	"cmp"
	"errors"
	"net/netip"
	"slices"
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
	cluster  *clusterView // nil outside of a cluster
	catalog  *discovery.Catalog
	snapshot *snapshot
	hosts    map[string]*host
	owner    map[netip.Addr]string // address -> workload ID
	vips     map[string]int64      // service key -> number
	idle     map[string]time.Time  // implicit services without a workload, since when
	acks     map[string]uint64     // workload ID -> bundle version
	certs    map[string][]store.Certificate
	reports  map[string]*report
	findings []store.Finding  // the oldest first
	found    uint64           // how many there were
	strays   map[string]stray // by workload and kind
	// unmetered are the workloads whose last report had no balance: since which look for strays.
	unmetered map[string]time.Time
	audit     []store.Audit
	sessions  map[*session]bool
	taps      taps
	tokens    map[string]store.Token
	bundle    *api.Bundle
	routes    map[string][]assay.RouteParentStatus // by Route.Key, with the times of changes

	// Of a control that is one of several (hear.go).
	me       string          // its name; "": it is alone
	revision int64           // of the store, that this has been brought to
	dead     map[string]bool // other controls that show no life
	heard    time.Time       // when it began to read what this has been brought to, by the clock of this process
	caught   time.Time       // when others have stored what they took while it was away
	lost     []string        // workloads of which the store has to be asked again
	moved    []string        // hosts of whose workloads it has
}

// host is what is known of a host besides its noun.
type host struct {
	store.Host
	session *session  // nil while its stream is not here
	present bool      // its stream is up, here or at another control
	away    time.Time // since when it is not
	since   time.Time // when its stream came to the control that has it, if that is another; by the clock of this process
	lost    bool      // away for longer than the lease
	left    bool      // its node is gone
	bundle  uint64    // acknowledged by the agent
	running int       // workloads in the catalog
	// Of a pod: what it has taken of what it may.
	certificates, findings allowance
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

// tick does what follows from time alone.
func (m *model) tick() {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.now()
	list := make([]lease, 0, len(m.hosts))
	for _, h := range m.hosts {
		list = append(list, lease{id: h.ID, connected: h.present, away: h.away, lost: h.lost, idle: h.running == 0})
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
	m.waitedLong(now)
	m.publish()
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
	h.Ready, h.Replica, h.Bundle = known.present, cmp.Or(known.Replica, h.Replica), max(known.Bundle, h.Bundle)
	if m.cluster != nil {
		n, there := m.cluster.nodes[h.Node]
		h.Zone, h.Addrs = n.Zone, n.Addrs
		known.left = m.cluster.told && h.Node != "" && h.Pod == "" && !there // while it joined
	}
	known.Host = h
	m.settle(known)
	m.publishHost(known)
	m.publish()
}

// removeHost forgets a host with all its workloads and cuts its stream.
func (m *model) removeHost(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.removeHostLocked(id)
}

func (m *model) removeHostLocked(id string) bool {
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
	m.stopWaiting(id)
	m.disclaim(func(_ string, c claim) bool { return c.host == id })
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
