package control

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"assay.dev"
	"assay.dev/api"
)

// Check returns what is wrong or will be within the time asked about.
func (c *Control) Check(ctx context.Context, req *api.CheckRequest) (*api.CheckResponse, error) {
	s := req.GetExpirySeconds()
	if s < 0 || s > 100*365*24*3600 {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "check", Err: fmt.Errorf("an expiry of %d s", s)}
	}
	c.gather(ctx)
	var out []assay.Finding
	out = append(out, c.checkSelf()...)
	out = append(out, c.checkOthers()...)
	out = append(out, c.checkAuthority(time.Duration(s)*time.Second)...)
	out = append(out, c.checkMesh(time.Duration(s)*time.Second)...)
	resp := &api.CheckResponse{}
	for i := range out {
		if out[i].Time.IsZero() {
			out[i].Time = c.now()
		}
		resp.Findings = append(resp.Findings, api.FromFinding(&out[i]))
	}
	return resp, nil
}

// checkSelf is about control: its store and its intent.
func (c *Control) checkSelf() []assay.Finding {
	var out []assay.Finding
	if since, dropped, cause := c.behind.health(); !since.IsZero() {
		out = append(out, assay.Finding{Time: since, Kind: "store-away", Subject: c.store.Name(), Detail: fmt.Sprint(cause),
			Remedy: "bring the store back; until then nothing new is taken, and what is served goes on"})
	} else if dropped > 0 {
		out = append(out, assay.Finding{Kind: "records-lost", Subject: c.store.Name(),
			Detail: fmt.Sprintf("%d certificates, findings and audit lines found no room while the store was away", dropped)})
	}
	if since, err := c.intent.status(); err != nil {
		out = append(out, assay.Finding{Time: since, Kind: "intent-not-in-effect", Subject: cmp.Or(c.cfg.Intent, "stored intent"), Detail: cut(err.Error(), 4000),
			Remedy: "correct it; " + c.instead()})
	}
	out = append(out, c.checkRoutes()...)
	for key, problem := range c.intent.unsound() {
		out = append(out, assay.Finding{Kind: "intent-not-in-effect", Subject: key.String(), Detail: cut(problem.Text, 4000), Remedy: "correct it; everything else is in effect"})
	}
	if missing := c.model.missingKinds(); len(missing) > 0 {
		out = append(out, assay.Finding{Kind: "kinds-missing", Subject: strings.Join(missing, ", "), Detail: "the API server has no definitions of these kinds: nothing of them can be declared, and defaults hold",
			Remedy: "install them: assay install"})
	}
	if !c.model.following() {
		out = append(out, assay.Finding{Kind: "cluster-not-heard", Subject: "control", Detail: "the API server has not told yet what there is: no host is served, and what they know goes on",
			Remedy: "see that control reaches the API server, and may list and watch what it needs"})
	}
	return out
}

// missingKinds are those of Assay's own that the platform has no definition of. Others' are
// theirs to install, or not.
func (m *model) missingKinds() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cluster == nil || !m.cluster.told {
		return nil
	}
	own := []string{"Egress", "MeshConfig", "TrafficPolicy"}
	return slices.DeleteFunc(own, func(kind string) bool { return !slices.Contains(m.cluster.missing, kind) })
}

// checkRoutes is about routes that a service does not take, rules that send requests nowhere,
// and policies of services that are not there.
func (c *Control) checkRoutes() []assay.Finding {
	var out []assay.Finding
	for _, kind := range []string{"HTTPRoute", "GRPCRoute", "TLSRoute"} {
		for _, it := range c.listObjects(kind) {
			v := it.doc.(api.ObjectView)
			for i := range v.Status.Parents {
				out = append(out, routeFindings(&v, &v.Status.Parents[i])...)
			}
		}
	}
	for _, it := range c.listPolicies() {
		if v := it.doc.(api.ObjectView); strings.HasPrefix(v.Status.Problem, "TargetNotFound: ") {
			out = append(out, assay.Finding{Kind: "target-missing", Subject: v.Kind + " " + v.Namespace + "/" + v.Name, Detail: v.Status.Problem,
				Remedy: "correct its targetRefs, or make the Service; the others of them are in effect"})
		}
	}
	return out
}

// routeFindings says what is wrong with a route at one of its parents.
func routeFindings(v *api.ObjectView, p *assay.RouteParentStatus) []assay.Finding {
	var out []assay.Finding
	for _, c := range p.Conditions {
		f := assay.Finding{Time: c.LastTransitionTime, Subject: v.Kind + " " + v.Namespace + "/" + v.Name, Detail: cut(c.Reason+": "+c.Message, 4000)}
		switch {
		case c.Type == "Accepted" && c.Status == "False":
			f.Kind, f.Remedy = "route-not-accepted", "correct its parentRefs and hostnames; its parent goes on as if it were not there"
		case c.Type == "ResolvedRefs" && c.Status == "False":
			f.Kind, f.Remedy = "backend-missing", "correct its backendRefs, make the Service, or allow it with a ReferenceGrant; what its rule sends there is answered 500"
		case c.Type == "PartiallyInvalid" && c.Status == "True":
			f.Kind, f.Remedy = "route-partly-invalid", "correct the rules that it names; the others are in effect"
		default:
			continue
		}
		out = append(out, f)
	}
	return out
}

// checkAuthority is about roots, intermediates and who trusts them.
func (c *Control) checkAuthority(within time.Duration) []assay.Finding {
	var out []assay.Finding
	now := c.now()
	for _, l := range c.authority.Certificates() {
		if left := l.Certificate.NotAfter.Sub(now); left <= within {
			kind := "intermediate-expiring"
			if l.Phase != "" {
				kind = "root-expiring"
			}
			out = append(out, assay.Finding{Kind: kind, Subject: l.ID, Detail: until(l.Certificate.NotAfter, left),
				Remedy: "control replaces it in time by itself; see that it runs and that its clock is right"})
		}
	}
	state := c.authority.State()
	c.model.mu.Lock()
	defer c.model.mu.Unlock()
	for _, t := range c.model.behindBundle(state) {
		f := assay.Finding{Kind: "bundle-behind", Subject: "agent of host " + t.host.ID,
			Detail: fmt.Sprintf("trusts bundle %d, the newest is %d", t.version, state.Bundle), Remedy: "see that the host is connected; a root that is being replaced waits for it"}
		if t.workload != nil {
			f.Workload, f.Subject = t.workload.ID, "proxy of "+t.workload.Namespace+"/"+t.workload.Name
		}
		out = append(out, f)
	}
	return out
}

func until(t time.Time, left time.Duration) string {
	if left <= 0 {
		return "expired at " + t.UTC().Format(time.RFC3339)
	}
	return fmt.Sprintf("expires at %s, in %s", t.UTC().Format(time.RFC3339), left.Round(time.Minute))
}

// checkMesh is about hosts and workloads.
func (c *Control) checkMesh(within time.Duration) []assay.Finding {
	var out []assay.Finding
	m := c.model
	edges := m.edges()
	for r := range m.counts {
		out = append(out, checkBalance(r)...)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.now()
	if m.leases.panic {
		out = append(out, assay.Finding{Kind: "hosts-away-at-once", Subject: "control",
			Detail: "more than half of the hosts are away, so nothing of theirs is called unready: endpoints are those of before",
			Remedy: "see that agents can reach control; hosts that will not come back: assay delete host ID"})
	}
	for _, h := range m.hosts {
		if !h.present {
			out = append(out, assay.Finding{Time: h.away, Kind: "host-not-connected", Subject: cmp.Or(h.Name, h.ID) + " (" + h.ID + ")",
				Detail: fmt.Sprintf("its agent has been away since %s; %d workloads", h.away.UTC().Format(time.RFC3339), h.running),
				Remedy: "start its agent, or: assay delete host " + h.ID})
		}
	}
	for key, err := range m.snapshot.untold {
		out = append(out, assay.Finding{Kind: "not-told", Subject: strings.ToValidUTF8(key, "?"), Detail: "hosts do not hear of it: " + err.Error(),
			Remedy: "declare it anew, in UTF-8; what hosts knew of it before stays"})
	}
	out = append(out, m.checkNodes()...)
	out = append(out, m.checkSidecars()...)
	out = append(out, m.checkMetered()...)
	for _, w := range m.catalog.Workloads() {
		if why := m.notReady(w); why != "" && !w.Draining {
			out = append(out, assay.Finding{Workload: w.ID, Kind: "proxy-not-ready", Subject: w.Namespace + "/" + w.Name, Detail: why})
		}
	}
	for subject, list := range m.certs {
		for _, cert := range list {
			newest, _ := m.current(subject, cert.Workload)
			if newest.Serial != cert.Serial || !m.holds(subject, cert.Workload) {
				continue
			}
			// A leaf is renewed by the end of six tenths of its life. Past three
			// quarters the renewal is overdue, and only then is its end news.
			late := cert.NotAfter.Sub(cert.NotBefore) / 4
			if left := cert.NotAfter.Sub(now); left <= min(within, late) || left <= 0 {
				out = append(out, assay.Finding{Workload: cert.Workload, Kind: "certificate-expiring", Subject: subject, Detail: until(cert.NotAfter, left) + "; its renewal is overdue",
					Remedy: "see that its host is connected and its proxy runs"})
			}
		}
	}
	out = append(out, checkBeside(edges, now)...)
	out = append(out, checkPlaintext(edges, now)...)
	for _, f := range m.findings {
		if now.Sub(f.Time) < time.Hour {
			out = append(out, f.Finding)
		}
	}
	slices.SortFunc(out, func(a, b assay.Finding) int {
		return cmp.Or(strings.Compare(a.Kind, b.Kind), strings.Compare(a.Subject, b.Subject), strings.Compare(a.Workload, b.Workload))
	})
	return out
}

// checkNodes is about nodes of a cluster that nobody speaks for. mu is held.
func (m *model) checkNodes() (out []assay.Finding) {
	if m.cluster == nil {
		return nil
	}
	joined := m.agents()
	if len(joined) == 0 { // a mesh that is being installed, or one of sidecars
		return nil
	}
	for name, n := range m.cluster.nodes {
		if !joined[name] && !n.Agentless {
			out = append(out, assay.Finding{Kind: "node-without-agent", Subject: "node " + name, Detail: "its agent has never joined: none of its pods is in the mesh, whatever their labels say",
				Remedy: "see what the agent's pod on it says (kubectl get pods -A -o wide)"})
		}
	}
	return out
}

// meant reports whether plaintext was meant to pass: what an Egress allows, probes, and metrics.
func meant(reason string) bool {
	return reason == assay.ReasonEgress || reason == assay.ReasonProbe || reason == assay.ReasonMetrics
}

// checkPlaintext has a finding for each edge in plaintext of the last hour; one for all
// endpoints of a service that are not meshed.
func checkPlaintext(edges []assay.Edge, now time.Time) []assay.Finding {
	type to struct{ client, service, protocol string }
	var out []assay.Finding
	endpoints, opened, first := map[to]int{}, map[to]uint64{}, map[to]int{}
	for i := range edges {
		e := &edges[i]
		// What was refused did not pass.
		if e.Security != assay.Plaintext || assay.Beside(e.Reason) || meant(e.Reason) || e.Opened+e.Requests <= e.Failures || now.Sub(e.LastSeen) >= time.Hour {
			continue
		}
		f := assay.Finding{Time: e.LastSeen, Kind: "plaintext", Subject: end(e.Client, e.Remote) + " -> " + cmp.Or(e.Service, end(e.Server, e.Remote)),
			Detail: fmt.Sprintf("port %d, %s: %d connections, %s", e.Port, cmp.Or(string(e.Protocol), "undetected"), e.Opened, cmp.Or(e.Reason, "no reason given"))}
		if e.Reason != assay.ReasonUnmeshed {
			out = append(out, f)
			continue
		}
		k := to{end(e.Client, e.Remote), fmt.Sprint(e.Service, ":", e.Port), string(e.Protocol)}
		at, known := first[k]
		if !known {
			at = len(out)
			first[k], out = at, append(out, f)
		}
		endpoints[k]++
		opened[k] += e.Opened
		if f.Time.After(out[at].Time) {
			out[at].Time = f.Time
		}
		out[at].Detail = fmt.Sprintf("port %d, %s: %d connections to %d endpoints that are not meshed", e.Port, cmp.Or(k.protocol, "undetected"), opened[k], endpoints[k])
		out[at].Remedy = "mesh them; assay edges --exceptions has their addresses"
	}
	return out
}

// Findings that follow from what a workload's host counts.
const (
	captureEscaped   = "capture-escaped"
	unexplainedBytes = "unexplained-bytes"
	notMetered       = "not-metered"
	remedyEscaped    = "find out which process in the workload's network namespace holds CAP_NET_RAW or CAP_NET_ADMIN"
)

// checkBeside counts what passed beside the proxies in the last hour: one finding for
// each namespace, by reason. TCP that avoids its capture is one of its own.
func checkBeside(edges []assay.Edge, now time.Time) []assay.Finding {
	type group struct {
		count   map[string]int
		edges   int
		packets uint64
		bytes   uint64
		last    time.Time
	}
	groups := map[string]*group{}
	var out []assay.Finding
	for i := range edges {
		e := &edges[i]
		if !assay.Beside(e.Reason) || now.Sub(e.LastSeen) >= time.Hour {
			continue
		}
		if e.Reason == assay.ReasonEscaped {
			out = append(out, assay.Finding{Time: e.LastSeen, Kind: captureEscaped, Subject: end(e.Client, e.Remote) + " -> " + end(e.Server, e.Remote),
				Detail: fmt.Sprintf("port %d: %d packets, %d bytes of TCP that neither the proxy sent nor the capture led to it", e.Port, e.PacketsUp+e.PacketsDown, e.BytesUp+e.BytesDown),
				Remedy: remedyEscaped})
			continue
		}
		namespace := cmp.Or(e.Client.Identity.Namespace, e.Server.Identity.Namespace)
		g := groups[namespace]
		if g == nil {
			g = &group{count: map[string]int{}}
			groups[namespace] = g
		}
		g.count[e.Reason]++
		g.edges++
		g.packets += e.PacketsUp + e.PacketsDown
		g.bytes += e.BytesUp + e.BytesDown
		if e.LastSeen.After(g.last) {
			g.last = e.LastSeen
		}
	}
	for namespace, g := range groups {
		var reasons []string
		for _, r := range slices.Sorted(maps.Keys(g.count)) {
			reasons = append(reasons, fmt.Sprintf("%d %s", g.count[r], r))
		}
		out = append(out, assay.Finding{Time: g.last, Kind: "exceptions", Subject: "namespace " + namespace,
			Detail: fmt.Sprintf("%d exceptions beside the proxies in the last hour (%s): %d packets, %d bytes in all", g.edges, strings.Join(reasons, ", "), g.packets, g.bytes),
			Remedy: "see: assay edges --exceptions -n " + namespace + "; carry it over TCP, or exclude fewer ports, where it should be encrypted and identified"})
	}
	return out
}

// end says who one end of an edge is.
func end(p assay.Party, remote string) string {
	if p.Identity.IsZero() && remote != "" {
		return remote
	}
	return party(p)
}

// checkBalance looks for bytes on a workload's link that belong nowhere.
func checkBalance(r *counts) []assay.Finding {
	b := r.Balance
	if b == nil || !r.gone.IsZero() {
		return nil
	}
	w := r.workload
	f := assay.Finding{Time: r.received, Workload: w.ID, Subject: w.Namespace + "/" + w.Name}
	if b.Problem != "" {
		f.Kind, f.Detail, f.Remedy = notMetered, b.Problem, "Linux 5.17 or newer counts what passes beside a proxy, with nf_tables, conntrack and NETFILTER_EGRESS; else this is somebody's change of the rules"
		return []assay.Finding{f}
	}
	if !b.In.Unbalanced() && !b.Out.Unbalanced() {
		return nil
	}
	f.Kind = unexplainedBytes
	f.Detail = fmt.Sprintf("%d bytes to it and %d from it passed its link and belong to nothing (of %d and %d)", b.In.Unexplained, b.Out.Unexplained, b.In.Link.Bytes, b.Out.Link.Bytes)
	if stray := b.In.Control["stray"].Bytes + b.Out.Control["stray"].Bytes; stray > 0 {
		f.Detail += fmt.Sprintf("; %d bytes of TCP belong to no connection", stray)
	}
	f.Remedy = "find out which process in its network namespace holds CAP_NET_RAW or CAP_NET_ADMIN: it sends what no rule sees; tcpdump on the host's end of its link shows what"
	return []assay.Finding{f}
}

// holds reports whether whoever a certificate was given to is still there. People
// are: they renew by hand.
func (m *model) holds(subject, workload string) bool {
	if workload != "" {
		_, ok := m.catalog.Workload(workload)
		return ok
	}
	if _, id, ok := strings.Cut(subject, "/assay/host/"); ok {
		return m.hosts[id] != nil
	}
	return true
}

func party(p assay.Party) string {
	if p.Identity.IsZero() {
		return "outside the mesh"
	}
	return p.Identity.Namespace + "/" + p.Identity.Account
}
