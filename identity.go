package assay

import (
	"crypto/x509"
	"fmt"
	"net/url"
	"strings"
)

// Identity is a workload's SPIFFE ID in its parts:
//
//	spiffe://<TrustDomain>/ns/<Namespace>/sa/<Account>
//
// Infrastructure has IDs of another shape (see Infrastructure) that never parse
// as an Identity, so that a host's certificate can never pass for a workload's.
// Identity is comparable; the zero value is "nobody".
type Identity struct {
	TrustDomain string
	Namespace   string
	Account     string
}

// IsZero reports whether id names nobody.
func (id Identity) IsZero() bool { return id == Identity{} }

// String returns the SPIFFE ID, or "" for the zero value.
func (id Identity) String() string {
	if id.IsZero() {
		return ""
	}
	return "spiffe://" + id.TrustDomain + "/ns/" + id.Namespace + "/sa/" + id.Account
}

// URL returns the SPIFFE ID as the URI SAN of a certificate.
func (id Identity) URL() *url.URL {
	return &url.URL{Scheme: "spiffe", Host: id.TrustDomain, Path: "/ns/" + id.Namespace + "/sa/" + id.Account}
}

// MarshalText writes the SPIFFE ID.
func (id Identity) MarshalText() ([]byte, error) { return []byte(id.String()), nil }

// UnmarshalText reads a SPIFFE ID; an empty text is nobody.
func (id *Identity) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*id = Identity{}
		return nil
	}
	v, err := ParseIdentity(string(text))
	if err != nil {
		return err
	}
	*id = v
	return nil
}

// ParseIdentity reads a workload's SPIFFE ID. It accepts exactly what String
// writes: no port, no query, no trailing slash, no percent-encoding (SPIFFE-ID
// section 2).
func ParseIdentity(s string) (Identity, error) {
	rest, ok := strings.CutPrefix(s, "spiffe://")
	if !ok {
		return Identity{}, fmt.Errorf("SPIFFE ID %q: does not start with spiffe://", s)
	}
	part := strings.Split(rest, "/")
	if len(part) != 5 || part[1] != "ns" || part[3] != "sa" {
		return Identity{}, fmt.Errorf("SPIFFE ID %q: want spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT", s)
	}
	id := Identity{TrustDomain: part[0], Namespace: part[2], Account: part[4]}
	if !ValidTrustDomain(id.TrustDomain) {
		return Identity{}, fmt.Errorf("SPIFFE ID %q: the trust domain may hold a-z, 0-9, '.', '-' and '_'", s)
	}
	if !ValidName(id.Namespace) || !ValidName(id.Account) {
		return Identity{}, fmt.Errorf("SPIFFE ID %q: namespace and account may hold a-z, 0-9 and '-', 63 characters at most", s)
	}
	return id, nil
}

// Infrastructure returns the SPIFFE ID of a part of Assay itself or of a person:
// role is "control", "host", "operator" or "viewer".
func Infrastructure(trustDomain, role, name string) *url.URL {
	return &url.URL{Scheme: "spiffe", Host: trustDomain, Path: "/assay/" + role + "/" + name}
}

// ParseInfrastructure is the inverse of Infrastructure.
func ParseInfrastructure(u *url.URL) (trustDomain, role, name string, err error) {
	part := strings.Split(u.Path, "/")
	if u.Scheme != "spiffe" || len(part) != 4 || part[0] != "" || part[1] != "assay" || part[2] == "" || part[3] == "" {
		return "", "", "", fmt.Errorf("SPIFFE ID %q: want spiffe://TRUST-DOMAIN/assay/ROLE/NAME", u)
	}
	return u.Host, part[2], part[3], nil
}

// CertificateIdentity returns the workload identity in a leaf. An X.509-SVID has
// exactly one URI SAN (X509-SVID section 2).
func CertificateIdentity(leaf *x509.Certificate) (Identity, error) {
	if len(leaf.URIs) != 1 {
		return Identity{}, fmt.Errorf("certificate %x: has %d URI names, an X.509-SVID has exactly one", leaf.SerialNumber, len(leaf.URIs))
	}
	return ParseIdentity(leaf.URIs[0].String())
}

// ValidName reports whether s is an RFC 1123 label: the form of namespaces,
// accounts, services and workloads.
func ValidName(s string) bool {
	if len(s) == 0 || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// ValidTrustDomain reports whether s may be a SPIFFE trust domain (SPIFFE-ID
// section 2.1).
func ValidTrustDomain(s string) bool {
	if len(s) == 0 || len(s) > 255 {
		return false
	}
	for i := 0; i < len(s); i++ {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_' {
			return false
		}
	}
	return true
}
