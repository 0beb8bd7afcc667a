package kubernetes_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/kube/install"
	"assay.dev/test/kubernetes"
)

// sideManifest is an application whose pods have sidecars: a server with probes of every kind, a
// client that asks it all the time, and one that asks what it is told to.
const sideManifest = `apiVersion: v1
kind: Namespace
metadata: {name: side, labels: {assay.dev/mesh: sidecar}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: server, namespace: side}
imagePullSecrets: [{name: own}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: server, namespace: side}
spec:
  selector: {matchLabels: {app: server}}
  template:
    metadata: {labels: {app: server}}
    spec:
      serviceAccountName: server
      securityContext: {runAsNonRoot: true, runAsUser: 65532}
      containers:
      - name: server
        image: ` + kubernetes.EchoImage + `
        args: [serve, ":8080", ":9000"]
        ports: [{name: http, containerPort: 8080}]
        startupProbe: {httpGet: {path: /start, port: http}, periodSeconds: 1, timeoutSeconds: 30, failureThreshold: 120}
        readinessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 1, timeoutSeconds: 30}
        livenessProbe: {httpGet: {path: /live, port: 8080}, periodSeconds: 1, timeoutSeconds: 30}
      - name: health
        image: ` + kubernetes.EchoImage + `
        args: [health, ":9090"]
        readinessProbe: {grpc: {port: 9090}, periodSeconds: 1, timeoutSeconds: 30}
        livenessProbe: {tcpSocket: {port: 9090}, periodSeconds: 1, timeoutSeconds: 30}
---
apiVersion: v1
kind: Service
metadata: {name: server, namespace: side}
spec:
  selector: {app: server}
  ports: [{name: http, port: 80, targetPort: http}, {name: raw, port: 9000}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: client, namespace: side}
spec:
  selector: {matchLabels: {app: client}}
  template:
    metadata: {labels: {app: client}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: client, image: ` + kubernetes.EchoImage + `, args: [steady, "http://server/", "server:9000"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: caller, namespace: side}
spec:
  terminationGracePeriodSeconds: 1
  initContainers: [{name: first, image: ` + kubernetes.EchoImage + `, args: [get, "http://server/init"]}]
  containers: [{name: caller, image: ` + kubernetes.EchoImage + `, args: [sleep]}]
---
apiVersion: v1
kind: Pod
metadata: {name: outsider, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: outsider, image: ` + kubernetes.EchoImage + `, args: [sleep]}]
`

const sideStrict = `apiVersion: assay.dev/v1alpha1
kind: MeshConfig
metadata: {name: default, namespace: side}
spec: {mode: strict}
`

const sideJob = `apiVersion: batch/v1
kind: Job
metadata: {name: once, namespace: side}
spec:
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      containers: [{name: once, image: ` + kubernetes.EchoImage + `, args: [get, "http://server/job", "5"]}]
`

// sides is an application in a mesh without agents.
type sides struct{ *person }

// TestSidecar: a mesh on nodes that no agent may be on. Pods get a sidecar when they are made, and
// have what an agent's pods have: identities by what they run, mutual TLS for whatever they say,
// strict namespaces, probes, clients' addresses.
func TestSidecar(t *testing.T) {
	c := kubernetes.Up(t, 1)
	if err := c.LoadAssay(t.Context()); err != nil {
		t.Fatal(err)
	}
	s := &sides{newPerson(t, c)}
	c.Nodes[0].MustExec(t, "chmod", "0777", "/opt/assay")
	c.Apply(t, fmt.Sprintf(lifeVolume, c.Nodes[0].Name)) // control comes and goes
	objects, files := s.objects(t), s.files(t)
	args := append(slices.Clone(lifeInstall), "--injector", "--no-agent", "--image-pull-secret", "mesh", "--sidecar-metrics-port", "9181")
	out := s.must(t, "assay", args...)
	t.Logf("install says:\n%s", out)
	if !strings.Contains(out, "the API server asks control about pods") {
		t.Error("install does not say that pods get sidecars")
	}
	for line := range strings.Lines(s.must(t, "assay", args...)) {
		if strings.HasSuffix(line, " created\n") || strings.HasSuffix(line, " changed\n") || strings.HasSuffix(line, " deleted\n") {
			t.Errorf("an installation over itself: %s", line)
		}
	}
	s.lateComer(t)
	c.Apply(t, sideManifest)
	for _, part := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"accounts", s.accounts},
		{"joined", s.joined},
		{"traffic", s.traffic},
		{"debug", s.debug},
		{"strict", s.strict},
		{"job", s.job},
		{"restart", s.restart},
		{"control away", func(t *testing.T) { s.unnoticed(t, s.controlAway) }},
		{"check", s.check},
		{"agents beside them", func(t *testing.T) { s.unnoticed(t, s.both) }},
	} {
		if !t.Run(part.name, part.run) {
			s.logs(t)
			t.FailNow()
		}
	}
	s.uninstall(t, objects)
	if now := s.files(t); now != files {
		t.Errorf("on the node were\n%s\nand are\n%s", files, now)
	}
}

// logs shows what sidecars say, and control.
func (s *sides) logs(t *testing.T) {
	for _, pod := range strings.Fields(s.cluster.Kubectl(t, "get", "pods", "-n", "side", "-o", "name")) {
		out, err := s.cluster.TryKubectl(t.Context(), "", "logs", "-n", "side", pod, "-c", "assay-proxy", "--tail=30")
		t.Logf("%s: %v\n%s", pod, err, out)
	}
	out, err := s.cluster.TryKubectl(t.Context(), "", "logs", "-n", install.DefaultNamespace, "deployment/assay-control", "--tail=60")
	t.Logf("control: %v\n%s", err, out)
}

// accounts: control may do what is documented, and no agent's account is there.
func (s *sides) accounts(t *testing.T) {
	control := "system:serviceaccount:" + install.DefaultNamespace + ":" + install.ControlName
	for namespace, where := range map[string][]string{"side": nil, install.DefaultNamespace: {install.DefaultNamespace}} {
		everybody := s.allowed(t, "system:serviceaccount:default:default", namespace)
		got := slices.DeleteFunc(s.allowed(t, control, namespace), func(line string) bool { return slices.Contains(everybody, line) })
		want := documented(t, install.ControlName, append(where, "every namespace", "every namespace, with `--injector`")...)
		if !slices.Equal(got, want) {
			t.Errorf("control in %s may\n%s\nand the documentation says\n%s", namespace, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	if out := s.cluster.Kubectl(t, "get", "serviceaccounts,daemonsets", "-n", install.DefaultNamespace, "-o", "name"); strings.Contains(out, "agent") {
		t.Errorf("there is\n%s", out)
	}
}

// workloadsOf are those that people see, by their pods.
func (s *sides) workloadsOf(t *testing.T) map[string]api.WorkloadView {
	t.Helper()
	var list []api.WorkloadView
	if err := json.Unmarshal([]byte(s.must(t, "kubectl", "assay", "get", "workloads", "-n", "side", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	byPod := map[string]api.WorkloadView{}
	for _, w := range list {
		byPod[w.ID] = w
	}
	return byPod
}

// sidePod is what is looked at of a pod.
type sidePod struct {
	Metadata struct {
		Name, UID   string
		Annotations map[string]string
	}
	Spec struct {
		InitContainers   []struct{ Name, RestartPolicy string }
		ImagePullSecrets []struct{ Name string }
	}
	Status struct {
		PodIP                                                                string
		InitContainerStatuses, ContainerStatuses, EphemeralContainerStatuses []struct {
			Name, ImageID string
			RestartCount  int
			Ready         bool
		}
	}
}

func (s *sides) pod(t *testing.T, name string) (p sidePod) {
	t.Helper()
	s.cluster.Get(t, "/api/v1/namespaces/side/pods/"+name, &p)
	return p
}

// podOf is the one pod of a deployment.
func (s *sides) podOf(t *testing.T, app string) sidePod {
	t.Helper()
	return s.pod(t, strings.TrimSpace(s.cluster.Kubectl(t, "get", "pods", "-n", "side", "-l", "app="+app, "-o", "jsonpath={.items[0].metadata.name}")))
}

// joined: pods have a sidecar that starts first, and identities by what the API server says that
// they run, without the sidecar itself.
func (s *sides) joined(t *testing.T) {
	c := s.cluster
	c.Rollout(t, "side", "deployment/server")
	c.Rollout(t, "side", "deployment/client")
	c.Kubectl(t, "wait", "-n", "side", "--for=condition=Ready", "pod/caller", "--timeout=150s")
	for _, p := range []sidePod{s.podOf(t, "server"), s.pod(t, "caller")} {
		if first := p.Spec.InitContainers[0]; first.Name != "assay-proxy" || first.RestartPolicy != "Always" {
			t.Errorf("%s has %+v", p.Metadata.Name, p.Spec.InitContainers)
		}
		s.certified(t, p.Metadata.Name)
	}
	if got := fmt.Sprint(s.podOf(t, "server").Spec.ImagePullSecrets, s.pod(t, "caller").Spec.ImagePullSecrets); got != "[{own} {mesh}] [{mesh}]" {
		t.Errorf("pull secrets of a pod whose account has one, and of another: %s", got)
	}
	if out := s.must(t, "kubectl", "assay", "get", "workloads", "-n", "side"); !strings.Contains(out, "(api-server)") {
		t.Errorf("who says so is not shown:\n%s", out)
	}
}

// certified waits until a pod has a certificate for what the API server says that it runs, and
// returns its serial number and these digests.
func (s *sides) certified(t *testing.T, pod string) (serial string, runs assay.ArtifactSet) {
	t.Helper()
	s.cluster.Eventually(t, pod+" has a certificate for what it runs", func() error {
		now := s.pod(t, pod)
		w, there := s.workloadsOf(t)[now.Metadata.UID]
		if !there || w.Serial == "" || !w.Ready {
			return fmt.Errorf("%v %+v", there, w)
		}
		serial, runs = w.Serial, nil
		for _, status := range slices.Concat(now.Status.InitContainerStatuses, now.Status.ContainerStatuses, now.Status.EphemeralContainerStatuses) {
			at := strings.LastIndex(status.ImageID, "sha256:")
			if at < 0 {
				return fmt.Errorf("what %s runs is not known yet", status.Name)
			}
			if status.Name != "assay-proxy" {
				runs = append(runs, assay.Artifact{Digest: assay.Digest(status.ImageID[at:])})
			}
		}
		if len(runs) == 0 || w.ArtifactSet != runs.Digest() || w.Artifacts[0].Evidence != assay.ByAPIServer {
			return fmt.Errorf("artifacts %+v, and the pod runs %+v", w.Artifacts, runs)
		}
		return nil
	})
	return serial, runs
}

// debug: what somebody adds to a pod that runs is part of what it is judged by from then on, also when
// it has ended, and is in the mesh.
func (s *sides) debug(t *testing.T) {
	c := s.cluster
	debugger := c.Import(t, echoImage(t, "assay.test/echo:debug", "debug"))
	serial, before := s.certified(t, "caller")
	c.Kubectl(t, "debug", "-n", "side", "caller", "--image=assay.test/echo:debug", "--image-pull-policy=Never", "-c", "debugger", "--", "/bin/echo", "get", "http://server/debug")
	c.Eventually(t, "the ephemeral container has asked", func() error {
		out, err := c.TryKubectl(t.Context(), "", "logs", "-n", "side", "caller", "-c", "debugger")
		if err != nil || !strings.Contains(out, "client="+s.pod(t, "caller").Status.PodIP+" path=/debug") {
			return fmt.Errorf("%v %s", err, out)
		}
		if len(s.pod(t, "caller").Status.EphemeralContainerStatuses) == 0 {
			return errors.New("and the API server has not heard of it")
		}
		return nil
	})
	now, after := s.certified(t, "caller")
	is := func(a assay.Artifact) bool {
		return slices.Contains([]string{debugger.Manifest, debugger.Config, debugger.Index}, string(a.Digest))
	}
	if now == serial || slices.ContainsFunc(before, is) || !slices.ContainsFunc(after, is) {
		t.Errorf("certificate %s for %v, and with the ephemeral container %+v certificate %s for %v", serial, before, debugger, now, after)
	}
}

// call asks from the pod that asks what it is told to.
func (s *sides) call(t *testing.T, url string) (string, error) {
	t.Helper()
	return s.cluster.TryKubectl(t.Context(), "", "exec", "-n", "side", "caller", "-c", "caller", "--", "/bin/echo", "get", url)
}

// traffic: what pods say to each other is under mutual TLS, and a server sees its client's address.
func (s *sides) traffic(t *testing.T) {
	caller := s.pod(t, "caller").Status.PodIP
	out, err := s.call(t, "http://server/hello")
	if err != nil || !strings.Contains(out, "client="+caller+" path=/hello") {
		t.Errorf("%s asks: %v\n%s", caller, err, out)
	}
	s.cluster.Eventually(t, "HTTP and raw TCP are under mutual TLS", func() error {
		out := s.must(t, "kubectl", "assay", "edges")
		for _, port := range []string{"80", "9000"} {
			if !regexp.MustCompile(`(?m)^side/default .* side/server:` + port + ` .* mtls `).MatchString(out) {
				return fmt.Errorf("port %s:\n%s", port, out)
			}
		}
		return nil
	})
	s.goesOn(t)
	if out := s.must(t, "kubectl", "assay", "edges", "--exceptions"); strings.Contains(out, ":7400") {
		t.Errorf("what sidecars say to control is listed:\n%s", out)
	}
}

// steadyFailed is what a steady client says when something fails.
var steadyFailed = regexp.MustCompile(`(?m)^(FAILED|MOVED|BROKEN) .*$`)

// unnoticed does something that the client that asks all the time does not notice.
func (s *sides) unnoticed(t *testing.T, do func(*testing.T)) {
	t.Helper()
	failures := func() []string {
		return steadyFailed.FindAllString(s.cluster.Kubectl(t, "logs", "-n", "side", "deployment/client", "-c", "client"), -1)
	}
	before := len(failures())
	do(t)
	s.goesOn(t)
	if now := failures(); len(now) > before {
		t.Errorf("the client noticed:\n%s", strings.Join(now[before:], "\n"))
	}
}

// goesOn waits until the client that asks all the time has had more answers of each kind.
func (s *sides) goesOn(t *testing.T) {
	t.Helper()
	before := s.had(t)
	s.cluster.Eventually(t, "the client has answers of every kind", func() error {
		for i, n := range s.had(t) {
			if n <= before[i]+5 {
				return fmt.Errorf("it had %v, and has %v", before, s.had(t))
			}
		}
		return nil
	})
}

// had is how many answers of each kind the client has had.
func (s *sides) had(t *testing.T) (n [3]int) {
	t.Helper()
	for line := range strings.Lines(s.cluster.Kubectl(t, "logs", "-n", "side", "deployment/client", "-c", "client", "--tail=200")) {
		fmt.Sscanf(line, "answered %d %d %d", &n[0], &n[1], &n[2])
	}
	return n
}

// strict: who is not in the mesh is refused, and the kubelet's probes are not.
func (s *sides) strict(t *testing.T) {
	c := s.cluster
	server := s.podOf(t, "server")
	try := func() (string, error) {
		return c.TryKubectl(t.Context(), "", "exec", "outsider", "--", "/bin/echo", "try", "http://"+server.Status.PodIP+":9000/")
	}
	web := func() (string, error) {
		return c.TryKubectl(t.Context(), "", "exec", "outsider", "--", "/bin/echo", "try", "http://server.side/")
	}
	c.Kubectl(t, "wait", "--for=condition=Ready", "pod/outsider", "--timeout=150s")
	if out, err := web(); err != nil || !strings.Contains(out, "path=/") {
		t.Errorf("while the namespace is not strict: %v\n%s", err, out)
	}
	s.unnoticed(t, func(t *testing.T) {
		c.Apply(t, sideStrict)
		c.Eventually(t, "an outsider is refused", func() error {
			if out, err := web(); err == nil {
				return fmt.Errorf("answered: %s", out)
			}
			return nil
		})
	})
	if out, err := try(); err == nil || !strings.Contains(out+err.Error(), "reset") {
		t.Errorf("raw TCP: %v\n%s", err, out)
	}
	if out, err := s.call(t, "http://server/strict"); err != nil {
		t.Errorf("in the mesh: %v\n%s", err, out)
	}
	c.Eventually(t, "the refusal is told of", func() error {
		if out := s.must(t, "kubectl", "assay", "edges", "--exceptions"); !strings.Contains(out, "plaintext-in-strict") && !strings.Contains(out, "refused") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	s.metrics(t)
	s.probed(t, server.Metadata.Name, "/ready", "/live")
	now := s.pod(t, server.Metadata.Name)
	for _, status := range now.Status.ContainerStatuses {
		if !status.Ready || status.RestartCount > 0 {
			t.Errorf("the server with its probes: %+v", status)
		}
	}
}

// metrics: in a strict namespace, too, who is outside of the mesh reads what a sidecar counts, where its pod
// says. That is listed, and no finding.
func (s *sides) metrics(t *testing.T) {
	t.Helper()
	c, server := s.cluster, s.podOf(t, "server")
	c.Eventually(t, "a pod's metrics are read", func() error {
		out, err := c.TryKubectl(t.Context(), "", "exec", "outsider", "--", "/bin/echo", "try", "http://"+server.Status.PodIP+":"+server.Metadata.Annotations["prometheus.io/port"]+server.Metadata.Annotations["prometheus.io/path"])
		if err != nil || !regexp.MustCompile(`(?m)^assay_requests_total\{.*namespace="side",name="server",`).MatchString(out) {
			return fmt.Errorf("%v %s", err, out)
		}
		return nil
	})
	c.Eventually(t, "that is listed", func() error {
		if out := s.must(t, "kubectl", "assay", "edges", "--exceptions"); !regexp.MustCompile(`(?m):9181 .*metrics`).MatchString(out) {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	if out, _ := s.run(t, "kubectl", "assay", "check"); strings.Contains(out, "9181") {
		t.Errorf("check:\n%s", out)
	}
}

// probed waits until the kubelet has been answered a few times more.
func (s *sides) probed(t *testing.T, pod string, paths ...string) {
	t.Helper()
	count := func(path string) int {
		return strings.Count(s.cluster.Kubectl(t, "logs", "-n", "side", pod, "-c", "server"), " asks for "+path+"\n")
	}
	for _, path := range paths {
		before := count(path)
		s.cluster.Eventually(t, "the kubelet asks for "+path, func() error {
			if n := count(path); n < before+3 {
				return fmt.Errorf("%d times, and %d a while ago", n, before)
			}
			return nil
		})
	}
}

// job: one that is done ends, and its sidecar with it.
func (s *sides) job(t *testing.T) {
	c := s.cluster
	c.Apply(t, sideJob)
	c.Kubectl(t, "wait", "-n", "side", "--for=condition=complete", "job/once", "--timeout=180s")
	if out := c.Kubectl(t, "logs", "-n", "side", "job/once", "-c", "once"); strings.Count(out, "path=/job") != 5 {
		t.Errorf("it had\n%s", out)
	}
	uid := c.Kubectl(t, "get", "pods", "-n", "side", "-l", "job-name=once", "-o", "jsonpath={.items[0].metadata.uid}")
	c.Eventually(t, "nobody knows the job's pod any more", func() error {
		if _, there := s.workloadsOf(t)[uid]; there {
			return fmt.Errorf("it is a workload")
		}
		if out := s.must(t, "kubectl", "assay", "get", "hosts"); strings.Contains(out, "side/once-") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
}
