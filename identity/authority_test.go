package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"assay.dev"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

var (
	payments  = assay.Identity{TrustDomain: "bank.test", Namespace: "bank", Account: "payments"}
	artifacts = assay.DigestOf([]byte("payments 1.0"))
)

// clock is a time that tests move.
type clock struct{ ns atomic.Int64 }

func newClock(t time.Time) *clock { c := &clock{}; c.ns.Store(t.UnixNano()); return c }

func (c *clock) now() time.Time          { return time.Unix(0, c.ns.Load()).UTC() }
func (c *clock) advance(d time.Duration) { c.ns.Add(int64(d)) }

func open(t *testing.T, dir string, c *clock) *Authority {
	t.Helper()
	a, err := Open(Config{Dir: dir, TrustDomain: "bank.test", Now: c.now})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

func request(t *testing.T, key crypto.Signer, change func(*x509.CertificateRequest)) []byte {
	t.Helper()
	tmpl := &x509.CertificateRequest{}
	if change != nil {
		change(tmpl)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// verify checks a chain as a peer does, for a policy.
func verify(a *Authority, c *Certificate, now time.Time, policy x509.OID) error {
	im := x509.NewCertPool()
	im.AddCert(c.Issuer)
	chains, err := c.Leaf.Verify(x509.VerifyOptions{Roots: a.Pool(), Intermediates: im, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	if err != nil {
		return err
	}
	return assay.CheckPolicy(chains[0], policy)
}

func TestWorkloadCertificate(t *testing.T) {
	c := newClock(time.Now())
	a := open(t, filepath.Join(t.TempDir(), "ca"), c)
	// Everything in the request but its key is ignored.
	cert, err := a.IssueWorkload(request(t, newKey(t), func(r *x509.CertificateRequest) {
		r.URIs = []*url.URL{payments.URL()}
		r.DNSNames = []string{"control.bank.test"}
		r.Subject = pkix.Name{CommonName: "root"}
	}), payments, artifacts)
	if err != nil {
		t.Fatal(err)
	}
	leaf := cert.Leaf
	if id, err := assay.CertificateIdentity(leaf); err != nil || id != payments {
		t.Errorf("identity %v, %v", id, err)
	}
	if d, err := assay.CertificateArtifacts(leaf); err != nil || d != artifacts {
		t.Errorf("artifacts %v, %v", d, err)
	}
	if len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 || leaf.Subject.String() != "" || leaf.IsCA {
		t.Errorf("took names from the request: %v %v", leaf.DNSNames, leaf.Subject)
	}
	if got := leaf.NotAfter.Sub(c.now()); got < 24*time.Hour-time.Second || got > 24*time.Hour {
		t.Errorf("lives %v", got)
	}
	if got := c.now().Sub(leaf.NotBefore); got < time.Minute || got > time.Minute+time.Second {
		t.Errorf("began %v ago", got)
	}
	if n := leaf.SerialNumber.BitLen(); n < 64 || n > 128 {
		t.Errorf("serial of %d bits", n)
	}
	if cert.RenewAt.Sub(c.now()) < 9*time.Hour || cert.RenewAt.Sub(c.now()) > 15*time.Hour {
		t.Errorf("renewed after %v", cert.RenewAt.Sub(c.now()))
	}

	// An independent implementation of X509-SVID accepts it.
	td := spiffeid.RequireTrustDomainFromString("bank.test")
	bundle := x509bundle.New(td)
	for _, der := range a.Bundle().Roots {
		root, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		bundle.AddX509Authority(root)
	}
	id, _, err := x509svid.Verify([]*x509.Certificate{leaf, cert.Issuer}, bundle)
	if err != nil || id.String() != payments.String() {
		t.Errorf("go-spiffe: %v, %v", id, err)
	}
}

// TestTwoKindsNeverMix: what one intermediate signs is never valid as the other's.
func TestTwoKindsNeverMix(t *testing.T) {
	c := newClock(time.Now())
	a := open(t, filepath.Join(t.TempDir(), "ca"), c)
	workload, err := a.IssueWorkload(request(t, newKey(t), nil), payments, artifacts)
	if err != nil {
		t.Fatal(err)
	}
	host, err := a.IssueHost(request(t, newKey(t), nil), "host-1")
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		cert   *Certificate
		policy x509.OID
		ok     bool
	}{
		"workload as workload": {workload, assay.WorkloadPolicy, true},
		"workload as host":     {workload, assay.InfrastructurePolicy, false},
		"host as host":         {host, assay.InfrastructurePolicy, true},
		"host as workload":     {host, assay.WorkloadPolicy, false},
	} {
		if err := verify(a, tc.cert, c.now(), tc.policy); (err == nil) != tc.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Whoever stole the workload intermediate signs itself a host's certificate.
	thief := a.pairs[a.State().Workload.ID]
	tmpl := &x509.Certificate{SerialNumber: newSerial(), NotBefore: c.now().Add(-time.Minute), NotAfter: c.now().Add(time.Hour),
		URIs: []*url.URL{assay.Infrastructure("bank.test", "host", "host-1")}, Policies: []x509.OID{assay.InfrastructurePolicy},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, thief.cert, newKey(t).Public(), thief.key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if err := verify(a, &Certificate{Leaf: leaf, Issuer: thief.cert}, c.now(), assay.InfrastructurePolicy); err == nil {
		t.Error("a host's certificate beneath the workload intermediate is valid")
	}
	if _, err := assay.CertificateIdentity(host.Leaf); err == nil {
		t.Error("a host's certificate has a workload's identity")
	}
}

func TestRequestsAreChecked(t *testing.T) {
	a := open(t, filepath.Join(t.TempDir(), "ca"), newClock(time.Now()))
	key := newKey(t)
	weak, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p224, _ := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	_, ed, _ := ed25519.GenerateKey(rand.Reader)
	good := request(t, key, nil)
	bad := append([]byte(nil), good...)
	bad[len(bad)-1] ^= 1
	other, _ := url.Parse("spiffe://bank.test/ns/bank/sa/ledger")
	for name, tc := range map[string]struct {
		csr  []byte
		want string // "" accepts
	}{
		"good":      {good, ""},
		"Ed25519":   {request(t, ed, nil), ""},
		"RSA":       {request(t, weak, nil), "RSA"},
		"P-224":     {request(t, p224, nil), "P-224"},
		"signature": {bad, ""},
		"garbage":   {[]byte("x"), "asn1"},
		"trailing":  {append(append([]byte(nil), good...), 0), "trailing"},
		"long":      {make([]byte, maxRequest+1), "at most"},
		"other":     {request(t, key, func(r *x509.CertificateRequest) { r.URIs = []*url.URL{other} }), "names spiffe://bank.test/ns/bank/sa/ledger"},
		"two":       {request(t, key, func(r *x509.CertificateRequest) { r.URIs = []*url.URL{payments.URL(), other} }), "exactly one"},
	} {
		_, err := a.IssueWorkload(tc.csr, payments, artifacts)
		if name == "signature" {
			if err == nil {
				t.Error("a request with a broken signature was signed")
			}
			continue
		}
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want) || assay.KindOf(err) != assay.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, f := range map[string]func() error{
		"foreign domain": func() error {
			_, err := a.IssueWorkload(good, assay.Identity{TrustDomain: "x", Namespace: "a", Account: "b"}, artifacts)
			return err
		},
		"no artifact": func() error { _, err := a.IssueWorkload(good, payments, ""); return err },
		"role":        func() error { _, err := a.IssueOperator(good, "ann", "root", time.Hour); return err },
		"life":        func() error { _, err := a.IssueOperator(good, "ann", "viewer", 365*day); return err },
		"name":        func() error { _, err := a.IssueHost(good, "a/b"); return err },
	} {
		if err := f(); assay.KindOf(err) != assay.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzRequest: what reaches the signer is a key that its sender has.
func FuzzRequest(f *testing.F) {
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	der, _ := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	f.Add(der)
	f.Fuzz(func(t *testing.T, b []byte) {
		if k, err := requestKey(b, payments.URL()); err == nil && k == nil {
			t.Error("neither a key nor an error")
		}
	})
}

func TestLeavesNeverOutliveTheirSigners(t *testing.T) {
	c := newClock(time.Now())
	p := Policy{RootLife: 48 * time.Hour, RootLead: time.Hour, RootForce: time.Minute, IntermediateLife: 10 * time.Hour, Skew: time.Minute}
	a, err := Open(Config{Dir: filepath.Join(t.TempDir(), "ca"), TrustDomain: "bank.test", Policy: p, Now: c.now})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	for range 100 {
		cert, err := a.IssueWorkload(request(t, newKey(t), nil), payments, artifacts)
		if err != nil {
			t.Fatal(err)
		}
		if cert.Leaf.NotAfter.After(cert.Issuer.NotAfter) || cert.Leaf.NotBefore.Before(cert.Issuer.NotBefore) {
			t.Fatalf("leaf %v to %v, issuer %v to %v", cert.Leaf.NotBefore, cert.Leaf.NotAfter, cert.Issuer.NotBefore, cert.Issuer.NotAfter)
		}
		if err := verify(a, cert, c.now(), assay.WorkloadPolicy); err != nil {
			t.Fatal(err)
		}
		c.advance(time.Hour)
		if _, err := a.Step(Acknowledged{a.Bundle().Version}); err != nil {
			t.Fatal(err)
		}
	}
	if a.State().Bundle < 4 {
		t.Errorf("only %d bundles in 100 hours of 48 h roots", a.State().Bundle)
	}
}

func TestRestartKeepsEverything(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	c := newClock(time.Now())
	a := open(t, dir, c)
	cert, err := a.IssueWorkload(request(t, newKey(t), nil), payments, artifacts)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Step(Rotate{}); err != nil {
		t.Fatal(err)
	}
	before := a.State()
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	// What a crash leaves: an unused key and half a file.
	for _, n := range []string{"root-99.key", ".new-00"} {
		if err := os.WriteFile(filepath.Join(dir, n), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b := open(t, dir, c)
	if got, want := fmt.Sprintf("%v", b.State()), fmt.Sprintf("%v", before); got != want {
		t.Errorf("state\n%s\nwant\n%s", got, want)
	}
	if err := verify(b, cert, c.now(), assay.WorkloadPolicy); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(dir + "/*99*"); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	if _, err := Open(Config{Dir: dir, TrustDomain: "other.test", Now: c.now}); assay.KindOf(err) != assay.Conflict {
		t.Errorf("another trust domain: %v", err)
	}
	files, _ := os.ReadDir(dir)
	for _, f := range files {
		if st, _ := f.Info(); st.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", f.Name(), st.Mode())
		}
	}
}

func TestRefusesExposedKeys(t *testing.T) {
	for name, tc := range map[string]struct {
		spoil func(dir string) error
		want  string
	}{
		"readable key":    {func(d string) error { return os.Chmod(d+"/root-1.key", 0o640) }, "mode is 0640"},
		"readable folder": {func(d string) error { return os.Chmod(d, 0o755) }, "mode is 0755"},
		"writable state":  {func(d string) error { return os.Chmod(d+"/state.json", 0o622) }, "mode is 0622"},
		"stranger's key": {func(d string) error {
			if os.Geteuid() != 0 {
				return os.ErrPermission
			}
			return os.Chown(d+"/root-1.key", 12345, -1)
		}, "belongs to uid 12345"},
		"link out of the folder": {func(d string) error {
			if err := os.Rename(d+"/root-1.key", d+"/../elsewhere"); err != nil {
				return err
			}
			return os.Symlink("../elsewhere", d+"/root-1.key")
		}, "path escapes"},
		"other key": {func(d string) error {
			b, err := os.ReadFile(d + "/workload-2.key")
			if err != nil {
				return err
			}
			return os.WriteFile(d+"/root-1.key", b, 0o600)
		}, "not that of the certificate"},
		"missing key":  {func(d string) error { return os.Remove(d + "/root-1.key") }, "backup"},
		"broken state": {func(d string) error { return os.WriteFile(d+"/state.json", []byte("{"), 0o600) }, "backup"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "ca")
			c := newClock(time.Now())
			open(t, dir, c).Close()
			if err := tc.spoil(dir); err != nil {
				t.Skip(err)
			}
			a, err := Open(Config{Dir: dir, Now: c.now})
			if err == nil {
				a.Close()
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
}

// TestPEMAsPeopleWriteIt: keys and certificates that went through other tools.
func TestPEMAsPeopleWriteIt(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	c := newClock(time.Now())
	a := open(t, dir, c)
	key := a.pairs["root-1"].key
	a.Close()
	sec1, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	text := "Key of the root\n" + string(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1}))
	if err := os.WriteFile(dir+"/root-1.key", []byte(strings.ReplaceAll(text, "\n", "\r\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	crt, err := os.ReadFile(dir + "/root-1.crt")
	if err != nil {
		t.Fatal(err)
	}
	indented := "  " + strings.ReplaceAll(strings.TrimSpace(string(crt)), "\n", " \n  ")
	if err := os.WriteFile(dir+"/root-1.crt", []byte(indented), 0o600); err != nil {
		t.Fatal(err)
	}
	open(t, dir, c)
}

// TestManyAtOnce issues while rotation goes on.
func TestManyAtOnce(t *testing.T) {
	c := newClock(time.Now())
	a := open(t, filepath.Join(t.TempDir(), "ca"), c)
	csr := request(t, newKey(t), nil)
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			for range 50 {
				cert, err := a.IssueWorkload(csr, payments, artifacts)
				if err != nil {
					t.Error(err)
					return
				}
				if err := verify(a, cert, c.now(), assay.WorkloadPolicy); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 10 {
		if _, err := a.Step(Rotate{}); err != nil {
			t.Error(err)
		}
		if _, err := a.Step(Acknowledged{NobodyLeft}); err != nil {
			t.Error(err)
		}
	}
	group.Wait()
}

func TestControlCertificateEndsWithItsRoot(t *testing.T) {
	a := open(t, filepath.Join(t.TempDir(), "ca"), newClock(time.Now()))
	cert, _, err := a.IssueControl("control")
	if err != nil {
		t.Fatal(err)
	}
	token, hash := NewToken(a.SigningRoot())
	if len(cert.Certificate) != 3 || assay.DigestOf(cert.Certificate[2]) != assay.DigestOf(a.SigningRoot()) {
		t.Errorf("chain of %d", len(cert.Certificate))
	}
	back, err := assay.ParseJoinToken(token.String() + "\n")
	if err != nil || back != token || string(TokenHash(back)) != string(hash) {
		t.Errorf("token %v", err)
	}
	for _, bad := range []string{"", "assay1", "assay2" + token.String()[6:], token.String() + ".x", token.String()[:60], strings.ToUpper(token.String())} {
		if _, err := assay.ParseJoinToken(bad); err == nil {
			t.Errorf("accepted %q", bad)
		} else if strings.Contains(err.Error(), token.String()[24:40]) {
			t.Errorf("the error tells the secret: %v", err)
		}
	}
}

func BenchmarkIssueWorkload(b *testing.B) {
	a, err := Open(Config{Dir: filepath.Join(b.TempDir(), "ca"), TrustDomain: "bank.test"})
	if err != nil {
		b.Fatal(err)
	}
	defer a.Close()
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	csr, _ := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	for b.Loop() {
		if _, err := a.IssueWorkload(csr, payments, artifacts); err != nil {
			b.Fatal(err)
		}
	}
}

// A short life is what it was asked to be, and no reason to complain about the issuer.
func TestLeafLife(t *testing.T) {
	a, err := Open(Config{Dir: t.TempDir() + "/ca", TrustDomain: "test", LeafLife: 8 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	c, err := a.IssueWorkload(csr, assay.Identity{TrustDomain: "test", Namespace: "default", Account: "web"}, assay.DigestOf(nil))
	if err != nil {
		t.Fatal(err)
	}
	if life := c.Leaf.NotAfter.Sub(now); life > 9*time.Second || life < 6*time.Second {
		t.Errorf("the leaf lives %s, want 8 s", life)
	}
	if c.RenewAt.After(c.Leaf.NotAfter) || c.RenewAt.Before(now) {
		t.Errorf("renewed at %s, ends at %s", c.RenewAt, c.Leaf.NotAfter)
	}
}
