package publish

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	gateway "sigs.k8s.io/gateway-api/apis/v1"

	"assay.dev"
	"assay.dev/discovery"
	"assay.dev/kube"
	"assay.dev/kube/cluster"
)

// Routes keeps the status of routes.
type Routes struct {
	client dynamic.Interface
	log    *slog.Logger
	pace   pace[[]assay.RouteParentStatus] // by the route's key
}

// conflicts is how often one write is tried again at once.
const conflicts = 5

// NewRoutes returns the keeper of routes' status. It does not connect yet.
func NewRoutes(config *rest.Config, log *slog.Logger) (*Routes, error) {
	config = rest.CopyConfig(config)
	config.QPS, config.Burst, config.Timeout = 2*writesEach, 4*writesEach, within
	client, err := dynamic.NewForConfig(config)
	if err != nil {
		return nil, fmt.Errorf("client of the API server %s: %w", config.Host, err)
	}
	return &Routes{client: client, log: log, pace: newPace(sameStatus)}, nil
}

// Run writes what became of routes until ctx ends. want returns what is known of a route by
// its key (assay.Route.Key), in the order of its parents; none is known of a route that is
// nobody's here. have returns what the API server has.
func (r *Routes) Run(ctx context.Context, want func(key string) []assay.RouteParentStatus, have func() []cluster.RouteStatus) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	problem := said{log: r.log, what: "the status of routes"}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		if tried, err := r.look(ctx, want, have(), time.Now()); tried {
			problem.result(ctx, err)
		}
	}
}

// look writes what differs, as much as may be written at once.
func (r *Routes) look(ctx context.Context, want func(string) []assay.RouteParentStatus, have []cluster.RouteStatus, now time.Time) (tried bool, failed error) {
	there := map[string]bool{}
	writes := 0
	for i := range have {
		h := &have[i]
		key := (&assay.Route{Kind: h.Kind, Namespace: h.Namespace, Name: h.Name}).Key()
		there[key] = true
		w := ours(want(key))
		if sameStatus(w, h.Parents) {
			r.pace.stands(key, now)
			continue
		}
		if writes == writesEach || !r.pace.may(key, w, now) {
			continue
		}
		writes++
		if err := r.write(ctx, h, w); err != nil {
			failed = err
		}
		r.pace.wrote(key, w, now)
	}
	r.pace.keep(there)
	return writes > 0, failed
}

// ours are the parents that are services. Of a gateway its own controller speaks.
func ours(list []assay.RouteParentStatus) []assay.RouteParentStatus {
	var out []assay.RouteParentStatus
	for _, p := range list {
		if p.ParentRef.Kind == "Service" && (p.ParentRef.Group == "" || p.ParentRef.Group == "core") {
			out = append(out, p)
		}
	}
	return out
}

// sameStatus compares but for times: since when a condition holds follows from what it was.
func sameStatus(a, b []assay.RouteParentStatus) bool {
	return slices.EqualFunc(a, b, func(x, y assay.RouteParentStatus) bool {
		return x.ParentRef == y.ParentRef && x.ControllerName == y.ControllerName && slices.EqualFunc(x.Conditions, y.Conditions, func(c, d assay.RouteCondition) bool {
			c.LastTransitionTime = d.LastTransitionTime
			return c == d
		})
	})
}

// write changes a route's status to what is wanted.
func (r *Routes) write(ctx context.Context, h *cluster.RouteStatus, want []assay.RouteParentStatus) error {
	op := fmt.Sprintf("write the status of %s %s/%s", h.Kind, h.Namespace, h.Name)
	client := r.client.Resource(schema.GroupVersionResource{Group: gateway.GroupName, Version: "v1", Resource: strings.ToLower(string(h.Kind)) + "s"}).Namespace(h.Namespace)
	for n := 0; ; n++ {
		route, err := client.Get(ctx, h.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		var changed bool
		if err == nil {
			changed, err = merge(route, want)
		}
		if err == nil && changed {
			_, err = client.UpdateStatus(ctx, route, metav1.UpdateOptions{})
		}
		if apierrors.IsConflict(err) && n < conflicts {
			continue
		}
		if err != nil && !apierrors.IsNotFound(err) {
			return &assay.Error{Kind: assay.Unavailable, Op: op, Err: err}
		}
		return nil
	}
}

// merge puts what is wanted into a route's status, in place of what was ours there, and
// reports whether that makes a difference. Parents are named as the route names them; what
// the route names no more, or not yet, is left out.
func merge(route *unstructured.Unstructured, want []assay.RouteParentStatus) (changed bool, err error) {
	var is struct {
		Spec   gateway.CommonRouteSpec
		Status gateway.RouteStatus
	}
	raw, err := json.Marshal(map[string]any{"spec": route.Object["spec"], "status": route.Object["status"]})
	if err == nil {
		err = json.Unmarshal(raw, &is)
	}
	if err != nil {
		return false, err
	}
	named := map[assay.RouteParentRef]gateway.ParentReference{}
	for i := range is.Spec.ParentRefs {
		p := &is.Spec.ParentRefs[i]
		named[kube.ParentRef(route.GetNamespace(), p)] = *p
	}
	was := map[assay.RouteParentRef][]metav1.Condition{}
	var parents []gateway.RouteParentStatus
	for _, p := range is.Status.Parents {
		if p.ControllerName == discovery.Controller {
			was[kube.ParentRef(route.GetNamespace(), &p.ParentRef)] = p.Conditions
		} else {
			parents = append(parents, p)
		}
	}
	for _, w := range want {
		ref, ok := named[w.ParentRef]
		if !ok {
			continue
		}
		parents = append(parents, gateway.RouteParentStatus{ParentRef: ref, ControllerName: discovery.Controller, Conditions: conditions(w.Conditions, was[w.ParentRef])})
	}
	if parents == nil {
		parents = []gateway.RouteParentStatus{} // null is not a list
	}
	before, err := json.Marshal(is.Status.Parents)
	if err != nil {
		return false, err
	}
	after, err := json.Marshal(parents)
	if err != nil || string(before) == string(after) {
		return false, err
	}
	var plain []any
	if err := json.Unmarshal(after, &plain); err != nil {
		return false, err
	}
	// The rest of the status, if there is any, is not ours.
	return true, unstructured.SetNestedSlice(route.Object, plain, "status", "parents")
}

// conditions writes conditions; one that has its status as before has had it since then.
func conditions(want []assay.RouteCondition, was []metav1.Condition) []metav1.Condition {
	var out []metav1.Condition
	for _, c := range want {
		n := metav1.Condition{
			Type: c.Type, Status: metav1.ConditionStatus(c.Status), ObservedGeneration: c.ObservedGeneration,
			LastTransitionTime: metav1.NewTime(c.LastTransitionTime), Reason: c.Reason, Message: c.Message,
		}
		for _, old := range was {
			if old.Type == n.Type && old.Status == n.Status {
				n.LastTransitionTime = old.LastTransitionTime
			}
		}
		out = append(out, n)
	}
	return out
}
