package node

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"assay.dev"
	"assay.dev/kube"
)

// MeshLabel says of a namespace or a pod whether it is in the mesh: see package kube.
const (
	MeshLabel = kube.MeshLabel
	Enabled   = kube.Enabled
	Disabled  = kube.Disabled
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

	hostNetwork, static, running, ended bool
}

// translate returns what is kept of a pod. memory is the node's, in bytes.
func translate(p *corev1.Pod, memory int64) *Pod {
	out := &Pod{
		UID: string(p.UID), Namespace: p.Namespace, Name: p.Name, Account: cmp.Or(p.Spec.ServiceAccountName, "default"),
		Labels: p.Labels, OOMScore: oomScore(p, memory), hostNetwork: p.Spec.HostNetwork,
		running: p.Status.Phase == corev1.PodRunning,
		ended:   p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed,
	}
	_, out.static = p.Annotations[mirrored]
	out.Ports, out.Probes = kube.Ports(&p.Spec)
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

// labelled reports whether somebody wants a pod to be meshed. labels are its namespace's.
func (p *Pod) labelled(system string, labels map[string]string) bool {
	return !p.ended && p.Namespace != system && kube.Wants(p.Namespace, p.Labels, labels)
}

// wanted decides whether a pod is to be meshed.
func (p *Pod) wanted(system string, labels map[string]string) bool {
	return p.bar() == "" && p.labelled(system, labels)
}

// bar is why no label brings a pod into the mesh, "" for one that can be in it.
func (p *Pod) bar() Reason {
	switch {
	case p.hostNetwork:
		return HostNetwork
	case p.static:
		return Static
	}
	return ""
}

// barred is that, for people.
func (p *Pod) barred() error {
	e := &assay.Error{Kind: assay.Invalid, Op: "mesh pod " + p.Namespace + "/" + p.Name}
	switch p.bar() {
	case HostNetwork:
		e.Err = errors.New("it has its node's network (hostNetwork), and so no connections of its own that could be captured")
		e.Remedy = "give it a network of its own; or, if it is meant to stay outside, label it assay.dev/mesh: disabled"
	case Static:
		e.Err = errors.New("it is static: a file on its node makes it, and what the API server has is a mirror of it, without a service account to be its identity")
		e.Remedy = "make it a DaemonSet; or, if it is meant to stay outside, label it assay.dev/mesh: disabled in its file"
	}
	return e
}

// unknown is why a pod cannot be meshed whose runtime is away, or (cause is nil) does not
// know it.
func (p *Pod) unknown(cause error) error {
	e := &assay.Error{Kind: assay.Unavailable, Op: "mesh pod " + p.Namespace + "/" + p.Name}
	if cause == nil {
		e.Err = errors.New("the API server says that it runs, and the container runtime that the agent asks does not know it")
		e.Remedy = "name the socket of the runtime that runs it: assay install --cri"
		return e
	}
	e.Err, e.Remedy = fmt.Errorf("the container runtime cannot be asked: %w", cause), "see whether the runtime of its node runs; if it is another one than the agent asks: assay install --cri"
	return e
}

// isStatic tells the UID of a pod that the API server did not make: a digest.
func isStatic(uid string) bool { return uid != "" && !strings.Contains(uid, "-") }
