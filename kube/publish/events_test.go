package publish

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"

	"assay.dev"
)

// eventServer is the API server's protocol for events.
type eventServer struct {
	t       *testing.T
	events  map[string]*corev1.Event
	creates int
	patches int
	broken  bool
}

func (s *eventServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	fail := func(code int, reason string) {
		w.WriteHeader(code)
		fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":%q,"code":%d}`, reason, code)
	}
	body, err := io.ReadAll(r.Body)
	if err != nil || s.broken {
		fail(http.StatusInternalServerError, "InternalError")
		return
	}
	path := strings.TrimPrefix(r.URL.Path, "/api/v1/namespaces/")
	namespace, name, _ := strings.Cut(path, "/events")
	var e corev1.Event
	if err := json.Unmarshal(body, &e); err != nil {
		s.t.Errorf("%s %s: %v: %s", r.Method, r.URL, err, body)
	}
	switch r.Method {
	case http.MethodPost:
		if e.Namespace != namespace || s.events[e.Name] != nil {
			fail(http.StatusConflict, "AlreadyExists")
			return
		}
		s.creates++
		s.events[e.Name] = &e
	case http.MethodPatch:
		old := s.events[strings.TrimPrefix(name, "/")]
		if old == nil {
			fail(http.StatusNotFound, "NotFound")
			return
		}
		s.patches++
		old.Count, old.LastTimestamp, old.Message = e.Count, e.LastTimestamp, e.Message
	}
	w.Write(body)
}

// TestEvents: a finding about a pod is an event of it, once, counted on, and not more often
// than is good; of what is no pod there is none.
func TestEvents(t *testing.T) {
	s := &eventServer{t: t, events: map[string]*corev1.Event{}}
	web := httptest.NewServer(s)
	defer web.Close()
	open := func() *Events {
		e, err := NewEvents(&rest.Config{Host: web.URL}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	e := open()
	pods := func(uid string) (string, string, bool) { return "shop", "web-" + uid, uid != "host" }
	began := now()
	found := func(uid, kind, subject string, at time.Time, count int) Found {
		return Found{Finding: assay.Finding{Workload: uid, Kind: kind, Subject: subject, Time: at, Detail: "for " + subject, Remedy: "do something"}, First: began, Count: count}
	}
	list := []Found{
		found("1", "plaintext-in-strict", "10.0.0.1", began, 2),
		found("1", "plaintext-in-strict", "10.0.0.2", began.Add(time.Second), 3),
		found("1", "pod-not-meshed", "shop/web-1", began, 1),
		found("host", "pod-not-meshed", "x", began, 1),
		found("2", "pod-not-meshed", "long ago", began.Add(-2*time.Hour), 1),
	}
	look := func(at time.Time, wantCreates, wantPatches int) {
		t.Helper()
		s.creates, s.patches = 0, 0
		e.look(t.Context(), byPod(list), pods, at)
		if s.creates != wantCreates || s.patches != wantPatches {
			t.Errorf("made %d and changed %d, want %d and %d", s.creates, s.patches, wantCreates, wantPatches)
		}
	}
	event := func(reason string) *corev1.Event {
		for _, e := range s.events {
			if e.Reason == reason {
				return e
			}
		}
		t.Fatalf("no event %s", reason)
		return nil
	}
	s.broken = true
	look(began.Add(time.Second), 0, 0)
	s.broken = false
	look(began.Add(2*time.Second), 0, 0) // not at once again
	look(began.Add(2*time.Second+eventRetry), 2, 0)
	look(began.Add(3*time.Second+eventRetry), 0, 0)
	if e := event("PlaintextInStrict"); e.Count != 5 || e.Message != "for 10.0.0.2 (do something)" || e.InvolvedObject.UID != "1" || e.InvolvedObject.Name != "web-1" || e.Type != "Warning" || e.Namespace != "shop" {
		t.Errorf("%+v", e)
	}
	// Found again: told once in a while.
	list[2] = found("1", "pod-not-meshed", "shop/web-1", began.Add(40*time.Second), 2)
	look(began.Add(41*time.Second), 0, 0)
	look(began.Add(2*time.Minute), 0, 1)
	if e := event("PodNotMeshed"); e.Count != 2 || !e.LastTimestamp.Time.Equal(began.Add(40*time.Second)) {
		t.Errorf("%+v", e)
	}
	// The next control makes none anew; and one that the API server has forgotten is made again.
	e = open()
	look(began.Add(3*time.Minute), 0, 2)
	clear(s.events)
	list[2].Time = began.Add(5 * time.Minute)
	look(began.Add(6*time.Minute), 1, 0)
	// As many at once as is good for others.
	for i := range 3 * eventsEach {
		list = append(list, found(fmt.Sprint("many-", i), "pod-not-meshed", "x", began.Add(6*time.Minute), 1))
	}
	for i := range 3 {
		look(began.Add(6*time.Minute+time.Duration(i)*time.Second), eventsEach, 0)
	}
	look(began.Add(7*time.Minute), 0, 0)
	list = nil
	look(began.Add(3*time.Hour), 0, 0)
	if len(e.told) != 0 {
		t.Errorf("it remembers %d", len(e.told))
	}
}
