package discovery

import (
	"cmp"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"assay.dev"
)

// Controller is the name under which conditions are reported.
const Controller = "assay.dev/mesh"

// Conditions and reasons as the Gateway API names them (RouteConditionType and
// RouteConditionReason).
const (
	conditionAccepted  = "Accepted"
	conditionResolved  = "ResolvedRefs"
	conditionPartially = "PartiallyInvalid"

	ReasonAccepted            = "Accepted"
	ReasonNoMatchingParent    = "NoMatchingParent"
	ReasonUnsupportedValue    = "UnsupportedValue"
	ReasonIncompatibleFilters = "IncompatibleFilters"
	ReasonResolvedRefs        = "ResolvedRefs"
	ReasonRefNotPermitted     = "RefNotPermitted"
	ReasonInvalidKind         = "InvalidKind"
	ReasonBackendNotFound     = "BackendNotFound"
	ReasonUnsupportedProtocol = "UnsupportedProtocol"
)

// DeclaredRoute is a route that somebody wrote down: what could be understood of it,
// and what could not. Whether its parents and backends exist is the catalog's to find.
type DeclaredRoute struct {
	// Route has the rules that are sound; no parents yet. A backend that is invalid
	// whatever exists says so already.
	assay.Route
	Generation int64
	ParentRefs []DeclaredParent
	Dropped    []RouteProblem // rules that are not sound, in order
	Unresolved []RouteProblem // references that cannot be followed whatever exists
}

// DeclaredParent is a parent that a route names.
type DeclaredParent struct {
	Ref     assay.RouteParentRef
	Problem RouteProblem // why it cannot be one whatever exists; zero: it can
}

// RouteProblem is one thing that is wrong with a route.
type RouteProblem struct {
	Rule    int // its index
	Reason  string
	Message string
}

// ReferenceGrant lets routes of other namespaces send requests to services of one.
type ReferenceGrant struct {
	Namespace string // of the services, and of the grant
	Name      string
	From      []GrantFrom
	To        []string // names of services; "" is all
}

// GrantFrom is whose references a grant permits.
type GrantFrom struct {
	Kind      assay.RouteKind
	Namespace string
}

func (in *Intent) validateRoutes() error {
	seen := map[string]bool{}
	for i := range in.Routes {
		r := &in.Routes[i]
		if err := r.Route.Validate(); err != nil {
			return err
		}
		if seen[r.Key()] {
			return fmt.Errorf("%s: declared twice", r.Key())
		}
		seen[r.Key()] = true
		if len(r.ParentRefs) > assay.MaxRouteParents {
			return fmt.Errorf("%s: %d parents, at most %d", r.Key(), len(r.ParentRefs), assay.MaxRouteParents)
		}
	}
	return nil
}

// references returns the keys of the services that the route depends on.
func (r *DeclaredRoute) references() map[string]bool {
	keys := map[string]bool{}
	for _, p := range r.ParentRefs {
		keys[p.Ref.Namespace+"/"+p.Ref.Name] = true
	}
	for _, rule := range r.Rules {
		for _, m := range rule.Mirrors {
			keys[m.Service] = true
		}
		for _, b := range rule.Backends {
			keys[b.Service] = true
			for _, m := range b.Mirrors {
				keys[m.Service] = true
			}
		}
	}
	delete(keys, "")
	return keys
}

// routes is what the catalog knows of them.
type routes struct {
	declared   map[string]*DeclaredRoute
	grants     []ReferenceGrant
	references map[string]map[string]bool // service key -> route keys
	effective  map[string]assay.Route
	status     map[string][]assay.RouteParentStatus
	touched    map[string]bool
}

func newRoutes() routes {
	return routes{
		declared: map[string]*DeclaredRoute{}, references: map[string]map[string]bool{}, effective: map[string]assay.Route{},
		status: map[string][]assay.RouteParentStatus{}, touched: map[string]bool{},
	}
}

// set replaces everything declared.
func (rs *routes) set(in *Intent) {
	all := !reflect.DeepEqual(rs.grants, in.Grants)
	rs.grants = in.Grants
	declared := make(map[string]*DeclaredRoute, len(in.Routes))
	for i := range in.Routes {
		r := &in.Routes[i]
		declared[r.Key()] = r
		if old := rs.declared[r.Key()]; all || old == nil || !reflect.DeepEqual(old, r) {
			rs.touched[r.Key()] = true
		}
	}
	for key := range rs.declared {
		if declared[key] == nil {
			rs.touched[key] = true
		}
	}
	rs.declared = declared
	clear(rs.references)
	for key, r := range declared {
		for service := range r.references() {
			if rs.references[service] == nil {
				rs.references[service] = map[string]bool{}
			}
			rs.references[service][key] = true
		}
	}
}

// touch marks the routes that refer to a service.
func (rs *routes) touch(service string) {
	for key := range rs.references[service] {
		rs.touched[key] = true
	}
}

// changes recomputes what was touched.
func (c *Catalog) routeChanges(out *Changes) {
	rs := &c.routes
	for _, key := range slices.Sorted(maps.Keys(rs.touched)) {
		d := rs.declared[key]
		old, had := rs.effective[key]
		out.RouteStatus = append(out.RouteStatus, key)
		if d == nil {
			delete(rs.status, key)
			if had {
				delete(rs.effective, key)
				out.RemovedRoutes = append(out.RemovedRoutes, key)
			}
			continue
		}
		r, status := c.resolve(d)
		rs.status[key] = status
		switch {
		case len(r.Parents) == 0 && had:
			delete(rs.effective, key)
			out.RemovedRoutes = append(out.RemovedRoutes, key)
		case len(r.Parents) > 0 && (!had || !reflect.DeepEqual(old, r)):
			rs.effective[key] = r
			out.Routes = append(out.Routes, r)
		}
	}
	clear(rs.touched)
}

// Routes returns the routes in effect, sorted by key.
func (c *Catalog) Routes() []assay.Route { return sortedValues(c.routes.effective) }

// RouteStatus returns what became of a route at each of its parents, in order. Nobody
// has set the times of the conditions.
func (c *Catalog) RouteStatus(key string) []assay.RouteParentStatus { return c.routes.status[key] }

// resolve decides everything about a route that depends on what exists.
func (c *Catalog) resolve(d *DeclaredRoute) (assay.Route, []assay.RouteParentStatus) {
	r := d.Route
	r.Parents = nil
	r.Rules = slices.Clone(d.Rules)
	unresolved := slices.Clone(d.Unresolved)
	bad := func(rule int, reason, message string) string {
		unresolved = append(unresolved, RouteProblem{rule, reason, message})
		return reason + ": " + message
	}
	for i := range r.Rules {
		rule := &r.Rules[i]
		rule.Mirrors = c.resolveMirrors(d, i, rule.Mirrors, bad)
		rule.Backends = slices.Clone(rule.Backends)
		for j := range rule.Backends {
			b := &rule.Backends[j]
			b.Mirrors = c.resolveMirrors(d, i, b.Mirrors, bad)
			if b.Invalid == "" {
				if reason, message := c.reference(d, b.Service, b.Port); reason != "" {
					b.Invalid = bad(i, reason, message)
				}
			}
		}
	}
	var status []assay.RouteParentStatus
	for _, p := range d.ParentRefs {
		conditions := []assay.RouteCondition{c.accept(d, p, &r)}
		if len(unresolved) == 0 {
			conditions = append(conditions, d.condition(conditionResolved, true, ReasonResolvedRefs, "every reference is resolved"))
		} else {
			conditions = append(conditions, d.condition(conditionResolved, false, unresolved[0].Reason, unresolvedText(unresolved)))
		}
		if conditions[0].Status == "True" && len(d.Dropped) > 0 {
			conditions = append(conditions, d.condition(conditionPartially, true, d.Dropped[0].Reason, droppedText(d.Dropped)))
		}
		status = append(status, assay.RouteParentStatus{ParentRef: p.Ref, ControllerName: Controller, Conditions: conditions})
	}
	return r, status
}

func (d *DeclaredRoute) condition(kind string, status bool, reason, message string) assay.RouteCondition {
	text := "False"
	if status {
		text = "True"
	}
	return assay.RouteCondition{Type: kind, Status: text, ObservedGeneration: d.Generation, Reason: reason, Message: message}
}

func droppedText(list []RouteProblem) string {
	var b strings.Builder
	for i, p := range list {
		if i > 0 {
			b.WriteString("; ")
		}
		fmt.Fprintf(&b, "Dropped Rule %d: %s", p.Rule, p.Message)
	}
	return b.String()
}

func unresolvedText(list []RouteProblem) string {
	var parts []string
	for _, p := range list {
		parts = append(parts, fmt.Sprintf("rule %d: %s", p.Rule, p.Message))
	}
	return strings.Join(slices.Compact(parts), "; ")
}

// accept decides whether a parent takes the route, and attaches it.
func (c *Catalog) accept(d *DeclaredRoute, p DeclaredParent, r *assay.Route) assay.RouteCondition {
	no := func(reason, format string, args ...any) assay.RouteCondition {
		return d.condition(conditionAccepted, false, reason, fmt.Sprintf(format, args...))
	}
	if p.Problem.Reason != "" {
		return no(p.Problem.Reason, "%s", p.Problem.Message)
	}
	if len(d.Rules) == 0 && len(d.Dropped) > 0 {
		return no(d.Dropped[0].Reason, "no rule is valid: %s", strings.ReplaceAll(droppedText(d.Dropped), "Dropped Rule", "rule"))
	}
	key := p.Ref.Namespace + "/" + p.Ref.Name
	s, ok := c.services[key]
	switch {
	case !ok:
		return no(ReasonNoMatchingParent, "there is no service %s", key)
	case s.Headless:
		return no(ReasonNoMatchingParent, "service %s is headless: its clients choose endpoints themselves, so nothing can route them", key)
	case p.Ref.SectionName == "" && p.Ref.Port == 0:
		r.Parents = append(r.Parents, assay.RouteParent{Service: key})
	default:
		i := slices.IndexFunc(s.Ports, func(port assay.Port) bool {
			return (p.Ref.Port == 0 || p.Ref.Port == port.Port) && (p.Ref.SectionName == "" || p.Ref.SectionName == port.Name)
		})
		if i < 0 {
			return no(ReasonNoMatchingParent, "service %s has no port %s", key, strings.TrimSpace(cmp.Or(portText(p.Ref.Port), "")+" "+p.Ref.SectionName))
		}
		if proto := s.Ports[i].Protocol; !d.Kind.Carries(proto) {
			return no(ReasonUnsupportedValue, "port %d of service %s is declared to speak %s, in which there %s", s.Ports[i].Port, key, proto, nothingFor(d.Kind))
		}
		r.Parents = append(r.Parents, assay.RouteParent{Service: key, Port: s.Ports[i].Port})
	}
	return d.condition(conditionAccepted, true, ReasonAccepted, "service "+key+" takes the route")
}

// nothingFor says what a kind of route does not find where it cannot be attached.
func nothingFor(k assay.RouteKind) string {
	if k == assay.TLSRoute {
		return "is no name of TLS to route by"
	}
	return "are no requests to route"
}

func portText(p uint16) string {
	if p == 0 {
		return ""
	}
	return fmt.Sprint(p)
}

func (c *Catalog) resolveMirrors(d *DeclaredRoute, rule int, list []assay.RouteMirror, bad func(int, string, string) string) []assay.RouteMirror {
	list = slices.Clone(list)
	for i := range list {
		if m := &list[i]; m.Invalid == "" {
			if reason, message := c.reference(d, m.Service, m.Port); reason != "" {
				m.Invalid = bad(rule, reason, "mirror: "+message)
			}
		}
	}
	return list
}

// reference says why a service cannot be a backend; no reason: it can.
func (c *Catalog) reference(d *DeclaredRoute, key string, port uint16) (reason, message string) {
	ns, name, _ := strings.Cut(key, "/")
	// A parent that takes the route needs no grant: the requests were on their way there.
	parent := slices.ContainsFunc(d.ParentRefs, func(p DeclaredParent) bool {
		return p.Problem.Reason == "" && p.Ref.Namespace == ns && p.Ref.Name == name
	})
	if ns != d.Namespace && !parent && !c.routes.granted(d.Kind, d.Namespace, ns, name) {
		return ReasonRefNotPermitted, fmt.Sprintf("no ReferenceGrant in namespace %s lets the kind %s of namespace %s refer to service %s", ns, d.Kind, d.Namespace, name)
	}
	s, ok := c.services[key]
	if !ok {
		return ReasonBackendNotFound, "there is no service " + key
	}
	i := slices.IndexFunc(s.Ports, func(p assay.Port) bool { return p.Port == port })
	if i < 0 {
		return ReasonBackendNotFound, fmt.Sprintf("service %s has no port %d", key, port)
	}
	if proto := s.Ports[i].Protocol; d.Kind != assay.TLSRoute && !d.Kind.Carries(proto) {
		return ReasonUnsupportedProtocol, fmt.Sprintf("port %d of service %s is declared to speak %s, which no request can be sent in", port, key, proto)
	} else if d.Kind == assay.TLSRoute && (proto == assay.HTTP1 || proto == assay.HTTP2) {
		return ReasonUnsupportedProtocol, fmt.Sprintf("port %d of service %s is declared to speak %s, which a client of TLS does not", port, key, proto)
	}
	return "", ""
}

func (rs *routes) granted(kind assay.RouteKind, from, ns, name string) bool {
	return slices.ContainsFunc(rs.grants, func(g ReferenceGrant) bool {
		return g.Namespace == ns && slices.Contains(g.From, GrantFrom{kind, from}) &&
			slices.ContainsFunc(g.To, func(to string) bool { return to == "" || to == name })
	})
}
