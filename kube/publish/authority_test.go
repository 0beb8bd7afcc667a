package publish

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"assay.dev"
)

// TestSealingKey: of controls that start at once one fills the Secret, all have its key, and
// one that is there stays.
func TestSealingKey(t *testing.T) {
	var mu sync.Mutex
	secret, version := &corev1.Secret{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}}, 1
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Path != "/api/v1/namespaces/mesh/secrets/key" {
			w.WriteHeader(http.StatusNotFound)
			json.NewEncoder(w).Encode(metav1.Status{Status: metav1.StatusFailure, Reason: metav1.StatusReasonNotFound, Code: 404})
			return
		}
		if r.Method == http.MethodPut {
			var next corev1.Secret
			if err := json.NewDecoder(r.Body).Decode(&next); err != nil || next.ResourceVersion != fmt.Sprint(version) {
				w.WriteHeader(http.StatusConflict)
				json.NewEncoder(w).Encode(metav1.Status{Status: metav1.StatusFailure, Reason: metav1.StatusReasonConflict, Code: 409})
				return
			}
			secret, version = &next, version+1
		}
		secret.ResourceVersion = fmt.Sprint(version)
		json.NewEncoder(w).Encode(secret)
	}))
	defer server.Close()
	config := &rest.Config{Host: server.URL}
	const controls = 5
	got := make([]string, controls)
	var all sync.WaitGroup
	for i := range controls {
		all.Go(func() {
			key, err := SealingKey(t.Context(), config, "mesh", "key", func() string { return fmt.Sprint("key ", i) })
			if err != nil {
				t.Error(err)
			}
			got[i] = string(key)
		})
	}
	all.Wait()
	for i, key := range got {
		if key == "" || key != got[0] {
			t.Errorf("control %d has key %q, another %q", i, key, got[0])
		}
	}
	if version != 2 {
		t.Errorf("the Secret was written %d times", version-1)
	}
	if _, err := SealingKey(t.Context(), config, "mesh", "none", func() string { return "" }); assay.KindOf(err) != assay.NotFound {
		t.Errorf("a Secret that is not there: %v", err)
	}
}
