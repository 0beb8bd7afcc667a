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
)

// Found is what was found about a pod.
type Found struct {
	assay.Finding           // Workload is the pod's UID
	First         time.Time // Time is the last
	Count         int
}

// Events tells of findings where people look first: at the pod. There is one event for each
// pod and kind of finding; it is counted on while the finding is made again.
type Events struct {
	client rest.Interface
	log    *slog.Logger
	told   map[string]told // by the pod's UID and the kind
}

// told is what an event says.
type told struct {
	last time.Time // the finding's
	next time.Time // not again before
}

// Bounds of what is written.
const (
	eventsEach  = 10          // in each look, which is a second
	eventEvery  = time.Minute // for one pod and kind
	eventRetry  = 30 * time.Second
	eventsKept  = time.Hour // the API server forgets them then, too
	eventLength = 1024      // bytes of a message, which is the API's bound
)

// NewEvents returns a teller of events. It does not connect yet.
func NewEvents(config *rest.Config, log *slog.Logger) (*Events, error) {
	config = rest.CopyConfig(config)
	config.QPS, config.Burst = 2*eventsEach, 4*eventsEach
	client, err := coreClient(config)
	if err != nil {
		return nil, err
	}
	return &Events{client: client, log: log, told: map[string]told{}}, nil
}

// Run writes events until ctx ends. found returns what was found lately, nil when that is
// what it was; pod returns a pod's names by its UID, and whether there is one.
func (e *Events) Run(ctx context.Context, found func() []Found, pod func(uid string) (namespace, name string, ok bool)) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	problem := said{log: e.log, what: "events of pods"}
	list := map[string]Found{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if news := found(); news != nil {
			list = byPod(news)
		}
		if tried, err := e.look(ctx, list, pod, time.Now()); tried {
			problem.result(ctx, err)
		}
	}
}

// byPod makes one of all findings of a kind about a pod: who is refused again and again, from
// ever other addresses, fills no list.
func byPod(list []Found) map[string]Found {
	out := map[string]Found{}
	for _, f := range list {
		key := f.Workload + " " + f.Kind
		if old, ok := out[key]; ok {
			if f.Time.Before(old.Time) {
				f.Finding = old.Finding
			}
			if old.First.Before(f.First) {
				f.First = old.First
			}
			f.Count += old.Count
		}
		out[key] = f
	}
	return out
}

// look writes what is new, as much as may be written at once.
func (e *Events) look(ctx context.Context, list map[string]Found, pod func(string) (string, string, bool), now time.Time) (tried bool, failed error) {
	for key, t := range e.told {
		if _, ok := list[key]; !ok && now.Sub(t.last) > eventsKept {
			delete(e.told, key)
		}
	}
	writes := 0
	for key, f := range list {
		t := e.told[key]
		if !f.Time.After(t.last) || now.Before(t.next) || now.Sub(f.Time) > eventsKept {
			continue
		}
		namespace, name, ok := pod(f.Workload)
		if !ok {
			continue
		}
		if writes++; writes > eventsEach {
			break
		}
		if err := e.write(ctx, namespace, name, &f); err != nil {
			failed = err
			e.told[key] = told{t.last, now.Add(eventRetry)}
			continue
		}
		e.told[key] = told{f.Time, now.Add(eventEvery)}
	}
	return writes > 0, failed
}

// write makes an event, or counts on the one that there is.
func (e *Events) write(ctx context.Context, namespace, name string, f *Found) error {
	event := eventOf(namespace, name, f)
	err := e.client.Post().Namespace(namespace).Resource("events").Body(event).Do(ctx).Error()
	if apierrors.IsAlreadyExists(err) {
		var patch []byte
		patch, err = json.Marshal(map[string]any{"count": event.Count, "lastTimestamp": event.LastTimestamp, "message": event.Message})
		if err == nil {
			err = e.client.Patch(types.MergePatchType).Namespace(namespace).Resource("events").Name(event.Name).Body(patch).Do(ctx).Error()
		}
	}
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		return &assay.Error{Kind: assay.Unavailable, Op: "write event " + namespace + "/" + event.Name, Err: err}
	}
	return nil // what it is about is going
}

// eventOf is the same one, by its name, for the same pod and kind, whoever writes it.
func eventOf(namespace, name string, f *Found) *corev1.Event {
	sum := sha256.Sum256([]byte(f.Workload + " " + f.Kind))
	message := f.Detail
	if f.Remedy != "" {
		message += " (" + f.Remedy + ")"
	}
	return &corev1.Event{
		TypeMeta:       metav1.TypeMeta{APIVersion: "v1", Kind: "Event"},
		ObjectMeta:     metav1.ObjectMeta{Namespace: namespace, Name: fmt.Sprintf("%.200s.%x", name, sum[:8])},
		InvolvedObject: corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: namespace, Name: name, UID: types.UID(f.Workload)},
		Reason:         reason(f.Kind), Message: cut(message, eventLength), Type: corev1.EventTypeWarning, Count: int32(f.Count),
		FirstTimestamp: metav1.NewTime(f.First), LastTimestamp: metav1.NewTime(f.Time),
		Source: corev1.EventSource{Component: "assay"},
	}
}

// reason is a kind as Kubernetes writes reasons: PodNotMeshed.
func reason(kind string) string {
	words := strings.Split(kind, "-")
	for i, w := range words {
		if w != "" {
			words[i] = strings.ToUpper(w[:1]) + w[1:]
		}
	}
	return strings.Join(slices.DeleteFunc(words, func(w string) bool { return w == "" }), "")
}
