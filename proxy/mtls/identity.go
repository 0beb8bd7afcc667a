package mtls

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"assay.dev"
)

// Identity is one workload's live identity: its certificate with the key, and the
// trust bundle. The zero value is not usable.
type Identity struct {
	id   assay.Identity
	cert atomic.Pointer[certificate]
	pool atomic.Pointer[bundle]

	mu      sync.Mutex // orders changes
	pending []*ecdsa.PrivateKey
	ready   chan struct{} // closed once there are a certificate and a bundle
}

type certificate struct {
	tls.Certificate
	artifacts assay.Digest
	serial    string
}

// maxPending bounds the keys whose certificate requests are unanswered; the oldest
// is forgotten.
const maxPending = 4

// New returns the identity of workload id, without certificate and bundle.
func New(id assay.Identity) *Identity {
	return &Identity{id: id, ready: make(chan struct{})}
}

// ID returns the workload's identity.
func (i *Identity) ID() assay.Identity { return i.id }

// Request makes a fresh key and returns a certificate request for it, in DER, with
// the SPIFFE ID as its only name. The certificate in use stays until Install.
func (i *Identity) Request() ([]byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, &assay.Error{Op: "make key for " + i.id.String(), Err: err}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		SignatureAlgorithm: x509.ECDSAWithSHA256,
		URIs:               []*url.URL{i.id.URL()},
	}, key)
	if err != nil {
		return nil, &assay.Error{Op: "make certificate request for " + i.id.String(), Err: err}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if len(i.pending) == maxPending {
		i.pending = append(i.pending[:0], i.pending[1:]...)
	}
	i.pending = append(i.pending, key)
	return der, nil
}

// Install takes the answer to a Request: the chain in DER, leaf first. It refuses a
// chain that peers would refuse and then leaves the old one in use.
func (i *Identity) Install(chain [][]byte) error {
	fail := func(err error, remedy string) error {
		return &assay.Error{Kind: assay.Invalid, Op: "install certificate of " + i.id.String(), Err: err, Remedy: remedy}
	}
	if len(chain) == 0 || len(chain) > maxChain {
		return fail(fmt.Errorf("%d certificates, want 1 to %d", len(chain), maxChain), "")
	}
	parsed := make([]*x509.Certificate, len(chain))
	for n, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fail(fmt.Errorf("certificate %d: %w", n, err), "")
		}
		parsed[n] = c
	}
	leaf := parsed[0]

	i.mu.Lock()
	defer i.mu.Unlock()
	at := -1
	for n, key := range i.pending {
		if key.PublicKey.Equal(leaf.PublicKey) {
			at = n
		}
	}
	if at < 0 {
		return fail(errors.New("its key is none that we asked for"), "send a new request")
	}
	peer, err := checkLeaf(leaf)
	if err == nil {
		err = checkTime(leaf, time.Now())
	}
	if err == nil && peer.Identity != i.id {
		err = &Error{Reason: IdentityMismatch, Peer: peer.Identity.String(), Err: errors.New("issued for somebody else")}
	}
	if b := i.pool.Load(); err == nil && b != nil {
		for _, use := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
			if _, err = b.chain(parsed, use, time.Now()); err != nil {
				break
			}
		}
	}
	if err != nil {
		if e, ok := errors.AsType[*Error](err); ok {
			return fail(err, e.Remedy())
		}
		return fail(err, "")
	}
	c := &certificate{
		Certificate: tls.Certificate{Certificate: chain, PrivateKey: i.pending[at], Leaf: leaf},
		artifacts:   peer.Artifacts, serial: peer.Serial,
	}
	i.pending = append(i.pending[:0], i.pending[at+1:]...) // older ones are overtaken
	i.cert.Store(c)
	i.readyLocked()
	return nil
}

// SetBundle takes a trust bundle: the roots in DER. What chains to none of them is
// refused from the next handshake on. A bad bundle leaves the old one in use.
func (i *Identity) SetBundle(version uint64, roots [][]byte) error {
	b, err := newBundle(i.id.TrustDomain, version, roots)
	if err != nil {
		return &assay.Error{Kind: assay.Invalid, Op: fmt.Sprintf("take trust bundle %d of %s", version, i.id.TrustDomain), Err: err}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.pool.Store(b)
	i.readyLocked()
	return nil
}

func (i *Identity) readyLocked() {
	if i.cert.Load() == nil || i.pool.Load() == nil {
		return
	}
	select {
	case <-i.ready:
	default:
		close(i.ready)
	}
}

// Wait returns once there are a certificate and a bundle. The caller bounds it by
// ctx; the error's reason is no-certificate then.
func (i *Identity) Wait(ctx context.Context) error {
	select {
	case <-i.ready:
		return nil
	default:
	}
	select {
	case <-i.ready:
		return nil
	case <-ctx.Done():
		return &Error{Reason: NoCertificate, Peer: i.id.String(), Err: fmt.Errorf("none was issued in time: %w", context.Cause(ctx))}
	}
}

// Status is what is in use, for Hello, Ack and `assay get certificates`.
type Status struct {
	Serial              string // hexadecimal; "" before the first certificate
	NotBefore, NotAfter time.Time
	Artifacts           assay.Digest
	Bundle              uint64 // version; 0 before the first bundle
}

// Status returns what is in use now.
func (i *Identity) Status() Status {
	var s Status
	if c := i.cert.Load(); c != nil {
		s.Serial, s.Artifacts = c.serial, c.artifacts
		s.NotBefore, s.NotAfter = c.Leaf.NotBefore, c.Leaf.NotAfter
	}
	if b := i.pool.Load(); b != nil {
		s.Bundle = b.version
	}
	return s
}

// usable returns the certificate for a handshake. One that expired is not shown: the
// peer would only say so less clearly.
func (i *Identity) usable() (*tls.Certificate, error) {
	c := i.cert.Load()
	if c == nil {
		return nil, &Error{Reason: NoCertificate, Peer: i.id.String(), Err: errors.New("none was issued yet")}
	}
	if err := checkTime(c.Leaf, time.Now()); err != nil {
		return nil, err
	}
	return &c.Certificate, nil
}
