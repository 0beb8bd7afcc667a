package control

import (
	"cmp"
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/identity"
	"assay.dev/store"
)

// item is one document with what it is found by.
type item struct {
	namespace, name string
	doc             any
	also            string // another name
}

// lists are the kinds of List.
var lists = map[string]func(*Control) []item{
	"services":        (*Control).listServices,
	"workloads":       (*Control).listWorkloads,
	"namespaces":      (*Control).listNamespaces,
	"meshconfigs":     (*Control).listMeshConfigs,
	"egresses":        func(c *Control) []item { return c.listObjects("Egress") },
	"httproutes":      func(c *Control) []item { return c.listObjects("HTTPRoute") },
	"tlsroutes":       func(c *Control) []item { return c.listObjects("TLSRoute") },
	"grpcroutes":      func(c *Control) []item { return c.listObjects("GRPCRoute") },
	"trafficpolicies": (*Control).listPolicies,
	"referencegrants": func(c *Control) []item { return c.listObjects("ReferenceGrant") },
	"hosts":           (*Control).listHosts,
	"certificates":    (*Control).listCertificates,
	"signals":         (*Control).listSignals,
	"edges":           (*Control).listEdges,
	"findings":        (*Control).listFindings,
	"audit":           (*Control).listAudit,
	"tokens":          (*Control).listTokens,
	"bundle":          (*Control).listBundle,
}

// List returns documents from memory.
func (c *Control) List(ctx context.Context, req *api.ListRequest) (*api.ListResponse, error) {
	list, ok := lists[req.GetKind()]
	if !ok {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "list " + cut(req.GetKind(), 64), Err: fmt.Errorf("there is no such kind"),
			Remedy: "want one of " + strings.Join(slices.Sorted(maps.Keys(lists)), ", ")}
	}
	if req.GetKind() == "signals" || req.GetKind() == "edges" {
		c.gather(ctx)
	}
	resp := &api.ListResponse{Time: api.FromTime(c.now())}
	for _, it := range list(c) {
		if req.GetNamespace() != "" && it.namespace != req.GetNamespace() || req.GetName() != "" && it.name != req.GetName() && it.also != req.GetName() {
			continue
		}
		raw, err := json.Marshal(it.doc)
		if err != nil {
			return nil, &assay.Error{Kind: assay.Internal, Op: "list " + req.GetKind(), Err: err}
		}
		resp.Items = append(resp.Items, raw)
	}
	return resp, nil
}

func (c *Control) listServices() []item {
	m := c.model
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []item
	for _, s := range m.catalog.Services() {
		v := api.ServiceView{Service: s, Declared: m.catalog.Declared(s.Key()), Ready: make([]int, len(s.Ports)), Notes: m.catalog.Notes(s.Key())}
		for _, e := range s.Endpoints {
			for i, t := range e.Targets {
				if t != 0 {
					v.Ready[i]++
				}
			}
		}
		out = append(out, item{s.Namespace, s.Name, v, ""})
	}
	if m.cluster == nil {
		return out
	}
	for _, key := range slices.Sorted(maps.Keys(m.cluster.externals)) {
		e := m.cluster.externals[key]
		v := api.ServiceView{Service: assay.Service{Namespace: e.Namespace, Name: e.Name, Ports: []assay.Port{}}, Declared: true, Ready: []int{}, Notes: e.Notes, ExternalName: e.ExternalName}
		out = append(out, item{e.Namespace, e.Name, v, ""})
	}
	return out
}

func (c *Control) listWorkloads() []item {
	m := c.model
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []item
	for _, w := range m.catalog.Workloads() {
		v := api.WorkloadView{Workload: *w, ArtifactSet: w.Artifacts.Digest(), Unproven: w.Artifacts.Unproven(), Bundle: m.acks[w.ID]}
		v.NotReady = m.notReady(w)
		v.Ready = v.NotReady == ""
		if cert, ok := m.current(w.Identity.String(), w.ID); ok {
			v.Serial, v.NotAfter = cert.Serial, cert.NotAfter
		}
		out = append(out, item{w.Namespace, w.ID, v, w.Name})
	}
	return out
}

// notReady says why a workload's proxy cannot be reached as it should.
func (m *model) notReady(w *assay.Workload) string {
	h := m.hosts[w.Host]
	switch {
	case h == nil:
		return "its host is not known"
	case h.lost:
		return "its host has been away since " + h.away.UTC().Format(time.RFC3339)
	case w.MeshedSince.IsZero():
		return "its proxy does not accept yet"
	case w.Draining:
		return "it is draining"
	}
	if cert, ok := m.current(w.Identity.String(), w.ID); !ok {
		return "it has no certificate"
	} else if !m.now().Before(cert.NotAfter) {
		return "its certificate expired"
	}
	return ""
}

func (c *Control) listNamespaces() []item {
	m := c.model
	declared := map[string]bool{}
	for _, o := range c.intent.list() {
		if o.Kind == "MeshConfig" {
			declared[o.Namespace] = true
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	workloads, services := map[string]int{}, map[string]int{}
	for _, w := range m.catalog.Workloads() {
		workloads[w.Namespace]++
	}
	for _, s := range m.catalog.Services() {
		services[s.Namespace]++
	}
	var out []item
	for _, n := range m.catalog.Namespaces() {
		out = append(out, item{n.Namespace, n.Namespace, api.NamespaceView{NamespaceConfig: n, Declared: declared[n.Namespace], Workloads: workloads[n.Namespace], Services: services[n.Namespace]}, ""})
	}
	return out
}

func (c *Control) listMeshConfigs() []item { return c.listObjects("MeshConfig") }

// listPolicies lists traffic policies; one whose services are not there is in effect
// for the others.
func (c *Control) listPolicies() []item {
	out := c.listObjects("TrafficPolicy")
	for i := range out {
		v := out[i].doc.(api.ObjectView)
		found, missing := c.model.targets(v.Namespace, v.Manifest)
		if len(missing) > 0 && v.Status.Problem == "" {
			v.Status.Problem = "TargetNotFound: there is no Service " + missing[0]
		}
		v.Status.InEffect = v.Status.InEffect && found > 0
		out[i].doc = v
	}
	return out
}

// listObjects lists the objects of intent of one kind, with what became of them.
func (c *Control) listObjects(kind string) []item {
	_, broken := c.intent.status()
	unsound := c.intent.unsound()
	var out []item
	for _, o := range c.intent.list() {
		if o.Kind != kind {
			continue
		}
		v := api.ObjectView{Kind: o.Kind, Namespace: o.Namespace, Name: o.Name, Source: o.Source, Generation: o.Generation,
			Created: o.Created, Changed: o.Changed, Manifest: o.Spec, Status: api.ObjectStatus{InEffect: true}}
		if broken != nil && o.Source == fromFolder {
			v.Status.Problem = "the folder has changed since and is not in effect: " + broken.Error()
		}
		if problem, ok := unsound[o.Key()]; ok {
			v.Status = api.ObjectStatus{Problem: problem.Text}
		} else {
			c.model.routeStatus(&v)
		}
		out = append(out, item{o.Namespace, o.Name, v, ""})
	}
	return out
}

// routeStatus adds what became of a route. One that no parent takes is not in effect.
func (m *model) routeStatus(v *api.ObjectView) {
	if k := assay.RouteKind(v.Kind); k != assay.HTTPRoute && k != assay.GRPCRoute && k != assay.TLSRoute {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	v.Status.Parents = m.routes[v.Kind+"/"+v.Namespace+"/"+v.Name]
	v.Status.InEffect = false
	for _, p := range v.Status.Parents {
		for _, c := range p.Conditions {
			switch {
			case c.Type == "Accepted" && c.Status == "True":
				v.Status.InEffect = true
			case v.Status.Problem == "" && (c.Status == "False" || c.Type == "PartiallyInvalid"):
				v.Status.Problem = c.Reason + ": " + c.Message
			}
		}
	}
}

func (c *Control) listHosts() []item {
	m := c.model
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []item
	for _, id := range slices.Sorted(maps.Keys(m.hosts)) {
		h := m.hosts[id]
		v := api.HostView{Host: h.Host.Host, Local: id == localHost, Joined: h.Joined, Seen: h.Seen, Lost: h.lost, Workloads: h.running, Bundle: h.bundle}
		if cert, ok := m.current(assay.Infrastructure(m.trustDomain, "host", id).String(), ""); ok {
			v.NotAfter = cert.NotAfter
		}
		out = append(out, item{"", id, v, ""})
	}
	return out
}

func (c *Control) listCertificates() []item {
	m := c.model
	var out []item
	for _, l := range c.authority.Certificates() {
		use := "intermediate"
		if l.Phase != "" {
			use = "root"
		}
		out = append(out, item{"", l.ID, api.CertificateView{Use: use, ID: l.ID, Subject: l.Certificate.URIs[0].String(),
			Serial: fmt.Sprintf("%032x", l.Certificate.SerialNumber), Phase: string(l.Phase), SHA256: fingerprint(l.Certificate), Current: true,
			NotBefore: l.Certificate.NotBefore, NotAfter: l.Certificate.NotAfter}, ""})
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, subject := range slices.Sorted(maps.Keys(m.certs)) {
		for _, cert := range m.certs[subject] {
			out = append(out, m.certificateItem(cert))
		}
	}
	return out
}

func (m *model) certificateItem(cert store.Certificate) item {
	v := api.CertificateView{Use: "workload", Subject: cert.Subject, Serial: cert.Serial, Issuer: cert.Issuer, Workload: cert.Workload, Host: cert.Host,
		Artifacts: cert.Artifacts, NotBefore: cert.NotBefore, NotAfter: cert.NotAfter, IssuedAt: cert.IssuedAt}
	newest, _ := m.current(cert.Subject, cert.Workload)
	v.Current = newest.Serial == cert.Serial
	namespace, name := "", cert.Subject
	if id, err := assay.ParseIdentity(cert.Subject); err == nil {
		namespace, name = id.Namespace, cert.Workload
		v.Bundle = m.acks[cert.Workload]
	} else if part := strings.Split(strings.TrimPrefix(cert.Subject, "spiffe://"), "/"); len(part) == 4 {
		v.Use, name = part[2], part[3]
		if h := m.hosts[name]; h != nil && v.Use == "host" {
			v.Bundle = h.bundle
		}
	}
	return item{namespace, name, v, ""}
}

func (c *Control) listSignals() []item {
	var out []item
	for r := range c.model.counts {
		w := r.workload
		signals := r.Signals
		if signals == nil {
			signals = []assay.Signals{}
		}
		out = append(out, item{w.Namespace, w.ID, api.SignalsView{Workload: w.ID, Namespace: w.Namespace, Name: w.Name, Service: w.Service, Host: w.Host,
			Identity: w.Identity, Started: r.Started, Received: r.received, Counted: r.Counted, Gone: r.gone, Signals: signals, Counters: r.Counters, Balance: r.Balance}, w.Name})
	}
	return out
}

func (c *Control) listEdges() []item {
	var out []item
	for _, e := range c.model.edges() {
		namespace, name, _ := strings.Cut(e.Service, "/")
		if e.Service == "" {
			namespace, name = cmp.Or(e.Server.Identity.Namespace, e.Client.Identity.Namespace), e.Server.Identity.Account
		}
		out = append(out, item{namespace, name, e, ""})
	}
	return out
}

func (c *Control) listFindings() []item {
	m := c.model
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []item
	for _, f := range slices.Backward(m.findings) {
		namespace := ""
		if w, ok := m.catalog.Workload(f.Workload); ok {
			namespace = w.Namespace
		}
		out = append(out, item{namespace, f.Kind, f, ""})
	}
	return out
}

func (c *Control) listAudit() []item {
	m := c.model
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []item
	for _, a := range slices.Backward(m.audit) {
		out = append(out, item{"", a.Call, a, ""})
	}
	return out
}

func (c *Control) listTokens() []item {
	m := c.model
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []item
	for _, id := range slices.Sorted(maps.Keys(m.tokens)) {
		out = append(out, item{"", id, m.tokens[id], ""})
	}
	return out
}

func (c *Control) listBundle() []item {
	m := c.model
	state := c.authority.State()
	v := api.BundleView{Version: state.Bundle, TrustDomain: m.trustDomain, Deadline: state.Deadline, Roots: []api.RootView{}, Behind: []api.BehindView{}}
	for _, l := range c.authority.Certificates() {
		if l.Phase != "" {
			v.Roots = append(v.Roots, api.RootView{ID: l.ID, Phase: string(l.Phase), SHA256: fingerprint(l.Certificate),
				NotBefore: l.Certificate.NotBefore, NotAfter: l.Certificate.NotAfter,
				PEM: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: l.Certificate.Raw}))})
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, t := range m.behindBundle(state) {
		b := api.BehindView{Host: t.host.ID, Version: t.version}
		if t.workload != nil {
			b.Workload = t.workload.ID
		}
		v.Behind = append(v.Behind, b)
	}
	return []item{{"", "bundle", v, ""}}
}

// behindBundle lists who has not acknowledged the newest bundle.
func (m *model) behindBundle(state identity.State) []trusting {
	var out []trusting
	for _, t := range m.live() {
		if t.version < state.Bundle {
			out = append(out, t)
		}
	}
	slices.SortFunc(out, func(a, b trusting) int {
		return cmp.Or(cmp.Compare(a.host.ID, b.host.ID), cmp.Compare(workloadID(a), workloadID(b)))
	})
	return out
}

func workloadID(t trusting) string {
	if t.workload == nil {
		return ""
	}
	return t.workload.ID
}
