package install

import (
	"fmt"
	"path"
	"strconv"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"assay.dev/kube"
)

// tokenFolder is where an agent finds the token that control asks the API server about.
const tokenFolder = "/var/run/secrets/assay"

// agentObjects are the agents and, with metrics, what finds them.
func agentObjects(o *Options) []Object {
	var list []Object
	if o.metrics() {
		list = append(list, metricsService(o))
	}
	if o.ServiceMonitor {
		list = append(list, serviceMonitor(o))
	}
	return append(list, daemonSet(o))
}

// daemonSet is the agent on every node, whatever its taints: a node without one starts no
// pod that its network plugin is asked for. What is a node in name only has none.
func daemonSet(o *Options) *appsv1.DaemonSet {
	template := corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels("agent", nil)}, Spec: agentPod(o)}
	if o.metrics() {
		template.Annotations = map[string]string{
			"prometheus.io/scrape": "true", "prometheus.io/port": strconv.Itoa(int(o.MetricsPort)), "prometheus.io/path": "/metrics",
		}
	}
	few := intstr.FromString("10%")
	return &appsv1.DaemonSet{
		TypeMeta: metav1.TypeMeta{APIVersion: "apps/v1", Kind: "DaemonSet"}, ObjectMeta: meta(o, AgentName, "agent"),
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: selector("agent")},
			UpdateStrategy: appsv1.DaemonSetUpdateStrategy{
				Type: appsv1.RollingUpdateDaemonSetStrategyType, RollingUpdate: &appsv1.RollingUpdateDaemonSet{MaxUnavailable: &few},
			},
			Template: template,
		},
	}
}

func agentPod(o *Options) corev1.PodSpec {
	expiry := int64(3600) // the kubelet replaces it before
	volumes, mounts := hostFolders(o)
	volumes = append(volumes, corev1.Volume{Name: "token", VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{
		Sources: []corev1.VolumeProjection{{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: Audience, ExpirationSeconds: &expiry, Path: "token"}}},
	}}})
	mounts = append(mounts, corev1.VolumeMount{Name: "token", MountPath: tokenFolder, ReadOnly: true})
	c := corev1.Container{
		Name: "agent", Image: o.Image, ImagePullPolicy: corev1.PullPolicy(o.PullPolicy),
		Command: []string{programs + "/assay"}, Args: agentArgs(o),
		Env:                      []corev1.EnvVar{{Name: "NODE_NAME", ValueFrom: field("spec.nodeName")}, {Name: "HOST_IP", ValueFrom: field("status.hostIP")}},
		SecurityContext:          &corev1.SecurityContext{Privileged: new(true), RunAsUser: new(int64(0))},
		Resources:                requests("50m", "64Mi"),
		TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError,
		VolumeMounts:             mounts,
	}
	if o.metrics() {
		c.Ports = []corev1.ContainerPort{{Name: "metrics", ContainerPort: o.MetricsPort, HostPort: o.MetricsPort, Protocol: corev1.ProtocolTCP}}
	}
	return corev1.PodSpec{
		ServiceAccountName: AgentName,
		ImagePullSecrets:   pullSecrets(o),
		HostPID:            true,
		HostNetwork:        true,
		PriorityClassName:  "system-node-critical",
		NodeSelector:       map[string]string{corev1.LabelOSStable: "linux"},
		Affinity:           &corev1.Affinity{NodeAffinity: kube.AgentNodes()},
		Tolerations:        []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
		Containers:         []corev1.Container{c},
		Volumes:            volumes,
	}
}

func agentArgs(o *Options) []string {
	args := []string{"agent", "--node=$(NODE_NAME)",
		// The address of control's Service, of either family: a node without DNS starts, too.
		fmt.Sprintf("--control=[$(ASSAY_CONTROL_SERVICE_HOST)]:%d", ControlPort),
		"--node-token=" + tokenFolder + "/token", "--cni-conf=" + o.CNIConf, "--cni-bin=" + o.CNIBin}
	if o.CRISocket != "" {
		args = append(args, "--cri="+o.CRISocket)
	}
	if o.OlderGrace != "" {
		args = append(args, "--older-grace="+o.OlderGrace)
	}
	if o.metrics() {
		return append(args, fmt.Sprintf("--metrics=[$(HOST_IP)]:%d", o.MetricsPort))
	}
	return append(args, "--metrics=")
}

// hostFolders are the node's folders, each at its own path: the agent tells paths to
// processes of the node.
func hostFolders(o *Options) (volumes []corev1.Volume, mounts []corev1.VolumeMount) {
	follow := corev1.MountPropagationHostToContainer
	add := func(name, from, at string, propagation *corev1.MountPropagationMode) {
		kind := corev1.HostPathDirectoryOrCreate
		volumes = append(volumes, corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: from, Type: &kind}}})
		mounts = append(mounts, corev1.VolumeMount{Name: name, MountPath: at, MountPropagation: propagation})
	}
	add("run", "/run", "/run", &follow)
	add("netns", "/run/netns", "/var/run/netns", &follow) // what runtimes call it
	add("cni-conf", o.CNIConf, o.CNIConf, nil)
	add("cni-bin", o.CNIBin, o.CNIBin, nil)
	add("data", data, data, nil)
	add("cgroup", "/sys/fs/cgroup", "/sys/fs/cgroup", &follow)
	if dir := path.Dir(o.CRISocket); o.CRISocket != "" && !inside("/run", dir) && !inside("/var/run", dir) {
		add("cri", dir, dir, &follow)
	}
	return volumes, mounts
}

func inside(folder, dir string) bool {
	return dir == folder || len(dir) > len(folder) && dir[:len(folder)+1] == folder+"/"
}

func metricsService(o *Options) *corev1.Service {
	return &corev1.Service{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Service"}, ObjectMeta: meta(o, AgentName, "agent"),
		Spec: corev1.ServiceSpec{
			ClusterIP: corev1.ClusterIPNone, Selector: selector("agent"),
			Ports: []corev1.ServicePort{{Name: "metrics", Port: o.MetricsPort, TargetPort: intstr.FromString("metrics"), Protocol: corev1.ProtocolTCP}},
		},
	}
}
