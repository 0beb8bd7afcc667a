// Package v1alpha1 holds Assay's own kinds of intent, group assay.dev. They have
// Kubernetes' form (apiVersion, kind, metadata, spec) also where there is no
// Kubernetes. Fields are only ever added.
package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// APIVersion is the apiVersion of every kind in this package.
const APIVersion = "assay.dev/v1alpha1"

// DefaultName is the name of a namespace's MeshConfig.
const DefaultName = "default"

// MeshConfig says how a namespace treats connections that are not under mutual
// TLS. There is one per namespace, named "default". A namespace without one
// observes.
type MeshConfig struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              MeshConfigSpec `json:"spec"`
}

// MeshConfigSpec is the content of a MeshConfig.
type MeshConfigSpec struct {
	// Mode is "observe" (the default): plaintext from outside the mesh is served,
	// counted and shown as an exception; or "strict": it is refused and recorded.
	Mode string `json:"mode,omitempty"`
	// ExcludedPorts are TCP ports, 1 to 65535, whose connections are not captured in
	// this namespace, in either direction. They pass as they are.
	ExcludedPorts []int32 `json:"excludedPorts,omitempty"`
}

// MeshConfigList is a list of them.
type MeshConfigList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []MeshConfig `json:"items"`
}
