package kube

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
	gateway "sigs.k8s.io/gateway-api/apis/v1"

	"assay.dev"
	"assay.dev/discovery"
)

// describeRoute writes what a route means: its rules as JSON, and what is wrong.
func describeRoute(b *strings.Builder, r *discovery.DeclaredRoute) {
	fmt.Fprintf(b, "route %s\n", r.Key())
	for _, p := range r.ParentRefs {
		fmt.Fprintf(b, "  parent %s", p.Ref)
		if p.Problem.Reason != "" {
			fmt.Fprintf(b, ": %s: %s", p.Problem.Reason, p.Problem.Message)
		}
		b.WriteByte('\n')
	}
	for _, rule := range r.Rules {
		raw, err := json.Marshal(rule)
		if err != nil {
			panic(err)
		}
		fmt.Fprintf(b, "  rule %s\n", raw)
	}
	for _, p := range r.Dropped {
		fmt.Fprintf(b, "  dropped rule %d: %s: %s\n", p.Rule, p.Reason, p.Message)
	}
	for _, p := range r.Unresolved {
		fmt.Fprintf(b, "  unresolved in rule %d: %s: %s\n", p.Rule, p.Reason, p.Message)
	}
}

// TestConditions reads each archive in testdata/conditions as the whole of what people
// declared. "want" is what everybody is told of the routes, and what is in effect.
func TestConditions(t *testing.T) {
	archives, err := filepath.Glob("testdata/conditions/*.txtar")
	if err != nil || len(archives) == 0 {
		t.Fatalf("%d archives: %v", len(archives), err)
	}
	for _, path := range archives {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			a, err := txtar.ParseFile(path)
			if err != nil {
				t.Fatal(err)
			}
			files, want := inputs(a)
			intent, _, err := Translate(files)
			if err != nil {
				t.Fatal(err)
			}
			for i := range intent.Routes {
				intent.Routes[i].Generation = 7
			}
			got := conditions(t, intent)
			if *update {
				a.Files = append(a.Files[:len(files)], txtar.File{Name: "want", Data: []byte(got)})
				if err := os.WriteFile(path, txtar.Format(a), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if got != want {
				t.Errorf("got:\n%s\nwant:\n%s", got, want)
			}
		})
	}
}

// TestEveryReason: of each condition each reason that the specification names for routes is
// in testdata/conditions/reasons.txtar, for each kind that can be given it.
func TestEveryReason(t *testing.T) {
	a, err := txtar.ParseFile("testdata/conditions/reasons.txtar")
	if err != nil {
		t.Fatal(err)
	}
	_, text := inputs(a)
	want := map[gateway.RouteConditionType][]gateway.RouteConditionReason{
		gateway.RouteConditionAccepted: {
			gateway.RouteReasonAccepted, gateway.RouteReasonNoMatchingParent, gateway.RouteReasonUnsupportedValue,
			gateway.RouteReasonIncompatibleFilters, gateway.RouteReasonInvalidKind,
			// There are no listeners here, and nothing is pending: NotAllowedByListeners,
			// NoMatchingListenerHostname, Pending.
		},
		gateway.RouteConditionResolvedRefs: {
			gateway.RouteReasonResolvedRefs, gateway.RouteReasonRefNotPermitted, gateway.RouteReasonInvalidKind,
			gateway.RouteReasonBackendNotFound, gateway.RouteReasonUnsupportedProtocol,
		},
		gateway.RouteConditionPartiallyInvalid: {gateway.RouteReasonUnsupportedValue},
	}
	for _, kind := range []assay.RouteKind{assay.HTTPRoute, assay.GRPCRoute, assay.TLSRoute} {
		said := map[string]bool{}
		mine := false
		for line := range strings.Lines(text) {
			if line[0] != ' ' {
				mine = strings.HasPrefix(line, string(kind)+"/")
			}
			condition, rest, ok := strings.Cut(strings.TrimSpace(line), "=")
			if reason, _, _ := strings.Cut(rest, ":"); mine && ok {
				_, reason, _ = strings.Cut(reason, " ")
				said[condition+" "+reason] = true
			}
		}
		for condition, reasons := range want {
			for _, reason := range reasons {
				cannot := kind == assay.TLSRoute && (condition == gateway.RouteConditionPartiallyInvalid || reason == gateway.RouteReasonIncompatibleFilters) || // it has one rule, and no filters
					kind == assay.GRPCRoute && reason == gateway.RouteReasonIncompatibleFilters // it has no redirects
				if key := string(condition) + " " + string(reason); said[key] == cannot {
					t.Errorf("%s: %s is there: %v", kind, key, said[key])
				}
			}
		}
	}
}

func conditions(t *testing.T, intent discovery.Intent) string {
	c := discovery.New()
	if err := c.SetIntent(intent); err != nil {
		t.Fatal(err)
	}
	changes := c.Changes(func(string) ([]netip.Addr, bool) { return []netip.Addr{netip.MustParseAddr("10.182.0.1")}, true })
	var b strings.Builder
	for i := range intent.Routes {
		r := &intent.Routes[i]
		fmt.Fprintf(&b, "%s\n", r.Key())
		for _, p := range c.RouteStatus(r.Key()) {
			fmt.Fprintf(&b, "  %s\n", p.ParentRef)
			for _, c := range p.Conditions {
				if c.ObservedGeneration != 7 {
					t.Errorf("observed generation %d", c.ObservedGeneration)
				}
				fmt.Fprintf(&b, "    %s=%s %s: %s\n", c.Type, c.Status, c.Reason, c.Message)
			}
		}
	}
	for _, r := range changes.Routes {
		if err := r.Validate(); err != nil {
			t.Error(err)
		}
		fmt.Fprintf(&b, "in effect: %s at %v, %d rules\n", r.Key(), r.Parents, len(r.Rules))
		for _, rule := range r.Rules {
			for _, k := range rule.Backends {
				fmt.Fprintf(&b, "  backend %s:%d weight %d %s\n", k.Service, k.Port, k.Weight, k.Invalid)
			}
		}
	}
	return b.String()
}

// TestDocumentedRoutes reads the routes that docs/routes.md shows.
func TestDocumentedRoutes(t *testing.T) {
	text, err := os.ReadFile("../docs/routes.md")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for block := range strings.SplitSeq(string(text), "\n```yaml\n") {
		yaml, _, ok := strings.Cut(block, "\n```")
		if !ok || !strings.HasPrefix(yaml, "apiVersion") {
			continue
		}
		n++
		intent, _, err := Translate([]discovery.File{{Name: "docs/routes.md", YAML: []byte(yaml)}})
		if err != nil || len(intent.Routes) == 0 {
			t.Errorf("%v:\n%s", err, yaml)
		}
		for _, r := range intent.Routes {
			if len(r.Dropped)+len(r.Unresolved) > 0 {
				t.Errorf("%+v %+v", r.Dropped, r.Unresolved)
			}
		}
	}
	if n == 0 {
		t.Error("docs/routes.md shows no route")
	}
}
