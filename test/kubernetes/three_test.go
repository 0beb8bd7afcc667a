package kubernetes_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"assay.dev/test/kubernetes"
)

const everywhereManifest = `apiVersion: apps/v1
kind: DaemonSet
metadata: {name: everywhere}
spec:
  selector: {matchLabels: {app: everywhere}}
  template:
    metadata: {labels: {app: everywhere}}
    spec:
      terminationGracePeriodSeconds: 1
      tolerations: [{operator: Exists}]
` + echoContainers + `---
apiVersion: v1
kind: Service
metadata: {name: everywhere}
spec:
  selector: {app: everywhere}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: v1
kind: Service
metadata: {name: each}
spec:
  clusterIP: None
  selector: {app: everywhere}
  ports: [{name: http, port: 8080, targetPort: http}]
`

// podOn is a pod of the DaemonSet.
type podOn struct{ Name, Node, IP string }

// everywhere lists the DaemonSet's pods, one on each node.
func everywhere(t *testing.T, c *kubernetes.Cluster) map[string]podOn {
	t.Helper()
	var list struct {
		Items []struct {
			Metadata struct {
				Name              string
				DeletionTimestamp string
			}
			Spec   struct{ NodeName string }
			Status struct{ PodIP string }
		}
	}
	c.Get(t, "/api/v1/namespaces/default/pods?labelSelector=app%3Deverywhere", &list)
	pods := map[string]podOn{}
	for _, p := range list.Items {
		if p.Metadata.DeletionTimestamp == "" {
			pods[p.Spec.NodeName] = podOn{p.Metadata.Name, p.Spec.NodeName, p.Status.PodIP}
		}
	}
	return pods
}

// TestThreeNodes: pods of several nodes reach each other, and a node can be taken out
// and put back.
func TestThreeNodes(t *testing.T) {
	kubernetes.Require(t)
	before, name := machineState(t, "none"), ""
	t.Run("cluster", func(t *testing.T) {
		c := kubernetes.Up(t, 3)
		name = c.Name()
		uses, err := kubernetes.Uses(c.Name())
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("what it uses:\n%s", kubernetes.Table(uses))
		c.Import(t, echoImage(t, "assay.test/echo:1", "one"))
		c.Apply(t, everywhereManifest)
		c.Rollout(t, "default", "daemonset/everywhere")
		t.Run("pods reach each other", func(t *testing.T) { reachEachOther(t, c) })
		t.Run("programs restart", func(t *testing.T) { restartPrograms(t, c) })
		t.Run("reboot", func(t *testing.T) { reboot(t, c) })
		t.Run("API server away", func(t *testing.T) { apiServerAway(t, c) })
	})
	sameAs(t, before, name)
}

// reachEachOther: each pod reaches each by its address, seen under its own; and all of
// them through the service and by the headless service's name.
func reachEachOther(t *testing.T, c *kubernetes.Cluster) {
	pods := everywhere(t, c)
	if len(pods) != len(c.Nodes) {
		t.Fatalf("pods on %d nodes, not on %d: %v", len(pods), len(c.Nodes), pods)
	}
	for _, from := range pods {
		for _, to := range pods {
			out := c.Kubectl(t, "exec", from.Name, "--", "/bin/echo", "get", "http://"+to.IP+":8080/")
			if !strings.Contains(out, "host="+to.Name+" client="+from.IP+" ") {
				t.Errorf("%s on %s asks %s on %s and gets: %s", from.Name, from.Node, to.Name, to.Node, out)
			}
		}
		c.Eventually(t, "the service answers from everywhere for "+from.Node, func() error {
			out, err := c.TryKubectl(t.Context(), "", "exec", from.Name, "--", "/bin/echo", "get", "http://everywhere/", "30")
			for _, to := range pods {
				if err == nil && !strings.Contains(out, "host="+to.Name+" ") {
					err = fmt.Errorf("30 requests to the service have not reached %s on %s", to.Name, to.Node)
				}
			}
			return err
		})
		out := c.Kubectl(t, "exec", from.Name, "--", "/bin/echo", "lookup", "each")
		for _, to := range pods {
			if !strings.Contains(out, to.IP) {
				t.Errorf("the headless service's name has not the address %s: %s", to.IP, out)
			}
		}
	}
}

// restartPrograms: pods outlive their kubelet, containerd and kube-proxy.
func restartPrograms(t *testing.T, c *kubernetes.Cluster) {
	node, before := c.Nodes[0], everywhere(t, c)
	for _, program := range []string{"kubelet", "containerd", "kube-proxy"} {
		if err := node.Stop(program); err != nil {
			t.Fatal(err)
		}
		other := before["node-2"]
		out := c.Kubectl(t, "exec", other.Name, "--", "/bin/echo", "get", "http://"+before["node-1"].IP+":8080/")
		if !strings.Contains(out, "host="+before["node-1"].Name+" ") {
			t.Errorf("without %s the pod answers: %s", program, out)
		}
		if err := c.Start(node, program); err != nil {
			t.Fatal(err)
		}
	}
	c.Ready(t, node)
	c.Eventually(t, "exec on the node works again", func() error {
		_, err := c.TryKubectl(t.Context(), "", "exec", before["node-1"].Name, "--", "/bin/echo", "lookup", "everywhere")
		return err
	})
	if now := everywhere(t, c); now["node-1"] != before["node-1"] {
		t.Errorf("the pod was %v and is %v", before["node-1"], now["node-1"])
	}
}

// reboot: a node whose plug was pulled comes back, with its images, and its pod runs again.
func reboot(t *testing.T, c *kubernetes.Cluster) {
	node := c.Nodes[2]
	boot := strings.TrimSpace(node.MustExec(t, "stat", "-L", "-c", "%i", "/proc/1/ns/net"))
	if err := c.Reboot(node); err != nil {
		t.Fatal(err)
	}
	if now := strings.TrimSpace(node.MustExec(t, "stat", "-L", "-c", "%i", "/proc/1/ns/net")); now == boot {
		t.Errorf("the node has still the network namespace %s", now)
	}
	c.Eventually(t, "the pod of the node that was rebooted answers", func() error {
		pods := everywhere(t, c)
		from, to := pods["node-1"], pods["node-3"]
		if to.IP == "" {
			return errors.New("it has no address yet")
		}
		_, err := c.TryKubectl(t.Context(), "", "exec", from.Name, "--", "/bin/echo", "get", "http://"+to.IP+":8080/")
		return err
	})
	c.Ready(t, node)
	c.Rollout(t, "default", "daemonset/everywhere")
}

// apiServerAway: what runs goes on without the API server.
func apiServerAway(t *testing.T, c *kubernetes.Cluster) {
	pods := everywhere(t, c)
	if err := c.Control.Stop("kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	url := "http://" + pods["node-2"].IP + ":8080/"
	out := c.Nodes[0].MustExec(t, "curl", "-sS", "--max-time", "50", url)
	if !strings.Contains(out, "host="+pods["node-2"].Name+" ") {
		t.Errorf("without an API server the pod answers: %s", out)
	}
	if err := c.Start(c.Control, "kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	c.Eventually(t, "the API server is back", func() error {
		_, err := c.TryKubectl(t.Context(), "", "get", "pods")
		return err
	})
}
