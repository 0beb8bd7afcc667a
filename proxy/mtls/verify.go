package mtls

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	"assay.dev"
)

// Peer is who is at the other end, as its certificate says.
type Peer struct {
	Identity  assay.Identity
	Artifacts assay.Digest      // of the artifact set; "" when the leaf carries none
	Serial    string            // hexadecimal
	Leaf      [sha256.Size]byte // hash of its certificate
}

// maxChain bounds the certificates of a chain: leaf, intermediate, and room for
// cross-signing.
const maxChain = 6

// bundle is one version of the roots, with what was verified against it.
type bundle struct {
	trustDomain string
	version     uint64
	roots       *x509.CertPool

	mu       sync.Mutex
	verified map[cacheKey]window
}

// cacheKey is a leaf's digest and the usage that it was verified for. The leaf's
// signature holds whichever intermediates come with it.
type cacheKey struct {
	leaf [sha256.Size]byte
	use  x509.ExtKeyUsage
}

// window is when every certificate of a verified chain is valid.
type window struct{ from, to time.Time }

// maxVerified bounds the cache; a full one is started again.
const maxVerified = 4096

func newBundle(trustDomain string, version uint64, roots [][]byte) (*bundle, error) {
	if len(roots) == 0 {
		return nil, errors.New("it has no roots")
	}
	b := &bundle{trustDomain: trustDomain, version: version, roots: x509.NewCertPool(), verified: map[cacheKey]window{}}
	for n, der := range roots {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("root %d: %w", n, err)
		}
		if !c.IsCA || !c.BasicConstraintsValid {
			return nil, fmt.Errorf("root %d (%s) is no authority", n, name(c))
		}
		b.roots.AddCert(c)
	}
	return b, nil
}

// verify decides about a peer: its leaf's form, its trust domain, its chain and its
// time. Only the signatures are remembered.
func (b *bundle) verify(chain []*x509.Certificate, use x509.ExtKeyUsage, now time.Time) (Peer, error) {
	if len(chain) == 0 {
		return Peer{}, &Error{Reason: NoCertificate, Err: errors.New("the peer showed none")}
	}
	leaf := chain[0]
	if len(chain) > maxChain {
		return Peer{}, malformed(leaf, "comes with %d certificates, at most %d", len(chain), maxChain)
	}
	peer, err := checkLeaf(leaf)
	if err != nil {
		return Peer{}, err
	}
	if peer.Identity.TrustDomain != b.trustDomain {
		return Peer{}, &Error{Reason: UnknownAuthority, Peer: peer.Identity.String(), Err: fmt.Errorf("our trust domain is %s", b.trustDomain)}
	}
	key := cacheKey{peer.Leaf, use}
	b.mu.Lock()
	w, ok := b.verified[key]
	b.mu.Unlock()
	if ok && !now.Before(w.from) && !now.After(w.to) {
		return peer, nil
	}
	if w, err = b.chain(chain, use, now); err != nil {
		return Peer{}, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.verified) >= maxVerified {
		clear(b.verified)
	}
	b.verified[key] = w
	return peer, nil
}

// chain looks for a path to a root on which everything was made for workloads, and
// returns when it holds.
func (b *bundle) chain(chain []*x509.Certificate, use x509.ExtKeyUsage, now time.Time) (window, error) {
	leaf := chain[0]
	if err := checkTime(leaf, now); err != nil {
		return window{}, err
	}
	inter := x509.NewCertPool()
	for _, c := range chain[1:] {
		inter.AddCert(c)
	}
	paths, err := leaf.Verify(x509.VerifyOptions{
		Roots: b.roots, Intermediates: inter, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{use},
	})
	if err != nil {
		reason := Malformed
		if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
			reason = UnknownAuthority
		}
		if e, ok := errors.AsType[x509.CertificateInvalidError](err); ok {
			switch {
			case e.Reason == x509.Expired && e.Cert != nil && now.Before(e.Cert.NotBefore):
				reason = NotYetValid
			case e.Reason == x509.Expired:
				reason = Expired
			case e.Reason == x509.NotAuthorizedToSign:
				reason = UnknownAuthority
			}
		}
		return window{}, &Error{Reason: reason, Peer: name(leaf), Err: fmt.Errorf("trust bundle %d: %w", b.version, err)}
	}
	var best window
	var other error // why paths do not count: an authority for hosts and operators made them
	for _, path := range paths {
		if err := assay.CheckPolicy(path, assay.WorkloadPolicy); err != nil {
			other = err
			continue
		}
		w := window{path[0].NotBefore, path[0].NotAfter}
		for _, c := range path[1:] {
			if c.NotBefore.After(w.from) {
				w.from = c.NotBefore
			}
			if c.NotAfter.Before(w.to) {
				w.to = c.NotAfter
			}
		}
		if w.to.After(best.to) {
			best = w
		}
	}
	if best.to.IsZero() {
		return window{}, &Error{Reason: UnknownAuthority, Peer: name(leaf), Err: fmt.Errorf("trust bundle %d: %w", b.version, other)}
	}
	return best, nil
}

// checkLeaf holds a leaf to the X509-SVID specification (sections 2 to 4) and to
// what Assay puts into it.
func checkLeaf(leaf *x509.Certificate) (Peer, error) {
	switch {
	case leaf.IsCA:
		return Peer{}, malformed(leaf, "is an authority's, not a workload's")
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return Peer{}, malformed(leaf, "may not sign (key usage digitalSignature)")
	case leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return Peer{}, malformed(leaf, "may sign certificates or revocation lists")
	}
	var server, client bool
	for _, use := range leaf.ExtKeyUsage {
		server = server || use == x509.ExtKeyUsageServerAuth
		client = client || use == x509.ExtKeyUsageClientAuth
	}
	if !server || !client {
		return Peer{}, malformed(leaf, "is not for both client and server authentication")
	}
	id, err := assay.CertificateIdentity(leaf)
	if err != nil {
		return Peer{}, &Error{Reason: Malformed, Peer: name(leaf), Err: err}
	}
	artifacts, err := assay.CertificateArtifacts(leaf)
	if err != nil {
		return Peer{}, &Error{Reason: Malformed, Peer: name(leaf), Err: err}
	}
	return Peer{Identity: id, Artifacts: artifacts, Serial: leaf.SerialNumber.Text(16), Leaf: sha256.Sum256(leaf.Raw)}, nil
}

func checkTime(leaf *x509.Certificate, now time.Time) error {
	switch {
	case now.Before(leaf.NotBefore):
		return &Error{Reason: NotYetValid, Peer: name(leaf), Err: fmt.Errorf("valid from %s, it is %s", stamp(leaf.NotBefore), stamp(now))}
	case now.After(leaf.NotAfter):
		return &Error{Reason: Expired, Peer: name(leaf), Err: fmt.Errorf("valid until %s, it is %s", stamp(leaf.NotAfter), stamp(now))}
	}
	return nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func malformed(leaf *x509.Certificate, format string, args ...any) error {
	return &Error{Reason: Malformed, Peer: name(leaf), Err: fmt.Errorf("certificate "+format, args...)}
}

// name is how a certificate is called in an error: whatever name it claims, quoted,
// and its serial.
func name(c *x509.Certificate) string {
	if len(c.URIs) > 0 {
		return fmt.Sprintf("%q serial %x", c.URIs[0].String(), c.SerialNumber)
	}
	return fmt.Sprintf("%q serial %x", c.Subject.String(), c.SerialNumber)
}
