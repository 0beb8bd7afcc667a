package attacks

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io/fs"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/identity"
	"assay.dev/test/lab"
)

// mint makes certificates with the mesh's own authority: what an attacker has who
// holds another workload's key, or everything but the right name.
type mint struct {
	*identity.Authority
	trustDomain string
}

// newMint opens a copy of the authority of a running mesh. life is of leaves, zero
// for the usual.
func newMint(t *testing.T, m *lab.Mesh, life time.Duration) *mint {
	t.Helper()
	var ca string
	filepath.WalkDir(m.Path(m.Data), func(path string, d fs.DirEntry, err error) error {
		if keys, _ := filepath.Glob(path + "/*.key"); err == nil && d.IsDir() && len(keys) > 1 {
			ca = path
		}
		return nil
	})
	if ca == "" {
		t.Fatalf("no authority under %s", m.Data)
	}
	dir := filepath.Join(t.TempDir(), "ca")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	files, err := os.ReadDir(ca)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		b, err := os.ReadFile(filepath.Join(ca, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, f.Name()), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	a, err := identity.Open(identity.Config{Dir: dir, LeafLife: life})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return &mint{Authority: a, trustDomain: a.TrustDomain()}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func request(t *testing.T, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// workload is a certificate that the mesh's own authority signed for a workload.
func (m *mint) workload(t *testing.T, account string) tls.Certificate {
	t.Helper()
	key := newKey(t)
	c, err := m.IssueWorkload(request(t, key), m.identity(account), assay.DigestOf([]byte("evil")))
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: c.Chain, PrivateKey: key}
}

// host is a certificate for a part of Assay itself.
func (m *mint) host(t *testing.T) tls.Certificate {
	t.Helper()
	key := newKey(t)
	c, err := m.IssueHost(request(t, key), "host-9")
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: c.Chain, PrivateKey: key}
}

func (m *mint) identity(account string) assay.Identity {
	return assay.Identity{TrustDomain: m.trustDomain, Namespace: "default", Account: account}
}

// forged has the right name and the wrong signer.
func (m *mint) forged(t *testing.T, account string) tls.Certificate {
	t.Helper()
	ca := newKey(t)
	issuer := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Assay " + m.trustDomain},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	key := newKey(t)
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: issuer.NotBefore, NotAfter: issuer.NotAfter,
		URIs:     []*url.URL{m.identity(account).URL()},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, issuer, key.Public(), ca)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.CreateCertificate(rand.Reader, issuer, issuer, ca.Public(), ca)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der, root}, PrivateKey: key}
}
