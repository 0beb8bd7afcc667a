package cluster

import (
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"assay.dev/discovery"
	"assay.dev/kube"
	"assay.dev/kube/v1alpha1"
)

// trim keeps of an object what the model reads. It is called before anything else
// has the object.
func trim(object any) (any, error) {
	switch o := object.(type) {
	case *corev1.Pod:
		return trimPod(o), nil
	case *corev1.Node:
		kept := &corev1.Node{ObjectMeta: trimMeta(&o.ObjectMeta, nil)}
		kept.Labels = map[string]string{}
		for _, label := range append(kube.AgentlessLabels(), corev1.LabelTopologyZone) {
			if v, ok := o.Labels[label]; ok {
				kept.Labels[label] = v
			}
		}
		for _, a := range o.Status.Addresses {
			if a.Type == corev1.NodeInternalIP {
				kept.Status.Addresses = append(kept.Status.Addresses, a)
			}
		}
		return kept, nil
	case *metav1.PartialObjectMetadata: // a namespace
		kept := &metav1.PartialObjectMetadata{ObjectMeta: trimMeta(&o.ObjectMeta, nil)}
		if mesh, ok := o.Labels[kube.MeshLabel]; ok {
			kept.Labels = map[string]string{kube.MeshLabel: mesh}
		}
		return kept, nil
	case *corev1.Service:
		o.ObjectMeta = trimMeta(&o.ObjectMeta, o.Labels)
		o.Status = corev1.ServiceStatus{LoadBalancer: o.Status.LoadBalancer}
	case *discoveryv1.EndpointSlice:
		service, ok := o.Labels[discoveryv1.LabelServiceName]
		o.ObjectMeta = trimMeta(&o.ObjectMeta, nil)
		if ok {
			o.Labels = map[string]string{discoveryv1.LabelServiceName: service}
		}
	case *unstructured.Unstructured:
		trimStatus(o)
		o.SetManagedFields(nil)
		// kubectl's copy of the object in itself.
		unstructured.RemoveNestedField(o.Object, "metadata", "annotations", corev1.LastAppliedConfigAnnotation)
	}
	return object, nil
}

func trimPod(p *corev1.Pod) *corev1.Pod {
	out := &corev1.Pod{
		ObjectMeta: trimMeta(&p.ObjectMeta, p.Labels),
		Spec:       corev1.PodSpec{NodeName: p.Spec.NodeName, ServiceAccountName: p.Spec.ServiceAccountName, HostNetwork: p.Spec.HostNetwork},
		Status:     corev1.PodStatus{Phase: p.Status.Phase, PodIPs: p.Status.PodIPs},
	}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			out.Status.Conditions = []corev1.PodCondition{{Type: c.Type, Status: c.Status}}
		}
	}
	if image := sidecarOf(p); image != "" {
		out.Annotations = map[string]string{kube.InjectedAnnotation: p.Annotations[kube.InjectedAnnotation]}
		out.Spec.InitContainers = []corev1.Container{{Name: kube.SidecarContainer, Image: image}}
		for _, list := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses, p.Status.EphemeralContainerStatuses} {
			for _, s := range list {
				out.Status.ContainerStatuses = append(out.Status.ContainerStatuses, corev1.ContainerStatus{Name: s.Name, Image: s.Image, ImageID: s.ImageID})
			}
		}
	}
	return out
}

func trimMeta(m *metav1.ObjectMeta, labels map[string]string) metav1.ObjectMeta {
	out := metav1.ObjectMeta{
		Namespace: m.Namespace, Name: m.Name, UID: m.UID, ResourceVersion: m.ResourceVersion,
		DeletionTimestamp: m.DeletionTimestamp, Labels: labels,
	}
	for _, name := range []string{kube.ProxyProtocol, kube.ForwardClientCert} {
		if v, ok := m.Annotations[name]; ok {
			if out.Annotations == nil {
				out.Annotations = map[string]string{}
			}
			out.Annotations[name] = v
		}
	}
	return out
}

// trimStatus keeps of a status what we have written: what became of a route here, and of an
// object of our own kinds.
func trimStatus(o *unstructured.Unstructured) {
	if o.GetAPIVersion() == v1alpha1.APIVersion {
		accepted := acceptedCondition(o)
		delete(o.Object, "status")
		if accepted != nil {
			o.Object["status"] = map[string]any{"conditions": []any{accepted}}
		}
		return
	}
	parents, _, _ := unstructured.NestedSlice(o.Object, "status", "parents")
	delete(o.Object, "status")
	var ours []any
	for _, p := range parents {
		if m, ok := p.(map[string]any); ok && m["controllerName"] == discovery.Controller {
			ours = append(ours, m)
		}
	}
	if len(ours) > 0 {
		o.Object["status"] = map[string]any{"parents": ours}
	}
}
