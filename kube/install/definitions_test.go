package install

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"sigs.k8s.io/yaml"

	"assay.dev/discovery"
	"assay.dev/kube"
	"assay.dev/kube/v1alpha1"
)

type props = apiextensionsv1.JSONSchemaProps

// schemas are those of our kinds, by kind.
func schemas(t *testing.T) map[string]*props {
	list, err := Definitions()
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]*props{}
	for _, d := range list {
		m[d.Spec.Names.Kind] = d.Spec.Versions[0].Schema.OpenAPIV3Schema
	}
	return m
}

// refuses says why an API server would refuse a value, unknown fields included.
func refuses(s *props, v any, path string) error {
	if len(s.Enum) > 0 {
		text, _ := json.Marshal(v)
		if !slices.ContainsFunc(s.Enum, func(j apiextensionsv1.JSON) bool { return string(j.Raw) == string(text) }) {
			return fmt.Errorf("%s: %s is none of the values", path, text)
		}
	}
	switch v := v.(type) {
	case string:
		if s.Type != "string" {
			return fmt.Errorf("%s: text", path)
		}
		if s.Pattern != "" && !regexp.MustCompile(s.Pattern).MatchString(v) {
			return fmt.Errorf("%s: %q is not of the form", path, v)
		}
	case bool:
		if s.Type != "boolean" {
			return fmt.Errorf("%s: boolean", path)
		}
	case float64:
		if s.Type != "integer" || v != float64(int32(v)) {
			return fmt.Errorf("%s: number", path)
		}
		if s.Minimum != nil && v < *s.Minimum || s.Maximum != nil && v > *s.Maximum {
			return fmt.Errorf("%s: %v is out of bounds", path, v)
		}
	case []any:
		if s.Type != "array" || s.MinItems != nil && int64(len(v)) < *s.MinItems || s.MaxItems != nil && int64(len(v)) > *s.MaxItems {
			return fmt.Errorf("%s: list of %d", path, len(v))
		}
		for i, x := range v {
			if err := refuses(s.Items.Schema, x, fmt.Sprintf("%s[%d]", path, i)); err != nil {
				return err
			}
		}
	case map[string]any:
		if s.Type != "object" {
			return fmt.Errorf("%s: object", path)
		}
		for _, name := range s.Required {
			if _, ok := v[name]; !ok {
				return fmt.Errorf("%s.%s is missing", path, name)
			}
		}
		for name, x := range v {
			field, ok := s.Properties[name]
			if !ok && path != ".metadata" {
				return fmt.Errorf("%s.%s is not known", path, name)
			}
			if ok {
				if err := refuses(&field, x, path+"."+name); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// translates says whether package kube takes an object.
func translates(o map[string]any) error {
	text, err := json.Marshal(o)
	if err != nil {
		return err
	}
	_, _, err = kube.Translate([]discovery.File{{Name: "object", YAML: text}})
	return err
}

// TestSchemasTakeWhatKubeTakes: every manifest of package kube's tests that it takes.
func TestSchemasTakeWhatKubeTakes(t *testing.T) {
	all := schemas(t)
	archives, err := filepath.Glob("../testdata/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	taken := map[string]int{}
	for _, name := range archives {
		a, err := txtar.ParseFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range a.Files {
			for i, text := range strings.Split(string(f.Data), "\n---\n") {
				var o map[string]any
				if yaml.Unmarshal([]byte(text), &o) != nil || o["apiVersion"] != v1alpha1.APIVersion {
					continue
				}
				kind, _ := o["kind"].(string)
				s := all[kind]
				if s == nil || translates(o) != nil {
					continue
				}
				taken[kind]++
				if err := refuses(s, o, ""); err != nil {
					t.Errorf("%s, %s, object %d: the schema refuses %v", filepath.Base(name), f.Name, i+1, err)
				}
			}
		}
	}
	if len(taken) != len(all) {
		t.Errorf("there are manifests of %v only", taken)
	}
}

// base is an object of a kind that is taken.
func base(kind string) map[string]any {
	spec := map[string]map[string]any{
		"MeshConfig":    {},
		"Egress":        {"hosts": []any{"example.com"}, "ports": []any{443.0}},
		"TrafficPolicy": {"targetRefs": []any{map[string]any{"name": "a"}}},
	}[kind]
	return map[string]any{"apiVersion": v1alpha1.APIVersion, "kind": kind, "metadata": map[string]any{"name": "default"}, "spec": spec}
}

// examples are a value that a schema takes, and some that it refuses.
func examples(name string, s *props) (good any, bad []any) {
	switch s.Type {
	case "boolean":
		return true, []any{"yes", 1.0}
	case "integer":
		good, bad = 1.0, []any{"text", 1.5, true}
		if s.Minimum != nil {
			good, bad = max(*s.Minimum, 1), append(bad, *s.Minimum-1)
		}
		if s.Maximum != nil {
			bad = append(bad, *s.Maximum+1)
		}
		return good, bad
	case "array":
		good, bad = nil, []any{"text", map[string]any{}}
		if s.Items.Schema.Type == "object" {
			return []any{map[string]any{"name": "a"}}, append(bad, []any{map[string]any{"name": "a", "more": 1.0}})
		}
		one, wrong := examples(name, s.Items.Schema)
		for _, w := range wrong {
			bad = append(bad, []any{w})
		}
		if s.MinItems != nil {
			bad = append(bad, []any{})
		}
		return []any{one}, bad
	case "object":
		return map[string]any{}, []any{"text", []any{}, map[string]any{"unheardOf": 1.0}}
	}
	good, bad = map[string]any{"accessLog": "1%", "hosts": "example.org", "addresses": "192.0.2.1", "accounts": "a"}[name], []any{7.0, []any{}}
	switch {
	case s.Pattern != "":
		good, bad = "1s", append(bad, "fast", "1.5s", "100000s")
	case len(s.Enum) > 0:
		json.Unmarshal(s.Enum[len(s.Enum)-1].Raw, &good)
		bad = append(bad, "nonsense")
	}
	return good, bad
}

// TestSchemasAgreeWithKube sets each field there is to a value that is taken, and to some
// that are refused, by both.
func TestSchemasAgreeWithKube(t *testing.T) {
	fields := 0
	for kind, s := range schemas(t) {
		spec := s.Properties["spec"]
		var visit func(s *props, path []string)
		visit = func(s *props, path []string) {
			for name, field := range s.Properties {
				at := append(slices.Clone(path), name)
				fields++
				good, bad := examples(name, &field)
				if field.Type != "object" { // those are set with what is in them
					o := with(kind, at, good)
					if err := translates(o); err != nil {
						t.Errorf("%s %v: kube refuses %v: %v", kind, at, good, err)
					}
					if err := refuses(schemas(t)[kind], o, ""); err != nil {
						t.Errorf("%s %v: the schema refuses %v: %v", kind, at, good, err)
					}
				}
				for _, v := range bad {
					o := with(kind, at, v)
					if err := translates(o); err == nil {
						t.Errorf("%s %v: kube takes %v", kind, at, v)
					}
					if err := refuses(schemas(t)[kind], o, ""); err == nil {
						t.Errorf("%s %v: the schema takes %v", kind, at, v)
					}
				}
				if field.Type == "object" {
					visit(&field, at)
				}
			}
		}
		visit(&spec, nil)
	}
	if fields < 50 {
		t.Errorf("only %d fields", fields)
	}
}

// with is an object with one field set, and those that go with it.
func with(kind string, path []string, v any) map[string]any {
	o := base(kind)
	in := o["spec"].(map[string]any)
	for _, name := range path[:len(path)-1] {
		next := map[string]any{}
		switch name {
		case "circuit":
			next["failurePercent"] = 50.0
		case "rateLimit":
			next["requests"] = 1.0
		}
		in[name] = next
		in = next
	}
	in[path[len(path)-1]] = v
	return o
}
