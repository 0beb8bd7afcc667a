package route

import (
	"bytes"
	"slices"
	"strings"

	"assay.dev"
)

// View is what rules look at of a request.
type View struct {
	Method, Authority []byte
	Path              []byte // as it came, without the query; not beginning with '/': the request has none
	Query             []byte // without the '?'
	Fields            Fields

	scratch [128]byte
}

// Fields looks into the head of a request.
type Fields interface {
	// Field returns the value of the field with this name, which is in lower case.
	// Several are joined with ", ", in scratch as far as it lasts.
	Field(name string, scratch []byte) (value []byte, ok bool)
}

func (v *View) field(name string) ([]byte, bool) { return v.Fields.Field(name, v.scratch[:0]) }

// path is what rules compare. A request without one (CONNECT, OPTIONS *) is at the root.
func (v *View) path() []byte {
	if len(v.Path) == 0 || v.Path[0] != '/' {
		return rootPath
	}
	return v.Path
}

var rootPath = []byte("/")

// Table is the rules for the requests to one port of a service.
type Table struct {
	exact map[string][]*entry
	regex []*entry // in order of precedence
	root  node     // of the tree of prefixes
	rules int
	cors  bool // a rule has it
}

// node is one path element. Its entries have the path to it as their prefix, or, at the
// root, no path at all.
type node struct {
	entries  []*entry // in order of precedence
	children map[string]*node
	parent   *node
}

// Compile makes the table of a service's port for clients in a namespace, or nil when no
// route is for them. Routes of the client's own namespace for a service of another one
// stand in for the service's own.
func Compile(service string, port uint16, namespace string, routes []*assay.Route) *Table {
	routes = slices.DeleteFunc(slices.Clone(routes), func(r *assay.Route) bool { return r.Kind == assay.TLSRoute })
	list := ofParent(service, port, namespace, routes)
	if len(list) == 0 {
		return nil
	}
	var all []*entry
	t := &Table{exact: map[string][]*entry{}}
	for _, r := range list {
		for i := range r.Rules {
			rule := newRule(r, i, service, port)
			t.rules++
			t.cors = t.cors || rule.CORS != nil
			for j := range r.Rules[i].Matches {
				if e := newEntry(r, rule, &r.Rules[i].Matches[j], i, j); e != nil {
					all = append(all, e)
				}
			}
		}
	}
	slices.SortFunc(all, compareEntries)
	for _, e := range all {
		t.place(e)
	}
	return t
}

// ofParent returns the routes for a service's port that are for clients in a namespace.
func ofParent(service string, port uint16, namespace string, routes []*assay.Route) []*assay.Route {
	var producer, consumer []*assay.Route
	for _, r := range routes {
		for _, p := range r.Parents {
			if p.Service != service || p.Port != 0 && p.Port != port {
				continue
			}
			switch {
			case r.Producer(p):
				producer = append(producer, r)
			case r.Namespace == namespace:
				consumer = append(consumer, r)
			default:
				continue
			}
			break
		}
	}
	if len(consumer) > 0 {
		return consumer
	}
	return producer
}

func (t *Table) place(e *entry) {
	switch e.class {
	case classExact:
		t.exact[e.text] = append(t.exact[e.text], e)
	case classRegex:
		t.regex = append(t.regex, e)
	default:
		n := &t.root
		if e.method == nil {
			for part := range strings.SplitSeq(strings.Trim(e.text, "/"), "/") {
				if part == "" {
					continue // the root itself
				}
				child := n.children[part]
				if child == nil {
					child = &node{parent: n}
					if n.children == nil {
						n.children = map[string]*node{}
					}
					n.children[part] = child
				}
				n = child
			}
		}
		n.entries = append(n.entries, e)
	}
}

// Rules returns how many rules the table has.
func (t *Table) Rules() int { return t.rules }

// Match returns the rule that takes the request, nil when there is none: then the
// request is answered 404.
func (t *Table) Match(v *View) *Rule {
	if t.cors && string(v.Method) == "OPTIONS" {
		if r := t.preflight(v); r != nil {
			return r
		}
	}
	return t.match(v)
}

func (t *Table) match(v *View) *Rule {
	path := v.path()
	if len(t.exact) > 0 {
		if e := first(t.exact[string(path)], v); e != nil {
			return e.rule
		}
	}
	for _, e := range t.regex {
		if e.pattern.Match(path) && e.takes(v) {
			return e.rule
		}
	}
	for n := t.deepest(path); n != nil; n = n.parent {
		for _, e := range n.entries {
			if (e.method == nil || e.method.takes(path)) && e.takes(v) {
				return e.rule
			}
		}
	}
	return nil
}

func first(list []*entry, v *View) *entry {
	for _, e := range list {
		if e.takes(v) {
			return e
		}
	}
	return nil
}

// deepest returns the node that shares most elements with path.
func (t *Table) deepest(path []byte) *node {
	n := &t.root
	rest := path[1:]
	for n.children != nil {
		part := rest
		i := bytes.IndexByte(rest, '/')
		if i >= 0 {
			part, rest = rest[:i], rest[i+1:]
		}
		child := n.children[string(part)]
		if child == nil {
			break
		}
		n = child
		if i < 0 {
			break
		}
	}
	return n
}

// preflight returns the rule with CORS that takes the request which a browser asks leave
// for, if this is such a question and there is one.
func (t *Table) preflight(v *View) *Rule {
	if _, ok := v.field("origin"); !ok {
		return nil
	}
	asked, ok := v.field("access-control-request-method")
	if !ok {
		return nil
	}
	was := v.Method
	// The scratch that it may be in is used again.
	v.Method = append([]byte(nil), asked...)
	r := t.match(v)
	v.Method = was
	if r == nil || r.CORS == nil {
		return nil
	}
	return r
}
