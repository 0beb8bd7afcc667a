package kube

import (
	"encoding/json"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	gateway "sigs.k8s.io/gateway-api/apis/v1"

	"assay.dev"
	"assay.dev/discovery"
)

// Kinds of the Gateway API. Its v1beta1 has the same types.
const (
	gatewayV1      = gateway.GroupName + "/v1"
	gatewayV1beta1 = gateway.GroupName + "/v1beta1"
)

var (
	httpRouteType      = reflect.TypeFor[gateway.HTTPRoute]()
	grpcRouteType      = reflect.TypeFor[gateway.GRPCRoute]()
	tlsRouteType       = reflect.TypeFor[gateway.TLSRoute]()
	referenceGrantType = reflect.TypeFor[gateway.ReferenceGrant]()
)

// httpRoute reads an HTTPRoute. What the API server would not take is a problem with a
// line; what it takes and a controller judges becomes a condition: discovery says it.
func (d *document) httpRoute() {
	var in struct {
		Spec gateway.HTTPRouteSpec `json:"spec"`
	}
	if err := json.Unmarshal(d.value, &in); err != nil {
		d.at("spec", "%v", err)
		return
	}
	r := d.newRoute(assay.HTTPRoute, &in.Spec.CommonRouteSpec)
	rules := in.Spec.Rules
	if len(rules) == 0 {
		rules = []gateway.HTTPRouteRule{{}} // as the API server fills it in
	}
	for i := range rules {
		r.httpRule(i, &rules[i])
	}
	r.finish(len(rules), in.Spec)
}

// grpcRoute reads a GRPCRoute.
func (d *document) grpcRoute() {
	var in struct {
		Spec gateway.GRPCRouteSpec `json:"spec"`
	}
	if err := json.Unmarshal(d.value, &in); err != nil {
		d.at("spec", "%v", err)
		return
	}
	r := d.newRoute(assay.GRPCRoute, &in.Spec.CommonRouteSpec)
	rules := in.Spec.Rules
	if len(rules) == 0 {
		rules = []gateway.GRPCRouteRule{{}}
	}
	for i := range rules {
		r.grpcRule(i, &rules[i])
	}
	r.finish(len(rules), in.Spec)
}

// routeReader makes a route of a document.
type routeReader struct {
	*document
	out     discovery.DeclaredRoute
	names   map[string]int // of rules
	matches int

	// Of the rule that is read.
	index    int
	path     string // of the rule in the document
	rejected bool
}

func (d *document) newRoute(kind assay.RouteKind, common *gateway.CommonRouteSpec) *routeReader {
	d.kind.apiVersion = gatewayV1
	r := &routeReader{document: d, names: map[string]int{}}
	r.out.Kind, r.out.Namespace, r.out.Name = kind, d.namespace, d.meta.Name
	if common.UseDefaultGateways != "" && common.UseDefaultGateways != gateway.GatewayDefaultScopeNone {
		d.at("spec.useDefaultGateways", "there are no gateways here; name a service in parentRefs")
	}
	if len(common.ParentRefs) == 0 {
		d.missing("spec.parentRefs", "a route without a parent takes no request; name a service")
	}
	if len(common.ParentRefs) > assay.MaxRouteParents {
		d.at("spec.parentRefs", "%d parents; %d are supported", len(common.ParentRefs), assay.MaxRouteParents)
		return r
	}
	for i, p := range common.ParentRefs {
		r.parent(fmt.Sprintf("spec.parentRefs[%d]", i), &p)
	}
	return r
}

func value[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// ParentRef is a reference to a parent with what it leaves out; namespace is the route's.
func ParentRef(namespace string, p *gateway.ParentReference) assay.RouteParentRef {
	ref := assay.RouteParentRef{
		Group: gateway.GroupName, Kind: "Gateway", Namespace: namespace,
		Name: string(p.Name), SectionName: string(value(p.SectionName)), Port: uint16(value(p.Port)),
	}
	if p.Group != nil {
		ref.Group = string(*p.Group)
	}
	if p.Kind != nil {
		ref.Kind = string(*p.Kind)
	}
	if p.Namespace != nil {
		ref.Namespace = string(*p.Namespace)
	}
	return ref
}

func (r *routeReader) parent(path string, p *gateway.ParentReference) {
	ref := ParentRef(r.namespace, p)
	if p.Port != nil && !validPort(*p.Port) {
		r.missing(path+".port", "want a number from 1 to 65535")
	}
	if ref.Name == "" {
		r.missing(path+".name", "a name is needed")
	}
	out := discovery.DeclaredParent{Ref: ref}
	switch {
	case ref.Group != "" && ref.Group != "core" || ref.Kind != "Service":
		out.Problem = discovery.RouteProblem{Reason: discovery.ReasonInvalidKind,
			Message: fmt.Sprintf("%s of group %q cannot be a parent here; a service is written as kind: Service with group: \"\"", ref.Kind, ref.Group)}
	case !assay.ValidName(ref.Namespace) || !assay.ValidName(ref.Name):
		out.Problem = discovery.RouteProblem{Reason: discovery.ReasonNoMatchingParent, Message: fmt.Sprintf("%s/%s cannot be a service's name", ref.Namespace, ref.Name)}
	case slices.ContainsFunc(r.out.ParentRefs, func(o discovery.DeclaredParent) bool { return o.Ref == ref }):
		r.at(path, "is there already")
	}
	r.out.ParentRefs = append(r.out.ParentRefs, out)
}

// finish adds the route to the intent.
func (r *routeReader) finish(rules int, spec any) {
	if rules > assay.MaxRouteRules {
		r.at("spec.rules", "%d rules; %d are supported", rules, assay.MaxRouteRules)
		return
	}
	if r.matches > assay.MaxRouteMatches {
		r.at("spec.rules", "%d matches in all; %d are supported", r.matches, assay.MaxRouteMatches)
		return
	}
	r.intent.Routes = append(r.intent.Routes, r.out)
	r.keep(spec)
}

// begin goes to rule i.
func (r *routeReader) begin(i int, name *gateway.SectionName) {
	r.index, r.path, r.rejected = i, fmt.Sprintf("spec.rules[%d]", i), false
	if name == nil {
		return
	}
	if first, twice := r.names[string(*name)]; twice {
		r.at(r.path+".name", "%q is already the name of spec.rules[%d]", *name, first)
	}
	r.names[string(*name)] = i
	if !assay.ValidRouteName(string(*name)) {
		r.at(r.path+".name", "%q may hold a-z, 0-9, '-' and '.'", *name)
	}
}

// reject leaves the rule out, for the first reason that there is.
func (r *routeReader) reject(reason, format string, args ...any) {
	if !r.rejected {
		r.rejected = true
		r.out.Dropped = append(r.out.Dropped, discovery.RouteProblem{Rule: r.index, Reason: reason, Message: fmt.Sprintf(format, args...)})
	}
}

func (r *routeReader) unsupported(format string, args ...any) {
	r.reject(discovery.ReasonUnsupportedValue, format, args...)
}

// unresolved notes a reference that cannot be followed, and returns it as text.
func (r *routeReader) unresolved(reason, format string, args ...any) string {
	p := discovery.RouteProblem{Rule: r.index, Reason: reason, Message: fmt.Sprintf(format, args...)}
	r.out.Unresolved = append(r.out.Unresolved, p)
	return reason + ": " + p.Message
}

// add takes the rule in unless something is wrong with it.
func (r *routeReader) add(rule *assay.RouteRule) {
	if r.rejected {
		return
	}
	one := assay.Route{Kind: r.out.Kind, Namespace: r.namespace, Name: r.meta.Name, Hostnames: r.out.Hostnames, Rules: []assay.RouteRule{*rule}}
	err := one.Validate()
	if err != nil && one.Kind != assay.TLSRoute {
		err = rule.Validate() // which does not call it the first rule
	}
	if err != nil {
		if r.clean() {
			r.unsupported("%v", err)
		}
		return
	}
	r.matches += len(rule.Matches)
	r.out.Rules = append(r.out.Rules, *rule)
}

// clean reports whether nothing was reported for the rule with a line: what is wrong
// with it then has been said.
func (r *routeReader) clean() bool {
	from := r.line(r.path)
	return !slices.ContainsFunc(r.translation.problems, func(p Problem) bool { return p.File == r.tree.file && p.Line >= from })
}

func (r *routeReader) httpRule(i int, in *gateway.HTTPRouteRule) {
	r.begin(i, in.Name)
	rule := &assay.RouteRule{Name: string(value(in.Name))}
	if len(in.Matches) == 0 {
		rule.Matches = []assay.RouteMatch{{Path: assay.PathMatch{Type: assay.PathPrefix, Value: "/"}}}
	}
	for _, m := range in.Matches {
		rule.Matches = append(rule.Matches, r.httpMatch(&m))
	}
	r.filters(r.path, in.Filters, rule)
	if rule.Redirect != nil && len(in.BackendRefs) > 0 {
		r.reject(discovery.ReasonIncompatibleFilters, "RequestRedirect answers every request, so backendRefs get none")
	}
	for j := range in.BackendRefs {
		b := &in.BackendRefs[j]
		r.backend(fmt.Sprintf("%s.backendRefs[%d]", r.path, j), &b.BackendRef, b.Filters, rule)
	}
	if t := in.Timeouts; t != nil {
		rule.Timeouts = assay.RouteTimeouts{Request: r.duration("timeouts.request", t.Request), Backend: r.duration("timeouts.backendRequest", t.BackendRequest)}
		if q, b := rule.Timeouts.Request, rule.Timeouts.Backend; q != nil && b != nil && *q != 0 && *b > *q {
			r.unsupported("timeouts.backendRequest is longer than timeouts.request, which holds it")
		}
	}
	if t := in.Retry; t != nil {
		out := &assay.RouteRetry{Attempts: t.Attempts, Backoff: r.duration("retry.backoff", t.Backoff)}
		for _, c := range t.Codes {
			if c < 400 || c > 599 {
				r.unsupported("retry.codes: %d is not a status from 400 to 599", c)
			}
			out.Codes = append(out.Codes, int(c))
		}
		if t.Attempts != nil && (*t.Attempts < 1 || *t.Attempts > 100) {
			r.unsupported("retry.attempts: want 1 to 100")
		}
		rule.Retry = out
	}
	rule.Session = r.session(in.SessionPersistence)
	r.add(rule)
}

func (r *routeReader) grpcRule(i int, in *gateway.GRPCRouteRule) {
	r.begin(i, in.Name)
	rule := &assay.RouteRule{Name: string(value(in.Name))}
	if len(in.Matches) == 0 {
		rule.Matches = []assay.RouteMatch{{Path: assay.PathMatch{Type: assay.PathPrefix, Value: "/"}}}
	}
	for _, m := range in.Matches {
		rule.Matches = append(rule.Matches, r.grpcMatch(&m))
	}
	r.filters(r.path, grpcFilters(in.Filters), rule)
	for j := range in.BackendRefs {
		b := &in.BackendRefs[j]
		r.backend(fmt.Sprintf("%s.backendRefs[%d]", r.path, j), &b.BackendRef, grpcFilters(b.Filters), rule)
	}
	rule.Session = r.session(in.SessionPersistence)
	r.add(rule)
}

// grpcFilters are those of HTTP that a GRPCRoute may have.
func grpcFilters(in []gateway.GRPCRouteFilter) []gateway.HTTPRouteFilter {
	var out []gateway.HTTPRouteFilter
	for _, f := range in {
		kind := gateway.HTTPRouteFilterType(f.Type)
		switch f.Type {
		case gateway.GRPCRouteFilterRequestHeaderModifier, gateway.GRPCRouteFilterResponseHeaderModifier, gateway.GRPCRouteFilterRequestMirror, gateway.GRPCRouteFilterExtensionRef, "":
		default:
			kind += " of a GRPCRoute"
		}
		out = append(out, gateway.HTTPRouteFilter{Type: kind, RequestHeaderModifier: f.RequestHeaderModifier,
			ResponseHeaderModifier: f.ResponseHeaderModifier, RequestMirror: f.RequestMirror, ExtensionRef: f.ExtensionRef})
	}
	return out
}

var gatewayPath = regexp.MustCompile(`^(?:[-A-Za-z0-9/._~!$&'()*+,;=:@]|[%][0-9a-fA-F]{2})+$`)

func (r *routeReader) httpMatch(m *gateway.HTTPRouteMatch) assay.RouteMatch {
	out := assay.RouteMatch{Path: assay.PathMatch{Type: assay.PathPrefix, Value: "/"}, Method: string(value(m.Method))}
	if p := m.Path; p != nil {
		if p.Type != nil {
			out.Path.Type = assay.PathMatchType(*p.Type)
		}
		if p.Value != nil {
			out.Path.Value = *p.Value
		}
		r.checkPath(out.Path)
	}
	switch value(m.Method) {
	case "", gateway.HTTPMethodGet, gateway.HTTPMethodHead, gateway.HTTPMethodPost, gateway.HTTPMethodPut, gateway.HTTPMethodDelete,
		gateway.HTTPMethodConnect, gateway.HTTPMethodOptions, gateway.HTTPMethodTrace, gateway.HTTPMethodPatch:
	default:
		r.unsupported("method %q is not one that a route can take", *m.Method)
	}
	for _, h := range m.Headers {
		out.Headers = r.valueMatch("header", strings.ToLower(string(h.Name)), h.Value, string(value(h.Type)), out.Headers)
	}
	for _, q := range m.QueryParams {
		out.Query = r.valueMatch("query parameter", string(q.Name), q.Value, string(value(q.Type)), out.Query)
	}
	return out
}

func (r *routeReader) checkPath(p assay.PathMatch) {
	switch p.Type {
	case assay.PathRegex:
		r.checkRegex("path", p.Value)
		return
	case assay.PathExact, assay.PathPrefix:
	default:
		r.unsupported("path.type %q is none of Exact, PathPrefix, RegularExpression", p.Type)
		return
	}
	v, lower := p.Value, strings.ToLower(p.Value)
	switch {
	case !strings.HasPrefix(v, "/"):
		r.unsupported("path %q does not begin with '/'", v)
	case len(v) > 1024 || !gatewayPath.MatchString(v):
		r.unsupported("path %q has a character that no path has, or over 1024 of them", v)
	case strings.Contains(v, "//"), strings.Contains(v, "/./"), strings.Contains(v, "/../"), strings.HasSuffix(v, "/."), strings.HasSuffix(v, "/.."), strings.Contains(lower, "%2f"):
		r.unsupported("path %q can be written in another way: '//', '/.', '/..' and %%2F are not allowed", v)
	}
}

func (r *routeReader) checkRegex(what, pattern string) {
	if _, err := assay.CompileRegex(pattern); err != nil {
		r.unsupported("%s: %v", what, err)
	}
}

// valueMatch adds a condition; of several for one name the first counts.
func (r *routeReader) valueMatch(what, name, text, kind string, list []assay.ValueMatch) []assay.ValueMatch {
	if !assay.ValidToken(name) {
		r.at(r.path+".matches", "%q cannot be the name of a %s", name, what)
		return list
	}
	if slices.ContainsFunc(list, func(v assay.ValueMatch) bool { return v.Name == name }) {
		return list
	}
	v := assay.ValueMatch{Name: name, Value: text}
	switch kind {
	case "", string(gateway.HeaderMatchExact):
	case string(gateway.HeaderMatchRegularExpression):
		v.Regex = true
		r.checkRegex(what+" "+name, text)
	default:
		r.unsupported("%s %s: type %q is neither Exact nor RegularExpression", what, name, kind)
	}
	return append(list, v)
}

var (
	grpcService = regexp.MustCompile(`^(?i)\.?[a-z_][a-z_0-9]*(\.[a-z_][a-z_0-9]*)*$`)
	grpcMethod  = regexp.MustCompile(`^[A-Za-z_][A-Za-z_0-9]*$`)
)

func (r *routeReader) grpcMatch(m *gateway.GRPCRouteMatch) assay.RouteMatch {
	out := assay.RouteMatch{Path: assay.PathMatch{Type: assay.PathPrefix, Value: "/"}}
	for _, h := range m.Headers {
		out.Headers = r.valueMatch("header", strings.ToLower(string(h.Name)), h.Value, string(value(h.Type)), out.Headers)
	}
	if m.Method == nil {
		return out
	}
	service, method := value(m.Method.Service), value(m.Method.Method)
	if service == "" && method == "" {
		r.unsupported("method: want a service, a method or both")
		return out
	}
	switch value(m.Method.Type) {
	case "", gateway.GRPCMethodMatchExact:
		if service != "" && !grpcService.MatchString(service) || method != "" && !grpcMethod.MatchString(method) {
			r.unsupported("method: %q and %q are not a service and a method of gRPC", service, method)
		}
		switch {
		case method == "":
			out.Path.Value = "/" + service
		case service == "":
			out.Path = assay.PathMatch{Type: assay.GRPCMethod, Value: method}
		default:
			out.Path = assay.PathMatch{Type: assay.PathExact, Value: "/" + service + "/" + method}
		}
	case gateway.GRPCMethodMatchRegularExpression:
		for _, part := range []string{service, method} {
			if part != "" {
				r.checkRegex("method", part)
			}
		}
		switch {
		case service == "":
			out.Path = assay.PathMatch{Type: assay.GRPCMethodRegex, Value: method}
		case method == "":
			out.Path = assay.PathMatch{Type: assay.PathRegex, Value: "/(?:" + service + ")/[^/]+"}
		default:
			out.Path = assay.PathMatch{Type: assay.PathRegex, Value: "/(?:" + service + ")/(?:" + method + ")"}
		}
	default:
		r.unsupported("method.type %q is neither Exact nor RegularExpression", *m.Method.Type)
	}
	return out
}

var gatewayDuration = regexp.MustCompile(`^([0-9]{1,5}(h|m|s|ms)){1,4}$`)

// duration reads one as GEP-2257 has them.
func (r *routeReader) duration(field string, in *gateway.Duration) *time.Duration {
	if in == nil {
		return nil
	}
	d, err := time.ParseDuration(string(*in))
	if err != nil || !gatewayDuration.MatchString(string(*in)) {
		r.unsupported("%s: %q is not a duration such as 10s or 1m30s", field, *in)
		return nil
	}
	return &d
}

func (r *routeReader) session(in *gateway.SessionPersistence) *assay.RouteSession {
	if in == nil {
		return nil
	}
	out := &assay.RouteSession{Name: value(in.SessionName), Lifetime: value(r.duration("sessionPersistence.absoluteTimeout", in.AbsoluteTimeout))}
	switch value(in.Type) {
	case "", gateway.CookieBasedSessionPersistence:
	case gateway.HeaderBasedSessionPersistence:
		out.Header = true
	default:
		r.unsupported("sessionPersistence.type %q is neither Cookie nor Header", *in.Type)
	}
	if out.Name != "" && (!assay.ValidToken(out.Name) || assay.FramingField(out.Name) && out.Header) {
		r.unsupported("sessionPersistence.sessionName: %q cannot be the name of a cookie or a header", out.Name)
	}
	if c := in.CookieConfig; c != nil {
		switch value(c.LifetimeType) {
		case "", gateway.SessionCookieLifetimeType:
		case gateway.PermanentCookieLifetimeType:
			out.Permanent = true
			if out.Lifetime == 0 {
				r.unsupported("sessionPersistence.absoluteTimeout is needed: it is the lifetime of a permanent cookie")
			}
		default:
			r.unsupported("sessionPersistence.cookieConfig.lifetimeType %q is neither Session nor Permanent", *c.LifetimeType)
		}
		if out.Header {
			r.unsupported("sessionPersistence.cookieConfig: the session is kept in a header")
		}
	}
	return out
}

// backend adds one to the rule.
func (r *routeReader) backend(path string, in *gateway.BackendRef, filters []gateway.HTTPRouteFilter, rule *assay.RouteRule) {
	out := assay.RouteBackend{Weight: 1}
	if in.Weight != nil {
		if *in.Weight < 0 || *in.Weight > 1_000_000 {
			r.at(path+".weight", "want 0 to 1000000")
			return
		}
		out.Weight = uint32(*in.Weight)
	}
	out.Service, out.Port, out.Invalid = r.reference(path, &in.BackendObjectReference)
	edits := assay.RouteRule{Matches: rule.Matches}
	r.filters(path, filters, &edits)
	switch {
	case edits.Redirect != nil:
		r.unsupported("RequestRedirect of one backend is not supported; give it a rule of its own")
	case edits.CORS != nil:
		r.unsupported("CORS of one backend is not supported; give it to the rule")
	}
	if out.Invalid == "" {
		out.Invalid = edits.Refuse
	}
	out.RouteEdits = edits.RouteEdits
	rule.Backends = append(rule.Backends, out)
}

// reference reads a backend's object.
func (r *routeReader) reference(path string, in *gateway.BackendObjectReference) (service string, port uint16, invalid string) {
	group, kind, ns := string(value(in.Group)), "Service", r.namespace
	if in.Kind != nil {
		kind = string(*in.Kind)
	}
	if in.Namespace != nil {
		ns = string(*in.Namespace)
	}
	if in.Name == "" {
		r.missing(path+".name", "a name is needed")
	}
	if group != "" && group != "core" || kind != "Service" {
		return "", 0, r.unresolved(discovery.ReasonInvalidKind, "%s %s of group %q: only a Service can be a backend", kind, in.Name, group)
	}
	if in.Port == nil || !validPort(*in.Port) {
		r.missing(path+".port", "a port from 1 to 65535 is needed to refer to a service")
		return "", 0, "no port"
	}
	if !assay.ValidName(ns) || !assay.ValidName(string(in.Name)) {
		return "", 0, r.unresolved(discovery.ReasonBackendNotFound, "there is no service %s/%s", ns, in.Name)
	}
	return ns + "/" + string(in.Name), uint16(*in.Port), ""
}

// referenceGrant reads a ReferenceGrant.
func (d *document) referenceGrant() {
	var in struct {
		Spec gateway.ReferenceGrantSpec `json:"spec"`
	}
	if err := json.Unmarshal(d.value, &in); err != nil {
		d.at("spec", "%v", err)
		return
	}
	d.kind.apiVersion = gatewayV1
	out := discovery.ReferenceGrant{Namespace: d.namespace, Name: d.meta.Name}
	if len(in.Spec.From) == 0 {
		d.missing("spec.from", "say whose references are permitted")
	}
	if len(in.Spec.To) == 0 {
		d.missing("spec.to", "say to what references are permitted")
	}
	// What is about other kinds than ours is somebody else's, and permits nothing here.
	for _, f := range in.Spec.From {
		if k := assay.RouteKind(f.Kind); f.Group == gateway.GroupName && (k == assay.HTTPRoute || k == assay.GRPCRoute || k == assay.TLSRoute) {
			out.From = append(out.From, discovery.GrantFrom{Kind: k, Namespace: string(f.Namespace)})
		}
	}
	for _, t := range in.Spec.To {
		if (t.Group == "" || t.Group == "core") && t.Kind == "Service" {
			out.To = append(out.To, string(value(t.Name)))
		}
	}
	d.intent.Grants = append(d.intent.Grants, out)
	d.keep(in.Spec)
}
