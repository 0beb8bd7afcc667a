package install

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"assay.dev"
	knode "assay.dev/kube/node"
)

// step is one that all agents take before any takes the next.
type step struct{ name, taken string }

// steps: whoever has heard of one goes on to talk with whoever has not.
var steps = []step{
	{knode.LeavingServe, "every proxy serves plaintext, too"},
	{knode.LeavingDial, "every proxy dials plaintext"},
	{knode.LeavingRelease, "every pod is released"},
}

// leave has the agents take every pod out of the mesh. It needs no control. Nodes that
// have no agent to ask are named: their pods are released later, on their own.
func (i *Installer) leave(ctx context.Context, agents *appsv1.DaemonSet, r Removal) (left []string, err error) {
	if _, parks := agents.Spec.Template.Spec.NodeSelector[parked]; parks {
		return nil, nil // an attempt before this one came further
	}
	port := metricsPort(agents)
	if port == 0 {
		left = append(left, "requests between pods of different nodes, perhaps, a few that failed: without metrics nobody can ask the agents how far they are")
		i.say("agents have no metrics: nodes are released one by one, and requests between them may fail meanwhile")
		return left, nil
	}
	for _, s := range steps {
		if err := i.setLeaving(ctx, r.Namespace, s.name); err != nil {
			return left, err
		}
		err := i.awaitStep(ctx, r, s, port)
		if err == nil {
			i.say("%s", s.taken)
			continue
		}
		if !r.Force {
			return left, err
		}
		return append(left, "requests to pods of nodes that did not follow, perhaps, a few that failed: "+err.Error()), nil
	}
	return left, nil
}

// setLeaving labels Assay's own namespace, which every agent watches.
func (i *Installer) setLeaving(ctx context.Context, namespace, step string) error {
	value := any(step)
	if step == "" {
		value = nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": map[string]any{knode.LeavingLabel: value}}})
	if err == nil {
		_, err = i.in("Namespace", "").Patch(ctx, namespace, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: manager})
	}
	if err != nil {
		return i.explain("tell the agents that the mesh leaves", err)
	}
	return nil
}

// awaitStep waits until the agent of every node that is ready has taken a step.
func (i *Installer) awaitStep(ctx context.Context, r Removal, s step, port int32) error {
	if end, ok := ctx.Deadline(); ok && r.Force { // half of the time is for what comes after it
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, time.Until(end)/2, errors.New("not within half of the time"))
		defer cancel()
	}
	err := i.await(ctx, "take the pods out of the mesh: "+s.name, func() (string, error) {
		nodes, err := list[corev1.Node](ctx, i, "Node", "", "")
		if err != nil {
			return "", err
		}
		ready := map[string]bool{}
		for n := range nodes {
			ready[nodes[n].Name] = nodeReady(&nodes[n])
		}
		pods, err := list[corev1.Pod](ctx, i, "Pod", r.Namespace, selectorText("agent"))
		if err != nil {
			return "", err
		}
		var waits []string
		for _, p := range pods {
			if !ready[p.Spec.NodeName] || p.DeletionTimestamp != nil {
				continue
			}
			text, err := i.metricsOf(ctx, r.Namespace, p.Name, port)
			if why := lingers(text, err, s.name); why != "" {
				waits = append(waits, p.Spec.NodeName+": "+why)
			}
		}
		if len(waits) > maxTroubles {
			waits = append(waits[:maxTroubles], fmt.Sprintf("and %d more", len(waits)-maxTroubles))
		}
		return strings.Join(waits, "; "), nil
	})
	if e, ok := errors.AsType[*assay.Error](err); ok {
		e.Remedy = "run it again: it goes on where it was; --force releases nodes without their agents, and requests between them may fail meanwhile; " +
			"to keep the mesh, take the label " + knode.LeavingLabel + " off namespace " + r.Namespace
	}
	return err
}

// lingers says what an agent, by its metrics, still has to do for a step; "" for nothing.
func lingers(metrics string, err error, step string) string {
	if err != nil {
		return "its agent does not answer: " + err.Error()
	}
	for line := range strings.Lines(metrics) {
		count, found := strings.CutPrefix(line, `assay_leaving_pods{stage="`+step+`"} `)
		if !found {
			continue
		}
		if n, err := strconv.ParseFloat(strings.TrimSpace(count), 64); err == nil && n == 0 {
			return ""
		}
		return "pods that are not there yet: " + strings.TrimSpace(count)
	}
	return "its agent has not heard of it"
}

// metricsPort is where agents have metrics; 0 for nowhere.
func metricsPort(agents *appsv1.DaemonSet) int32 {
	for _, c := range agents.Spec.Template.Spec.Containers {
		for _, p := range c.Ports {
			if p.Name == "metrics" {
				return p.ContainerPort
			}
		}
	}
	return 0
}

// metricsOf asks an agent through the API server.
func (i *Installer) metricsOf(ctx context.Context, namespace, pod string, port int32) (string, error) {
	text, err := i.server.Get().AbsPath(fmt.Sprintf("/api/v1/namespaces/%s/pods/%s:%d/proxy/metrics", namespace, pod, port)).DoRaw(ctx)
	return string(text), err
}
