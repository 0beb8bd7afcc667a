package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/store"
)

// kind is what `assay get` can list.
type kind struct {
	list   string   // as control calls it
	names  []string // what people may type besides
	object string   // what `assay delete` calls it; "" when it cannot be deleted
	write  func(w io.Writer, items [][]byte, wide bool, now time.Time) error
}

// kinds are in the order of help.
var kinds = []kind{
	{"services", []string{"service", "svc"}, "Service", tableOf(serviceColumns)},
	{"workloads", []string{"workload", "wl"}, "", tableOf(workloadColumns)},
	{"namespaces", []string{"namespace", "ns"}, "", tableOf(namespaceColumns)},
	{"meshconfigs", []string{"meshconfig", "mc"}, "MeshConfig", tableOf(meshConfigColumns)},
	{"egresses", []string{"egress"}, "Egress", tableOf(egressColumns)},
	{"trafficpolicies", []string{"trafficpolicy", "tp"}, "TrafficPolicy", tableOf(policyColumns)},
	{"httproutes", []string{"httproute"}, "HTTPRoute", tableOf(routeColumns)},
	{"grpcroutes", []string{"grpcroute"}, "GRPCRoute", tableOf(routeColumns)},
	{"tlsroutes", []string{"tlsroute"}, "TLSRoute", tableOf(routeColumns)},
	{"referencegrants", []string{"referencegrant", "refgrant"}, "ReferenceGrant", tableOf(objectColumns)},
	{"hosts", []string{"host"}, "host", tableOf(hostColumns)},
	{"certificates", []string{"certificate", "cert", "certs"}, "certificate", tableOf(certificateColumns)},
	{"bundle", nil, "", tableOf(bundleColumns)},
	{"edges", []string{"edge"}, "", tableOf(edgeTotalColumns)},
	{"signals", []string{"signal"}, "", tableOf(signalColumns)},
	{"findings", []string{"finding"}, "", tableOf(findingColumns)},
	{"tokens", []string{"token"}, "token", tableOf(tokenColumns)},
	{"audit", nil, "", tableOf(auditColumns)},
}

func kindNames() string {
	var names []string
	for _, k := range kinds {
		names = append(names, k.list)
	}
	return strings.Join(names, ", ")
}

// findKind reads a kind as people type it.
func findKind(name string) (kind, error) {
	typed := strings.ToLower(name)
	for _, k := range kinds {
		if typed == k.list || slices.Contains(k.names, typed) {
			return k, nil
		}
	}
	return kind{}, &assay.Error{Kind: assay.Invalid, Op: "read arguments", Err: fmt.Errorf("there is no kind %q", name), Remedy: "want one of " + kindNames()}
}

func tableOf[T any](columns []column[T]) func(io.Writer, [][]byte, bool, time.Time) error {
	return func(w io.Writer, items [][]byte, wide bool, now time.Time) error {
		docs, err := decode[T](items)
		if err != nil {
			return err
		}
		return writeTable(w, columns, docs, wide, now)
	}
}

func col[T any](head string, cell func(T) string) column[T] {
	return column[T]{head: head, cell: func(doc T, _ time.Time) string { return cell(doc) }}
}

func wide[T any](head string, cell func(T) string) column[T] {
	c := col(head, cell)
	c.wide = true
	return c
}

func timed[T any](head string, cell func(T, time.Time) string) column[T] {
	return column[T]{head: head, cell: cell}
}

var serviceColumns = []column[api.ServiceView]{
	col("NAMESPACE", func(s api.ServiceView) string { return s.Namespace }),
	col("NAME", func(s api.ServiceView) string { return s.Name }),
	col("ADDRESSES", func(s api.ServiceView) string {
		switch {
		case s.Headless:
			return "headless"
		case s.ExternalName != "":
			return s.ExternalName
		}
		return join(s.VIPs, netip.Addr.String)
	}),
	col("PORTS", func(s api.ServiceView) string { return join(s.Ports, portText) }),
	col("READY", func(s api.ServiceView) string {
		return join(s.Ready, func(n int) string { return fmt.Sprintf("%d/%d", n, len(s.Endpoints)) })
	}),
	col("NOTES", func(s api.ServiceView) string { return noteCount(s.Notes) }),
	wide("DECLARED", func(s api.ServiceView) string { return yesNo(s.Declared) }),
	wide("WORKLOADS", func(s api.ServiceView) string {
		return join(s.Endpoints, func(e assay.Endpoint) string { return cmp.Or(e.Workload, e.Addrs[0].String()) })
	}),
	wide("WHAT THE NOTES SAY", func(s api.ServiceView) string { return strings.Join(s.Notes, "; ") }),
}

// noteCount says how many notes a service has; wide, or describe, says them.
func noteCount(notes []string) string {
	if len(notes) == 0 {
		return ""
	}
	return strconv.Itoa(len(notes))
}

func portText(p assay.Port) string {
	s := strconv.Itoa(int(p.Port))
	if p.Protocol != assay.Detect {
		s += "/" + string(p.Protocol)
	}
	return s
}

var workloadColumns = []column[api.WorkloadView]{
	col("NAMESPACE", func(w api.WorkloadView) string { return w.Namespace }),
	col("NAME", func(w api.WorkloadView) string { return w.Name }),
	col("ID", func(w api.WorkloadView) string { return w.ID }),
	col("READY", func(w api.WorkloadView) string {
		if w.Ready {
			return "yes"
		}
		return "no: " + w.NotReady
	}),
	col("ADDRESS", func(w api.WorkloadView) string { return join(w.Addrs[:min(1, len(w.Addrs))], netip.Addr.String) }),
	col("LISTENING", func(w api.WorkloadView) string { return join(w.Listening, portNumber) }),
	col("ARTIFACTS", artifactsText),
	timed("AGE", func(w api.WorkloadView, now time.Time) string { return age(now, w.MeshedSince) }),
	wide("HOST", func(w api.WorkloadView) string { return w.Host }),
	wide("IDENTITY", func(w api.WorkloadView) string { return w.Identity.String() }),
	wide("SERVICE", func(w api.WorkloadView) string { return w.Service }),
	wide("ADDRESSES", func(w api.WorkloadView) string { return join(w.Addrs, netip.Addr.String) }),
	wide("SERIAL", func(w api.WorkloadView) string { return w.Serial }),
	{"EXPIRES", true, func(w api.WorkloadView, now time.Time) string { return until(now, w.NotAfter) }},
	wide("BUNDLE", func(w api.WorkloadView) string { return number(w.Bundle) }),
}

func artifactsText(w api.WorkloadView) string {
	if w.Unproven != "" {
		return w.ArtifactSet.Short() + " (unproven)"
	}
	if len(w.Artifacts) > 0 && w.Artifacts[0].Evidence != assay.ByAgent { // of a set they are all of one
		return w.ArtifactSet.Short() + " (" + string(w.Artifacts[0].Evidence) + ")"
	}
	return w.ArtifactSet.Short()
}

var namespaceColumns = []column[api.NamespaceView]{
	col("NAME", func(n api.NamespaceView) string { return n.Namespace }),
	col("MODE", func(n api.NamespaceView) string { return string(n.Mode) }),
	col("EXCLUDED PORTS", func(n api.NamespaceView) string { return join(n.ExcludedPorts, portNumber) }),
	col("EGRESS", func(n api.NamespaceView) string { return cmp.Or(string(n.Egress), string(assay.Observe)) }),
	col("WORKLOADS", func(n api.NamespaceView) string { return strconv.Itoa(n.Workloads) }),
	col("SERVICES", func(n api.NamespaceView) string { return strconv.Itoa(n.Services) }),
	col("DECLARED", func(n api.NamespaceView) string { return yesNo(n.Declared) }),
}

// egressColumns show what an Egress allows.
var egressColumns = []column[api.ObjectView]{
	col("NAMESPACE", func(o api.ObjectView) string { return o.Namespace }),
	col("NAME", func(o api.ObjectView) string { return o.Name }),
	col("TO", func(o api.ObjectView) string {
		s := egressSpec(o)
		return strings.Join(slices.Concat(s.Hosts, s.Addresses), ",")
	}),
	col("PORTS", func(o api.ObjectView) string { return join(egressSpec(o).Ports, portNumber) }),
	col("ACCOUNTS", func(o api.ObjectView) string { return cmp.Or(strings.Join(egressSpec(o).Accounts, ","), "all") }),
	col("SOURCE", func(o api.ObjectView) string { return o.Source }),
	col("IN EFFECT", func(o api.ObjectView) string { return yesNo(o.Status.InEffect) }),
	timed("CHANGED", func(o api.ObjectView, now time.Time) string { return age(now, o.Changed) }),
	wide("GENERATION", func(o api.ObjectView) string { return strconv.FormatInt(o.Generation, 10) }),
	wide("PROBLEM", func(o api.ObjectView) string { return o.Status.Problem }),
}

type egressManifest struct {
	Accounts  []string `json:"accounts"`
	Hosts     []string `json:"hosts"`
	Addresses []string `json:"addresses"`
	Ports     []uint16 `json:"ports"`
}

func egressSpec(o api.ObjectView) egressManifest {
	var m struct {
		Spec egressManifest `json:"spec"`
	}
	json.Unmarshal(o.Manifest, &m) // control checked it
	return m.Spec
}

var policyColumns = []column[api.ObjectView]{
	col("NAMESPACE", func(o api.ObjectView) string { return o.Namespace }),
	col("NAME", func(o api.ObjectView) string { return o.Name }),
	col("SERVICES", func(o api.ObjectView) string {
		var m struct {
			Spec struct {
				TargetRefs []struct{ Name string } `json:"targetRefs"`
			} `json:"spec"`
		}
		if json.Unmarshal(o.Manifest, &m) != nil {
			return ""
		}
		return join(m.Spec.TargetRefs, func(t struct{ Name string }) string { return t.Name })
	}),
	col("SOURCE", func(o api.ObjectView) string { return o.Source }),
	col("IN EFFECT", func(o api.ObjectView) string { return yesNo(o.Status.InEffect) }),
	timed("CHANGED", func(o api.ObjectView, now time.Time) string { return age(now, o.Changed) }),
	wide("GENERATION", func(o api.ObjectView) string { return strconv.FormatInt(o.Generation, 10) }),
	wide("PROBLEM", func(o api.ObjectView) string { return o.Status.Problem }),
}

var meshConfigColumns = []column[api.ObjectView]{
	col("NAMESPACE", func(o api.ObjectView) string { return o.Namespace }),
	col("NAME", func(o api.ObjectView) string { return o.Name }),
	col("MODE", func(o api.ObjectView) string { return meshSpec(o).Mode }),
	col("EXCLUDED PORTS", func(o api.ObjectView) string { return join(meshSpec(o).ExcludedPorts, portNumber) }),
	col("EGRESS", func(o api.ObjectView) string { return cmp.Or(meshSpec(o).Egress, string(assay.Observe)) }),
	col("SOURCE", func(o api.ObjectView) string { return o.Source }),
	col("IN EFFECT", func(o api.ObjectView) string { return yesNo(o.Status.InEffect) }),
	timed("CHANGED", func(o api.ObjectView, now time.Time) string { return age(now, o.Changed) }),
	wide("GENERATION", func(o api.ObjectView) string { return strconv.FormatInt(o.Generation, 10) }),
	wide("PROBLEM", func(o api.ObjectView) string { return o.Status.Problem }),
}

type meshConfigSpec struct {
	Mode          string   `json:"mode"`
	Egress        string   `json:"egress"`
	ExcludedPorts []uint16 `json:"excludedPorts"`
}

func meshSpec(o api.ObjectView) meshConfigSpec {
	var m struct {
		Spec meshConfigSpec `json:"spec"`
	}
	_ = json.Unmarshal(o.Manifest, &m) // what cannot be read is shown as "-"
	return m.Spec
}

var hostColumns = []column[api.HostView]{
	col("ID", func(h api.HostView) string { return h.ID }),
	col("NAME", func(h api.HostView) string { return h.Name }),
	timed("READY", func(h api.HostView, now time.Time) string {
		switch {
		case h.Ready:
			return "yes"
		case h.Lost:
			return "no: lost, away for " + age(now, h.Seen)
		}
		return "no: away for " + age(now, h.Seen)
	}),
	col("PREFIXES", func(h api.HostView) string { return join(h.Prefixes, netip.Prefix.String) }),
	col("WORKLOADS", func(h api.HostView) string { return strconv.Itoa(h.Workloads) }),
	col("COVERS", func(h api.HostView) string { return strings.Join(h.Covers, ",") }),
	timed("JOINED", func(h api.HostView, now time.Time) string { return age(now, h.Joined) }),
	wide("ADVERTISE", func(h api.HostView) string {
		if !h.Advertise.IsValid() {
			return ""
		}
		return h.Advertise.String()
	}),
	{"EXPIRES", true, func(h api.HostView, now time.Time) string { return until(now, h.NotAfter) }},
	wide("BUNDLE", func(h api.HostView) string { return number(h.Bundle) }),
}

var certificateColumns = []column[api.CertificateView]{
	col("USE", func(c api.CertificateView) string { return c.Use }),
	col("SUBJECT", func(c api.CertificateView) string {
		if c.ID != "" {
			return c.Subject + " (" + c.ID + ")"
		}
		return c.Subject
	}),
	col("SERIAL", func(c api.CertificateView) string { return c.Serial }),
	col("ARTIFACTS", func(c api.CertificateView) string { return c.Artifacts.Short() }),
	timed("EXPIRES", func(c api.CertificateView, now time.Time) string { return until(now, c.NotAfter) }),
	col("BUNDLE", func(c api.CertificateView) string { return number(c.Bundle) }),
	col("STATE", func(c api.CertificateView) string {
		if c.Phase != "" {
			return c.Phase
		}
		if c.Current {
			return "current"
		}
		return "replaced"
	}),
	wide("WORKLOAD", func(c api.CertificateView) string { return c.Workload }),
	wide("HOST", func(c api.CertificateView) string { return c.Host }),
	wide("ISSUER", func(c api.CertificateView) string { return c.Issuer }),
	wide("NOT BEFORE", func(c api.CertificateView) string { return stamp(c.NotBefore) }),
	wide("NOT AFTER", func(c api.CertificateView) string { return stamp(c.NotAfter) }),
}

var bundleColumns = []column[api.BundleView]{
	col("VERSION", func(b api.BundleView) string { return strconv.FormatUint(b.Version, 10) }),
	col("TRUST DOMAIN", func(b api.BundleView) string { return b.TrustDomain }),
	col("ROOTS", func(b api.BundleView) string {
		return join(b.Roots, func(r api.RootView) string { return r.ID + " (" + r.Phase + ")" })
	}),
	timed("EXPIRES", func(b api.BundleView, now time.Time) string {
		return join(b.Roots, func(r api.RootView) string { return until(now, r.NotAfter) })
	}),
	col("BEHIND", func(b api.BundleView) string {
		return join(b.Behind, func(h api.BehindView) string { return cmp.Or(h.Workload, "agent of "+h.Host) })
	}),
}

var edgeTotalColumns = []column[assay.Edge]{
	col("CLIENT", edgeClient),
	col("SERVER", edgeServer),
	col("SERVICE", edgeService),
	col("PROTOCOL", func(e assay.Edge) string { return string(e.Protocol) }),
	col("SECURITY", edgeSecurity),
	col("REQUESTS", edgeRequests),
	col("FAILURES", func(e assay.Edge) string { return strconv.FormatUint(e.Failures, 10) }),
	timed("LAST SEEN", func(e assay.Edge, now time.Time) string { return age(now, e.LastSeen) }),
	wide("CLIENT ARTIFACTS", func(e assay.Edge) string { return e.Client.Artifacts.Short() }),
	wide("SERVER ARTIFACTS", func(e assay.Edge) string { return e.Server.Artifacts.Short() }),
	wide("SEEN BY", func(e assay.Edge) string { return join(e.SeenBy, func(d assay.Direction) string { return string(d) }) }),
}

// edgeClient and edgeServer say who an end is, or what it is called outside.
func edgeClient(e assay.Edge) string {
	if e.Client.Identity.IsZero() && e.Remote != "" {
		return "outside: " + oneLine(e.Remote)
	}
	return party(e.Client.Identity)
}

func edgeServer(e assay.Edge) string {
	if e.Reason == assay.ReasonUnmeshed && e.Remote != "" {
		return "not meshed: " + oneLine(e.Remote) // the port is the service's
	}
	if named(e) {
		remote := oneLine(e.Remote)
		if e.Port != 0 {
			remote = net.JoinHostPort(remote, strconv.Itoa(int(e.Port)))
		}
		if e.RemoteBy != "" {
			remote += " (" + oneLine(e.RemoteBy) + ")"
		}
		return "outside: " + remote
	}
	return party(e.Server.Identity)
}

// edgeRequests is empty for what passes beside the proxies: nobody reads it.
func edgeRequests(e assay.Edge) string {
	if assay.Beside(e.Reason) {
		return ""
	}
	return strconv.FormatUint(e.Requests, 10)
}

// named reports whether the server is outside and has a name, which the port follows.
func named(e assay.Edge) bool { return e.Server.Identity.IsZero() && e.Remote != "" }

func edgeService(e assay.Edge) string {
	if e.Port == 0 || named(e) && e.Service == "" {
		return e.Service
	}
	return e.Service + ":" + strconv.Itoa(int(e.Port))
}

// edgeSecurity says that an edge is encrypted, or why it is not.
func edgeSecurity(e assay.Edge) string {
	if e.Reason != "" {
		return string(e.Security) + ": " + e.Reason
	}
	return string(e.Security)
}

var signalColumns = []column[api.SignalsView]{
	col("NAMESPACE", func(s api.SignalsView) string { return s.Namespace }),
	col("NAME", func(s api.SignalsView) string { return s.Name }),
	col("WORKLOAD", func(s api.SignalsView) string { return s.Workload }),
	col("SERIES", func(s api.SignalsView) string { return strconv.Itoa(len(s.Signals)) }),
	col("HANDSHAKES", func(s api.SignalsView) string { return strconv.FormatUint(s.Counters.Handshakes, 10) }),
	col("FAILED", func(s api.SignalsView) string { return number(sum(s.Counters.HandshakeFailures)) }),
	col("REFUSED", func(s api.SignalsView) string { return number(sum(s.Counters.Refusals)) }),
	timed("STARTED", func(s api.SignalsView, now time.Time) string { return age(now, s.Started) }),
	timed("RECEIVED", func(s api.SignalsView, now time.Time) string { return age(now, s.Received) }),
}

var findingColumns = []column[store.Finding]{
	timed("LAST SEEN", func(f store.Finding, now time.Time) string { return age(now, f.Time) }),
	col("TIMES", func(f store.Finding) string { return strconv.FormatInt(f.Count, 10) }),
	col("KIND", func(f store.Finding) string { return f.Kind }),
	col("WORKLOAD", func(f store.Finding) string { return f.Workload }),
	col("SUBJECT", func(f store.Finding) string { return f.Subject }),
	col("DETAIL", func(f store.Finding) string { return f.Detail }),
	wide("REMEDY", func(f store.Finding) string { return f.Remedy }),
}

var tokenColumns = []column[store.Token]{
	col("ID", func(t store.Token) string { return t.ID }),
	col("COVERS", func(t store.Token) string { return strings.Join(t.Covers, ",") }),
	timed("STATE", func(t store.Token, now time.Time) string {
		switch {
		case t.Consumer != "":
			return "used " + age(now, t.Consumed) + " ago"
		case !now.Before(t.Expires):
			return until(now, t.Expires)
		}
		return "expires " + until(now, t.Expires)
	}),
	col("CREATOR", func(t store.Token) string { return t.Creator }),
	timed("AGE", func(t store.Token, now time.Time) string { return age(now, t.Created) }),
}

var auditColumns = []column[store.Audit]{
	col("TIME", func(a store.Audit) string { return stamp(a.Time) }),
	col("WHO", func(a store.Audit) string { return a.Who }),
	col("ROLE", func(a store.Audit) string { return a.Role }),
	col("CALL", func(a store.Audit) string { return a.Call }),
	col("SUBJECT", func(a store.Audit) string { return a.Subject }),
	col("OUTCOME", func(a store.Audit) string { return a.Outcome }),
}

func join[T any](list []T, text func(T) string) string {
	s := make([]string, len(list))
	for i, v := range list {
		s[i] = text(v)
	}
	return strings.Join(s, ",")
}

func portNumber(p uint16) string { return strconv.Itoa(int(p)) }

func yesNo(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// number writes a count, and nothing for none.
func number(n uint64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatUint(n, 10)
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}

func sum(m map[string]uint64) (n uint64) {
	for _, v := range m {
		n += v
	}
	return n
}
