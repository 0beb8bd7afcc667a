package control

import (
	"strings"
	"testing"

	"assay.dev"
	"assay.dev/api"
)

// TestCertificateTakenBack: it is refused at once on a connection that is open, on new
// ones, and by the next control; nobody else's is.
func TestCertificateTakenBack(t *testing.T) {
	r := start(t, nil)
	h := r.join(t, "node", "*/*")
	eve, ann := r.remoteOperator(t, "operator", "eve"), r.remoteOperator(t, "operator", "ann")
	may := func(who string, o api.OperatorClient, want bool) {
		t.Helper()
		_, err := o.List(t.Context(), &api.ListRequest{Kind: "hosts"})
		if (err == nil) != want {
			t.Errorf("%s: %v", who, err)
		}
	}
	may("eve", eve, true)
	serials := map[string]string{}
	for _, cert := range documents[api.CertificateView](t, r.operator(t), "certificates") {
		serials[cert.Subject[strings.LastIndexByte(cert.Subject, '/')+1:]] = cert.Serial
	}
	local := r.operator(t)
	remove := func(serial string) error {
		_, err := local.Delete(t.Context(), &api.DeleteRequest{Kind: "certificate", Name: serial})
		return api.StatusError("delete", err)
	}
	if err := remove(serials["eve"]); err != nil {
		t.Fatal(err)
	}
	may("eve, on an open connection", eve, false)
	may("ann", ann, true)
	for serial, want := range map[string]assay.Kind{serials[h.id]: assay.Invalid, "00": assay.NotFound, "": assay.NotFound} {
		if err := remove(serial); assay.KindOf(err) != want {
			t.Errorf("take back %q: %v", serial, err)
		}
	}
	if lines := show(documents[api.CertificateView](t, local, "certificates")); !strings.Contains(lines, serials["eve"]) {
		t.Error("it is not in the inventory any more")
	}
	r = r.restart(nil)
	if !r.isRefused(serials["eve"]) || r.isRefused(serials["ann"]) {
		t.Error("the next control does not know")
	}
}
