package kubernetes_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"assay.dev/kube/install"
)

// policyManifest is a server that a policy guards, and two clients of which it admits one;
// what is named %[1]s is their namespace, %[2]s its labels.
const policyManifest = `apiVersion: v1
kind: Namespace
metadata: {name: %[1]s, labels: {%[2]s}}
---
apiVersion: v1
kind: Pod
metadata: {name: guarded, namespace: %[1]s, labels: {app: guarded}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: c, image: assay.test/echo:1, args: [serve], ports: [{containerPort: 8080}]}
  - {name: d, image: assay.test/echo:1, args: [serve, ":8081"]}
---
apiVersion: v1
kind: Service
metadata: {name: guarded, namespace: %[1]s}
spec: {selector: {app: guarded}, ports: [{name: http, port: 80, targetPort: 8080}, {name: other, port: 81, targetPort: 8081}]}
---
apiVersion: v1
kind: Pod
metadata: {name: a, namespace: %[1]s, labels: {app: a}}
spec: {terminationGracePeriodSeconds: 1, containers: [{name: c, image: assay.test/echo:1, args: [sleep]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: b, namespace: %[1]s, labels: {app: b}}
spec: {terminationGracePeriodSeconds: 1, containers: [{name: c, image: assay.test/echo:1, args: [sleep]}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: guard, namespace: %[1]s}
spec:
  podSelector: {matchLabels: {app: guarded}}
  ingress:
  - from: [{podSelector: {matchLabels: {app: a}}}]
    ports: [{port: 8080}]
`

// enforce does in the node's network what a policy engine does: of the policies that there
// are on what comes to pods, with selectors of pods, it makes rules for what crosses the
// bridge of the node's pods. What begins a connection and is not admitted is dropped; the
// node itself is.
func (k *kinds) enforce(t *testing.T) {
	t.Helper()
	var policies networkingv1.NetworkPolicyList
	if err := json.Unmarshal([]byte(k.c.Kubectl(t, "get", "networkpolicies", "-A", "-o", "json")), &policies); err != nil {
		t.Fatal(err)
	}
	var accepts, drops strings.Builder
	for i := range policies.Items {
		p := &policies.Items[i]
		for _, target := range k.selected(t, p.Namespace, &p.Spec.PodSelector) {
			at := "ip daddr " + target.Status.PodIP
			for _, in := range p.Spec.Ingress {
				for _, from := range k.sources(t, p.Namespace, in.From) {
					for _, port := range ports(t, &target, in.Ports) {
						fmt.Fprintln(&accepts, at, from, port, "accept")
					}
				}
			}
			fmt.Fprintln(&drops, at, "counter name dropped drop")
		}
	}
	rules := accepts.String() + drops.String() // whatever one policy admits is admitted
	chain := func(hook string) string {
		return "chain " + hook + " { type filter hook " + hook + " priority 0;\ntcp flags & (syn | ack) != syn accept\n" +
			"ip saddr { " + k.node.IPv4.String() + ", 10.244.1.1 } accept\n" + rules + "}\n"
	}
	file := "/etc/assay-test-policies.nft"
	write(t, k.node, file, "table bridge policies {}\ndelete table bridge policies\ntable bridge policies {\ncounter dropped {}\n"+chain("forward")+chain("output")+"}\n")
	k.node.MustExec(t, "nft", "-f", file)
}

// sources are matches of who may come: whoever it is, if no peer is named.
func (k *kinds) sources(t *testing.T, namespace string, peers []networkingv1.NetworkPolicyPeer) (matches []string) {
	t.Helper()
	if len(peers) == 0 {
		return []string{""}
	}
	for _, peer := range peers {
		if peer.PodSelector == nil || peer.NamespaceSelector != nil || peer.IPBlock != nil {
			t.Fatalf("a policy of %s has a peer that is not emulated: %+v", namespace, peer)
		}
		for _, p := range k.selected(t, namespace, peer.PodSelector) {
			matches = append(matches, "ip saddr "+p.Status.PodIP)
		}
	}
	return matches
}

// ports are matches of where to in a pod: anywhere, if no port is named. One by its name is
// a container's.
func ports(t *testing.T, target *corev1.Pod, list []networkingv1.NetworkPolicyPort) (matches []string) {
	t.Helper()
	if len(list) == 0 {
		return []string{""}
	}
	for _, p := range list {
		switch {
		case p.Port == nil || p.EndPort != nil || p.Protocol != nil && *p.Protocol != corev1.ProtocolTCP:
			t.Fatalf("a policy of %s has a port that is not emulated: %+v", target.Namespace, p)
		case p.Port.Type == intstr.Int:
			matches = append(matches, fmt.Sprintf("tcp dport %d", p.Port.IntVal))
		}
		for _, c := range target.Spec.Containers {
			for _, named := range c.Ports {
				if p.Port.Type == intstr.String && named.Name == p.Port.StrVal {
					matches = append(matches, fmt.Sprintf("tcp dport %d", named.ContainerPort))
				}
			}
		}
	}
	return matches
}

// selected are pods of a namespace that have an address.
func (k *kinds) selected(t *testing.T, namespace string, s *metav1.LabelSelector) []corev1.Pod {
	t.Helper()
	var list corev1.PodList
	if err := json.Unmarshal([]byte(k.c.Kubectl(t, "get", "pods", "-n", namespace, "-l", selecting(s), "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(list.Items, func(p corev1.Pod) bool { return p.Status.PodIP == "" })
}

// selecting writes a selector as kubectl takes it: one without a word selects all.
func selecting(s *metav1.LabelSelector) string {
	if len(s.MatchLabels)+len(s.MatchExpressions) == 0 {
		return ""
	}
	return metav1.FormatLabelSelector(s)
}

// controlsPort asks control from pods, while its own policy is enforced: the port for
// agents is open to them, and any other is closed. That somebody is there is known from
// before.
func (k *kinds) controlsPort(t *testing.T, at string, enforced bool) {
	t.Helper()
	do := func(namespace string, args ...string) (string, error) {
		return k.c.TryKubectl(t.Context(), "", append([]string{"exec", "-n", namespace, "a", "--", "/bin/echo"}, args...)...)
	}
	for _, namespace := range []string{"policed", "plain"} {
		k.c.Eventually(t, "control's port for agents is open to a pod in "+namespace, func() error {
			_, err := do(namespace, "greet", at+":7400")
			return err
		})
		if enforced {
			if out, err := do(namespace, "try", "http://"+at+":8089/refused"); err == nil {
				t.Errorf("a pod in %s reaches another port of control: %s", namespace, out)
			}
			continue
		}
		k.c.Eventually(t, "nobody closes the other port to a pod in "+namespace, func() error {
			_, err := do(namespace, "try", "http://"+at+":8089/open")
			return err
		})
	}
}

// policies: a policy on the ports that people know means the same in the mesh as without.
func (k *kinds) policies(t *testing.T) {
	meshes := map[string]string{"policed": "assay.dev/mesh: enabled", "plain": ""}
	for namespace, labels := range meshes {
		k.c.Apply(t, fmt.Sprintf(policyManifest, namespace, labels))
	}
	k.c.Apply(t, `apiVersion: assay.dev/v1alpha1
kind: MeshConfig
metadata: {name: default, namespace: policed}
spec: {mode: strict}
`)
	for namespace := range meshes {
		k.c.Kubectl(t, "wait", "-n", namespace, "pod", "--all", "--for=condition=Ready", "--timeout=170s")
	}
	try := func(namespace, from, url string) (string, error) {
		return k.c.TryKubectl(t.Context(), "", "exec", "-n", namespace, from, "--", "/bin/echo", "try", url)
	}
	passes := func(namespace, from, url string) {
		t.Helper()
		k.c.Eventually(t, from+" in "+namespace+" reaches "+url, func() error {
			out, err := try(namespace, from, url)
			if err == nil && !strings.HasPrefix(out, "host=guarded ") {
				err = fmt.Errorf("%s", out)
			}
			return err
		})
	}
	at := map[string]string{}
	for namespace := range meshes {
		at[namespace] = k.read(t, "get", "pod", "-n", namespace, "guarded", "-o", "jsonpath={.status.podIP}")
		for _, url := range []string{"http://guarded/open", "http://guarded:81/open"} { // nobody enforces it yet
			passes(namespace, "a", url)
			passes(namespace, "b", url)
		}
	}
	// Engines leave alone what is open: what is pooled by now is of before the policy.
	for namespace := range meshes {
		k.c.Kubectl(t, "delete", "pod", "-n", namespace, "a", "b", "--grace-period=1")
		k.c.Apply(t, fmt.Sprintf(policyManifest, namespace, meshes[namespace]))
		k.c.Kubectl(t, "wait", "-n", namespace, "pod", "--all", "--for=condition=Ready", "--timeout=170s")
	}
	control := k.selected(t, install.DefaultNamespace, &metav1.LabelSelector{MatchLabels: map[string]string{"app.kubernetes.io/component": "control"}})
	if len(control) != 1 {
		t.Fatalf("there are %d controls", len(control))
	}
	k.c.Kubectl(t, "debug", "-n", install.DefaultNamespace, control[0].Name, "--image=assay.test/echo:debug", "--image-pull-policy=Never", "-c", "debugger", "--", "/bin/echo", "serve", ":8089")
	k.controlsPort(t, control[0].Status.PodIP, false)
	k.enforce(t)
	defer k.node.MustExec(t, "nft", "delete", "table", "bridge", "policies")
	for namespace := range meshes {
		passes(namespace, "a", "http://"+at[namespace]+":8080/admitted")
		passes(namespace, "a", "http://guarded/admitted")
	}
	if out := k.node.MustExec(t, "nft", "list", "counter", "bridge", "policies", "dropped"); !strings.Contains(out, "packets 0 ") {
		t.Errorf("what is admitted goes by other ports, too: %s", out)
	}
	var all sync.WaitGroup
	for namespace := range meshes {
		direct := "http://" + at[namespace]
		for from, urls := range map[string][]string{
			"b": {direct + ":8080/refused", direct + ":8081/refused", "http://guarded/refused", "http://guarded:81/refused"},
			"a": {direct + ":8081/refused", "http://guarded:81/refused"},
		} {
			for _, url := range urls {
				all.Go(func() {
					if out, err := try(namespace, from, url); err == nil {
						t.Errorf("%s in %s reaches %s, which the policy does not admit: %s", from, namespace, url, out)
					}
				})
			}
		}
	}
	all.Wait()
	k.controlsPort(t, control[0].Status.PodIP, true)
	if out := k.c.Kubectl(t, "logs", "-n", install.DefaultNamespace, control[0].Name, "-c", "debugger", "--tail=-1"); strings.Contains(out, "/refused") {
		t.Errorf("control's other port was asked:\n%s", out)
	}
	for namespace := range meshes {
		passes(namespace, "a", "http://guarded/admitted") // still
		for _, c := range []string{"c", "d"} {
			if out := k.c.Kubectl(t, "logs", "-n", namespace, "guarded", "-c", c, "--tail=-1"); strings.Contains(out, "/refused") {
				t.Errorf("the server in %s was asked:\n%s", namespace, out)
			}
		}
	}
	k.c.Kubectl(t, "delete", "networkpolicy", "-n", "policed", "guard")
	k.enforce(t)
	passes("policed", "b", "http://guarded/open")
}
