package install

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func node(name, kernel, runtime string) (n corev1.Node) {
	n.Name = name
	n.Status.NodeInfo = corev1.NodeSystemInfo{KernelVersion: kernel, ContainerRuntimeVersion: runtime, OperatingSystem: "linux"}
	return n
}

func daemon(name string, env ...corev1.EnvVar) (d appsv1.DaemonSet) {
	d.Name = name
	d.Spec.Template.Spec.Containers = []corev1.Container{{Name: "c", Env: env}}
	return d
}

func pod(namespace, name string, change func(*corev1.Pod)) (p corev1.Pod) {
	p.Namespace, p.Name = namespace, name
	p.Spec.Containers = []corev1.Container{{Name: "app"}}
	if change != nil {
		change(&p)
	}
	return p
}

func gatewayAPI(version string) apiextensionsv1.CustomResourceDefinition {
	return apiextensionsv1.CustomResourceDefinition{ObjectMeta: metav1.ObjectMeta{Name: "httproutes.gateway.networking.k8s.io",
		Annotations: map[string]string{"gateway.networking.k8s.io/bundle-version": version, "gateway.networking.k8s.io/channel": "standard"}}}
}

func capable(c corev1.Capability) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{Capabilities: &corev1.Capabilities{Add: []corev1.Capability{c}}}
	}
}

// TestJudge: what is said of clusters good and bad.
func TestJudge(t *testing.T) {
	good := func() *Facts {
		return &Facts{Version: "v1.36.3", Nodes: []corev1.Node{node("n1", "6.1.0-13-amd64", "containerd://2.4.2")}}
	}
	kata := nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: "sandboxed"}, Handler: "kata-qemu"}
	for name, x := range map[string]struct {
		change func(*Facts)
		want   []string // "check status subject", without those that are ok
	}{
		"good":       {func(f *Facts) {}, nil},
		"future":     {func(f *Facts) { f.Version = "v1.99.0" }, nil},
		"old":        {func(f *Facts) { f.Version = "v1.28.4-eks" }, []string{"kubernetes warn v1.28.4-eks"}},
		"ancient":    {func(f *Facts) { f.Version = "v1.19.0" }, []string{"kubernetes fail v1.19.0"}},
		"no version": {func(f *Facts) { f.Version = "x" }, []string{"kubernetes fail x"}},
		"kernels": {func(f *Facts) {
			f.Nodes = append(f.Nodes, node("n2", "5.4.0", "containerd://1.7.0"), node("n3", "5.17.0", "cri-o://1.30.0"), node("n4", "5.16.20", "docker://20.10"), node("n5", "5.4.0", "containerd://1.4.9"))
		}, []string{"kernel fail 5.16.20: n4", "kernel fail 5.4.0: n2, n5", "runtime warn containerd://1.4.9: n5", "runtime warn cri-o://1.30.0: n3", "runtime fail docker://20.10: n4"}},
		"windows": {func(f *Facts) {
			w := node("w", "10.0", "containerd://1.7")
			w.Status.NodeInfo.OperatingSystem = "windows"
			f.Nodes = append(f.Nodes, w)
		}, []string{"kernel warn Windows: w"}},
		"virtual": {func(f *Facts) {
			v, x := node("fargate-1", "5.10.0", "containerd://1.4"), node("aci", "", "")
			v.Labels, x.Labels = map[string]string{"eks.amazonaws.com/compute-type": "fargate"}, map[string]string{"type": "virtual-kubelet"}
			f.Nodes = append(f.Nodes, v, x)
		}, []string{"kernel warn nodes in name only: aci, fargate-1"}},
		"no nodes":        {func(f *Facts) { f.Nodes = nil }, []string{"kernel fail no nodes"}},
		"multus":          {func(f *Facts) { f.DaemonSets = append(f.DaemonSets, daemon("calico-node"), daemon("kube-multus-ds")) }, []string{"network warn Multus"}},
		"cilium beside":   {func(f *Facts) { f.Cilium = map[string]string{"kube-proxy-replacement": "false"} }, nil},
		"cilium in place": {func(f *Facts) { f.Cilium = map[string]string{"kube-proxy-replacement": "true"} }, []string{"socket-lb fail Cilium, socket-level load balancing"}},
		"cilium, host alone": {func(f *Facts) {
			f.Cilium = map[string]string{"kube-proxy-replacement": "strict", "bpf-lb-sock-hostns-only": "true"}
		}, nil},
		"calico ebpf": {func(f *Facts) {
			f.DaemonSets = append(f.DaemonSets, daemon("calico-node", corev1.EnvVar{Name: "FELIX_BPFENABLED", Value: "true"}))
		}, []string{"socket-lb fail Calico, eBPF data plane"}},
		"kata unused": {func(f *Facts) { f.RuntimeClasses = append(f.RuntimeClasses, kata) }, nil},
		"kata": {func(f *Facts) {
			f.RuntimeClasses = append(f.RuntimeClasses, kata)
			f.Pods = append(f.Pods, pod("bank", "vault", func(p *corev1.Pod) { p.Spec.RuntimeClassName = new("sandboxed") }))
		}, []string{"runtime-class warn sandboxed"}},
		"pods": {func(f *Facts) {
			host := func(p *corev1.Pod) { p.Spec.HostNetwork = true }
			static := func(p *corev1.Pod) { p.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "5e8a"} }
			f.Pods = append(f.Pods,
				pod("kube-system", "kube-proxy", host), pod("ops", "exporter", host), pod("ops", "ended", func(p *corev1.Pod) { host(p); p.Status.Phase = corev1.PodSucceeded }),
				pod("kube-system", "etcd", static), pod("bank", "store", static), pod("ops", "both", func(p *corev1.Pod) { host(p); static(p) }),
				pod("bank", "vpn", capable("NET_ADMIN")), pod("bank", "plain", capable("NET_BIND_SERVICE")), pod("bank", "any", capable("CAP_ALL")),
				pod("bank", "root", func(p *corev1.Pod) {
					p.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{Privileged: new(true)}
				}),
				pod("old", "web", func(p *corev1.Pod) {
					p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Name: "istio-proxy"})
				}),
				pod("assay-system", "assay-agent-x", func(p *corev1.Pod) { host(p); p.Labels = labels("agent", nil) }))
		}, []string{"host-network warn namespace ops: both, exporter", "static-pod warn namespace bank: store", "net-admin warn namespace bank: any, root, vpn", "other-mesh warn namespace old: web"}},
		"old gateway API":     {func(f *Facts) { f.Definitions = append(f.Definitions, gatewayAPI("v0.8.1")) }, []string{"gateway-api warn v0.8.1 standard"}},
		"gateway API of 2023": {func(f *Facts) { f.Definitions = append(f.Definitions, gatewayAPI("v1.0.0")) }, []string{"gateway-api warn v1.0.0 standard"}},
		"gateway API":         {func(f *Facts) { f.Definitions = append(f.Definitions, gatewayAPI("v1.6.3")) }, nil},
		"hidden":              {func(f *Facts) { f.Nodes, f.Hidden = nil, []string{"nodes"} }, []string{"access warn nodes"}},
	} {
		f := good()
		x.change(f)
		var got []string
		for _, j := range Judge(f) {
			if j.Detail == "" || j.Subject == "" {
				t.Errorf("%s: %+v says nothing", name, j)
			}
			if j.Status != OK {
				got = append(got, fmt.Sprintf("%s %s %s", j.Check, j.Status, j.Subject))
				if j.Remedy == "" && !strings.Contains(j.Subject, "Windows") {
					t.Errorf("%s: %+v has no remedy", name, j)
				}
			}
		}
		if strings.Join(got, "\n") != strings.Join(x.want, "\n") {
			t.Errorf("%s:\n%s\nwant:\n%s", name, strings.Join(got, "\n"), strings.Join(x.want, "\n"))
		}
	}
}

// TestNotTested: a kernel or a containerd of which nobody has tried the mesh is good news
// with a remark, and of what was tried there is none.
func TestNotTested(t *testing.T) {
	for _, x := range []struct {
		kernel, runtime string
		tested          []string // checks
	}{
		{"6.18.5-cloud", "containerd://2.4.2", []string{"kernel", "runtime"}},
		{"6.18.0", "containerd://1.7.27", []string{"kernel"}},
		{"6.1.0-13-amd64", "containerd://2.4.0", []string{"runtime"}},
		{"5.17.1", "containerd://2.14.0", nil},
	} {
		var got []string
		for _, j := range Judge(&Facts{Version: "v1.36.3", Nodes: []corev1.Node{node("n1", x.kernel, x.runtime)}}) {
			if j.Check != "kernel" && j.Check != "runtime" {
				continue
			}
			if j.Status != OK {
				t.Errorf("%+v is no good news", j)
			}
			if strings.HasSuffix(j.Detail, "; tested") {
				got = append(got, j.Check)
			} else if !strings.Contains(j.Detail, "; not tested, ") {
				t.Errorf("%+v: tested or not?", j)
			}
		}
		if !slices.Equal(got, x.tested) {
			t.Errorf("%s, %s: tested are %v, want %v", x.kernel, x.runtime, got, x.tested)
		}
	}
}

// TestTroubles: the reason is found where it is.
func TestTroubles(t *testing.T) {
	waiting := func(node, reason, message string) corev1.Pod {
		return pod("assay-system", "assay-agent-"+node, func(p *corev1.Pod) {
			p.Spec.NodeName = node
			p.Status.ContainerStatuses = []corev1.ContainerStatus{{State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}}}}
		})
	}
	event := func(kind, name, uid, reason, message string) (e corev1.Event) {
		e.Type, e.Reason, e.Message = corev1.EventTypeWarning, reason, message
		e.InvolvedObject = corev1.ObjectReference{Kind: kind, Name: name, UID: "other"}
		if uid != "" {
			e.InvolvedObject.UID = "uid"
		}
		return e
	}
	crashed := waiting("n2", "CrashLoopBackOff", "back-off")
	crashed.Status.ContainerStatuses[0].LastTerminationState.Terminated = &corev1.ContainerStateTerminated{ExitCode: 1, Message: "starting\nassay: run the agent: no kernel\n"}
	ready := waiting("n3", "", "")
	ready.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	unscheduled := pod("assay-system", "assay-control-1", func(p *corev1.Pod) {
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Message: "0/3 nodes: no volume"}}
	})
	creating := waiting("n4", "ContainerCreating", "")
	creating.UID = "uid"
	for name, x := range map[string]struct {
		component string
		pods      []corev1.Pod
		events    []corev1.Event
		want      string
	}{
		"image":       {"agent", []corev1.Pod{waiting("n1", "ErrImageNeverPull", "not there"), ready}, nil, "n1: ErrImageNeverPull: not there"},
		"crash":       {"agent", []corev1.Pod{crashed}, nil, "n2: ended with exit code 1: assay: run the agent: no kernel"},
		"scheduling":  {"control", []corev1.Pod{unscheduled}, nil, "assay-control-1: no node takes it: 0/3 nodes: no volume"},
		"mount":       {"agent", []corev1.Pod{creating}, []corev1.Event{event("Pod", "x", "uid", "FailedMount", "no such volume")}, "n4: FailedMount: no such volume"},
		"not made":    {"agent", nil, []corev1.Event{event("DaemonSet", "assay-agent", "", "FailedCreate", "quota")}, "FailedCreate: quota"},
		"of another":  {"agent", nil, []corev1.Event{event("ReplicaSet", "assay-control-5d", "", "FailedCreate", "quota")}, ""},
		"five at all": {"agent", []corev1.Pod{waiting("n1", "A", ""), waiting("n2", "A", ""), waiting("n3", "A", ""), waiting("n4", "A", ""), waiting("n5", "A", "")}, nil, "n1: A; n2: A; n3: A; and 2 more"},
	} {
		if got := strings.Join(Troubles(x.component, x.pods, x.events), "; "); got != x.want {
			t.Errorf("%s: %q, want %q", name, got, x.want)
		}
	}
}
