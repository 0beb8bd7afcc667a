package discovery

import (
	"cmp"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"assay.dev"
)

// VIPs returns the virtual addresses of a service, IPv4 first, always the same for
// the same key. false: none can be had now, ask again later.
type VIPs func(key string) ([]netip.Addr, bool)

// Catalog computes services and namespaces from intent and workloads. Each change
// marks the services that it touches; Changes recomputes those alone.
//
// It is not safe for concurrent use. Values passed in are kept and must not
// change afterwards; values that come out are never changed.
type Catalog struct {
	declared   map[string]*DeclaredService
	declaredNS map[string][]*DeclaredService // by namespace
	configs    map[string]assay.NamespaceConfig
	egress     map[string][]assay.EgressRule   // by namespace
	policies   map[string]*assay.TrafficPolicy // by the key of the service
	workloads  map[string]*assay.Workload
	byNS       map[string]map[string]*assay.Workload // namespace -> ID
	members    map[string]map[string]*assay.Workload // service key -> ID: who belongs to it
	named      map[string]int                        // service key -> workloads started with its name
	lost       map[string]bool                       // hosts that did not come back in time
	remembered map[string][]assay.Port               // implicit services whose last workload is gone
	allowed    func(w *assay.Workload, service string) bool

	services   map[string]assay.Service
	namespaces map[string]assay.NamespaceConfig
	touched    map[string]bool // service keys
	touchedNS  map[string]bool

	places placements
	routes routes
}

// New returns an empty catalog.
func New() *Catalog {
	return &Catalog{
		declared: map[string]*DeclaredService{}, declaredNS: map[string][]*DeclaredService{}, configs: map[string]assay.NamespaceConfig{},
		workloads: map[string]*assay.Workload{}, byNS: map[string]map[string]*assay.Workload{},
		members: map[string]map[string]*assay.Workload{}, named: map[string]int{}, lost: map[string]bool{}, remembered: map[string][]assay.Port{},
		services: map[string]assay.Service{}, namespaces: map[string]assay.NamespaceConfig{},
		touched: map[string]bool{}, touchedNS: map[string]bool{}, places: newPlacements(), routes: newRoutes(),
	}
}

// Restrict has allowed decide which workloads may be endpoints of a service that
// selects them by their labels, since a host writes those as it likes. Without it, all
// may.
func (c *Catalog) Restrict(allowed func(w *assay.Workload, service string) bool) { c.allowed = allowed }

// SetIntent replaces everything declared. Only what differs is touched.
func (c *Catalog) SetIntent(in Intent) error {
	if err := in.Validate(); err != nil {
		return err
	}
	declared := make(map[string]*DeclaredService, len(in.Services))
	for i := range in.Services {
		s := &in.Services[i]
		declared[s.Key()] = s
	}
	differs := map[string]bool{}
	for key, s := range declared {
		if old := c.declared[key]; old == nil || !sameDeclaration(old, s) {
			differs[key] = true
		}
	}
	for key := range c.declared {
		if declared[key] == nil {
			differs[key] = true
		}
	}
	policies := map[string]*assay.TrafficPolicy{}
	for i := range in.Policies {
		p := &in.Policies[i]
		for _, name := range p.Services {
			policies[p.Namespace+"/"+name] = p
		}
	}
	for key, p := range policies {
		if !samePolicy(c.policies[key], p) {
			c.touch(key)
		}
	}
	for key := range c.policies {
		if policies[key] == nil {
			c.touch(key)
		}
	}
	c.policies = policies
	configs := make(map[string]assay.NamespaceConfig, len(in.Namespaces))
	for _, n := range in.Namespaces {
		configs[n.Namespace] = n
		c.touchedNS[n.Namespace] = true
	}
	for ns := range c.configs {
		c.touchedNS[ns] = true
	}
	egress := map[string][]assay.EgressRule{}
	for _, e := range in.Egress {
		egress[e.Namespace] = append(egress[e.Namespace], e.EgressRule)
		c.touchedNS[e.Namespace] = true
	}
	for ns := range c.egress {
		c.touchedNS[ns] = true
	}
	for _, rules := range egress {
		slices.SortFunc(rules, func(a, b assay.EgressRule) int { return cmp.Compare(a.Name, b.Name) })
	}
	c.declared, c.configs, c.egress = declared, configs, egress
	clear(c.declaredNS)
	for _, s := range declared {
		c.declaredNS[s.Namespace] = append(c.declaredNS[s.Namespace], s)
	}
	for key := range differs {
		c.touch(key)
		c.regroup(key)
	}
	c.routes.set(&in)
	return nil
}

func sameDeclaration(a, b *DeclaredService) bool {
	return a.Headless == b.Headless && maps.Equal(a.Selector, b.Selector) &&
		slices.Equal(a.ClusterIPs, b.ClusterIPs) && slices.Equal(a.Ports, b.Ports) &&
		slices.Equal(a.Externals, b.Externals) && a.Affinity == b.Affinity && a.Local == b.Local
}

// SetWorkload adds or replaces a workload.
func (c *Catalog) SetWorkload(w *assay.Workload) {
	old := c.workloads[w.ID]
	if old != nil {
		c.unlink(old)
	}
	c.workloads[w.ID] = w
	if c.byNS[w.Namespace] == nil {
		c.byNS[w.Namespace] = map[string]*assay.Workload{}
		c.touchedNS[w.Namespace] = true
	}
	c.byNS[w.Namespace][w.ID] = w
	if w.Service != "" {
		key := w.Namespace + "/" + w.Service
		c.named[key]++
		delete(c.remembered, key)
	}
	for _, key := range c.servicesOf(w) {
		c.touch(key)
		c.join(key, w)
	}
	c.settle(w)
}

func (c *Catalog) join(key string, w *assay.Workload) {
	if c.members[key] == nil {
		c.members[key] = map[string]*assay.Workload{}
	}
	c.members[key][w.ID] = w
}

// regroup finds the members of a service whose declaration changed.
func (c *Catalog) regroup(key string) {
	delete(c.members, key)
	ns, name, _ := strings.Cut(key, "/")
	d := c.declared[key]
	if d == nil {
		d = &DeclaredService{Namespace: ns, Name: name}
	}
	for _, w := range c.byNS[ns] {
		if d.selects(w) {
			c.join(key, w)
		}
	}
}

// RemoveWorkload forgets a workload; one that is not there is no error.
func (c *Catalog) RemoveWorkload(id string) {
	if w := c.workloads[id]; w != nil {
		c.unlink(w)
		delete(c.workloads, id)
	}
}

func (c *Catalog) unlink(w *assay.Workload) {
	for _, key := range c.servicesOf(w) {
		c.touch(key)
		delete(c.members[key], w.ID)
		if len(c.members[key]) == 0 {
			delete(c.members, key)
		}
	}
	c.leave(w)
	delete(c.byNS[w.Namespace], w.ID)
	if len(c.byNS[w.Namespace]) == 0 {
		delete(c.byNS, w.Namespace)
		c.touchedNS[w.Namespace] = true
	}
	if w.Service == "" {
		return
	}
	key := w.Namespace + "/" + w.Service
	if c.named[key]--; c.named[key] > 0 {
		return
	}
	delete(c.named, key)
	if s, ok := c.services[key]; ok && !c.Declared(key) {
		c.remembered[key] = s.Ports
	}
}

// SetHostLost says that a host has been away for longer than its lease (or that
// it is back): its workloads stay, but are ready nowhere.
func (c *Catalog) SetHostLost(host string, lost bool) {
	if c.lost[host] == lost {
		return
	}
	if lost {
		c.lost[host] = true
	} else {
		delete(c.lost, host)
	}
	for _, w := range c.workloads {
		if w.Host == host {
			for _, key := range c.servicesOf(w) {
				c.touch(key)
			}
		}
	}
}

// Remembered returns the implicit services without a workload, sorted. Their name
// and address stay, so that a client of a service that is being restarted is
// refused as by a machine without a listener, and not told that there is no such
// name. Forget ends that.
func (c *Catalog) Remembered() []string { return slices.Sorted(maps.Keys(c.remembered)) }

// Forget drops a remembered service.
func (c *Catalog) Forget(key string) {
	if _, ok := c.remembered[key]; ok {
		delete(c.remembered, key)
		c.touch(key)
	}
}

// Remember declares that an implicit service existed, as after a restart.
func (c *Catalog) Remember(key string, ports []assay.Port) {
	if c.named[key] == 0 && len(ports) > 0 {
		c.remembered[key] = ports
		c.touch(key)
	}
}

func (c *Catalog) touch(key string) { c.touched[key] = true }

// servicesOf returns the keys of the services to which w belongs.
func (c *Catalog) servicesOf(w *assay.Workload) []string {
	var out []string
	if w.Service != "" {
		out = append(out, w.Namespace+"/"+w.Service)
	}
	for _, s := range c.declaredNS[w.Namespace] {
		if s.Name != w.Service && s.selects(w) {
			out = append(out, s.Key())
		}
	}
	return out
}

// Workload returns a workload.
func (c *Catalog) Workload(id string) (*assay.Workload, bool) {
	w, ok := c.workloads[id]
	return w, ok
}

// Workloads returns all workloads, sorted by ID.
func (c *Catalog) Workloads() []*assay.Workload { return sortedValues(c.workloads) }

// Notes returns what the mesh does not do of what a service says.
func (c *Catalog) Notes(key string) []string {
	if p := c.places.services[key]; p != nil {
		return p.Notes
	}
	if d := c.declared[key]; d != nil {
		return d.Notes
	}
	return nil
}

// Services returns all services, sorted by key.
func (c *Catalog) Services() []assay.Service { return sortedValues(c.services) }

// Namespaces returns the configuration of every namespace in use, sorted.
func (c *Catalog) Namespaces() []assay.NamespaceConfig { return sortedValues(c.namespaces) }

// Declared reports whether somebody wrote the service down.
func (c *Catalog) Declared(key string) bool {
	return c.declared[key] != nil || c.places.services[key] != nil
}

func sortedValues[V any](m map[string]V) []V {
	out := make([]V, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		out = append(out, m[k])
	}
	return out
}

// Changes is what differs from the last call, sorted by key.
type Changes struct {
	Services          []assay.Service
	RemovedServices   []string // keys
	Namespaces        []assay.NamespaceConfig
	RemovedNamespaces []string
	Routes            []assay.Route // in effect
	RemovedRoutes     []string      // keys
	RouteStatus       []string      // keys of routes whose status was computed anew, or is gone
	Misplaced         []Misplaced   // places that are new among those that are no endpoints
	// Pending services have no virtual address yet; they are tried again at the
	// next call.
	Pending []string
}

// Changes recomputes what was touched.
func (c *Catalog) Changes(vips VIPs) Changes {
	var out Changes
	for _, key := range slices.Sorted(maps.Keys(c.touched)) {
		old, had := c.services[key]
		s, exists := c.service(key, &out)
		if exists && !s.Headless && len(s.VIPs) == 0 {
			addrs, ok := vips(key)
			if !ok {
				out.Pending = append(out.Pending, key)
				continue
			}
			s.VIPs = addrs
		}
		delete(c.touched, key)
		switch {
		case !exists && had:
			delete(c.services, key)
			c.routes.touch(key)
			out.RemovedServices = append(out.RemovedServices, key)
		case exists && (!had || !sameService(&old, &s)):
			c.services[key] = s
			if !had || old.Headless != s.Headless || !slices.Equal(old.Ports, s.Ports) {
				c.routes.touch(key)
			}
			out.Services = append(out.Services, s)
		}
	}
	for _, ns := range slices.Sorted(maps.Keys(c.touchedNS)) {
		old, had := c.namespaces[ns]
		config, exists := c.namespace(ns)
		switch {
		case !exists && had:
			delete(c.namespaces, ns)
			out.RemovedNamespaces = append(out.RemovedNamespaces, ns)
		case exists && (!had || !reflect.DeepEqual(old, config)):
			c.namespaces[ns] = config
			out.Namespaces = append(out.Namespaces, config)
		}
	}
	clear(c.touchedNS)
	c.routeChanges(&out)
	return out
}

// namespace returns the effective configuration of a namespace that has a
// workload or a declared configuration; observe is what nobody asked to change.
func (c *Catalog) namespace(ns string) (assay.NamespaceConfig, bool) {
	if config, ok := c.configs[ns]; ok {
		config.ExcludedPorts = slices.Compact(slices.Sorted(slices.Values(config.ExcludedPorts)))
		config.Allow = c.egress[ns]
		return config, true
	}
	return assay.NamespaceConfig{Namespace: ns, Mode: assay.Observe, Allow: c.egress[ns]}, len(c.byNS[ns])+len(c.egress[ns]) > 0
}

// compareEndpoints orders by workload; those without one by address.
func compareEndpoints(a, b assay.Endpoint) int {
	return cmp.Or(cmp.Compare(a.Workload, b.Workload), slices.CompareFunc(a.Addrs, b.Addrs, netip.Addr.Compare))
}
