package kubernetes_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/api"
)

// probes: the kubelet's reach a strict pod, and nothing else of the node does; nor does the
// kubelet where no probe is declared.
func (k *kinds) probes(t *testing.T) {
	at := k.address(t, "probed")
	for _, port := range []string{"8080", "8081", "8082", "9090"} {
		if out, err := k.node.Try(t.Context(), "curl", "-sS", "-m", "20", "http://"+at+":"+port+"/from-the-node"); err == nil || strings.Contains(out, "host=") {
			t.Errorf("a process of the node was answered at port %s: %s", port, out)
		}
	}
	k.c.Apply(t, fmt.Sprintf(viaManifest, at))
	k.c.Eventually(t, "the kubelet is refused at a port without a probe", func() error {
		out := k.c.Kubectl(t, "get", "events", "-n", "default", "--field-selector", "involvedObject.name=via,reason=Unhealthy", "-o", "jsonpath={.items[*].message}")
		if !strings.Contains(out, at+":8082") || !strings.Contains(out, "connection reset by peer") {
			return fmt.Errorf("events: %q", out)
		}
		return nil
	})
	k.c.Kubectl(t, "delete", "pod", "via")
	answered := func() int {
		return strings.Count(k.c.Kubectl(t, "logs", "-n", "kinds", "probed", "-c", "http", "--tail=-1"), "asks for /live")
	}
	n := answered()
	k.c.Eventually(t, "it is probed on and on", func() error {
		if now := answered(); now < n+5 {
			return fmt.Errorf("%d times, and %d a while ago", now, n)
		}
		return nil
	})
	k.steady(t, "probed")
	for _, c := range []string{"http", "tcp", "other"} {
		if out := k.c.Kubectl(t, "logs", "-n", "kinds", "probed", "-c", c, "--tail=-1"); strings.Contains(out, "/via") || strings.Contains(out, "/from-the-node") {
			t.Errorf("the application was asked by somebody else than the kubelet, or where it has no probe:\n%s", out)
		}
	}
	if out := k.c.Kubectl(t, "logs", "-n", "kinds", "probed", "-c", "hooked", "--tail=-1"); !strings.Contains(out, "asks for /hook") {
		t.Errorf("the hook was not called: %s", out)
	}
	k.c.Eventually(t, "probes are exceptions that are listed", func() error {
		if len(k.edges(t, "probe", ":8080")) == 0 || len(k.edges(t, "probe", ":9090")) == 0 {
			return fmt.Errorf("%s", k.edges(t))
		}
		return nil
	})
}

// steady: a pod is ready, and none of its containers was started twice.
func (k *kinds) steady(t *testing.T, pod string) {
	t.Helper()
	out := k.read(t, "get", "pod", "-n", "kinds", pod, "-o", "jsonpath={range .status.containerStatuses[*]}{.name}:{.ready}:{.restartCount} {end}")
	for s := range strings.FieldsSeq(out) {
		if !strings.HasSuffix(s, ":true:0") {
			t.Errorf("%s: %s", pod, out)
		}
	}
}

// containers: whatever runs in a pod, and whenever, is in the mesh and in the pod's set.
func (k *kinds) containers(t *testing.T) {
	if out := k.c.Kubectl(t, "logs", "-n", "kinds", "client", "-c", "before"); !strings.Contains(out, "path=/secret") {
		t.Errorf("the init container says %q", out)
	}
	k.reaches(t, "client", "http://"+k.address(t, "client")+":8085/itself", "client")
	k.reaches(t, "db-0", "http://"+k.address(t, "client")+":8085/secret", "client")
	k.c.Kubectl(t, "debug", "-n", "kinds", "client", "--image=assay.test/echo:debug", "--image-pull-policy=Never", "-c", "debugger", "--", "/bin/echo", "get", "http://web/secret")
	k.c.Eventually(t, "the ephemeral container has asked", func() error {
		out, err := k.c.TryKubectl(t.Context(), "", "logs", "-n", "kinds", "client", "-c", "debugger")
		if err == nil && !strings.Contains(out, "path=/secret") {
			err = fmt.Errorf("it says %q", out)
		}
		return err
	})
	uid := k.uid(t, "client")
	k.c.Eventually(t, "every container is in the artifact set", func() error {
		w, err := k.workload(t, uid)
		var set []string
		for _, a := range w.Artifacts {
			set = append(set, k.digests[string(a.Digest)])
		}
		if slices.Sort(set); err == nil && !slices.Equal(set, []string{"1", "beside", "debug", "init"}) {
			err = fmt.Errorf("it is %v: %+v", set, w.Artifacts)
		}
		return err
	})
}

// stateful: a pod is reached by its own name, and is who it is.
func (k *kinds) stateful(t *testing.T) {
	for _, name := range []string{"db-0", "db-1"} {
		for _, domain := range []string{"db", "db.kinds", "db.kinds.svc.cluster.local"} {
			k.reaches(t, "client", "http://"+name+"."+domain+":8080/secret", name+" ")
		}
	}
	k.c.Eventually(t, "they were asked under mutual TLS", func() error {
		if list := k.edges(t, "kinds/db:8080", " mtls "); len(list) == 0 {
			return fmt.Errorf("%s", k.edges(t))
		}
		return nil
	})
	// The next one of the name is another pod, at another address.
	old := k.uid(t, "db-1")
	k.c.Kubectl(t, "delete", "pod", "-n", "kinds", "db-1")
	k.c.Rollout(t, "kinds", "statefulset/db")
	k.reaches(t, "client", "http://db-1.db:8080/secret", "db-1 ")
	k.left(t, old)
}

func (k *kinds) daemons(t *testing.T) {
	name := k.read(t, "get", "pods", "-n", "kinds", "-l", "app=each", "-o", "jsonpath={.items[0].metadata.name}")
	k.reaches(t, "client", "http://"+k.address(t, name)+":8080/secret", "each-")
}

func (k *kinds) families(t *testing.T) {
	addrs := strings.Fields(k.read(t, "get", "service", "-n", "kinds", "web", "-o", "jsonpath={.spec.clusterIPs[*]}"))
	if len(addrs) != 2 {
		t.Fatalf("the service has the addresses %v", addrs)
	}
	for _, a := range addrs {
		k.reaches(t, "client", "http://"+net.JoinHostPort(a, "80")+"/secret", "web-")
	}
}

// narrow: a pod that may do nothing, of a namespace that lets nobody do more.
func (k *kinds) narrow(t *testing.T) {
	k.c.Kubectl(t, "wait", "-n", "narrow", "pod/narrow", "--for=condition=Ready", "--timeout=170s")
	k.reaches(t, "narrow", "http://web.kinds.svc.cluster.local/secret", "web-")
	at := k.read(t, "get", "pod", "-n", "narrow", "narrow", "-o", "jsonpath={.status.podIP}")
	k.reaches(t, "client", "http://"+at+":8080/secret", "narrow ")
}

// users: a pod with a user namespace of its own.
func (k *kinds) users(t *testing.T) {
	if out, err := k.c.TryKubectl(t.Context(), "", "wait", "-n", "kinds", "pod/users", "--for=condition=Ready", "--timeout=120s"); err != nil {
		events := k.c.Kubectl(t, "get", "events", "-n", "kinds", "--field-selector", "involvedObject.name=users", "-o", "jsonpath={.items[*].message}")
		if why := regexp.MustCompile(`(?i)[^.;]*(user namespace|idmap|uid_map)[^.;]*`).FindString(events); why != "" {
			t.Skipf("skipped: this machine's kernel or runtime has no user namespaces for pods, and hostUsers is not tested here: %s", strings.TrimSpace(why))
		}
		t.Fatalf("%v %s\n%s", err, out, events)
	}
	if m := strings.Fields(k.c.Kubectl(t, "exec", "-n", "kinds", "users", "--", "/bin/echo", "cat", "/proc/self/uid_map")); len(m) != 3 || m[1] == "0" {
		t.Fatalf("its users are the node's: %v", m)
	}
	k.reaches(t, "users", "http://web/secret", "web-")
	k.reaches(t, "client", "http://"+k.address(t, "users")+":8080/secret", "users ")
	k.steady(t, "users")
}

// host: a pod in the node's network is never meshed. As a client it is refused by what is
// strict, as a server it is outside, and listed.
func (k *kinds) host(t *testing.T) {
	k.c.Kubectl(t, "wait", "-n", "kinds", "pod/host", "--for=condition=Ready", "--timeout=120s")
	if _, err := k.workload(t, k.uid(t, "host")); err == nil {
		t.Error("it is a workload of the mesh")
	}
	if out, err := k.get(t, "host", "http://web.kinds/from-the-host"); err == nil {
		t.Errorf("a strict service answered it: %s", out)
	}
	at := k.node.IPv4.String()
	k.reaches(t, "client", "http://"+at+":18080/to-the-host", "")
	k.c.Eventually(t, "both ways are listed", func() error {
		if len(k.edges(t, "outside: "+at+":18080", "plaintext")) == 0 || len(k.edges(t, "(outside)", "plaintext-in-strict")) == 0 {
			return fmt.Errorf("%s", k.edges(t))
		}
		return nil
	})
	// It is labelled by its namespace, and that it is outside is told like any other's.
	k.described(t, "kinds", "host", "PodNotMeshed", "Warning", "assay", "hostNetwork")
	if out, code := k.person.run(t, "kubectl", "assay", "check"); code != 2 || !strings.Contains(out, "pod-not-meshed: kinds/host") {
		t.Errorf("check: exit code %d\n%s", code, out)
	}
	const metric = `assay_pod_unmeshed{namespace="kinds",pod="host",reason="host-network"} 1`
	if metrics := k.metrics(t); !strings.Contains(metrics, metric) {
		t.Errorf("no metric %s", metric)
	}
	k.c.Kubectl(t, "label", "pod", "-n", "kinds", "host", "assay.dev/mesh=disabled")
	k.c.Eventually(t, "who is meant to be outside is not counted", func() error {
		if strings.Contains(k.metrics(t), metric) {
			return fmt.Errorf("it is")
		}
		return nil
	})
}

// metrics are those of the node's agent.
func (k *kinds) metrics(t *testing.T) string {
	t.Helper()
	return k.node.MustExec(t, "curl", "-sS", "-m", "60", "http://"+k.node.IPv4.String()+":9181/metrics")
}

// kubectl: what people do with a pod does not come from its network.
func (k *kinds) kubectl(t *testing.T) {
	if out := k.c.Kubectl(t, "exec", "-n", "kinds", "client", "-c", "c", "--", "/bin/echo", "lookup", "web"); !strings.Contains(out, "10.96.") {
		t.Errorf("exec: %s", out)
	}
	if out := k.c.Kubectl(t, "logs", "-n", "kinds", "deployment/web", "--tail=-1"); !strings.Contains(out, "asks for /secret") {
		t.Errorf("logs: %s", out)
	}
	file := filepath.Join(t.TempDir(), "note")
	k.c.Kubectl(t, "cp", "-n", "kinds", "-c", "c", "client:/usr/share/doc/note", file)
	if text, err := os.ReadFile(file); err != nil || string(text) != "1" {
		t.Errorf("cp: %q, %v", text, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cmd := k.c.Command(ctx, "port-forward", "-n", "kinds", "pod/probed", ":8082", "--address", "127.0.0.1")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cancel()
	line, err := bufio.NewReader(out).ReadString('\n')
	found := regexp.MustCompile(`127\.0\.0\.1:\d+`).FindString(line)
	if err != nil || found == "" {
		t.Fatalf("port-forward says %q, %v", line, err)
	}
	k.c.Eventually(t, "a forwarded port answers", func() error {
		resp, err := http.Get("http://" + found + "/forwarded")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err == nil && !strings.HasPrefix(string(text), "host=probed ") {
			err = fmt.Errorf("%s", text)
		}
		return err
	})
}

// job: it ends with its containers, and with it everything of the mesh.
func (k *kinds) job(t *testing.T, name, pods string) {
	k.c.Kubectl(t, "wait", "-n", "kinds", "job/"+name, "--for=condition=Complete", "--timeout=170s")
	out := k.read(t, "get", "pods", "-n", "kinds", "-l", pods, "-o", `jsonpath={range .items[*]}{.metadata.uid} {.status.phase} {.status.containerStatuses[*].restartCount}{"\n"}{end}`)
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) != 3 || f[1] != "Succeeded" || f[2] != "0" {
			t.Errorf("pod %q", line)
			continue
		}
		k.left(t, f[0])
		k.c.Eventually(t, "control has forgotten it", func() error {
			if _, err := k.workload(t, f[0]); err == nil || !strings.Contains(err.Error(), "does not know") {
				return fmt.Errorf("it has not (%v)", err)
			}
			return nil
		})
	}
}

// cron: the controller makes a Job in each minute; before this test none, which would meet what
// others do to the server that it asks.
func (k *kinds) cron(t *testing.T) {
	k.c.Kubectl(t, "patch", "cronjob", "-n", "kinds", "cron", "-p", `{"spec":{"suspend":false}}`)
	name := ""
	k.c.Eventually(t, "the CronJob has a Job", func() error {
		name = k.read(t, "get", "jobs", "-n", "kinds", "-o", `jsonpath={.items[?(@.metadata.ownerReferences[0].name=="cron")].metadata.name}`)
		if name, _, _ = strings.Cut(name, " "); name == "" {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	k.c.Kubectl(t, "patch", "cronjob", "-n", "kinds", "cron", "-p", `{"spec":{"suspend":true}}`)
	k.job(t, name, "batch.kubernetes.io/job-name="+name)
}

// shutdown: a server that ends slowly is answered for to its end: the proxy outlives the
// last container.
func (k *kinds) shutdown(t *testing.T) {
	name := k.read(t, "get", "pods", "-n", "kinds", "-l", "app=web", "-o", "jsonpath={.items[0].metadata.name}")
	uid, at := k.uid(t, name), k.address(t, name)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := k.c.Command(ctx, "exec", "-n", "kinds", "client", "-c", "c", "--", "/bin/echo", "get", "http://"+at+":8080/slow/25")
	answer := make(chan string, 1)
	go func() {
		out, err := cmd.CombinedOutput()
		if err != nil {
			out = append(out, err.Error()...)
		}
		answer <- string(out)
	}()
	k.c.Eventually(t, "the request has begun", func() error {
		if out := k.c.Kubectl(t, "logs", "-n", "kinds", name); !strings.Contains(out, "asks for /slow/25") {
			return fmt.Errorf("it has not")
		}
		return nil
	})
	k.c.Kubectl(t, "delete", "pod", "-n", "kinds", name, "--wait=false")
	k.reaches(t, "client", "http://web/secret", "web-")
	m := &mesh{t: t, c: k.c, node: k.node}
	proxies := 0
	for open := true; open; {
		select {
		case out := <-answer:
			open = false
			if !strings.Contains(out, "second 25") || !strings.Contains(out, "that is all") {
				t.Errorf("the answer was cut off: %s", out)
			}
		case <-time.After(time.Second):
			if m.proxy(uid) != "" {
				proxies++
			}
		}
	}
	if proxies == 0 {
		t.Error("its proxy was not seen while the server ended")
	}
	k.c.Kubectl(t, "wait", "-n", "kinds", "pod/"+name, "--for=delete", "--timeout=120s")
	k.left(t, uid)
}

// quiet: in a strict mesh with all of this, nothing is found but what was tried.
func (k *kinds) quiet(t *testing.T) {
	out, _ := k.person.run(t, "kubectl", "assay", "check", "-o", "json")
	var list []assay.Finding
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	asked := k.read(t, "get", "pods", "-A", "-l", "app=each", "-o", "jsonpath={.items[*].metadata.uid}") + " " + k.uid(t, "users")
	for _, f := range list {
		if strings.Contains(asked, f.Workload) && f.Workload != "" {
			t.Errorf("only the kubelet asked it without the mesh, and there is a finding: %+v", f)
		}
		switch f.Kind {
		case "exceptions", "plaintext", "plaintext-in-strict": // DNS; to the node; from there
		case "pod-not-meshed":
			if f.Subject != "kinds/host" {
				t.Errorf("found: %+v", f)
			}
		default:
			t.Errorf("found: %+v", f)
		}
		if strings.Contains(f.Detail, "probe") {
			t.Errorf("a probe is found: %+v", f)
		}
	}
}

// oddManifest is a pod that runs and cannot be meshed: its account's name is none that a
// certificate can have.
const oddManifest = `apiVersion: v1
kind: Namespace
metadata: {name: odd}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: a.b, namespace: odd}
---
apiVersion: v1
kind: Pod
metadata: {name: odd, namespace: odd}
spec:
  serviceAccountName: a.b
  terminationGracePeriodSeconds: 1
` + podContainers

// escapesManifest is a pod that may use raw sockets.
const escapesManifest = `apiVersion: v1
kind: Pod
metadata: {name: escapes, namespace: kinds}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: assay.test/echo:1
    args: [serve]
    securityContext: {runAsUser: 0, capabilities: {add: [NET_RAW]}}
`

// balanced: of every workload the bytes on its link are known, and are its proxy's and those that
// are listed.
func (k *kinds) balanced(t *testing.T) {
	t.Helper()
	k.c.Eventually(t, "every workload's bytes are explained", func() error {
		var workloads []assay.Workload
		var signals []api.SignalsView
		for kind, list := range map[string]any{"workloads": &workloads, "signals": &signals} {
			out, code := k.person.run(t, "kubectl", "assay", "get", kind, "-o", "json")
			if err := json.Unmarshal([]byte(out), list); err != nil || code != 0 {
				return fmt.Errorf("%s: exit code %d: %s (%v)", kind, code, out, err)
			}
		}
		for _, w := range workloads {
			i := slices.IndexFunc(signals, func(s api.SignalsView) bool { return s.Workload == w.ID && s.Gone.IsZero() })
			if i < 0 || signals[i].Balance == nil || signals[i].Balance.Problem != "" {
				return fmt.Errorf("nobody knows what passes the link of %s", w.Name)
			}
			b := signals[i].Balance
			for _, way := range []*assay.BalanceWay{&b.In, &b.Out} {
				if way.Link.Bytes == 0 || way.Proxy.Bytes == 0 || way.Unbalanced() || !way.Adds() {
					return fmt.Errorf("%s: %+v", w.Name, *b)
				}
			}
		}
		if len(workloads) < 6 {
			return fmt.Errorf("%d workloads", len(workloads))
		}
		return nil
	})
}

// captured: whether a pod is what its label says is looked at on and on; what is not so is
// told by an event of the pod, a finding and a metric, and heals where it can.
func (k *kinds) captured(t *testing.T) {
	k.balanced(t)
	k.c.Apply(t, escapesManifest)
	k.c.Kubectl(t, "wait", "-n", "kinds", "pod/escapes", "--for=condition=Ready", "--timeout=120s")
	k.c.Kubectl(t, "exec", "-n", "kinds", "escapes", "--", "/bin/echo", "escape", k.node.IPv4.String())
	escapes := k.uid(t, "escapes")
	k.c.Eventually(t, "a packet that leaves the capture is counted", func() error {
		for line := range strings.Lines(k.metrics(t)) {
			if strings.HasPrefix(line, "assay_exception_packets_total{") && strings.Contains(line, escapes) && strings.Contains(line, `reason="`+assay.ReasonEscaped+`"`) {
				return nil
			}
		}
		return fmt.Errorf("it is not")
	})

	m := &mesh{t: t, c: k.c, node: k.node}
	uid := k.uid(t, "client")
	proxy := m.proxy(uid)
	began := time.Now()
	k.node.MustExec(t, "nsenter", "--net=/proc/"+proxy+"/ns/net", "nft", "flush", "ruleset")
	k.c.Eventually(t, "the rules are back", func() error {
		out, err := k.node.Try(t.Context(), "nsenter", "--net=/proc/"+proxy+"/ns/net", "nft", "list", "ruleset")
		if err == nil && (!strings.Contains(out, "table inet assay {") || !strings.Contains(out, "redirect to")) {
			err = fmt.Errorf("rules: %s", out)
		}
		return err
	})
	t.Logf("rules that somebody flushed were back after %s", time.Since(began).Round(time.Millisecond))
	k.described(t, "kinds", "client", "CaptureChanged", "Warning", "assay")
	k.reaches(t, "client", "http://web/secret", "web-")

	k.node.MustExec(t, "kill", "-9", proxy)
	k.described(t, "kinds", "client", "ProxyEnded", "Warning", "assay")
	k.reaches(t, "client", "http://web/secret", "web-")
	if now := m.proxy(uid); now == "" || now == proxy {
		t.Errorf("its proxy was %s and is %s", proxy, now)
	}

	k.c.Apply(t, oddManifest)
	k.c.Kubectl(t, "wait", "-n", "odd", "pod/odd", "--for=condition=Ready", "--timeout=120s")
	k.c.Kubectl(t, "label", "namespace", "odd", "assay.dev/mesh=enabled")
	k.described(t, "odd", "odd", "PodNotMeshed", "Warning", "assay", "a.b")
	k.described(t, "kinds", "escapes", "CaptureEscaped", "Warning", "assay")
	out, code := k.person.run(t, "kubectl", "assay", "check")
	for _, kind := range []string{"pod-not-meshed: odd/odd", "capture-changed: ", "proxy-ended: ", "capture-escaped: "} {
		if code != 2 || !strings.Contains(out, kind) {
			t.Errorf("no finding %s: exit code %d\n%s", kind, code, out)
		}
	}
	if !strings.Contains(k.metrics(t), `assay_pod_unmeshed{namespace="odd",pod="odd",reason="failed"} 1`) {
		t.Errorf("no metric of a pod that is not meshed")
	}
	k.c.Kubectl(t, "label", "namespace", "odd", "assay.dev/mesh-")
}

// olderManifest is a client that keeps a connection, and its server, of before the mesh.
const olderManifest = `apiVersion: v1
kind: Namespace
metadata: {name: older}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: older}
spec:
  terminationGracePeriodSeconds: 1
` + podContainers + `---
apiVersion: v1
kind: Pod
metadata: {name: load, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  restartPolicy: Never
  containers: [{name: client, image: assay.test/echo:1, args: [load, "http://%s:8080/older"]}]
`

// older: what was open before a pod was captured goes on, also while its namespace is
// strict and refuses what is new, is listed, and is closed when its time is over.
func (k *kinds) older(t *testing.T) {
	server, load, _ := strings.Cut(olderManifest, "---\napiVersion: v1\nkind: Pod\nmetadata: {name: load")
	k.c.Apply(t, server)
	k.c.Kubectl(t, "wait", "-n", "older", "pod/server", "--for=condition=Ready", "--timeout=120s")
	at := k.read(t, "get", "pod", "-n", "older", "server", "-o", "jsonpath={.status.podIP}")
	k.c.Apply(t, fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: load"+load, at))
	logs := func() string { return k.c.Kubectl(t, "logs", "-n", "default", "load", "--tail=-1") }
	k.c.Kubectl(t, "wait", "-n", "default", "pod/load", "--for=condition=Ready", "--timeout=120s")
	k.c.Eventually(t, "the client is answered", func() error {
		if out := logs(); !strings.Contains(out, "answered") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	k.c.Kubectl(t, "label", "namespace", "older", "assay.dev/mesh=enabled")
	k.c.Eventually(t, "its connection is listed", func() error {
		if len(k.edges(t, "older-than-capture")) == 0 {
			return fmt.Errorf("%s", k.edges(t))
		}
		return nil
	})
	if out := logs(); strings.Contains(out, "FAILED") {
		t.Errorf("while the pod was captured:\n%s", out)
	}
	k.c.Apply(t, `apiVersion: assay.dev/v1alpha1
kind: MeshConfig
metadata: {name: default, namespace: older}
spec: {mode: strict}
`)
	k.described(t, "older", "server", "OlderConnections ", "Warning", at+":8080")
	k.described(t, "older", "server", "OlderConnectionsClosed", "Warning", at+":8080")
	k.c.Eventually(t, "the client has lost it", func() error {
		if out := logs(); !strings.Contains(out, "FAILED") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	metrics := k.node.MustExec(t, "curl", "-sS", "-m", "60", "http://"+k.node.IPv4.String()+":9181/metrics")
	if !strings.Contains(metrics, `assay_older_connections{`) {
		t.Errorf("no metric of older connections")
	}
	k.c.Kubectl(t, "delete", "pod", "-n", "default", "load")
}
