package assay

import (
	"cmp"
	"errors"
	"fmt"
	"regexp/syntax"
	"strconv"
	"strings"
	"time"
)

// RouteKind is the Gateway API kind that a route was written as.
type RouteKind string

const (
	HTTPRoute RouteKind = "HTTPRoute"
	GRPCRoute RouteKind = "GRPCRoute" // its rules take gRPC requests alone
	TLSRoute  RouteKind = "TLSRoute"  // its one rule takes connections of TLS, which stay closed
)

// Carries reports whether a route of this kind can be attached to a port that is
// declared to speak a protocol.
func (k RouteKind) Carries(p Protocol) bool {
	if k == TLSRoute {
		return p == Detect || p == TLS
	}
	return p != TLS && p != Opaque
}

// Route is rules for the requests to services: which requests they take, what they
// change of them, and where those go. In a snapshot everything about it has been
// decided: its parents are those that took it, and its backends either exist or say
// why not.
type Route struct {
	Kind      RouteKind     `json:"kind"`
	Namespace string        `json:"namespace"`
	Name      string        `json:"name"`
	Created   time.Time     `json:"created,omitzero"` // of two rules that fit a request equally the older counts
	Parents   []RouteParent `json:"parents"`
	// Hostnames are the names that a client may ask for of a TLSRoute: in lower case, and
	// "*." stands for one label or more. Other routes have none.
	Hostnames []string    `json:"hostnames,omitempty"`
	Rules     []RouteRule `json:"rules"`
}

// Key returns "KIND/NAMESPACE/NAME".
func (r *Route) Key() string { return string(r.Kind) + "/" + r.Namespace + "/" + r.Name }

// Producer reports whether the route is the service's own, for all its clients.
// Others are a consumer's: they are for clients in the route's own namespace, and
// replace the service's own there.
func (r *Route) Producer(p RouteParent) bool {
	ns, _, _ := strings.Cut(p.Service, "/")
	return ns == r.Namespace
}

// RouteParent is a service whose requests a route takes.
type RouteParent struct {
	Service string `json:"service"`        // Service.Key
	Port    uint16 `json:"port,omitempty"` // 0: all of its ports
}

// RouteRule says what becomes of requests that one of its matches takes.
type RouteRule struct {
	Name    string       `json:"name,omitempty"`
	Matches []RouteMatch `json:"matches"` // at least one; of a TLSRoute none
	RouteEdits
	Redirect *Redirect `json:"redirect,omitempty"` // answers the request: there are no backends
	CORS     *CORS     `json:"cors,omitempty"`
	// Backends share the requests by weight. Without any they go to the parent itself.
	Backends []RouteBackend `json:"backends,omitempty"`
	Timeouts RouteTimeouts  `json:"timeouts,omitzero"`
	Retry    *RouteRetry    `json:"retry,omitempty"`
	Session  *RouteSession  `json:"session,omitempty"`
	// Refuse is why the rule cannot do what it should, "" when it can. Its requests are
	// answered 500: what a filter should have seen must not pass without it.
	Refuse string `json:"refuse,omitempty"`
}

// RouteMatch is conditions that a request meets all of.
type RouteMatch struct {
	Path    PathMatch    `json:"path"`
	Method  string       `json:"method,omitempty"` // "" is any
	Headers []ValueMatch `json:"headers,omitempty"`
	Query   []ValueMatch `json:"query,omitempty"`
}

// PathMatchType is how a path is compared.
type PathMatchType string

const (
	PathExact  PathMatchType = "Exact"
	PathPrefix PathMatchType = "PathPrefix"        // by whole elements; a '/' at its end is ignored
	PathRegex  PathMatchType = "RegularExpression" // RE2, the whole path
	// GRPCMethod and GRPCMethodRegex take /SERVICE/METHOD of any service.
	GRPCMethod      PathMatchType = "Method"
	GRPCMethodRegex PathMatchType = "MethodRegularExpression"
)

// PathMatch is a condition for the path of a request, without its query.
type PathMatch struct {
	Type  PathMatchType `json:"type"`
	Value string        `json:"value"`
}

// ValueMatch is a condition for a field of the head or a parameter of the query.
type ValueMatch struct {
	Name  string `json:"name"` // of a field: in lower case
	Value string `json:"value"`
	Regex bool   `json:"regex,omitempty"` // RE2, the whole value
}

// RouteEdits is what changes of a request and its response.
type RouteEdits struct {
	Request  HeaderEdit    `json:"request,omitzero"`
	Response HeaderEdit    `json:"response,omitzero"`
	Host     string        `json:"host,omitempty"` // replaces the authority
	Path     *PathEdit     `json:"path,omitempty"`
	Mirrors  []RouteMirror `json:"mirrors,omitempty"`
}

// IsZero reports whether nothing changes.
func (e *RouteEdits) IsZero() bool {
	return e.Request.IsZero() && e.Response.IsZero() && e.Host == "" && e.Path == nil && len(e.Mirrors) == 0
}

// HeaderEdit changes fields of a head: Remove first, then Set, then Add.
type HeaderEdit struct {
	Set    []HeaderField `json:"set,omitempty"`
	Add    []HeaderField `json:"add,omitempty"`
	Remove []string      `json:"remove,omitempty"` // in lower case
}

// IsZero reports whether nothing changes.
func (e HeaderEdit) IsZero() bool { return len(e.Set)+len(e.Add)+len(e.Remove) == 0 }

// HeaderField is one field as it is written.
type HeaderField struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// PathEdit replaces the whole path, or the prefix that the rule's one match names.
// The query stays.
type PathEdit struct {
	Full  string `json:"full,omitempty"` // "" replaces the prefix
	Match string `json:"match,omitempty"`
	With  string `json:"with,omitempty"`
}

// Redirect answers a request with another address.
type Redirect struct {
	Scheme string    `json:"scheme,omitempty"` // "": that of the request
	Host   string    `json:"host,omitempty"`   // without a port; "": that of the request
	Path   *PathEdit `json:"path,omitempty"`
	Port   uint16    `json:"port,omitempty"` // 0: the scheme's own if there is one, else the parent's
	Status int       `json:"status"`
}

// CORS answers preflight requests and says in responses who may read them
// (https://fetch.spec.whatwg.org/#http-cors-protocol).
type CORS struct {
	Origins       []string `json:"origins,omitempty"` // '*' stands for any text in a host
	Credentials   bool     `json:"credentials,omitempty"`
	Methods       []string `json:"methods,omitempty"`
	Headers       []string `json:"headers,omitempty"`
	ExposeHeaders []string `json:"exposeHeaders,omitempty"`
	MaxAge        int32    `json:"maxAge"` // seconds
}

// RouteBackend is one place that requests go to.
type RouteBackend struct {
	Service string `json:"service"` // Service.Key
	Port    uint16 `json:"port"`
	Weight  uint32 `json:"weight"` // its share of the sum of all
	RouteEdits
	// Invalid is why it cannot be used, "" when it can. Its share is answered 500.
	Invalid string `json:"invalid,omitempty"`
}

// RouteMirror is where a copy of a share of the requests goes.
type RouteMirror struct {
	Service     string `json:"service"`
	Port        uint16 `json:"port"`
	Numerator   uint32 `json:"numerator"`
	Denominator uint32 `json:"denominator"`
	Invalid     string `json:"invalid,omitempty"` // it is left out
}

// RouteTimeouts bound a request. Nil is not said; zero is no bound.
type RouteTimeouts struct {
	Request *time.Duration `json:"request,omitempty"` // with all attempts
	Backend *time.Duration `json:"backend,omitempty"` // one attempt
}

// RouteRetry says when a request is sent again.
type RouteRetry struct {
	Codes    []int          `json:"codes,omitempty"`    // statuses
	Attempts *int           `json:"attempts,omitempty"` // besides the first one
	Backoff  *time.Duration `json:"backoff,omitempty"`  // least time between two
}

// RouteSession keeps a client's requests at one endpoint.
type RouteSession struct {
	Name     string        `json:"name,omitempty"` // of the cookie or the field; "": one of the mesh's own
	Header   bool          `json:"header,omitempty"`
	Lifetime time.Duration `json:"lifetime,omitempty"` // 0: for as long as the client keeps it
	// Permanent has the client keep a cookie for Lifetime, beyond its own session.
	Permanent bool `json:"permanent,omitempty"`
}

// RouteCondition is one fact about a route, with the names of the Gateway API.
type RouteCondition struct {
	Type               string    `json:"type"`
	Status             string    `json:"status"` // "True" or "False"
	ObservedGeneration int64     `json:"observedGeneration"`
	LastTransitionTime time.Time `json:"lastTransitionTime"`
	Reason             string    `json:"reason"`
	Message            string    `json:"message"`
}

// RouteParentStatus is what became of a route at one of the parents that it names.
type RouteParentStatus struct {
	ParentRef      RouteParentRef   `json:"parentRef"`
	ControllerName string           `json:"controllerName"`
	Conditions     []RouteCondition `json:"conditions"`
}

// RouteParentRef is a parent as the route names it.
type RouteParentRef struct {
	Group       string `json:"group"`
	Kind        string `json:"kind"`
	Namespace   string `json:"namespace,omitempty"`
	Name        string `json:"name"`
	SectionName string `json:"sectionName,omitempty"`
	Port        uint16 `json:"port,omitempty"`
}

func (r RouteParentRef) String() string {
	s := cmp.Or(r.Kind, "Service") + " "
	if r.Namespace != "" {
		s += r.Namespace + "/"
	}
	s += r.Name
	if r.Port != 0 {
		s += fmt.Sprintf(":%d", r.Port)
	}
	if r.SectionName != "" {
		s += " " + r.SectionName
	}
	return s
}

// Bounds of a route, those of the Gateway API where it has one.
const (
	MaxRouteRules     = 16
	MaxRouteMatches   = 128 // of all rules together
	MaxRouteParents   = 32
	MaxRouteHostnames = 1024
	MaxRoutePattern   = 1024 // bytes of a regular expression
	maxRouteValue     = 4096
	maxRouteList      = 64
	maxRegexSize      = 5000 // instructions
	maxWeight         = 1_000_000
)

// CompileRegex checks a regular expression of a route: RE2's syntax, of bounded
// size. It returns the expression that takes a whole value.
func CompileRegex(pattern string) (string, error) {
	if pattern == "" || len(pattern) > MaxRoutePattern {
		return "", fmt.Errorf("a regular expression has 1 to %d bytes, this has %d", MaxRoutePattern, len(pattern))
	}
	re, err := syntax.Parse(pattern, syntax.Perl)
	if err != nil {
		return "", err
	}
	prog, err := syntax.Compile(re.Simplify())
	if err != nil {
		return "", err
	}
	if len(prog.Inst) > maxRegexSize {
		return "", fmt.Errorf("the regular expression compiles to %d steps, %d are the most", len(prog.Inst), maxRegexSize)
	}
	return "^(?:" + pattern + ")$", nil
}

// Validate reports the first thing in the route that no proxy could follow.
func (r *Route) Validate() error {
	if err := r.validate(); err != nil {
		return fmt.Errorf("%s %s/%s: %w", r.Kind, r.Namespace, r.Name, err)
	}
	return nil
}

func (r *Route) validate() error {
	if r.Kind != HTTPRoute && r.Kind != GRPCRoute && r.Kind != TLSRoute {
		return errors.New("neither HTTPRoute nor GRPCRoute nor TLSRoute")
	}
	if !ValidName(r.Namespace) || !ValidRouteName(r.Name) {
		return errors.New("namespace or name is not one")
	}
	if len(r.Rules) > MaxRouteRules || len(r.Parents) > MaxRouteParents {
		return fmt.Errorf("%d rules and %d parents, at most %d and %d", len(r.Rules), len(r.Parents), MaxRouteRules, MaxRouteParents)
	}
	for _, p := range r.Parents {
		if !validKey(p.Service) {
			return fmt.Errorf("parent %q is not a service", p.Service)
		}
	}
	if r.Kind == TLSRoute {
		return r.validateTLS()
	}
	if len(r.Hostnames) > 0 {
		return errors.New("hostnames are a TLSRoute's")
	}
	matches := 0
	for i := range r.Rules {
		if err := r.Rules[i].Validate(); err != nil {
			return fmt.Errorf("rule %d: %w", i, err)
		}
		matches += len(r.Rules[i].Matches)
	}
	if matches > MaxRouteMatches {
		return fmt.Errorf("%d matches, at most %d", matches, MaxRouteMatches)
	}
	return nil
}

// validateTLS is for what cannot be seen of TLS that stays closed.
func (r *Route) validateTLS() error {
	if len(r.Hostnames) == 0 || len(r.Hostnames) > MaxRouteHostnames {
		return fmt.Errorf("%d hostnames, want 1 to %d", len(r.Hostnames), MaxRouteHostnames)
	}
	for _, h := range r.Hostnames {
		if !ValidRouteHostname(h) {
			return fmt.Errorf("hostname %q", h)
		}
	}
	if len(r.Rules) > 1 {
		return fmt.Errorf("%d rules, and nothing to tell their connections apart", len(r.Rules))
	}
	for i := range r.Rules {
		rule := &r.Rules[i]
		if len(rule.Backends) == 0 || len(rule.Backends) > maxRouteList {
			return fmt.Errorf("rule %d: %d backends", i, len(rule.Backends))
		}
		if len(rule.Matches) > 0 || !rule.RouteEdits.IsZero() || rule.Redirect != nil || rule.CORS != nil || rule.Session != nil ||
			rule.Retry != nil || rule.Timeouts != (RouteTimeouts{}) || rule.Refuse != "" {
			return fmt.Errorf("rule %d has what is for requests", i)
		}
		for j := range rule.Backends {
			if err := rule.Backends[j].validate(); err != nil {
				return fmt.Errorf("rule %d: backend %d: %w", i, j, err)
			}
			if !rule.Backends[j].RouteEdits.IsZero() {
				return fmt.Errorf("rule %d: backend %d changes requests", i, j)
			}
		}
	}
	return nil
}

// ValidRouteHostname reports whether s is a name of DNS in lower case, or one of which
// the first label is "*".
func ValidRouteHostname(s string) bool {
	s = strings.TrimPrefix(s, "*.")
	return ValidDNSName(s) && strings.ToLower(s) == s && !strings.HasSuffix(s, ".") && !strings.Contains(s, "*")
}

// ValidRouteName reports whether s can be a route's name: an RFC 1123 subdomain.
func ValidRouteName(s string) bool {
	if len(s) > 253 {
		return false
	}
	for part := range strings.SplitSeq(s, ".") {
		if !ValidName(part) {
			return false
		}
	}
	return true
}

func validKey(key string) bool {
	ns, name, ok := strings.Cut(key, "/")
	return ok && ValidName(ns) && ValidName(name)
}

// Validate reports the first thing in a rule for requests that no proxy could follow.
func (r *RouteRule) Validate() error {
	if len(r.Matches) == 0 {
		return errors.New("no match")
	}
	for i := range r.Matches {
		if err := r.Matches[i].validate(); err != nil {
			return fmt.Errorf("match %d: %w", i, err)
		}
	}
	if err := r.RouteEdits.validate(); err != nil {
		return err
	}
	if len(r.Backends) > maxRouteList {
		return fmt.Errorf("%d backends", len(r.Backends))
	}
	for i := range r.Backends {
		if err := r.Backends[i].validate(); err != nil {
			return fmt.Errorf("backend %d: %w", i, err)
		}
	}
	if d := r.Redirect; d != nil {
		if d.Status < 300 || d.Status > 399 || !validHost(d.Host) || strings.Contains(d.Host, ":") || d.Scheme != "" && d.Scheme != "http" && d.Scheme != "https" || !validPathEdit(d.Path) {
			return errors.New("redirect: not one that can be answered")
		}
		if len(r.Backends) > 0 {
			return errors.New("redirect: there are backends")
		}
	}
	if c := r.CORS; c != nil {
		for _, list := range [][]string{c.Origins, c.Methods, c.Headers, c.ExposeHeaders} {
			if len(list) > maxRouteList {
				return errors.New("cors: a list is too long")
			}
			for _, s := range list {
				if !validText(s) || s == "" {
					return fmt.Errorf("cors: %q", s)
				}
			}
		}
	}
	for _, d := range []*time.Duration{r.Timeouts.Request, r.Timeouts.Backend} {
		if d != nil && *d < 0 {
			return errors.New("a negative timeout")
		}
	}
	if t := r.Retry; t != nil && (len(t.Codes) > maxRouteList || t.Attempts != nil && *t.Attempts < 0 || t.Backoff != nil && *t.Backoff < 0) {
		return errors.New("retry: negative, or too many codes")
	}
	if s := r.Session; s != nil && (s.Name != "" && !ValidToken(s.Name) || len(s.Name) > 128 || s.Lifetime < 0) {
		return fmt.Errorf("session: %q cannot be its name", s.Name)
	}
	return nil
}

func (b *RouteBackend) validate() error {
	if b.Invalid == "" && (!validKey(b.Service) || b.Port == 0) || b.Weight > maxWeight {
		return fmt.Errorf("%q port %d weight %d", b.Service, b.Port, b.Weight)
	}
	return b.RouteEdits.validate()
}

func (m *RouteMatch) validate() error {
	p := m.Path
	switch p.Type {
	case PathExact, PathPrefix:
		if !strings.HasPrefix(p.Value, "/") || len(p.Value) > maxRouteValue {
			return fmt.Errorf("path %q does not begin with '/'", p.Value)
		}
	case PathRegex, GRPCMethodRegex:
		if _, err := CompileRegex(p.Value); err != nil {
			return fmt.Errorf("path: %w", err)
		}
	case GRPCMethod:
		if p.Value == "" || strings.Contains(p.Value, "/") {
			return fmt.Errorf("method %q", p.Value)
		}
	default:
		return fmt.Errorf("path: type %q", p.Type)
	}
	if m.Method != "" && !ValidToken(m.Method) {
		return fmt.Errorf("method %q", m.Method)
	}
	if len(m.Headers) > maxRouteList || len(m.Query) > maxRouteList {
		return errors.New("too many conditions")
	}
	for i, list := range [][]ValueMatch{m.Headers, m.Query} {
		for _, v := range list {
			if v.Name == "" || len(v.Name) > 256 || len(v.Value) > maxRouteValue || i == 0 && (!ValidToken(v.Name) || strings.ToLower(v.Name) != v.Name) {
				return fmt.Errorf("condition for %q", v.Name)
			}
			if v.Regex {
				if _, err := CompileRegex(v.Value); err != nil {
					return fmt.Errorf("condition for %s: %w", v.Name, err)
				}
			}
		}
	}
	return nil
}

func (e *RouteEdits) validate() error {
	for _, h := range []*HeaderEdit{&e.Request, &e.Response} {
		if len(h.Set) > maxRouteList || len(h.Add) > maxRouteList || len(h.Remove) > maxRouteList {
			return errors.New("too many fields are changed")
		}
		for _, list := range [][]HeaderField{h.Set, h.Add} {
			for _, f := range list {
				if !ValidToken(f.Name) || !validText(f.Value) || FramingField(f.Name) {
					return fmt.Errorf("field %q cannot be set to %q", f.Name, f.Value)
				}
			}
		}
		for _, name := range h.Remove {
			if !ValidToken(name) || FramingField(name) || strings.ToLower(name) != name {
				return fmt.Errorf("field %q cannot be removed", name)
			}
		}
	}
	if !validHost(e.Host) {
		return fmt.Errorf("host %q", e.Host)
	}
	if !validPathEdit(e.Path) {
		return errors.New("a path that cannot be written")
	}
	if len(e.Mirrors) > maxRouteList {
		return errors.New("too many mirrors")
	}
	for _, m := range e.Mirrors {
		if m.Denominator == 0 || m.Numerator > m.Denominator || m.Invalid == "" && (!validKey(m.Service) || m.Port == 0) {
			return fmt.Errorf("mirror %q port %d, %d of %d", m.Service, m.Port, m.Numerator, m.Denominator)
		}
	}
	return nil
}

func validPathEdit(p *PathEdit) bool {
	if p == nil {
		return true
	}
	ok := func(s string) bool {
		for i := range len(s) {
			if c := s[i]; !pathByte(c) && (c != '%' || !validEscape(s[i:])) {
				return false
			}
		}
		// What begins with "//" some readers take for a host.
		return len(s) <= maxRouteValue && !strings.HasPrefix(s, "//")
	}
	return ok(p.Full) && ok(p.With) && ok(p.Match) && (p.Full == "" || p.Full[0] == '/')
}

// pathByte reports whether a path has c as it is (RFC 3986 section 3.3).
func pathByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("-._~!$&'()*+,;=:@/", c) >= 0
}

// validEscape reports whether s begins with a percent-encoded byte.
func validEscape(s string) bool {
	hex := func(c byte) bool { return '0' <= c && c <= '9' || 'a' <= c|0x20 && c|0x20 <= 'f' }
	return len(s) > 2 && hex(s[1]) && hex(s[2])
}

// validHost reports whether s can be a host with an optional port (RFC 3986 section
// 3.2.2), or is empty.
func validHost(s string) bool {
	name, port, hasPort := strings.Cut(s, ":")
	if hasPort {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 || name == "" || port[0] == '+' {
			return false
		}
	}
	for i := range len(name) {
		c := name[i]
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '.' || c == '_') {
			return false
		}
	}
	return len(s) <= 260
}

// FramingField reports whether a field says where a message ends or how its
// connection is used. No rule may change one.
func FramingField(name string) bool {
	// Gateways to CGI and its heirs read '_' as '-'.
	switch strings.ReplaceAll(strings.ToLower(name), "_", "-") {
	case "connection", "content-length", "expect", "host", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade":
		return true
	}
	return false
}

// ValidToken reports whether s is a token (RFC 9110 section 5.6.2): a field's name or
// a method.
func ValidToken(s string) bool {
	for i := range len(s) {
		c := s[i]
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0) {
			return false
		}
	}
	return s != "" && len(s) <= 256
}

// validText reports whether s can be a field's value as it is.
func validText(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return len(s) <= maxRouteValue && strings.TrimSpace(s) == s
}
