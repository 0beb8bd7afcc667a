package install

import (
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

const (
	programs = "/usr/local/bin" // in the image
	data     = "/var/lib/assay"
	run      = "/run/assay"
	user     = 65532 // of control, and of nobody on the nodes
)

// controlObjects are control and the way to it.
func controlObjects(o *Options) []Object {
	list := []Object{controlService(o), controlPolicy(o)}
	if o.StoreSecret != "" {
		list = append(list, authority(o))
	}
	if o.Volume == Claim && !o.several() {
		list = append(list, claim(o))
	}
	if o.Replicas > 1 {
		list = append(list, budget(o))
	}
	return append(list, deployment(o))
}

// authority is empty: the first control makes the key. It may do so in this one alone, and
// therefore does not make it.
func authority(o *Options) *corev1.Secret {
	return &corev1.Secret{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}, ObjectMeta: meta(o, AuthorityName, "control"), Type: corev1.SecretTypeOpaque}
}

// budget lets nodes be drained one control after the other.
func budget(o *Options) *policyv1.PodDisruptionBudget {
	return &policyv1.PodDisruptionBudget{
		TypeMeta: metav1.TypeMeta{APIVersion: policyv1.SchemeGroupVersion.String(), Kind: "PodDisruptionBudget"}, ObjectMeta: meta(o, ControlName, "control"),
		Spec: policyv1.PodDisruptionBudgetSpec{MaxUnavailable: new(intstr.FromInt32(1)), Selector: &metav1.LabelSelector{MatchLabels: selector("control")}},
	}
}

// controlService comes before the agents: its address is in their environment, so that they
// need no DNS.
func controlService(o *Options) *corev1.Service {
	s := &corev1.Service{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Service"}, ObjectMeta: meta(o, ControlName, "control"),
		Spec: corev1.ServiceSpec{
			Selector: selector("control"),
			Ports:    []corev1.ServicePort{{Name: "hosts", Port: ControlPort, TargetPort: intstr.FromString("hosts"), Protocol: corev1.ProtocolTCP}},
		},
	}
	if o.Injector {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: "injector", Port: InjectorPort, TargetPort: intstr.FromString("injector"), Protocol: corev1.ProtocolTCP})
	}
	return s
}

// controlPolicy closes every port but one, for whoever is in the cluster: agents have
// their nodes' addresses, which a policy cannot name. The port takes mutual TLS alone. The injector's
// is for the API server, whose addresses nobody knows; what it answers is no secret.
func controlPolicy(o *Options) *networkingv1.NetworkPolicy {
	tcp, port := corev1.ProtocolTCP, intstr.FromString("hosts")
	ports := []networkingv1.NetworkPolicyPort{{Protocol: &tcp, Port: &port}}
	if o.Injector {
		ports = append(ports, networkingv1.NetworkPolicyPort{Protocol: &tcp, Port: new(intstr.FromString("injector"))})
	}
	return &networkingv1.NetworkPolicy{
		TypeMeta: metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"}, ObjectMeta: meta(o, ControlName, "control"),
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: selector("control")},
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
			Ingress:     []networkingv1.NetworkPolicyIngressRule{{Ports: ports}},
		},
	}
}

func claim(o *Options) *corev1.PersistentVolumeClaim {
	c := &corev1.PersistentVolumeClaim{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PersistentVolumeClaim"}, ObjectMeta: meta(o, ControlName, "control"),
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources:   corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(o.VolumeSize)}},
		},
	}
	if o.StorageClass != "" {
		c.Spec.StorageClassName = &o.StorageClass
	}
	return c
}

// deployment is control. One with a volume is replaced and never doubled, since it has the
// authority, and everything that runs goes on meanwhile; of several the next is ready before
// one ends.
func deployment(o *Options) *appsv1.Deployment {
	strategy := appsv1.DeploymentStrategy{Type: appsv1.RecreateDeploymentStrategyType}
	if o.several() {
		strategy = appsv1.DeploymentStrategy{Type: appsv1.RollingUpdateDeploymentStrategyType,
			RollingUpdate: &appsv1.RollingUpdateDeployment{MaxUnavailable: new(intstr.FromInt32(0)), MaxSurge: new(intstr.FromInt32(1))}}
	}
	return &appsv1.Deployment{
		TypeMeta: metav1.TypeMeta{APIVersion: "apps/v1", Kind: "Deployment"}, ObjectMeta: meta(o, ControlName, "control"),
		Spec: appsv1.DeploymentSpec{
			Replicas: &o.Replicas,
			Strategy: strategy,
			Selector: &metav1.LabelSelector{MatchLabels: selector("control")},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels("control", nil)},
				Spec:       controlPod(o),
			},
		},
	}
}

func controlPod(o *Options) corev1.PodSpec {
	s := corev1.PodSpec{
		ServiceAccountName: ControlName,
		ImagePullSecrets:   pullSecrets(o),
		PriorityClassName:  "system-cluster-critical",
		NodeSelector:       map[string]string{corev1.LabelOSStable: "linux"},
		SecurityContext: &corev1.PodSecurityContext{
			RunAsNonRoot: new(true), RunAsUser: new(int64(user)), RunAsGroup: new(int64(user)), FSGroup: new(int64(user)),
			SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		},
		Containers: []corev1.Container{controlContainer(o)},
		Volumes:    []corev1.Volume{controlVolume(o), {Name: "run", VolumeSource: emptyDir()}, {Name: "tmp", VolumeSource: emptyDir()}},
	}
	if o.Replicas > 1 {
		s.TopologySpreadConstraints = []corev1.TopologySpreadConstraint{spread(corev1.LabelHostname), spread(corev1.LabelTopologyZone)}
	}
	return s
}

// spread keeps controls apart as far as there is room.
func spread(key string) corev1.TopologySpreadConstraint {
	return corev1.TopologySpreadConstraint{MaxSkew: 1, TopologyKey: key, WhenUnsatisfiable: corev1.ScheduleAnyway, LabelSelector: &metav1.LabelSelector{MatchLabels: selector("control")}}
}

func controlContainer(o *Options) corev1.Container {
	c := corev1.Container{
		Name: "control", Image: o.Image, ImagePullPolicy: corev1.PullPolicy(o.PullPolicy),
		Command: []string{programs + "/assay"},
		Args: []string{"control", "--kubernetes",
			"--data=" + data, fmt.Sprintf("--listen=:%d", ControlPort), "--trust-domain=" + o.TrustDomain, "--namespace=" + o.Namespace},
		// Where the operators' socket is, for control and for whoever executes assay in its pod.
		Env:   []corev1.EnvVar{{Name: "ASSAY_RUNTIME", Value: run}},
		Ports: []corev1.ContainerPort{{Name: "hosts", ContainerPort: ControlPort, Protocol: corev1.ProtocolTCP}},
		// It listens when it has read its store, and not while others reach a store that it does not.
		ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromString("hosts")}}, PeriodSeconds: 5},
		Resources:      requests("100m", "128Mi"),
		SecurityContext: &corev1.SecurityContext{
			AllowPrivilegeEscalation: new(false), ReadOnlyRootFilesystem: new(true),
			Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
		},
		TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError,
		VolumeMounts:             []corev1.VolumeMount{{Name: "data", MountPath: data}, {Name: "run", MountPath: run}, {Name: "tmp", MountPath: "/tmp"}},
	}
	if o.KeepCertificates != "" {
		c.Args = append(c.Args, "--keep-certificates="+o.KeepCertificates)
	}
	if o.Injector {
		c.Args = append(c.Args, "--injector-image="+o.Image, "--injector-pull-policy="+o.PullPolicy, fmt.Sprintf("--injector-listen=:%d", InjectorPort),
			// The address of control's own Service, of either family.
			fmt.Sprintf("--injector-control=[$(ASSAY_CONTROL_SERVICE_HOST)]:%d", ControlPort))
		if o.SidecarMetricsPort > 0 {
			c.Args = append(c.Args, fmt.Sprintf("--injector-metrics-port=%d", o.SidecarMetricsPort))
		}
		for _, name := range o.PullSecrets {
			c.Args = append(c.Args, "--injector-pull-secret="+name)
		}
		c.Ports = append(c.Ports, corev1.ContainerPort{Name: "injector", ContainerPort: InjectorPort, Protocol: corev1.ProtocolTCP})
	}
	if o.StoreSecret != "" {
		c.Env = append(c.Env, corev1.EnvVar{Name: "ASSAY_STORE", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{
			LocalObjectReference: corev1.LocalObjectReference{Name: o.StoreSecret}, Key: "url"}}})
		c.Env = append(c.Env, corev1.EnvVar{Name: "POD_IP", ValueFrom: field("status.podIP")})
		c.Args = append(c.Args, "--store=$(ASSAY_STORE)", "--authority-secret="+AuthorityName, fmt.Sprintf("--advertise=[$(POD_IP)]:%d", ControlPort))
	}
	return c
}

func controlVolume(o *Options) corev1.Volume {
	if o.Volume == EmptyDir || o.several() {
		return corev1.Volume{Name: "data", VolumeSource: emptyDir()}
	}
	return corev1.Volume{Name: "data", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: ControlName}}}
}

func emptyDir() corev1.VolumeSource {
	return corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}
}

func field(path string) *corev1.EnvVarSource {
	return &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: path}}
}

// requests have no limits beside them: a limit that is met ends a node's agent, or
// control, when it is needed most.
func requests(cpu, memory string) corev1.ResourceRequirements {
	return corev1.ResourceRequirements{Requests: corev1.ResourceList{
		corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(memory),
	}}
}

func pullSecrets(o *Options) (list []corev1.LocalObjectReference) {
	for _, name := range o.PullSecrets {
		list = append(list, corev1.LocalObjectReference{Name: name})
	}
	return list
}
