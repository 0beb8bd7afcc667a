package mtls

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"assay.dev"
)

// ALPN is how mesh traffic is recognised.
const ALPN = "assay/1"

// Client returns the configuration for dialling a workload that must be expected.
// It may be kept and used for many connections: it follows renewals and bundles.
func (i *Identity) Client(expected assay.Identity) *tls.Config {
	c := i.common()
	c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return i.usable() }
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		peer, err := i.check(&cs, x509.ExtKeyUsageServerAuth)
		if err == nil && (expected.IsZero() || peer.Identity != expected) {
			err = mismatch(peer, expected)
		}
		return err
	}
	return c
}

func mismatch(peer Peer, expected assay.Identity) error {
	return &Error{Reason: IdentityMismatch, Peer: peer.Identity.String(), Err: fmt.Errorf("expected %q", expected)}
}

// Server returns the configuration for accepting a workload of the trust bundle:
// the one that is known to live where the connection comes from, or any (zero) when
// nobody is known to. Who may call whom is decided later, by policy.
func (i *Identity) Server(expected assay.Identity) *tls.Config {
	c := i.common()
	c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return i.usable() }
	c.ClientAuth = tls.RequireAnyClientCert // verified in VerifyConnection
	c.VerifyConnection = func(cs tls.ConnectionState) error {
		peer, err := i.check(&cs, x509.ExtKeyUsageClientAuth)
		if err == nil && !expected.IsZero() && peer.Identity != expected {
			err = mismatch(peer, expected)
		}
		return err
	}
	return c
}

func (i *Identity) common() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{ALPN},
		// No name and no address identifies a peer; VerifyConnection decides it all.
		InsecureSkipVerify:     true,
		SessionTicketsDisabled: true,
		// The mux writes many requests at once: small first records would only cost.
		DynamicRecordSizingDisabled: true,
	}
}

// check is the one place that accepts a peer; a client then looks at who it is.
func (i *Identity) check(cs *tls.ConnectionState, use x509.ExtKeyUsage) (Peer, error) {
	b := i.pool.Load()
	switch {
	case cs.Version != tls.VersionTLS13 || cs.DidResume:
		return Peer{}, &Error{Reason: Malformed, Err: errors.New("not a full TLS 1.3 handshake")}
	case cs.NegotiatedProtocol != ALPN:
		return Peer{}, &Error{Reason: BadALPN, Err: fmt.Errorf("negotiated %q, want %q", cs.NegotiatedProtocol, ALPN)}
	case b == nil:
		return Peer{}, &Error{Reason: NoCertificate, Err: errors.New("we have no trust bundle yet")}
	}
	return b.verify(cs.PeerCertificates, use, time.Now())
}

// Handshake completes conn's handshake within ctx and returns who is there. Its
// errors are all *Error.
//
// When a client's Handshake returns, the server has not yet seen its certificate: a
// refusal then arrives with the first read, and ReasonOf sorts it.
func Handshake(ctx context.Context, conn *tls.Conn) (Peer, error) {
	if err := conn.HandshakeContext(ctx); err != nil {
		if ctx.Err() != nil && errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
			return Peer{}, &Error{Reason: Timeout, Err: err}
		}
		return Peer{}, wrap(err)
	}
	return PeerOf(conn.ConnectionState())
}

// PeerOf returns who is at the other end of a completed handshake of ours.
func PeerOf(cs tls.ConnectionState) (Peer, error) {
	if !cs.HandshakeComplete || len(cs.PeerCertificates) == 0 {
		return Peer{}, &Error{Reason: NoCertificate, Err: errors.New("the handshake is not complete")}
	}
	return checkLeaf(cs.PeerCertificates[0])
}
