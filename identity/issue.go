package identity

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/url"
	"time"

	"assay.dev"
)

// How long leaves live. A host's is longer than a workload's so that a machine
// that was off over a long weekend comes back without a person.
const (
	WorkloadLife    = 24 * time.Hour
	HostLife        = 7 * day
	PodLife         = 24 * time.Hour // of a pod that is a host: it can join again at any time
	ControlLife     = 24 * time.Hour
	MaxOperatorLife = 30 * day
)

// Certificate is a certificate that was just signed.
type Certificate struct {
	Chain   [][]byte // DER, leaf first, without the root
	Leaf    *x509.Certificate
	Issuer  *x509.Certificate
	Issued  time.Time
	RenewAt time.Time
}

// IssueWorkload signs a workload's certificate. artifacts is the digest of the set
// that the workload runs. The caller has checked that it may have one.
func (a *Authority) IssueWorkload(csr []byte, id assay.Identity, artifacts assay.Digest) (*Certificate, error) {
	if id.TrustDomain != a.trustDomain {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "sign " + id.String(), Err: fmt.Errorf("the mesh's trust domain is %s", a.trustDomain)}
	}
	if _, err := assay.ParseIdentity(id.String()); err != nil {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "sign " + id.String(), Err: err}
	}
	ext, err := assay.MarshalArtifactExtension(artifacts)
	if err != nil {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "sign " + id.String(), Err: err, Remedy: "attest what the workload runs"}
	}
	key, err := requestKey(csr, id.URL())
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{}
	tmpl.ExtraExtensions = append(tmpl.ExtraExtensions, ext)
	return a.sign(Workloads, id.URL(), key, a.leafLife, tmpl)
}

// IssueHost signs a host's certificate.
func (a *Authority) IssueHost(csr []byte, hostID string) (*Certificate, error) {
	return a.infrastructure(csr, "host", hostID, HostLife)
}

// IssueOperator signs the certificate of a person or machine: role is "viewer" or
// "operator".
func (a *Authority) IssueOperator(csr []byte, name, role string, life time.Duration) (*Certificate, error) {
	op := "sign " + role + " " + name
	if role != "viewer" && role != "operator" {
		return nil, &assay.Error{Kind: assay.Invalid, Op: op, Err: errors.New("unknown role"), Remedy: "want viewer or operator"}
	}
	if life < time.Minute || life > MaxOperatorLife {
		return nil, &assay.Error{Kind: assay.Invalid, Op: op, Err: fmt.Errorf("life of %s", life), Remedy: fmt.Sprintf("want a minute to %d days", MaxOperatorLife/day)}
	}
	return a.infrastructure(csr, role, name, life)
}

// IssuePod signs the certificate of a host that is one pod.
func (a *Authority) IssuePod(csr []byte, hostID string) (*Certificate, error) {
	return a.infrastructure(csr, "host", hostID, PodLife)
}

func (a *Authority) infrastructure(csr []byte, role, name string, life time.Duration) (*Certificate, error) {
	if !assay.ValidName(name) {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "sign " + role + " " + name, Err: errors.New("a name may hold a-z, 0-9 and '-', 63 characters at most")}
	}
	id := assay.Infrastructure(a.trustDomain, role, name)
	key, err := requestKey(csr, id)
	if err != nil {
		return nil, err
	}
	return a.sign(Infrastructure, id, key, life, &x509.Certificate{})
}

// IssueControl makes a key and certificate for control itself, with its root at
// the end of the chain, because a host that joins knows only the root's digest.
// names are DNS names for those who know nothing of identities.
func (a *Authority) IssueControl(name string, names ...string) (tls.Certificate, time.Time, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, time.Time{}, err
	}
	c, err := a.sign(Infrastructure, assay.Infrastructure(a.trustDomain, "control", name), &key.PublicKey, ControlLife, &x509.Certificate{DNSNames: names})
	if err != nil {
		return tls.Certificate{}, time.Time{}, err
	}
	a.mu.RLock()
	defer a.mu.RUnlock()
	for _, p := range a.pairs {
		if c.Issuer.CheckSignatureFrom(p.cert) == nil {
			c.Chain = append(c.Chain, p.cert.Raw)
			break
		}
	}
	return tls.Certificate{Certificate: c.Chain, PrivateKey: key, Leaf: c.Leaf}, c.RenewAt, nil
}

// sign fills in what all leaves have in common.
func (a *Authority) sign(use Use, id *url.URL, key crypto.PublicKey, life time.Duration, tmpl *x509.Certificate) (*Certificate, error) {
	a.mu.Lock() // until the leaf is remembered: else its root could retire before it
	defer a.mu.Unlock()
	im := a.state.Workload
	if use == Infrastructure {
		im = a.state.Infrastructure
	}
	issuer, root := a.pairs[im.ID], a.pairs[im.Root]

	now := a.now()
	if apart := now.Sub(a.confirmed); a.shared && apart > a.policy.Apart {
		return nil, &assay.Error{Kind: assay.Unavailable, Op: "sign " + id.String(), Err: fmt.Errorf("the authority's keys could not be compared with those in the store for %s: others may have replaced them", apart.Round(time.Second)),
			Remedy: "bring the store back, or ask another control"}
	}
	tmpl.SerialNumber = newSerial()
	tmpl.NotBefore = latest(now.Add(-a.policy.Skew), issuer.cert.NotBefore, root.cert.NotBefore)
	tmpl.NotAfter = earliest(now.Add(life), issuer.cert.NotAfter, root.cert.NotAfter)
	if left := tmpl.NotAfter.Sub(now); left < life && left < 2*a.policy.Skew {
		return nil, &assay.Error{Kind: assay.Internal, Op: "sign " + id.String(), Err: fmt.Errorf("%s ends at %s", issuer.id, issuer.cert.NotAfter),
			Remedy: "check the clock of this machine and that rotation runs"}
	}
	tmpl.URIs = []*url.URL{id}
	tmpl.BasicConstraintsValid = true
	tmpl.KeyUsage = x509.KeyUsageDigitalSignature
	tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	tmpl.Policies = []x509.OID{policyOf(use)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, issuer.cert, key, issuer.key)
	if err != nil {
		return nil, &assay.Error{Kind: assay.Internal, Op: "sign " + id.String(), Err: err}
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, &assay.Error{Kind: assay.Internal, Op: "sign " + id.String(), Err: err}
	}
	a.remember(im.Root, leaf.NotAfter)
	return &Certificate{
		Chain: [][]byte{der, issuer.cert.Raw}, Leaf: leaf, Issuer: issuer.cert, Issued: now,
		RenewAt: RenewAt(now, leaf.NotAfter, mathrand.Float64()),
	}, nil
}

// remember, under mu, keeps how long the leaves beneath a root live. What does not take it
// now stops no renewal: it is stored with the next Step.
func (a *Authority) remember(root string, notAfter time.Time) {
	next, _ := Step(a.state, Issued{root, notAfter}, a.now(), a.policy)
	for i := range next.Roots {
		if !next.Roots[i].Leaves.Equal(a.state.Roots[i].Leaves) {
			a.state, a.dirty = next, true
			// With others it takes a network, and may wait: see Policy.Apart.
			if !a.shared && a.stepping.TryLock() {
				swapped, err := a.save(next, a.pairs, nil)
				a.dirty = err != nil || !swapped
				a.stepping.Unlock()
			}
			return
		}
	}
}

// SignedBy returns when a leaf was signed at the latest that begins at notBefore: leaves begin earlier,
// for verifiers whose clocks are behind, and are dated to the second.
func (a *Authority) SignedBy(notBefore time.Time) time.Time {
	return notBefore.Add(a.policy.Skew + time.Second)
}

// RenewAt returns when a certificate that lives from now to notAfter is renewed: at
// half of its life, ten per cent of the life earlier or later by r in [0, 1), so
// that what started together does not renew together.
func RenewAt(now, notAfter time.Time, r float64) time.Time {
	life := float64(notAfter.Sub(now))
	return now.Add(time.Duration(life * (0.4 + 0.2*r)))
}

func latest(t ...time.Time) time.Time {
	out := t[0]
	for _, x := range t[1:] {
		if x.After(out) {
			out = x
		}
	}
	return out
}

func earliest(t ...time.Time) time.Time {
	out := t[0]
	for _, x := range t[1:] {
		if x.Before(out) {
			out = x
		}
	}
	return out
}
