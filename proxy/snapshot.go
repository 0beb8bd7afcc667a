package proxy

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"assay.dev"
	"assay.dev/link"
	"assay.dev/proxy/balance"
	"assay.dev/proxy/detect"
	"assay.dev/proxy/dns"
	"assay.dev/proxy/egress"
	"assay.dev/proxy/guard"
	"assay.dev/proxy/route"
)

// snapshot is everything that a proxy knows. It never changes; the link's reader
// makes the next one.
type snapshot struct {
	link.Configure
	index
	settings        assay.NamespaceConfig
	routes          map[string]*assay.Route // by Route.Key
	tables          map[tableKey]*route.Table
	byName          map[tableKey]*route.Names
	table           *link.AddressTable
	egress          *egress.Policy
	servicesVersion uint64
	hasServices     bool
	tableVersion    uint64
}

// service is one service with its ports.
type service struct {
	assay.Service
	ports []*servicePort
}

// servicePort is where connections to one port of a service go.
type servicePort struct {
	service  string // key
	port     uint16 // as dialled
	declared assay.Protocol
	announce bool           // to the application who its client is
	certify  bool           // the same in a field of HTTP
	memory   *detect.Memory // outlives the snapshot
	care     *care          // as does this
	request  *guard.Request // what a request is allowed
	// v4 and v6 are the ready endpoints by the family that they are dialled in: the
	// application's own, when the endpoint has an address of it. They are the same set where
	// all endpoints have one family.
	v4, v6 *balance.Set
	// unlisted are ready endpoints that are not meshed and that no Egress allows, where
	// one must.
	unlisted  int
	elsewhere int // endpoints that are ready for clients on other hosts alone
}

// endpoints returns the set for a client that dialled an address like a.
func (sp *servicePort) endpoints(a netip.Addr) *balance.Set {
	if a.Is4() {
		return sp.v4
	}
	return sp.v6
}

// at returns the endpoint with an address, nil when there is none.
func (sp *servicePort) at(a netip.AddrPort) *balance.Endpoint {
	for _, e := range sp.endpoints(a.Addr()).Endpoints() {
		if e.Addr == a {
			return e
		}
	}
	return nil
}

// owns reports whether an endpoint is a workload of the service's own namespace. Where
// endpoints are is what somebody has written, who may be of another: then it says where the
// service's own clients go, and nothing about anybody else's.
func (s *service) owns(e *balance.Endpoint) bool {
	return !e.Identity.IsZero() && e.Identity.Namespace == s.Namespace
}

func (s *service) port(n uint16) *servicePort {
	for _, sp := range s.ports {
		if sp.port == n {
			return sp
		}
	}
	return nil
}

// withConfigure, withServices and withTable return the next snapshot. The namespace's settings
// come with services; those of a configuration are for a proxy that has none yet: an agent that
// adopts one may know less than it, and strict does not end by that.
func (s *snapshot) withConfigure(c link.Configure, p *Proxy) *snapshot {
	next := *s
	next.Configure = c
	if !s.hasServices {
		next.settings = c.Config
	}
	next.judge(s, p)
	if c.Zone != s.Zone || c.Host != s.Host {
		next.renew(p, func(*service) bool { return true })
	}
	return &next
}

func (s *snapshot) withTable(t *link.AddressTable, version uint64) *snapshot {
	next := *s
	next.table, next.tableVersion = t, version
	return &next
}

// patched puts what patches make of services in their place. It fails when they are not for
// the services that are known.
func (s *snapshot) patched(d *link.Services) error {
	for i := range d.Patch {
		svc, err := d.Patch[i].Apply(s.services.At(d.Patch[i].Service).noun())
		if err != nil {
			return err
		}
		d.Upsert = append(d.Upsert, svc)
	}
	d.Patch = nil
	return nil
}

func (s *snapshot) withServices(d link.Services, p *Proxy) *snapshot {
	next := *s
	if d.Config != nil {
		next.settings = *d.Config
	}
	if d.Config != nil || s.egress == nil {
		next.judge(s, p)
	}
	e := next.index.edit()
	if d.Full {
		e = new(index).edit()
	}
	for _, key := range d.Remove {
		e.remove(key)
	}
	for i := range d.Upsert {
		svc := &d.Upsert[i]
		e.put(next.newService(svc, s.services.At(svc.Key()), p))
	}
	next.index = e.index()
	next.servicesVersion, next.hasServices = d.Version, true
	next.withRoutes(&d, s)
	return &next
}

// judge makes the policy about what is outside, and where it is another one judges those
// services anew that have endpoints there.
func (s *snapshot) judge(old *snapshot, p *Proxy) {
	s.egress = egress.NewPolicy(&s.settings, s.Identity.Account)
	if s.egress.Equal(old.egress) {
		return
	}
	s.renew(p, func(svc *service) bool {
		return slices.ContainsFunc(svc.Endpoints, func(e assay.Endpoint) bool { return e.Identity.IsZero() })
	})
}

// renew makes those services anew that depend on something that has changed.
func (s *snapshot) renew(p *Proxy, which func(*service) bool) {
	e := s.index.edit()
	for _, svc := range s.services.All() {
		if which(svc) {
			e.put(s.newService(&svc.Service, svc, p))
		}
	}
	s.index = e.index()
}

// named is what the services are called, nil while none is known.
func (s *snapshot) named() *dns.Snapshot {
	if !s.hasServices {
		return nil
	}
	return dns.NewSnapshot(s.settings.Namespace, s.DNS.Domain, names{s}, s.DNS.Upstreams)
}

// names are a snapshot's services as a server of names asks for them.
type names struct{ s *snapshot }

func (n names) Service(key string) *assay.Service { return n.s.services.At(key).noun() }

func (n names) Owner(a netip.Addr) *assay.Service { return n.s.vip(a).noun() }

func (s *service) noun() *assay.Service {
	if s == nil {
		return nil
	}
	return &s.Service
}

func (s *snapshot) newService(svc *assay.Service, old *service, p *Proxy) *service {
	out := &service{Service: *svc}
	for i, port := range svc.Ports {
		sp := &servicePort{service: svc.Key(), port: port.Port, declared: port.Protocol, announce: port.ProxyProtocol, certify: port.ForwardClientCert}
		var v4, v6 *balance.Set
		if old != nil {
			if was := old.port(port.Port); was != nil {
				sp.memory, sp.care, v4, v6 = was.memory, was.care, was.v4, was.v6
			}
		}
		if sp.memory == nil {
			sp.memory, sp.care = new(detect.Memory), newCare(p.decided.Of(svc.Key()))
		}
		var want4, want6 []balance.Want
		dual := false // an endpoint is dialled at another address by who dialled IPv6
		near := svc.Policy == nil || !svc.Policy.AnyZone
		meant := s.meant(svc, i)
		for _, e := range svc.Endpoints {
			if !svc.ReadyAt(&e, i, s.Host) {
				if i < len(e.Targets) && e.Targets[i] != 0 {
					sp.elsewhere++
				}
				continue
			}
			if meant != nil && !meant(&e) {
				continue
			}
			at := func(is4 bool) balance.Want {
				a := e.Addrs[0].Unmap()
				for _, x := range e.Addrs {
					if x.Unmap().Is4() == is4 {
						a = x.Unmap()
						break
					}
				}
				return balance.Want{
					Addr: netip.AddrPortFrom(a, e.Targets[i]), Identity: e.Identity, Workload: e.Workload,
					Near: near && s.Zone != "" && e.Zone == s.Zone,
				}
			}
			to4, to6 := at(true), at(false)
			dual = dual || to4.Addr != to6.Addr
			if e.Identity.IsZero() && !(s.listed(svc, port.Port, to4.Addr) && s.listed(svc, port.Port, to6.Addr)) {
				sp.unlisted++
				continue
			}
			want4, want6 = append(want4, to4), append(want6, to6)
		}
		sp.v4 = balance.New(v4, want4, p.peers.value)
		sp.v4.Keep(svc.Affinity, v4)
		if sp.v6 = sp.v4; dual {
			// An endpoint that is in both sets (it has one family) is one endpoint.
			sp.v6 = balance.New(merge(v6, sp.v4), want6, p.peers.value)
			sp.v6.Keep(svc.Affinity, v6)
		}
		sp.care.configure(svc.Policy)
		sp.care.group.Consist(time.Now(), sp.v4, sp.v6)
		if svc.Policy != nil {
			sp.request = guard.RequestOf(svc.Policy)
		}
		out.ports = append(out.ports, sp)
	}
	return out
}

// meant returns which endpoints are for this workload by the service's hints, the host's
// before the zone's; nil when hints do not count: nobody gave any, or none is for us, and
// then everybody is as good.
func (s *snapshot) meant(svc *assay.Service, i int) func(*assay.Endpoint) bool {
	if svc.Local || svc.Policy != nil && svc.Policy.AnyZone {
		return nil
	}
	host := func(e *assay.Endpoint) bool { return slices.Contains(e.Hosts, s.Host) }
	zone := func(e *assay.Endpoint) bool { return slices.Contains(e.Zones, s.Zone) }
	some := func(f func(*assay.Endpoint) bool) bool {
		return slices.ContainsFunc(svc.Endpoints, func(e assay.Endpoint) bool { return svc.ReadyAt(&e, i, s.Host) && f(&e) })
	}
	switch {
	case s.Host != "" && some(host):
		return host
	case s.Zone != "" && some(zone):
		// One without any is for all: it came since hints were given.
		return func(e *assay.Endpoint) bool { return len(e.Zones) == 0 || zone(e) }
	}
	return nil
}

// merge is a set of the endpoints of both, for New to take from.
func merge(a, b *balance.Set) *balance.Set {
	return balance.Of(slices.Concat(a.Endpoints(), b.Endpoints()))
}

// external returns the service that is meant at an address outside, nil for none.
func (s *snapshot) external(a netip.AddrPort) *servicePort {
	if sp := s.first(s.externals.At(a)); sp != nil {
		return sp
	}
	if sp := s.first(s.nodePorts.At(a.Port())); sp != nil && slices.Contains(s.Nodes, a.Addr()) {
		return sp
	}
	return nil
}

// own reports whether a is the workload's.
func (s *snapshot) own(a netip.Addr) bool { return slices.Contains(s.Addrs, a) }

// meshPrefix reports whether a can only be the mesh's.
func (s *snapshot) meshPrefix(a netip.Addr) bool {
	return slices.ContainsFunc(s.MeshPrefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}

// stranger reports whether a is a workload's that the table does not know: one that
// has just started, or has ended.
func (s *snapshot) stranger(a netip.Addr) bool {
	_, known := s.table.Lookup(a)
	return !known && s.meshPrefix(a) && !s.own(a) && !slices.Contains(s.Gateways, a)
}

// ready reports whether everything that a connection needs has arrived.
func (s *snapshot) ready() bool { return s.Workload != "" && s.hasServices && s.table != nil }

// mode is how plaintext is treated; what is not said is the safe start.
func (s *snapshot) mode() assay.Mode { return cmp.Or(s.settings.Mode, assay.Observe) }
