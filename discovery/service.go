package discovery

import (
	"reflect"
	"slices"
	"strings"

	"assay.dev"
)

// selects reports whether w belongs to s.
func (s *DeclaredService) selects(w *assay.Workload) bool {
	if w.Namespace != s.Namespace {
		return false
	}
	if w.Service == s.Name {
		return true
	}
	if len(s.Selector) == 0 {
		return false
	}
	for k, v := range s.Selector {
		if got, ok := w.Labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// service computes one service; false when there is none of that key.
func (c *Catalog) service(key string, out *Changes) (assay.Service, bool) {
	if p := c.places.services[key]; p != nil {
		return c.placedService(key, p, out)
	}
	delete(c.places.misplaced, key)
	ns, name, _ := strings.Cut(key, "/")
	d := c.declared[key]
	if d == nil {
		if d = c.implicit(ns, name); d == nil {
			return assay.Service{}, false
		}
	}
	s := c.begin(d)
	for _, w := range c.members[key] {
		if w.Service != name && c.allowed != nil && !c.allowed(w, name) {
			continue
		}
		if !w.MeshedSince.IsZero() && len(w.Addrs) > 0 {
			s.Endpoints = append(s.Endpoints, c.endpoint(d, w))
		}
	}
	slices.SortFunc(s.Endpoints, compareEndpoints)
	return s, true
}

// begin is a service without its endpoints.
func (c *Catalog) begin(d *DeclaredService) assay.Service {
	s := assay.Service{Namespace: d.Namespace, Name: d.Name, Headless: d.Headless, VIPs: d.ClusterIPs, Policy: c.policies[d.Key()],
		Externals: d.Externals, Affinity: d.Affinity, Local: d.Local}
	for _, p := range d.Ports {
		s.Ports = append(s.Ports, p.Port)
	}
	return s
}

// placedService is service for one whose endpoints are places. Its virtual addresses are
// somebody else's to give.
func (c *Catalog) placedService(key string, p *placed, out *Changes) (assay.Service, bool) {
	s := c.begin(&p.DeclaredService)
	var misplaced []Misplaced
	s.Endpoints, misplaced = c.endpoints(p)
	for _, m := range misplaced {
		if !slices.Contains(c.places.misplaced[key], m) {
			out.Misplaced = append(out.Misplaced, m)
		}
	}
	if len(misplaced) == 0 {
		delete(c.places.misplaced, key)
	} else {
		c.places.misplaced[key] = misplaced
	}
	return s, len(s.Ports) > 0 && (s.Headless || len(s.VIPs) > 0)
}

// implicit is the service that `assay run --service NAME --port N` makes when
// nobody declared one: the ports of all its workloads.
func (c *Catalog) implicit(ns, name string) *DeclaredService {
	key := ns + "/" + name
	d := &DeclaredService{Namespace: ns, Name: name}
	if c.named[key] == 0 {
		for _, p := range c.remembered[key] {
			d.Ports = append(d.Ports, DeclaredPort{Port: p})
		}
		if len(d.Ports) == 0 {
			return nil
		}
		return d
	}
	var ports []uint16
	for _, w := range c.members[key] {
		ports = append(ports, w.Ports...)
	}
	slices.Sort(ports)
	for _, p := range slices.Compact(ports) {
		d.Ports = append(d.Ports, DeclaredPort{Port: assay.Port{Port: p}})
	}
	if len(d.Ports) == 0 {
		return nil // a client only: it has a name, and nothing to reach
	}
	return d
}

// endpoint says where w can be reached now. A workload that drains, or whose host
// is lost, stays listed, so that its address keeps its identity, and takes
// nothing new.
func (c *Catalog) endpoint(d *DeclaredService, w *assay.Workload) assay.Endpoint {
	e := assay.Endpoint{Workload: w.ID, Identity: w.Identity, Addrs: w.Addrs, Zone: w.Zone, Targets: make([]uint16, len(d.Ports))}
	if d.Local {
		e.Host = w.Host
	}
	if w.Draining || c.lost[w.Host] {
		return e
	}
	for i, p := range d.Ports {
		target := p.Target
		if target == 0 {
			target = p.Port.Port
		}
		if slices.Contains(w.Listening, target) {
			e.Targets[i] = target
		}
	}
	return e
}

func sameService(a, b *assay.Service) bool {
	return a.EqualBut(b) && slices.EqualFunc(a.Endpoints, b.Endpoints, func(x, y assay.Endpoint) bool { return x.Equal(&y) })
}

// samePolicy compares what two policies say.
func samePolicy(a, b *assay.TrafficPolicy) bool {
	return a == b || a != nil && b != nil && reflect.DeepEqual(a, b)
}
