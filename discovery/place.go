package discovery

import (
	"cmp"
	"net/netip"
	"slices"

	"assay.dev"
)

// Place is where clients of a service may be sent, as somebody says who watches what
// runs (the API server of a cluster). It says where, never who: that is known of the
// address, from the workload that has it.
type Place struct {
	Workload string       // ID of the workload that is meant, meshed or not; "" when none is
	Addrs    []netip.Addr // at most one of each family, IPv4 first; never none
	Targets  []uint16     // the ports there, one for each of the service's, or 0
	Zone     string
	Zones    []string // for whose clients it is meant (topology hints); nil for all
	Hosts    []string // the same by the IDs of hosts
	Host     string   // the ID of its own
	Ready    bool     // takes new work
	// Serving and Terminating places still take work, and end soon: for when no other is left.
	Serving     bool
	Terminating bool
}

// Misplaced is a place that is no endpoint, since somebody else has its address than
// it says.
type Misplaced struct {
	Service string // key
	Place   string // Workload; "" where none is meant
	Addr    netip.Addr
	Owner   string // the ID of the workload that has Addr; "": the meant one has others
}

// placed is a service whose endpoints are places.
type placed struct {
	DeclaredService
	places []Place
}

// placements are the services whose endpoints are places, with what a workload touches
// among them.
type placements struct {
	services   map[string]*placed
	byWorkload map[string][]string     // a place's workload -> keys of services
	byAddr     map[netip.Addr][]string // a place's address -> the same
	owners     map[netip.Addr][]*assay.Workload
	misplaced  map[string][]Misplaced // by service
	claimed    map[string]bool        // by workload
	ended      map[string]bool        // by workload that places mean
}

func newPlacements() placements {
	return placements{
		services: map[string]*placed{}, byWorkload: map[string][]string{}, byAddr: map[netip.Addr][]string{},
		owners: map[netip.Addr][]*assay.Workload{}, misplaced: map[string][]Misplaced{}, claimed: map[string]bool{}, ended: map[string]bool{},
	}
}

// SetPlaced adds or replaces a service whose endpoints are places, whatever its selector
// says; it stands before one of its key in the intent. It has the virtual addresses that
// it comes with: without any, and not headless, it is withheld.
//
// A place where a meshed workload lives is an endpoint with that workload's identity. One
// without is an endpoint without an identity, for clients to dial in plaintext, unless it has
// ended (SetEnded). Where the
// place means another workload than the one that has the address, there is no endpoint.
func (c *Catalog) SetPlaced(s DeclaredService, places []Place) {
	key := s.Key()
	old := c.places.services[key]
	c.unplace(key)
	c.places.services[key] = &placed{s, places}
	for i := range places {
		p := &places[i]
		if p.Workload != "" {
			addKey(c.places.byWorkload, p.Workload, key)
		}
		for _, a := range p.Addrs {
			addKey(c.places.byAddr, a, key)
		}
	}
	c.forgetEnded(old)
	c.touch(key)
}

// RemovePlaced forgets such a service; one that is not there is no error.
func (c *Catalog) RemovePlaced(key string) {
	if old := c.places.services[key]; old != nil {
		c.unplace(key)
		c.forgetEnded(old)
		c.touch(key)
	}
}

// SetClaimed says that a workload that there is not may be in the mesh all the same: a
// place that means it is no endpoint while that lasts.
func (c *Catalog) SetClaimed(id string, claimed bool) {
	if c.places.claimed[id] == claimed {
		return
	}
	if claimed {
		c.places.claimed[id] = true
	} else {
		delete(c.places.claimed, id)
	}
	for _, key := range c.places.byWorkload[id] {
		c.touch(key)
	}
}

// SetEnded says that whom places mean by an ID has ended: they are no endpoints any more, of
// the mesh or not, since whoever says where clients are sent may be late.
func (c *Catalog) SetEnded(id string) {
	if len(c.places.byWorkload[id]) == 0 {
		return
	}
	c.places.ended[id] = true
	for _, key := range c.places.byWorkload[id] {
		c.touch(key)
	}
}

// forgetEnded forgets those whom no place means any more.
func (c *Catalog) forgetEnded(old *placed) {
	if old == nil {
		return
	}
	for i := range old.places {
		if id := old.places[i].Workload; len(c.places.byWorkload[id]) == 0 {
			delete(c.places.ended, id)
		}
	}
}

func (c *Catalog) unplace(key string) {
	old := c.places.services[key]
	if old == nil {
		return
	}
	for i := range old.places {
		p := &old.places[i]
		if p.Workload != "" {
			removeKey(c.places.byWorkload, p.Workload, key)
		}
		for _, a := range p.Addrs {
			removeKey(c.places.byAddr, a, key)
		}
	}
	delete(c.places.services, key)
}

func addKey[K comparable](m map[K][]string, k K, key string) {
	if !slices.Contains(m[k], key) {
		m[k] = append(m[k], key)
	}
}

func removeKey[K comparable](m map[K][]string, k K, key string) {
	i := slices.Index(m[k], key)
	switch {
	case i < 0:
	case len(m[k]) == 1:
		delete(m, k)
	default:
		m[k] = slices.Delete(m[k], i, i+1)
	}
}

// settle and leave tell the places of a workload that it is there, or no more.
func (c *Catalog) settle(w *assay.Workload) {
	for _, a := range w.Addrs {
		c.places.owners[a] = append(c.places.owners[a], w)
	}
	c.touchPlaces(w)
}

func (c *Catalog) leave(w *assay.Workload) {
	for _, a := range w.Addrs {
		list := slices.DeleteFunc(c.places.owners[a], func(o *assay.Workload) bool { return o.ID == w.ID })
		if len(list) == 0 {
			delete(c.places.owners, a)
		} else {
			c.places.owners[a] = list
		}
	}
	c.touchPlaces(w)
}

func (c *Catalog) touchPlaces(w *assay.Workload) {
	for _, key := range c.places.byWorkload[w.ID] {
		c.touch(key)
	}
	for _, a := range w.Addrs {
		for _, key := range c.places.byAddr[a] {
			c.touch(key)
		}
	}
}

// owner returns the workload that has an address, nil for none. For a moment two may
// claim it: then it belongs to the newer one, as in the address table.
func (c *Catalog) owner(a netip.Addr) *assay.Workload {
	var best *assay.Workload
	for _, w := range c.places.owners[a] {
		if best == nil || cmp.Or(w.MeshedSince.Compare(best.MeshedSince), cmp.Compare(w.ID, best.ID)) > 0 {
			best = w
		}
	}
	return best
}

// occupied is a place and who is there.
type occupied struct {
	*Place
	workload *assay.Workload // nil: nobody of the mesh
	addrs    []netip.Addr
}

// occupant finds out who is at a place; false when it is not who is meant, or may not
// be dialled yet.
func (c *Catalog) occupant(key string, p *Place) (occupied, *Misplaced, bool) {
	o := occupied{Place: p, workload: c.workloads[p.Workload], addrs: p.Addrs}
	for _, a := range p.Addrs {
		owner := c.owner(a)
		if o.workload == nil && p.Workload == "" {
			o.workload = owner
		}
		if owner != nil && owner != o.workload {
			return o, &Misplaced{key, p.Workload, a, owner.ID}, false
		}
	}
	if o.workload == nil {
		return o, nil, !c.places.claimed[p.Workload] && !c.places.ended[p.Workload]
	}
	o.addrs = nil
	for _, a := range p.Addrs {
		if c.owner(a) == o.workload {
			o.addrs = append(o.addrs, a)
		}
	}
	if len(o.addrs) == 0 {
		return o, &Misplaced{key, p.Workload, p.Addrs[0], ""}, false
	}
	return o, nil, !o.workload.MeshedSince.IsZero()
}

// endpoints are those of the service's places, and the places that are none.
func (c *Catalog) endpoints(s *placed) ([]assay.Endpoint, []Misplaced) {
	key := s.Key()
	var list []occupied
	var misplaced []Misplaced
	for i := range s.places {
		o, wrong, ok := c.occupant(key, &s.places[i])
		if ok {
			list = append(list, o)
		} else if wrong != nil {
			misplaced = append(misplaced, *wrong)
		}
	}
	ready, zoned, hosted := chances(list, len(s.Ports), s.Local)
	out := make([]assay.Endpoint, 0, len(list))
	for i := range list {
		e := list[i].endpoint(ready[list[i].group(s.Local)], len(s.Ports))
		if zoned {
			e.Zones = list[i].Zones
		}
		if hosted {
			e.Hosts = list[i].Hosts
		}
		e.Host = list[i].group(s.Local)
		out = append(out, e)
	}
	slices.SortFunc(out, compareEndpoints)
	return mergeSame(out), misplaced
}

// takesNothing reports whether the workload there says so itself: it is about to end.
func (o *occupied) takesNothing() bool { return o.workload != nil && o.workload.Draining }

// group is what an endpoint must be of to stand in for this one: the host, of a service that
// is local.
func (o *occupied) group(local bool) string {
	if !local {
		return ""
	}
	if o.workload != nil {
		return o.workload.Host
	}
	return o.Host
}

// chances says, for each group and port, whether there is a place that is ready, so that
// none is needed that ends; and whether every place that may be used says for whom it is
// meant: hints count all together or not at all, as a service that is partly hinted
// would be overloaded where it is (EndpointSlice, v1: hints).
func chances(list []occupied, ports int, local bool) (ready map[string][]bool, zoned, hosted bool) {
	ready = map[string][]bool{}
	places, zones, hosts := 0, 0, 0
	for i := range list {
		o := &list[i]
		if !o.Ready || o.takesNothing() {
			continue
		}
		g := o.group(local)
		if ready[g] == nil {
			ready[g] = make([]bool, ports)
		}
		for j, t := range o.Targets {
			ready[g][j] = ready[g][j] || t != 0
		}
		places++
		zones += min(len(o.Zones), 1)
		hosts += min(len(o.Hosts), 1)
	}
	return ready, places > 0 && zones == places, places > 0 && hosts == places
}

// endpoint is that of a place, where ready says at which ports its group has a ready one.
// One that is not ready stays listed, without targets.
func (o *occupied) endpoint(ready []bool, ports int) assay.Endpoint {
	e := assay.Endpoint{Workload: o.Workload, Addrs: o.addrs, Zone: o.Zone, Targets: make([]uint16, ports)}
	if w := o.workload; w != nil {
		e.Workload, e.Identity, e.Zone = w.ID, w.Identity, cmp.Or(o.Zone, w.Zone)
	}
	if o.takesNothing() {
		return e
	}
	for i, t := range o.Targets {
		other := ready != nil && ready[i]
		if o.Ready || !other && o.Serving && o.Terminating {
			e.Targets[i] = t
		}
	}
	return e
}

// mergeSame makes one endpoint of a workload that is in several places: a slice that
// somebody wrote by hand may name an address that another slice has as well.
func mergeSame(list []assay.Endpoint) []assay.Endpoint {
	out := list[:0]
	for _, e := range list {
		last := len(out) - 1
		if last < 0 || e.Workload == "" || out[last].Workload != e.Workload {
			out = append(out, e)
			continue
		}
		if len(e.Addrs) > len(out[last].Addrs) {
			out[last].Addrs = e.Addrs
		}
		for i, t := range e.Targets {
			out[last].Targets[i] = cmp.Or(out[last].Targets[i], t)
		}
	}
	return out
}
