package agent

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/agent/netns"
	"assay.dev/link"
	"golang.org/x/sys/unix"
)

// coalesce is how long the publisher waits for more after something changed.
const coalesce = 50 * time.Millisecond

// view is what all proxies of the host are told, made from one snapshot. It is
// immutable but for its table's descriptor and the index of addresses.
type view struct {
	number     uint64
	services   map[string]versioned
	routes     map[string]versionedRoute
	namespaces map[string]assay.NamespaceConfig
	bundle     *link.Bundle
	open       map[netip.AddrPort]bool
	table      uint64       // version of Agent.table
	zone       string       // of this host, as control has it
	nodes      []netip.Addr // all hosts' own, sorted

	meshed []*assay.Workload // of the snapshot
	once   sync.Once
	owners map[netip.Addr]*assay.Workload // made by owner
}

// owner returns the workload that has a, or nil. The index is made when somebody asks:
// only what passes beside a proxy is looked up here.
func (v *view) owner(a netip.Addr) *assay.Workload {
	v.once.Do(func() {
		v.owners = make(map[netip.Addr]*assay.Workload, 2*len(v.meshed))
		for _, w := range v.meshed {
			for _, a := range w.Addrs {
				if old := v.owners[a]; old == nil || old.MeshedSince.Before(w.MeshedSince) {
					v.owners[a] = w
				}
			}
		}
	})
	return v.owners[a]
}

type versioned struct {
	service *assay.Service
	version version
}

type versionedRoute struct {
	route   *assay.Route
	version version
}

// version tells one content of a resource from every other: a control that was started
// again counts anew, and a mesh that is taken out has no identities.
type version struct {
	epoch, number uint64
	plain         bool
}

// sharedTable is the newest address table. It is replaced while others send it, so a
// sender takes a copy of the descriptor.
type sharedTable struct {
	version uint64
	file    *os.File
}

// config returns a namespace's settings: control's, or those of one that nobody
// configured.
func (v *view) config(namespace string) assay.NamespaceConfig {
	if c, ok := v.namespaces[namespace]; ok {
		return c
	}
	return assay.NamespaceConfig{Namespace: namespace, Mode: assay.Observe}
}

// zone is this host's: what it was told, or what its platform says of it.
func (a *Agent) zone() string { return cmp.Or(a.cfg.Zone, a.view.Load().zone) }

// changed tells the publisher that something did.
func (a *Agent) changed() {
	select {
	case a.dirty <- struct{}{}:
	default:
	}
}

// publishLoop turns snapshots into views, at most one in each interval.
func (a *Agent) publishLoop(ctx context.Context) {
	unsaved := make(chan struct{}, 1)
	var saver sync.WaitGroup
	defer saver.Wait()
	saver.Go(func() { a.saveLoop(ctx, unsaved) })
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.dirty:
		}
		a.publish()
		select {
		case unsaved <- struct{}{}:
		default:
		}
		select {
		case <-ctx.Done():
		case <-time.After(coalesce):
		}
	}
}

// saveEvery bounds how often the snapshot is written to disk.
const saveEvery = time.Second

// saveLoop keeps the snapshot on disk. It is apart from publishing, which no slow disk
// may hold up.
func (a *Agent) saveLoop(ctx context.Context, unsaved <-chan struct{}) {
	for {
		select {
		case <-ctx.Done():
			select {
			case <-unsaved:
				a.saveSnapshot()
			default:
			}
			return
		case <-unsaved:
		}
		a.saveSnapshot()
		select {
		case <-ctx.Done():
		case <-time.After(saveEvery):
		}
	}
}

func (a *Agent) saveSnapshot() {
	a.saving.Lock()
	defer a.saving.Unlock()
	a.mu.Lock()
	s := a.snapshot
	a.mu.Unlock()
	b, err := s.encode()
	if err == nil {
		err = writeFile(a.store.path("snapshot"), b, 0o600)
	}
	if err != nil {
		a.log.Error("the snapshot is not on disk", "err", err)
	}
}

// publish makes a view of the newest snapshot and wakes everybody who waits for one.
func (a *Agent) publish() {
	a.publishing.Lock()
	defer a.publishing.Unlock()
	a.mu.Lock()
	s, self, host, leaving := a.snapshot, a.state.HostID, a.host, a.leaving
	near := self
	if a.cfg.Own != nil {
		near = a.cfg.Own.Node
	}
	last := a.view.Load()
	a.converge.published(last.number + 1)
	a.mu.Unlock()
	v := &view{
		number: last.number + 1, services: map[string]versioned{}, routes: map[string]versionedRoute{}, namespaces: map[string]assay.NamespaceConfig{},
		open: map[netip.AddrPort]bool{}, table: last.table,
	}
	var workloads []assay.Workload
	for _, r := range s.resources {
		switch {
		case r.workload != nil && !leaving.Dial:
			workloads = append(workloads, *r.workload)
			v.meshed = append(v.meshed, r.workload)
		case r.service != nil:
			x := versioned{r.service, version{epoch: s.epoch, number: r.message.GetVersion(), plain: leaving.Dial}}
			if leaving.Dial {
				x.service = withoutIdentities(x.service)
			}
			v.services[r.service.Key()] = x
			openPorts(v.open, r.service, near)
		case r.route != nil:
			v.routes[r.route.Key()] = versionedRoute{r.route, version{epoch: s.epoch, number: r.message.GetVersion()}}
		case r.host != nil:
			v.nodes = append(v.nodes, r.host.Addrs...)
			if r.host.ID == self {
				v.zone = r.host.Zone
			}
		case r.namespace != nil:
			c := *r.namespace
			if leaving.Serve {
				c.Mode, c.Egress = assay.Observe, assay.Observe
			}
			v.namespaces[c.Namespace] = c
		}
	}
	slices.SortFunc(v.nodes, netip.Addr.Compare)
	for _, r := range v.routes {
		for _, p := range r.route.Parents {
			if s := v.services[p.Service].service; s != nil {
				openRouted(v.open, s, r.route.Kind, p.Port)
			}
		}
	}
	if s.bundle != nil {
		v.bundle = &link.Bundle{Version: s.bundle.GetVersion(), Roots: s.bundle.GetRoots()}
	}
	if fingerprint := tableFingerprint(v.meshed); fingerprint != a.tableOf || last.table == 0 {
		file, err := buildTable(v.number, workloads)
		if err != nil {
			a.log.Error("the address table stays old", "err", err)
		} else {
			a.mu.Lock()
			if a.table.file != nil {
				a.table.file.Close()
			}
			a.table = sharedTable{version: v.number, file: file}
			a.mu.Unlock()
			v.table = v.number
			a.tableOf = fingerprint
		}
	}
	if host != nil {
		a.routePeers(host, a.peers(s, self))
	}
	if last.number > 0 && !sameSettings(last.namespaces, v.namespaces) {
		a.saveSnapshot()
	}
	a.view.Store(v)
	a.recertify()
	for _, w := range a.all() {
		w.wakeUp()
		w.wakeOlder()
	}
}

// sameSettings reports whether namespaces are as they were. What changes is on disk before
// anybody hears of it, however slow that is: the next agent may have nothing else to go by,
// and a proxy that has become strict is not to be told what was before.
func sameSettings(was, is map[string]assay.NamespaceConfig) bool {
	return maps.EqualFunc(was, is, func(x, y assay.NamespaceConfig) bool { return reflect.DeepEqual(x, y) })
}

// withoutIdentities is a service whose endpoints are dialled in plaintext.
func withoutIdentities(s *assay.Service) *assay.Service {
	c := *s
	c.Endpoints = slices.Clone(s.Endpoints)
	for i := range c.Endpoints {
		c.Endpoints[i].Workload, c.Endpoints[i].Identity = "", assay.Identity{}
	}
	return &c
}

// openPorts adds a service's virtual addresses and ports that have an endpoint for clients on
// a host.
func openPorts(open map[netip.AddrPort]bool, s *assay.Service, host string) {
	for i, p := range s.Ports {
		for j := range s.Endpoints {
			if s.ReadyAt(&s.Endpoints[j], i, host) {
				for _, vip := range s.VIPs {
					open[netip.AddrPortFrom(vip.Unmap(), p.Port)] = true
				}
				break
			}
		}
	}
}

// openRouted adds a service's virtual addresses at a port with routes of a kind, 0 for
// all: a rule may send what comes elsewhere, or answer it, where the service has no
// endpoint itself.
func openRouted(open map[netip.AddrPort]bool, s *assay.Service, kind assay.RouteKind, port uint16) {
	for _, p := range s.Ports {
		if port != 0 && port != p.Port || !kind.Carries(p.Protocol) {
			continue
		}
		for _, vip := range s.VIPs {
			open[netip.AddrPortFrom(vip.Unmap(), p.Port)] = true
		}
	}
}

// tableFingerprint changes when the table would: it is cheaper than building one for
// each change of an endpoint's readiness, which makes a new version of a workload
// too, but not of what the table says of it.
func tableFingerprint(list []*assay.Workload) uint64 {
	var sum uint64
	for _, w := range list {
		if !w.MeshedSince.IsZero() {
			sum += hashWorkload(w)
		}
	}
	return sum
}

func hashWorkload(w *assay.Workload) uint64 {
	const prime = 1099511628211 // FNV-1a
	h := uint64(14695981039346656037)
	add := func(s string) {
		for i := range len(s) {
			h = (h ^ uint64(s[i])) * prime
		}
		h = (h ^ 0xff) * prime
	}
	add(w.ID)
	add(w.Identity.String())
	for _, a := range w.Addrs {
		b := a.As16()
		add(string(b[:]))
	}
	return h
}

// buildTable makes the table. An address that two workloads claim for a moment (it
// was used again and the old owner's removal is on its way) belongs to the newer one.
func buildTable(version uint64, workloads []assay.Workload) (*os.File, error) {
	owner := map[netip.Addr]int{}
	for i, w := range workloads {
		if w.MeshedSince.IsZero() {
			continue
		}
		for _, a := range w.Addrs {
			if j, taken := owner[a]; !taken || workloads[j].MeshedSince.Before(w.MeshedSince) {
				owner[a] = i
			}
		}
	}
	for i := range workloads {
		w := &workloads[i]
		kept := make([]netip.Addr, 0, len(w.Addrs))
		for _, a := range w.Addrs {
			if j, ok := owner[a]; ok && j == i {
				kept = append(kept, a)
			}
		}
		w.Addrs = kept
	}
	fd, err := link.BuildTable(version, workloads)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "address table"), nil
}

// tableCopy returns the newest table for sending; the caller closes it.
func (a *Agent) tableCopy() (version uint64, fd int, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.table.file == nil {
		return 0, -1, nil
	}
	fd, err = unix.FcntlInt(a.table.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	return a.table.version, fd, err
}

func (a *Agent) routePeers(host *netns.Host, peers []netns.Peer) {
	key := fmt.Sprint(host.Prefixes, peers)
	if key == a.routed {
		return
	}
	if err := host.SetPeers(peers); err != nil {
		a.log.Error("routes to other hosts", "err", err)
		return
	}
	a.routed = key
}
