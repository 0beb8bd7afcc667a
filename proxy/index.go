package proxy

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"

	"assay.dev/internal/layered"
	"assay.dev/proxy/balance"
)

// index is the services of a snapshot, and what connections and names are looked up in. A
// cluster has thousands of services and changes one of them every few milliseconds, in each
// of its proxies, so what a change costs is by what it changes: what services share is kept by
// their keys, and maps have successors instead of copies.
type index struct {
	services layered.Map[string, *service]
	vips     layered.Map[netip.Addr, claims]
	// targets are those of endpoints, for who is dialled directly.
	targets   layered.Map[netip.AddrPort, claims]
	nodePorts layered.Map[uint16, claims]         // at Configure.Nodes
	externals layered.Map[netip.AddrPort, claims] // addresses outside, at which nobody of the mesh may be
	// How many ports want applications to be told who comes, and to be told in a field of
	// HTTP: most meshes have none.
	announcing, certifying int
}

// claims are the ports of services that are at one place, by their services' keys and in a
// service's own order. The first is the one that is meant.
type claims []tableKey

// edit is an index that is being made of another.
type edit struct {
	services  *layered.Edit[string, *service]
	vips      *layered.Edit[netip.Addr, claims]
	targets   *layered.Edit[netip.AddrPort, claims]
	nodePorts *layered.Edit[uint16, claims]
	externals *layered.Edit[netip.AddrPort, claims]

	announcing, certifying int
}

func (x *index) edit() *edit {
	return &edit{
		services: x.services.Edit(), vips: x.vips.Edit(), targets: x.targets.Edit(), nodePorts: x.nodePorts.Edit(), externals: x.externals.Edit(),
		announcing: x.announcing, certifying: x.certifying,
	}
}

func (e *edit) index() index {
	return index{
		services: e.services.Map(), vips: e.vips.Map(), targets: e.targets.Map(), nodePorts: e.nodePorts.Map(), externals: e.externals.Map(),
		announcing: e.announcing, certifying: e.certifying,
	}
}

// put has svc take the place of what was there under its key.
func (e *edit) put(svc *service) {
	key := svc.Key()
	was, _ := e.services.Get(key)
	e.services.Set(key, svc)
	e.change(key, was, svc)
}

func (e *edit) remove(key string) {
	was, _ := e.services.Get(key)
	e.services.Delete(key)
	e.change(key, was, nil)
}

// change has places claimed by a service as it is, and not any more as it was; nil is none.
func (e *edit) change(key string, was, is *service) {
	reclaim(e.targets, key, was.targets(), is.targets())
	for _, sp := range was.list() {
		e.count(sp, -1)
	}
	for _, sp := range is.list() {
		e.count(sp, +1)
	}
	if was != nil && is != nil && slices.Equal(was.VIPs, is.VIPs) && slices.Equal(was.Externals, is.Externals) && slices.Equal(was.Ports, is.Ports) {
		return
	}
	reclaim(e.vips, key, was.vips(), is.vips())
	reclaim(e.nodePorts, key, was.nodePorts(), is.nodePorts())
	reclaim(e.externals, key, was.externals(), is.externals())
}

func (e *edit) count(sp *servicePort, n int) {
	if sp.announce {
		e.announcing += n
	}
	if sp.certify {
		e.certifying += n
	}
}

// reclaim has a service's places be what they are instead of what they were.
func reclaim[K comparable](e *layered.Edit[K, claims], service string, was, is map[K]claims) {
	for at, own := range is {
		if slices.Equal(was[at], own) {
			continue
		}
		all, _ := e.Get(at)
		e.Set(at, all.with(service, own))
	}
	for at := range was {
		if _, still := is[at]; still {
			continue
		}
		all, _ := e.Get(at)
		if all = all.with(service, nil); len(all) > 0 {
			e.Set(at, all)
		} else {
			e.Delete(at)
		}
	}
}

// with returns claims in which those of a service are own. The receiver stays as it is.
func (c claims) with(service string, own claims) claims {
	others := len(c) > 0 && (c[0].service != service || c[len(c)-1].service != service)
	if !others {
		return own
	}
	all := slices.DeleteFunc(slices.Clone(c), func(k tableKey) bool { return k.service == service })
	at, _ := slices.BinarySearchFunc(all, service, func(k tableKey, s string) int { return cmp.Compare(k.service, s) })
	return slices.Insert(all, at, own...)
}

// Where a service is, for each kind of place. A nil service is nowhere.

func (s *service) list() []*servicePort {
	if s == nil {
		return nil
	}
	return s.ports
}

func (s *service) vips() map[netip.Addr]claims {
	out := map[netip.Addr]claims{}
	if s != nil {
		own := claims{{service: s.Key()}}
		for _, a := range s.VIPs {
			out[a.Unmap()] = own
		}
	}
	return out
}

func (s *service) nodePorts() map[uint16]claims {
	out := map[uint16]claims{}
	for i, sp := range s.list() {
		if n := s.Ports[i].NodePort; n != 0 {
			out[n] = append(out[n], sp.key())
		}
	}
	return out
}

func (s *service) externals() map[netip.AddrPort]claims {
	out := map[netip.AddrPort]claims{}
	for _, sp := range s.list() {
		for _, a := range s.Externals {
			at := netip.AddrPortFrom(a.Unmap(), sp.port)
			out[at] = append(out[at], sp.key())
		}
	}
	return out
}

// targets are a service's endpoints, but for those that it does not own.
func (s *service) targets() map[netip.AddrPort]claims {
	if s == nil {
		return nil
	}
	out := make(map[netip.AddrPort]claims, len(s.Endpoints))
	for _, sp := range s.ports {
		own := claims{sp.key()} // what they all share
		for i, set := range []*balance.Set{sp.v4, sp.v6} {
			if i > 0 && set == sp.v4 {
				break
			}
			for _, e := range set.Endpoints() {
				if !e.Identity.IsZero() && !s.owns(e) {
					continue
				}
				switch has := out[e.Addr]; {
				case len(has) == 0:
					out[e.Addr] = own
				case has[len(has)-1] != own[0]:
					out[e.Addr] = append(has[:len(has):len(has)], own[0])
				}
			}
		}
	}
	return out
}

func (sp *servicePort) key() tableKey { return tableKey{sp.service, sp.port} }

// Lookups.

// of goes over the ports that claims are for.
func (x *index) of(c claims) iter.Seq2[*service, *servicePort] {
	return func(yield func(*service, *servicePort) bool) {
		for _, k := range c {
			if svc := x.services.At(k.service); svc != nil {
				if sp := svc.port(k.port); sp != nil && !yield(svc, sp) {
					return
				}
			}
		}
	}
}

// first returns the port that is meant, nil for none.
func (x *index) first(c claims) *servicePort {
	for _, sp := range x.of(c) {
		return sp
	}
	return nil
}

// target returns the port that an address of endpoints is of, nil for none.
func (x *index) target(a netip.AddrPort) *servicePort { return x.first(x.targets.At(a)) }

// announced reports whether the application at an address wants to be told who comes.
func (x *index) announced(a netip.AddrPort) bool {
	if x.announcing > 0 {
		for _, sp := range x.of(x.targets.At(a)) {
			if sp.announce {
				return true
			}
		}
	}
	return false
}

// certified reports whether it wants to be told in a field of HTTP.
func (x *index) certified(a netip.AddrPort) bool {
	if x.certifying > 0 {
		for _, sp := range x.of(x.targets.At(a)) {
			if sp.certify {
				return true
			}
		}
	}
	return false
}

// vip returns the service that has a virtual address, nil for none.
func (x *index) vip(a netip.Addr) *service {
	if c := x.vips.At(a); len(c) > 0 {
		return x.services.At(c[0].service)
	}
	return nil
}

// backend returns a port of a service by its key.
func (x *index) backend(service string, port uint16) *servicePort {
	if svc := x.services.At(service); svc != nil {
		return svc.port(port)
	}
	return nil
}
