package publish

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"assay.dev"
	"assay.dev/discovery"
	"assay.dev/kube/cluster"
)

// route is one with a parent here, one elsewhere, and entries of two controllers.
const route = `apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: shop, generation: 3, resourceVersion: "7"}
spec:
  parentRefs:
  - {group: "", kind: Service, name: web, port: 80}
  - {name: edge, namespace: infra}
status:
  note: of another year
  parents:
  - parentRef: {group: "", kind: Service, name: old}
    controllerName: assay.dev/mesh
    conditions: [{type: Accepted, status: "True", reason: Accepted, message: "", lastTransitionTime: "2020-01-01T00:00:00Z", observedGeneration: 1}]
  - parentRef: {name: edge, namespace: infra}
    controllerName: example.com/edge
    conditions: [{type: Accepted, status: "False", reason: Own, message: "its own", lastTransitionTime: "2021-01-01T00:00:00Z", observedGeneration: 2}]
  - parentRef: {group: "", kind: Service, name: web, port: 80}
    controllerName: assay.dev/mesh
    conditions: [{type: Accepted, status: "True", reason: Accepted, message: "", lastTransitionTime: "2022-01-01T00:00:00Z", observedGeneration: 2}]
`

func object(t *testing.T, text string) *unstructured.Unstructured {
	t.Helper()
	raw, err := yaml.YAMLToJSON([]byte(text))
	u := &unstructured.Unstructured{}
	if err == nil {
		err = u.UnmarshalJSON(raw)
	}
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func wanted(ref assay.RouteParentRef, conditions ...assay.RouteCondition) assay.RouteParentStatus {
	return assay.RouteParentStatus{ParentRef: ref, ControllerName: discovery.Controller, Conditions: conditions}
}

var (
	web  = assay.RouteParentRef{Kind: "Service", Namespace: "shop", Name: "web", Port: 80}
	edge = assay.RouteParentRef{Group: "gateway.networking.k8s.io", Kind: "Gateway", Namespace: "infra", Name: "edge"}
)

func now() time.Time { return time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC) }

func accepted(status string) assay.RouteCondition {
	return assay.RouteCondition{Type: "Accepted", Status: status, ObservedGeneration: 3, LastTransitionTime: now(), Reason: "Accepted"}
}

// TestMerge: what is ours is replaced, what is others' stays as it is, byte for byte.
func TestMerge(t *testing.T) {
	u := object(t, route)
	before, _, _ := unstructured.NestedSlice(u.Object, "status", "parents")
	resolved := assay.RouteCondition{Type: "ResolvedRefs", Status: "True", ObservedGeneration: 3, LastTransitionTime: now(), Reason: "ResolvedRefs"}
	gone := web
	gone.Name = "old"
	changed, err := merge(u, []assay.RouteParentStatus{wanted(gone, accepted("True")), wanted(web, accepted("True"), resolved)})
	if err != nil || !changed {
		t.Fatalf("%v, %v", changed, err)
	}
	after, _, _ := unstructured.NestedSlice(u.Object, "status", "parents")
	if len(after) != 2 || show(after[0]) != show(before[1]) {
		t.Fatalf("what is another controller's has changed:\n%s\n%s", show(before[1]), show(after))
	}
	mine := after[1].(map[string]any)
	if show(mine["parentRef"]) != `{"group":"","kind":"Service","name":"web","port":80}` {
		t.Errorf("the parent is not named as in the route: %s", show(mine["parentRef"]))
	}
	list := mine["conditions"].([]any)
	if len(list) != 2 || list[0].(map[string]any)["lastTransitionTime"] != "2022-01-01T00:00:00Z" || list[1].(map[string]any)["lastTransitionTime"] != "2026-05-06T07:08:09Z" {
		t.Errorf("since when: %s", show(list))
	}
	if note, _, _ := unstructured.NestedString(u.Object, "status", "note"); note == "" {
		t.Error("the rest of the status is gone")
	}
	if changed, err := merge(u, []assay.RouteParentStatus{wanted(web, accepted("True"), resolved)}); err != nil || changed {
		t.Errorf("the same again: %v, %v", changed, err)
	}
	if changed, err = merge(u, nil); err != nil || !changed {
		t.Errorf("nothing of ours: %v, %v", changed, err)
	}
	if after, _, _ = unstructured.NestedSlice(u.Object, "status", "parents"); len(after) != 1 {
		t.Errorf("left are %s", show(after))
	}
}

func show(v any) string { b, _ := json.Marshal(v); return string(b) }

// server is the API server's protocol for one route, with answers as bad as they get.
type server struct {
	*httptest.Server
	t         *testing.T
	mu        sync.Mutex
	conflicts int // answered before a write is taken
	broken    bool
	gets      int
	puts      int
	last      *unstructured.Unstructured
}

func newServer(t *testing.T) *server {
	s := &server{t: t, last: object(t, route)}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *server) ServeHTTP(out http.ResponseWriter, in *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	out.Header().Set("Content-Type", "application/json")
	fail := func(code int, reason string) {
		out.WriteHeader(code)
		io.WriteString(out, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"`+reason+`","code":`+show(code)+`}`)
	}
	const path = "/apis/gateway.networking.k8s.io/v1/namespaces/shop/httproutes/web"
	switch {
	case s.broken:
		s.puts++
		fail(http.StatusInternalServerError, "InternalError")
	case in.Method == "GET" && in.URL.Path == path:
		s.gets++
		json.NewEncoder(out).Encode(s.last.Object)
	case in.Method == "PUT" && in.URL.Path == path+"/status":
		s.puts++
		if s.puts <= s.conflicts {
			fail(http.StatusConflict, "Conflict")
			return
		}
		raw, err := io.ReadAll(in.Body)
		u := &unstructured.Unstructured{}
		if err == nil {
			err = u.UnmarshalJSON(raw)
		}
		if err != nil || u.GetResourceVersion() != "7" {
			s.t.Errorf("written: %s, %v", raw, err)
		}
		s.last = u
		out.Write(raw)
	default:
		s.t.Errorf("%s %s", in.Method, in.URL)
		fail(http.StatusNotFound, "NotFound")
	}
}

func (s *server) routes() *Routes {
	r, err := NewRoutes(&rest.Config{Host: s.URL}, slog.New(slog.NewTextHandler(s.t.Output(), nil)))
	if err != nil {
		s.t.Fatal(err)
	}
	return r
}

// TestWrites: a conflict is tried again at once, what does not differ is not written, what is
// not shown yet is not written twice, and a gateway's entry is nobody's here.
func TestWrites(t *testing.T) {
	s := newServer(t)
	s.conflicts = 2
	r := s.routes()
	is := []cluster.RouteStatus{{Kind: assay.HTTPRoute, Namespace: "shop", Name: "web"}}
	want := func(key string) []assay.RouteParentStatus {
		if key != "HTTPRoute/shop/web" {
			t.Errorf("asked for %s", key)
		}
		return []assay.RouteParentStatus{wanted(web, accepted("True")), wanted(edge, accepted("False"))}
	}
	at := now()
	if tried, err := r.look(t.Context(), want, is, at); !tried || err != nil || s.puts != 3 {
		t.Fatalf("%v, %v, %d writes", tried, err, s.puts)
	}
	if strings.Count(show(s.last.Object["status"]), discovery.Controller) != 1 {
		t.Errorf("written: %s", show(s.last.Object["status"]))
	}
	for range 3 { // the watch does not show it yet
		at = at.Add(time.Second)
		if tried, _ := r.look(t.Context(), want, is, at); tried {
			t.Fatal("it is written again")
		}
	}
	shown := []assay.RouteParentStatus{wanted(web, accepted("True"))}
	shown[0].Conditions[0].LastTransitionTime = now().Add(-time.Hour)
	is[0].Parents = shown
	if tried, _ := r.look(t.Context(), want, is, at); tried {
		t.Error("what does not differ is written")
	}
	// Somebody takes it away whenever it is there: ever more seldom it is written again.
	writes := 0
	for end := at.Add(time.Hour); at.Before(end); at = at.Add(time.Second) {
		is[0].Parents = nil
		tried, err := r.look(t.Context(), want, is, at)
		if err != nil {
			t.Fatal(err)
		}
		if tried {
			writes++
			is[0].Parents = shown
			r.look(t.Context(), want, is, at)
		}
	}
	if writes < 10 || writes > 20 {
		t.Errorf("in an hour it is written %d times", writes)
	}
	is[0].Parents = shown
	if r.look(t.Context(), want, is, at.Add(3*mostWait)); len(r.pace.tried) != 0 {
		t.Error("what nobody disagrees about is remembered")
	}
	is[0].Parents = nil
	if tried, err := r.look(t.Context(), want, is, at.Add(3*mostWait)); !tried || err != nil {
		t.Errorf("what was taken away is not written again: %v", err)
	}
	r.look(t.Context(), want, nil, at)
	if len(r.pace.tried) != 0 {
		t.Error("a route that is gone is remembered")
	}
}

// TestBounded: many that differ are written bit by bit, and one that cannot be is tried less and less.
func TestBounded(t *testing.T) {
	s := newServer(t)
	s.broken = true
	r := s.routes()
	var is []cluster.RouteStatus
	for i := range writesEach + 5 {
		is = append(is, cluster.RouteStatus{Kind: assay.HTTPRoute, Namespace: "shop", Name: string(rune('a'+i)) + "x"})
	}
	want := func(string) []assay.RouteParentStatus {
		return []assay.RouteParentStatus{wanted(web, accepted("True"))}
	}
	if _, err := r.look(t.Context(), want, is, now()); assay.KindOf(err) != assay.Unavailable || len(r.pace.tried) != writesEach {
		t.Errorf("%v, %d tried", err, len(r.pace.tried))
	}
	if r.look(t.Context(), want, is, now()); len(r.pace.tried) != writesEach+5 {
		t.Errorf("%d tried", len(r.pace.tried))
	}
	key := "HTTPRoute/shop/ax"
	for range 10 {
		a := r.pace.tried[key]
		r.look(t.Context(), want, is[:1], a.after)
	}
	if w := r.pace.tried[key].wait; w != mostWait {
		t.Errorf("it waits %v", w)
	}
}

// TestTrustIsKept: roots are written when they differ and at no other time.
func TestTrustIsKept(t *testing.T) {
	var mu sync.Mutex
	data, patches := map[string]string{"other": "stays"}, 0
	api := httptest.NewServer(http.HandlerFunc(func(out http.ResponseWriter, in *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if in.URL.Path != "/api/v1/namespaces/assay-system/configmaps/assay-trust" {
			t.Errorf("%s %s", in.Method, in.URL)
		}
		if in.Method == "PATCH" {
			patches++
			var patch struct{ Data map[string]string }
			if err := json.NewDecoder(in.Body).Decode(&patch); err != nil || in.Header.Get("Content-Type") != "application/merge-patch+json" {
				t.Errorf("a patch of %q: %v", in.Header.Get("Content-Type"), err)
			}
			for k, v := range patch.Data {
				data[k] = v
			}
		}
		out.Header().Set("Content-Type", "application/json")
		json.NewEncoder(out).Encode(map[string]any{"kind": "ConfigMap", "apiVersion": "v1", "data": data})
	}))
	defer api.Close()
	trust, err := NewTrust(&rest.Config{Host: api.URL}, "assay-system", slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	roots := [][]byte{{1, 2, 3}}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := trust.Run(ctx, func() [][]byte { mu.Lock(); defer mu.Unlock(); return slices.Clone(roots) }); err != nil {
			t.Error(err)
		}
	})
	defer running.Wait()
	defer cancel()
	until := func(n int) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) { // a look, not a wait for luck
			mu.Lock()
			got, text := patches, data[TrustKey]
			mu.Unlock()
			if got == n && strings.Count(text, "BEGIN CERTIFICATE") == n {
				return
			}
			if got > n || time.Now().After(deadline) {
				t.Fatalf("%d patches, %q", got, text)
			}
		}
	}
	until(1)
	mu.Lock()
	roots = append(roots, []byte{4, 5, 6})
	mu.Unlock()
	until(2)
	if data["other"] != "stays" {
		t.Error("what is not ours is gone")
	}
	if err := trust.write(t.Context(), PEM(roots)); err != nil || patches != 2 {
		t.Errorf("the same again: %v, %d patches", err, patches)
	}
}
