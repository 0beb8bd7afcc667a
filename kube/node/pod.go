package node

import (
	"cmp"
	"errors"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// MeshLabel says of a namespace or a pod whether it is in the mesh: Enabled or Disabled.
// Any other value is as good as none.
const (
	MeshLabel = "assay.dev/mesh"
	Enabled   = "enabled"
	Disabled  = "disabled"
)

// LeavingLabel on the system namespace takes the whole mesh out of the cluster, in steps:
// LeavingServe, LeavingDial, LeavingRelease. Any other value is as good as none.
const (
	LeavingLabel   = "assay.dev/leaving"
	LeavingServe   = "serve"   // proxies serve plaintext, too
	LeavingDial    = "dial"    // and dial nothing else
	LeavingRelease = "release" // and pods are released: none is wanted
)

// DefaultSystem is the namespace that Assay itself runs in.
const DefaultSystem = "assay-system"

// clusterSystem is Kubernetes' own namespace: what the cluster needs to start.
const clusterSystem = "kube-system"

// mirrored is on the object that stands for a static pod.
const mirrored = corev1.MirrorPodAnnotationKey

// Pod is a pod of this node.
type Pod struct {
	UID       string
	Namespace string
	Name      string
	Account   string // its service account
	Labels    map[string]string
	Ports     []uint16     // of TCP, that its containers declare; ascending
	Probes    []uint16     // at which the kubelet asks its containers; ascending
	Addrs     []netip.Addr // as far as the API server has heard; IPv4 first
	// OOMScore is what the kernel adds when memory is short (oom_score_adj): that of its
	// best protected container.
	OOMScore int

	hostNetwork, static, ended bool
}

// translate returns what is kept of a pod. memory is the node's, in bytes.
func translate(p *corev1.Pod, memory int64) *Pod {
	out := &Pod{
		UID: string(p.UID), Namespace: p.Namespace, Name: p.Name, Account: cmp.Or(p.Spec.ServiceAccountName, "default"),
		Labels: p.Labels, OOMScore: oomScore(p, memory), hostNetwork: p.Spec.HostNetwork,
		ended: p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed,
	}
	_, out.static = p.Annotations[mirrored]
	for _, list := range [][]corev1.Container{p.Spec.InitContainers, p.Spec.Containers} {
		for i := range list {
			for _, port := range list[i].Ports {
				if n := port.ContainerPort; (port.Protocol == "" || port.Protocol == corev1.ProtocolTCP) && n > 0 && n <= 65535 {
					out.Ports = append(out.Ports, uint16(n))
				}
			}
			out.Probes = append(out.Probes, probes(&list[i])...)
		}
	}
	for _, ports := range []*[]uint16{&out.Ports, &out.Probes} {
		slices.Sort(*ports)
		*ports = slices.Compact(*ports)
	}
	for _, ip := range p.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			out.Addrs = append(out.Addrs, a.Unmap())
		}
	}
	slices.SortFunc(out.Addrs, func(a, b netip.Addr) int {
		return cmp.Or(cmp.Compare(a.BitLen(), b.BitLen()), a.Compare(b))
	})
	return out
}

// probes are the ports at which the kubelet asks a container, or tells it something.
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

// oomScore is what the kubelet gives to the pod's containers (its package qos).
func oomScore(p *corev1.Pod, memory int64) int {
	const guaranteed, bestEffort = -997, 1000
	switch {
	case p.Spec.Priority != nil && *p.Spec.Priority >= 2000001000, p.Status.QOSClass == corev1.PodQOSGuaranteed: // system-node-critical
		return guaranteed
	case p.Status.QOSClass == corev1.PodQOSBestEffort, memory <= 0:
		return bestEffort
	}
	score := bestEffort - 1
	for i := range p.Spec.Containers {
		request := p.Spec.Containers[i].Resources.Requests.Memory().Value()
		score = min(score, max(bestEffort-int(1000*min(request, memory)/memory), bestEffort+guaranteed))
	}
	return score
}

// ParseMemory reads an amount as Kubernetes writes it: 256Mi.
func ParseMemory(s string) (int64, error) {
	q, err := resource.ParseQuantity(s)
	if err != nil {
		return 0, err
	}
	if q.Sign() < 0 {
		return 0, errors.New("it is less than nothing")
	}
	return q.Value(), nil
}

// leaving is the step that the labels of the system namespace say; "" for none.
func leaving(labels map[string]string) string {
	switch step := labels[LeavingLabel]; step {
	case LeavingServe, LeavingDial, LeavingRelease:
		return step
	}
	return ""
}

// wanted decides whether a pod is to be meshed. labels are its namespace's.
func (p *Pod) wanted(system string, labels map[string]string) bool {
	if p.hostNetwork || p.static || p.ended || p.Namespace == system {
		return false
	}
	switch p.Labels[MeshLabel] {
	case Enabled:
		return true
	case Disabled:
		return false
	}
	return p.Namespace != clusterSystem && labels[MeshLabel] == Enabled
}

// isStatic tells the UID of a pod that the API server did not make: a digest.
func isStatic(uid string) bool { return uid != "" && !strings.Contains(uid, "-") }
