package control

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"assay.dev"
	"assay.dev/api"
)

// Check returns what is wrong or will be within the time asked about.
func (c *Control) Check(_ context.Context, req *api.CheckRequest) (*api.CheckResponse, error) {
	s := req.GetExpirySeconds()
	if s < 0 || s > 100*365*24*3600 {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "check", Err: fmt.Errorf("an expiry of %d s", s)}
	}
	var out []assay.Finding
	out = append(out, c.checkSelf()...)
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
			Remedy: "correct it; the last good state is in effect"})
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
	m.mu.Lock()
	defer m.mu.Unlock()
	now := m.now()
	for _, h := range m.hosts {
		if h.session == nil {
			out = append(out, assay.Finding{Time: h.away, Kind: "host-not-connected", Subject: cmp.Or(h.Name, h.ID) + " (" + h.ID + ")",
				Detail: fmt.Sprintf("its agent has been away since %s; %d workloads", h.away.UTC().Format(time.RFC3339), h.running),
				Remedy: "start its agent, or: assay delete host " + h.ID})
		}
	}
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
	for i := range edges {
		if e := &edges[i]; e.Security == assay.Plaintext && now.Sub(e.LastSeen) < time.Hour {
			out = append(out, assay.Finding{Time: e.LastSeen, Kind: "plaintext", Subject: party(e.Client) + " -> " + cmp.Or(e.Service, party(e.Server)),
				Detail: fmt.Sprintf("port %d, %s: %d connections, %s", e.Port, cmp.Or(string(e.Protocol), "undetected"), e.Opened, cmp.Or(e.Reason, "no reason given"))})
		}
	}
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
