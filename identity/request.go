package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"

	"assay.dev"
)

// maxRequest bounds a certificate request.
const maxRequest = 16 << 10

// requestKey checks a certificate request in DER and returns its public key, the
// only thing that is taken from it. The request proves that its sender has the
// key. Names in it decide nothing; one that contradicts what the sender gets is
// refused, because then the two sides disagree about who it is.
func requestKey(der []byte, want *url.URL) (any, error) {
	fail := func(err error) (any, error) {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "certificate request for " + want.String(), Err: err}
	}
	if len(der) > maxRequest {
		return fail(fmt.Errorf("%d bytes, at most %d", len(der), maxRequest))
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return fail(err)
	}
	if !bytes.Equal(csr.Raw, der) {
		return fail(errors.New("bytes after the request"))
	}
	if err := csr.CheckSignature(); err != nil {
		return fail(err)
	}
	switch len(csr.URIs) {
	case 0:
	case 1:
		if got := csr.URIs[0].String(); got != want.String() {
			return fail(fmt.Errorf("names %s", got))
		}
	default:
		return fail(fmt.Errorf("names %d URIs, an X.509-SVID has exactly one", len(csr.URIs)))
	}
	switch key := csr.PublicKey.(type) {
	case *ecdsa.PublicKey:
		if key.Curve == elliptic.P256() || key.Curve == elliptic.P384() {
			return key, nil
		}
		return fail(fmt.Errorf("curve %s; want P-256, P-384 or Ed25519", key.Curve.Params().Name))
	case ed25519.PublicKey:
		return key, nil
	default:
		return fail(fmt.Errorf("a %s key; want ECDSA on P-256 or P-384, or Ed25519", csr.PublicKeyAlgorithm))
	}
}
