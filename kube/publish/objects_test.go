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
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"assay.dev"
	"assay.dev/kube/cluster"
)

// objectServer is the API server's protocol for conditions of our own kinds, and for events. It
// shows what it has only when it is asked to, as a watch does.
type objectServer struct {
	t       *testing.T
	objects map[string]*cluster.ObjectStatus // by kind and name
	events  map[string]*corev1.Event
	version int
	broken  bool
	old     bool // definitions without a status
	writes  int
	asked   int // for definitions
	refused int // writes that came too late
	shown   []cluster.ObjectStatus
}

func (s *objectServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
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
	const path = "/apis/assay.dev/v1alpha1"
	switch {
	case r.URL.Path == path:
		s.asked++
		status := `,{"name":"egresses/status"},{"name":"trafficpolicies/status"}`
		if s.old {
			status = ""
		}
		io.WriteString(w, `{"kind":"APIResourceList","apiVersion":"v1","groupVersion":"assay.dev/v1alpha1","resources":[{"name":"egresses"},{"name":"trafficpolicies"}`+status+`]}`)
	case r.Method == http.MethodPost && strings.HasPrefix(r.URL.Path, "/api/v1/namespaces/shop/events"):
		var e corev1.Event
		if err := json.Unmarshal(body, &e); err != nil || e.Namespace != "shop" {
			s.t.Errorf("%s: %v", body, err)
		}
		if s.events[e.Name] != nil {
			fail(http.StatusConflict, "AlreadyExists")
			return
		}
		s.events[e.Name] = &e
		w.Write(body)
	case r.Method == http.MethodPatch:
		s.writes++
		s.patch(r, body, fail)
		w.Write(body)
	default:
		s.t.Errorf("%s %s", r.Method, r.URL)
		fail(http.StatusNotFound, "NotFound")
	}
}

func (s *objectServer) patch(r *http.Request, body []byte, fail func(int, string)) {
	var p struct {
		APIVersion, Kind string
		Metadata         struct{ Namespace, Name, UID, ResourceVersion string }
		Status           struct{ Conditions []metav1.Condition }
	}
	if err := json.Unmarshal(body, &p); err != nil {
		s.t.Errorf("%s: %v", body, err)
	}
	q := r.URL.Query()
	if p.APIVersion != "assay.dev/v1alpha1" || q.Get("fieldManager") != "assay-control" || q.Get("force") != "true" || r.Header.Get("Content-Type") != "application/apply-patch+yaml" {
		s.t.Errorf("%s %s: %s", r.Header.Get("Content-Type"), r.URL, body)
	}
	o := s.objects[p.Kind+" "+p.Metadata.Name]
	switch {
	case o == nil || s.old || r.URL.Path != "/apis/assay.dev/v1alpha1/namespaces/shop/"+o.Resource+"/"+o.Name+"/status":
		fail(http.StatusNotFound, "NotFound")
	case p.Metadata.UID != o.UID || p.Metadata.ResourceVersion != o.Version:
		s.refused++
		fail(http.StatusConflict, "Conflict")
	case len(p.Status.Conditions) != 1:
		s.t.Errorf("%s", body)
	default:
		o.Accepted = &p.Status.Conditions[0]
		s.touch(o)
	}
}

func (s *objectServer) touch(o *cluster.ObjectStatus) {
	s.version++
	o.Version = fmt.Sprint(s.version)
}

func (s *objectServer) put(kind, resource, name string) *cluster.ObjectStatus {
	o := &cluster.ObjectStatus{Kind: kind, Namespace: "shop", Name: name, Resource: resource, UID: "uid-of-" + name, Generation: 1}
	s.touch(o)
	s.objects[kind+" "+name] = o
	return o
}

// show is what the watch shows from now on.
func (s *objectServer) show() []cluster.ObjectStatus {
	s.shown = nil
	for _, o := range s.objects {
		s.shown = append(s.shown, *o)
	}
	return s.shown
}

func newObjectServer(t *testing.T) (*objectServer, func() *Objects) {
	s := &objectServer{t: t, objects: map[string]*cluster.ObjectStatus{}, events: map[string]*corev1.Event{}}
	web := httptest.NewServer(s)
	t.Cleanup(web.Close)
	return s, func() *Objects {
		o, err := NewObjects(&rest.Config{Host: web.URL}, slog.New(slog.NewTextHandler(t.Output(), nil)))
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
}

func holds(t *testing.T, o *cluster.ObjectStatus, want string) {
	t.Helper()
	got := "nothing"
	if c := o.Accepted; c != nil {
		got = fmt.Sprintf("%s %s %s %d %q since %s", c.Type, c.Status, c.Reason, c.ObservedGeneration, c.Message, c.LastTransitionTime.UTC().Format("15:04:05"))
	}
	if got != want {
		t.Errorf("%s %s says %s, want %s", o.Kind, o.Name, got, want)
	}
}

// TestConditions: an object says whether it is in effect, once, and has an event when it is not;
// what is lost is written again.
func TestConditions(t *testing.T) {
	s, open := newObjectServer(t)
	good, bad := s.put("TrafficPolicy", "trafficpolicies", "good"), s.put("Egress", "egresses", "bad")
	verdicts := map[string]Verdict{
		"good": {Generation: 1, Accepted: true, Reason: "Accepted"},
		"bad":  {Generation: 1, Reason: "Invalid", Message: "no ports (name some)"},
	}
	want := func(kind, namespace, name string) (Verdict, bool) {
		v, ok := verdicts[name]
		return v, ok && namespace == "shop"
	}
	at := now()
	one, other := open(), open()
	look := func(o *Objects, wantWrites int) {
		t.Helper()
		s.writes = 0
		if _, err := o.look(t.Context(), want, s.shown, at); err != nil && !s.broken {
			t.Error(err)
		}
		at = at.Add(time.Second)
		if s.writes != wantWrites {
			t.Errorf("%d writes, want %d", s.writes, wantWrites)
		}
	}
	s.show()
	s.broken = true
	look(one, 0)
	s.broken = false
	if one.pace.tried["TrafficPolicy shop/good"].want != verdicts["good"] {
		t.Errorf("nothing was tried: %+v", one.pace.tried)
	}
	at = at.Add(shownWithin)
	look(one, 2) // what is not accepted is so for the second time
	holds(t, good, `Accepted True Accepted 1 "" since 07:08:20`)
	holds(t, bad, `Accepted False Invalid 1 "no ports (name some)" since 07:08:20`)
	look(one, 0)   // the watch does not show it yet
	look(other, 1) // the other control sees the same, and comes too late
	look(other, 1)
	if s.refused != 2 {
		t.Errorf("%d writes were refused", s.refused)
	}
	look(other, 0)
	s.show()
	look(one, 0)
	look(other, 0)
	if len(s.events) != 1 {
		t.Fatalf("%d events", len(s.events))
	}
	for _, e := range s.events {
		if e.Reason != "Invalid" || e.Type != "Warning" || e.Message != "no ports (name some)" || e.InvolvedObject.Kind != "Egress" || e.InvolvedObject.Name != "bad" ||
			e.InvolvedObject.UID != "uid-of-bad" || e.InvolvedObject.APIVersion != "assay.dev/v1alpha1" {
			t.Errorf("%+v", e)
		}
	}
	// The API server forgets events; who comes later tells none that was told.
	clear(s.events)
	third := open()
	look(third, 0)
	look(third, 0)
	if len(s.events) != 0 {
		t.Error("it is told again")
	}
	// It is mended. An older control, which has not heard, does not say otherwise of a generation
	// that it does not know, and says nothing of what it does not know at all.
	old := s.show()
	bad.Generation = 2
	s.touch(bad)
	look(one, 0)
	s.show()
	look(one, 0) // this control has not taken it in
	verdicts["bad"] = Verdict{Generation: 2, Accepted: true, Reason: "Accepted"}
	look(one, 1)
	if bad.Accepted.Status != metav1.ConditionTrue || bad.Accepted.ObservedGeneration != 2 || !bad.Accepted.LastTransitionTime.Equal(&metav1.Time{Time: at.Add(-time.Second)}) {
		t.Errorf("%+v", bad.Accepted)
	}
	verdicts["bad"] = Verdict{Generation: 1, Reason: "Invalid", Message: "no ports (name some)"}
	for i := range old {
		if old[i].Name == "bad" {
			old[i].Accepted, old[i].Version = bad.Accepted, bad.Version
		}
	}
	s.shown = old
	look(other, 0)
	look(other, 0)
	delete(verdicts, "bad")
	s.show()
	look(one, 0)
	// Another reason for the same generation is another event.
	verdicts["bad"] = Verdict{Generation: 2, Reason: "Conflicted", Message: "elder is older"}
	look(one, 0)
	look(one, 1)
	if len(s.events) != 1 {
		t.Errorf("%d events", len(s.events))
	}
	s.objects = nil
	s.show()
	look(one, 0)
	if len(one.pace.tried)+len(one.events)+len(one.conflict)+len(one.last) != 0 {
		t.Errorf("what is gone is remembered: %+v", one)
	}
}

// TestNoWar: two controls that do not agree, as of two releases, change an object a few times in
// an hour.
func TestNoWar(t *testing.T) {
	s, open := newObjectServer(t)
	s.put("Egress", "egresses", "e")
	verdict := func(message string) func(kind, namespace, name string) (Verdict, bool) {
		return func(string, string, string) (Verdict, bool) {
			return Verdict{Generation: 1, Reason: "Invalid", Message: message}, true
		}
	}
	one, other := open(), open()
	at := now()
	for range 3600 {
		at = at.Add(time.Second)
		one.look(t.Context(), verdict("of this release"), s.show(), at)
		other.look(t.Context(), verdict("of the next"), s.show(), at)
	}
	if s.writes < 4 || s.writes > 50 {
		t.Errorf("%d writes in an hour", s.writes)
	}
	if len(s.events) != 1 {
		t.Errorf("%d events", len(s.events))
	}
	// Where one is left, it has the last word.
	for range int(mostWait / time.Second) {
		at = at.Add(time.Second)
		one.look(t.Context(), verdict("of this release"), s.show(), at)
	}
	if c := s.objects["Egress e"].Accepted; c.Message != "of this release" {
		t.Errorf("%+v", c)
	}
}

// TestNoStatus: with definitions of an earlier release events are told, and the API server is
// hardly asked; a new definition is noticed.
func TestNoStatus(t *testing.T) {
	s, open := newObjectServer(t)
	for i := range 100 {
		s.put("Egress", "egresses", fmt.Sprint("e", i))
	}
	want := func(_, _, name string) (Verdict, bool) {
		return Verdict{Generation: 1, Accepted: name != "e7", Reason: "Accepted"}, true
	}
	s.old = true
	o, at := open(), now()
	for range 3600 {
		at = at.Add(time.Second)
		if _, err := o.look(t.Context(), want, s.show(), at); err != nil {
			t.Fatal(err)
		}
	}
	if s.writes > 30 || s.asked > 30 || len(s.events) != 1 {
		t.Errorf("in an hour: %d writes, %d questions, %d events", s.writes, s.asked, len(s.events))
	}
	s.old = false
	for range int(2 * statusAgain / time.Second) {
		at = at.Add(time.Second)
		o.look(t.Context(), want, s.show(), at)
	}
	for _, one := range s.objects {
		if one.Accepted == nil {
			t.Fatalf("%s says nothing", one.Name)
		}
	}
	// One that has gone before the watch shows it is no reason to think so again.
	s.show()
	delete(s.objects, "Egress e3")
	s.asked = 0
	o = open()
	for i := range s.shown {
		s.shown[i].Accepted = nil
	}
	if _, err := o.look(t.Context(), func(_, _, name string) (Verdict, bool) {
		return Verdict{Generation: 1, Accepted: true, Reason: "Accepted"}, name == "e3"
	}, s.shown, at); err != nil || s.asked != 1 || len(o.without) != 0 {
		t.Errorf("%v, asked %d, %v", err, s.asked, o.without)
	}
}

// TestConditionsBounded: many are written bit by bit, and long texts are cut.
func TestConditionsBounded(t *testing.T) {
	s, open := newObjectServer(t)
	for i := range 3 * writesEach {
		s.put("Egress", "egresses", fmt.Sprint("e", i))
	}
	long := strings.Repeat("ö", 5000)
	want := func(string, string, string) (Verdict, bool) {
		return Verdict{Generation: 1, Reason: "Invalid", Message: long}, true
	}
	o, at := open(), now()
	o.look(t.Context(), want, s.show(), at)
	for n := range 3 {
		o.look(t.Context(), want, s.show(), at)
		if s.writes != (n+1)*writesEach || len(s.events) != (n+1)*eventsEach {
			t.Errorf("%d writes and %d events in %d looks", s.writes, len(s.events), n+1)
		}
	}
	for _, one := range s.objects {
		if m := one.Accepted.Message; len(m) > messageLength || !strings.HasPrefix(long, m) || len(m) < messageLength-4 {
			t.Fatalf("a message of %d bytes", len(m))
		}
	}
	for range 4 {
		o.look(t.Context(), want, s.show(), at)
	}
	if s.writes != 3*writesEach || len(s.events) != 3*writesEach {
		t.Errorf("in the end %d writes and %d events", s.writes, len(s.events))
	}
	s.broken = true
	if _, err := open().look(t.Context(), func(string, string, string) (Verdict, bool) {
		return Verdict{Generation: 1, Accepted: true, Reason: "Accepted"}, true
	}, s.show(), at); assay.KindOf(err) != assay.Unavailable {
		t.Errorf("%v", err)
	}
}
