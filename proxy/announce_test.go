package proxy

import (
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"

	"assay.dev"
)

// TestProxyV2 compares headers with what the specification says, byte by byte.
func TestProxyV2(t *testing.T) {
	const signature = "0d0a0d0a000d0a515549540a"
	id := assay.Identity{TrustDomain: "b.test", Namespace: "n", Account: "a"}
	uri := hex.EncodeToString([]byte("spiffe://b.test/ns/n/sa/a")) // 25 bytes
	for _, c := range []struct {
		from, to string
		peer     assay.Identity
		security assay.Security
		want     string
	}{
		{"192.0.2.1:1000", "10.0.0.1:80", assay.Identity{}, assay.Plaintext, "2111 000c c0000201 0a000001 03e8 0050"},
		{"[2001:db8::1]:1000", "[fd00::1]:80", assay.Identity{}, assay.Plaintext,
			"2121 0024 20010db8000000000000000000000001 fd000000000000000000000000000001 03e8 0050"},
		{"192.0.2.1:1000", "10.0.0.1:80", id, assay.MutualTLS,
			"2111 003a c0000201 0a000001 03e8 0050 20 000f 07 00000000 21 0007 544c5376312e33 e0 0019" + uri},
	} {
		got := hex.EncodeToString(appendProxyV2(nil, netip.MustParseAddrPort(c.from), netip.MustParseAddrPort(c.to), c.peer, c.security))
		if want := signature + strings.ReplaceAll(c.want, " ", ""); got != want {
			t.Errorf("%s to %s:\n got %s\nwant %s", c.from, c.to, got, want)
		}
	}
}
