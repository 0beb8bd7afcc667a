package install

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"sigs.k8s.io/yaml"
)

var metricName = regexp.MustCompile(`\bassay_[a-z_]+`)

// TestMonitoringNamesMetricsThatExist compares dashboard and alerts with what agents serve.
func TestMonitoringNamesMetricsThatExist(t *testing.T) {
	source, err := os.ReadFile("../../agent/metrics.go")
	if err != nil {
		t.Fatal(err)
	}
	served := map[string]bool{}
	for _, name := range metricName.FindAllString(string(source), -1) {
		served[name] = true
	}
	if len(served) < 20 {
		t.Fatalf("only %d metrics", len(served))
	}
	part := regexp.MustCompile(`_(bucket|sum|count)$`)
	shown := 0
	check := func(where, expr string) {
		names := metricName.FindAllString(expr, -1)
		if len(names) == 0 {
			t.Errorf("%s: no metric in %q", where, expr)
		}
		for _, name := range names {
			shown++
			if !served[name] && !served[part.ReplaceAllString(name, "")] {
				t.Errorf("%s: agents do not serve %s", where, name)
			}
		}
	}

	text, err := os.ReadFile(filepath.Join(chart, "dashboards/assay.json"))
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			ID      int
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	ids := map[int]bool{}
	for _, p := range dashboard.Panels {
		if ids[p.ID] || len(p.Targets) == 0 {
			t.Errorf("panel %q: an ID of its own and a target are wanted", p.Title)
		}
		ids[p.ID] = true
		for _, x := range p.Targets {
			check(p.Title, x.Expr)
		}
	}

	if text, err = os.ReadFile(filepath.Join(chart, "alerts/assay.yaml")); err != nil {
		t.Fatal(err)
	}
	var alerts struct {
		Groups []struct {
			Name  string `json:"name"`
			Rules []struct {
				Alert       string            `json:"alert"`
				Expr        string            `json:"expr"`
				For         string            `json:"for,omitempty"`
				Labels      map[string]string `json:"labels"`
				Annotations map[string]string `json:"annotations"`
			} `json:"rules"`
		} `json:"groups"`
	}
	if err := yaml.UnmarshalStrict(text, &alerts); err != nil {
		t.Fatal(err)
	}
	for _, g := range alerts.Groups {
		for _, r := range g.Rules {
			check(r.Alert, r.Expr)
			if r.Labels["severity"] == "" || r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
				t.Errorf("%s: severity, summary and description are wanted", r.Alert)
			}
		}
	}
	if shown < 25 {
		t.Errorf("only %d uses of metrics", shown)
	}
}
