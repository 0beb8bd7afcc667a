package demo

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"assay.dev"
)

// present asks whoever listens at target for the certificate that it shows to peers,
// and verifies it against roots. We show none: what follows is a refusal.
func present(ctx context.Context, target netip.AddrPort, roots *x509.CertPool) (p presentation) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var shown *tls.ConnectionState
	conf := &tls.Config{
		MinVersion:         tls.VersionTLS13,
		NextProtos:         []string{"assay/1"},
		InsecureSkipVerify: true, // VerifyConnection does it: the name is a URI
		VerifyConnection:   func(st tls.ConnectionState) error { shown = &st; return nil },
	}
	raw, err := new(net.Dialer).DialContext(ctx, "tcp", target.String())
	if err != nil {
		return presentation{Err: err}
	}
	defer raw.Close()
	conn := tls.Client(raw, conf)
	err = conn.HandshakeContext(ctx)
	switch {
	case shown == nil && err != nil:
		return presentation{Err: fmt.Errorf("no certificate: %w", err)}
	case shown == nil || len(shown.PeerCertificates) == 0:
		return presentation{Err: errors.New("no certificate")}
	case shown.NegotiatedProtocol != "assay/1":
		return presentation{Err: fmt.Errorf("speaks %q", shown.NegotiatedProtocol)}
	}
	return inspect(shown.PeerCertificates, roots)
}

// inspect reads identity and artifacts from a chain that roots vouch for.
func inspect(chain []*x509.Certificate, roots *x509.CertPool) (p presentation) {
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	leaf := chain[0]
	if p.Identity, p.Err = assay.CertificateIdentity(leaf); p.Err != nil {
		return p
	}
	if p.Artifacts, p.Err = assay.CertificateArtifacts(leaf); p.Err != nil {
		return p
	}
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
		p.Err = fmt.Errorf("shows %s: %w", p.Identity, err)
	}
	return p
}
