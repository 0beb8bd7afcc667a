package assay

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"
)

func soundRoute() Route {
	second := time.Second
	return Route{
		Kind: HTTPRoute, Namespace: "bank", Name: "pay.canary", Created: time.Unix(1, 0).UTC(), Parents: []RouteParent{{Service: "bank/web", Port: 80}},
		Rules: []RouteRule{{
			Matches: []RouteMatch{{Path: PathMatch{PathPrefix, "/a"}, Headers: []ValueMatch{{Name: "x", Value: "[0-9]+", Regex: true}}}},
			RouteEdits: RouteEdits{
				Request: HeaderEdit{Set: []HeaderField{{"X-A", "b"}}, Remove: []string{"x-c"}}, Host: "x.example",
				Path: &PathEdit{Match: "/a", With: "/b"}, Mirrors: []RouteMirror{{Service: "bank/shadow", Port: 80, Numerator: 1, Denominator: 10}},
			},
			Backends: []RouteBackend{{Service: "bank/web", Port: 80, Weight: 1}, {Weight: 1, Invalid: "BackendNotFound"}},
			Timeouts: RouteTimeouts{Request: &second},
		}},
	}
}

func TestRouteTravels(t *testing.T) {
	r := soundRoute()
	if err := r.Validate(); err != nil {
		t.Fatal(err)
	}
	raw, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var back Route
	if err := json.Unmarshal(raw, &back); err != nil || !reflect.DeepEqual(r, back) {
		t.Errorf("%v\n%+v\nbecame\n%+v", err, r, back)
	}
}

// TestRouteIsBounded: a route that would make a proxy write what nobody asked for, or
// work without bound, is none.
func TestRouteIsBounded(t *testing.T) {
	for name, spoil := range map[string]func(r *Route){
		"kind":      func(r *Route) { r.Kind = "TCPRoute" },
		"name":      func(r *Route) { r.Name = "a/b" },
		"parent":    func(r *Route) { r.Parents[0].Service = "web" },
		"no match":  func(r *Route) { r.Rules[0].Matches = nil },
		"path":      func(r *Route) { r.Rules[0].Matches[0].Path.Value = "a" },
		"path type": func(r *Route) { r.Rules[0].Matches[0].Path.Type = "Glob" },
		"regex":     func(r *Route) { r.Rules[0].Matches[0].Headers[0].Value = "(" },
		"huge regex": func(r *Route) {
			r.Rules[0].Matches[0].Headers[0].Value = "((a{1,30}){1,30})" + strings.Repeat("(b{1000})", 9)
		},
		"long regex":       func(r *Route) { r.Rules[0].Matches[0].Headers[0].Value = strings.Repeat("a", MaxRoutePattern+1) },
		"split in a field": func(r *Route) { r.Rules[0].Request.Set[0].Value = "a\r\nX-Evil: b" },
		"field name":       func(r *Route) { r.Rules[0].Request.Set[0].Name = "a b" },
		"framing":          func(r *Route) { r.Rules[0].Request.Set[0].Name = "Content-Length" },
		"framing removed":  func(r *Route) { r.Rules[0].Request.Remove[0] = "transfer-encoding" },
		"host":             func(r *Route) { r.Rules[0].Host = "a b" },
		"host's port":      func(r *Route) { r.Rules[0].Host = "a:99999" },
		"path escape":      func(r *Route) { r.Rules[0].Path.With = "/a%2" },
		"path edit":        func(r *Route) { r.Rules[0].Path.With = "/a b" },
		"backend":          func(r *Route) { r.Rules[0].Backends[0].Port = 0 },
		"mirror":           func(r *Route) { r.Rules[0].Mirrors[0].Denominator = 0 },
		"timeout":          func(r *Route) { d := -time.Second; r.Rules[0].Timeouts.Backend = &d },
		"rules":            func(r *Route) { r.Rules = append(r.Rules, make([]RouteRule, MaxRouteRules)...) },
		"redirect":         func(r *Route) { r.Rules[0].Redirect = &Redirect{Status: 302} },
		"session":          func(r *Route) { r.Rules[0].Session = &RouteSession{Name: "a;b"} },
	} {
		r := soundRoute()
		spoil(&r)
		if err := r.Validate(); err == nil {
			t.Errorf("%s: is valid", name)
		}
	}
}
