package route

import (
	"bytes"
	"cmp"
	"regexp"
	"strings"

	"assay.dev"
)

// Classes of path conditions, the later the stronger. The Gateway API leaves the place of
// regular expressions open: they say more than a prefix and less than a whole path.
const (
	classPrefix = iota
	classRegex
	classExact
)

// entry is one match of a rule, compiled.
type entry struct {
	rule    *Rule
	class   int
	text    string // path, prefix or pattern
	pattern *regexp.Regexp
	method  *methodMatch // instead of a path
	grpc    bool         // takes gRPC alone
	verb    string
	headers []condition
	query   []condition
	order   order
}

// order is what two matches are compared by, the first field first.
type order struct {
	class    int
	length   int // characters of the path, prefix or pattern; of a service of gRPC
	method   int // characters of a method of gRPC without a service
	verb     int
	headers  int
	query    int
	created  int64
	name     string
	kind     assay.RouteKind
	rule, at int // within the route
}

func compareEntries(a, b *entry) int {
	x, y := &a.order, &b.order
	return cmp.Or(
		-cmp.Compare(x.class, y.class), -cmp.Compare(x.length, y.length), -cmp.Compare(x.method, y.method), -cmp.Compare(x.verb, y.verb),
		-cmp.Compare(x.headers, y.headers), -cmp.Compare(x.query, y.query),
		cmp.Compare(x.created, y.created), strings.Compare(x.name, y.name), cmp.Compare(x.kind, y.kind),
		cmp.Compare(x.rule, y.rule), cmp.Compare(x.at, y.at))
}

// newEntry compiles a match. One that cannot be, which control does not send, is nil: it
// takes nothing.
func newEntry(r *assay.Route, rule *Rule, m *assay.RouteMatch, index, at int) *entry {
	e := &entry{rule: rule, text: m.Path.Value, verb: m.Method, grpc: r.Kind == assay.GRPCRoute}
	ok := true
	switch m.Path.Type {
	case assay.PathExact:
		e.class = classExact
	case assay.PathRegex:
		e.class = classRegex
		e.pattern, ok = compilePattern(m.Path.Value)
	case assay.GRPCMethod:
		e.method, e.text = &methodMatch{name: m.Path.Value}, "/"
		e.order.method = len(m.Path.Value)
	case assay.GRPCMethodRegex:
		e.method, e.text = new(methodMatch), "/"
		e.method.pattern, ok = compilePattern(m.Path.Value)
		e.order.method = len(m.Path.Value)
	case assay.PathPrefix:
		e.text = "/" + strings.Trim(m.Path.Value, "/")
	default:
		ok = false
	}
	for _, h := range m.Headers {
		c, good := newCondition(h)
		e.headers, ok = append(e.headers, c), ok && good
	}
	for _, q := range m.Query {
		c, good := newCondition(q)
		e.query, ok = append(e.query, c), ok && good
	}
	if !ok {
		return nil
	}
	o := &e.order
	o.class, o.length, o.headers, o.query = e.class, len(e.text), len(e.headers), len(e.query)
	if e.verb != "" {
		o.verb = 1
	}
	o.created, o.name, o.kind, o.rule, o.at = r.Created.Unix(), r.Namespace+"/"+r.Name, r.Kind, index, at
	return e
}

func compilePattern(pattern string) (*regexp.Regexp, bool) {
	whole, err := assay.CompileRegex(pattern)
	if err != nil {
		return nil, false
	}
	re, err := regexp.Compile(whole)
	return re, err == nil
}

// takes reports whether everything but the path fits.
func (e *entry) takes(v *View) bool {
	if e.verb != "" && string(v.Method) != e.verb {
		return false
	}
	if e.grpc && !isGRPC(v) {
		return false
	}
	for i := range e.headers {
		c := &e.headers[i]
		value, ok := v.field(c.name)
		if !ok || !c.fits(value) {
			return false
		}
	}
	for i := range e.query {
		c := &e.query[i]
		value, ok := parameter(v.Query, c.name)
		if !ok {
			return false
		}
		if value, ok = unescape(value, v.scratch[:0]); !ok || !c.fits(value) {
			return false
		}
	}
	return true
}

// isGRPC reports whether the request is gRPC's by its content type.
func isGRPC(v *View) bool {
	const grpc = "application/grpc"
	value, ok := v.field("content-type")
	return ok && len(value) >= len(grpc) && string(value[:len(grpc)]) == grpc
}

// methodMatch takes /SERVICE/METHOD of any service.
type methodMatch struct {
	name    string
	pattern *regexp.Regexp
}

func (m *methodMatch) takes(path []byte) bool {
	_, method, ok := bytes.Cut(path[1:], []byte("/"))
	switch {
	case !ok:
		return false
	case m.pattern != nil:
		return m.pattern.Match(method)
	}
	return string(method) == m.name
}

// condition is one for a field or a parameter.
type condition struct {
	name, value string
	pattern     *regexp.Regexp
}

func newCondition(m assay.ValueMatch) (condition, bool) {
	c := condition{name: m.Name, value: m.Value}
	ok := true
	if m.Regex {
		c.pattern, ok = compilePattern(m.Value)
	}
	return c, ok
}

func (c *condition) fits(value []byte) bool {
	if c.pattern != nil {
		return c.pattern.Match(value)
	}
	return string(value) == c.value
}

// parameter returns the first value of a parameter of the query, as it came.
func parameter(query []byte, name string) ([]byte, bool) {
	for len(query) > 0 {
		part := query
		if i := bytes.IndexByte(query, '&'); i >= 0 {
			part, query = query[:i], query[i+1:]
		} else {
			query = nil
		}
		key, value := part, []byte(nil)
		if i := bytes.IndexByte(part, '='); i >= 0 {
			key, value = part[:i], part[i+1:]
		}
		if sameParameter(key, name) {
			return value, true
		}
	}
	return nil, false
}

// sameParameter compares a parameter's name as it came with a name.
func sameParameter(key []byte, name string) bool {
	n := 0
	for i := 0; i < len(key); n++ {
		c, next := decoded(key, i)
		if next == 0 || n == len(name) || c != name[n] {
			return false
		}
		i = next
	}
	return n == len(name)
}

// unescape undoes the encoding of a query, in scratch when there is any.
func unescape(b, scratch []byte) ([]byte, bool) {
	if bytes.IndexByte(b, '%') < 0 && bytes.IndexByte(b, '+') < 0 {
		return b, true
	}
	for i := 0; i < len(b); {
		c, next := decoded(b, i)
		if next == 0 {
			return nil, false
		}
		scratch, i = append(scratch, c), next
	}
	return scratch, true
}

// decoded returns the byte that begins at b[i] and where the next one does; 0 is a broken
// encoding.
func decoded(b []byte, i int) (c byte, next int) {
	switch b[i] {
	case '+':
		return ' ', i + 1
	case '%':
		if i+2 >= len(b) {
			return 0, 0
		}
		high, low := unhex(b[i+1]), unhex(b[i+2])
		if high > 15 || low > 15 {
			return 0, 0
		}
		return high<<4 | low, i + 3
	}
	return b[i], i + 1
}

func unhex(c byte) byte {
	switch {
	case '0' <= c && c <= '9':
		return c - '0'
	case 'a' <= c|0x20 && c|0x20 <= 'f':
		return c | 0x20 - 'a' + 10
	}
	return 255
}
