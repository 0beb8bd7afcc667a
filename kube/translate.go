package kube

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	gateway "sigs.k8s.io/gateway-api/apis/v1"

	"assay.dev"
	"assay.dev/discovery"
	"assay.dev/kube/v1alpha1"
)

// Bounds of what is read; a person's files are far below.
const (
	maxFile     = 4 << 20
	maxProblems = 200
	maxDepth    = 64
)

// Problem is one thing that is wrong with a file.
type Problem struct {
	File string
	Line int // from 1
	Text string
}

func (p Problem) String() string { return fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.Text) }

// Problems is everything that is wrong with a set of files, by file and line.
type Problems []Problem

func (p Problems) Error() string {
	if len(p) == 1 {
		return p[0].String()
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d problems:", len(p))
	for i, one := range p {
		if i == maxProblems {
			fmt.Fprintf(&b, "\n  and %d more", len(p)-i)
			break
		}
		b.WriteString("\n  " + one.String())
	}
	return b.String()
}

// Texts is Error without files and lines: of problems of one object.
func (p Problems) Texts() string {
	var list []string
	for _, one := range p[:min(len(p), maxProblems)] {
		list = append(list, one.Text)
	}
	if n := len(p) - len(list); n > 0 {
		list = append(list, fmt.Sprintf("and %d more", n))
	}
	return strings.Join(list, "; ")
}

// Translate reads files of intent, all together. It is a discovery.Translate. The
// error is an assay.Error of kind Invalid that holds Problems.
func Translate(files []discovery.File) (discovery.Intent, []discovery.Object, error) {
	t := translation{first: make(map[objectKey]*document)}
	for _, f := range files {
		t.file(f)
	}
	if len(t.problems) == 0 {
		// The rules above are stricter; this is the same gate that every source passes.
		if err := t.intent.Validate(); err != nil {
			t.problems = append(t.problems, Problem{files[0].Name, 1, err.Error()})
		}
	}
	if len(t.problems) > 0 {
		order := make(map[string]int, len(files))
		for i, f := range files {
			order[f.Name] = i
		}
		slices.SortStableFunc(t.problems, func(a, b Problem) int {
			return cmp.Or(cmp.Compare(order[a.File], order[b.File]), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Text, b.Text))
		})
		return discovery.Intent{}, nil, &assay.Error{Kind: assay.Invalid, Op: "read intent", Err: slices.Compact(t.problems)}
	}
	return t.intent, t.objects, nil
}

type objectKey struct{ kind, namespace, name string }

// translation is what a set of files has become so far.
type translation struct {
	intent   discovery.Intent
	objects  []discovery.Object
	problems Problems
	first    map[objectKey]*document
}

var _ discovery.Translate = Translate

var yamlLine = regexp.MustCompile(`line (\d+): `)

func (t *translation) file(f discovery.File) {
	if len(f.YAML) > maxFile {
		t.problems = append(t.problems, Problem{f.Name, 1, fmt.Sprintf("is larger than %d MiB", maxFile>>20)})
		return
	}
	decoder := yaml.NewDecoder(bytes.NewReader(f.YAML))
	for {
		var root yaml.Node
		err := decoder.Decode(&root)
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			text, line := strings.TrimPrefix(err.Error(), "yaml: "), 1
			if m := yamlLine.FindStringSubmatchIndex(text); m != nil {
				line, _ = strconv.Atoi(text[m[2]:m[3]])
				text = text[:m[0]] + text[m[1]:]
			}
			t.problems = append(t.problems, Problem{f.Name, max(line, 1), "not YAML: " + text})
			return // the parser cannot go on after this
		}
		if len(root.Content) == 1 && root.Content[0].Tag != "!!null" {
			t.object(f.Name, root.Content[0], "")
		}
	}
}

// kind is one kind of object.
type kind struct {
	apiVersion, name string
	object           reflect.Type
	read             func(*document)
}

var kinds = []kind{
	{"v1", "Service", serviceType, (*document).service},
	{v1alpha1.APIVersion, "MeshConfig", meshConfigType, (*document).meshConfig},
	{v1alpha1.APIVersion, "Egress", egressType, (*document).egress},
	{v1alpha1.APIVersion, "TrafficPolicy", trafficPolicyType, (*document).trafficPolicy},
	{gatewayV1, "HTTPRoute", httpRouteType, (*document).httpRoute},
	{gatewayV1, "GRPCRoute", grpcRouteType, (*document).grpcRoute},
	{gatewayV1, "TLSRoute", tlsRouteType, (*document).tlsRoute},
	{gatewayV1, "ReferenceGrant", referenceGrantType, (*document).referenceGrant},
	{gatewayV1beta1, "HTTPRoute", httpRouteType, (*document).httpRoute},
	{gatewayV1beta1, "ReferenceGrant", referenceGrantType, (*document).referenceGrant},
}

// document is one object in a file.
type document struct {
	*translation
	tree
	kind      kind
	meta      metav1.ObjectMeta
	namespace string
	value     []byte // what of it has the right form, as JSON
}

// object reads one object. listed is the kind that the list around it promises, as
// "apiVersion kind"; "" for any.
func (t *translation) object(file string, n *yaml.Node, listed string) {
	d := &document{translation: t, tree: newTree(file, &t.problems)}
	if n.Kind != yaml.MappingNode {
		d.problem(n.Line, "want an object with apiVersion, kind, metadata and spec")
		return
	}
	var head metav1.TypeMeta
	head.APIVersion, head.Kind = d.text(n, "apiVersion"), d.text(n, "kind")
	if of, isList := strings.CutSuffix(head.Kind, "List"); isList {
		d.list(n, head, of)
		return
	}
	if listed != "" && head == (metav1.TypeMeta{}) {
		head.APIVersion, head.Kind, _ = strings.Cut(listed, " ") // as the API server writes lists
	}
	i := slices.IndexFunc(kinds, func(k kind) bool { return k.apiVersion == head.APIVersion && k.name == head.Kind })
	if i < 0 {
		d.unknownKind(n, head)
		return
	}
	if got := head.APIVersion + " " + head.Kind; listed != "" && got != listed {
		d.problem(n.Line, "%s in a list of %s", got, listed)
	}
	d.kind = kinds[i]
	v, _ := d.node(n, d.kind.object, "", 0)
	var err error
	if d.value, err = json.Marshal(v); err != nil {
		d.problem(n.Line, "%v", err)
		return
	}
	d.lines[""] = n.Line
	if d.metadata() {
		d.kind.read(d)
	}
}

func (d *document) unknownKind(n *yaml.Node, head metav1.TypeMeta) {
	var known []string
	for _, k := range kinds {
		known = append(known, k.apiVersion+" "+k.name)
	}
	switch {
	case head.APIVersion == "" || head.Kind == "":
		d.problem(n.Line, "apiVersion and kind are needed, for instance: apiVersion: v1, kind: Service")
	default:
		d.problem(d.keyLine(n, "kind"), "kind %s of apiVersion %s is not known; known are %s", head.Kind, head.APIVersion, strings.Join(known, ", "))
	}
}

// list takes the items of a list one by one.
func (d *document) list(n *yaml.Node, head metav1.TypeMeta, of string) {
	listed := ""
	if of != "" { // ServiceList, not List
		listed = head.APIVersion + " " + of
	}
	known := head.APIVersion == "v1" && of == ""
	for _, k := range kinds {
		known = known || k.apiVersion+" "+k.name == listed
	}
	if !known {
		d.unknownKind(n, head)
		return
	}
	for i := 0; i < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		switch {
		case slices.Contains([]string{"apiVersion", "kind", "metadata"}, key.Value):
		case key.Value != "items":
			d.problem(key.Line, "unknown field %s of a list", key.Value)
		case value.Kind != yaml.SequenceNode:
			d.problem(value.Line, "items: want a list")
		default:
			for _, item := range value.Content {
				if item.Kind == yaml.MappingNode && strings.HasSuffix(d.text(item, "kind"), "List") {
					d.problem(item.Line, "a list in a list")
					continue
				}
				d.object(d.tree.file, item, listed)
			}
		}
	}
}

// metadata checks what all kinds have in common; it returns false when the object
// has no usable name.
func (d *document) metadata() bool {
	var o struct {
		Metadata metav1.ObjectMeta `json:"metadata"`
	}
	if err := json.Unmarshal(d.value, &o); err != nil {
		d.problem(d.line("metadata"), "metadata: %v", err)
		return false
	}
	d.meta = o.Metadata
	m := &d.meta
	if m.GenerateName != "" {
		d.at("metadata.generateName", "not supported: intent is compared by name, so give it one")
	}
	if len(m.Finalizers) > 0 || len(m.OwnerReferences) > 0 || m.DeletionTimestamp != nil {
		d.at("metadata", "finalizers, ownerReferences and deletionTimestamp are not supported standalone")
	}
	d.labels("metadata.labels", m.Labels)
	for k := range m.Annotations {
		d.rule("metadata.annotations."+k, validation.IsQualifiedName(strings.ToLower(k)))
	}
	ok := true
	d.namespace = cmp.Or(m.Namespace, "default")
	if !assay.ValidName(d.namespace) {
		d.at("metadata.namespace", "%q may hold a-z, 0-9 and '-', 63 characters at most", d.namespace)
		ok = false
	}
	switch {
	case m.Name == "":
		d.at("metadata.name", "a name is needed")
		ok = false
	case !assay.ValidName(m.Name) && !(strings.HasPrefix(d.kind.apiVersion, gateway.GroupName) && assay.ValidRouteName(m.Name)):
		d.at("metadata.name", "%q may hold a-z, 0-9 and '-', 63 characters at most", m.Name)
		ok = false
	}
	if !ok {
		return false
	}
	key := objectKey{d.kind.name, d.namespace, m.Name}
	if first := d.first[key]; first != nil {
		d.at("metadata.name", "%s %s/%s is already at %s:%d", key.kind, key.namespace, key.name, first.tree.file, first.line(""))
		return true
	}
	d.first[key] = d
	return true
}

func (d *document) labels(path string, labels map[string]string) {
	for k, v := range labels {
		d.rule(path+"."+k, validation.IsQualifiedName(k))
		d.rule(path+"."+k, validation.IsValidLabelValue(v))
	}
}

// rule reports what Kubernetes' own rules say, without their examples and patterns.
func (d *document) rule(path string, messages []string) {
	for _, m := range messages {
		d.at(path, "%s", withoutPattern(m))
	}
}

func withoutPattern(message string) string {
	message, _, _ = strings.Cut(message, " (e.g.")
	return message
}

// keep adds the object in its normal form: what was understood, and nothing else.
func (d *document) keep(spec any) {
	type metadata struct {
		Name        string            `json:"name"`
		Namespace   string            `json:"namespace"`
		Labels      map[string]string `json:"labels,omitempty"`
		Annotations map[string]string `json:"annotations,omitempty"`
	}
	manifest, err := json.Marshal(struct {
		APIVersion string   `json:"apiVersion"`
		Kind       string   `json:"kind"`
		Metadata   metadata `json:"metadata"`
		Spec       any      `json:"spec"`
	}{d.kind.apiVersion, d.kind.name, metadata{d.meta.Name, d.namespace, d.meta.Labels, d.meta.Annotations}, spec})
	if err != nil {
		d.problem(d.line(""), "%v", err)
		return
	}
	d.objects = append(d.objects, discovery.Object{
		Kind: d.kind.name, Namespace: d.namespace, Name: d.meta.Name,
		Source: d.tree.file, Line: d.line(""), Manifest: printable(manifest),
	})
}

// printable writes as escapes what JSON may hold as it is and YAML may not, or folds (YAML 1.2.2
// section 5.1): what is stored is read as YAML again.
func printable(b []byte) []byte {
	bare := func(c rune) bool {
		return 0x7f <= c && c < 0xa0 || c == 0xfeff || c == 0xfffe || c == 0xffff
	}
	if bytes.IndexFunc(b, bare) < 0 {
		return b
	}
	out := make([]byte, 0, len(b)+16)
	for _, c := range string(b) {
		if bare(c) {
			out = fmt.Appendf(out, "\\u%04x", c)
		} else {
			out = utf8.AppendRune(out, c)
		}
	}
	return out
}
