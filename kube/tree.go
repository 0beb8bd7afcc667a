package kube

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// tree checks YAML against a Go type and remembers where everything was. It stands
// in for a strict decoder because a decoder stops at its first error and does not
// know lines.
type tree struct {
	file     string
	problems *Problems
	lines    map[string]int  // path -> line; "" is the object
	bad      map[string]bool // paths whose value does not have the right form
}

func newTree(file string, problems *Problems) tree {
	return tree{file: file, problems: problems, lines: make(map[string]int), bad: make(map[string]bool)}
}

func (t *tree) problem(line int, format string, args ...any) {
	*t.problems = append(*t.problems, Problem{t.file, max(line, 1), fmt.Sprintf(format, args...)})
}

// at reports a problem with the field at path, or with the nearest field around it.
func (t *tree) at(path, format string, args ...any) {
	t.problem(t.line(path), "%s: %s", path, fmt.Sprintf(format, args...))
}

// missing reports a field that is not there, unless it is and has been reported
// for its form.
func (t *tree) missing(path, text string) {
	for around := path; ; around = parent(around) {
		if t.bad[around] {
			return
		}
		if around == "" {
			t.at(path, "%s", text)
			return
		}
	}
}

// parent returns the path of what is around the field at path.
func parent(path string) string { return path[:max(strings.LastIndexAny(path, ".["), 0)] }

func (t *tree) line(path string) int {
	for {
		if line, ok := t.lines[path]; ok || path == "" {
			return line
		}
		path = parent(path)
	}
}

// text returns the text of a field of a mapping, "" when there is none.
func (t *tree) text(n *yaml.Node, field string) string {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if k, v := n.Content[i], n.Content[i+1]; k.Value == field && v.Kind == yaml.ScalarNode {
			return v.Value
		}
	}
	return ""
}

func (t *tree) keyLine(n *yaml.Node, field string) int {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == field {
			return n.Content[i].Line
		}
	}
	return n.Line
}

var (
	intOrString = reflect.TypeFor[intstr.IntOrString]()
	timeType    = reflect.TypeFor[metav1.Time]()
	microTime   = reflect.TypeFor[metav1.MicroTime]()
	fieldsV1    = reflect.TypeFor[metav1.FieldsV1]()
)

// node returns what n is as JSON, without the parts that do not have the form of
// typ: those are reported. ok is false when nothing is left of it.
func (t *tree) node(n *yaml.Node, typ reflect.Type, path string, depth int) (v any, ok bool) {
	for typ.Kind() == reflect.Pointer {
		typ = typ.Elem()
	}
	if depth > maxDepth {
		t.problem(n.Line, "%s: nested too deeply", path)
		return nil, false
	}
	if n.Kind == yaml.AliasNode {
		t.problem(n.Line, "%s: aliases are not supported; write the value out", path)
		return nil, false
	}
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" {
		return nil, false // as Kubernetes has it, the same as not there
	}
	switch {
	case typ == fieldsV1:
		return nil, false
	case typ == intOrString:
		if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!int" {
			return t.integer(n, 32, path)
		}
		return t.str(n, path, "a number or a name")
	case typ == timeType || typ == microTime:
		return t.str(n, path, "a time")
	}
	switch typ.Kind() {
	case reflect.Struct:
		return t.mapping(n, path, depth, fieldsOf(typ), nil)
	case reflect.Map:
		return t.mapping(n, path, depth, nil, typ.Elem())
	case reflect.Slice:
		if n.Kind != yaml.SequenceNode {
			t.problem(n.Line, "%s: want a list", path)
			return nil, false
		}
		list := make([]any, 0, len(n.Content))
		for i, item := range n.Content {
			at := fmt.Sprintf("%s[%d]", path, i)
			t.lines[at] = item.Line
			v, ok := t.node(item, typ.Elem(), at, depth+1)
			if !ok {
				if item.Kind == yaml.ScalarNode && item.ShortTag() == "!!null" {
					t.problem(item.Line, "%s: is empty", at)
				}
				t.bad[at] = true
				v = reflect.Zero(typ.Elem()).Interface() // keeps the numbers of those after it
			}
			list = append(list, v)
		}
		return list, true
	case reflect.String:
		return t.str(n, path, "text")
	case reflect.Bool:
		var b bool
		if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!bool" || n.Decode(&b) != nil {
			t.problem(n.Line, "%s: want true or false", path)
			return nil, false
		}
		return b, true
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return t.integer(n, typ.Bits(), path)
	}
	t.problem(n.Line, "%s: not supported", path)
	return nil, false
}

// mapping reads a mapping with the given fields, or, without any, with free keys
// and values of type free.
func (t *tree) mapping(n *yaml.Node, path string, depth int, fields map[string]reflect.Type, free reflect.Type) (any, bool) {
	if n.Kind != yaml.MappingNode {
		t.problem(n.Line, "%s: want fields, one per line", path)
		return nil, false
	}
	m := make(map[string]any, len(n.Content)/2)
	seen := make(map[string]int, len(n.Content)/2)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if key.Kind != yaml.ScalarNode {
			t.problem(key.Line, "%s: a key must be text", path)
			continue
		}
		at := key.Value
		if path != "" {
			at = path + "." + at
		}
		if line, twice := seen[key.Value]; twice {
			t.problem(key.Line, "%s: is already in line %d", at, line)
			continue
		}
		seen[key.Value] = key.Line
		typ := free
		if fields != nil {
			known, ok := fields[key.Value]
			if !ok {
				t.problem(key.Line, "unknown field %s%s", at, suggest(key.Value, fields))
				continue
			}
			typ = known
		}
		t.lines[at] = key.Line
		before := len(*t.problems)
		if v, ok := t.node(value, typ, at, depth+1); ok {
			m[key.Value] = v
		} else {
			t.bad[at] = len(*t.problems) > before
		}
	}
	return m, true
}

// str reads text. A plain word that YAML 1.1 takes for a boolean and YAML 1.2 for
// text has to be quoted, since Kubernetes reads the former.
func (t *tree) str(n *yaml.Node, path, want string) (any, bool) {
	if n.Kind != yaml.ScalarNode {
		t.problem(n.Line, "%s: want %s", path, want)
		return nil, false
	}
	switch n.ShortTag() {
	case "!!str", "!!timestamp":
		if n.Style == 0 && slices.Contains([]string{"y", "n", "yes", "no", "on", "off"}, strings.ToLower(n.Value)) {
			t.problem(n.Line, "%s: %s is a boolean to some readers of YAML; write \"%s\"", path, n.Value, n.Value)
			return nil, false
		}
		return n.Value, true
	case "!!int", "!!float", "!!bool":
		t.problem(n.Line, "%s: want %s; write \"%s\"", path, want, n.Value)
		return nil, false
	}
	t.problem(n.Line, "%s: want %s", path, want)
	return nil, false
}

func (t *tree) integer(n *yaml.Node, bits int, path string) (any, bool) {
	var v int64
	if n.Kind != yaml.ScalarNode || n.ShortTag() != "!!int" || n.Decode(&v) != nil {
		t.problem(n.Line, "%s: want a number", path)
		return nil, false
	}
	if digits := strings.TrimLeft(n.Value, "+-"); len(digits) > 1 && digits[0] == '0' {
		t.problem(n.Line, "%s: %s is octal to some readers of YAML; write it in decimal, without leading zeros", path, n.Value)
		return nil, false
	}
	if limit := int64(1) << (bits - 1); bits < 64 && (v < -limit || v >= limit) {
		t.problem(n.Line, "%s: %s is too large", path, n.Value)
		return nil, false
	}
	return v, true
}

// fieldsOf returns the fields of a struct by their names in JSON.
func fieldsOf(typ reflect.Type) map[string]reflect.Type {
	fields := make(map[string]reflect.Type)
	for i := range typ.NumField() {
		f := typ.Field(i)
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case name == "-" || !f.IsExported():
		case name == "" && (f.Anonymous || strings.Contains(options, "inline")):
			maps.Copy(fields, fieldsOf(f.Type))
		case name != "":
			fields[name] = f.Type
		}
	}
	return fields
}

// suggest returns " (did you mean …?)" when a known field is close.
func suggest(got string, fields map[string]reflect.Type) string {
	best, name := 3, ""
	for _, f := range slices.Sorted(maps.Keys(fields)) {
		d := distance(strings.ToLower(got), strings.ToLower(f))
		if strings.EqualFold(got, f) {
			d = 0
		}
		if d < best && d < len(got) {
			best, name = d, f
		}
	}
	if name == "" {
		return ""
	}
	return " (did you mean " + name + "?)"
}

// distance is how many letters have to be added, removed or changed (Levenshtein).
func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}
