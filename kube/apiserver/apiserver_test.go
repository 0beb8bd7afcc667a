package apiserver

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// TestMetadata: a server that hands out metadata alone is enough to get, list and watch by.
func TestMetadata(t *testing.T) {
	meta := func(name, label string) metav1.PartialObjectMetadata {
		return metav1.PartialObjectMetadata{
			TypeMeta:   metav1.TypeMeta{Kind: "PartialObjectMetadata", APIVersion: "meta.k8s.io/v1"},
			ObjectMeta: metav1.ObjectMeta{Name: name, ResourceVersion: "7", Labels: map[string]string{"mesh": label}},
		}
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		accept := r.Header.Get("Accept")
		q := r.URL.Query()
		var answer any
		kind := "PartialObjectMetadata"
		switch {
		case r.URL.Path == "/api/v1/namespaces/bank":
			answer = meta("bank", "asked")
		case r.URL.Path != "/api/v1/namespaces" || q.Get("sendInitialEvents") != "": // which servers may not know
			http.Error(w, "no such thing", http.StatusBadRequest)
			return
		case q.Get("watch") != "":
			changed := meta("bank", "watched")
			answer = map[string]any{"type": "MODIFIED", "object": changed}
		default:
			kind = "PartialObjectMetadataList"
			answer = metav1.PartialObjectMetadataList{
				TypeMeta: metav1.TypeMeta{Kind: kind, APIVersion: "meta.k8s.io/v1"},
				ListMeta: metav1.ListMeta{ResourceVersion: "7"},
				Items:    []metav1.PartialObjectMetadata{meta("bank", "listed")},
			}
		}
		if first, _, _ := strings.Cut(accept, ","); !strings.Contains(first, "as="+kind+";") {
			http.Error(w, "what is asked for has more than metadata: "+accept, http.StatusNotAcceptable)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(answer)
		if q.Get("watch") != "" {
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}
	}))
	defer server.Close()
	client, err := OpenMetadata(&rest.Config{Host: server.URL}, corev1.SchemeGroupVersion.WithResource("namespaces"))
	if err != nil {
		t.Fatal(err)
	}
	n, err := client.Get(t.Context(), "bank", metav1.GetOptions{})
	if err != nil || n.Labels["mesh"] != "asked" {
		t.Errorf("asked: %v, %v", n, err)
	}
	heard := make(chan string, 100)
	into := &cache.FakeCustomStore{
		ReplaceFunc: func(list []any, _ string) error {
			for _, o := range list {
				heard <- o.(*metav1.PartialObjectMetadata).Labels["mesh"]
			}
			return nil
		},
		UpdateFunc: func(o any) error {
			select {
			case heard <- o.(*metav1.PartialObjectMetadata).Labels["mesh"]:
			default: // it is watched anew again and again
			}
			return nil
		},
	}
	reflector := cache.NewReflectorWithOptions(client.Watched(), &metav1.PartialObjectMetadata{}, into, cache.ReflectorOptions{Name: "namespaces"})
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { reflector.RunWithContext(ctx) })
	defer func() { cancel(); running.Wait() }()
	for _, want := range []string{"listed", "watched"} {
		select {
		case got := <-heard:
			if got != want {
				t.Errorf("%s, want %s", got, want)
			}
		case <-time.After(time.Minute):
			t.Fatalf("nothing was %s", want)
		}
	}
}
