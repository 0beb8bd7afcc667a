package mtls

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"testing"
	"time"

	"assay.dev"
)

const testDomain = "bank.test"

func workload(name string) assay.Identity {
	return assay.Identity{TrustDomain: testDomain, Namespace: "bank", Account: name}
}

// authority is a root with an intermediate that issues leaves.
type authority struct {
	t                 testing.TB
	root, inter       *x509.Certificate
	rootKey, interKey *ecdsa.PrivateKey
	serial            int64
}

func newAuthority(t testing.TB) *authority {
	a := &authority{t: t, rootKey: newKey(t), interKey: newKey(t), serial: 1}
	ca := func(name string) *x509.Certificate {
		a.serial++
		return &x509.Certificate{
			SerialNumber: big.NewInt(a.serial), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
			KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, NotBefore: time.Now().Add(-48 * time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		}
	}
	root := ca("root")
	a.root = a.sign(root, root, a.rootKey.Public(), a.rootKey)
	inter := ca("intermediate")
	inter.Policies = []x509.OID{assay.WorkloadPolicy}
	a.inter = a.sign(inter, a.root, a.interKey.Public(), a.rootKey)
	return a
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (a *authority) sign(tmpl, parent *x509.Certificate, public any, key *ecdsa.PrivateKey) *x509.Certificate {
	a.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, public, key)
	if err != nil {
		a.t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return c
}

func (a *authority) roots() [][]byte { return [][]byte{a.root.Raw} }

// leaf is the template of a good leaf.
func (a *authority) leaf(id *url.URL) *x509.Certificate {
	a.serial++
	return &x509.Certificate{
		SerialNumber: big.NewInt(a.serial), URIs: []*url.URL{id}, BasicConstraintsValid: true, Policies: []x509.OID{assay.WorkloadPolicy},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		NotBefore:   time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
}

// answer issues a chain for a request as the identity service would.
func (a *authority) answer(csr []byte, change func(*x509.Certificate)) [][]byte {
	a.t.Helper()
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		a.t.Fatal(err)
	}
	if err := req.CheckSignature(); err != nil {
		a.t.Fatal(err)
	}
	tmpl := a.leaf(req.URIs[0])
	if change != nil {
		change(tmpl)
	}
	return [][]byte{a.sign(tmpl, a.inter, req.PublicKey, a.interKey).Raw, a.inter.Raw}
}

// identity returns a ready identity under a.
func (a *authority) identity(name string) *Identity {
	a.t.Helper()
	i := New(workload(name))
	if err := i.SetBundle(1, a.roots()); err != nil {
		a.t.Fatal(err)
	}
	a.renew(i)
	return i
}

func (a *authority) renew(i *Identity) {
	a.t.Helper()
	csr, err := i.Request()
	if err != nil {
		a.t.Fatal(err)
	}
	if err := i.Install(a.answer(csr, nil)); err != nil {
		a.t.Fatal(err)
	}
}

// bad returns an identity that shows a certificate which Install would refuse.
func (a *authority) bad(name string, change func(*x509.Certificate)) *Identity {
	a.t.Helper()
	i := a.identity(name)
	key := newKey(a.t)
	tmpl := a.leaf(workload(name).URL())
	change(tmpl)
	leaf := a.sign(tmpl, a.inter, key.Public(), a.interKey)
	c := &certificate{serial: "bad"}
	c.Certificate.Certificate = [][]byte{leaf.Raw, a.inter.Raw}
	c.PrivateKey, c.Leaf = key, leaf
	i.cert.Store(c)
	return i
}
