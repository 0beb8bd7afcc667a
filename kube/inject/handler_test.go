package inject

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admission/v1"
)

// ask asks the webhook as the API server does.
func ask(t *testing.T, url, body string) (int, *admissionv1.AdmissionResponse) {
	t.Helper()
	resp, err := http.Post(url+Path+"?timeout=5s", "application/json", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		return resp.StatusCode, nil
	}
	var review admissionv1.AdmissionReview
	if err := json.Unmarshal(text, &review); err != nil || review.APIVersion != "admission.k8s.io/v1" || review.Kind != "AdmissionReview" {
		t.Fatalf("%v\n%s", err, text)
	}
	if review.Response.UID != "u-1" {
		t.Errorf("it answers question %q", review.Response.UID)
	}
	return resp.StatusCode, review.Response
}

func question(operation, resource, namespace, pod string) string {
	return fmt.Sprintf(`{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1","request":{"uid":"u-1","kind":{"group":"","version":"v1","kind":"Pod"},
		"resource":{"group":"","version":"v1","resource":%q},"namespace":%q,"operation":%q,"object":%s}}`, resource, namespace, operation, pod)
}

func TestWebhook(t *testing.T) {
	j := injector()
	server := httptest.NewServer(j.Handler(slog.New(slog.DiscardHandler)))
	defer server.Close()

	pod := `{"metadata":{"generateName":"web-"},"spec":{"containers":[{"name":"app"}]}}`
	_, a := ask(t, server.URL, question("CREATE", "pods", "shop", pod))
	if a == nil || !a.Allowed || a.PatchType == nil || *a.PatchType != admissionv1.PatchTypeJSONPatch || len(a.Warnings) > 0 {
		t.Fatalf("a pod: %+v", a)
	}
	var patch []Operation
	if err := json.Unmarshal(a.Patch, &patch); err != nil {
		t.Fatal(err)
	}
	whole(t, []byte(pod), apply(t, []byte(pod), patch))

	_, a = ask(t, server.URL, question("CREATE", "pods", "shop", `{"metadata":{},"spec":{"hostNetwork":true,"containers":[{"name":"app"}]}}`))
	if a == nil || !a.Allowed || a.Patch != nil || a.PatchType != nil || len(a.Warnings) != 1 {
		t.Errorf("a pod in its node's network: %+v", a)
	}
	_, a = ask(t, server.URL, question("CREATE", "pods", "shop", `{"metadata":{"name":"web"},"spec":{"containers":[{"name":"assay-proxy"}]}}`))
	if a == nil || a.Allowed || a.Patch != nil || a.Result.Code != http.StatusConflict || !strings.Contains(a.Result.Message, "pod web: it has a container assay-proxy of its own") {
		t.Errorf("a pod that has our name: %+v", a)
	}
	j.Roots = func() []byte { return nil }
	if _, a = ask(t, server.URL, question("CREATE", "pods", "shop", pod)); a == nil || a.Allowed || a.Result.Code != http.StatusServiceUnavailable {
		t.Errorf("without roots: %+v", a)
	}
}

// TestNoQuestion: what is not the question that the configuration asks is not answered.
func TestNoQuestion(t *testing.T) {
	server := httptest.NewServer(injector().Handler(slog.New(slog.DiscardHandler)))
	defer server.Close()
	pod := `{"metadata":{},"spec":{"containers":[{"name":"app"}]}}`
	for body, want := range map[string]int{
		"":   http.StatusBadRequest,
		"{}": http.StatusBadRequest,
		`{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1"}`:                                                http.StatusBadRequest,
		strings.Replace(question("CREATE", "pods", "shop", pod), "admission.k8s.io/v1", "admission.k8s.io/v1beta1", 1): http.StatusBadRequest,
		question("UPDATE", "pods", "shop", pod):                                                                        http.StatusBadRequest,
		question("CREATE", "services", "shop", pod):                                                                    http.StatusBadRequest,
		question("CREATE", "pods", "shop", `[]`):                                                                       http.StatusBadRequest,
		strings.Repeat(" ", maxReview+1):                                                                               http.StatusRequestEntityTooLarge,
	} {
		if got, _ := ask(t, server.URL, body); got != want {
			t.Errorf("%.80q: %d", body, got)
		}
	}
	resp, err := http.Get(server.URL + Path)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("GET: %s", resp.Status)
	}
}

// FuzzQuestion: nothing that somebody sends ends it, and what it answers can be read.
func FuzzQuestion(f *testing.F) {
	f.Add([]byte(question("CREATE", "pods", "shop", `{"metadata":{},"spec":{"containers":[{"name":"app"}]}}`)))
	f.Add([]byte(question("CREATE", "pods", "shop", `null`)))
	f.Fuzz(func(t *testing.T, body []byte) {
		answer, err := injector().answer(body, slog.New(slog.DiscardHandler))
		var review admissionv1.AdmissionReview
		if err == nil && (json.Unmarshal(answer, &review) != nil || review.Response == nil || bytes.Equal(answer, body)) {
			t.Errorf("%s", answer)
		}
	})
}
