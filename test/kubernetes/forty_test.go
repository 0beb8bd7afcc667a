package kubernetes_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"assay.dev/kube/node"
	"assay.dev/test/kubernetes"
	"assay.dev/test/lab"
)

// manyManifest is an application of forty servers.
const manyManifest = `apiVersion: v1
kind: Namespace
metadata: {name: many}
---
apiVersion: v1
kind: Namespace
metadata: {name: outside}
---
apiVersion: v1
kind: Service
metadata: {name: many, namespace: many}
spec:
  selector: {app: many}
  ports: [{name: http, port: 80, targetPort: 8080}, {name: raw, port: 9000, targetPort: 9000}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: many, namespace: many}
spec:
  replicas: 40
  selector: {matchLabels: {app: many}}
  template:
    metadata: {labels: {app: many}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: echo, image: assay.test/echo:1, args: [serve, ":8080", ":9000"], ports: [{containerPort: 8080}, {containerPort: 9000}]}]
`

// askerManifest is a client that never stops asking all servers, and holds ten connections.
const askerManifest = `apiVersion: v1
kind: Pod
metadata: {name: client, namespace: %[1]s, labels: {app: client}}
spec:
  terminationGracePeriodSeconds: 1
  restartPolicy: Never
  containers: [{name: client, image: assay.test/echo:1, args: [steady, "http://%[2]s/%[1]s", "%[2]s:9000", "10"]}]
`

// askers are the namespaces of the clients: one is of the application, one never meshed.
var askers = []string{"many", "outside"}

// TestFortyPods: an application of forty servers is meshed as it runs, and leaves again,
// while it is asked all the time by new connections, by such that are kept and by such that
// are held, from within and from outside. Nothing is restarted, and nobody notices.
func TestFortyPods(t *testing.T) {
	kubernetes.Require(t)
	c := kubernetes.Up(t, 1)
	c.Import(t, echoImage(t, "assay.test/echo:1", "1"))
	c.Apply(t, manyManifest)
	c.Rollout(t, "many", "deployment/many")
	at := c.Kubectl(t, "get", "service", "-n", "many", "many", "-o", "jsonpath={.spec.clusterIP}")
	for _, namespace := range askers {
		c.Apply(t, fmt.Sprintf(askerManifest, namespace, at))
		c.Kubectl(t, "wait", "-n", namespace, "pod/client", "--for=condition=Ready", "--timeout=120s")
	}
	m := startMesh(t, c)
	before := lives(t, c)
	if len(before) != 42 {
		t.Fatalf("there are %d pods", len(before))
	}
	counted := func(n int) {
		t.Helper()
		lab.Eventually(t, 3*time.Minute, fmt.Sprintf("control has %d workloads that are attested", n), func() error {
			list, err := m.workloads()
			if err != nil {
				return err
			}
			attested := 0
			for _, w := range list {
				if len(w.Artifacts) > 0 && !w.MeshedSince.IsZero() {
					attested++
				}
			}
			if attested != n {
				return fmt.Errorf("there are %d", attested)
			}
			return nil
		})
	}
	check := func(when string) {
		t.Helper()
		everybody(t, c, when)
		if now := lives(t, c); !slices.Equal(now, before) {
			t.Errorf("%s: pods were\n%s\nand are\n%s", when, strings.Join(before, "\n"), strings.Join(now, "\n"))
		}
	}
	counted(0)
	check("before")
	began := time.Now()
	c.Kubectl(t, "label", "namespace", "many", node.MeshLabel+"="+node.Enabled)
	counted(41)
	t.Logf("for the record: under load, 40 servers and their client meshed and attested in %s", time.Since(began).Round(time.Millisecond))
	check("meshed")
	out, err := c.Control.Try(t.Context(), "env", programs+"/assay", "edges")
	if err != nil || !strings.Contains(out, " mtls ") {
		t.Errorf("nobody is asked under mutual TLS: %v %s", err, out)
	}
	began = time.Now()
	c.Kubectl(t, "label", "namespace", "many", node.MeshLabel+"-")
	counted(0)
	t.Logf("for the record: and released in %s", time.Since(began).Round(time.Millisecond))
	check("released")
	for _, namespace := range askers { // they hold connections through proxies
		c.Kubectl(t, "delete", "pod", "-n", namespace, "client", "--grace-period=1")
	}
	lab.Eventually(t, 2*time.Minute, "no proxy is left", func() error {
		if out, _ := m.node.Try(t.Context(), "pgrep", "-fc", "^assay-proxy "); strings.TrimSpace(out) != "0" {
			return fmt.Errorf("there are %s", out)
		}
		return nil
	})
}

// lives are the pods of the application and its clients: who each is, and how often it was
// restarted.
func lives(t *testing.T, c *kubernetes.Cluster) (list []string) {
	t.Helper()
	for _, namespace := range askers {
		out := c.Kubectl(t, "get", "pods", "-n", namespace, "-o",
			`jsonpath={range .items[*]}{.metadata.name} {.metadata.uid} {.status.containerStatuses[*].containerID} restarts={.status.containerStatuses[*].restartCount}{"\n"}{end}`)
		for line := range strings.Lines(out) {
			list = append(list, strings.TrimSpace(line))
		}
	}
	slices.Sort(list)
	return list
}

// everybody waits until from now on each server was asked from each namespace, and each
// client has more answers of every kind; and fails the test for whatever went wrong so far.
func everybody(t *testing.T, c *kubernetes.Cluster, when string) {
	t.Helper()
	var servers struct {
		Items []struct{ Metadata struct{ Name string } }
	}
	if err := json.Unmarshal([]byte(c.Kubectl(t, "get", "pods", "-n", "many", "-l", "app=many", "-o", "json")), &servers); err != nil {
		t.Fatal(err)
	}
	since, first := time.Now().UTC().Format(time.RFC3339Nano), map[string][3]int{}
	c.Eventually(t, "every server is asked from everywhere: "+when, func() error {
		for _, namespace := range askers {
			now := answered(c.Kubectl(t, "logs", "-n", namespace, "client", "--tail=50"))
			was, seen := first[namespace]
			if !seen {
				first[namespace] = now
			}
			for kind := range now {
				if !seen || now[kind] < was[kind]+10 {
					return fmt.Errorf("the client of %s has %v answers, and had %v", namespace, now, was)
				}
			}
		}
		out := c.Kubectl(t, "logs", "-n", "many", "-l", "app=many", "--prefix", "--tail=-1", "--max-log-requests=64", "--since-time="+since)
		for _, s := range servers.Items {
			for _, namespace := range askers {
				if !slices.ContainsFunc(strings.Split(out, "\n"), func(line string) bool {
					return strings.HasPrefix(line, "[pod/"+s.Metadata.Name+"/") && strings.HasSuffix(line, "/"+namespace)
				}) {
					return fmt.Errorf("%s was not asked from %s", s.Metadata.Name, namespace)
				}
			}
		}
		return nil
	})
	for _, namespace := range askers {
		out, bad := c.Kubectl(t, "logs", "-n", namespace, "client", "--tail=-1"), []string{}
		for line := range strings.Lines(out) {
			if !strings.HasPrefix(line, "answered ") && line != "MOVED kept\n" {
				bad = append(bad, line)
			}
		}
		t.Logf("for the record: %s, the client of %s: %v answers by new, kept and held connections", when, namespace, answered(out))
		if len(bad) > 0 {
			t.Errorf("%s: %d failures of the client of %s:\n%s", when, len(bad), namespace, strings.Join(bad[:min(len(bad), 30)], ""))
		}
	}
}

// answered are the answers of a client so far, by new, kept and held connections.
func answered(log string) (a [3]int) {
	for line := range strings.Lines(log) {
		if n, yes := strings.CutPrefix(line, "answered "); yes {
			fmt.Sscan(n, &a[0], &a[1], &a[2])
		}
	}
	return a
}
