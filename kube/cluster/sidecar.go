package cluster

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"assay.dev"
	"assay.dev/kube"
)

// sidecarOf is the image of the container that was injected into a pod; "" for none.
func sidecarOf(p *corev1.Pod) string {
	if _, injected := p.Annotations[kube.InjectedAnnotation]; !injected {
		return ""
	}
	for i := range p.Spec.InitContainers {
		if p.Spec.InitContainers[i].Name == kube.SidecarContainer {
			return p.Spec.InitContainers[i].Image
		}
	}
	return ""
}

// repository is an image's name without tag and digest.
func repository(image string) string {
	image, _, _ = strings.Cut(image, "@")
	if tag := strings.LastIndexByte(image, ':'); tag > strings.LastIndexByte(image, '/') {
		image = image[:tag]
	}
	return image
}

// artifacts are the images that the kubelet says a pod's containers run. What it names is what
// the runtime told it: the digest of an index, a manifest or a configuration. A container of our
// name is left out if its image is of the repository that is injected from, older ones too: who
// writes a pod can call any container so.
func (m *model) artifacts(p *corev1.Pod) assay.ArtifactSet {
	ours := m.injects != "" && repository(sidecarOf(p)) == m.injects
	var set assay.ArtifactSet
	for _, list := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses, p.Status.EphemeralContainerStatuses} {
		for _, s := range list {
			digest, err := assay.ParseDigest(s.ImageID[strings.LastIndexAny(s.ImageID, "@/")+1:])
			if err != nil || ours && s.Name == kube.SidecarContainer {
				continue
			}
			a := assay.Artifact{Kind: assay.Image, Name: s.Image, Digest: digest, Evidence: assay.ByAPIServer}
			if !slices.Contains(set, a) {
				set = append(set, a)
			}
		}
	}
	return set
}

// asks notes whether a pod asks for a sidecar, or for an agent.
func (m *model) asks(p *Pod) {
	labels := map[string]string{kube.MeshLabel: m.mesh[p.Namespace]}
	p.Asks = kube.Asks(p.Namespace, p.Labels, labels)
	p.Wants = m.injects != "" && kube.Wants(p.Namespace, p.Labels, labels)
}

func (m *model) setNamespace(n *metav1.PartialObjectMetadata) {
	if mesh := n.Labels[kube.MeshLabel]; mesh == "" {
		m.removeNamespace(n.Name)
	} else if m.mesh[n.Name] != mesh {
		m.mesh[n.Name] = mesh
		m.askAgain(n.Name)
	}
}

func (m *model) removeNamespace(name string) {
	if _, labelled := m.mesh[name]; labelled {
		delete(m.mesh, name)
		m.askAgain(name)
	}
}

// askAgain looks at the pods of a namespace whose labels have changed. Pods are handed out, and
// never changed.
func (m *model) askAgain(namespace string) {
	for uid, p := range m.pods {
		if p.Namespace != namespace {
			continue
		}
		other := *p
		if m.asks(&other); other.Asks != p.Asks || other.Wants != p.Wants {
			m.pods[uid] = &other
			m.touchedPods[uid] = true
		}
	}
}
