package kubernetes_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"assay.dev/test/kubernetes"
	"assay.dev/test/lab"
)

// echoImage is an image of more than one file, so that a test can tell it from
// another that has the same program.
func echoImage(t *testing.T, name, note string) kubernetes.Image {
	return kubernetes.Image{
		Name: name,
		Files: map[string]kubernetes.File{
			"/bin/echo":           {From: kubernetes.BuildStatic(t, "assay.dev/test/kubernetes/echo")},
			"/usr/share/doc/note": {Text: note},
		},
		Entrypoint: []string{"/bin/echo"},
		Labels:     map[string]string{"org.opencontainers.image.version": "1"},
		User:       "65532:65532",
	}
}

// echoContainers ends the template of pods that serve.
const echoContainers = `      containers:
      - name: echo
        image: assay.test/echo:1
        args: [serve]
        ports: [{name: http, containerPort: 8080}]
        readinessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 1, timeoutSeconds: 20}
`

const echoManifest = `apiVersion: apps/v1
kind: Deployment
metadata: {name: echo}
spec:
  replicas: 2
  selector: {matchLabels: {app: echo}}
  template:
    metadata: {labels: {app: echo}}
    spec:
` + echoContainers + `---
apiVersion: v1
kind: Service
metadata: {name: echo}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {app: echo}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: client, image: assay.test/echo:1, args: [sleep]}]
`

// TestOneNode: a cluster of one node does what people expect of Kubernetes, and
// nothing of it is left.
func TestOneNode(t *testing.T) {
	kubernetes.Require(t)
	before, name := machineState(t, "none"), ""
	t.Run("cluster", func(t *testing.T) {
		c := kubernetes.Up(t, 1)
		name = c.Name()
		digests := c.Import(t, echoImage(t, "assay.test/echo:1", "one"))
		c.Apply(t, echoManifest)
		c.Rollout(t, "default", "deployment/echo")
		c.Kubectl(t, "wait", "pod/client", "--for=condition=Ready", "--timeout=120s")
		t.Run("service", func(t *testing.T) { service(t, c) })
		t.Run("address", func(t *testing.T) { addresses(t, c) })
		t.Run("DNS", func(t *testing.T) { names(t, c) })
		t.Run("logs", func(t *testing.T) { logs(t, c) })
		t.Run("port-forward", func(t *testing.T) { portForward(t, c) })
		t.Run("digests", func(t *testing.T) { imageDigests(t, c, digests) })
		t.Run("artifacts", func(t *testing.T) { artifacts(t, c, digests) })
		t.Run("node", func(t *testing.T) { nodeSpace(t, c) })
		t.Run("pods", func(t *testing.T) { kindsOfPods(t, c) })
		t.Run("watch", func(t *testing.T) { watching(t, c) }) // scales and deletes
	})
	sameAs(t, before, name)
}

func service(t *testing.T, c *kubernetes.Cluster) {
	c.Eventually(t, "both pods behind the service", func() error {
		out, err := c.TryKubectl(t.Context(), "", "exec", "client", "--", "/bin/echo", "get", "http://echo.default.svc.cluster.local/hello", "20")
		if err != nil {
			return err
		}
		hosts := map[string]bool{}
		for _, found := range regexp.MustCompile(`host=(echo-\S+) client=\S+ path=/hello`).FindAllStringSubmatch(out, -1) {
			hosts[found[1]] = true
		}
		if len(hosts) != 2 {
			return fmt.Errorf("20 requests were answered by %d pods:\n%s", len(hosts), out)
		}
		return nil
	})
}

// addresses: a pod is reached by its own address, of both families, and sees who asks.
func addresses(t *testing.T, c *kubernetes.Cluster) {
	var pod struct {
		Status struct{ PodIPs []struct{ IP string } }
	}
	c.Get(t, "/api/v1/namespaces/default/pods/client", &pod)
	if len(pod.Status.PodIPs) != 2 {
		t.Fatalf("the pod has the addresses %v: one of each family is wanted", pod.Status.PodIPs)
	}
	for i, family := range []string{"10.96.", "fd00:10:96:"} {
		ips := strings.Fields(c.Kubectl(t, "get", "service", "echo", "-o", "jsonpath={.spec.clusterIPs[*]}"))
		if len(ips) != 2 || !strings.HasPrefix(ips[i], family) {
			t.Fatalf("the service has the addresses %v", ips)
		}
		host := ips[i]
		if strings.Contains(host, ":") {
			host = "[" + host + "]"
		}
		out := c.Kubectl(t, "exec", "client", "--", "/bin/echo", "get", "http://"+host+"/")
		if !strings.Contains(out, "client="+pod.Status.PodIPs[i].IP+" ") {
			t.Errorf("the server sees another client than %s: %s", pod.Status.PodIPs[i].IP, out)
		}
	}
}

func names(t *testing.T, c *kubernetes.Cluster) {
	want := strings.TrimSpace(c.Kubectl(t, "get", "service", "echo", "-o", "jsonpath={.spec.clusterIP}"))
	for _, name := range []string{"echo", "echo.default", "echo.default.svc.cluster.local"} {
		if out := c.Kubectl(t, "exec", "client", "--", "/bin/echo", "lookup", name); !strings.Contains(out, want) {
			t.Errorf("%s is %s, not %s", name, out, want)
		}
	}
	out, err := c.TryKubectl(t.Context(), "", "exec", "client", "--", "/bin/echo", "lookup", "elsewhere.example")
	if err == nil || !strings.Contains(err.Error(), "no such host") {
		t.Errorf("a name that is not the cluster's: %s, %v", out, err)
	}
}

func logs(t *testing.T, c *kubernetes.Cluster) {
	if out := c.Kubectl(t, "logs", "-l", "app=echo", "--tail=-1"); !strings.Contains(out, "asks for /hello") {
		t.Errorf("the logs do not tell of the requests:\n%s", out)
	}
}

func portForward(t *testing.T, c *kubernetes.Cluster) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cmd := c.Command(ctx, "port-forward", "service/echo", ":80", "--address", "127.0.0.1")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cancel()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("port-forward says nothing: %v", err)
	}
	found := regexp.MustCompile(`from (127\.0\.0\.1:\d+) ->`).FindStringSubmatch(line)
	if found == nil {
		t.Fatalf("port-forward says %q", line)
	}
	client := http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get("http://" + found[1] + "/forwarded")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if text, err := io.ReadAll(resp.Body); err != nil || !strings.Contains(string(text), "path=/forwarded") {
		t.Errorf("through port-forward: %q, %v", text, err)
	}
}

// imageDigests: the runtime tells index, manifest and config of an image apart, and so can
// whoever asks.
func imageDigests(t *testing.T, c *kubernetes.Cluster, d kubernetes.Digests) {
	seen := map[string]bool{}
	for _, digest := range []string{d.Index, d.Manifest, d.Config, d.Layer, d.Other} {
		if seen[digest] || !strings.HasPrefix(digest, "sha256:") {
			t.Errorf("%+v: five digests that differ are wanted", d)
		}
		seen[digest] = true
	}
	id := c.Kubectl(t, "get", "pod", "client", "-o", "jsonpath={.status.containerStatuses[0].imageID}")
	if id != "assay.test/echo@"+d.Index {
		t.Errorf("the kubelet says that the container runs %s, not the index %s", id, d.Index)
	}
	node := c.Nodes[0]
	ctr := func(args ...string) string {
		return node.MustExec(t, append([]string{"/opt/kubernetes/bin/ctr", "--address", "/run/containerd/containerd.sock", "-n", "k8s.io"}, args...)...)
	}
	if out := ctr("images", "ls", "name~=echo"); !strings.Contains(out, d.Index) {
		t.Errorf("containerd's tag does not point to the index %s:\n%s", d.Index, out)
	}
	if out := ctr("images", "ls", "-q"); !strings.Contains(out, d.Config) {
		t.Errorf("containerd does not know the image by its config %s:\n%s", d.Config, out)
	}
	if out := ctr("content", "get", d.Index); !strings.Contains(out, d.Manifest) || !strings.Contains(out, d.Other) {
		t.Errorf("the index does not name both manifests: %s", out)
	}
	if out := ctr("content", "get", d.Manifest); !strings.Contains(out, d.Config) || !strings.Contains(out, d.Layer) {
		t.Errorf("the manifest does not name config and layer: %s", out)
	}
	// The same program with another file beside it is another image in every respect.
	other := c.Import(t, echoImage(t, "assay.test/echo:2", "two"))
	for _, same := range [][2]string{{d.Index, other.Index}, {d.Manifest, other.Manifest}, {d.Config, other.Config}, {d.Layer, other.Layer}} {
		if same[0] == same[1] {
			t.Errorf("two images share %s", same[0])
		}
	}
	again, err := echoImage(t, "assay.test/echo:1", "one").Write(io.Discard)
	if err != nil || again != d {
		t.Errorf("the same image, made again, is %+v and was %+v (%v)", again, d, err)
	}
}

// nodeSpace: a node is a machine of its own.
func nodeSpace(t *testing.T, c *kubernetes.Cluster) {
	node := c.Nodes[0]
	if out := node.MustExec(t, "ip", "-br", "addr", "show", "eth0"); !strings.Contains(out, node.IPv4.String()) || !strings.Contains(out, node.IPv6.String()) {
		t.Errorf("eth0 has not the node's addresses: %s", out)
	}
	if out := node.MustExec(t, "ps", "-eo", "comm"); strings.Contains(out, "kube-apiserver") || !strings.Contains(out, "kubelet") {
		t.Errorf("the processes of the node are not its own:\n%s", out)
	}
	if out := node.MustExec(t, "nft", "list", "tables"); !strings.Contains(out, "ip kube-proxy") || !strings.Contains(out, "ip6 kube-proxy") {
		t.Errorf("kube-proxy does not use nftables:\n%s", out)
	}
	if out := node.MustExec(t, "ls", "/opt/cni/bin", "/etc/cni/net.d"); !strings.Contains(out, "bridge") || !strings.Contains(out, "10-pods.conflist") {
		t.Errorf("the CNI plugins and their configuration are not in their places:\n%s", out)
	}
}

// kindsOfPods: those that a mesh has to cope with run at all: of a namespace with
// restricted security, with users of their own, and an agent that sees its node.
func kindsOfPods(t *testing.T, c *kubernetes.Cluster) {
	c.Apply(t, `apiVersion: v1
kind: Namespace
metadata: {name: strict, labels: {pod-security.kubernetes.io/enforce: restricted}}
---
apiVersion: v1
kind: Pod
metadata: {name: restricted, namespace: strict}
spec:
  securityContext: {runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
  containers:
  - name: c
    image: assay.test/echo:1
    args: [sleep]
    resources: {limits: {memory: 64Mi, cpu: 100m}}
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}, runAsUser: 65532}
---
apiVersion: v1
kind: Pod
metadata: {name: users, namespace: default}
spec:
  hostUsers: false
  containers: [{name: c, image: assay.test/echo:1, args: [sleep]}]
---
apiVersion: v1
kind: Pod
metadata: {name: agent, namespace: default}
spec:
  hostPID: true
  hostNetwork: true
  containers:
  - name: c
    image: assay.test/echo:1
    args: [sleep]
    securityContext: {privileged: true, runAsUser: 0}
    volumeMounts: [{name: etc, mountPath: /host/etc/cni}, {name: run, mountPath: /run, mountPropagation: Bidirectional}]
  volumes: [{name: etc, hostPath: {path: /etc/cni}}, {name: run, hostPath: {path: /run}}]
`)
	c.Kubectl(t, "wait", "pod/users", "pod/agent", "--for=condition=Ready", "--timeout=150s")
	c.Kubectl(t, "wait", "-n", "strict", "pod/restricted", "--for=condition=Ready", "--timeout=150s")
	cat := func(namespace, pod, file string) string {
		return c.Kubectl(t, "exec", "-n", namespace, pod, "--", "/bin/echo", "cat", file)
	}
	if status := cat("strict", "restricted", "/proc/self/status"); !strings.Contains(status, "Seccomp:\t2") || !strings.Contains(status, "NoNewPrivs:\t1") {
		t.Errorf("the restricted pod's process:\n%s", status)
	}
	if users := strings.Fields(cat("default", "users", "/proc/self/uid_map")); len(users) != 3 || users[0] != "0" || users[1] == "0" {
		t.Errorf("the pod with users of its own has the node's: %v", users)
	}
	if first := cat("default", "agent", "/proc/1/cmdline"); !strings.Contains(first, "machine\x00node-1") {
		t.Errorf("process 1, as the agent sees it, is %q", first)
	}
	if text := cat("default", "agent", "/host/etc/cni/net.d/10-pods.conflist"); !strings.Contains(text, "host-local") {
		t.Errorf("the CNI configuration, as the agent sees it, is %q", text)
	}
	c.Kubectl(t, "delete", "pod/users", "pod/agent", "--grace-period=1")
}

// TestCommand: the command that people use, and what is left when the process that
// holds a cluster is killed.
func TestCommand(t *testing.T) {
	kubernetes.Require(t)
	before := machineState(t, "none")
	command := kubernetes.BuildStatic(t, "assay.dev/test/kubernetes/cluster")
	name := fmt.Sprintf("command-%d", os.Getpid())
	run := func(args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
		defer cancel()
		out, err := exec.CommandContext(ctx, command, args...).CombinedOutput()
		return string(out), err
	}
	t.Cleanup(func() { run("down", "--name", name) })
	out, err := run("up", "--name", name, "--nodes", "1")
	if err != nil {
		t.Fatalf("up: %v\n%s", err, out)
	}
	t.Logf("up says:\n%s", out)
	kubeconfig, path, ok := exported(out)
	if !ok {
		t.Fatalf("up does not tell how to use it:\n%s", out)
	}
	kubectl := exec.CommandContext(t.Context(), filepath.Join(path, "kubectl"), "get", "nodes")
	kubectl.Env = []string{"KUBECONFIG=" + kubeconfig, "HOME=" + t.TempDir()}
	if out, err := kubectl.CombinedOutput(); err != nil || !strings.Contains(string(out), "node-1   Ready") {
		t.Fatalf("kubectl get nodes: %v\n%s", err, out)
	}
	if out, err := run("up", "--name", name); err == nil || !strings.Contains(out, "is up already") {
		t.Errorf("up, again: %v\n%s", err, out)
	}
	out, err = run("status")
	if err != nil || !strings.Contains(out, name+": Kubernetes v1.") || !strings.Contains(out, "kube-apiserver") {
		t.Errorf("status: %v\n%s", err, out)
	}
	t.Logf("status says:\n%s", out)

	running, err := kubernetes.Running(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range running {
		if r.Name == name {
			if err := syscall.Kill(r.PID, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
	}
	lab.Eventually(t, time.Minute, "every process of the cluster ends with the one that holds it", func() error {
		uses, err := kubernetes.Uses(name)
		if err == nil && len(uses) > 0 {
			err = fmt.Errorf("these run:\n%s", kubernetes.Table(uses))
		}
		return err
	})
	if out, err := run("down", "--name", name); err != nil {
		t.Fatalf("down: %v\n%s", err, out)
	}
	sameAs(t, before, name)
}
