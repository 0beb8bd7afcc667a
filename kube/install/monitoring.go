package install

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"assay.dev/kube/inject"
)

// ServiceMonitor is the Prometheus operator's kind, as far as it is needed here.
type ServiceMonitor struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              ServiceMonitorSpec `json:"spec"`
}

// ServiceMonitorSpec says which Services are scraped, and how.
type ServiceMonitorSpec struct {
	Selector  metav1.LabelSelector `json:"selector"`
	Endpoints []MonitoredEndpoint  `json:"endpoints"`
}

// MonitoredEndpoint is a port of a Service or a pod.
type MonitoredEndpoint struct {
	Port        string       `json:"port"`
	Path        string       `json:"path,omitempty"`
	HonorLabels bool         `json:"honorLabels,omitempty"` // ours, of the workload, not the agent's
	Relabelings []Relabeling `json:"relabelings,omitempty"`
}

// Relabeling copies a label.
type Relabeling struct {
	SourceLabels []string `json:"sourceLabels,omitempty"`
	TargetLabel  string   `json:"targetLabel,omitempty"`
}

// DeepCopyObject makes it a runtime.Object.
func (m *ServiceMonitor) DeepCopyObject() runtime.Object {
	c := *m
	m.ObjectMeta.DeepCopyInto(&c.ObjectMeta)
	m.Spec.Selector.DeepCopyInto(&c.Spec.Selector)
	return &c // endpoints are never changed
}

func serviceMonitor(o *Options) *ServiceMonitor {
	return &ServiceMonitor{
		TypeMeta: metav1.TypeMeta{APIVersion: "monitoring.coreos.com/v1", Kind: "ServiceMonitor"}, ObjectMeta: meta(o, AgentName, "agent"),
		Spec: ServiceMonitorSpec{
			Selector: metav1.LabelSelector{MatchLabels: selector("agent")},
			Endpoints: []MonitoredEndpoint{{Port: "metrics", Path: "/metrics", HonorLabels: true, Relabelings: []Relabeling{
				{SourceLabels: []string{"__meta_kubernetes_pod_node_name"}, TargetLabel: "node"},
			}}},
		},
	}
}

// PodMonitor is the Prometheus operator's kind, as far as it is needed here.
type PodMonitor struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              PodMonitorSpec `json:"spec"`
}

// PodMonitorSpec says which pods are scraped, and how.
type PodMonitorSpec struct {
	NamespaceSelector AnyNamespace         `json:"namespaceSelector"`
	Selector          metav1.LabelSelector `json:"selector"`
	Endpoints         []MonitoredEndpoint  `json:"podMetricsEndpoints"`
}

// AnyNamespace is every one.
type AnyNamespace struct {
	Any bool `json:"any"`
}

// DeepCopyObject makes it a runtime.Object.
func (m *PodMonitor) DeepCopyObject() runtime.Object {
	c := *m
	m.ObjectMeta.DeepCopyInto(&c.ObjectMeta)
	m.Spec.Selector.DeepCopyInto(&c.Spec.Selector)
	return &c // endpoints are never changed
}

// podMonitor finds sidecars by the name of their port. A pod's word counts for itself alone: the
// labels that Prometheus gives it come before those that it gives itself.
func podMonitor(o *Options) *PodMonitor {
	return &PodMonitor{
		TypeMeta: metav1.TypeMeta{APIVersion: "monitoring.coreos.com/v1", Kind: "PodMonitor"}, ObjectMeta: meta(o, SidecarName, "sidecar"),
		Spec: PodMonitorSpec{
			NamespaceSelector: AnyNamespace{Any: true},
			Endpoints: []MonitoredEndpoint{{Port: inject.MetricsName, Path: "/metrics", Relabelings: []Relabeling{
				{SourceLabels: []string{"__meta_kubernetes_pod_node_name"}, TargetLabel: "node"},
			}}},
		},
	}
}
