package kube

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// MeshLabel says of a namespace or a pod how it is in the mesh; the pod's word comes first. Any
// other value is as good as none.
const (
	MeshLabel = "assay.dev/mesh"
	Enabled   = "enabled"  // by its node's agent
	Sidecar   = "sidecar"  // by a container that is injected when it is made
	Disabled  = "disabled" // not at all
)

// What is injected into a pod.
const (
	SidecarContainer   = "assay-proxy"
	InjectedAnnotation = "assay.dev/injected" // the version of who did it
)

// ClusterSystem is Kubernetes' own namespace: what the cluster needs to start.
const ClusterSystem = "kube-system"

// Asks reports whether a pod asks for a sidecar, by its labels and its namespace's.
func Asks(namespace string, pod, labels map[string]string) bool {
	switch pod[MeshLabel] {
	case Sidecar:
		return true
	case Enabled, Disabled:
		return false
	}
	return namespace != ClusterSystem && labels[MeshLabel] == Sidecar
}

// Wants reports whether a pod is to be meshed by its node's agent, by the same labels.
func Wants(namespace string, pod, labels map[string]string) bool {
	switch pod[MeshLabel] {
	case Enabled:
		return true
	case Sidecar, Disabled:
		return false
	}
	return namespace != ClusterSystem && labels[MeshLabel] == Enabled
}

// Ports are those of TCP that a pod's containers declare, and those at which the kubelet asks
// them or tells them something; both ascending.
func Ports(s *corev1.PodSpec) (declared, probed []uint16) {
	for _, list := range [][]corev1.Container{s.InitContainers, s.Containers} {
		for i := range list {
			for _, port := range list[i].Ports {
				if n := port.ContainerPort; (port.Protocol == "" || port.Protocol == corev1.ProtocolTCP) && n > 0 && n <= 65535 {
					declared = append(declared, uint16(n))
				}
			}
			probed = append(probed, probes(&list[i])...)
		}
	}
	slices.Sort(declared)
	slices.Sort(probed)
	return slices.Compact(declared), slices.Compact(probed)
}

func probes(c *corev1.Container) (ports []uint16) {
	add := func(port intstr.IntOrString, host string) {
		if host != "" { // somebody else's
			return
		}
		n := port.IntValue()
		for _, named := range c.Ports {
			if port.Type == intstr.String && named.Name == port.StrVal {
				n = int(named.ContainerPort)
			}
		}
		if n > 0 && n <= 65535 {
			ports = append(ports, uint16(n))
		}
	}
	for _, p := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe, c.StartupProbe} {
		switch {
		case p == nil:
		case p.HTTPGet != nil:
			add(p.HTTPGet.Port, p.HTTPGet.Host)
		case p.TCPSocket != nil:
			add(p.TCPSocket.Port, p.TCPSocket.Host)
		case p.GRPC != nil:
			add(intstr.FromInt32(p.GRPC.Port), "")
		}
	}
	if c.Lifecycle != nil {
		for _, h := range []*corev1.LifecycleHandler{c.Lifecycle.PostStart, c.Lifecycle.PreStop} {
			if h != nil && h.HTTPGet != nil {
				add(h.HTTPGet.Port, h.HTTPGet.Host)
			}
		}
	}
	return ports
}
