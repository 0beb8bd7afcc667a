package kubernetes_test

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"assay.dev"
	"assay.dev/test/kubernetes"
)

// kindsManifest has a workload of every kind, in namespaces that are meshed and strict.
const kindsManifest = `apiVersion: v1
kind: Namespace
metadata: {name: kinds, labels: {assay.dev/mesh: enabled}}
---
apiVersion: assay.dev/v1alpha1
kind: MeshConfig
metadata: {name: default, namespace: kinds}
spec: {mode: strict}
---
apiVersion: v1
kind: Namespace
metadata: {name: narrow, labels: {assay.dev/mesh: enabled, pod-security.kubernetes.io/enforce: restricted}}
---
apiVersion: assay.dev/v1alpha1
kind: MeshConfig
metadata: {name: default, namespace: narrow}
spec: {mode: strict}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: kinds}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 60
` + echoContainers + `---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: kinds}
spec: {ipFamilyPolicy: RequireDualStack, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: probed, namespace: kinds}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: http
    image: assay.test/echo:1
    args: [serve]
    ports: [{name: http, containerPort: 8080}]
    startupProbe: {httpGet: {path: /start, port: http}, periodSeconds: 1, timeoutSeconds: 30, failureThreshold: 60}
    livenessProbe: {httpGet: {path: /live, port: 8080}, periodSeconds: 1, timeoutSeconds: 30}
    readinessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 1, timeoutSeconds: 30}
    lifecycle: {postStart: {httpGet: {path: /hook, port: 8083}}}
  - name: tcp
    image: assay.test/echo:1
    args: [serve, ":8081"]
    livenessProbe: {tcpSocket: {port: 8081}, initialDelaySeconds: 2, periodSeconds: 1, timeoutSeconds: 30}
    readinessProbe: {tcpSocket: {port: 8081}, periodSeconds: 1, timeoutSeconds: 30}
  - name: grpc
    image: assay.test/echo:1
    args: [health, ":9090"]
    livenessProbe: {grpc: {port: 9090}, initialDelaySeconds: 2, periodSeconds: 1, timeoutSeconds: 30}
    readinessProbe: {grpc: {port: 9090}, periodSeconds: 1, timeoutSeconds: 30}
  - name: other
    image: assay.test/echo:1
    args: [serve, ":8082"]
    livenessProbe: {exec: {command: [/bin/echo, get, "http://127.0.0.1:8082/exec"]}, initialDelaySeconds: 2, periodSeconds: 1, timeoutSeconds: 30}
    readinessProbe: {exec: {command: [/bin/echo, get, "http://127.0.0.1:8082/exec"]}, periodSeconds: 1, timeoutSeconds: 30}
  initContainers:
  - {name: hooked, image: assay.test/echo:1, args: [serve, ":8083"], restartPolicy: Always}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: kinds}
spec: {clusterIP: None, selector: {app: db}, ports: [{name: http, port: 8080}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: kinds}
spec:
  serviceName: db
  replicas: 2
  podManagementPolicy: Parallel
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      terminationGracePeriodSeconds: 1
` + echoContainers + `---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: each, namespace: kinds}
spec:
  selector: {matchLabels: {app: each}}
  template:
    metadata: {labels: {app: each}}
    spec:
      terminationGracePeriodSeconds: 1
` + echoContainers + `---
apiVersion: v1
kind: Pod
metadata: {name: host, namespace: kinds}
spec:
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  terminationGracePeriodSeconds: 1
  containers: [{name: c, image: assay.test/echo:1, args: [serve, ":18080"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: narrow, namespace: narrow}
spec:
  dnsPolicy: None
  dnsConfig: {nameservers: [10.96.0.10]}
  terminationGracePeriodSeconds: 1
  securityContext: {runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: c
    image: assay.test/echo:1
    args: [serve]
    ports: [{containerPort: 8080}]
    securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}, runAsUser: 65532}
    readinessProbe: {httpGet: {path: /ready, port: 8080}, periodSeconds: 1, timeoutSeconds: 30}
---
apiVersion: v1
kind: Pod
metadata: {name: users, namespace: kinds}
spec:
  hostUsers: false
  terminationGracePeriodSeconds: 1
` + podContainers

// clientsManifest are those that ask as soon as they start.
const clientsManifest = `apiVersion: v1
kind: Pod
metadata: {name: client, namespace: kinds}
spec:
  terminationGracePeriodSeconds: 1
  initContainers:
  - {name: before, image: assay.test/echo:init, args: [get, "http://web/secret"]}
  - {name: beside, image: assay.test/echo:beside, args: [serve, ":8085"], restartPolicy: Always}
  containers: [{name: c, image: assay.test/echo:1, args: [sleep]}]
---
apiVersion: batch/v1
kind: Job
metadata: {name: once, namespace: kinds}
spec:
  completions: 2
  parallelism: 2
  template:
    spec:
      restartPolicy: Never
      initContainers: [{name: first, image: assay.test/echo:init, args: [get, "http://web.kinds/secret"]}]
      containers: [{name: c, image: assay.test/echo:1, args: [get, "http://web.kinds/secret", "5"]}]
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: cron, namespace: kinds}
spec:
  schedule: "* * * * *"
  suspend: true
  concurrencyPolicy: Forbid
  jobTemplate:
    spec:
      template:
        spec:
          restartPolicy: Never
          containers: [{name: c, image: assay.test/echo:1, args: [get, "http://web.kinds/secret"]}]
`

// podContainers ends a pod that serves.
const podContainers = `  containers:
  - name: c
    image: assay.test/echo:1
    args: [serve]
    ports: [{containerPort: 8080}]
    readinessProbe: {httpGet: {path: /ready, port: 8080}, periodSeconds: 1, timeoutSeconds: 30}
`

// viaManifest is a pod by whose probes the kubelet is led to another one.
const viaManifest = `apiVersion: v1
kind: Pod
metadata: {name: via, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: assay.test/echo:1
    args: [sleep]
    readinessProbe: {httpGet: {host: %s, path: /via, port: 8082}, periodSeconds: 1, timeoutSeconds: 30}
`

// kinds is a cluster with an installed mesh in which every kind of workload runs.
type kinds struct {
	c       *kubernetes.Cluster
	node    *kubernetes.Machine
	person  *person
	digests map[string]string // manifest -> tag
}

// TestKinds: workloads of every kind, and what people and the kubelet do with them, are
// in a strict mesh what they were without.
func TestKinds(t *testing.T) {
	c := kubernetes.Up(t, 1)
	k := &kinds{c: c, node: c.Nodes[0], person: newPerson(t, c), digests: map[string]string{}}
	for _, tag := range []string{"1", "init", "beside", "debug"} {
		img := echoImage(t, "assay.test/echo:"+tag, tag)
		img.Files["/bin/tar"] = kubernetes.File{From: img.Files["/bin/echo"].From}
		img.Env = []string{"PATH=/bin"}
		k.digests[c.Import(t, img).Manifest] = tag
	}
	if err := c.LoadAssay(t.Context()); err != nil {
		t.Fatal(err)
	}
	k.person.must(t, "assay", append(slices.Clone(installArgs), "--older-grace", "5s")...)
	wire := k.node.Capture(t, "GET /secret")
	c.Apply(t, kindsManifest)
	c.Rollout(t, "kinds", "deployment/web")
	c.Apply(t, clientsManifest)
	c.Kubectl(t, "wait", "-n", "kinds", "pod/client", "pod/probed", "--for=condition=Ready", "--timeout=170s")
	for _, o := range []string{"statefulset/db", "daemonset/each"} {
		c.Rollout(t, "kinds", o)
	}
	t.Run("probes", k.probes)
	t.Run("init, sidecar and ephemeral containers", k.containers)
	t.Run("StatefulSet", k.stateful)
	t.Run("DaemonSet", k.daemons)
	t.Run("both families", k.families)
	t.Run("restricted, no DNS policy", k.narrow)
	t.Run("users of its own", k.users)
	t.Run("host's network", k.host)
	t.Run("kubectl", k.kubectl)
	t.Run("Job", func(t *testing.T) { k.job(t, "once", "batch.kubernetes.io/job-name=once") })
	t.Run("long shutdown", k.shutdown)
	t.Run("CronJob", k.cron)
	wire.ExpectNone(t)
	k.quiet(t)
	t.Run("captured", k.captured)
	t.Run("older connections", k.older)
	t.Run("network policies", k.policies)
}

// get asks from a pod of a namespace.
func (k *kinds) get(t *testing.T, pod, url string) (string, error) {
	namespace := "kinds"
	if pod == "narrow" {
		namespace = "narrow"
	}
	return k.c.TryKubectl(t.Context(), "", "exec", "-n", namespace, pod, "--", "/bin/echo", "get", url)
}

// reaches asks from a pod until the answer is a server's that has the client's address.
func (k *kinds) reaches(t *testing.T, from, url, server string) {
	t.Helper()
	k.c.Eventually(t, from+" reaches "+url, func() error {
		out, err := k.get(t, from, url)
		if err == nil && !strings.HasPrefix(out, "host="+server) {
			err = fmt.Errorf("%s", out)
		}
		return err
	})
}

func (k *kinds) read(t *testing.T, args ...string) string {
	t.Helper()
	return strings.TrimSpace(k.c.Kubectl(t, args...))
}

func (k *kinds) address(t *testing.T, pod string) string {
	t.Helper()
	return k.read(t, "get", "pod", "-n", "kinds", pod, "-o", "jsonpath={.status.podIP}")
}

func (k *kinds) uid(t *testing.T, pod string) string {
	t.Helper()
	return k.read(t, "get", "pod", "-n", "kinds", pod, "-o", "jsonpath={.metadata.uid}")
}

// workload is what control has of a pod.
func (k *kinds) workload(t *testing.T, uid string) (w assay.Workload, err error) {
	out, code := k.person.run(t, "kubectl", "assay", "get", "workloads", "-o", "json")
	var list []assay.Workload
	if err = json.Unmarshal([]byte(out), &list); err != nil || code != 0 {
		return w, fmt.Errorf("exit code %d: %s (%v)", code, out, err)
	}
	i := slices.IndexFunc(list, func(w assay.Workload) bool { return w.ID == uid })
	if i < 0 {
		return w, fmt.Errorf("control does not know the pod")
	}
	return list[i], nil
}

// edges are those that contain every word, as people see them.
func (k *kinds) edges(t *testing.T, words ...string) (list []string) {
	out, _ := k.person.run(t, "kubectl", "assay", "edges")
	for line := range strings.Lines(out) {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			list = append(list, line)
		}
	}
	return list
}

// described is what people see of a pod's events.
func (k *kinds) described(t *testing.T, namespace, pod string, words ...string) {
	t.Helper()
	k.c.Eventually(t, fmt.Sprintf("kubectl describe pod %s says %s", pod, words[0]), func() error {
		out := k.c.Kubectl(t, "describe", "pod", "-n", namespace, pod)
		_, events, _ := strings.Cut(out, "\nEvents:")
		for line := range strings.Lines(events) {
			if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
				return nil
			}
		}
		return fmt.Errorf("events:%s", events)
	})
}

// left is what there is on the node of a pod that has ended.
func (k *kinds) left(t *testing.T, uid string) {
	t.Helper()
	m := &mesh{t: t, c: k.c, node: k.node}
	k.c.Eventually(t, "nothing is left of the pod", func() error {
		if left := m.left(uid); left != "" {
			return fmt.Errorf("left: %s", left)
		}
		return nil
	})
}
