package agent

import (
	"maps"
	"net/netip"
	"reflect"
	"slices"

	"assay.dev"
	"assay.dev/link"
)

// view is what all proxies of the host are told, made from one snapshot. It is
// immutable; what has not changed it has in common with the one before.
type view struct {
	number     uint64
	services   map[string]versioned
	routes     map[string]versionedRoute
	namespaces map[string]assay.NamespaceConfig
	bundle     *link.Bundle
	open       map[netip.AddrPort]bool
	zone       string       // of this host, as control has it
	nodes      []netip.Addr // all hosts' own, sorted

	// history says how this view and the newest before it came to be, in order; a view that
	// was made anew knows of none.
	history []*changes
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

// changes are what may be different between two views: keys of services and routes, and
// addresses, each of them once.
type changes struct {
	services, routes []string
	open             []netip.AddrPort
	settings         bool // of namespaces
}

// remembered is how many views back what changed is known. Who is further behind compares.
const remembered = 64

// then is the history of the next view.
func (v *view) then(c *changes) []*changes {
	first := max(0, len(v.history)-remembered+1)
	return append(slices.Clone(v.history[first:]), c)
}

// since returns what may have changed after view from. The second value is false when
// that is not known.
func (v *view) since(from uint64) (changes, bool) {
	back := v.number - from
	if from > v.number || back > uint64(len(v.history)) {
		return changes{}, false
	}
	list := v.history[len(v.history)-int(back):]
	if len(list) == 1 {
		return *list[0], true
	}
	var all changes
	for _, c := range list {
		all.services = append(all.services, c.services...)
		all.routes = append(all.routes, c.routes...)
		all.open = append(all.open, c.open...)
		all.settings = all.settings || c.settings
	}
	slices.Sort(all.services)
	slices.Sort(all.routes)
	slices.SortFunc(all.open, netip.AddrPort.Compare)
	all.services, all.routes, all.open = slices.Compact(all.services), slices.Compact(all.routes), slices.Compact(all.open)
	return all, true
}

// compared is what since returns, by looking at all of both views.
func (v *view) compared(from *view) changes {
	c := changes{settings: !sameSettings(from.namespaces, v.namespaces)}
	for key, x := range v.services {
		if was, there := from.services[key]; !there || was.version != x.version {
			c.services = append(c.services, key)
		}
	}
	for key := range from.services {
		if _, there := v.services[key]; !there {
			c.services = append(c.services, key)
		}
	}
	for key, x := range v.routes {
		if was, there := from.routes[key]; !there || was.version != x.version {
			c.routes = append(c.routes, key)
		}
	}
	for key := range from.routes {
		if _, there := v.routes[key]; !there {
			c.routes = append(c.routes, key)
		}
	}
	return c
}

// config returns a namespace's settings: control's, or those of one that nobody
// configured.
func (v *view) config(namespace string) assay.NamespaceConfig {
	if c, ok := v.namespaces[namespace]; ok {
		return c
	}
	return assay.NamespaceConfig{Namespace: namespace, Mode: assay.Observe}
}

// full is all that a view says to a workload in a namespace.
func (v *view) full(namespace string) link.Services {
	config := v.config(namespace)
	s := link.Services{Version: v.number, Full: true, Config: &config}
	for _, x := range v.services {
		s.Upsert = append(s.Upsert, *x.service)
	}
	for _, x := range v.routes {
		if r, here := routeFor(x.route, namespace); here {
			s.Routes = append(s.Routes, r)
		}
	}
	return s
}

// delta is what v says otherwise than from, where only c may be different, to a proxy that
// knows patches or not. The second value is false when that is nothing.
func (v *view) delta(from *view, c changes, namespace string, patches bool) (link.Services, bool) {
	s := link.Services{Version: v.number}
	for _, key := range c.services {
		was, before := from.services[key]
		is, after := v.services[key]
		switch {
		case after && before && was.version == is.version:
		case after:
			if before && patches {
				if p, ok := link.NewPatch(was.service, is.service); ok {
					s.Patch = append(s.Patch, p)
					continue
				}
			}
			s.Upsert = append(s.Upsert, *is.service)
		case before:
			s.Remove = append(s.Remove, key)
		}
	}
	for _, key := range c.routes {
		was, before := from.routes[key]
		is, after := v.routes[key]
		if after && before && was.version == is.version {
			continue
		}
		if after {
			if r, here := routeFor(is.route, namespace); here {
				s.Routes = append(s.Routes, r)
				continue
			}
		}
		if before {
			if _, here := routeFor(was.route, namespace); here {
				s.RemoveRoutes = append(s.RemoveRoutes, key)
			}
		}
	}
	if config := v.config(namespace); c.settings && !reflect.DeepEqual(config, from.config(namespace)) {
		s.Config = &config
	}
	return s, len(s.Upsert)+len(s.Patch)+len(s.Remove)+len(s.Routes)+len(s.RemoveRoutes) > 0 || s.Config != nil
}

// sameSettings reports whether namespaces are as they were. What changes is on disk before
// anybody hears of it, however slow that is: the next agent may have nothing else to go by,
// and a proxy that has become strict is not to be told what was before.
func sameSettings(was, is map[string]assay.NamespaceConfig) bool {
	return maps.EqualFunc(was, is, func(x, y assay.NamespaceConfig) bool { return reflect.DeepEqual(x, y) })
}

// routeFor returns what of a route workloads of a namespace meet: a consumer's route is
// for its own namespace alone.
func routeFor(r *assay.Route, namespace string) (assay.Route, bool) {
	out := *r
	out.Parents = nil
	for _, p := range r.Parents {
		if r.Producer(p) || r.Namespace == namespace {
			out.Parents = append(out.Parents, p)
		}
	}
	return out, len(out.Parents) > 0
}
