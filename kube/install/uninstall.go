package install

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"assay.dev"
	"assay.dev/kube"
)

// parked is a node label that no node has. An agents' DaemonSet that wants it has no pods,
// and is still there to tell how an agent is started.
const parked = "assay.dev/uninstalled"

// Removal says what Uninstall may do beside what it must.
type Removal struct {
	Namespace string // DefaultNamespace
	Purge     bool   // the authority, and the definitions of our kinds with all objects of theirs
	Force     bool   // go on when a node could not be cleaned
	// NodesOnly ends agents and cleans the nodes, and leaves the objects to whoever made them.
	NodesOnly bool
	// Drain is how long a released pod's proxy waits for the connections through it (30 s).
	Drain time.Duration
}

// Uninstall takes the mesh out, while pods go on talking: no pod gets a sidecar any more, and
// while there are some nothing else is done, unless forced; the agents take every pod out of
// it, all nodes step by step together (leave.go); they end; on every node what they made is
// undone; then control and the rest go. A node that fails is an error, and control is left in place, unless forced. One that
// is not ready is passed over. What is left is told.
func (i *Installer) Uninstall(ctx context.Context, r Removal) error {
	if r.Namespace == "" {
		r.Namespace = DefaultNamespace
	}
	if !r.NodesOnly {
		if err := i.refuseHelm(ctx, r.Namespace, "run it with --nodes-only, and then helm uninstall"); err != nil {
			return err
		}
	}
	var left []string
	if !r.NodesOnly {
		with, err := i.stopInjecting(ctx, r)
		if err != nil {
			return err
		}
		left = with
	}
	nodes, err := i.releaseNodes(ctx, r)
	if err != nil {
		return err
	}
	left = append(left, nodes...)
	kept := []string{"every object; the agents' DaemonSet wants the label " + parked + ", which no node has"}
	if !r.NodesOnly {
		if kept, err = i.removeObjects(ctx, r); err != nil {
			return err
		}
	}
	for _, line := range append(left, kept...) {
		i.say("left: %s", line)
	}
	return nil
}

// releaseNodes ends the agents and undoes what they made on their nodes.
func (i *Installer) releaseNodes(ctx context.Context, r Removal) (left []string, err error) {
	agents, err := get[appsv1.DaemonSet](ctx, i, "DaemonSet", r.Namespace, AgentName)
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, i.explain("look for the agents", err)
	}
	aside, err := i.leave(ctx, agents, r)
	if err != nil {
		return nil, err
	}
	left = append(left, aside...)
	if err := i.park(ctx, r.Namespace); err != nil {
		return left, err
	}
	nodes, err := list[corev1.Node](ctx, i, "Node", "", corev1.LabelOSStable+"=linux")
	if err != nil {
		return nil, i.explain("list the nodes", err)
	}
	var pods []string
	for n := range nodes {
		if kube.Agentless(nodes[n].Labels) {
			continue
		}
		if !nodeReady(&nodes[n]) {
			left = append(left, fmt.Sprintf("node %s, which is not ready: its pods stay meshed and lose their identity within a day; restart it when it is back", nodes[n].Name))
			continue
		}
		pod := releasePod(agents, nodes[n].Name, cmp.Or(r.Drain, 30*time.Second))
		if err := i.start(ctx, pod); err != nil {
			return left, err
		}
		pods = append(pods, pod.Name)
	}
	failed := i.awaitReleased(ctx, r, pods)
	if failed != nil && !r.Force {
		return left, failed
	}
	if failed != nil {
		left = append(left, "nodes that could not be cleaned, with pods that lose their identity within a day: "+failed.Error())
	}
	for _, name := range pods {
		if err := i.remove(ctx, "Pod", r.Namespace, name); err != nil {
			return left, err
		}
	}
	return left, i.setLeaving(ctx, r.Namespace, "")
}

// park ends all agents and keeps their DaemonSet.
func (i *Installer) park(ctx context.Context, namespace string) error {
	const op = "end the agents"
	patch := []byte(`{"spec":{"template":{"spec":{"nodeSelector":{"` + parked + `":"true"}}}}}`)
	if _, err := i.in("DaemonSet", namespace).Patch(ctx, AgentName, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: manager}); err != nil {
		return i.explain(op, err)
	}
	err := i.await(ctx, op, func() (string, error) {
		pods, err := list[corev1.Pod](ctx, i, "Pod", namespace, selectorText("agent"))
		if err != nil {
			return "", err
		}
		var names []string
		for _, p := range pods {
			// Of a node that is away nobody can say that it ended.
			if n, err := get[corev1.Node](ctx, i, "Node", "", p.Spec.NodeName); err == nil && nodeReady(n) {
				names = append(names, p.Spec.NodeName)
			}
		}
		if len(names) == 0 {
			return "", nil
		}
		slices.Sort(names)
		return "still on " + strings.Join(names[:min(len(names), maxTroubles)], ", "), nil
	})
	if err == nil {
		i.say("the agents have ended; proxies go on")
	}
	return err
}

func nodeReady(n *corev1.Node) bool {
	return slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
}

// releasePod is an agent that undoes and ends. It needs neither control nor the API server.
func releasePod(agents *appsv1.DaemonSet, node string, drain time.Duration) *corev1.Pod {
	spec := *agents.Spec.Template.Spec.DeepCopy()
	spec.NodeName = node
	spec.NodeSelector, spec.Affinity = nil, nil
	spec.RestartPolicy = corev1.RestartPolicyOnFailure
	c := &spec.Containers[0]
	c.Args = append(c.Args, "--release", "--proxy-drain="+drain.String())
	c.ReadinessProbe, c.LivenessProbe, c.StartupProbe = nil, nil, nil
	c.Ports = nil
	return &corev1.Pod{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{
			Name: fmt.Sprintf("assay-release-%x", sha256.Sum256([]byte(node)))[:30], Namespace: agents.Namespace, Labels: labels("release", nil),
		},
		Spec: spec,
	}
}

// start makes a pod anew.
func (i *Installer) start(ctx context.Context, p *corev1.Pod) error {
	if err := i.remove(ctx, "Pod", p.Namespace, p.Name); err != nil { // of an attempt before
		return err
	}
	u, err := Unstructured(p)
	if err != nil {
		return err
	}
	if _, err := i.of(u).Create(ctx, u, metav1.CreateOptions{FieldManager: manager}); err != nil {
		return i.explain("clean node "+p.Spec.NodeName, err)
	}
	return nil
}

// awaitReleased waits for the pods of that name to end well. Who forces wants the rest of
// the time for what comes after it.
func (i *Installer) awaitReleased(ctx context.Context, r Removal, names []string) error {
	if end, ok := ctx.Deadline(); ok && r.Force {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, time.Until(end)/2, errors.New("not within half of the time"))
		defer cancel()
	}
	err := i.await(ctx, "release the pods of every node", func() (string, error) {
		pods, err := list[corev1.Pod](ctx, i, "Pod", r.Namespace, selectorText("release"))
		if err != nil {
			return "", err
		}
		events, err := list[corev1.Event](ctx, i, "Event", r.Namespace, "")
		if err != nil {
			return "", err
		}
		done := 0
		pods = slices.DeleteFunc(pods, func(p corev1.Pod) bool {
			if p.Status.Phase == corev1.PodSucceeded {
				done++
				return true
			}
			return false
		})
		if done == len(names) {
			return "", nil
		}
		return strings.Join(append([]string{fmt.Sprintf("%d of %d nodes", done, len(names))}, Troubles("release", pods, events)...), "; "), nil
	})
	if err == nil {
		i.say("%d nodes are clean: their pods talk as they did before", len(names))
		return nil
	}
	if e, ok := errors.AsType[*assay.Error](err); ok {
		e.Remedy = "control and the proxies are still there: remove what stops it and run it again, or --force"
	}
	return err
}

// removeObjects deletes what was installed, last things first.
func (i *Installer) removeObjects(ctx context.Context, r Removal) (kept []string, err error) {
	all, err := everything(r.Namespace)
	if err != nil {
		return nil, err
	}
	slices.Reverse(all)
	var definitions []string
	for _, o := range all {
		kind, name := o.GetObjectKind().GroupVersionKind().Kind, o.GetName()
		switch kind {
		case "Namespace":
			continue // last, and perhaps not
		case "CustomResourceDefinition":
			if !r.Purge {
				definitions = append(definitions, name)
				continue
			}
		case "PersistentVolumeClaim", "Secret":
			if _, err := i.in(kind, r.Namespace).Get(ctx, name, metav1.GetOptions{}); err == nil && !r.Purge {
				what := "the authority"
				if kind == "Secret" {
					what = "the key of the authority in the store"
				}
				kept = append(kept, fmt.Sprintf("%s/%s in %s, with %s: another installation in it is the same mesh", strings.ToLower(kind), name, r.Namespace, what))
				continue
			}
		}
		if err := i.remove(ctx, kind, o.GetNamespace(), name); err != nil {
			return kept, err
		}
	}
	if len(definitions) > 0 {
		kept = append(kept, "definitions "+strings.Join(definitions, ", ")+", with what is declared")
	}
	line, err := i.removeNamespace(ctx, r.Namespace)
	if line != "" {
		kept = append(kept, line)
	}
	if err != nil {
		return kept, err
	}
	labelled, err := i.labelled(ctx)
	if len(labelled) > 0 {
		kept = append(kept, "label "+MeshLabel+" on "+strings.Join(labelled, ", ")+": it has no effect now")
	}
	return kept, err
}

// removeNamespace deletes the namespace unless there is anything in it that is not ours.
func (i *Installer) removeNamespace(ctx context.Context, name string) (kept string, err error) {
	if _, err := i.in("Namespace", "").Get(ctx, name, metav1.GetOptions{}); apierrors.IsNotFound(err) {
		return "", nil
	} else if err != nil {
		return "", i.explain("look at namespace "+name, err)
	}
	for _, kind := range []string{"PersistentVolumeClaim", "Deployment", "DaemonSet", "Pod", "Service", "Secret", "ConfigMap"} {
		found, err := list[unstructuredObject](ctx, i, kind, name, "")
		if err != nil {
			return "", i.explain("look at what is in namespace "+name, err)
		}
		for _, o := range found {
			if o.Metadata.Name != "kube-root-ca.crt" {
				return fmt.Sprintf("namespace/%s, since there is %s/%s in it", name, strings.ToLower(kind), o.Metadata.Name), nil
			}
		}
	}
	return "", i.remove(ctx, "Namespace", "", name)
}

// unstructuredObject is an object of any kind.
type unstructuredObject struct {
	Metadata metav1.ObjectMeta `json:"metadata"`
}

// labelled are the namespaces that ask for the mesh.
func (i *Installer) labelled(ctx context.Context) (names []string, err error) {
	all, err := list[corev1.Namespace](ctx, i, "Namespace", "", MeshLabel)
	if err != nil {
		return nil, i.explain("list the namespaces", err)
	}
	for _, n := range all {
		names = append(names, "namespace/"+n.Name)
	}
	return names, nil
}
