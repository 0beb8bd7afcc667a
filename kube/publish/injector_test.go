package publish

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"assay.dev"
)

// TestRootsOfWebhooks: of each webhook the roots are written where they differ, and nothing else is.
func TestRootsOfWebhooks(t *testing.T) {
	roots := []byte("roots\n")
	is := admissionregistrationv1.MutatingWebhookConfiguration{
		TypeMeta: metav1.TypeMeta{APIVersion: "admissionregistration.k8s.io/v1", Kind: "MutatingWebhookConfiguration"}, ObjectMeta: metav1.ObjectMeta{Name: InjectorName},
		Webhooks: []admissionregistrationv1.MutatingWebhook{
			{Name: "old.test", ClientConfig: admissionregistrationv1.WebhookClientConfig{CABundle: []byte("others")}},
			{Name: "right.test", ClientConfig: admissionregistrationv1.WebhookClientConfig{CABundle: roots}}, {Name: "new.test"},
		},
	}
	patches, gone := 0, false
	server := httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, in *http.Request) {
		out.Header().Set("Content-Type", "application/json")
		switch {
		case in.URL.Path != "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/assay-injector":
			t.Errorf("%s %s", in.Method, in.URL)
		case gone:
			out.WriteHeader(http.StatusNotFound)
			io.WriteString(out, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`)
			return
		case in.Method == http.MethodPatch:
			patches++
			var patch struct {
				Webhooks []map[string]json.RawMessage
			}
			body, _ := io.ReadAll(in.Body)
			if err := json.Unmarshal(body, &patch); err != nil || in.Header.Get("Content-Type") != "application/strategic-merge-patch+json" {
				t.Errorf("%v %s\n%s", err, in.Header.Get("Content-Type"), body)
			}
			for _, w := range patch.Webhooks {
				for i := range is.Webhooks {
					if string(w["name"]) != `"`+is.Webhooks[i].Name+`"` {
						continue
					}
					if bytes.Equal(is.Webhooks[i].ClientConfig.CABundle, roots) || len(w) != 2 {
						t.Errorf("written without need, or with more:\n%s", body)
					}
					if err := json.Unmarshal(w["clientConfig"], &is.Webhooks[i].ClientConfig); err != nil {
						t.Error(err)
					}
				}
			}
		}
		json.NewEncoder(out).Encode(is)
	}))
	defer server.Close()
	i, err := NewInjector(&rest.Config{Host: server.URL}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := i.write(t.Context(), roots); err != nil {
			t.Fatal(err)
		}
	}
	for _, w := range is.Webhooks {
		if !bytes.Equal(w.ClientConfig.CABundle, roots) {
			t.Errorf("%s has %q", w.Name, w.ClientConfig.CABundle)
		}
	}
	if patches != 1 {
		t.Errorf("written %d times", patches)
	}
	gone = true
	if err := i.write(t.Context(), roots); assay.KindOf(err) != assay.NotFound {
		t.Errorf("without a configuration: %v", err)
	}
}
