package control

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
)

// TestCertificatesOfAPod: a pod gets as many as an honest one may ever need at once, and then so
// many that nobody else feels it, however it asks; and its joins are one line in the audit trail.
func TestCertificatesOfAPod(t *testing.T) {
	now := newClock()
	r := startSidecars(t, func(cfg *Config) { cfg.Now = now.now })
	r.follow(t, twoNodes(injected("a", "node-1", "10.0.1.1", "app"), injected("b", "node-1", "10.0.1.2", "app")))
	h, other, node := r.joinNode(t, "own a"), r.joinNode(t, "own b"), r.joinNode(t, "node-1")
	a := syncHost(t, h.hosts, nil)
	a.up(r.meshed(h, "a", "10.0.1.1"))
	a.waitAccepted("a")
	renew := func(h *remoteHost) error {
		_, err := h.hosts.Renew(t.Context(), &api.RenewRequest{Csr: csr(t, newKey(t))})
		return api.StatusError("renew", err)
	}
	const joins, renewals = 3, 2
	for range joins {
		r.joinNode(t, "own a")
	}
	for range renewals {
		if err := renew(h); err != nil {
			t.Fatal(err)
		}
	}
	// Ten init containers, the application's and others, some of them twice.
	for range podCertificates - joins - renewals {
		if _, err := issue(t, h.hosts, "a"); err != nil {
			t.Fatal(err)
		}
	}
	held := func() int {
		r.model.mu.Lock()
		defer r.model.mu.Unlock()
		n := 0
		for _, list := range r.model.certs {
			for _, c := range list {
				if c.Host == h.id {
					n++
				}
			}
		}
		return n
	}
	before := held()
	for range 3 {
		_, issued := issue(t, h.hosts, "a")
		_, joined := r.tryJoinNode(t, "own a")
		for why, err := range map[string]error{"issue": issued, "join": joined, "renew": renew(h)} {
			if assay.KindOf(err) != assay.Unavailable || !strings.Contains(err.Error(), "one a minute") {
				t.Errorf("%s: %v", why, err)
			}
		}
	}
	if n := held(); n != before || n > podCertificates+1 {
		t.Errorf("%d certificates, then %d", before, n)
	}
	now.advance(podCertificateEvery)
	if _, err := issue(t, h.hosts, "a"); err != nil {
		t.Errorf("a minute later: %v", err)
	}
	if _, err := issue(t, h.hosts, "a"); assay.KindOf(err) != assay.Unavailable {
		t.Errorf("and another one: %v", err)
	}
	// Neither another pod nor its node waits.
	if err := renew(other); err != nil {
		t.Error(err)
	}
	for range podCertificates + 1 {
		if err := renew(node); err != nil {
			t.Fatal(err)
		}
	}
	r.model.mu.Lock()
	defer r.model.mu.Unlock()
	lines := 0
	for _, l := range r.model.audit {
		if strings.Contains(l.Subject, h.id) && l.Outcome == "ok" {
			lines++
		}
	}
	if lines != 1 {
		t.Errorf("%d lines in the audit trail", lines)
	}
}

// TestFindingsOfAPod: what a pod says, and what is wrong about it, is about that pod, and pushes out
// nothing of others.
func TestFindingsOfAPod(t *testing.T) {
	now := newClock()
	r := startSidecars(t, func(cfg *Config) { cfg.Now = now.now })
	r.follow(t, twoNodes(injected("a", "node-1", "10.0.1.1", "app"), pod("plain", "node-1", "10.0.1.2")))
	h, node := r.joinNode(t, "own a"), r.joinNode(t, "node-1")
	a, n := syncHost(t, h.hosts, nil), syncHost(t, node.hosts, nil)
	say := func(a *agent, workload, kind, subject string) {
		f := assay.Finding{Time: now.now(), Workload: workload, Kind: kind, Subject: subject}
		a.send(&api.HostUpdate{Update: &api.HostUpdate_Finding{Finding: api.FromFinding(&f)}})
	}
	said := func(a *agent, h *remoteHost, id, addr string) {
		t.Helper()
		a.up(r.meshed(h, id, addr))
		a.waitAccepted(id)
	}
	say(n, "", "of-the-node", "node-1")
	say(n, "plain", "of-plain", "x")
	said(n, node, "plain", "10.0.1.2")
	for i := range keptFindings + 10 {
		say(a, "", "made-up", fmt.Sprint("1-", i))
		a.up(r.meshed(h, fmt.Sprint("no-such-", i), "10.0.1.1"))
	}
	said(a, h, "a", "10.0.1.1")
	for range podFindings {
		if _, err := issue(t, h.hosts, "plain"); assay.KindOf(err) != assay.Denied {
			t.Errorf("a certificate of another: %v", err)
		}
	}
	count := func() (own int, kinds map[string]int) {
		r.model.mu.Lock()
		defer r.model.mu.Unlock()
		kinds = map[string]int{}
		for _, f := range r.model.findings {
			kinds[f.Kind]++
			if f.Workload == "a" {
				own++
			} else if f.Kind == "made-up" || f.Kind == "workload-refused" || f.Kind == "certificate-refused" {
				t.Errorf("not about the pod: %+v", f)
			}
		}
		return own, kinds
	}
	if own, kinds := count(); own != podFindings || kinds["of-the-node"] != 1 || kinds["of-plain"] != 1 {
		t.Errorf("%d of the pod; %v", own, kinds)
	}
	// What is newer is worth more, and the same again takes no room.
	now.advance(podFindings * podFindingEvery)
	for i := range podFindings {
		say(a, "a", "later", fmt.Sprint(i%5))
	}
	eventually(t, "the newest", func() bool { _, kinds := count(); return kinds["later"] == 5 })
	if own, kinds := count(); own != podFindings || kinds["later"] != 5 || kinds["of-the-node"] != 1 {
		t.Errorf("%d of the pod; %v", own, kinds)
	}
}

// TestAllowance: at once, and in time; a clock that goes back takes nothing away.
func TestAllowance(t *testing.T) {
	var a allowance
	now := time.Unix(1000, 0)
	takes := func(want int) {
		t.Helper()
		n := 0
		for a.take(now, 3, time.Minute) {
			n++
		}
		if n != want {
			t.Errorf("%d, want %d", n, want)
		}
	}
	takes(3)
	now = now.Add(59 * time.Second)
	takes(0)
	now = now.Add(time.Second)
	takes(1)
	now = now.Add(-time.Hour)
	takes(0)
	now = now.Add(time.Minute)
	takes(1)
	now = now.Add(24 * time.Hour)
	takes(3)
}
