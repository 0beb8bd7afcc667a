package route

import (
	"cmp"
	"slices"
	"strings"

	"assay.dev"
)

// Names is the rules for connections of TLS to one port of a service, which stay closed:
// the name that a client asks for (RFC 6066 section 3) is all that they look at.
type Names struct {
	exact map[string]*Rule
	under map[string]*Rule // by what follows the "*."
}

// CompileNames is Compile for TLSRoutes.
func CompileNames(service string, port uint16, namespace string, routes []*assay.Route) *Names {
	list := ofParent(service, port, namespace, slices.DeleteFunc(slices.Clone(routes), func(r *assay.Route) bool { return r.Kind != assay.TLSRoute }))
	if len(list) == 0 {
		return nil
	}
	// The older one has a name that two of them want.
	slices.SortFunc(list, func(a, b *assay.Route) int {
		return cmp.Or(a.Created.Compare(b.Created), strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	n := &Names{exact: map[string]*Rule{}, under: map[string]*Rule{}}
	for _, r := range list {
		if len(r.Rules) == 0 {
			continue
		}
		rule := newRule(r, 0, service, port)
		for _, h := range r.Hostnames {
			names, key := n.exact, h
			if rest, ok := strings.CutPrefix(h, "*."); ok {
				names, key = n.under, rest
			}
			if names[key] == nil {
				names[key] = rule
			}
		}
	}
	return n
}

// Match returns the rule for a name: the one that has it, or the one with the longest end
// of it; nil when there is none.
func (n *Names) Match(name string) *Rule {
	name = strings.TrimSuffix(strings.ToLower(name), ".")
	if r := n.exact[name]; r != nil {
		return r
	}
	for {
		_, rest, ok := strings.Cut(name, ".")
		if !ok {
			return nil
		}
		if r := n.under[rest]; r != nil {
			return r
		}
		name = rest
	}
}
