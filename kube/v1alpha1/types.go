// Package v1alpha1 holds Assay's own kinds of intent, group assay.dev. They have
// Kubernetes' form (apiVersion, kind, metadata, spec) also where there is no
// Kubernetes. Fields are only ever added.
package v1alpha1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// APIVersion is the apiVersion of every kind in this package.
const APIVersion = Group + "/v1alpha1"

// Group is their group.
const Group = "assay.dev"

// Status is what became of an object, of any kind of this package. Control writes it where
// there is a Kubernetes; elsewhere it is passed over.
type Status struct {
	// Conditions are what is known of the object, one of each type.
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// ConditionAccepted is the type of the condition that says whether an object has an effect.
const ConditionAccepted = "Accepted"

// Reasons of ConditionAccepted, as the Gateway API names them for policies.
const (
	ReasonAccepted       = "Accepted"       // "True": it is in effect
	ReasonInvalid        = "Invalid"        // it cannot be understood
	ReasonConflicted     = "Conflicted"     // an older object says otherwise
	ReasonTargetNotFound = "TargetNotFound" // none of what it is for is there
	ReasonLimitExceeded  = "LimitExceeded"  // its namespace has as many as it may, which are older
)

// DefaultName is the name of a namespace's MeshConfig.
const DefaultName = "default"

// MeshConfig says how a namespace treats connections that are not under mutual
// TLS. There is one per namespace, named "default". A namespace without one
// observes.
type MeshConfig struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              MeshConfigSpec `json:"spec"`
	Status            Status         `json:"status,omitempty"`
}

// MeshConfigSpec is the content of a MeshConfig.
type MeshConfigSpec struct {
	// Mode is "observe" (the default): plaintext from outside the mesh is served,
	// counted and shown as an exception; or "strict": it is refused and recorded.
	Mode string `json:"mode,omitempty"`
	// ExcludedPorts are TCP ports, 1 to 65535, whose connections are not captured in
	// this namespace, in either direction. They pass as they are.
	ExcludedPorts []int32 `json:"excludedPorts,omitempty"`
	// Egress is "observe" (the default): TCP connections to outside the mesh pass,
	// counted and shown as exceptions; or "strict": those that no Egress of the
	// namespace allows are refused and recorded.
	Egress string `json:"egress,omitempty"`
	// AccessLog is the share of HTTP requests to and from the namespace's workloads that
	// their hosts write to the access log, as in "100%" or "0.01%". None by default.
	AccessLog string `json:"accessLog,omitempty"`
	// Traces has the namespace's proxies make spans of requests whose W3C trace context
	// is sampled; hosts export them with --otlp.
	Traces bool `json:"traces,omitempty"`
}

// Egress allows TCP connections from a namespace to outside the mesh. All of a
// namespace count together.
type Egress struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              EgressSpec `json:"spec"`
	Status            Status     `json:"status,omitempty"`
}

// EgressSpec is the content of an Egress: hosts or addresses, and ports.
type EgressSpec struct {
	// Accounts are the workloads that may; none: all of the namespace.
	Accounts []string `json:"accounts,omitempty"`
	// Hosts are DNS names. "*.example.com" is any name below example.com.
	Hosts []string `json:"hosts,omitempty"`
	// Addresses are addresses or prefixes in CIDR form, for what has no name.
	Addresses []string `json:"addresses,omitempty"`
	// Ports are TCP ports, 1 to 65535; at least one.
	Ports []int32 `json:"ports"`
}

// EgressList is a list of them.
type EgressList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Egress `json:"items"`
}

// MeshConfigList is a list of them.
type MeshConfigList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []MeshConfig `json:"items"`
}
