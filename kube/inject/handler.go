package inject

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"time"

	admissionv1 "k8s.io/api/admission/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"assay.dev"
)

// Path is where the webhook is asked.
const Path = "/inject"

// patience is how long a question waits for others to be answered; the API server waits for 5 s.
const patience = 2 * time.Second

// Handler answers the API server's questions about pods that are made. Anybody may ask: what it
// answers is in every injected pod, and no secret. So what is held of questions and answers is
// bounded, for each source and in all; who finds no room gets 503. Serve it on a [Bounded] listener.
func (j *Injector) Handler(log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("POST "+Path, newWebhook(j, log))
	return mux
}

type webhook struct {
	injector *Injector
	log      *slog.Logger
	bodies   *shares // bytes
	answers  chan struct{}
	patience time.Duration
}

func newWebhook(j *Injector, log *slog.Logger) *webhook {
	return &webhook{injector: j, log: log, bodies: newShares(maxBodies, maxBodiesFrom), answers: make(chan struct{}, maxAnswers), patience: patience}
}

func (h *webhook) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	size, source := r.ContentLength, sourceOf(r.RemoteAddr)
	if size > maxReview {
		http.Error(w, "a question has 3 MiB at most", http.StatusRequestEntityTooLarge)
		return
	}
	if size < 0 {
		size = maxReview
	}
	if !h.bodies.take(source, size) {
		busy(w)
		return
	}
	defer h.bodies.give(source, size)
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxReview))
	if err != nil {
		http.Error(w, err.Error(), http.StatusRequestEntityTooLarge)
		return
	}
	if !h.enter(r.Context()) {
		busy(w)
		return
	}
	defer func() { <-h.answers }()
	answer, err := h.injector.answer(body, h.log)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(answer) // whoever has gone asks again
}

// enter waits for its turn.
func (h *webhook) enter(ctx context.Context) bool {
	bounded, cancel := context.WithTimeout(ctx, h.patience)
	defer cancel()
	select {
	case h.answers <- struct{}{}:
		return true
	default:
	}
	select {
	case h.answers <- struct{}{}:
		return true
	case <-bounded.Done():
		return false
	}
}

func busy(w http.ResponseWriter) {
	w.Header().Set("Retry-After", "1")
	http.Error(w, "too many are asking", http.StatusServiceUnavailable)
}

// answer answers an AdmissionReview with one. The error is of a question that is none.
func (j *Injector) answer(body []byte, log *slog.Logger) ([]byte, error) {
	if err := measure(body); err != nil {
		return nil, err
	}
	var review admissionv1.AdmissionReview
	if err := json.Unmarshal(body, &review); err != nil {
		return nil, fmt.Errorf("read an AdmissionReview: %w", err)
	}
	q := review.Request
	switch {
	case review.APIVersion != admissionv1.SchemeGroupVersion.String() || review.Kind != "AdmissionReview" || q == nil:
		return nil, fmt.Errorf("it is no AdmissionReview of %s", admissionv1.SchemeGroupVersion)
	case q.Resource != metav1.GroupVersionResource{Version: "v1", Resource: "pods"} || q.SubResource != "" || q.Operation != admissionv1.Create:
		return nil, fmt.Errorf("nobody is asked about %s of %s", q.Operation, q.Resource.Resource)
	}
	var pod corev1.Pod
	if err := json.Unmarshal(q.Object.Raw, &pod); err != nil {
		return nil, fmt.Errorf("read a pod: %w", err)
	}
	a := j.review(&pod, q.Namespace)
	a.UID = q.UID
	if !a.Allowed { // the API server says so to who makes the pod; strangers fill no log
		log.Debug("a pod is refused", "namespace", cut(q.Namespace), "pod", title(&pod), "cause", a.Result.Message)
	}
	return json.Marshal(&admissionv1.AdmissionReview{TypeMeta: review.TypeMeta, Response: a})
}

// review decides about a pod.
func (j *Injector) review(pod *corev1.Pod, namespace string) *admissionv1.AdmissionResponse {
	patch, warning, err := j.Patch(pod, namespace)
	if err != nil {
		code := int32(http.StatusConflict)
		if assay.KindOf(err) == assay.Unavailable {
			code = http.StatusServiceUnavailable
		}
		return refusal(err, code)
	}
	a := &admissionv1.AdmissionResponse{Allowed: true}
	if warning != "" {
		a.Warnings = []string{"assay: " + warning}
	}
	if len(patch) == 0 {
		return a
	}
	kind := admissionv1.PatchTypeJSONPatch
	a.PatchType = &kind
	if a.Patch, err = json.Marshal(patch); err != nil {
		return refusal(err, http.StatusInternalServerError)
	}
	return a
}

func refusal(err error, code int32) *admissionv1.AdmissionResponse {
	return &admissionv1.AdmissionResponse{Result: &metav1.Status{Status: metav1.StatusFailure, Message: err.Error(), Code: code}}
}
