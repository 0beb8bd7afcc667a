package publish

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"assay.dev"
	"assay.dev/kube/cluster"
	"assay.dev/kube/v1alpha1"
)

// Verdict is what became of an object of our own kinds.
type Verdict struct {
	Generation int64 // of the object that it is about
	Accepted   bool
	Reason     string // one of v1alpha1's
	Message    string // of one that is not accepted, what is wrong and what would mend it
}

// Objects keeps the condition Accepted of objects of our own kinds, and tells by an event of one
// that is not accepted. Other conditions there are not its own.
//
// A definition of before there were conditions has no status: then events are all there is,
// nothing is written, and it is asked for now and then whether that has changed.
type Objects struct {
	client   rest.Interface
	log      *slog.Logger
	pace     pace[Verdict]      // by kind and name, as the others
	last     map[string]Verdict // wanted at the last look
	conflict map[string]string  // the version that an attempt found to be old
	events   map[string]*telling
	without  map[string]time.Time // resources that have no status, and when to ask again
}

// telling is an event about an object, one for each generation and reason.
type telling struct {
	uid        string
	generation int64
	reason     string
	done       bool
	after      time.Time // not again before
}

const (
	manager       = "assay-control" // of the field, for server-side apply
	statusAgain   = 5 * time.Minute // that a kind without a status is asked for
	messageLength = 4000            // bytes of a condition's
)

// NewObjects returns the keeper of our own kinds' conditions. It does not connect yet.
func NewObjects(config *rest.Config, log *slog.Logger) (*Objects, error) {
	config = rest.CopyConfig(config)
	config.QPS, config.Burst = 2*writesEach, 4*writesEach
	client, err := coreClient(config)
	if err != nil {
		return nil, err
	}
	return &Objects{
		client: client, log: log, pace: newPace(func(a, b Verdict) bool { return a == b }),
		last: map[string]Verdict{}, conflict: map[string]string{}, events: map[string]*telling{}, without: map[string]time.Time{},
	}, nil
}

// Run writes conditions and events until ctx ends. want returns what became of an object, and
// whether that is known; have returns what the API server has.
func (o *Objects) Run(ctx context.Context, want func(kind, namespace, name string) (Verdict, bool), have func() []cluster.ObjectStatus) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	problem := said{log: o.log, what: "conditions of Assay's own kinds"}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if tried, err := o.look(ctx, want, have(), time.Now()); tried {
			problem.result(ctx, err)
		}
	}
}

// look writes what differs, as much as may be written at once.
func (o *Objects) look(ctx context.Context, want func(kind, namespace, name string) (Verdict, bool), have []cluster.ObjectStatus, now time.Time) (tried bool, failed error) {
	there, wanted := map[string]bool{}, map[string]Verdict{}
	writes, told := 0, 0
	for i := range have {
		h := &have[i]
		key := h.Kind + " " + h.Namespace + "/" + h.Name
		there[key] = true
		w, known := want(h.Kind, h.Namespace, h.Name)
		if !known || w.Generation != h.Generation {
			continue // it is about to be
		}
		w.Message = cut(w.Message, messageLength)
		wanted[key] = w
		if !w.Accepted && o.last[key] != w {
			continue // what belongs together is declared one after the other
		}
		if o.tells(key, h, &w) && told < eventsEach && !now.Before(o.events[key].after) {
			told++
			if err := o.tell(ctx, key, h, &w, now); err != nil {
				failed = err
			}
		}
		switch {
		case says(h.Accepted, &w):
			o.pace.stands(key, now)
		case h.Accepted != nil && h.Accepted.ObservedGeneration > h.Generation, // who wrote it knows better
			h.Version == o.conflict[key], now.Before(o.without[h.Resource]), // nothing has come since
			writes == writesEach, !o.pace.may(key, w, now):
		default:
			writes++
			if err := o.write(ctx, key, h, &w, now); err != nil {
				failed = err
			}
		}
	}
	o.last = wanted
	o.pace.keep(there)
	forget(o.conflict, there)
	forget(o.events, there)
	return writes+told > 0, failed
}

func forget[V any](m map[string]V, there map[string]bool) {
	for key := range m {
		if !there[key] {
			delete(m, key)
		}
	}
}

// says reports whether a condition says what is wanted.
func says(c *metav1.Condition, w *Verdict) bool {
	return c != nil && c.Status == status(w) && c.ObservedGeneration == w.Generation && c.Reason == w.Reason && c.Message == w.Message
}

func status(w *Verdict) metav1.ConditionStatus {
	if w.Accepted {
		return metav1.ConditionTrue
	}
	return metav1.ConditionFalse
}

// write applies the condition to the object as it was seen: of a status it owns this one alone,
// and what has changed meanwhile is looked at first.
func (o *Objects) write(ctx context.Context, key string, h *cluster.ObjectStatus, w *Verdict, now time.Time) error {
	c := metav1.Condition{
		Type: v1alpha1.ConditionAccepted, Status: status(w), ObservedGeneration: w.Generation, Reason: w.Reason, Message: w.Message,
		LastTransitionTime: metav1.NewTime(now.UTC().Truncate(time.Second)),
	}
	if h.Accepted != nil && h.Accepted.Status == c.Status {
		c.LastTransitionTime = h.Accepted.LastTransitionTime
	}
	body, err := json.Marshal(map[string]any{
		"apiVersion": v1alpha1.APIVersion, "kind": h.Kind,
		"metadata": map[string]any{"namespace": h.Namespace, "name": h.Name, "uid": h.UID, "resourceVersion": h.Version},
		"status":   map[string]any{"conditions": []metav1.Condition{c}},
	})
	if err != nil {
		return err
	}
	err = o.client.Patch(types.ApplyPatchType).AbsPath("/apis", v1alpha1.APIVersion, "namespaces", h.Namespace, h.Resource, h.Name, "status").
		Param("fieldManager", manager).Param("force", "true").Body(body).Do(ctx).Error()
	delete(o.conflict, key)
	switch {
	case apierrors.IsConflict(err):
		o.conflict[key] = h.Version // the watch shows what it is now
		return nil
	case apierrors.IsNotFound(err): // the object, or its status
		err = o.lacks(ctx, h.Resource, now)
	}
	o.pace.wrote(key, *w, now)
	if err != nil {
		return &assay.Error{Kind: assay.Unavailable, Op: "write the status of " + key, Err: err}
	}
	return nil
}

// lacks asks whether objects of a kind have a status at all, and notes it if they have not.
func (o *Objects) lacks(ctx context.Context, resource string, now time.Time) error {
	text, err := o.client.Get().AbsPath("/apis", v1alpha1.APIVersion).DoRaw(ctx)
	var list metav1.APIResourceList
	if err == nil {
		err = json.Unmarshal(text, &list)
	}
	if err != nil || slices.ContainsFunc(list.APIResources, func(r metav1.APIResource) bool { return r.Name == resource+"/status" }) {
		return err
	}
	if o.without[resource].IsZero() {
		o.log.Info("the definition of "+resource+" is of an earlier release: its objects cannot show whether they are accepted",
			"remedy", "assay install, or helm upgrade, brings the one of this release")
	}
	o.without[resource] = now.Add(statusAgain)
	return nil
}

// tells reports whether there is something to tell of an object, and nobody has.
func (o *Objects) tells(key string, h *cluster.ObjectStatus, w *Verdict) bool {
	if w.Accepted {
		return false
	}
	t := o.events[key]
	if t == nil || t.uid != h.UID || t.generation != w.Generation || t.reason != w.Reason {
		c := h.Accepted // whoever wrote that has told it
		done := c != nil && c.Status == metav1.ConditionFalse && c.ObservedGeneration == w.Generation && c.Reason == w.Reason
		t = &telling{uid: h.UID, generation: w.Generation, reason: w.Reason, done: done}
		o.events[key] = t
	}
	return !t.done
}

// tell makes an event, unless there is one.
func (o *Objects) tell(ctx context.Context, key string, h *cluster.ObjectStatus, w *Verdict, now time.Time) error {
	t := o.events[key]
	event := objectEvent(h, w, now)
	err := o.client.Post().Namespace(h.Namespace).Resource("events").Body(event).Do(ctx).Error()
	if err == nil || apierrors.IsAlreadyExists(err) || apierrors.IsNotFound(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		t.done = true // or what it is about is going
		return nil
	}
	t.after = now.Add(eventRetry)
	return &assay.Error{Kind: assay.Unavailable, Op: "write event of " + key, Err: err}
}

// objectEvent is the same one, by its name, for the same object, generation and reason.
func objectEvent(h *cluster.ObjectStatus, w *Verdict, now time.Time) *corev1.Event {
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d %s", h.UID, w.Generation, w.Reason))
	at := metav1.NewTime(now)
	return &corev1.Event{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Event"},
		ObjectMeta: metav1.ObjectMeta{Namespace: h.Namespace, Name: fmt.Sprintf("%.200s.%x", h.Name, sum[:8])},
		InvolvedObject: corev1.ObjectReference{APIVersion: v1alpha1.APIVersion, Kind: h.Kind, Namespace: h.Namespace, Name: h.Name,
			UID: types.UID(h.UID), ResourceVersion: h.Version},
		Reason: w.Reason, Message: cut(w.Message, eventLength), Type: corev1.EventTypeWarning, Count: 1,
		FirstTimestamp: at, LastTimestamp: at, Source: corev1.EventSource{Component: "assay"},
	}
}

// cut is the beginning of a text, in whole letters.
func cut(text string, most int) string {
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "")
}
