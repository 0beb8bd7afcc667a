package cluster

import (
	"net/netip"

	rbacv1 "k8s.io/api/rbac/v1"

	"assay.dev"
	"assay.dev/discovery"
)

// Rules is what a Watcher must be allowed, in every namespace.
func Rules() []rbacv1.PolicyRule {
	verbs := []string{"list", "watch"}
	return []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"pods", "services", "nodes"}, Verbs: verbs},
		{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: verbs},
		{APIGroups: []string{"gateway.networking.k8s.io"}, Resources: []string{"httproutes", "grpcroutes", "tlsroutes", "referencegrants"}, Verbs: verbs},
		{APIGroups: []string{"assay.dev"}, Resources: []string{"meshconfigs", "egresses", "trafficpolicies"}, Verbs: verbs},
	}
}

// SidecarRules is what one must be allowed beside that when it looks for sidecars.
func SidecarRules() []rbacv1.PolicyRule {
	return []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"namespaces"}, Verbs: []string{"list", "watch"}}}
}

// Service is a service and where its clients may be sent.
type Service struct {
	discovery.DeclaredService
	// ExternalName is the name outside the cluster that this one stands for; such a
	// service has neither addresses nor places.
	ExternalName string
	// Places are sorted by pod, whose UID is the workload's ID, then address. Hosts are names
	// of nodes; a place's own is there where the service is Local.
	Places []discovery.Place
}

// Node is a machine of the cluster.
type Node struct {
	Name string
	Zone string // its label topology.kubernetes.io/zone; "" without
	// Addrs are its own within the cluster, IPv4 first.
	Addrs []netip.Addr
	// Agentless is a node that can have no agent: its system is not Linux, or it stands for a
	// service that runs pods elsewhere.
	Agentless bool
}

// Pod is a pod that has a node and has not ended.
type Pod struct {
	UID       string
	Namespace string
	Name      string
	Account   string // its service account
	Node      string
	// Addrs has IPv4 first. There is none until the node has made the pod's network and said so:
	// a pod is known before anybody can speak for it.
	Addrs  []netip.Addr
	Labels map[string]string
	// HostNetwork pods have their node's addresses, as others may.
	HostNetwork bool
	Ready       bool
	Terminating bool
	// Sidecar is the image of the container that was injected; "" for none.
	Sidecar string
	// Asks: it is to have one, by its labels and its namespace's. Told where sidecars are looked for.
	Asks bool
	// Wants: its node's agent is to mesh it, by the same labels. Told there as well.
	Wants bool
	// Artifacts are the images that the kubelet says its containers run, that of the sidecar
	// not among them if it is one that is injected here; known of pods that have one.
	Artifacts assay.ArtifactSet
}

// Changes is what differs from what was handed out before, sorted by key.
type Changes struct {
	Services        []Service
	RemovedServices []string // "NAMESPACE/NAME"
	Pods            []Pod
	RemovedPods     []string // UIDs
	Nodes           []Node   // that were not there before, or are in another zone
	RemovedNodes    []string
	// Configuration is all of it, when any of it differs; else nil.
	Configuration *Configuration
}

// Empty reports whether nothing differs.
func (c *Changes) Empty() bool {
	return c.Configuration == nil && len(c.Services)+len(c.RemovedServices)+len(c.Pods)+len(c.RemovedPods)+len(c.Nodes)+len(c.RemovedNodes) == 0
}
