package proxy

import (
	"maps"
	"net/netip"
	"slices"

	"assay.dev"
	"assay.dev/link"
	"assay.dev/proxy/balance"
	"assay.dev/proxy/route"
)

// tableKey is one port of a service.
type tableKey struct {
	service string
	port    uint16
}

// withRoutes brings routes and the tables that are compiled from them up to date with d,
// after services have been. What did not change keeps its table.
func (s *snapshot) withRoutes(d *link.Services, old *snapshot) {
	changed := map[string]bool{} // services whose tables are compiled again
	touch := func(r *assay.Route) {
		for _, p := range r.Parents {
			changed[p.Service] = true
		}
	}
	s.routes = make(map[string]*assay.Route, len(old.routes)+len(d.Routes))
	if d.Full {
		for _, r := range old.routes {
			touch(r)
		}
	} else {
		maps.Copy(s.routes, old.routes)
	}
	for _, key := range d.RemoveRoutes {
		if r := s.routes[key]; r != nil {
			touch(r)
			delete(s.routes, key)
		}
	}
	for i := range d.Routes {
		r := &d.Routes[i]
		if was := s.routes[r.Key()]; was != nil {
			touch(was)
		}
		touch(r)
		s.routes[r.Key()] = r
	}
	for i := range d.Upsert {
		svc := &d.Upsert[i]
		if was := old.services.At(svc.Key()); was == nil || !slices.Equal(was.Ports, svc.Ports) {
			changed[svc.Key()] = true
		}
	}
	for _, key := range d.Remove {
		changed[key] = true
	}
	if len(changed) == 0 {
		s.tables, s.byName = old.tables, old.byName
		return
	}
	s.tables = make(map[tableKey]*route.Table, len(old.tables))
	for key, t := range old.tables {
		if !changed[key.service] {
			s.tables[key] = t
		}
	}
	s.byName = make(map[tableKey]*route.Names, len(old.byName))
	for key, n := range old.byName {
		if !changed[key.service] {
			s.byName[key] = n
		}
	}
	byService := map[string][]*assay.Route{}
	for _, key := range slices.Sorted(maps.Keys(s.routes)) {
		r := s.routes[key]
		seen := map[string]bool{}
		for _, p := range r.Parents {
			if changed[p.Service] && !seen[p.Service] {
				seen[p.Service] = true
				byService[p.Service] = append(byService[p.Service], r)
			}
		}
	}
	for key, routes := range byService {
		svc := s.services.At(key)
		if svc == nil {
			continue
		}
		for _, sp := range svc.ports {
			// What is declared to be something else has no requests, or no names.
			if assay.HTTPRoute.Carries(sp.declared) {
				if t := route.Compile(key, sp.port, s.Identity.Namespace, routes); t != nil {
					s.tables[tableKey{key, sp.port}] = t
				}
			}
			if assay.TLSRoute.Carries(sp.declared) {
				if n := route.CompileNames(key, sp.port, s.Identity.Namespace, routes); n != nil {
					s.byName[tableKey{key, sp.port}] = n
				}
			}
		}
	}
}

// rules returns those for requests to a port, nil when there are none.
func (s *snapshot) rules(sp *servicePort) *route.Table {
	if sp == nil || len(s.tables) == 0 {
		return nil
	}
	return s.tables[tableKey{sp.service, sp.port}]
}

// namesOf returns those for connections of TLS to a port, nil when there are none.
func (s *snapshot) namesOf(sp *servicePort) *route.Names {
	if sp == nil || len(s.byName) == 0 {
		return nil
	}
	return s.byName[tableKey{sp.service, sp.port}]
}

// sole returns the port with rules that an address of endpoints is of, if it belongs to no
// other service which could be meant: who dials it means that service, whose routes count
// then. Only a service of the workload's own namespace can be meant. Headless services are
// none that could be; they have no routes.
func (s *snapshot) sole(a netip.AddrPort) (sole *servicePort) {
	if len(s.tables) == 0 && len(s.byName) == 0 {
		return nil
	}
	for svc, sp := range s.of(s.targets.At(a)) {
		own := func(e *balance.Endpoint) bool { return e.Addr == a && svc.owns(e) }
		if svc.Headless || !slices.ContainsFunc(sp.endpoints(a.Addr()).Endpoints(), own) {
			continue
		}
		if sole != nil {
			return nil
		}
		sole = sp
	}
	if s.rules(sole) == nil && s.namesOf(sole) == nil {
		return nil
	}
	return sole
}
