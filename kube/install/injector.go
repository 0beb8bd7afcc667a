package install

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"assay.dev"
	"assay.dev/kube"
	"assay.dev/kube/inject"
)

// injector has the API server ask control about pods that are to have a sidecar, by their own
// label or their namespace's. It fails closed: such a pod would start outside of the mesh, and
// nobody would see it. It is never asked about what control needs to start. Control
// writes the roots into it by which it is known, and therefore they are not here.
func injector(o *Options) *admissionregistrationv1.MutatingWebhookConfiguration {
	in := func(values ...string) metav1.LabelSelectorRequirement {
		return metav1.LabelSelectorRequirement{Key: kube.MeshLabel, Operator: metav1.LabelSelectorOpIn, Values: values}
	}
	notIn := func(key string, values ...string) metav1.LabelSelectorRequirement {
		return metav1.LabelSelectorRequirement{Key: key, Operator: metav1.LabelSelectorOpNotIn, Values: values}
	}
	all := func(list ...metav1.LabelSelectorRequirement) *metav1.LabelSelector {
		return &metav1.LabelSelector{MatchExpressions: list}
	}
	others := notIn(corev1.LabelMetadataName, kube.ClusterSystem, o.Namespace)
	return &admissionregistrationv1.MutatingWebhookConfiguration{
		TypeMeta:   metav1.TypeMeta{APIVersion: admissionregistrationv1.SchemeGroupVersion.String(), Kind: "MutatingWebhookConfiguration"},
		ObjectMeta: metav1.ObjectMeta{Name: InjectorName, Labels: labels("control", nil)},
		Webhooks: []admissionregistrationv1.MutatingWebhook{
			webhook(o, "namespace", all(in(kube.Sidecar), others), all(notIn(kube.MeshLabel, kube.Enabled, kube.Disabled))),
			webhook(o, "pod", all(notIn(kube.MeshLabel, kube.Sidecar), others), all(in(kube.Sidecar))),
		},
	}
}

// injectorSuffix ends the names of the webhooks.
const injectorSuffix = ".injector.assay.dev"

func webhook(o *Options, name string, namespaces, pods *metav1.LabelSelector) admissionregistrationv1.MutatingWebhook {
	namespaced := admissionregistrationv1.NamespacedScope
	return admissionregistrationv1.MutatingWebhook{
		Name: name + injectorSuffix,
		ClientConfig: admissionregistrationv1.WebhookClientConfig{Service: &admissionregistrationv1.ServiceReference{
			Namespace: o.Namespace, Name: ControlName, Path: new(inject.Path), Port: new(int32(InjectorPort)),
		}},
		Rules: []admissionregistrationv1.RuleWithOperations{{
			Operations: []admissionregistrationv1.OperationType{admissionregistrationv1.Create},
			Rule:       admissionregistrationv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods"}, Scope: &namespaced},
		}},
		NamespaceSelector: namespaces, ObjectSelector: pods,
		AdmissionReviewVersions: []string{"v1"}, MatchPolicy: new(admissionregistrationv1.Equivalent),
		FailurePolicy: new(admissionregistrationv1.Fail), SideEffects: new(admissionregistrationv1.SideEffectClassNone),
		TimeoutSeconds: new(int32(5)), ReinvocationPolicy: new(admissionregistrationv1.IfNeededReinvocationPolicy),
	}
}

// verifyInjector has the API server ask about a pod that nobody makes.
func (i *Installer) verifyInjector(ctx context.Context) error {
	pod := &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Name: "assay-verify", Namespace: metav1.NamespaceDefault, Labels: map[string]string{kube.MeshLabel: kube.Sidecar}},
		Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "none", Image: "none"}}},
	}
	u, err := Unstructured(pod)
	if err != nil {
		return err
	}
	said := "the API server asks control about pods, and gets sidecars for them"
	err = i.await(ctx, "verify that the API server asks about pods", func() (string, error) {
		made, err := i.of(u).Create(ctx, u, metav1.CreateOptions{FieldManager: manager, DryRun: []string{metav1.DryRunAll}})
		if err != nil && !refusedByOthers(err) {
			return "", err
		}
		if err != nil {
			said = "that pods get sidecars is not verified: " + err.Error()
			return "", nil
		}
		var p corev1.Pod
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(made.Object, &p); err != nil {
			return "", err
		}
		if len(p.Spec.InitContainers) == 0 || p.Spec.InitContainers[0].Name != kube.SidecarContainer {
			return "a pod that asks for a sidecar has none yet", nil
		}
		return "", nil
	})
	if err == nil {
		i.say("%s", said)
	}
	return err
}

// refusedByOthers reports whether somebody else does not want a pod there: policies and quotas, and
// webhooks that are not control's. Whatever else is wrong may pass.
func refusedByOthers(err error) bool {
	if strings.Contains(err.Error(), injectorSuffix+`"`) {
		return false
	}
	return apierrors.IsForbidden(err) || apierrors.IsInvalid(err) || apierrors.IsBadRequest(err) || apierrors.IsNotFound(err) || apierrors.IsAlreadyExists(err) ||
		strings.Contains(err.Error(), "denied the request")
}

// stopInjecting ends that the API server asks about pods, before control goes: no pod that asks
// for a sidecar could be made any more. Those that have one need control while they
// run.
func (i *Installer) stopInjecting(ctx context.Context, r Removal) (left []string, err error) {
	if err := i.remove(ctx, "MutatingWebhookConfiguration", "", InjectorName); err != nil {
		return nil, err
	}
	which, others, err := i.sidecars(ctx)
	if err != nil {
		return nil, err
	}
	if others != "" {
		left = append(left, others+loseIdentity)
	}
	if which == "" {
		return left, nil
	}
	if r.Force {
		return append(left, which+loseIdentity), nil
	}
	return nil, &assay.Error{Kind: assay.Conflict, Op: "uninstall", Err: fmt.Errorf("there are %s", which),
		Remedy: "no pod gets one any more: restart them (kubectl rollout restart), and run it again; --force leaves them as they are, without an identity within a day"}
}

// refuseSidecars keeps the injector of an installation while there are pods that need it.
func (i *Installer) refuseSidecars(ctx context.Context, o *Options) error {
	if o.Injector {
		return nil
	}
	_, err := i.in("MutatingWebhookConfiguration", "").Get(ctx, InjectorName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return i.explain("look for an injector", err)
	}
	which, others, err := i.sidecars(ctx)
	if err != nil {
		return err
	}
	if others != "" {
		i.say("%s", others+loseIdentity)
	}
	if which == "" {
		return nil
	}
	return &assay.Error{Kind: assay.Conflict, Op: "install without an injector", Err: fmt.Errorf("there are %s", which), Remedy: "take the label off, restart them, and run it again when they have ended; or keep --injector"}
}

const loseIdentity = "; they lose their identity within a day: restart them"

// sidecars says how many pods have one, and where: those that ask for it, and others, which have lost
// the label or were made to look like that; "" for none.
func (i *Installer) sidecars(ctx context.Context) (asking, others string, err error) {
	pods, err := list[corev1.Pod](ctx, i, "Pod", "", "")
	if err != nil {
		return "", "", i.explain("look for pods with a sidecar", err)
	}
	namespaces, err := list[corev1.Namespace](ctx, i, "Namespace", "", kube.MeshLabel)
	if err != nil {
		return "", "", i.explain("look for pods with a sidecar", err)
	}
	ask, rest := countSidecars(pods, namespaces)
	if asking = where(ask); asking != "" {
		asking = "pods with a sidecar: " + asking
	}
	if others = where(rest); others != "" {
		others = "pods with a sidecar that do not ask for one: " + others
	}
	return asking, others, nil
}

// countSidecars counts pods that have a sidecar by their namespaces. Anybody who makes pods can
// give them what looks like one; only where it is asked for is it what was injected.
func countSidecars(pods []corev1.Pod, namespaces []corev1.Namespace) (asking, others map[string]int) {
	labels := map[string]map[string]string{}
	for n := range namespaces {
		labels[namespaces[n].Name] = namespaces[n].Labels
	}
	asking, others = map[string]int{}, map[string]int{}
	for i := range pods {
		p := &pods[i]
		_, injected := p.Annotations[kube.InjectedAnnotation]
		if !injected || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed ||
			!slices.ContainsFunc(p.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == kube.SidecarContainer }) {
			continue
		}
		if kube.Asks(p.Namespace, p.Labels, labels[p.Namespace]) {
			asking[p.Namespace]++
		} else {
			others[p.Namespace]++
		}
	}
	return asking, others
}

// where says how many there are in which namespaces.
func where(count map[string]int) string {
	var list []string
	for _, namespace := range slices.Sorted(maps.Keys(count)) {
		list = append(list, fmt.Sprintf("%d in %s", count[namespace], namespace))
	}
	text := strings.Join(list[:min(len(list), maxNamespaces)], ", ")
	if more := len(list) - maxNamespaces; more > 0 {
		text += fmt.Sprintf(", and those of %d more namespaces", more)
	}
	return text
}

// maxNamespaces keeps a line readable.
const maxNamespaces = 10
