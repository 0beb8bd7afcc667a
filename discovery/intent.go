package discovery

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"time"

	"assay.dev"
)

// File is one file of intent as a person wrote it: YAML documents (JSON is YAML
// too). Name is for error messages.
type File struct {
	Name string
	YAML []byte
}

// Object is one declared object. Manifest is the whole object as JSON, so that
// a File made of it translates to the same object again.
type Object struct {
	Kind      string          // "Service", "MeshConfig", "HTTPRoute" …
	Namespace string          // never empty
	Name      string          // never empty
	Source    string          // File.Name it came from
	Line      int             // where it begins there, from 1
	Manifest  json.RawMessage // apiVersion, kind, metadata, spec; no status
}

// Translate reads files of intent, all together: an error names file and line
// and stands for all of them. It is a pure function; package kube has it.
type Translate func([]File) (Intent, []Object, error)

// Intent is everything that people declared, whatever the form it was in.
type Intent struct {
	Services   []DeclaredService
	Namespaces []assay.NamespaceConfig // one MeshConfig each; at most one per namespace
	Routes     []DeclaredRoute
	Grants     []ReferenceGrant
	Policies   []assay.TrafficPolicy // at most one for each service
	Egress     []DeclaredEgress
}

// DeclaredEgress is a rule of one namespace.
type DeclaredEgress struct {
	Namespace string
	assay.EgressRule
}

// DeclaredService is a service that somebody wrote down. Workloads belong to it
// when they are in its namespace and either match its selector or were started
// with its name (`assay run --service`).
type DeclaredService struct {
	Namespace string
	Name      string
	// Selector holds labels that a workload must have, all of them. An empty one
	// matches nothing: then only workloads started with the service's name belong.
	Selector map[string]string
	Headless bool // no virtual address: its name resolves to its endpoints
	// ClusterIPs are the virtual addresses when somebody else assigns them (the
	// Kubernetes API server); empty lets the mesh assign stable ones.
	ClusterIPs []netip.Addr
	Ports      []DeclaredPort
	// Externals, Affinity and Local are assay.Service's.
	Externals []netip.Addr
	Affinity  time.Duration
	Local     bool
	// Notes is what the mesh does not do of what the service says, for people.
	Notes []string
}

// Key returns "NAMESPACE/NAME".
func (s *DeclaredService) Key() string { return s.Namespace + "/" + s.Name }

// DeclaredPort is one port of a declared service.
type DeclaredPort struct {
	assay.Port
	Target uint16 // the workload's port; 0 means Port.Port
}

// MaxEgress bounds the rules of one namespace: each of its proxies has all of them.
const MaxEgress = 256

// Validate reports the first thing in the intent that no snapshot could hold.
// A translator has found the same with file and line before; this is what keeps
// other sources honest.
func (in *Intent) Validate() error {
	seen := map[string]bool{}
	for i := range in.Services {
		s := &in.Services[i]
		if !assay.ValidName(s.Namespace) || !assay.ValidName(s.Name) {
			return fmt.Errorf("service %q: namespace and name may hold a-z, 0-9 and '-', 63 characters at most", s.Key())
		}
		if seen[s.Key()] {
			return fmt.Errorf("service %s: declared twice", s.Key())
		}
		seen[s.Key()] = true
		if s.Headless && len(s.ClusterIPs) > 0 {
			return fmt.Errorf("service %s: is headless and has addresses of its own", s.Key())
		}
		if len(s.Ports) == 0 {
			return fmt.Errorf("service %s: has no port", s.Key())
		}
		port, name := map[uint16]bool{}, map[string]bool{}
		for _, p := range s.Ports {
			switch {
			case p.Port.Port == 0:
				return fmt.Errorf("service %s: port 0", s.Key())
			case port[p.Port.Port]:
				return fmt.Errorf("service %s: port %d twice", s.Key(), p.Port.Port)
			case p.Name != "" && name[p.Name]:
				return fmt.Errorf("service %s: port name %q twice", s.Key(), p.Name)
			case p.Name == "" && len(s.Ports) > 1:
				return fmt.Errorf("service %s: port %d has no name; each of several ports needs one", s.Key(), p.Port.Port)
			}
			port[p.Port.Port], name[p.Name] = true, true
		}
	}
	if err := in.validateRoutes(); err != nil {
		return err
	}
	if err := in.validatePolicies(); err != nil {
		return err
	}
	mesh := map[string]bool{}
	for _, n := range in.Namespaces {
		switch {
		case !assay.ValidName(n.Namespace):
			return fmt.Errorf("mesh configuration of namespace %q: not a name", n.Namespace)
		case mesh[n.Namespace]:
			return fmt.Errorf("mesh configuration of namespace %s: declared twice", n.Namespace)
		case n.Mode != assay.Observe && n.Mode != assay.Strict:
			return fmt.Errorf("mesh configuration of namespace %s: mode %q, want observe or strict", n.Namespace, n.Mode)
		}
		if n.Egress != "" && n.Egress != assay.Observe && n.Egress != assay.Strict {
			return fmt.Errorf("mesh configuration of namespace %s: egress %q, want observe or strict", n.Namespace, n.Egress)
		}
		mesh[n.Namespace] = true
	}
	rules, count := map[string]bool{}, map[string]int{}
	for i := range in.Egress {
		e := &in.Egress[i]
		key := e.Namespace + "/" + e.Name
		switch {
		case !assay.ValidName(e.Namespace) || !assay.ValidName(e.Name):
			return fmt.Errorf("egress %q: namespace and name may hold a-z, 0-9 and '-', 63 characters at most", key)
		case rules[key]:
			return fmt.Errorf("egress %s: declared twice", key)
		case len(e.Ports) == 0 || len(e.Hosts)+len(e.Addresses) == 0:
			return fmt.Errorf("egress %s: hosts or addresses, and ports, are needed", key)
		}
		for _, h := range e.Hosts {
			if !assay.ValidHost(h) {
				return fmt.Errorf("egress %s: host %q: not a name", key, h)
			}
		}
		rules[key] = true
		if count[e.Namespace]++; count[e.Namespace] > MaxEgress {
			return fmt.Errorf("namespace %s: more than %d Egress", e.Namespace, MaxEgress)
		}
	}
	return nil
}

func (in *Intent) validatePolicies() error {
	seen := map[string]bool{}
	for i := range in.Policies {
		p := &in.Policies[i]
		if !assay.ValidName(p.Namespace) || !assay.ValidName(p.Name) {
			return fmt.Errorf("traffic policy %q: namespace and name may hold a-z, 0-9 and '-', 63 characters at most", p.Key())
		}
		for _, name := range p.Services {
			if key := p.Namespace + "/" + name; !assay.ValidName(name) || seen[key] {
				return fmt.Errorf("traffic policy %s: service %q is no name, or has a policy already", p.Key(), name)
			} else {
				seen[key] = true
			}
		}
	}
	return nil
}
