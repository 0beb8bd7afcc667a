package control

import (
	"crypto/x509"
	"slices"
	"strings"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
)

// TestRootRotation replaces the root of a running mesh: nothing signs with the new
// one before all have it, and the old one goes after its last leaf.
func TestRootRotation(t *testing.T) {
	t.Parallel()
	c := newClock()
	r := start(t, func(cfg *Config) { cfg.Now = c.now })
	o := r.operator(t)
	hosts := localHosts(t, r)
	la := syncHost(t, hosts, nil)
	h := r.join(t, "node-2", "*/*")
	ha := syncHost(t, h.hosts, nil)
	la.up(la.workload("a", "bank", "a", 1, 80))
	ha.up(ha.workload("b", "bank", "b", 1, 80))
	la.waitAccepted("a")
	ha.waitAccepted("b")
	old, err := issue(t, hosts, "a")
	if err != nil {
		t.Fatal(err)
	}
	everybody := func(version uint64) {
		la.ack("", version)
		la.ack("a", version)
		ha.ack("", version)
		ha.ack("b", version)
	}
	bundle := func() api.BundleView { return documents[api.BundleView](t, o, "bundle")[0] }
	everybody(1)
	eventually(t, "all trust bundle 1", func() bool { return len(bundle().Behind) == 0 })

	resp, err := o.Rotate(t.Context(), &api.RotateRequest{})
	if err != nil || resp.BundleVersion != 2 {
		t.Fatalf("rotate: %v, %v", resp, err)
	}
	eventually(t, "both hosts get bundle 2", func() bool {
		for _, a := range []*agent{la, ha} {
			a.mu.Lock()
			v, n := a.bundle.GetVersion(), len(a.bundle.GetRoots())
			a.mu.Unlock()
			if v != 2 || n != 2 {
				return false
			}
		}
		return true
	})
	la.ack("", 2)
	la.ack("a", 2)
	ha.ack("", 2) // and b's proxy does not
	eventually(t, "one is behind", func() bool { b := bundle().Behind; return len(b) == 1 && b[0].Workload == "b" && b[0].Version == 1 })
	r.model.tick()
	if s := r.authority.State(); s.Workload.Root != "root-1" {
		t.Fatalf("signs with %s already", s.Workload.Root)
	}
	check, err := o.Check(t.Context(), &api.CheckRequest{})
	if err != nil || !slices.ContainsFunc(check.Findings, func(f *api.Finding) bool { return f.Kind == "bundle-behind" && f.Workload == "b" }) {
		t.Errorf("check: %v, %v", check, err)
	}
	ha.ack("b", 2)
	eventually(t, "the new root signs", func() bool { return r.authority.State().Workload.Root == "root-4" })

	// A leaf of each root is good for whoever has bundle 2.
	fresh, err := issue(t, hosts, "a")
	if err != nil {
		t.Fatal(err)
	}
	la.mu.Lock()
	roots, err := la.bundle.Certificates()
	la.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	pool, first := x509.NewCertPool(), x509.NewCertPool()
	for _, root := range roots {
		pool.AddCert(root)
	}
	first.AddCert(roots[0])
	verify := func(chain []*x509.Certificate, pool *x509.CertPool) error {
		im := x509.NewCertPool()
		im.AddCert(chain[1])
		_, err := chain[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: im, CurrentTime: c.now(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		return err
	}
	if err := verify(old, pool); err != nil {
		t.Errorf("old leaf: %v", err)
	}
	if err := verify(fresh, pool); err != nil {
		t.Errorf("new leaf: %v", err)
	}
	if verify(fresh, first) == nil {
		t.Error("the new leaf is beneath the old root")
	}
	// Control itself changed over: a host with the new bundle reaches it, and so does
	// a token that is made now.
	ha.mu.Lock()
	h.bundle = ha.bundle
	ha.mu.Unlock()
	h.connect(t, r)
	eventually(t, "control has a certificate beneath the new root", func() bool {
		_, err := h.hosts.Renew(t.Context(), &api.RenewRequest{Csr: csr(t, newKey(t))})
		return err == nil
	})
	r.join(t, "node-3", "bank/*")

	// The longest leaf beneath the old root is a host's, of seven days.
	c.advance(6 * 24 * time.Hour)
	r.model.tick()
	if n := len(bundle().Roots); n != 2 {
		t.Errorf("%d roots after six days", n)
	}
	c.advance(2 * 24 * time.Hour)
	eventually(t, "the old root is gone", func() bool {
		b := bundle()
		return b.Version == 3 && len(b.Roots) == 1 && b.Roots[0].Phase == "signing"
	})
	if !strings.Contains(bundle().Roots[0].PEM, "BEGIN CERTIFICATE") {
		t.Error("no PEM")
	}
}

// TestDeadline: an operator does not wait for a host that is off.
func TestDeadline(t *testing.T) {
	c := newClock()
	r := start(t, func(cfg *Config) { cfg.Now = c.now })
	h := r.join(t, "node-2", "*/*")
	syncHost(t, h.hosts, nil)
	if _, err := r.operator(t).Rotate(t.Context(), &api.RotateRequest{DeadlineSeconds: 3600}); err != nil {
		t.Fatal(err)
	}
	if b := documents[api.BundleView](t, r.operator(t), "bundle")[0]; b.Deadline.IsZero() {
		t.Errorf("bundle: %s", show(b))
	}
	c.advance(time.Hour)
	eventually(t, "the new root signs", func() bool { return r.authority.State().Workload.Root == "root-4" })
	for _, s := range []int64{-1, 1 << 40} {
		if _, err := r.operator(t).Rotate(t.Context(), &api.RotateRequest{DeadlineSeconds: s}); assay.KindOf(api.StatusError("rotate", err)) != assay.Invalid {
			t.Errorf("deadline %d: %v", s, err)
		}
	}
}

// TestEarlyAcknowledgement: a proxy may acknowledge before its workload is reported.
func TestEarlyAcknowledgement(t *testing.T) {
	r := start(t, nil)
	a := syncHost(t, localHosts(t, r), nil)
	a.ack("w", 1)
	a.up(a.workload("w", "bank", "s", 1, 80))
	a.waitAccepted("w")
	if got := documents[api.WorkloadView](t, r.operator(t), "workloads"); got[0].Bundle != 1 {
		t.Errorf("workloads: %s", show(got))
	}
}
