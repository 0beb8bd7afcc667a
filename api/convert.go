package api

import (
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"assay.dev"
)

// FromWorkload writes w.
func FromWorkload(w *assay.Workload) *Workload {
	return &Workload{
		Id: w.ID, Namespace: w.Namespace, Name: w.Name, Service: w.Service, Host: w.Host,
		Identity: w.Identity.String(), Addrs: fromAddrs(w.Addrs), Labels: maps.Clone(w.Labels),
		Ports: fromPorts(w.Ports), Listening: fromPorts(w.Listening), Artifacts: FromArtifacts(w.Artifacts),
		MeshedSince: FromTime(w.MeshedSince), Draining: w.Draining, Zone: w.Zone,
	}
}

// Noun reads a workload. Its identity names its own namespace and account, and it
// has at least one address.
func (m *Workload) Noun() (assay.Workload, error) {
	w, err := m.noun()
	if err != nil {
		return assay.Workload{}, fmt.Errorf("workload %q: %w", m.GetId(), err)
	}
	return w, nil
}

func (m *Workload) noun() (assay.Workload, error) {
	w := assay.Workload{
		ID: m.GetId(), Namespace: m.GetNamespace(), Name: m.GetName(), Service: m.GetService(),
		Host: m.GetHost(), Labels: maps.Clone(m.GetLabels()), Draining: m.GetDraining(), Zone: m.GetZone(),
	}
	if !ValidID(w.ID) {
		return w, errors.New("the ID may hold letters, digits, '-', '.' and '_', 128 characters at most")
	}
	if !ValidID(w.Host) {
		return w, fmt.Errorf("host %q: not an ID", w.Host)
	}
	if err := errors.Join(checkName("namespace", w.Namespace), checkName("name", w.Name)); err != nil {
		return w, err
	}
	if w.Service != "" {
		if err := checkName("service", w.Service); err != nil {
			return w, err
		}
	}
	if err := errors.Join(checkLabels(w.Labels), checkZone(w.Zone)); err != nil {
		return w, err
	}
	var err error
	if w.Identity, err = assay.ParseIdentity(m.GetIdentity()); err != nil {
		return w, err
	}
	if w.Identity.Namespace != w.Namespace || w.Identity.Account != w.Name {
		return w, fmt.Errorf("identity %s is not that of %s/%s", w.Identity, w.Namespace, w.Name)
	}
	if w.Addrs, err = addrs(m.GetAddrs()); err != nil {
		return w, err
	}
	if len(w.Addrs) == 0 {
		return w, errors.New("no address")
	}
	if w.Ports, err = ports(m.GetPorts(), false); err != nil {
		return w, err
	}
	if w.Listening, err = ports(m.GetListening(), false); err != nil {
		return w, err
	}
	if w.Artifacts, err = Artifacts(m.GetArtifacts()); err != nil {
		return w, err
	}
	w.MeshedSince, err = Time(m.GetMeshedSince())
	return w, err
}

// checkLabels holds labels to Kubernetes' lengths, so that selectors mean the same
// in both modes.
func checkLabels(labels map[string]string) error {
	if err := checkLen("labels", len(labels), maxLabels); err != nil {
		return err
	}
	for k, v := range labels {
		if len(k) == 0 || len(k) > 253+1+63 || len(v) > 63 || strings.ContainsAny(k, "= ,\n") {
			return fmt.Errorf("label %q=%q: a key has 1 to 317 characters without '=', ',' and spaces, a value 63 at most", k, v)
		}
	}
	return nil
}

// FromArtifacts writes a set in its order.
func FromArtifacts(set assay.ArtifactSet) []*Artifact {
	var out []*Artifact
	for _, a := range set {
		out = append(out, &Artifact{Kind: string(a.Kind), Name: a.Name, Digest: string(a.Digest), Unproven: a.Unproven, Evidence: string(a.Evidence),
			Config: string(a.Config), Index: string(a.Index)})
	}
	return out
}

// Artifacts reads a set.
func Artifacts(list []*Artifact) (assay.ArtifactSet, error) {
	if err := checkLen("artifacts", len(list), maxArtifacts); err != nil {
		return nil, err
	}
	var set assay.ArtifactSet
	for _, m := range list {
		d, err := assay.ParseDigest(m.GetDigest())
		if err != nil {
			return nil, fmt.Errorf("artifact %q: %w", m.GetName(), err)
		}
		if err := errors.Join(checkText("artifact's name", m.GetName()), checkText("artifact's reason", m.GetUnproven()), checkText("artifact's evidence", m.GetEvidence())); err != nil {
			return nil, err
		}
		kind := assay.ArtifactKind(m.GetKind())
		switch kind {
		case assay.Executable, assay.Tree, assay.Image:
		default:
			return nil, fmt.Errorf("artifact %q: kind %q is none of executable, tree, image", m.GetName(), kind)
		}
		a := assay.Artifact{Kind: kind, Name: m.GetName(), Digest: d, Unproven: m.GetUnproven(), Evidence: assay.Evidence(m.GetEvidence()),
			Config: assay.Digest(m.GetConfig()), Index: assay.Digest(m.GetIndex())}
		if err := checkContainment(&a); err != nil {
			return nil, fmt.Errorf("artifact %q: %w", a.Name, err)
		}
		set = append(set, a)
	}
	return set, nil
}

// checkContainment refuses what cannot be said of a manifest's configuration and index.
// Three documents have three digests; where the manifest is not known, its configuration
// stands for it, and says so.
func checkContainment(a *assay.Artifact) error {
	if a.Config == "" && a.Index == "" {
		return nil // not an image, or nobody has told them apart
	}
	for _, d := range []assay.Digest{a.Config, a.Index} {
		if _, err := assay.ParseDigest(string(d)); d != "" && err != nil {
			return err
		}
	}
	switch {
	case a.Kind != assay.Image:
		return fmt.Errorf("only an image has a configuration and an index, and its kind is %s", a.Kind)
	case a.Index == a.Digest || a.Index == a.Config:
		return fmt.Errorf("its index is said to be %s, which is its manifest or its configuration", a.Index)
	case a.Config == a.Digest && (a.Unproven == "" || a.Index != ""):
		return fmt.Errorf("its manifest is said to be %s, which is its configuration", a.Digest)
	}
	return nil
}

// FromHost writes h.
func FromHost(h *assay.Host) *Host {
	m := &Host{Id: h.ID, Name: h.Name, Prefixes: FromPrefixes(h.Prefixes), Covers: h.Covers, Ready: h.Ready, Zone: h.Zone, Addrs: fromAddrs(h.Addrs)}
	if h.Advertise.IsValid() {
		m.Advertise = h.Advertise.Unmap().AsSlice()
	}
	if h.Advertise6.IsValid() {
		m.Advertise6 = h.Advertise6.AsSlice()
	}
	return m
}

// Noun reads a host.
func (m *Host) Noun() (assay.Host, error) {
	h := assay.Host{ID: m.GetId(), Name: m.GetName(), Covers: m.GetCovers(), Ready: m.GetReady(), Zone: m.GetZone()}
	var err error
	if !ValidID(h.ID) {
		return assay.Host{}, fmt.Errorf("host %q: not an ID", h.ID)
	}
	if h.Name, err = HostName(h.Name); err != nil {
		return assay.Host{}, fmt.Errorf("host %s: %w", h.ID, err)
	}
	if err := checkZone(h.Zone); err != nil {
		return assay.Host{}, fmt.Errorf("host %s: %w", h.ID, err)
	}
	if h.Addrs, err = addrs(m.GetAddrs()); err != nil {
		return assay.Host{}, fmt.Errorf("host %s: %w", h.ID, err)
	}
	if h.Advertise, err = Advertise(m.GetAdvertise()); err != nil {
		return assay.Host{}, fmt.Errorf("host %s: advertised %w", h.ID, err)
	}
	if h.Advertise6, err = Advertise(m.GetAdvertise6()); err != nil {
		return assay.Host{}, fmt.Errorf("host %s: advertised %w", h.ID, err)
	}
	if h.Prefixes, err = Prefixes(m.GetPrefixes()); err != nil {
		return assay.Host{}, fmt.Errorf("host %s: %w", h.ID, err)
	}
	if err := checkLen("patterns", len(h.Covers), maxCovers); err != nil {
		return assay.Host{}, fmt.Errorf("host %s: %w", h.ID, err)
	}
	for _, c := range h.Covers {
		if !ValidCover(c) {
			return assay.Host{}, fmt.Errorf("host %s: covers %q, want NAMESPACE/SERVICE", h.ID, c)
		}
	}
	return h, nil
}

// Advertise reads the address that other hosts can route to; no bytes is none.
func Advertise(b []byte) (a netip.Addr, err error) {
	if len(b) == 0 {
		return a, nil
	}
	return addr(b)
}

// HostName checks what a host calls itself: it is shown, never trusted.
func HostName(s string) (string, error) {
	if len(s) > 253 {
		return "", fmt.Errorf("host name of %d characters, at most 253", len(s))
	}
	for _, r := range s {
		if r < 0x21 || r > 0x7e {
			return "", fmt.Errorf("host name %q: may hold printable ASCII only", s)
		}
	}
	return s, nil
}

// FromNamespaceConfig writes c.
func FromNamespaceConfig(c *assay.NamespaceConfig) *NamespaceConfig {
	m := &NamespaceConfig{Namespace: c.Namespace, Mode: string(c.Mode), ExcludedPorts: fromPorts(c.ExcludedPorts), Egress: string(c.Egress), AccessLog: uint32(c.AccessLog), Traces: c.Traces}
	for i := range c.Allow {
		m.Allow = append(m.Allow, fromEgressRule(&c.Allow[i]))
	}
	return m
}

// Noun reads a namespace's configuration.
func (m *NamespaceConfig) Noun() (assay.NamespaceConfig, error) {
	c := assay.NamespaceConfig{Namespace: m.GetNamespace(), Mode: assay.Mode(m.GetMode()), AccessLog: int(min(m.GetAccessLog(), 1_000_000)), Traces: m.GetTraces()}
	if err := checkName("namespace", c.Namespace); err != nil {
		return assay.NamespaceConfig{}, err
	}
	if c.Mode != assay.Observe && c.Mode != assay.Strict {
		return assay.NamespaceConfig{}, fmt.Errorf("namespace %s: mode %q, want observe or strict", c.Namespace, c.Mode)
	}
	var err error
	if c.ExcludedPorts, err = ports(m.GetExcludedPorts(), false); err != nil {
		return assay.NamespaceConfig{}, fmt.Errorf("namespace %s: excluded %w", c.Namespace, err)
	}
	if c.Egress = assay.Mode(m.GetEgress()); c.Egress != "" && c.Egress != assay.Observe && c.Egress != assay.Strict {
		return assay.NamespaceConfig{}, fmt.Errorf("namespace %s: egress %q, want observe or strict", c.Namespace, c.Egress)
	}
	if err := checkLen("egress rules", len(m.GetAllow()), maxEgress); err != nil {
		return assay.NamespaceConfig{}, fmt.Errorf("namespace %s: %w", c.Namespace, err)
	}
	for _, r := range m.GetAllow() {
		rule, err := r.noun()
		if err != nil {
			return assay.NamespaceConfig{}, fmt.Errorf("namespace %s: egress rule %q: %w", c.Namespace, r.GetName(), err)
		}
		c.Allow = append(c.Allow, rule)
	}
	return c, nil
}

func fromEgressRule(r *assay.EgressRule) *EgressRule {
	return &EgressRule{Name: r.Name, Accounts: r.Accounts, Hosts: r.Hosts, Addresses: FromPrefixes(r.Addresses), Ports: fromPorts(r.Ports)}
}

func (m *EgressRule) noun() (assay.EgressRule, error) {
	r := assay.EgressRule{Name: m.GetName(), Accounts: m.GetAccounts(), Hosts: m.GetHosts()}
	if err := errors.Join(checkLen("accounts", len(r.Accounts), maxCovers), checkLen("hosts", len(r.Hosts), maxCovers),
		checkLen("addresses", len(m.GetAddresses()), maxCovers), checkName("name", r.Name)); err != nil {
		return r, err
	}
	for _, h := range r.Hosts {
		if !assay.ValidHost(h) {
			return r, fmt.Errorf("host %q: not a name", h)
		}
	}
	for _, a := range m.GetAddresses() {
		p, err := netip.ParsePrefix(a)
		if err != nil {
			return r, err
		}
		r.Addresses = append(r.Addresses, p.Masked())
	}
	var err error
	r.Ports, err = ports(m.GetPorts(), false)
	return r, err
}

// FromService writes s.
func FromService(s *assay.Service) *Service {
	m := &Service{Namespace: s.Namespace, Name: s.Name, Vips: fromAddrs(s.VIPs), Headless: s.Headless, Externals: fromAddrs(s.Externals),
		AffinitySeconds: int64(s.Affinity / time.Second), Local: s.Local}
	for _, p := range s.Ports {
		m.Ports = append(m.Ports, &Port{Name: p.Name, Port: uint32(p.Port), Protocol: string(p.Protocol), ProxyProtocol: p.ProxyProtocol, ForwardClientCert: p.ForwardClientCert, NodePort: uint32(p.NodePort)})
	}
	for _, e := range s.Endpoints {
		m.Endpoints = append(m.Endpoints, &Endpoint{Workload: e.Workload, Identity: e.Identity.String(), Addrs: fromAddrs(e.Addrs), Targets: fromPorts(e.Targets),
			Zone: e.Zone, Zones: e.Zones, Hosts: e.Hosts, Host: e.Host})
	}
	if s.Policy != nil {
		b, err := json.Marshal(s.Policy)
		if err != nil {
			panic("api: a policy that is no JSON: " + err.Error()) // it has plain fields alone
		}
		m.Policy = b
	}
	return m
}

// Noun reads a service: distinct ports, and for every endpoint as many targets.
func (m *Service) Noun() (assay.Service, error) {
	s, err := m.noun()
	if err != nil {
		return assay.Service{}, fmt.Errorf("service %q/%q: %w", m.GetNamespace(), m.GetName(), err)
	}
	return s, nil
}

func (m *Service) noun() (assay.Service, error) {
	s := assay.Service{Namespace: m.GetNamespace(), Name: m.GetName(), Headless: m.GetHeadless(), Local: m.GetLocal()}
	if err := errors.Join(checkName("namespace", s.Namespace), checkName("name", s.Name),
		checkLen("ports", len(m.GetPorts()), maxPorts), checkLen("endpoints", len(m.GetEndpoints()), maxEndpoints)); err != nil {
		return s, err
	}
	var err error
	if s.VIPs, err = addrs(m.GetVips()); err != nil {
		return s, err
	}
	if s.Externals, err = addrs(m.GetExternals()); err != nil {
		return s, err
	}
	if n := m.GetAffinitySeconds(); n < 0 || n > maxAffinity {
		return s, fmt.Errorf("affinity of %d s", n)
	}
	s.Affinity = time.Duration(m.GetAffinitySeconds()) * time.Second
	if s.Headless && len(s.VIPs) > 0 {
		return s, errors.New("headless, but has addresses of its own")
	}
	seen := map[uint32]bool{}
	for _, p := range m.GetPorts() {
		proto, err := protocol(p.GetProtocol())
		if err != nil {
			return s, err
		}
		if p.GetPort() == 0 || p.GetPort() > 65535 || p.GetNodePort() > 65535 || seen[p.GetPort()] || len(p.GetName()) > 63 {
			return s, fmt.Errorf("port %q %d: zero, too large or there twice", p.GetName(), p.GetPort())
		}
		seen[p.GetPort()] = true
		s.Ports = append(s.Ports, assay.Port{Name: p.GetName(), Port: uint16(p.GetPort()), Protocol: proto, ProxyProtocol: p.GetProxyProtocol(), ForwardClientCert: p.GetForwardClientCert(), NodePort: uint16(p.GetNodePort())})
	}
	for _, m := range m.GetEndpoints() {
		e, err := m.noun(len(s.Ports))
		if err != nil {
			return s, fmt.Errorf("endpoint %q: %w", m.GetWorkload(), err)
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	if b := m.GetPolicy(); len(b) > 0 {
		if len(b) > maxPolicy {
			return s, fmt.Errorf("policy of %d bytes", len(b))
		}
		s.Policy = new(assay.TrafficPolicy)
		if err := json.Unmarshal(b, s.Policy); err != nil {
			return s, fmt.Errorf("policy: %w", err)
		}
	}
	return s, nil
}

// maxPolicy bounds the JSON of a service's policy.
const maxPolicy = 64 << 10

func (m *Endpoint) noun(want int) (e assay.Endpoint, err error) {
	e.Workload, e.Zone, e.Zones, e.Hosts, e.Host = m.GetWorkload(), m.GetZone(), m.GetZones(), m.GetHosts(), m.GetHost()
	if err := errors.Join(checkLen("zones", len(e.Zones), maxZones), checkLen("hosts", len(e.Hosts), maxZones)); err != nil {
		return e, err
	}
	for _, id := range append([]string{e.Host}, e.Hosts...) {
		if id != "" && !ValidID(id) {
			return e, fmt.Errorf("host %q: not an ID", id)
		}
	}
	for _, zone := range append([]string{e.Zone}, e.Zones...) {
		if err := checkZone(zone); err != nil {
			return e, err
		}
	}
	if plain := m.GetIdentity() == ""; !ValidID(e.Workload) && !(plain && e.Workload == "") {
		return e, errors.New("not a workload's ID")
	} else if !plain {
		if e.Identity, err = assay.ParseIdentity(m.GetIdentity()); err != nil {
			return e, err
		}
	}
	if e.Addrs, err = addrs(m.GetAddrs()); err != nil {
		return e, err
	}
	if e.Targets, err = ports(m.GetTargets(), true); err != nil {
		return e, err
	}
	if len(e.Targets) != want || len(e.Addrs) == 0 {
		return e, fmt.Errorf("%d targets and %d addresses for %d ports", len(e.Targets), len(e.Addrs), want)
	}
	return e, nil
}

// FromRoute writes r.
func FromRoute(r *assay.Route) *Route {
	b, err := json.Marshal(r)
	if err != nil {
		panic("api: a route that is no JSON: " + err.Error()) // it has plain fields alone
	}
	return &Route{Json: b}
}

// Noun reads a route.
func (m *Route) Noun() (assay.Route, error) {
	if err := checkLen("bytes of a route", len(m.GetJson()), maxRoute); err != nil {
		return assay.Route{}, err
	}
	var r assay.Route
	if err := json.Unmarshal(m.GetJson(), &r); err != nil {
		return assay.Route{}, fmt.Errorf("route: %w", err)
	}
	return r, r.Validate()
}

// FromFinding writes f.
func FromFinding(f *assay.Finding) *Finding {
	return &Finding{Time: FromTime(f.Time), Workload: f.Workload, Kind: f.Kind, Subject: f.Subject, Detail: f.Detail, Remedy: f.Remedy}
}

// Noun reads a finding.
func (m *Finding) Noun() (assay.Finding, error) {
	f := assay.Finding{Workload: m.GetWorkload(), Kind: m.GetKind(), Subject: m.GetSubject(), Detail: m.GetDetail(), Remedy: m.GetRemedy()}
	var err error
	if f.Time, err = Time(m.GetTime()); err != nil {
		return assay.Finding{}, fmt.Errorf("finding: %w", err)
	}
	if f.Workload != "" && !ValidID(f.Workload) {
		return assay.Finding{}, fmt.Errorf("finding: workload %q: not an ID", f.Workload)
	}
	if !assay.ValidName(f.Kind) {
		return assay.Finding{}, fmt.Errorf("finding: kind %q: may hold a-z, 0-9 and '-'", f.Kind)
	}
	return f, errors.Join(checkText("finding's subject", f.Subject), checkText("finding's detail", f.Detail), checkText("finding's remedy", f.Remedy))
}

// FromBundle writes roots in DER.
func FromBundle(version uint64, roots [][]byte) *Bundle {
	return &Bundle{Version: version, Roots: roots}
}

// Certificates reads the roots: CA certificates, at least one.
func (m *Bundle) Certificates() ([]*x509.Certificate, error) {
	if n := len(m.GetRoots()); n == 0 || n > maxRoots {
		return nil, fmt.Errorf("trust bundle %d: %d roots, want 1 to %d", m.GetVersion(), n, maxRoots)
	}
	var out []*x509.Certificate
	for _, der := range m.GetRoots() {
		if len(der) > maxDER {
			return nil, fmt.Errorf("trust bundle %d: a root of %d bytes", m.GetVersion(), len(der))
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("trust bundle %d: %w", m.GetVersion(), err)
		}
		if !c.IsCA || !c.BasicConstraintsValid {
			return nil, fmt.Errorf("trust bundle %d: %s is not a CA", m.GetVersion(), c.Subject)
		}
		out = append(out, c)
	}
	return out, nil
}

// Report is what one proxy has counted since it started.
type Report struct {
	Workload string
	Started  time.Time
	Signals  []assay.Signals
	Counters assay.Counters
	Balance  *assay.Balance // of the workload's link; nil: not kept
	Counted  time.Time      // when the proxy answered, by the agent's clock
}

// ReportUpdate is a report as a host sends it.
func ReportUpdate(r *WorkloadReport) *HostUpdate {
	b, err := proto.Marshal(r)
	if err != nil {
		panic("api: a report that cannot be encoded: " + err.Error()) // its text was read as UTF-8
	}
	return &HostUpdate{Update: &HostUpdate_Report{Report: b}}
}

// ReportOf returns the ID of the workload that an encoded WorkloadReport is of, and reads
// nothing else of it; "" when there is none.
func ReportOf(encoded []byte) string {
	const workloadID = 1 // its number in WorkloadReport
	for len(encoded) > 0 {
		number, kind, n := protowire.ConsumeTag(encoded)
		if n < 0 {
			return ""
		}
		encoded = encoded[n:]
		if number == workloadID && kind == protowire.BytesType {
			if v, n := protowire.ConsumeBytes(encoded); n >= 0 && ValidID(string(v)) {
				return string(v)
			}
			return ""
		}
		if n = protowire.ConsumeFieldValue(number, kind, encoded); n < 0 {
			return ""
		}
		encoded = encoded[n:]
	}
	return ""
}

// ReadReport reads an encoded WorkloadReport.
func ReadReport(encoded []byte) (Report, error) {
	var m WorkloadReport
	if err := proto.Unmarshal(encoded, &m); err != nil {
		return Report{}, fmt.Errorf("report: %w", err)
	}
	return m.Noun()
}

// FromReport writes r.
func FromReport(r *Report) *WorkloadReport {
	m := &WorkloadReport{
		WorkloadId: r.Workload, Started: FromTime(r.Started), Handshakes: r.Counters.Handshakes,
		HandshakeFailures: r.Counters.HandshakeFailures, Detections: r.Counters.Detections, Refusals: r.Counters.Refusals,
		Balance: fromBalance(r.Balance), Counted: FromTime(r.Counted),
	}
	for _, d := range r.Counters.Decisions {
		m.Decisions = append(m.Decisions, &Decided{Service: d.Service, Decision: d.Decision, Count: d.Count})
	}
	for _, u := range r.Counters.Unfit {
		m.Unfit = append(m.Unfit, &Unfit{Service: u.Service, Workload: u.Workload, Addr: u.Addr, Ejected: u.Ejected, Why: u.Why, Until: FromTime(u.Until)})
	}
	for i := range r.Signals {
		m.Signals = append(m.Signals, fromSignals(&r.Signals[i]))
	}
	return m
}

func fromSignals(s *assay.Signals) *Signals {
	m := &Signals{
		Direction: string(s.Direction), Peer: s.Peer.String(), PeerArtifacts: string(s.PeerArtifacts),
		Service: s.Service, Port: uint32(s.Port), Protocol: string(s.Protocol), Security: string(s.Security), Reason: s.Reason, Remote: s.Remote, RemoteBy: s.RemoteBy,
		Requests: s.Requests, Failures: s.Failures, Opened: s.Opened, BytesIn: s.BytesIn, BytesOut: s.BytesOut,
		Open: s.Open, InFlight: s.InFlight, LatencySum: int64(s.Latency.Sum),
		FirstSeen: FromTime(s.FirstSeen), LastSeen: FromTime(s.LastSeen), PacketsIn: s.PacketsIn, PacketsOut: s.PacketsOut,
		Grpc: s.GRPC, MessagesIn: s.MessagesIn, MessagesOut: s.MessagesOut,
	}
	for i := len(s.Latency.Buckets) - 1; i >= 0; i-- { // trailing zeros are not sent
		if s.Latency.Buckets[i] != 0 {
			m.Latency = append(m.Latency, s.Latency.Buckets[:i+1]...)
			break
		}
	}
	return m
}

// Noun reads a report.
func (m *WorkloadReport) Noun() (Report, error) {
	r := Report{Workload: m.GetWorkloadId(), Counters: assay.Counters{
		Handshakes: m.GetHandshakes(), HandshakeFailures: m.GetHandshakeFailures(), Detections: m.GetDetections(), Refusals: m.GetRefusals(),
	}}
	if !ValidID(r.Workload) {
		return Report{}, fmt.Errorf("report of workload %q: not an ID", r.Workload)
	}
	if err := checkLen("signals", len(m.GetSignals()), maxSignals); err != nil {
		return Report{}, fmt.Errorf("report of workload %s: %w", r.Workload, err)
	}
	for _, c := range []map[string]uint64{r.Counters.HandshakeFailures, r.Counters.Detections, r.Counters.Refusals} {
		if err := checkLen("counters", len(c), maxCounters); err != nil {
			return Report{}, fmt.Errorf("report of workload %s: %w", r.Workload, err)
		}
		for name := range c {
			if len(name) > 256 {
				return Report{}, fmt.Errorf("report of workload %s: a counter's name of %d bytes", r.Workload, len(name))
			}
		}
	}
	if err := r.resilience(m); err != nil {
		return Report{}, fmt.Errorf("report of workload %s: %w", r.Workload, err)
	}
	var err error
	if r.Started, err = Time(m.GetStarted()); err != nil {
		return Report{}, fmt.Errorf("report of workload %s: %w", r.Workload, err)
	}
	if r.Counted, err = Time(m.GetCounted()); err != nil {
		return Report{}, fmt.Errorf("report of workload %s: %w", r.Workload, err)
	}
	for _, s := range m.GetSignals() {
		v, err := s.noun()
		if err != nil {
			return Report{}, fmt.Errorf("report of workload %s: %w", r.Workload, err)
		}
		r.Signals = append(r.Signals, v)
	}
	if r.Balance, err = m.GetBalance().noun(); err != nil {
		return Report{}, fmt.Errorf("report of workload %s: %w", r.Workload, err)
	}
	return r, nil
}

func (m *Signals) noun() (s assay.Signals, err error) {
	s = assay.Signals{
		SignalKey: assay.SignalKey{
			Direction: assay.Direction(m.GetDirection()), Service: m.GetService(), Port: uint16(m.GetPort()),
			Security: assay.Security(m.GetSecurity()), Reason: m.GetReason(), Remote: m.GetRemote(), RemoteBy: m.GetRemoteBy(),
		},
		Requests: m.GetRequests(), Failures: m.GetFailures(), Opened: m.GetOpened(), BytesIn: m.GetBytesIn(), BytesOut: m.GetBytesOut(),
		Open: m.GetOpen(), InFlight: m.GetInFlight(), Latency: assay.Latency{Sum: time.Duration(m.GetLatencySum())},
		PacketsIn: m.GetPacketsIn(), PacketsOut: m.GetPacketsOut(),
		GRPC: m.GetGrpc(), MessagesIn: m.GetMessagesIn(), MessagesOut: m.GetMessagesOut(),
	}
	for name := range s.GRPC {
		if !assay.IsGRPCCode(name) {
			return s, fmt.Errorf("signals of %q: gRPC status %q", s.Service, name)
		}
	}
	if s.Direction != assay.Inbound && s.Direction != assay.Outbound {
		return s, fmt.Errorf("signals: direction %q", s.Direction)
	}
	if s.Security != assay.MutualTLS && s.Security != assay.Plaintext {
		return s, fmt.Errorf("signals: security %q", s.Security)
	}
	if m.GetPort() > 65535 || len(s.Service) > 2*63+1 || len(s.Reason) > 256 || len(s.Remote) > 512 || len(s.RemoteBy) > 64 || len(m.GetLatency()) > assay.LatencyBuckets {
		return s, fmt.Errorf("signals of %q: port, service, reason or histogram out of bounds", s.Service)
	}
	copy(s.Latency.Buckets[:], m.GetLatency())
	if s.Peer, err = identity(m.GetPeer()); err != nil {
		return s, err
	}
	if m.GetPeerArtifacts() != "" {
		if s.PeerArtifacts, err = assay.ParseDigest(m.GetPeerArtifacts()); err != nil {
			return s, err
		}
	}
	if s.Protocol, err = counted(m.GetProtocol()); err != nil {
		return s, err
	}
	if s.FirstSeen, err = Time(m.GetFirstSeen()); err != nil {
		return s, err
	}
	s.LastSeen, err = Time(m.GetLastSeen())
	return s, err
}

// resilience reads what a proxy decided, and which endpoints it finds wanting.
func (r *Report) resilience(m *WorkloadReport) error {
	if err := errors.Join(checkLen("decisions", len(m.GetDecisions()), maxDecisions), checkLen("unfit endpoints", len(m.GetUnfit()), assay.MaxUnfit)); err != nil {
		return err
	}
	for _, d := range m.GetDecisions() {
		if len(d.GetService()) > 2*63+1 || len(d.GetDecision()) > 64 {
			return errors.New("a decision with a name that is too long")
		}
		r.Counters.Decisions = append(r.Counters.Decisions, assay.Decided{Service: d.GetService(), Decision: d.GetDecision(), Count: d.GetCount()})
	}
	for _, u := range m.GetUnfit() {
		until, err := Time(u.GetUntil())
		if err != nil || len(u.GetService()) > 2*63+1 || len(u.GetAddr()) > 64 || len(u.GetWhy()) > 256 || u.GetAddr() != assay.WholeService && !ValidID(u.GetWorkload()) {
			return errors.New("an unfit endpoint that is none")
		}
		r.Counters.Unfit = append(r.Counters.Unfit, assay.Unfit{
			Service: u.GetService(), Workload: u.GetWorkload(), Addr: u.GetAddr(), Ejected: u.GetEjected(), Why: u.GetWhy(), Until: until,
		})
	}
	return nil
}
