// Package inject puts the mesh into pods that ask for it when they are made, where no agent may
// be on their nodes: a mutating admission webhook (admission.k8s.io/v1) that adds Assay's
// container as a native sidecar, the first of the pod's init containers, with what it needs.
//
//	API server --AdmissionReview--> Handler --> Patch --> operations of JSON Patch (RFC 6902)
//
// [Injector.Patch] is a pure function of a pod. It makes operations and no new pod, so that
// what it does not know of a pod stays as it is.
//
// It refuses to decide which pods are asked about: selectors of the webhook's configuration do, by
// the label assay.dev/mesh. It refuses a pod that has a container or a volume of our names which
// nobody injected, and injects nothing into pods that cannot be meshed by a sidecar, with a
// warning.
//
// Invariants: everything of a pod that is not ours stays; a pod that was injected is changed
// where it differs from what would be injected now, so that the container of our name is
// always the one that control injects, and a second time changes nothing.
//
// Goroutines: none.
//
// Tour: inject.go (what is done), container.go (what is added), metrics.go (who finds its metrics),
// handler.go (the webhook), limit.go (what strangers can make it hold).
package inject

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"

	"assay.dev"
	"assay.dev/kube"
)

// Injector says what is injected.
type Injector struct {
	Image      string // with assay and assay-proxy in /usr/local/bin
	PullPolicy string // Always, IfNotPresent or Never
	// PullSecrets are names of Secrets with which the image is pulled, in the pod's own namespace: no
	// other's can be. One that is not there is passed over by the kubelet.
	PullSecrets []string
	// Metrics is the port of the pod at which its sidecar serves Prometheus; 0: none.
	Metrics   int32
	Control   string // HOST:PORT of control; an address, since the pod's DNS may need the pod's network
	Namespace string // of the mesh itself, whose pods are not injected
	Version   string // of who injects
	// Roots returns the certificates of the authority's roots in PEM, none while they are not known.
	Roots func() []byte
}

// Operation is one of RFC 6902: add, replace or remove.
type Operation struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// Patch returns what makes a pod of a namespace one of the mesh, and for who makes it what it
// does not get: with no patch why the pod stays as it is. Both are empty for one that is as it should
// be. The error is an assay.Error: Conflict for a pod that cannot have what is ours, Unavailable
// while the roots are not known.
func (j *Injector) Patch(pod *corev1.Pod, namespace string) (patch []Operation, warning string, err error) {
	if skipped := j.skips(pod, namespace); skipped != "" {
		return nil, skipped, nil
	}
	if mesh := pod.Labels[kube.MeshLabel]; mesh == kube.Enabled || mesh == kube.Disabled {
		return nil, "", nil
	}
	if err := foreign(pod); err != nil {
		return nil, "", err
	}
	roots := j.Roots()
	if len(roots) == 0 {
		return nil, "", &assay.Error{Kind: assay.Unavailable, Op: "inject " + title(pod), Err: errors.New("control does not know the authority's roots yet"), Remedy: "try again"}
	}
	metrics, warning := j.metrics(pod)
	patch = slices.Concat(j.annotate(pod, metrics), j.containers(pod, string(roots), metrics), volumes(pod), j.pullSecrets(pod))
	return patch, warning, nil
}

// skips says why a pod is never injected; "" for one that may be.
func (j *Injector) skips(pod *corev1.Pod, namespace string) string {
	switch {
	case namespace == kube.ClusterSystem || namespace == j.Namespace:
		return "pods of " + namespace + " are not meshed by a sidecar: the mesh itself needs them"
	case pod.Spec.HostNetwork:
		return "a pod in its node's network cannot be meshed; it stays outside"
	case pod.Spec.OS != nil && pod.Spec.OS.Name == corev1.Windows:
		return "a Windows pod cannot be meshed; it stays outside"
	}
	return ""
}

// foreign refuses a pod that has something of our names which nobody injected.
func foreign(pod *corev1.Pod) error {
	refuse := func(what, name string) error {
		return &assay.Error{Kind: assay.Conflict, Op: "inject " + title(pod), Err: fmt.Errorf("it has a %s %s of its own", what, name), Remedy: "give it another name, or label the pod " + kube.MeshLabel + ": disabled"}
	}
	for i := range pod.Spec.Containers {
		if pod.Spec.Containers[i].Name == kube.SidecarContainer {
			return refuse("container", kube.SidecarContainer)
		}
	}
	if name, volume := intruder(pod); name != "" {
		return refuse("container "+cut(name)+" that mounts volume", volume)
	}
	if _, injected := pod.Annotations[kube.InjectedAnnotation]; injected {
		return nil
	}
	if ours(pod) >= 0 {
		return refuse("init container", kube.SidecarContainer)
	}
	for i := range pod.Spec.Volumes {
		if name := pod.Spec.Volumes[i].Name; name == tokenVolume || name == stateVolume {
			return refuse("volume", name)
		}
	}
	return nil
}

// intruder is a container that would see what only ours may, the host's key among it, and the
// volume that it mounts; "" for none.
func intruder(pod *corev1.Pod) (name, volume string) {
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			c := &list[i]
			if c.Name == kube.SidecarContainer {
				continue
			}
			for _, m := range c.VolumeMounts {
				if m.Name == tokenVolume || m.Name == stateVolume {
					return c.Name, m.Name
				}
			}
			for _, d := range c.VolumeDevices {
				if d.Name == tokenVolume || d.Name == stateVolume {
					return c.Name, d.Name
				}
			}
		}
	}
	return "", ""
}

func title(pod *corev1.Pod) string {
	if pod.Name != "" {
		return "pod " + cut(pod.Name)
	}
	return "a pod " + cut(pod.GenerateName) + "…"
}

// cut bounds a name that nobody has looked at yet.
func cut(name string) string { return name[:min(len(name), 253)] }

// ours is the place of our container among the init containers, -1 for none.
func ours(pod *corev1.Pod) int {
	return slices.IndexFunc(pod.Spec.InitContainers, func(c corev1.Container) bool { return c.Name == kube.SidecarContainer })
}

func (j *Injector) annotate(pod *corev1.Pod, metrics int32) (patch []Operation) {
	want := map[string]string{kube.InjectedAnnotation: j.Version}
	if metrics > 0 && !scraped(pod) {
		maps.Copy(want, map[string]string{scrape + "scrape": "true", scrape + "port": strconv.Itoa(int(metrics)), scrape + "path": "/metrics"})
	}
	if pod.Annotations == nil {
		return []Operation{{"add", "/metadata/annotations", want}}
	}
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if have, there := pod.Annotations[name]; !there || have != want[name] {
			patch = append(patch, Operation{"add", "/metadata/annotations/" + strings.ReplaceAll(name, "/", "~1"), want[name]})
		}
	}
	return patch
}

// containers puts our container where it is the first to start.
func (j *Injector) containers(pod *corev1.Pod, roots string, metrics int32) []Operation {
	want := j.container(pod, roots, metrics)
	i := ours(pod)
	switch {
	case pod.Spec.InitContainers == nil:
		return []Operation{{"add", "/spec/initContainers", []*corev1.Container{want}}}
	case i < 0:
		return []Operation{{"add", "/spec/initContainers/0", want}}
	}
	have := &pod.Spec.InitContainers[i]
	keep(want, have)
	switch {
	case i > 0:
		return []Operation{{"remove", fmt.Sprintf("/spec/initContainers/%d", i), nil}, {"add", "/spec/initContainers/0", want}}
	case equality.Semantic.DeepEqual(want, have):
		return nil
	}
	return []Operation{{"replace", "/spec/initContainers/0", want}}
}

// accountFolder is where the API server mounts an account's token in every container.
const accountFolder = "/var/run/secrets/kubernetes.io/serviceaccount"

// keep leaves to the API server what it has added to our container: an account's token, limits of
// a LimitRange. A mount anywhere else could be in the place of our program.
func keep(want, have *corev1.Container) {
	want.Resources = have.Resources
	for _, m := range have.VolumeMounts {
		if m.MountPath == accountFolder && m.Name != tokenVolume && m.Name != stateVolume {
			want.VolumeMounts = append(want.VolumeMounts, m)
		}
	}
}

func volumes(pod *corev1.Pod) (patch []Operation) {
	want := []*corev1.Volume{token(), state()}
	if pod.Spec.Volumes == nil {
		return []Operation{{"add", "/spec/volumes", want}}
	}
	for _, w := range want {
		i := slices.IndexFunc(pod.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == w.Name })
		switch {
		case i < 0:
			patch = append(patch, Operation{"add", "/spec/volumes/-", w})
		case !equality.Semantic.DeepEqual(w, &pod.Spec.Volumes[i]):
			patch = append(patch, Operation{"replace", fmt.Sprintf("/spec/volumes/%d", i), w})
		}
	}
	return patch
}

// pullSecrets come after those that the pod has, its account's among them.
func (j *Injector) pullSecrets(pod *corev1.Pod) (patch []Operation) {
	var missing []corev1.LocalObjectReference
	for _, name := range j.PullSecrets {
		if r := (corev1.LocalObjectReference{Name: name}); !slices.Contains(pod.Spec.ImagePullSecrets, r) && !slices.Contains(missing, r) {
			missing = append(missing, r)
		}
	}
	if pod.Spec.ImagePullSecrets == nil && missing != nil {
		return []Operation{{"add", "/spec/imagePullSecrets", missing}}
	}
	for _, r := range missing {
		patch = append(patch, Operation{"add", "/spec/imagePullSecrets/-", r})
	}
	return patch
}
