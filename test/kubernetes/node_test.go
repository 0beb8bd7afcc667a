package kubernetes_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/kube/node"
	"assay.dev/test/kubernetes"
	"assay.dev/test/lab"
)

const bankManifest = `apiVersion: v1
kind: Namespace
metadata: {name: bank}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: robot, namespace: bank}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: bank}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      serviceAccountName: robot
      initContainers:
      - {name: before, image: assay.test/echo:init, args: [lookup, localhost]}
      - {name: beside, image: assay.test/echo:beside, args: [sleep], restartPolicy: Always}
      containers:
      - name: echo
        image: assay.test/echo:1
        args: [serve]
        ports: [{name: http, containerPort: 8080}]
        resources: {requests: {memory: 64Mi}}
        readinessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 1, timeoutSeconds: 20}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: bank}
spec:
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: bank}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: client, image: assay.test/echo:1, args: [sleep]}]
`

// loadManifest is a client that never stops asking.
const loadManifest = `apiVersion: v1
kind: Pod
metadata: {name: load, namespace: bank}
spec:
  terminationGracePeriodSeconds: 1
  restartPolicy: Never
  containers: [{name: client, image: assay.test/echo:1, args: [load, "http://%s/load"]}]
`

// freshManifest is a pod whose first container asks before anything else of it runs.
const freshManifest = `apiVersion: v1
kind: Pod
metadata: {name: fresh, namespace: bank}
spec:
  terminationGracePeriodSeconds: 1
  initContainers: [{name: first, image: assay.test/echo:init, args: [get, "http://%s/from-the-first-packet"]}]
  containers: [{name: client, image: assay.test/echo:1, args: [sleep]}]
`

// TestNode: the pods of a namespace join the mesh by a label, as they run, and leave it
// the same way; new ones are in it from their first packet; agents and proxies come and
// go; and of a pod that ends nothing is left.
func TestNode(t *testing.T) {
	kubernetes.Require(t)
	c := kubernetes.Up(t, 1)
	digests := map[string]kubernetes.Digests{} // by tag
	for _, tag := range []string{"1", "init", "beside"} {
		img := echoImage(t, "assay.test/echo:"+tag, tag)
		img.Plain = tag == "init"
		digests[tag] = c.Import(t, img)
	}
	c.Apply(t, bankManifest)
	c.Rollout(t, "bank", "deployment/web")
	c.Kubectl(t, "wait", "-n", "bank", "pod/client", "--for=condition=Ready", "--timeout=120s")
	m := startMesh(t, c)
	before := m.pods()
	at := before["web"].IP + ":8080"
	failures := m.startLoad(at)
	check := func(when string) {
		t.Helper()
		if failed := failures(); failed != "" {
			t.Fatalf("%s: the load was not answered:\n%s", when, failed)
		}
	}
	check("at first")
	wire := m.node.Capture(t, "GET /plain")
	if out, err := m.get("client", "http://"+at+"/plain"); err != nil {
		t.Fatal(err, out)
	}
	lab.Eventually(t, time.Minute, "what is not meshed is on the wire", func() error {
		if _, found, _ := wire.Seen(); found == 0 {
			return fmt.Errorf("nothing was seen")
		}
		return nil
	})

	began := time.Now()
	c.Kubectl(t, "label", "namespace", "bank", node.MeshLabel+"="+node.Enabled)
	pods := m.pods()
	list := m.certified(pods["web"], pods["client"], pods["load"])
	t.Logf("three pods meshed and attested in %s", time.Since(began).Round(time.Millisecond))
	for name, old := range before {
		if now := pods[name]; now.UID != old.UID || now.Restarts != old.Restarts {
			t.Errorf("%s was %+v and is %+v", name, old, now)
		}
	}
	web := list[pods["web"].UID]
	want := assay.ArtifactSet{}
	for tag, d := range digests { // of init there is no index
		want = append(want, assay.Artifact{Kind: assay.Image, Name: "assay.test/echo:" + tag,
			Digest: assay.Digest(d.Manifest), Config: assay.Digest(d.Config), Index: assay.Digest(d.Index)})
	}
	for _, set := range []assay.ArtifactSet{want, web.Artifacts} {
		slices.SortFunc(set, func(a, b assay.Artifact) int { return strings.Compare(a.Name, b.Name) })
	}
	if !slices.Equal(web.Artifacts, want) {
		t.Errorf("web runs %+v\nwant %+v", web.Artifacts, want)
	}
	if !strings.HasSuffix(web.Identity.String(), "/ns/bank/sa/robot") {
		t.Errorf("web is %s", web.Identity)
	}
	check("meshed")
	secret := m.node.Capture(t, "GET /secret")
	crosses := func(when string) {
		t.Helper()
		c.Eventually(t, "a request crosses, "+when, func() error {
			out, err := m.get("client", "http://"+at+"/secret")
			if err == nil && !strings.Contains(out, "client="+pods["client"].IP+" ") {
				err = fmt.Errorf("the server says %s", out)
			}
			return err
		})
		secret.ExpectNone(t)
	}
	crosses("as the pods run")
	c.Eventually(t, "a request to the service crosses", func() error {
		_, err := m.get("client", "http://web.bank.svc.cluster.local/secret")
		return err
	})
	secret.ExpectNone(t)
	confined(t, m, pods["web"])

	t.Run("first packet", func(t *testing.T) {
		first := m.node.Capture(t, "GET /from-the-first-packet")
		c.Apply(t, fmt.Sprintf(freshManifest, at))
		c.Kubectl(t, "wait", "-n", "bank", "pod/fresh", "--for=condition=Ready", "--timeout=150s")
		first.ExpectNone(t)
		m.certified(m.pods()["fresh"])
		if out := c.Kubectl(t, "logs", "-n", "bank", "fresh", "-c", "first"); !strings.Contains(out, "path=/from-the-first-packet") {
			t.Errorf("its first container says %q", out)
		}
	})

	t.Run("agents come and go", func(t *testing.T) {
		old := m.proxy(pods["web"].UID)
		if old == "" {
			t.Fatal("web has no proxy")
		}
		m.agent.Kill()
		crosses("without an agent")
		check("without an agent")
		// A pod that ends meanwhile.
		fresh := m.pods()["fresh"].UID
		c.Kubectl(t, "delete", "pod", "-n", "bank", "fresh", "--grace-period=1")
		const elsewhere = "/opt/next/assay"
		put(t, m.node, kubernetes.BuildStatic(t, "assay.dev/cmd/assay"), elsewhere+"/assay")
		put(t, m.node, kubernetes.BuildStatic(t, "assay.dev/cmd/assay-proxy"), elsewhere+"/assay-proxy")
		m.startAgent(elsewhere)
		m.certified(pods["web"], pods["client"])
		crosses("with the next agent")
		check("with the next agent")
		if now := m.proxy(pods["web"].UID); now != old {
			t.Errorf("web's proxy was %s and is %s", old, now)
		}
		c.Eventually(t, "nothing is left of a pod that ended without an agent", func() error {
			if left := m.left(fresh); left != "" {
				return fmt.Errorf("left: %s", left)
			}
			return nil
		})
	})

	t.Run("a proxy dies", func(t *testing.T) {
		old := m.proxy(pods["client"].UID)
		m.node.MustExec(t, "kill", "-9", old)
		crosses("with another proxy")
		if now := m.proxy(pods["client"].UID); now == "" || now == old {
			t.Errorf("client's proxy was %s and is %s", old, now)
		}
		check("while another pod's proxy died")
	})

	t.Run("labels of pods", func(t *testing.T) {
		c.Kubectl(t, "label", "pod", "-n", "bank", "client", node.MeshLabel+"="+node.Disabled)
		c.Eventually(t, "a pod leaves by its own word", func() error { return m.gone(pods["client"]) })
		c.Kubectl(t, "label", "pod", "-n", "bank", "client", node.MeshLabel+"-")
		m.certified(pods["client"])
		crosses("when it is back")
	})

	t.Run("a pod ends", func(t *testing.T) {
		uid := pods["client"].UID
		c.Kubectl(t, "delete", "pod", "-n", "bank", "client", "--grace-period=1")
		c.Eventually(t, "nothing is left of it", func() error {
			if left := m.left(uid); left != "" {
				return fmt.Errorf("left: %s", left)
			}
			list, err := m.workloads()
			if _, ok := list[uid]; err == nil && ok {
				err = fmt.Errorf("control still knows it")
			}
			return err
		})
		check("afterwards")
	})

	t.Run("release", func(t *testing.T) {
		c.Kubectl(t, "label", "namespace", "bank", node.MeshLabel+"-")
		c.Eventually(t, "control has forgotten web", func() error {
			list, err := m.workloads()
			if _, ok := list[pods["web"].UID]; err == nil && ok {
				err = fmt.Errorf("control still knows it")
			}
			return err
		})
		check("released")
		c.Kubectl(t, "delete", "pod", "-n", "bank", "load", "--grace-period=1") // it holds a connection through both proxies
		c.Eventually(t, "nothing is left in a pod that was released", func() error { return m.gone(pods["web"]) })
		if now := m.pods()["web"]; now.UID != pods["web"].UID || now.Restarts != 0 {
			t.Errorf("web was %+v and is %+v", pods["web"], now)
		}
	})
}

// gone says what of the mesh is still in a pod that runs.
func (m *mesh) gone(p pod) error {
	if left := m.left(p.UID); left != "" {
		return fmt.Errorf("left: %s", left)
	}
	out, err := m.node.Try(m.t.Context(), "sh", "-c", `for n in /run/netns/*; do if ip netns exec ${n##*/} ip -br addr | grep -q "`+p.IP+`/"; then ip netns exec ${n##*/} nft list tables; fi; done`)
	if err == nil && strings.Contains(out, "assay") {
		err = fmt.Errorf("in the pod there is %s", out)
	}
	return err
}

// inPod is the number, on the node, of the one process in a pod whose command line matches.
func (m *mesh) inPod(p pod, command string) string {
	m.t.Helper()
	var found []string
	out, _ := m.node.Try(m.t.Context(), "pgrep", "-f", command)
	for _, pid := range strings.Fields(out) {
		if groups, _ := m.node.Try(m.t.Context(), "cat", "/proc/"+pid+"/cgroup"); strings.Contains(groups, "/pod"+p.UID+"/") {
			found = append(found, pid)
		}
	}
	if len(found) != 1 {
		m.t.Fatalf("of %s's processes %v are %s", p.Name, found, command)
	}
	return found[0]
}

// confined: a pod's proxy is where it outlives the agent's container, and where it can
// harm nobody when memory is short.
func confined(t *testing.T, m *mesh, p pod) {
	t.Helper()
	pid := m.proxy(p.UID)
	if pid == "" {
		t.Fatalf("%s has no proxy", p.Name)
	}
	groups := m.node.MustExec(t, "cat", "/proc/"+pid+"/cgroup")
	for line := range strings.Lines(groups) {
		if !strings.HasSuffix(strings.TrimSpace(line), "/assay/"+p.UID) {
			t.Errorf("its control group is %s", line)
		}
	}
	limits, _ := filepath.Glob(m.node.Path("/sys/fs/cgroup/memory/assay/" + p.UID + "/memory.limit_in_bytes"))
	limits2, _ := filepath.Glob(m.node.Path("/sys/fs/cgroup/assay/" + p.UID + "/memory.max"))
	if limits = append(limits, limits2...); len(limits) != 1 {
		t.Fatalf("limits of memory: %v", limits)
	}
	if b, err := os.ReadFile(limits[0]); err != nil || strings.TrimSpace(string(b)) != fmt.Sprint(256<<20) {
		t.Errorf("its memory is bounded by %s (%v)", b, err)
	}
	score := func(pid string) string {
		return strings.TrimSpace(m.node.MustExec(t, "cat", "/proc/"+pid+"/oom_score_adj"))
	}
	application := m.inPod(p, "^/bin/echo serve")
	if own, want := score(pid), score(application); own != want || own == "0" || own == "1000" {
		t.Errorf("its oom_score_adj is %s, and the application's, of a burstable pod, %s", own, want)
	}
	if mounts, first := m.node.MustExec(t, "readlink", "/proc/"+pid+"/ns/mnt"), m.node.MustExec(t, "readlink", "/proc/1/ns/mnt"); mounts != first {
		t.Errorf("its mounts are %s, the runtime's %s", mounts, first)
	}
	if exe := strings.TrimSpace(m.node.MustExec(t, "readlink", "/proc/"+pid+"/exe")); !strings.HasPrefix(exe, "/var/lib/assay/bin/assay-proxy-") {
		t.Errorf("it executes %s", exe)
	}
	if st := m.node.MustExec(t, "cat", "/proc/"+pid+"/status"); !strings.Contains(st, "NoNewPrivs:\t1") || !strings.Contains(st, "CapBnd:\t0000000000002000") {
		t.Errorf("its status is %s", st)
	}
}
