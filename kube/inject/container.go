package inject

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"assay.dev/kube"
)

const (
	program     = "/usr/local/bin/assay"
	tokenVolume = "assay-token"
	tokenFolder = "/var/run/secrets/assay"
	stateVolume = "assay-state"
	stateFolder = "/run/assay-sidecar" // goes on with the pod, whatever becomes of the container
	audience    = "assay"
)

// capabilities are what the container has of the superuser's, in its own pod.
var capabilities = []corev1.Capability{
	"NET_ADMIN",        // rules, routes, marks, and connections in the client's name
	"NET_RAW",          // the proxy marks what it dials with
	"SETUID", "SETGID", // the proxy runs as another user
	"KILL", // and is told to end
}

// container is what is injected. Everything that the API server would fill in is written out, so
// that it can be compared.
func (j *Injector) container(pod *corev1.Pod, roots string, metrics int32) *corev1.Container {
	always := corev1.ContainerRestartPolicyAlways
	c := &corev1.Container{
		Name: kube.SidecarContainer, Image: j.Image, ImagePullPolicy: corev1.PullPolicy(j.PullPolicy), RestartPolicy: &always,
		Command: []string{program}, Args: []string{"sidecar"},
		Env: j.env(pod, roots),
		SecurityContext: &corev1.SecurityContext{
			RunAsUser: new(int64(0)), RunAsGroup: new(int64(0)), RunAsNonRoot: new(false), Privileged: new(false),
			AllowPrivilegeEscalation: new(false), ReadOnlyRootFilesystem: new(true),
			Capabilities:   &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: capabilities},
			SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		},
		Resources: resources(pod),
		// What comes after it starts when rules and listeners are there.
		StartupProbe: &corev1.Probe{
			ProbeHandler:  corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{program, "sidecar", "--ready"}}},
			PeriodSeconds: 1, TimeoutSeconds: 5, FailureThreshold: 120, SuccessThreshold: 1,
		},
		TerminationMessagePath: corev1.TerminationMessagePathDefault, TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError,
		VolumeMounts: []corev1.VolumeMount{{Name: tokenVolume, MountPath: tokenFolder, ReadOnly: true}, {Name: stateVolume, MountPath: stateFolder}},
	}
	if metrics > 0 {
		c.Args = append(c.Args, fmt.Sprintf("--metrics=:%d", metrics))
		c.Ports = []corev1.ContainerPort{{Name: MetricsName, ContainerPort: metrics, Protocol: corev1.ProtocolTCP}}
	}
	return c
}

func (j *Injector) env(pod *corev1.Pod, roots string) []corev1.EnvVar {
	field := func(name, path string) corev1.EnvVar {
		return corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: path}}}
	}
	declared, probed := kube.Ports(theirs(pod))
	return []corev1.EnvVar{
		field("POD_NAMESPACE", "metadata.namespace"), field("POD_NAME", "metadata.name"), field("POD_UID", "metadata.uid"),
		field("POD_IPS", "status.podIPs"), field("HOST_IPS", "status.hostIPs"), field("NODE_NAME", "spec.nodeName"),
		field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
		{Name: "ASSAY_CONTROL", Value: j.Control}, {Name: "ASSAY_TRUST", Value: roots},
		{Name: "ASSAY_PORTS", Value: text(declared)}, {Name: "ASSAY_PROBES", Value: text(probed)},
	}
}

// theirs are a pod's containers without ours.
func theirs(pod *corev1.Pod) *corev1.PodSpec {
	is := func(c corev1.Container) bool { return c.Name == kube.SidecarContainer }
	return &corev1.PodSpec{InitContainers: slices.DeleteFunc(slices.Clone(pod.Spec.InitContainers), is), Containers: pod.Spec.Containers}
}

func text(ports []uint16) string {
	list := make([]string, len(ports))
	for i, p := range ports {
		list[i] = strconv.Itoa(int(p))
	}
	return strings.Join(list, ",")
}

// resources leave a pod whose containers are all guaranteed what they ask for in that class, and
// take what a pod asks for as a whole from that.
func resources(pod *corev1.Pod) corev1.ResourceRequirements {
	limits := corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("256Mi")}
	if guaranteed(pod) {
		limits[corev1.ResourceCPU] = resource.MustParse("500m")
		return corev1.ResourceRequirements{Requests: limits, Limits: limits}
	}
	requests := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("20m"), corev1.ResourceMemory: resource.MustParse("64Mi")}
	if whole := pod.Spec.Resources; whole != nil {
		share(requests, limits, whole)
	}
	return corev1.ResourceRequirements{Requests: requests, Limits: limits}
}

// share fits a container into what its pod has as a whole. By now the API server has filled in the
// pod's requests by those of the containers that it knows, and it refuses a sum above them, and a
// limit above the pod's. It would take a limit for a request that is left out; so it is zero.
func share(requests, limits corev1.ResourceList, whole *corev1.ResourceRequirements) {
	for name := range requests {
		_, asks := whole.Requests[name]
		most, bounded := whole.Limits[name]
		if asks || bounded {
			requests[name] = resource.Quantity{Format: resource.DecimalSI}
		}
		if limit, ok := limits[name]; ok && bounded && most.Cmp(limit) < 0 {
			limits[name] = most
		}
	}
}

// guaranteed reports whether a pod is of that class of service by its containers without us. One
// that asks for something as a whole is of a class by that alone.
func guaranteed(pod *corev1.Pod) bool {
	if r := pod.Spec.Resources; r != nil && len(r.Requests)+len(r.Limits) > 0 {
		return false
	}
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			if list[i].Name == kube.SidecarContainer {
				continue
			}
			for _, name := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
				limit, ok := list[i].Resources.Limits[name]
				request, asks := list[i].Resources.Requests[name]
				if !ok || limit.IsZero() || asks && request.Cmp(limit) != 0 {
					return false
				}
			}
		}
	}
	return true
}

// token is that of the pod's own account, for nobody but control.
func token() *corev1.Volume {
	expiry, mode := int64(3600), int32(0o644)
	return &corev1.Volume{Name: tokenVolume, VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
		DefaultMode: &mode,
		Sources:     []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: audience, ExpirationSeconds: &expiry, Path: "token"}}},
	}}}
}

func state() *corev1.Volume {
	return &corev1.Volume{Name: stateVolume, VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{
		Medium: corev1.StorageMediumMemory, SizeLimit: new(resource.MustParse("64Mi")),
	}}}
}
