package assay

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"
)

func TestParseIdentity(t *testing.T) {
	want := Identity{TrustDomain: "bank.example", Namespace: "core", Account: "payments"}
	got, err := ParseIdentity("spiffe://bank.example/ns/core/sa/payments")
	if err != nil || got != want || got.String() != got.URL().String() {
		t.Fatalf("got %v, %v", got, err)
	}
	for _, bad := range []string{
		"", "spiffe://", "https://bank.example/ns/core/sa/payments", "spiffe://bank.example/ns/core/sa/payments/",
		"spiffe://bank.example/ns/core/sa/", "spiffe://bank.example/ns//sa/x", "spiffe://Bank.example/ns/core/sa/x",
		"spiffe://bank.example:443/ns/core/sa/x", "spiffe://bank.example/ns/core/sa/x?y", "spiffe://bank.example/ns/co%72e/sa/x",
		"spiffe://bank.example/ns/core/sa/-x", "spiffe://bank.example/assay/host/h1", "spiffe://u@bank.example/ns/a/sa/b",
		"spiffe://bank.example/ns/../sa/b", "spiffe://bank.example/ns/" + strings.Repeat("a", 64) + "/sa/b",
	} {
		if id, err := ParseIdentity(bad); err == nil {
			t.Errorf("%q was read as %v", bad, id)
		}
	}
	if _, err := ParseIdentity(Infrastructure("bank.example", "host", "h1").String()); err == nil {
		t.Error("a host's ID passes for a workload's")
	}
	td, role, name, err := ParseInfrastructure(Infrastructure("bank.example", "host", "h1"))
	if td != "bank.example" || role != "host" || name != "h1" || err != nil {
		t.Error(td, role, name, err)
	}
	if _, _, _, err := ParseInfrastructure(want.URL()); err == nil {
		t.Error("a workload's ID passes for infrastructure")
	}
}

func FuzzParseIdentity(f *testing.F) {
	f.Add("spiffe://bank.example/ns/core/sa/payments")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseIdentity(s)
		if err == nil && id.String() != s {
			t.Fatalf("%q was read as %q", s, id)
		}
	})
}

func TestIdentityText(t *testing.T) {
	type record struct {
		Peer Identity `json:"peer"`
	}
	for _, r := range []record{{}, {Identity{"td", "ns", "sa"}}} {
		raw, err := json.Marshal(r)
		var back record
		if err != nil || json.Unmarshal(raw, &back) != nil || back != r {
			t.Errorf("%v became %s became %v", r, raw, back)
		}
	}
}

func TestArtifactSetDigest(t *testing.T) {
	a, b := Artifact{Digest: DigestOf([]byte("a"))}, Artifact{Digest: DigestOf([]byte("b"))}
	if (ArtifactSet{a, b}).Digest() != (ArtifactSet{b, a, a}).Digest() {
		t.Error("order or repetition changes the digest of a set")
	}
	if (ArtifactSet{a}).Digest() == (ArtifactSet{b}).Digest() || (ArtifactSet{}).Digest() != "" {
		t.Error("sets are confused")
	}
	// The form is fixed: an auditor computes it with sha256sum.
	if got, want := (ArtifactSet{a}).Digest(), DigestOf([]byte(string(a.Digest)+"\n")); got != want {
		t.Errorf("digest of one: %s, want %s", got, want)
	}
}

func TestArtifactExtension(t *testing.T) {
	d := ArtifactSet{{Digest: DigestOf([]byte("a"))}}.Digest()
	ext, err := MarshalArtifactExtension(d)
	if err != nil || ext.Critical {
		t.Fatal(ext, err)
	}
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), Extensions: []pkix.Extension{ext}}
	if got, err := CertificateArtifacts(cert); got != d || err != nil {
		t.Errorf("got %s, %v", got, err)
	}
	cert.Extensions = append(cert.Extensions, ext)
	if _, err := CertificateArtifacts(cert); err == nil {
		t.Error("two extensions pass")
	}
	for _, value := range [][]byte{nil, {4, 1, 0}, append([]byte{}, append(ext.Value, 0)...), {5, 0}} {
		cert.Extensions = []pkix.Extension{{Id: ArtifactExtension, Value: value}}
		if _, err := CertificateArtifacts(cert); err == nil {
			t.Errorf("% x passes", value)
		}
	}
	if _, err := MarshalArtifactExtension("sha256:00"); err == nil {
		t.Error("a short digest was marshalled")
	}
}

func TestCertificateIdentity(t *testing.T) {
	id := Identity{"td", "ns", "sa"}
	one, two := id.URL(), (Identity{"td", "ns", "other"}).URL()
	if got, err := CertificateIdentity(&x509.Certificate{SerialNumber: big.NewInt(1), URIs: []*url.URL{one}}); got != id || err != nil {
		t.Error(got, err)
	}
	for _, uris := range [][]*url.URL{nil, {one, two}} {
		if _, err := CertificateIdentity(&x509.Certificate{SerialNumber: big.NewInt(1), URIs: uris}); err == nil {
			t.Errorf("%d URIs pass", len(uris))
		}
	}
}

// TestLatencyBuckets walks every bucket: a duration below a bound falls below it,
// the bound itself in the next bucket.
func TestLatencyBuckets(t *testing.T) {
	for i := range LatencyBuckets - 1 {
		bound := LatencyBound(i)
		if got := LatencyBucket(bound - time.Microsecond); got != i {
			t.Errorf("%v falls in bucket %d, want %d", bound-time.Microsecond, got, i)
		}
		if got := LatencyBucket(bound); got != i+1 {
			t.Errorf("%v falls in bucket %d, want %d", bound, got, i+1)
		}
	}
	if LatencyBucket(-1) != 0 || LatencyBucket(time.Hour) != LatencyBuckets-1 || LatencyBound(LatencyBuckets-1) != 0 {
		t.Error("the ends are wrong")
	}
}

func TestLatencyQuantile(t *testing.T) {
	var l Latency
	if l.Quantile(0.5) != 0 {
		t.Error("nothing has a median")
	}
	for range 99 {
		l.Buckets[LatencyBucket(100*time.Microsecond)]++
	}
	l.Buckets[LatencyBucket(time.Second)]++
	if q := l.Quantile(0.5); q <= 100*time.Microsecond || q > 150*time.Microsecond {
		t.Errorf("median %v", q)
	}
	if q := l.Quantile(1); q < time.Second || q > 1500*time.Millisecond {
		t.Errorf("maximum %v", q)
	}
	var sum Latency
	sum.Add(&l)
	sum.Add(&l)
	if sum.Count() != 200 {
		t.Errorf("count %d", sum.Count())
	}
}

func TestErrorReads(t *testing.T) {
	err := error(&Error{Kind: Conflict, Op: "run payments", Err: errors.New("port 80 is taken"), Remedy: "stop what listens there"})
	if err.Error() != "run payments: port 80 is taken (stop what listens there)" || KindOf(err) != Conflict || KindOf(errors.New("x")) != Internal {
		t.Error(err)
	}
}
