package assay

import (
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
)

// Digest is "sha256:" and 64 lower-case hexadecimal digits.
type Digest string

// DigestOf returns the digest of b.
func DigestOf(b []byte) Digest {
	sum := sha256.Sum256(b)
	return Digest("sha256:" + hex.EncodeToString(sum[:]))
}

// ParseDigest checks the form of s.
func ParseDigest(s string) (Digest, error) {
	h, ok := strings.CutPrefix(s, "sha256:")
	if b, err := hex.DecodeString(h); !ok || err != nil || len(b) != sha256.Size || strings.ToLower(h) != h {
		return "", fmt.Errorf("digest %q: want sha256: and 64 lower-case hexadecimal digits", s)
	}
	return Digest(s), nil
}

// Short returns the first twelve hexadecimal digits, for tables.
func (d Digest) Short() string {
	h := strings.TrimPrefix(string(d), "sha256:")
	return h[:min(12, len(h))]
}

// ArtifactKind says what was digested.
type ArtifactKind string

const (
	Executable ArtifactKind = "executable" // one file, digested through the descriptor that was executed
	Tree       ArtifactKind = "tree"       // a directory or file given by --artifact, mounted read-only
	Image      ArtifactKind = "image"      // a platform manifest that a container runtime runs
)

// Artifact is one thing that a workload runs.
type Artifact struct {
	Kind   ArtifactKind `json:"kind"`
	Name   string       `json:"name"` // path or image reference, for people; never decides anything
	Digest Digest       `json:"digest"`
	// Unproven, when not empty, is why the digest says nothing about what really
	// runs: an interpreter's executable is the same for every script.
	Unproven string `json:"unproven,omitempty"`
	// Evidence is who says that it runs.
	Evidence Evidence `json:"evidence,omitempty"`
	// Config is the configuration that an image's manifest names, which runtimes call the
	// image's ID, and Index what contains the manifest, where the image was named by an index;
	// "" where nobody has said. Where the manifest is not known, Digest is Config. Both
	// are no part of a set's digest: the same manifest runs, however it was named.
	Config Digest `json:"config,omitempty"`
	Index  Digest `json:"index,omitempty"`
}

// Evidence is who says that an artifact runs. It is no part of a set's digest.
type Evidence string

const (
	ByAgent     Evidence = ""           // the agent of its host, who asked the kernel or the container runtime
	ByAPIServer Evidence = "api-server" // Kubernetes, by what the kubelet wrote about the pod
)

// ArtifactSet is everything that a workload runs, in any order.
type ArtifactSet []Artifact

// Digest identifies the set: the SHA-256 of its sorted distinct digests, one per
// line. Names and order do not matter. The empty set has no digest.
func (s ArtifactSet) Digest() Digest {
	if len(s) == 0 {
		return ""
	}
	line := make([]string, len(s))
	for i, a := range s {
		line[i] = string(a.Digest) + "\n"
	}
	slices.Sort(line)
	return DigestOf([]byte(strings.Join(slices.Compact(line), "")))
}

// Unproven returns the first reason why the set proves nothing, or "".
func (s ArtifactSet) Unproven() string {
	for _, a := range s {
		if a.Unproven != "" {
			return a.Unproven
		}
	}
	return ""
}

// ArtifactExtension is the object identifier of the leaf's artifact extension:
// an OCTET STRING with the 32 bytes of ArtifactSet.Digest. The extension is not
// critical, so that other verifiers accept the certificate.
//
// The arc 2.25 needs no registration (ITU-T X.667); it is replaced when the
// project has a private enterprise number.
var ArtifactExtension = asn1.ObjectIdentifier{2, 25, 1094931321, 1}

// MarshalArtifactExtension puts d into the extension of a leaf.
func MarshalArtifactExtension(d Digest) (pkix.Extension, error) {
	d, err := ParseDigest(string(d))
	if err != nil {
		return pkix.Extension{}, err
	}
	raw, _ := hex.DecodeString(strings.TrimPrefix(string(d), "sha256:"))
	value, err := asn1.Marshal(raw)
	if err != nil {
		return pkix.Extension{}, err
	}
	return pkix.Extension{Id: ArtifactExtension, Value: value}, nil
}

// CertificateArtifacts returns the artifact set's digest from a leaf, "" when it
// carries none, and an error when what it carries is malformed or there twice.
func CertificateArtifacts(leaf *x509.Certificate) (Digest, error) {
	var found Digest
	for _, ext := range leaf.Extensions {
		if !ext.Id.Equal(ArtifactExtension) {
			continue
		}
		var raw []byte
		rest, err := asn1.Unmarshal(ext.Value, &raw)
		if err != nil || len(rest) != 0 || len(raw) != sha256.Size || found != "" {
			return "", fmt.Errorf("certificate %x: malformed artifact extension", leaf.SerialNumber)
		}
		found = Digest("sha256:" + hex.EncodeToString(raw))
	}
	return found, nil
}

// Certificate policies (RFC 5280 section 4.2.1.4) in intermediates and leaves: what
// signs workloads cannot make a host or an operator, and the other way round. See
// CheckPolicy.
var (
	WorkloadPolicy       = policy(2)
	InfrastructurePolicy = policy(3)
)

// CheckPolicy requires a policy of every certificate of a verified chain but the
// root, which is last. crypto/x509 builds the chain and does not ask for a policy
// unless the certificates themselves demand one.
func CheckPolicy(chain []*x509.Certificate, policy x509.OID) error {
	if len(chain) < 2 {
		return fmt.Errorf("certificate chain of %d: a leaf and its root at least", len(chain))
	}
	for _, c := range chain[:len(chain)-1] {
		if !slices.ContainsFunc(c.Policies, policy.Equal) {
			return fmt.Errorf("certificate %x of %s: was not made for this purpose (policy %s is missing)", c.SerialNumber, c.Subject, policy)
		}
	}
	return nil
}

func policy(n uint64) x509.OID {
	oid, err := x509.OIDFromInts([]uint64{2, 25, 1094931321, n})
	if err != nil {
		panic(err) // the numbers are constants
	}
	return oid
}
