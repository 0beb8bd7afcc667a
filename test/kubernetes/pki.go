package kubernetes

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/netip"
	"text/template"
	"time"
)

// authority is the cluster's certificate authority. It lives as long as the
// process that makes the cluster.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

// pair is a certificate and its key, in PEM.
type pair struct{ cert, key []byte }

const validity = 30 * 24 * time.Hour

func newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: "kubernetes"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(validity),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &authority{cert, key, encode("CERTIFICATE", der)}, err
}

func serial() *big.Int {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		panic(err) // crypto/rand does not fail
	}
	return n
}

func encode(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

// issue makes a certificate for a user (name) of a group, and for a server where
// names or addresses are given.
func (a *authority) issue(name, group string, names []string, addrs ...netip.Addr) (pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return pair{}, err
	}
	template := &x509.Certificate{
		SerialNumber: serial(),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(validity),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		DNSNames:     names,
	}
	if group != "" {
		template.Subject.Organization = []string{group}
	}
	for _, a := range addrs {
		template.IPAddresses = append(template.IPAddresses, a.AsSlice())
	}
	if len(names)+len(addrs) > 0 {
		template.ExtKeyUsage = append(template.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return pair{}, fmt.Errorf("certificate for %s: %w", name, err)
	}
	keyPEM, err := keyInPEM(key)
	return pair{encode("CERTIFICATE", der), keyPEM}, err
}

func keyInPEM(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(key)
	return encode("EC PRIVATE KEY", der), err
}

var kubeconfigTemplate = template.Must(template.New("kubeconfig").
	Funcs(template.FuncMap{"b64": base64.StdEncoding.EncodeToString}).Parse(`apiVersion: v1
kind: Config
clusters:
- name: {{.Cluster}}
  cluster:
    server: {{.Server}}
    certificate-authority-data: {{b64 .CA}}
users:
- name: {{.User}}
  user:
    client-certificate-data: {{b64 .Cert}}
    client-key-data: {{b64 .Key}}
contexts:
- name: {{.Cluster}}
  context: {cluster: {{.Cluster}}, user: {{.User}}}
current-context: {{.Cluster}}
`))

// kubeconfig writes a client's configuration for the API server at the address.
func (a *authority) kubeconfig(cluster, server, user, group string) (string, error) {
	p, err := a.issue(user, group, nil)
	if err != nil {
		return "", err
	}
	var text bytes.Buffer
	err = kubeconfigTemplate.Execute(&text, map[string]any{
		"Cluster": cluster, "Server": server, "CA": a.pem, "User": user, "Cert": p.cert, "Key": p.key,
	})
	return text.String(), err
}
