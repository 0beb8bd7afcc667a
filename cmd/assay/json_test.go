package main

import (
	"encoding"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
	installation "assay.dev/kube/install"
	"assay.dev/store"
)

// TestJSONIsDocumented holds docs/json.md against the types: every kind has a
// section, and every field is named there or among the shapes.
func TestJSONIsDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/json.md")
	if err != nil {
		t.Fatal(err)
	}
	sections := make(map[string]string)
	for part := range strings.SplitSeq(string(text), "\n## ") {
		head, body, _ := strings.Cut(part, "\n")
		sections[head] = body
	}
	docs := map[string]reflect.Type{
		"services": reflect.TypeFor[api.ServiceView](), "workloads": reflect.TypeFor[api.WorkloadView](),
		"namespaces": reflect.TypeFor[api.NamespaceView](), "meshconfigs": reflect.TypeFor[api.ObjectView](), "egresses": reflect.TypeFor[api.ObjectView](),
		"httproutes": reflect.TypeFor[api.ObjectView](), "grpcroutes": reflect.TypeFor[api.ObjectView](), "referencegrants": reflect.TypeFor[api.ObjectView](),
		"tlsroutes":       reflect.TypeFor[api.ObjectView](),
		"trafficpolicies": reflect.TypeFor[api.ObjectView](),
		"hosts":           reflect.TypeFor[api.HostView](), "certificates": reflect.TypeFor[api.CertificateView](),
		"bundle": reflect.TypeFor[api.BundleView](), "edges": reflect.TypeFor[assay.Edge](),
		"signals": reflect.TypeFor[api.SignalsView](), "findings": reflect.TypeFor[store.Finding](),
		"tokens": reflect.TypeFor[store.Token](), "audit": reflect.TypeFor[store.Audit](),
	}
	for _, k := range kinds {
		typ, known := docs[k.list]
		if !known || sections[k.list] == "" {
			t.Errorf("kind %s has no type here or no section in docs/json.md", k.list)
			continue
		}
		for _, name := range jsonFields(typ, nil) {
			if !strings.Contains(sections[k.list]+sections["Shapes"], "`"+name+"`") {
				t.Errorf("docs/json.md, %s: field %s is missing", k.list, name)
			}
		}
	}
	for _, name := range jsonFields(reflect.TypeFor[installation.Judgement](), nil) {
		if !strings.Contains(sections["judgements"], "`"+name+"`") {
			t.Errorf("docs/json.md, judgements: field %s is missing", name)
		}
	}
	if len(docs) != len(kinds) {
		t.Errorf("%d types, %d kinds", len(docs), len(kinds))
	}
}

// jsonFields returns the names of all fields of a document, those of parts too.
func jsonFields(typ reflect.Type, names []string) []string {
	for typ.Kind() == reflect.Slice || typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Array {
		typ = typ.Elem()
	}
	text := reflect.TypeFor[encoding.TextMarshaler]()
	if typ.Kind() != reflect.Struct || typ == reflect.TypeFor[time.Time]() || typ.Implements(text) {
		return names
	}
	for i := range typ.NumField() {
		f := typ.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		if name == "-" {
			continue
		}
		if name != "" {
			names = append(names, name)
		}
		names = jsonFields(f.Type, names)
	}
	return names
}
