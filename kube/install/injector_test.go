package install

import (
	"errors"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"assay.dev/kube"
)

// TestPodsWithSidecars: who makes pods cannot hold an installation by an annotation; pods that
// have lost their label are named.
func TestPodsWithSidecars(t *testing.T) {
	pod := func(namespace, label string, containers ...string) corev1.Pod {
		p := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Annotations: map[string]string{kube.InjectedAnnotation: "1"}}}
		if label != "" {
			p.Labels = map[string]string{kube.MeshLabel: label}
		}
		for _, name := range containers {
			p.Spec.InitContainers = append(p.Spec.InitContainers, corev1.Container{Name: name})
		}
		return p
	}
	ended := pod("shop", "sidecar", kube.SidecarContainer)
	ended.Status.Phase = corev1.PodSucceeded
	plain := pod("shop", "", kube.SidecarContainer)
	plain.Annotations = nil
	pods := []corev1.Pod{
		ended, plain, pod("shop", "", "init"), pod("shop", "sidecar"), // none
		pod("shop", "", "init", kube.SidecarContainer), pod("bank", "sidecar", kube.SidecarContainer),
		pod("bank", "", kube.SidecarContainer), pod("shop", "disabled", kube.SidecarContainer), pod("bank", "enabled", kube.SidecarContainer),
	}
	asking, others := countSidecars(pods, []corev1.Namespace{{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{kube.MeshLabel: kube.Sidecar}}}, {ObjectMeta: metav1.ObjectMeta{Name: "bank"}}})
	if got := where(asking); got != "1 in bank, 1 in shop" {
		t.Errorf("pods that ask: %q", got)
	}
	if got := where(others); got != "2 in bank, 1 in shop" {
		t.Errorf("pods that do not: %q", got)
	}
}

// TestRefusedByOthers: what control says, or that it cannot be asked, is nobody else's refusal.
func TestRefusedByOthers(t *testing.T) {
	pods := schema.GroupResource{Resource: "pods"}
	denied := func(webhook string, code int32) error {
		return &apierrors.StatusError{ErrStatus: metav1.Status{Status: metav1.StatusFailure, Code: code, Message: `admission webhook "` + webhook + `" denied the request: no`}}
	}
	for _, c := range []struct {
		err  error
		want bool
	}{
		{errors.New("connection refused"), false},
		{apierrors.NewInternalError(errors.New(`failed calling webhook "pod.injector.assay.dev"`)), false},
		{apierrors.NewServiceUnavailable("starting"), false},
		{apierrors.NewTooManyRequests("slow down", 1), false},
		{apierrors.NewTimeoutError("late", 1), false},
		{apierrors.NewServerTimeout(pods, "create", 1), false},
		{apierrors.NewConflict(pods, "assay-verify", errors.New("x")), false},
		{denied("pod.injector.assay.dev", 409), false},
		{denied("namespace.injector.assay.dev", 403), false},
		{denied("policy.example.org", 400), true},
		{apierrors.NewForbidden(pods, "assay-verify", errors.New("violates PodSecurity")), true},
		{apierrors.NewInvalid(schema.GroupKind{Kind: "Pod"}, "assay-verify", nil), true},
	} {
		if got := refusedByOthers(c.err); got != c.want {
			t.Errorf("%v: %v", c.err, got)
		}
	}
}
