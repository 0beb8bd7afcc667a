package agent

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"assay.dev"
	"assay.dev/agent/netns"
	"assay.dev/link"
)

// basis is what all of a view depends on: when it changes, a view is made anew.
type basis struct {
	epoch      uint64
	leaving    Leaving
	self, near string // this host for zones and routes, and for services with endpoints of one host
}

// publisher makes views, each from the one before and what has changed: a change costs what
// it is large, not what the mesh is. Agent.publishing guards it.
type publisher struct {
	basis     basis
	view      *view // the last
	workloads map[string]*assay.Workload
	hosts     map[string]*assay.Host
	opens     map[string][]netip.AddrPort // what each service has open
	openers   map[netip.AddrPort]int      // how many services have it open
	routed    map[string]map[string]bool  // the routes of each service
	hostsNew  bool                        // since somebody last looked
	owners    *owners
	table     link.TableBuilder // of addresses
	tableNew  bool              // since somebody last looked
}

// newPublisher begins with a number that no view of an agent before it had: proxies that it
// adopts still say which one they use.
func newPublisher() *publisher {
	return &publisher{view: &view{number: uint64(time.Now().UnixMilli())}, owners: &owners{}, tableNew: true}
}

// edit is a view in the making. A map is copied before it is changed first.
type edit struct {
	p     *publisher
	v     *view
	c     changes
	fresh bool // all maps are the view's own
	own   struct{ services, routes, namespaces bool }
	touch map[string]bool // services whose open ports may be others
}

// next makes the view of what has changed since the last: pieces by key, nil for one that
// is gone.
func (p *publisher) next(news map[string]*resource) *view {
	v := *p.view
	e := &edit{p: p, v: &v, touch: map[string]bool{}}
	e.apply(news)
	c := e.c // alone: the edit has the view, which has its history
	v.history = p.view.then(&c)
	return p.finish(&v)
}

// anew makes a view of all pieces there are.
func (p *publisher) anew(b basis, all map[string]*resource) *view {
	p.basis, p.hostsNew = b, true
	p.workloads, p.hosts = map[string]*assay.Workload{}, map[string]*assay.Host{}
	p.opens, p.openers, p.routed = map[string][]netip.AddrPort{}, map[netip.AddrPort]int{}, map[string]map[string]bool{}
	v := &view{
		number: p.view.number, services: map[string]versioned{}, routes: map[string]versionedRoute{},
		namespaces: map[string]assay.NamespaceConfig{}, open: map[netip.AddrPort]bool{},
	}
	e := &edit{p: p, v: v, fresh: true, touch: map[string]bool{}}
	e.apply(all)
	p.owners.reset(p.workloads)
	addrs := p.owners.addrs()
	slices.SortFunc(addrs, link.CompareInTable)
	for _, at := range addrs {
		p.place(at)
	}
	if p.table.Retain(func(at netip.Addr) bool { return p.owners.owner(at) != nil }) {
		p.tableNew = true
	}
	return p.finish(v)
}

func (p *publisher) finish(v *view) *view {
	v.number++
	p.view = v
	return v
}

func (e *edit) apply(news map[string]*resource) {
	hosts := false
	for key, r := range news {
		kind, name, _ := strings.Cut(key, "/")
		if r != nil && r.empty() {
			r = nil
		}
		switch kind {
		case "workload":
			e.setWorkload(name, r)
		case "service":
			e.setService(name, r)
		case "route":
			e.setRoute(name, r)
		case "namespace":
			e.setNamespace(name, r)
		case "host":
			hosts = true
			if r == nil {
				delete(e.p.hosts, name)
			} else {
				e.p.hosts[name] = r.host
			}
		}
	}
	if hosts {
		e.p.hostsNew = true
		e.setHosts()
	}
	e.setOpen()
}

func (e *edit) setWorkload(id string, r *resource) {
	p := e.p
	if p.basis.leaving.Dial {
		return // nobody is meshed
	}
	var is *assay.Workload
	if r != nil {
		is = r.workload
	}
	was := p.workloads[id]
	if is == nil {
		delete(p.workloads, id)
	} else {
		p.workloads[id] = is
	}
	if e.fresh {
		return // all at once
	}
	p.owners.replace(was, is)
	for _, w := range []*assay.Workload{was, is} {
		if w != nil {
			for _, at := range w.Addrs {
				p.place(at.Unmap())
			}
		}
	}
}

// place puts the owner of an address into the table. One that is not meshed yet is not there.
func (p *publisher) place(at netip.Addr) {
	news := false
	if w := p.owners.owner(at); w != nil && !w.MeshedSince.IsZero() {
		news = p.table.Set(at, link.Meshed{Identity: w.Identity, Workload: w.ID})
	} else {
		news = p.table.Remove(at)
	}
	p.tableNew = p.tableNew || news
}

func (e *edit) setService(key string, r *resource) {
	if !e.fresh && !e.own.services {
		e.v.services, e.own.services = maps.Clone(e.v.services), true
	}
	e.c.services = append(e.c.services, key)
	e.touch[key] = true
	if r == nil {
		delete(e.v.services, key)
		return
	}
	b := &e.p.basis
	x := versioned{r.service, version{epoch: b.epoch, number: r.message.GetVersion(), plain: b.leaving.Dial}}
	if b.leaving.Dial {
		x.service = withoutIdentities(x.service)
	}
	e.v.services[key] = x
}

func (e *edit) setRoute(key string, r *resource) {
	if !e.fresh && !e.own.routes {
		e.v.routes, e.own.routes = maps.Clone(e.v.routes), true
	}
	e.c.routes = append(e.c.routes, key)
	if was, there := e.v.routes[key]; there {
		for _, parent := range was.route.Parents {
			of := e.p.routed[parent.Service]
			delete(of, key)
			if len(of) == 0 {
				delete(e.p.routed, parent.Service)
			}
			e.touch[parent.Service] = true
		}
	}
	if r == nil {
		delete(e.v.routes, key)
		return
	}
	for _, parent := range r.route.Parents {
		of := e.p.routed[parent.Service]
		if of == nil {
			of = map[string]bool{}
			e.p.routed[parent.Service] = of
		}
		of[key] = true
		e.touch[parent.Service] = true
	}
	e.v.routes[key] = versionedRoute{r.route, version{epoch: e.p.basis.epoch, number: r.message.GetVersion()}}
}

func (e *edit) setNamespace(name string, r *resource) {
	if !e.fresh && !e.own.namespaces {
		e.v.namespaces, e.own.namespaces = maps.Clone(e.v.namespaces), true
	}
	e.c.settings = true
	if r == nil {
		delete(e.v.namespaces, name)
		return
	}
	c := *r.namespace
	if e.p.basis.leaving.Serve {
		c.Mode, c.Egress = assay.Observe, assay.Observe
	}
	e.v.namespaces[name] = c
}

func (e *edit) setHosts() {
	e.v.nodes, e.v.zone = nil, ""
	for id, h := range e.p.hosts {
		e.v.nodes = append(e.v.nodes, h.Addrs...)
		if id == e.p.basis.self {
			e.v.zone = h.Zone
		}
	}
	slices.SortFunc(e.v.nodes, netip.Addr.Compare)
}

// setOpen finds out what the services that were touched have open now. Two may have the same
// address for a moment: the old one's removal is on its way.
func (e *edit) setOpen() {
	p := e.p
	changed := map[netip.AddrPort]int{}
	for key := range e.touch {
		for _, at := range p.opens[key] {
			changed[at]--
		}
		is := e.openOf(key)
		for _, at := range is {
			changed[at]++
		}
		if len(is) == 0 {
			delete(p.opens, key)
		} else {
			p.opens[key] = is
		}
	}
	for at, by := range changed {
		if by == 0 {
			continue
		}
		was, is := p.openers[at], p.openers[at]+by
		if p.openers[at] = is; is == 0 {
			delete(p.openers, at)
		}
		if (was > 0) == (is > 0) {
			continue
		}
		if !e.fresh && len(e.c.open) == 0 {
			e.v.open = maps.Clone(e.v.open)
		}
		e.c.open = append(e.c.open, at)
		if is > 0 {
			e.v.open[at] = true
		} else {
			delete(e.v.open, at)
		}
	}
}

// openOf returns what a service has open.
func (e *edit) openOf(key string) []netip.AddrPort {
	s := e.v.services[key].service
	if s == nil {
		return nil
	}
	open := map[netip.AddrPort]bool{}
	openPorts(open, s, e.p.basis.near)
	for route := range e.p.routed[key] {
		r := e.v.routes[route].route
		for _, parent := range r.Parents {
			if parent.Service == key {
				openRouted(open, s, r.Kind, parent.Port)
			}
		}
	}
	return slices.Collect(maps.Keys(open))
}

// peers are the other hosts' prefixes.
func (p *publisher) peers() []netns.Peer {
	var peers []netns.Peer
	for id, h := range p.hosts {
		if id != p.basis.self && h.Advertise.IsValid() {
			peers = append(peers, netns.Peer{Via: h.Advertise, Via6: h.Advertise6, Prefixes: slices.Clone(h.Prefixes)})
		}
	}
	slices.SortFunc(peers, func(x, y netns.Peer) int {
		if len(x.Prefixes) == 0 || len(y.Prefixes) == 0 {
			return len(x.Prefixes) - len(y.Prefixes)
		}
		return comparePrefix(x.Prefixes[0], y.Prefixes[0])
	})
	return peers
}

func comparePrefix(a, b netip.Prefix) int { return a.Addr().Compare(b.Addr()) }

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
