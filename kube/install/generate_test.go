package install

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"assay.dev/kube/v1alpha1"
)

var update = flag.Bool("update", false, "write what is, instead of comparing")

// same compares a file with what it should be, or writes it.
func same(t *testing.T, file string, want []byte) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, want, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	got, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s is not what it should be (%v): go generate ./kube/install", file, err)
	}
}

// kindOf is a kind whose definition is written.
type kindOf struct {
	plural    string
	example   any
	columns   []apiextensionsv1.CustomResourceColumnDefinition
	onlyNamed string // the one name that an object may have
}

func column(name, typ, path, description string) apiextensionsv1.CustomResourceColumnDefinition {
	return apiextensionsv1.CustomResourceColumnDefinition{Name: name, Type: typ, JSONPath: path, Description: description}
}

// always are the columns that end those of every kind.
var always = []apiextensionsv1.CustomResourceColumnDefinition{
	column("Accepted", "string", accepted+"status", "Whether it is in effect"),
	column("Reason", "string", accepted+"reason", "Why it is, or is not"),
	column("Age", "date", ".metadata.creationTimestamp", ""),
}

const accepted = `.status.conditions[?(@.type=="` + v1alpha1.ConditionAccepted + `")].`

var kinds = []kindOf{
	{plural: "egresses", example: v1alpha1.Egress{}, columns: []apiextensionsv1.CustomResourceColumnDefinition{
		column("Hosts", "string", ".spec.hosts", "DNS names that connections may go to"),
		column("Addresses", "string", ".spec.addresses", "Addresses that connections may go to"),
		column("Ports", "string", ".spec.ports", "TCP ports"),
	}},
	{plural: "meshconfigs", example: v1alpha1.MeshConfig{}, onlyNamed: v1alpha1.DefaultName, columns: []apiextensionsv1.CustomResourceColumnDefinition{
		column("Mode", "string", ".spec.mode", "observe (when empty) or strict"),
		column("Egress", "string", ".spec.egress", "observe (when empty) or strict"),
	}},
	{plural: "trafficpolicies", example: v1alpha1.TrafficPolicy{}, columns: []apiextensionsv1.CustomResourceColumnDefinition{
		column("Services", "string", ".spec.targetRefs[*].name", "What the policy is for"),
		column("Timeout", "string", ".spec.timeouts.request", "Of a request with its retries"),
	}},
}

// limit is what the Go type does not say about a field, and package kube wants.
type limit func(*apiextensionsv1.JSONSchemaProps)

func oneOf(values ...string) limit {
	return func(s *apiextensionsv1.JSONSchemaProps) {
		for _, v := range values {
			s.Enum = append(s.Enum, apiextensionsv1.JSON{Raw: []byte(`"` + v + `"`)})
		}
	}
}

func between(least, most float64) limit {
	return func(s *apiextensionsv1.JSONSchemaProps) { s.Minimum, s.Maximum = &least, &most }
}

func atLeast(least float64) limit {
	return func(s *apiextensionsv1.JSONSchemaProps) { s.Minimum = &least }
}

func items(least, most int64, each limit) limit {
	return func(s *apiextensionsv1.JSONSchemaProps) {
		if least > 0 {
			s.MinItems = &least
		}
		s.MaxItems = &most
		if each != nil {
			each(s.Items.Schema)
		}
	}
}

var limits = map[string]limit{
	"MeshConfigSpec.mode":          oneOf("", "observe", "strict"),
	"MeshConfigSpec.egress":        oneOf("", "observe", "strict"),
	"MeshConfigSpec.excludedPorts": items(0, 128, between(1, 65535)),
	"EgressSpec.ports":             items(1, 256, between(1, 65535)),
	"TrafficPolicySpec.targetRefs": items(1, 16, nil),
	"TargetReference.group":        oneOf("", "core"),
	"TargetReference.kind":         oneOf("", "Service"),

	"TrafficPolicySpec.locality":       oneOf("", "PreferZone", "Any"),
	"TrafficPolicySpec.panicPercent":   between(0, 100),
	"TrafficPolicySpec.maxConnections": atLeast(1),
	"Retry.attempts":                   between(0, 10),
	"Retry.codes":                      items(0, 200, between(400, 599)),
	"RetryBudget.percent":              between(0, 100),
	"RequestRate.count":                between(0, 1_000_000),
	"Ejection.maxPercent":              between(0, 100),
	"Breaker.consecutiveFailures":      between(0, 1000),
	"Breaker.failurePercent":           between(0, 100),
	"Breaker.slowPercent":              between(0, 100),
	"Breaker.minRequests":              atLeast(0),
	"Inbound.maxConnections":           atLeast(1),
	"RateLimit.requests":               atLeast(1),
	"RateLimit.burst":                  atLeast(1),
	"Concurrency.min":                  atLeast(0),
	"Concurrency.max":                  atLeast(1),
	// A Duration of GEP-2257.
	"Duration": func(s *apiextensionsv1.JSONSchemaProps) { s.Pattern = `^([0-9]{1,5}(h|m|s|ms)){1,4}$` },
}

// writer makes schemas from Go types.
type writer struct {
	docs map[string]string // by Type and Type.field
	used map[string]bool   // limits
}

// chart is where the Helm chart is.
const chart = "../../charts/assay"

// TestGenerated writes, with -update, what is made from Go values: the definitions of our
// kinds, and the chart's copies of them and of what accounts may do.
func TestGenerated(t *testing.T) {
	w := writer{docs: comments(t, "../v1alpha1"), used: map[string]bool{}}
	for _, k := range kinds {
		d := w.definition(k)
		text, err := yaml.Marshal(d)
		if err != nil {
			t.Fatal(err)
		}
		// What the API server fills in.
		text = bytes.ReplaceAll(text, []byte("  creationTimestamp: null\n"), nil)
		if i := bytes.Index(text, []byte("\nstatus:")); i >= 0 {
			text = text[:i+1]
		}
		same(t, filepath.Join("crds", k.plural+".yaml"), text)
	}
	definitions, err := Definitions()
	if err != nil {
		t.Fatal(err)
	}
	var list []Object
	for _, d := range definitions {
		d.Annotations = map[string]string{"helm.sh/resource-policy": "keep"} // with them would go what is declared
		list = append(list, d)
	}
	const header = "# Written by `go generate ./kube/install`.\n"
	text := func(objects []Object) string {
		b, err := YAML(objects)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	same(t, filepath.Join(chart, "templates", "definitions.yaml"), []byte(header+text(list)))
	o := &Options{Namespace: "{{ .Release.Namespace }}"}
	same(t, filepath.Join(chart, "templates", "accounts.yaml"), []byte(header+text(controlAccount(o))+
		"{{- if .Values.injector }}\n---\n"+text(injectorRole(o))+"{{- end }}\n{{- if .Values.agent }}\n---\n"+text(agentAccount(o))+"{{- end }}\n"))
	same(t, filepath.Join(chart, "templates", "injector.yaml"), []byte(header+"{{- if .Values.injector }}\n"+text([]Object{injector(o)})+"{{- end }}\n"))
	document(t)
	for name := range limits {
		if !w.used[name] {
			t.Errorf("there is no %s", name)
		}
	}
}

// document writes what the accounts may do between two marks of the documentation.
func document(t *testing.T) {
	const file, begin, end = "../../docs/kubernetes.md", "<!-- accounts: written by go generate ./kube/install -->\n", "<!-- /accounts -->"
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(text), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no marks", file)
	}
	var b strings.Builder
	b.WriteString("| account | where | what | verbs |\n|---|---|---|---|\n")
	for _, x := range []struct {
		account, where string
		rules          []rbacv1.PolicyRule
	}{
		{ControlName, "every namespace", ControlRules()}, {ControlName, DefaultNamespace, ControlLocalRules()},
		{ControlName, "every namespace, with `--injector`", InjectorRules()},
		{AgentName, "every namespace", AgentRules()}, {AgentName, DefaultNamespace, AgentLocalRules()},
	} {
		for _, r := range x.rules {
			what := strings.Join(r.Resources, ", ")
			if group := strings.Join(r.APIGroups, ", "); group != "" {
				what += " of " + group
			}
			if r.ResourceNames != nil {
				what += " named " + strings.Join(r.ResourceNames, ", ")
			}
			fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", x.account, x.where, what, strings.Join(r.Verbs, ", "))
		}
	}
	same(t, file, []byte(before+begin+b.String()+end+after))
}

func (w *writer) definition(k kindOf) *apiextensionsv1.CustomResourceDefinition {
	typ := reflect.TypeOf(k.example)
	spec, _ := typ.FieldByName("Spec")
	content := w.schema(spec.Type)
	schema := apiextensionsv1.JSONSchemaProps{
		Type: "object", Description: w.docs[typ.Name()],
		Properties: map[string]apiextensionsv1.JSONSchemaProps{
			"apiVersion": {Type: "string"}, "kind": {Type: "string"}, "metadata": {Type: "object"}, "spec": content, "status": w.status(),
		},
	}
	if len(content.Required) > 0 {
		schema.Required = []string{"spec"}
	}
	if k.onlyNamed != "" {
		schema.Properties["metadata"] = apiextensionsv1.JSONSchemaProps{Type: "object", Properties: map[string]apiextensionsv1.JSONSchemaProps{
			"name": {Type: "string", Pattern: "^" + k.onlyNamed + "$"},
		}}
	}
	group, version, _ := strings.Cut(v1alpha1.APIVersion, "/")
	return &apiextensionsv1.CustomResourceDefinition{
		TypeMeta:   metav1.TypeMeta{APIVersion: "apiextensions.k8s.io/v1", Kind: "CustomResourceDefinition"},
		ObjectMeta: metav1.ObjectMeta{Name: k.plural + "." + group, Labels: labels("", nil)},
		Spec: apiextensionsv1.CustomResourceDefinitionSpec{
			Group: group, Scope: apiextensionsv1.NamespaceScoped,
			Names: apiextensionsv1.CustomResourceDefinitionNames{
				Kind: typ.Name(), ListKind: typ.Name() + "List", Plural: k.plural, Singular: strings.ToLower(typ.Name()), Categories: []string{"assay"},
			},
			Versions: []apiextensionsv1.CustomResourceDefinitionVersion{{
				Name: version, Served: true, Storage: true, AdditionalPrinterColumns: append(k.columns, always...),
				Subresources: &apiextensionsv1.CustomResourceSubresources{Status: &apiextensionsv1.CustomResourceSubresourceStatus{}},
				Schema:       &apiextensionsv1.CustomResourceValidation{OpenAPIV3Schema: &schema},
			}},
		},
	}
}

// status is the schema of every kind's, with a metav1.Condition for each type.
func (w *writer) status() apiextensionsv1.JSONSchemaProps {
	text := func(doc string, most int64) apiextensionsv1.JSONSchemaProps {
		return apiextensionsv1.JSONSchemaProps{Type: "string", Description: doc, MaxLength: &most}
	}
	reason, state, since := text("why, as one word", 1024), text("", 7), text("since when the status is what it is", 64)
	reason.Pattern = "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"
	oneOf("True", "False", "Unknown")(&state)
	since.Format, since.MaxLength = "date-time", nil
	most, none := int64(8), 0.0
	listType := "map"
	return apiextensionsv1.JSONSchemaProps{
		Type: "object", Description: w.docs["Status"],
		Properties: map[string]apiextensionsv1.JSONSchemaProps{"conditions": {
			Type: "array", Description: w.docs["Status.conditions"], XListType: &listType, XListMapKeys: []string{"type"}, MaxItems: &most,
			Items: &apiextensionsv1.JSONSchemaPropsOrArray{Schema: &apiextensionsv1.JSONSchemaProps{
				Type: "object", Required: []string{"lastTransitionTime", "message", "reason", "status", "type"},
				Properties: map[string]apiextensionsv1.JSONSchemaProps{
					"type": text("Accepted: whether the object has an effect", 316), "status": state, "reason": reason,
					"message": text("what is wrong, and what would mend it", 32768), "lastTransitionTime": since,
					"observedGeneration": {Type: "integer", Format: "int64", Minimum: &none, Description: "the metadata.generation that this is about"},
				},
			}},
		}},
	}
}

func (w *writer) schema(typ reflect.Type) apiextensionsv1.JSONSchemaProps {
	var s apiextensionsv1.JSONSchemaProps
	switch typ.Kind() {
	case reflect.Pointer:
		return w.schema(typ.Elem())
	case reflect.String:
		s.Type = "string"
	case reflect.Bool:
		s.Type = "boolean"
	case reflect.Int32:
		s.Type, s.Format = "integer", "int32"
	case reflect.Slice:
		each := w.schema(typ.Elem())
		s.Type, s.Items = "array", &apiextensionsv1.JSONSchemaPropsOrArray{Schema: &each}
	case reflect.Struct:
		s.Type, s.Properties = "object", map[string]apiextensionsv1.JSONSchemaProps{}
		w.fields(typ, &s)
	default:
		panic("no schema for " + typ.String())
	}
	w.limit(typ.Name(), &s)
	return s
}

func (w *writer) fields(typ reflect.Type, s *apiextensionsv1.JSONSchemaProps) {
	for i := range typ.NumField() {
		f := typ.Field(i)
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if options == "inline" {
			w.fields(f.Type, s)
			continue
		}
		field := w.schema(f.Type)
		if doc := w.docs[typ.Name()+"."+name]; doc != "" {
			field.Description = doc
		}
		w.limit(typ.Name()+"."+name, &field)
		if !strings.Contains(options, "omitempty") {
			s.Required = append(s.Required, name)
		}
		s.Properties[name] = field
	}
}

func (w *writer) limit(name string, s *apiextensionsv1.JSONSchemaProps) {
	if l := limits[name]; l != nil {
		l(s)
		w.used[name] = true
	}
	if s.Description == "" {
		s.Description = w.docs[name]
	}
}

// comments reads what the source says of types and fields, for `kubectl explain`.
func comments(t *testing.T, dir string) map[string]string {
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	docs := map[string]string{}
	for _, name := range files {
		f, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.TYPE {
				continue
			}
			spec := g.Specs[0].(*ast.TypeSpec)
			docs[spec.Name.Name] = line(g.Doc)
			body, ok := spec.Type.(*ast.StructType)
			if !ok {
				continue
			}
			for _, field := range body.Fields.List {
				if field.Tag == nil || len(field.Names) == 0 {
					continue
				}
				name, _, _ := strings.Cut(reflect.StructTag(strings.Trim(field.Tag.Value, "`")).Get("json"), ",")
				text := line(field.Doc)
				if text == "" {
					text = line(field.Comment)
				}
				docs[spec.Name.Name+"."+name] = text
			}
		}
	}
	return docs
}

func line(c *ast.CommentGroup) string { return strings.Join(strings.Fields(c.Text()), " ") }
