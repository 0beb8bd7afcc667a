package mtls

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"assay.dev"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// result is how a handshake went on both sides, first read included.
type result struct {
	client, server       Peer
	clientErr, serverErr error
	clientState          tls.ConnectionState
}

// shake makes a connection over loopback TCP and completes the handshake.
func shake(t testing.TB, client, server *tls.Config) result {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var r result
	var wg sync.WaitGroup
	wg.Go(func() {
		raw, err := l.Accept()
		if err != nil {
			r.serverErr = err
			return
		}
		defer raw.Close()
		c := tls.Server(raw, server)
		if r.server, r.serverErr = Handshake(ctx, c); r.serverErr == nil {
			_, r.serverErr = c.Write([]byte("k"))
		}
	})
	raw, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	c := tls.Client(raw, client)
	if r.client, r.clientErr = Handshake(ctx, c); r.clientErr == nil {
		raw.SetReadDeadline(time.Now().Add(10 * time.Second))
		_, r.clientErr = c.Read(make([]byte, 1))
		r.clientState = c.ConnectionState()
	} else {
		raw.Close()
	}
	wg.Wait()
	return r
}

func TestBothSidesKnowEachOther(t *testing.T) {
	a := newAuthority(t)
	alice, bob := a.identity("alice"), a.identity("bob")
	digest := assay.DigestOf([]byte("the set"))
	ext, err := assay.MarshalArtifactExtension(digest)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := bob.Request()
	if err != nil {
		t.Fatal(err)
	}
	if err := bob.Install(a.answer(csr, func(c *x509.Certificate) { c.ExtraExtensions = []pkix.Extension{ext} })); err != nil {
		t.Fatal(err)
	}
	r := shake(t, alice.Client(bob.ID()), bob.Server(assay.Identity{}))
	if r.clientErr != nil || r.serverErr != nil {
		t.Fatal(r.clientErr, r.serverErr)
	}
	if r.client.Identity != bob.ID() || r.client.Artifacts != digest || r.client.Serial != bob.Status().Serial {
		t.Errorf("client saw %+v", r.client)
	}
	if r.server.Identity != alice.ID() || r.server.Artifacts != "" || r.server.Serial != alice.Status().Serial {
		t.Errorf("server saw %+v", r.server)
	}
	if bob.Status().Artifacts != digest || bob.Status().Bundle != 1 {
		t.Errorf("status %+v", bob.Status())
	}
}

// TestNoResumption makes two connections with one pair of configurations and a
// session cache forced upon the client: the second is a full handshake too.
func TestNoResumption(t *testing.T) {
	a := newAuthority(t)
	alice, bob := a.identity("alice"), a.identity("bob")
	client, server := alice.Client(bob.ID()), bob.Server(assay.Identity{})
	if client.ClientSessionCache != nil {
		t.Error("the client keeps sessions")
	}
	client.ClientSessionCache = tls.NewLRUClientSessionCache(8)
	for range 2 {
		r := shake(t, client, server)
		if r.clientErr != nil || r.serverErr != nil || r.clientState.DidResume {
			t.Fatal(r.clientErr, r.serverErr, r.clientState.DidResume)
		}
	}
}

func TestRefusals(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	good := a.identity("good")
	change := func(f func(*x509.Certificate)) *Identity { return a.bad("peer", f) }
	badExt := func(value []byte) func(c *x509.Certificate) {
		return func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: assay.ArtifactExtension, Value: value}}
		}
	}
	short, _ := asn1.Marshal([]byte("too short"))
	u := func(s string) *url.URL {
		v, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	for name, tc := range map[string]struct {
		peer *Identity
		want Reason
		// spiffe is whether the SPIFFE library accepts the chain too: we are
		// stricter in the cases that say so.
		spiffe bool
	}{
		"wrong trust domain":       {change(func(c *x509.Certificate) { c.URIs = []*url.URL{u("spiffe://elsewhere/ns/bank/sa/peer")} }), UnknownAuthority, false},
		"other root":               {other.identity("peer"), UnknownAuthority, false},
		"expired":                  {change(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), Expired, false},
		"not yet valid":            {change(func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), NotYetValid, false},
		"two URIs":                 {change(func(c *x509.Certificate) { c.URIs = append(c.URIs, workload("bob").URL()) }), Malformed, false},
		"no URI":                   {change(func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"peer"} }), Malformed, false},
		"authority as leaf":        {change(func(c *x509.Certificate) { c.IsCA = true; c.KeyUsage |= x509.KeyUsageCertSign }), Malformed, false},
		"may sign certificates":    {change(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), Malformed, false},
		"may sign lists":           {change(func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign }), Malformed, false},
		"no digitalSignature":      {change(func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }), Malformed, true},
		"client use only":          {change(func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }), Malformed, true},
		"server use only":          {change(func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }), Malformed, true},
		"a host":                   {change(func(c *x509.Certificate) { c.URIs = []*url.URL{assay.Infrastructure(testDomain, "host", "x")} }), Malformed, true},
		"artifacts not DER":        {change(badExt([]byte("junk"))), Malformed, true},
		"artifacts of wrong size":  {change(badExt(short)), Malformed, true},
		"path with escapes":        {change(func(c *x509.Certificate) { c.URIs = []*url.URL{u("spiffe://bank.test/ns/bank/sa/pe%65r")} }), Malformed, false},
		"identity with a fragment": {change(func(c *x509.Certificate) { c.URIs = []*url.URL{u("spiffe://bank.test/ns/bank/sa/peer#x")} }), Malformed, false},
	} {
		t.Run(name, func(t *testing.T) {
			// Whoever looks at the certificate refuses it for the reason; whoever
			// showed it learns that it was refused. An expired one is not even shown.
			r := shake(t, good.Client(workload("peer")), tc.peer.Server(assay.Identity{}))
			shown := tc.want != Expired && tc.want != NotYetValid
			if shown && (ReasonOf(r.clientErr) != tc.want || ReasonOf(r.serverErr) != PeerRefused) ||
				!shown && (ReasonOf(r.clientErr) != PeerRefused || ReasonOf(r.serverErr) != tc.want) {
				t.Errorf("as server: client says %q (%v), server %q (%v)", ReasonOf(r.clientErr), r.clientErr, ReasonOf(r.serverErr), r.serverErr)
			}
			trusting := tc.peer.Client(workload("good"))
			trusting.VerifyConnection = nil // the bad client cares for nothing
			forced := tc.peer.cert.Load()
			trusting.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &forced.Certificate, nil }
			r = shake(t, trusting, good.Server(assay.Identity{}))
			if ReasonOf(r.serverErr) != tc.want || ReasonOf(r.clientErr) != PeerRefused {
				t.Errorf("as client: server says %q (%v), client %q (%v)", ReasonOf(r.serverErr), r.serverErr, ReasonOf(r.clientErr), r.clientErr)
			}
			if e, ok := errors.AsType[*Error](r.serverErr); !ok || e.Remedy() == "" {
				t.Errorf("no remedy in %v", r.serverErr)
			}
			// The SPIFFE library agrees, where it has an opinion.
			if accepted := spiffeAccepts(t, a, forced); accepted != tc.spiffe {
				t.Errorf("go-spiffe accepts: %v, want %v", accepted, tc.spiffe)
			}
		})
	}
}

func spiffeAccepts(t *testing.T, a *authority, c *certificate) bool {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString(testDomain)
	bundle := x509bundle.FromX509Authorities(td, []*x509.Certificate{a.root})
	_, _, err := x509svid.ParseAndVerify(c.Certificate.Certificate, bundle)
	return err == nil
}

func TestIdentityMismatch(t *testing.T) {
	a := newAuthority(t)
	alice, bob := a.identity("alice"), a.identity("bob")
	for _, expected := range []assay.Identity{workload("carol"), {}} {
		r := shake(t, alice.Client(expected), bob.Server(assay.Identity{}))
		if ReasonOf(r.clientErr) != IdentityMismatch || ReasonOf(r.serverErr) != PeerRefused {
			t.Errorf("expected %q: %v, %v", expected, r.clientErr, r.serverErr)
		}
	}
}

// TestClientsAddress: who is known to live where a connection comes from must be who
// it is; where nobody is known, anybody of the mesh may be.
func TestClientsAddress(t *testing.T) {
	a := newAuthority(t)
	alice, bob := a.identity("alice"), a.identity("bob")
	for _, expected := range []assay.Identity{alice.ID(), {}} {
		if r := shake(t, alice.Client(bob.ID()), bob.Server(expected)); r.clientErr != nil || r.serverErr != nil {
			t.Errorf("expected %q: %v, %v", expected, r.clientErr, r.serverErr)
		}
	}
	r := shake(t, alice.Client(bob.ID()), bob.Server(workload("carol")))
	if ReasonOf(r.serverErr) != IdentityMismatch || ReasonOf(r.clientErr) != PeerRefused {
		t.Errorf("%v, %v", r.serverErr, r.clientErr)
	}
}

func TestMissingClientCertificate(t *testing.T) {
	a := newAuthority(t)
	alice, bob := a.identity("alice"), a.identity("bob")
	c := alice.Client(bob.ID())
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &tls.Certificate{}, nil }
	r := shake(t, c, bob.Server(assay.Identity{}))
	if ReasonOf(r.serverErr) != NoCertificate || ReasonOf(r.clientErr) != PeerRefused {
		t.Errorf("%v, %v", r.serverErr, r.clientErr)
	}
	// One that has none yet says so itself, on either side.
	nobody := New(workload("nobody"))
	if r := shake(t, nobody.Client(bob.ID()), bob.Server(assay.Identity{})); ReasonOf(r.clientErr) != NoCertificate {
		t.Errorf("client without certificate: %v", r.clientErr)
	}
	if r := shake(t, alice.Client(nobody.ID()), nobody.Server(assay.Identity{})); ReasonOf(r.serverErr) != NoCertificate || ReasonOf(r.clientErr) != PeerRefused {
		t.Errorf("server without certificate: %v, %v", r.serverErr, r.clientErr)
	}
}

func TestALPN(t *testing.T) {
	a := newAuthority(t)
	alice, bob := a.identity("alice"), a.identity("bob")
	for _, protos := range [][]string{nil, {"h2"}} {
		c, s := alice.Client(bob.ID()), bob.Server(assay.Identity{})
		c.NextProtos, c.VerifyConnection = protos, nil
		if r := shake(t, c, bob.Server(assay.Identity{})); ReasonOf(r.serverErr) != BadALPN {
			t.Errorf("client offers %q: server says %v, client %v", protos, r.serverErr, r.clientErr)
		}
		s.NextProtos = protos
		if r := shake(t, alice.Client(bob.ID()), s); ReasonOf(r.clientErr) != BadALPN {
			t.Errorf("server offers %q: client says %v, server %v", protos, r.clientErr, r.serverErr)
		}
	}
}

func TestOldTLSRefused(t *testing.T) {
	a := newAuthority(t)
	alice, bob := a.identity("alice"), a.identity("bob")
	c := alice.Client(bob.ID())
	c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	if r := shake(t, c, bob.Server(assay.Identity{})); r.serverErr == nil || r.clientErr == nil {
		t.Error("TLS 1.2 was accepted")
	}
}

// TestRotation goes from one root to another with both in the bundle in between,
// while configurations made at the start stay in use.
func TestRotation(t *testing.T) {
	older, newer := newAuthority(t), newAuthority(t)
	alice, bob := older.identity("alice"), older.identity("bob")
	client, server := alice.Client(bob.ID()), bob.Server(assay.Identity{})
	check := func(when string, want Reason) {
		t.Helper()
		r := shake(t, client, server)
		if ReasonOf(r.clientErr) != want || want == "" && r.serverErr != nil {
			t.Errorf("%s: %v, %v", when, r.clientErr, r.serverErr)
		}
	}
	set := func(i *Identity, version uint64, roots ...[]byte) {
		t.Helper()
		if err := i.SetBundle(version, roots); err != nil {
			t.Fatal(err)
		}
	}
	check("before", "")
	set(alice, 2, older.root.Raw, newer.root.Raw)
	check("one side has both", "")
	set(bob, 2, older.root.Raw, newer.root.Raw)
	newer.renew(bob)
	check("the server is renewed", "")
	newer.renew(alice)
	check("both are renewed", "")
	set(alice, 3, newer.root.Raw)
	set(bob, 3, newer.root.Raw)
	check("the old root is gone", "")
	if got := bob.Status().Bundle; got != 3 {
		t.Errorf("bundle version %d, want 3", got)
	}
	older.serial += 10
	bob.cert.Store(older.bad("bob", func(*x509.Certificate) {}).cert.Load())
	check("a certificate of the old root", UnknownAuthority)
}

// What signs hosts and operators cannot make a workload, whatever name it writes.
func TestOtherPurposesAreRefused(t *testing.T) {
	a := newAuthority(t)
	b := a.identity("alice").pool.Load()
	id := workload("bob").URL()
	hosts := *a.inter
	hosts.Policies = []x509.OID{assay.InfrastructurePolicy}
	key := newKey(t)
	inter := a.sign(&hosts, a.root, key.Public(), a.rootKey)
	none := a.leaf(id)
	none.Policies = nil
	for what, chain := range map[string][]*x509.Certificate{
		"an intermediate for hosts":     {a.sign(a.leaf(id), inter, newKey(t).Public(), key), inter},
		"a leaf without a purpose":      {a.sign(none, a.inter, newKey(t).Public(), a.interKey), a.inter},
		"a leaf right beneath the root": {a.sign(none, a.root, newKey(t).Public(), a.rootKey)},
	} {
		if _, err := b.verify(chain, x509.ExtKeyUsageServerAuth, time.Now()); ReasonOf(err) != UnknownAuthority {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := b.verify([]*x509.Certificate{a.sign(a.leaf(id), a.inter, newKey(t).Public(), a.interKey), a.inter}, x509.ExtKeyUsageServerAuth, time.Now()); err != nil {
		t.Error(err)
	}
}

// TestCacheStillChecks: a verified leaf is remembered, its time and the bundle are
// looked at again.
func TestCacheStillChecks(t *testing.T) {
	a := newAuthority(t)
	i := a.identity("alice")
	leaf := i.cert.Load().Leaf
	b := i.pool.Load()
	chain := []*x509.Certificate{leaf, a.inter}
	now := time.Now()
	for range 2 {
		if _, err := b.verify(chain, x509.ExtKeyUsageServerAuth, now); err != nil {
			t.Fatal(err)
		}
	}
	if len(b.verified) != 1 {
		t.Fatalf("%d entries in the cache", len(b.verified))
	}
	if _, err := b.verify(chain[:1], x509.ExtKeyUsageServerAuth, now); err != nil {
		t.Error("the cache was not used:", err)
	}
	if _, err := b.verify(chain, x509.ExtKeyUsageServerAuth, leaf.NotAfter.Add(time.Second)); ReasonOf(err) != Expired {
		t.Error(err)
	}
	if _, err := b.verify(chain, x509.ExtKeyUsageServerAuth, leaf.NotBefore.Add(-time.Second)); ReasonOf(err) != NotYetValid {
		t.Error(err)
	}
	// The leaf outlives its issuer: the chain's window counts, not the leaf's.
	tmpl := a.leaf(workload("long").URL())
	tmpl.NotAfter = a.inter.NotAfter.Add(time.Hour)
	key := newKey(t)
	long := []*x509.Certificate{a.sign(tmpl, a.inter, key.Public(), a.interKey), a.inter}
	if _, err := b.verify(long, x509.ExtKeyUsageServerAuth, now); err != nil {
		t.Fatal(err)
	}
	if _, err := b.verify(long, x509.ExtKeyUsageServerAuth, a.inter.NotAfter.Add(time.Minute)); ReasonOf(err) != Expired {
		t.Error(err)
	}
	for n := range maxVerified + 10 {
		b.verified[cacheKey{leaf: [32]byte{byte(n), byte(n >> 8)}}] = window{}
	}
	if _, err := b.verify([]*x509.Certificate{long[0], a.inter}, x509.ExtKeyUsageClientAuth, now); err != nil || len(b.verified) > maxVerified {
		t.Error("the cache is not bounded:", len(b.verified), err)
	}
}

func TestInstall(t *testing.T) {
	a, other := newAuthority(t), newAuthority(t)
	i := a.identity("alice")
	serial := i.Status().Serial
	request := func() []byte {
		csr, err := i.Request()
		if err != nil {
			t.Fatal(err)
		}
		return csr
	}
	foreign, err := New(workload("alice")).Request()
	if err != nil {
		t.Fatal(err)
	}
	for name, chain := range map[string][][]byte{
		"empty":         nil,
		"not DER":       {[]byte("x")},
		"not our key":   a.answer(foreign, nil),
		"other name":    a.answer(request(), func(c *x509.Certificate) { c.URIs = []*url.URL{workload("mallory").URL()} }),
		"expired":       a.answer(request(), func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }),
		"other root":    other.answer(request(), nil),
		"no client use": a.answer(request(), func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }),
		"overtaken":     a.answer(func() []byte { c := request(); a.renew(i); serial = i.Status().Serial; return c }(), nil),
	} {
		err := i.Install(chain)
		if assay.KindOf(err) != assay.Invalid || !strings.Contains(err.Error(), "install certificate of spiffe://bank.test/ns/bank/sa/alice") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := i.Status().Serial; got != serial {
		t.Error("a refused chain replaced the certificate in use")
	}
	// Two requests may be under way; the answers count by their keys.
	first, second := request(), request()
	if err := i.Install(a.answer(first, nil)); err != nil {
		t.Error(err)
	}
	if err := i.Install(a.answer(second, nil)); err != nil {
		t.Error(err)
	}
	for range maxPending {
		request()
	}
	if err := i.Install(a.answer(second, nil)); err == nil {
		t.Error("a used request was answered twice")
	}
	if err := i.SetBundle(9, nil); assay.KindOf(err) != assay.Invalid || i.Status().Bundle == 9 {
		t.Error("an empty bundle was taken")
	}
	if err := i.SetBundle(9, [][]byte{i.cert.Load().Leaf.Raw}); assay.KindOf(err) != assay.Invalid {
		t.Error("a leaf was taken for a root")
	}
}

func TestWait(t *testing.T) {
	a := newAuthority(t)
	synctest.Test(t, func(t *testing.T) {
		i := New(workload("late"))
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		begin := time.Now()
		err := i.Wait(ctx)
		if ReasonOf(err) != NoCertificate || time.Since(begin) != 2*time.Second || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("after %v: %v", time.Since(begin), err)
		}
	})
	i := New(workload("late"))
	done := make(chan error, 1)
	go func() { done <- i.Wait(t.Context()) }()
	if err := i.SetBundle(1, a.roots()); err != nil {
		t.Fatal(err)
	}
	a.renew(i)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := i.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestTimeoutAndDisconnect(t *testing.T) {
	a := newAuthority(t)
	alice := a.identity("alice")
	near, far := net.Pipe()
	defer far.Close()
	go func() { far.Read(make([]byte, 4096)) }()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := Handshake(ctx, tls.Client(near, alice.Client(workload("bob")))); ReasonOf(err) != Timeout {
		t.Error(err)
	}
	near, far = net.Pipe()
	far.Close()
	if _, err := Handshake(t.Context(), tls.Client(near, alice.Client(workload("bob")))); ReasonOf(err) != Disconnected {
		t.Error(err)
	}
}

func BenchmarkHandshake(b *testing.B) {
	a := newAuthority(b)
	alice, bob := a.identity("alice"), a.identity("bob")
	client, server := alice.Client(bob.ID()), bob.Server(assay.Identity{})
	for b.Loop() {
		if r := shake(b, client, server); r.clientErr != nil || r.serverErr != nil {
			b.Fatal(r.clientErr, r.serverErr)
		}
	}
}
