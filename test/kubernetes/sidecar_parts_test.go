package kubernetes_test

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"assay.dev/kube/install"
	"assay.dev/test/kubernetes"
)

// restart: a sidecar's container that dies comes back, and the application notices that its
// connections broke, and nothing else.
func (s *sides) restart(t *testing.T) {
	c := s.cluster
	server := s.podOf(t, "server")
	// The kernel ends the proxy with it: nothing passes beside.
	c.Nodes[0].MustExec(t, "sh", "-c", `for p in $(pgrep -f "^/usr/local/bin/assay sidecar( --metrics=.*)?$"); do
		if tr '\0' '\n' </proc/$p/environ | grep -q "^POD_UID=`+server.Metadata.UID+`$"; then kill -9 $p; fi; done`)
	c.Eventually(t, "the sidecar is back", func() error {
		now := s.pod(t, server.Metadata.Name)
		first := now.Status.InitContainerStatuses[0]
		if first.RestartCount != 1 || !first.Ready {
			return fmt.Errorf("%+v", first)
		}
		for _, status := range now.Status.ContainerStatuses {
			if status.RestartCount != 0 || !status.Ready {
				return fmt.Errorf("%+v", status)
			}
		}
		return nil
	})
	c.Eventually(t, "the server is asked again", func() error {
		out, err := s.call(t, "http://server/again")
		if err != nil || !strings.Contains(out, "client="+s.pod(t, "caller").Status.PodIP+" ") {
			return fmt.Errorf("%v %s", err, out)
		}
		return nil
	})
	if out, err := c.TryKubectl(t.Context(), "", "exec", "outsider", "--", "/bin/echo", "try", "http://server.side/"); err == nil {
		t.Errorf("an outsider is answered: %s", out)
	}
	s.goesOn(t)
}

// controlAway: without control no pod that asks for a sidecar is made, and the reason is clear; those
// that run go on.
func (s *sides) controlAway(t *testing.T) {
	c := s.cluster
	c.Kubectl(t, "scale", "-n", install.DefaultNamespace, "deployment/assay-control", "--replicas=0")
	c.Kubectl(t, "wait", "-n", install.DefaultNamespace, "--for=delete", "pod", "-l", "app.kubernetes.io/component=control", "--timeout=120s")
	var out string
	c.Eventually(t, "a pod is refused", func() (err error) {
		if out, err = c.TryKubectl(t.Context(), "", "run", "late", "-n", "side", "--image", kubernetes.EchoImage, "--", "sleep"); err == nil {
			c.Kubectl(t, "delete", "pod", "-n", "side", "late", "--wait=true")
			return fmt.Errorf("%s", out)
		}
		out += err.Error()
		return nil
	})
	if !strings.Contains(out, "failed calling webhook") || !strings.Contains(out, "injector.assay.dev") {
		t.Errorf("the reason: %s", out)
	}
	c.Kubectl(t, "run", "plain", "--image", kubernetes.EchoImage, "--", "sleep") // nobody asks about others
	if out, err := s.call(t, "http://server/without-control"); err != nil {
		t.Errorf("those that run: %v\n%s", err, out)
	}
	c.Kubectl(t, "scale", "-n", install.DefaultNamespace, "deployment/assay-control", "--replicas=1")
	c.Rollout(t, install.DefaultNamespace, "deployment/assay-control")
	c.Eventually(t, "a pod is made", func() error {
		out, err := c.TryKubectl(t.Context(), "", "run", "late", "-n", "side", "--image", kubernetes.EchoImage, "--", "sleep")
		if err != nil {
			return fmt.Errorf("%w %s", err, out)
		}
		return nil
	})
	c.Kubectl(t, "wait", "-n", "side", "--for=condition=Ready", "pod/late", "--timeout=180s")
	uid := s.pod(t, "late").Metadata.UID
	c.Eventually(t, "it is in the mesh", func() error {
		if w, there := s.workloadsOf(t)[uid]; !there || w.Serial == "" {
			return fmt.Errorf("%v %+v", there, w)
		}
		return nil
	})
}

// lateComer makes a pod before its namespace is labelled.
func (s *sides) lateComer(t *testing.T) {
	s.cluster.Kubectl(t, "create", "namespace", "old")
	s.cluster.Kubectl(t, "create", "deployment", "older", "-n", "old", "--image", kubernetes.EchoImage, "--", "/bin/echo", "sleep")
	s.cluster.Rollout(t, "old", "deployment/older")
	s.cluster.Kubectl(t, "label", "namespace", "old", install.MeshLabel+"=sidecar")
}

// check: pods that lack a sidecar are named, with what helps.
func (s *sides) check(t *testing.T) {
	c := s.cluster
	if out, _ := s.run(t, "kubectl", "assay", "check"); !strings.Contains(out, "pod-without-sidecar") || !strings.Contains(out, "old/older-") || strings.Contains(out, "sidecar-not-joined") || strings.Contains(out, "node-without-agent") {
		t.Errorf("check:\n%s", out)
	}
	c.Kubectl(t, "rollout", "restart", "-n", "old", "deployment/older")
	c.Rollout(t, "old", "deployment/older")
	c.Eventually(t, "nothing is found", func() error {
		if out, _ := s.run(t, "kubectl", "assay", "check"); strings.Contains(out, "pod-without-sidecar") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	if out := s.must(t, "kubectl", "run", "host", "-n", "old", "--image", kubernetes.EchoImage, "--overrides", `{"spec":{"hostNetwork":true}}`, "--", "sleep"); !strings.Contains(out, "Warning: assay: a pod in its node's network cannot be meshed") {
		t.Errorf("a pod in its node's network: %s", out)
	}
	c.Kubectl(t, "delete", "pod", "-n", "old", "host", "--wait=true")
}

// bothManifest is an application of the agents' pods.
const bothManifest = `apiVersion: v1
kind: Namespace
metadata: {name: both, labels: {assay.dev/mesh: enabled}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: both, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: web, image: ` + kubernetes.EchoImage + `, args: [serve]}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: both}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
`

// both: with agents too, pods of both kinds are one mesh, each known by who speaks for it.
func (s *sides) both(t *testing.T) {
	c := s.cluster
	if out := s.must(t, "assay", append(slices.Clone(lifeInstall), "--injector")...); !strings.Contains(out, "1 of 1 nodes have joined") {
		t.Errorf("install says:\n%s", out)
	}
	c.Apply(t, bothManifest)
	c.Kubectl(t, "wait", "-n", "both", "--for=condition=Ready", "pod/web", "--timeout=150s")
	var web sidePod
	c.Get(t, "/api/v1/namespaces/both/pods/web", &web)
	if len(web.Spec.InitContainers) > 0 {
		t.Errorf("a pod of the agent's has %+v", web.Spec.InitContainers)
	}
	c.Eventually(t, "the agent's pod is asked under mutual TLS, and asks", func() error {
		for _, url := range []string{"http://web.both/both", "http://server/both"} {
			if out, err := s.call(t, url); err != nil || !strings.Contains(out, "client="+s.pod(t, "caller").Status.PodIP+" ") {
				return fmt.Errorf("%v %s", err, out)
			}
		}
		out, err := c.TryKubectl(t.Context(), "", "exec", "-n", "both", "web", "--", "/bin/echo", "get", "http://server.side/both")
		if err != nil || !strings.Contains(out, "client="+web.Status.PodIP+" ") {
			return fmt.Errorf("%v %s", err, out)
		}
		out = s.must(t, "kubectl", "assay", "edges")
		for _, edge := range []string{`side/default .* both/web:80 .* mtls `, `both/default .* side/server:80 .* mtls `} {
			if !regexp.MustCompile(`(?m)^` + edge).MatchString(out) {
				return fmt.Errorf("no %s:\n%s", edge, out)
			}
		}
		return nil
	})
	if out := s.must(t, "kubectl", "assay", "get", "workloads"); strings.Count(out, "\nboth ") != 1 || strings.Count(out, "(api-server)") != strings.Count(out, "\nside ")+strings.Count(out, "\nold ") {
		t.Errorf("who says what runs:\n%s", out)
	}
	c.Kubectl(t, "delete", "namespace", "both", "--wait=true")
}

// uninstall: it waits for pods that have a sidecar, which get none any more.
func (s *sides) uninstall(t *testing.T, objects []string) {
	c := s.cluster
	if out, code := s.run(t, "assay", "uninstall", "--purge", "--timeout", "7m"); code != 1 || !strings.Contains(out, "pods with a sidecar") || !strings.Contains(out, "restart them") {
		t.Errorf("with sidecars: exit code %d\n%s", code, out)
	}
	c.Kubectl(t, "delete", "meshconfig", "-n", "side", "default")
	c.Kubectl(t, "rollout", "restart", "-n", "old", "deployment/older")
	c.Kubectl(t, "rollout", "restart", "-n", "side", "deployment/server", "deployment/client")
	for namespace, list := range map[string][]string{"old": {"deployment/older"}, "side": {"deployment/server", "deployment/client"}} {
		for _, d := range list {
			c.Rollout(t, namespace, d)
		}
	}
	c.Kubectl(t, "delete", "pod", "-n", "side", "caller", "late", "--wait=true")
	c.Kubectl(t, "wait", "-n", "side", "--for=delete", "pod", "-l", "app", "--field-selector=status.phase!=Running", "--timeout=120s")
	var out string
	c.Eventually(t, "the mesh is taken out", func() error {
		var code int
		if out, code = s.run(t, "assay", "uninstall", "--purge", "--timeout", "7m"); code != 0 {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	t.Logf("uninstall says:\n%s", out)
	s.goesOn(t)
	c.Kubectl(t, "delete", "namespace", "side", "old", "--wait=true")
	for _, o := range s.objects(t) {
		if !slices.Contains(objects, o) {
			t.Errorf("left in the cluster: %s", o)
		}
	}
}
