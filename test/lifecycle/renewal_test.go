package lifecycle

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"assay.dev/test/lab"
)

func addrPort(w *lab.Workload, port int) netip.AddrPort {
	return netip.AddrPortFrom(w.IPv4, uint16(port))
}

// TestRenewalUnderLoad lets certificates live for seconds while requests and long
// conversations run: none may be lost over several renewals.
func TestRenewalUnderLoad(t *testing.T) {
	lab.Require(t, "ip", "nft", "getent")
	w := lab.NewWorld(t, lab.Meshed, "--leaf-life", "6s")
	client, server := pair(t, w)
	to := client.Target(t, "shop", portHTTP)
	fixed := func() (netip.AddrPort, error) { return to, nil }
	serials := map[string]map[string]bool{client.Name: {}, server.Name: {}}
	l := startLoad(t, caller{client, "shop", fixed, 1 << 30}, caller{client, "shop", fixed, 20})
	lab.Eventually(t, 40*time.Second, "four certificates for each", func() error {
		var list []lab.CertificateStatus
		w.Mesh.Get(t, "certificates", &list)
		for _, c := range list {
			for name, seen := range serials {
				if c.Names(name) && c.Serial != "" {
					seen[c.Serial] = true
				}
			}
		}
		for name, seen := range serials {
			if len(seen) < 4 {
				return fmt.Errorf("%s had %d", name, len(seen))
			}
		}
		return nil
	})
	done, failures := l.finish()
	t.Logf("%d requests while %d and %d certificates were used", done, len(serials[client.Name]), len(serials[server.Name]))
	for i, f := range failures {
		if i < 10 {
			t.Errorf("lost: %s", f)
		}
	}
	if len(failures) > 0 || done < 1000 {
		t.Errorf("%d requests done, %d lost", done, len(failures))
	}
}
