package install

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// awaitControl waits until every replica of control is what was applied last.
func (i *Installer) awaitControl(ctx context.Context, namespace string) error {
	return i.await(ctx, "wait for control", func() (string, error) {
		d, err := get[appsv1.Deployment](ctx, i, "Deployment", namespace, ControlName)
		if err != nil {
			return "", err
		}
		want := int32(1)
		if d.Spec.Replicas != nil {
			want = *d.Spec.Replicas
		}
		s := d.Status
		if s.ObservedGeneration >= d.Generation && s.UpdatedReplicas == want && s.Replicas == want && s.AvailableReplicas == want {
			return "", nil
		}
		return i.progress(ctx, namespace, "control", s.AvailableReplicas, want)
	})
}

// awaitAgents waits for the agent of every node.
func (i *Installer) awaitAgents(ctx context.Context, namespace string) error {
	return i.await(ctx, "wait for the agents", func() (string, error) {
		d, err := get[appsv1.DaemonSet](ctx, i, "DaemonSet", namespace, AgentName)
		if err != nil {
			return "", err
		}
		ready, why := agentsReady(d)
		if ready || why != "" {
			return why, nil
		}
		s := d.Status
		return i.progress(ctx, namespace, "agent", min(s.NumberAvailable, s.UpdatedNumberScheduled), s.DesiredNumberScheduled)
	})
}

// agentsReady reports whether every node that takes an agent has the one that was applied
// last, and says if there is no such node.
func agentsReady(d *appsv1.DaemonSet) (ready bool, why string) {
	s := d.Status
	switch {
	case s.ObservedGeneration < d.Generation:
		return false, ""
	case s.DesiredNumberScheduled == 0:
		return false, "no node takes an agent: none is there yet, or all run Windows or are virtual; where no agent can be, install with --injector --no-agent"
	}
	return s.UpdatedNumberScheduled == s.DesiredNumberScheduled && s.NumberAvailable == s.DesiredNumberScheduled, ""
}

// progress says how many are ready, and what keeps the others.
func (i *Installer) progress(ctx context.Context, namespace, component string, ready, want int32) (string, error) {
	pods, err := list[corev1.Pod](ctx, i, "Pod", namespace, selectorText(component))
	if err != nil {
		return "", err
	}
	events, err := list[corev1.Event](ctx, i, "Event", namespace, "")
	if err != nil {
		return "", err
	}
	text := fmt.Sprintf("%d of %d ready", ready, want)
	if troubles := Troubles(component, pods, events); len(troubles) > 0 {
		text += "; " + strings.Join(troubles, "; ")
	}
	return text, nil
}

func selectorText(component string) string {
	return metav1.FormatLabelSelector(&metav1.LabelSelector{MatchLabels: selector(component)})
}

// maxTroubles keeps a line readable on a large cluster.
const maxTroubles = 3

// Troubles say why pods of a component are not ready: what their containers wait for or
// ended with, why they are not scheduled, or what the last event about them, or about who
// should make them, was.
func Troubles(component string, pods []corev1.Pod, events []corev1.Event) []string {
	var list []string
	for i := range pods {
		if why := trouble(&pods[i], events); why != "" {
			where := pods[i].Name
			if node := pods[i].Spec.NodeName; node != "" && component != "control" {
				where = node
			}
			list = append(list, where+": "+why)
		}
	}
	if len(pods) == 0 {
		if e := last(events, func(e *corev1.Event) bool {
			name := e.InvolvedObject.Name
			return e.InvolvedObject.Kind != "Pod" && (name == "assay-"+component || strings.HasPrefix(name, "assay-"+component+"-"))
		}); e != nil {
			list = append(list, e.Reason+": "+e.Message)
		}
	}
	slices.Sort(list)
	if n := len(list); n > maxTroubles {
		list = append(list[:maxTroubles], fmt.Sprintf("and %d more", n-maxTroubles))
	}
	return list
}

func trouble(p *corev1.Pod, events []corev1.Event) string {
	for _, c := range p.Status.Conditions {
		switch {
		case c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue && p.DeletionTimestamp == nil:
			return ""
		case c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse:
			return "no node takes it: " + c.Message
		}
	}
	if p.DeletionTimestamp != nil {
		return "is ending"
	}
	for _, c := range p.Status.ContainerStatuses {
		if end := cmp.Or(c.State.Terminated, c.LastTerminationState.Terminated); end != nil && end.ExitCode != 0 {
			return "ended with exit code " + strconv.Itoa(int(end.ExitCode)) + said(end.Message)
		}
		if w := c.State.Waiting; w != nil && w.Reason != "ContainerCreating" && w.Reason != "PodInitializing" {
			return w.Reason + said(w.Message)
		}
	}
	if e := last(events, func(e *corev1.Event) bool { return e.InvolvedObject.UID == p.UID }); e != nil {
		return e.Reason + said(e.Message)
	}
	return ""
}

// said is the last line of what a container or an event said, in one line.
func said(message string) string {
	lines := strings.Split(strings.TrimSpace(message), "\n")
	if text := strings.TrimSpace(lines[len(lines)-1]); text != "" {
		return ": " + text
	}
	return ""
}

// last is the newest warning that belongs to something.
func last(events []corev1.Event, belongs func(*corev1.Event) bool) (newest *corev1.Event) {
	at := func(e *corev1.Event) int64 {
		return max(e.LastTimestamp.UnixMicro(), e.EventTime.UnixMicro(), e.CreationTimestamp.UnixMicro())
	}
	for i := range events {
		if e := &events[i]; e.Type == corev1.EventTypeWarning && belongs(e) && (newest == nil || at(e) > at(newest)) {
			newest = e
		}
	}
	return newest
}

// verify asks every agent, through the API server, whether control has taken its node in.
func (i *Installer) verify(ctx context.Context, o *Options) error {
	if o.Injector {
		if err := i.verifyInjector(ctx); err != nil {
			return err
		}
	}
	if o.NoAgent {
		return nil
	}
	if !o.metrics() {
		i.say("control and agents are ready; that every node has joined is not verified, since there are no metrics")
		return nil
	}
	joined := 0
	err := i.await(ctx, "verify that every node has joined", func() (string, error) {
		pods, err := list[corev1.Pod](ctx, i, "Pod", o.Namespace, selectorText("agent"))
		if err != nil {
			return "", err
		}
		var missing []string
		for _, p := range pods {
			text, err := i.metricsOf(ctx, o.Namespace, p.Name, o.MetricsPort)
			switch {
			case err != nil:
				missing = append(missing, p.Spec.NodeName+": its agent does not answer: "+err.Error())
			case !strings.Contains(text, "\nassay_control_connected 1\n"):
				missing = append(missing, p.Spec.NodeName+" has not joined")
			}
		}
		joined = len(pods)
		if len(missing) > maxTroubles {
			missing = append(missing[:maxTroubles], fmt.Sprintf("and %d more", len(missing)-maxTroubles))
		}
		return strings.Join(missing, "; "), nil
	})
	if err == nil {
		i.say("control answers, and %d of %d nodes have joined", joined, joined)
	}
	return err
}
