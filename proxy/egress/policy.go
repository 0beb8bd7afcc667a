package egress

import (
	"net/netip"
	"reflect"
	"slices"

	"assay.dev"
)

// Policy is what one workload may reach outside the mesh.
type Policy struct {
	strict bool
	rules  []assay.EgressRule // that are for this account
}

// NewPolicy makes the policy of an account in a namespace.
func NewPolicy(c *assay.NamespaceConfig, account string) *Policy {
	p := &Policy{strict: c.Egress == assay.Strict}
	for _, r := range c.Allow {
		if len(r.Accounts) == 0 || slices.Contains(r.Accounts, account) {
			p.rules = append(p.rules, r)
		}
	}
	return p
}

// Equal reports whether two policies decide alike.
func (p *Policy) Equal(q *Policy) bool {
	return p == q || p != nil && q != nil && reflect.DeepEqual(p, q)
}

// Strict reports whether what no rule allows is refused.
func (p *Policy) Strict() bool { return p.strict }

// AllowsAddr reports whether a rule holds the address itself: its names do not matter.
// Link-local addresses (the metadata services of clouds are there) are allowed in no
// other way: whoever owns an allowed name could point it at them.
func (p *Policy) AllowsAddr(a netip.AddrPort) bool {
	return slices.ContainsFunc(p.rules, func(r assay.EgressRule) bool {
		return slices.Contains(r.Ports, a.Port()) && r.AllowsAddr(a.Addr())
	})
}

// AllowsName reports whether a rule names host, for a connection to a.
func (p *Policy) AllowsName(host string, a netip.AddrPort) bool {
	if a.Addr().Unmap().IsLinkLocalUnicast() {
		return false
	}
	return slices.ContainsFunc(p.rules, func(r assay.EgressRule) bool {
		return slices.Contains(r.Ports, a.Port()) && r.AllowsHost(host)
	})
}

// maxCandidates bounds the names that are resolved to find out whose an address is.
const maxCandidates = 32

// Candidates are the names without wildcards that rules allow on a's port: where a
// client names nobody, one of them may have the address.
func (p *Policy) Candidates(a netip.AddrPort) []string {
	var out []string
	for i := range p.rules {
		r := &p.rules[i]
		if !slices.Contains(r.Ports, a.Port()) || a.Addr().Unmap().IsLinkLocalUnicast() {
			continue
		}
		for _, h := range r.Hosts {
			if h[0] != '*' && !slices.Contains(out, h) {
				if out = append(out, h); len(out) == maxCandidates {
					return out
				}
			}
		}
	}
	return out
}

// Verdict is what becomes of a connection to outside.
type Verdict uint8

const (
	Refuse  Verdict = iota // no rule is for it
	Unknown                // a rule may be: it depends on whose name the address is
	Allow
)

// Decision is a verdict and what the other end is called.
type Decision struct {
	Verdict Verdict
	Listed  bool   // a rule allows it (a policy that is not strict allows the rest too)
	Name    string // "": its address
	By      string // assay.ByDNS, BySNI … when there is a name
	// Resolve are names to be resolved when Unknown: if one of them has the address,
	// it is to be decided again with it among the names.
	Resolve []string
}

// Decide decides about a connection to a. names are those that are known to have the
// address; claim is what the client has said, spoken that it has said all it will
// before it hears something.
func (p *Policy) Decide(a netip.AddrPort, names []string, claim Claim, spoken bool) Decision {
	d := Decision{Verdict: Refuse}
	proven := claim.Name != "" && slices.Contains(names, claim.Name)
	switch {
	case claim.Name != "":
		d.Name, d.By = claim.Name, claim.By
		if proven {
			d.By = claim.By + "+" + assay.ByDNS
		}
	case len(names) > 0:
		d.Name, d.By = names[0], assay.ByDNS
	}
	listed := slices.IndexFunc(names, func(n string) bool { return p.AllowsName(n, a) })
	switch {
	case p.AllowsAddr(a):
		d.Listed = true
	case claim.Name != "":
		d.Listed = proven && p.AllowsName(claim.Name, a)
	case listed >= 0:
		// It names nobody, or has not yet: one that may be reached has this address.
		d.Listed, d.Name, d.By = true, names[listed], assay.ByDNS
	}
	switch {
	case d.Listed || !p.strict:
		d.Verdict = Allow
	case claim.Name != "" && !proven && p.AllowsName(claim.Name, a):
		d.Verdict, d.Resolve = Unknown, []string{claim.Name}
	case claim.Name == "" && !spoken:
		// The client's first word may name one that is allowed here.
		if slices.ContainsFunc(p.rules, func(r assay.EgressRule) bool { return slices.Contains(r.Ports, a.Port()) && len(r.Hosts) > 0 }) {
			d.Verdict = Unknown
		}
	case claim.Name == "":
		if d.Resolve = p.Candidates(a); len(d.Resolve) > 0 {
			d.Verdict = Unknown
		}
	}
	return d
}
