package install

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"assay.dev/kube"
)

// Status of a judgement.
type Status string

// A judgement is good news; something that will not work as one may expect; something
// because of which the mesh will not work.
const (
	OK   Status = "ok"
	Warn Status = "warn"
	Fail Status = "fail"
)

// Judgement is what one fact means for the mesh. Its form in JSON is stable.
type Judgement struct {
	Check   string `json:"check"` // kubernetes, kernel, runtime, network, …
	Status  Status `json:"status"`
	Subject string `json:"subject"`
	Detail  string `json:"detail"`           // the consequence
	Remedy  string `json:"remedy,omitempty"` // what would change it
}

// leastKernel is the first with SO_MARK for CAP_NET_RAW (socket(7)): proxies have no other
// capability.
var leastKernel = release{5, 17}

// tested is the release of Kubernetes that the suites run on, and testedKernel and
// testedContainerd those of the kernel and of containerd.
const tested = "v1.36"

var testedKernel, testedContainerd = release{6, 18}, release{2, 4}

// Judge says what the facts mean, in a fixed order: by check, then subject.
func Judge(f *Facts) []Judgement {
	all := slices.Concat(judgeVersion(f), judgeNodes(f), judgeNetwork(f), judgeSocketLB(f), judgeRuntimeClasses(f), judgePods(f), judgeGateway(f))
	for _, what := range f.Hidden {
		all = append(all, Judgement{"access", Warn, what, "this account may not see them: what follows from them is not checked", "use an account that administers the cluster"})
	}
	return all
}

// release is a version's first two numbers.
type release [2]int

var numbers = regexp.MustCompile(`(\d+)\.(\d+)`)

func readRelease(s string) (r release, ok bool) {
	m := numbers.FindStringSubmatch(s)
	if m == nil {
		return r, false
	}
	r[0], _ = strconv.Atoi(m[1])
	r[1], _ = strconv.Atoi(m[2])
	return r, true
}

func (r release) String() string { return fmt.Sprintf("%d.%d", r[0], r[1]) }

func (r release) less(o release) bool { return slices.Compare(r[:], o[:]) < 0 }

func judgeVersion(f *Facts) []Judgement {
	j := Judgement{Check: "kubernetes", Status: OK, Subject: f.Version, Detail: "tested with " + tested}
	r, ok := readRelease(f.Version)
	switch {
	case !ok || r.less(release{1, 25}):
		j.Status, j.Detail, j.Remedy = Fail, "objects of the installation are not known to it, or to be trusted", "upgrade to "+tested+", 1.30 at least"
	case r.less(release{1, 30}):
		j.Status, j.Detail, j.Remedy = Warn, "tokens do not name their node before 1.30, and this release is not tested", "upgrade to 1.30 or later"
	case !strings.HasPrefix(f.Version, tested+"."):
		j.Detail = "not tested; " + tested + " is"
	}
	return []Judgement{j}
}

// judgeNodes groups the nodes by what counts.
func judgeNodes(f *Facts) (list []Judgement) {
	kernels, runtimes := map[string][]string{}, map[string][]string{}
	var windows, virtual []string
	for i := range f.Nodes {
		n := &f.Nodes[i]
		info := n.Status.NodeInfo
		if info.OperatingSystem == "windows" {
			windows = append(windows, n.Name)
			continue
		}
		if kube.Virtual(n.Labels) {
			virtual = append(virtual, n.Name)
			continue
		}
		kernels[info.KernelVersion] = append(kernels[info.KernelVersion], n.Name)
		runtimes[info.ContainerRuntimeVersion] = append(runtimes[info.ContainerRuntimeVersion], n.Name)
	}
	for _, k := range slices.Sorted(maps.Keys(kernels)) {
		j := Judgement{Check: "kernel", Status: OK, Subject: k + ": " + some(kernels[k]), Detail: "has what capturing needs; tested"}
		r, ok := readRelease(k)
		switch {
		case !ok || r.less(leastKernel):
			j.Status, j.Detail = Fail, "before 5.17 a proxy without CAP_NET_ADMIN may not mark its own connections: no pod of these nodes can be meshed"
			j.Remedy = "upgrade the nodes' kernel to 5.17 or later"
		case r != testedKernel:
			j.Detail = "has what capturing needs by its number; not tested, " + testedKernel.String() + " is"
		}
		list = append(list, j)
	}
	for _, v := range slices.Sorted(maps.Keys(runtimes)) {
		list = append(list, judgeRuntime(v, runtimes[v]))
	}
	if len(windows) > 0 {
		list = append(list, Judgement{"kernel", Warn, "Windows: " + some(windows), "pods of these nodes stay outside the mesh", ""})
	}
	if len(virtual) > 0 {
		list = append(list, Judgement{"kernel", Warn, "nodes in name only: " + some(virtual), "no agent can be where their pods are, which stay outside the mesh", "keep what is to be in the mesh on other nodes"})
	}
	if len(f.Nodes) == 0 && !slices.Contains(f.Hidden, "nodes") {
		list = append(list, Judgement{"kernel", Fail, "no nodes", "there is nothing to run on", "add a node"})
	}
	return list
}

func judgeRuntime(version string, nodes []string) Judgement {
	name, number, _ := strings.Cut(version, "://")
	j := Judgement{Check: "runtime", Status: OK, Subject: version + ": " + some(nodes)}
	switch name {
	case "containerd":
		j.Detail = "tells which images run, down to their manifests; tested"
		r, ok := readRelease(number)
		switch {
		case !ok || r.less(release{1, 6}):
			j.Status, j.Detail, j.Remedy = Warn, "not tested, and before 1.6 nothing is expected of it", "upgrade it"
		case r != testedContainerd:
			j.Detail = "tells which images run, down to their manifests; not tested, " + testedContainerd.String() + " is"
		}
	case "cri-o":
		j.Status, j.Detail = Warn, "not tested; the digests of what runs may stay unproven"
		j.Remedy = "try it on one node first"
	default:
		j.Status, j.Detail = Fail, "not known: what its containers run cannot be attested"
		j.Remedy = "use containerd"
	}
	return j
}

// some names a few and counts the others.
func some(names []string) string {
	names = slices.Sorted(slices.Values(names))
	if n := len(names); n > 5 {
		return strings.Join(names[:5], ", ") + fmt.Sprintf(" and %d more", n-5)
	}
	return strings.Join(names, ", ")
}

// networks are network plugins by their DaemonSets.
var networks = map[string]string{
	"calico-node": "Calico", "canal": "Canal", "cilium": "Cilium", "aws-node": "Amazon VPC CNI", "azure-cns": "Azure CNI", "kube-flannel-ds": "Flannel",
	"kube-flannel": "Flannel", "weave-net": "Weave Net", "antrea-agent": "Antrea", "ovnkube-node": "OVN-Kubernetes", "kindnet": "kindnet", "kube-router": "kube-router",
	"netd": "GKE netd",
}

func judgeNetwork(f *Facts) (list []Judgement) {
	for _, d := range f.DaemonSets {
		switch name := networks[d.Name]; {
		case name != "":
			list = append(list, Judgement{"network", OK, name, "not tested with it; Assay's plugin is chained after it, whatever it writes into its configuration", ""})
		case d.Name == "kube-multus-ds" || d.Name == "multus":
			list = append(list, Judgement{"network", Warn, "Multus", "what goes over a pod's second network is not captured", "keep services that should be meshed on the first"})
		}
	}
	if len(list) == 0 && !slices.Contains(f.Hidden, "daemonsets") {
		list = append(list, Judgement{"network", OK, "no plugin that is known by name", "Assay's plugin is chained after whatever is first in the CNI folder; tested with bridge and host-local", ""})
	}
	return list
}

// judgeSocketLB finds who translates addresses of services inside connect(), where no rule
// of a network namespace sees them.
func judgeSocketLB(f *Facts) []Judgement {
	const detail = "the addresses of services are translated in connect(), before the mesh sees them: connections are encrypted and identified, but routes, retries and limits of services do not apply"
	if f.Cilium != nil {
		replaces := f.Cilium["kube-proxy-replacement"]
		on := replaces == "true" || replaces == "strict" || f.Cilium["bpf-lb-sock"] == "true"
		if on && f.Cilium["bpf-lb-sock-hostns-only"] != "true" {
			return []Judgement{{"socket-lb", Fail, "Cilium, socket-level load balancing", detail, "set socketLB.hostNamespaceOnly=true (bpf-lb-sock-hostns-only) and restart Cilium's agents"}}
		}
		return []Judgement{{"socket-lb", OK, "Cilium", "addresses of services reach the mesh as applications dial them", ""}}
	}
	for _, d := range f.DaemonSets {
		if d.Name != "calico-node" {
			continue
		}
		for _, c := range d.Spec.Template.Spec.Containers {
			if slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == "FELIX_BPFENABLED" && e.Value == "true" }) {
				return []Judgement{{"socket-lb", Fail, "Calico, eBPF data plane", detail, "set bpfConnectTimeLoadBalancing: Disabled in its FelixConfiguration"}}
			}
		}
	}
	return nil
}

// apart are runtimes whose pods have a kernel, or a network stack, of their own.
var apart = regexp.MustCompile(`(?i)runsc|gvisor|kata|firecracker`)

func judgeRuntimeClasses(f *Facts) (list []Judgement) {
	for _, c := range f.RuntimeClasses {
		if !apart.MatchString(c.Handler) && !apart.MatchString(c.Name) {
			continue
		}
		var pods []string
		for i := range f.Pods {
			if p := &f.Pods[i]; !ended(p) && p.Spec.RuntimeClassName != nil && *p.Spec.RuntimeClassName == c.Name {
				pods = append(pods, p.Namespace+"/"+p.Name)
			}
		}
		j := Judgement{Check: "runtime-class", Status: OK, Subject: c.Name, Detail: "no pod uses it; one that does cannot be meshed"}
		if len(pods) > 0 {
			j.Status, j.Detail = Warn, "their connections do not pass the node's network stack as those of others do: they cannot be meshed: "+some(pods)
			j.Remedy = "leave their namespaces unlabelled, or label the pods " + MeshLabel + ": disabled"
		}
		list = append(list, j)
	}
	return list
}

func ended(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

// sidecars are the containers of other meshes.
var sidecars = []string{"istio-proxy", "linkerd-proxy", "kuma-sidecar", "consul-dataplane", "envoy-sidecar"}

// judgePods finds the pods that are captured otherwise than one expects, or not at all.
func judgePods(f *Facts) (list []Judgement) {
	hostNetwork, static, netAdmin, others := map[string][]string{}, map[string][]string{}, map[string][]string{}, map[string][]string{}
	for i := range f.Pods {
		p := &f.Pods[i]
		if ended(p) || p.Namespace == "kube-system" || p.Labels["app.kubernetes.io/part-of"] == "assay" {
			continue // never meshed
		}
		_, mirror := p.Annotations[corev1.MirrorPodAnnotationKey]
		switch {
		case p.Spec.HostNetwork:
			hostNetwork[p.Namespace] = append(hostNetwork[p.Namespace], p.Name)
		case mirror:
			static[p.Namespace] = append(static[p.Namespace], p.Name)
		case mayChangeRules(p):
			netAdmin[p.Namespace] = append(netAdmin[p.Namespace], p.Name)
		}
		if slices.ContainsFunc(p.Spec.Containers, isSidecar) || slices.ContainsFunc(p.Spec.InitContainers, isSidecar) {
			others[p.Namespace] = append(others[p.Namespace], p.Name)
		}
	}
	add := func(check string, found map[string][]string, detail, remedy string) {
		for _, ns := range slices.Sorted(maps.Keys(found)) {
			list = append(list, Judgement{check, Warn, fmt.Sprintf("namespace %s: %s", ns, some(found[ns])), detail, remedy})
		}
	}
	add("host-network", hostNetwork, "pods with their node's network are never meshed: they are guests, served in observe and refused in strict",
		"keep namespaces that they call in observe, or give the pods a network of their own")
	add("static-pod", static, "static pods, which a file on their node makes, are never meshed: they are guests, served in observe and refused in strict",
		"keep namespaces that they call in observe, or make them DaemonSets")
	add("net-admin", netAdmin, "these containers may change the rules of their pod and leave its capture; whoever they call still wants an identity, or counts a guest",
		"take NET_ADMIN and privileged from them, where they can do without")
	add("other-mesh", others, "these pods have a sidecar of another mesh, which captures the same connections", "leave their namespaces unlabelled until the sidecar is gone")
	return list
}

func isSidecar(c corev1.Container) bool { return slices.Contains(sidecars, c.Name) }

func mayChangeRules(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Spec.Containers, func(c corev1.Container) bool {
		s := c.SecurityContext
		if s == nil {
			return false
		}
		if s.Privileged != nil && *s.Privileged {
			return true
		}
		return s.Capabilities != nil && slices.ContainsFunc(s.Capabilities.Add, func(x corev1.Capability) bool {
			return slices.Contains([]string{"NET_ADMIN", "SYS_ADMIN", "ALL"}, strings.TrimPrefix(strings.ToUpper(string(x)), "CAP_"))
		})
	})
}

// judgeGateway looks at the Gateway API, which belongs to the cluster and is never
// installed from here.
func judgeGateway(f *Facts) []Judgement {
	if slices.Contains(f.Hidden, "definitions") {
		return nil
	}
	for _, d := range f.Definitions {
		if d.Name != "httproutes.gateway.networking.k8s.io" {
			continue
		}
		version, channel := d.Annotations["gateway.networking.k8s.io/bundle-version"], d.Annotations["gateway.networking.k8s.io/channel"]
		j := Judgement{"gateway-api", OK, strings.TrimSpace(version + " " + channel), "routes attached to services are followed", ""}
		if r, ok := readRelease(version); !ok || r.less(release{1, 0}) {
			j.Status, j.Detail, j.Remedy = Warn, "before v1.0 routes have a form that is not read", "upgrade the Gateway API"
		} else if r.less(release{1, 1}) {
			j.Status, j.Detail, j.Remedy = Warn, "GRPCRoute has the form that is read since v1.1", "upgrade the Gateway API"
		}
		return []Judgement{j}
	}
	return []Judgement{{"gateway-api", OK, "not installed", "the mesh works without; routes can be declared once it is, and it is noticed", ""}}
}
