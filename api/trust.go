package api

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"assay.dev"
)

// Party is who is at the other end of a connection with control: role is
// "control", "host", "operator" or "viewer".
type Party struct {
	TrustDomain, Role, Name string
}

// String returns the SPIFFE ID.
func (p Party) String() string { return assay.Infrastructure(p.TrustDomain, p.Role, p.Name).String() }

// VerifyInfrastructure checks a peer's chain, leaf first: roots, time, purpose,
// the infrastructure's policy at each step, and a leaf with exactly one SPIFFE ID.
func VerifyInfrastructure(chain []*x509.Certificate, roots *x509.CertPool, now time.Time) (Party, error) {
	if len(chain) == 0 {
		return Party{}, errors.New("no certificate")
	}
	im := x509.NewCertPool()
	for _, c := range chain[1:] {
		im.AddCert(c)
	}
	leaf := chain[0]
	verified, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: im, CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		return Party{}, err
	}
	if err := assay.CheckPolicy(verified[0], assay.InfrastructurePolicy); err != nil {
		return Party{}, err
	}
	if len(leaf.URIs) != 1 || leaf.IsCA {
		return Party{}, fmt.Errorf("certificate %x: has %d URI names, an X.509-SVID has exactly one", leaf.SerialNumber, len(leaf.URIs))
	}
	var p Party
	p.TrustDomain, p.Role, p.Name, err = assay.ParseInfrastructure(leaf.URIs[0])
	return p, err
}

// Credentials is what an agent or a remote operator has: the functions are called
// for each connection, so that renewal and a new bundle need no new Config.
type Credentials struct {
	TrustDomain string
	Roots       func() *x509.CertPool
	Certificate func() (*tls.Certificate, error)
	Now         func() time.Time // nil: time.Now
}

// ClientTLS returns the TLS of a caller of control. Control is known by its SPIFFE
// ID; the address that was dialled means nothing.
func ClientTLS(cred Credentials) *tls.Config {
	now := cred.Now
	if now == nil {
		now = time.Now
	}
	cfg := clientTLS(func(st tls.ConnectionState) error {
		return expectControl(st.PeerCertificates, cred.Roots(), cred.TrustDomain, now())
	})
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cred.Certificate() }
	return cfg
}

// JoinTLS returns the TLS of a host that has nothing but a token: control's chain
// must end at the root that the token names.
func JoinTLS(token assay.JoinToken, now func() time.Time) *tls.Config {
	return clientTLS(func(st tls.ConnectionState) error {
		for _, c := range st.PeerCertificates {
			if sha256.Sum256(c.Raw) == token.Root {
				pool := x509.NewCertPool()
				pool.AddCert(c)
				return expectControl(st.PeerCertificates, pool, "", now())
			}
		}
		return errors.New("this is not the control that the token is for, or its root was replaced since: make a new token")
	})
}

func clientTLS(verify func(tls.ConnectionState) error) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		// Verification by host name is not what SPIFFE does: verify replaces it, on
		// every connection, and nothing is resumed.
		InsecureSkipVerify: true,
		VerifyConnection:   verify,
	}
}

func expectControl(chain []*x509.Certificate, roots *x509.CertPool, trustDomain string, now time.Time) error {
	p, err := VerifyInfrastructure(chain, roots, now)
	if err != nil {
		return fmt.Errorf("control's certificate: %w", err)
	}
	if p.Role != "control" || trustDomain != "" && p.TrustDomain != trustDomain {
		return fmt.Errorf("control's certificate: is that of %s", p)
	}
	return nil
}
