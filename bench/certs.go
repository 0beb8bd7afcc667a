package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"time"

	"assay.dev/test/lab"
)

// pki is what the peers prove themselves with: ECDSA P-256 as in the mesh.
type pki struct {
	ca             []byte
	crt, key, both map[string][]byte // by "client" and "server", PEM
}

func newPKI() (*pki, error) {
	p := &pki{crt: map[string][]byte{}, key: map[string][]byte{}, both: map[string][]byte{}}
	now := time.Now()
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	if err != nil {
		return nil, err
	}
	p.ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER})
	for i, name := range []string{"client", "server"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return nil, err
		}
		leaf := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 2)), Subject: pkix.Name{CommonName: name},
			DNSNames: []string{name + ".bench"}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
			KeyUsage:    x509.KeyUsageDigitalSignature,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		}
		der, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey)
		keyDER, err2 := x509.MarshalECPrivateKey(key)
		if err := errors.Join(err, err2); err != nil {
			return nil, err
		}
		p.crt[name] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
		p.key[name] = pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})
		p.both[name] = append(append([]byte{}, p.crt[name]...), p.key[name]...)
	}
	return p, nil
}

// write puts the files where a peer's configuration names them.
func (p *pki) write(r *run, l *lab.Lab, dir string) {
	l.Write(r, dir+"/ca.crt", string(p.ca))
	for _, name := range []string{"client", "server"} {
		l.Write(r, dir+"/"+name+".crt", string(p.crt[name]))
		l.Write(r, dir+"/"+name+".key", string(p.key[name]))
		l.Write(r, dir+"/"+name+".pem", string(p.both[name]))
	}
}
