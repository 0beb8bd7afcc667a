package kubernetes_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/kube/install"
	"assay.dev/test/kubernetes"
)

// agentsManifest is what agents are to control: pods of their account, one on each node,
// with a token of their own. What they would do on the node is not here.
const agentsManifest = `apiVersion: v1
kind: ServiceAccount
metadata: {name: assay-agent, namespace: assay-system}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: assay-trust, namespace: assay-system}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: assay-agent, namespace: assay-system}
spec:
  selector: {matchLabels: {app: agent}}
  template:
    metadata: {labels: {app: agent}}
    spec:
      serviceAccountName: assay-agent
      terminationGracePeriodSeconds: 1
      containers:
      - {name: agent, image: "assay.test/echo:1", args: [sleep], volumeMounts: [{name: token, mountPath: /var/run/secrets/assay}]}
      volumes: [{name: token, projected: {sources: [{serviceAccountToken: {audience: assay, path: token}}]}}]
---
apiVersion: v1
kind: Pod
metadata: {name: of-the-node}
spec:
  hostNetwork: true
  nodeName: node-1
  terminationGracePeriodSeconds: 1
  containers: [{name: c, image: "assay.test/echo:1", args: [sleep]}]
`

// controlling is `assay control --kubernetes` on this machine, outside of the cluster.
type controlling struct {
	address string
	socket  string
	assay   string
	pool    *x509.CertPool
}

// startControl runs control with the rights that an installation gives it.
func startControl(t *testing.T, c *kubernetes.Cluster) *controlling {
	t.Helper()
	dir := t.TempDir()
	r := &controlling{socket: filepath.Join(dir, "control.sock"), assay: kubernetes.BuildStatic(t, "assay.dev/cmd/assay")}
	cmd := exec.Command(r.assay, "control", "--kubernetes", "--kubeconfig", account(t, c, "assay-system", "assay-control", install.ControlRules(), install.ControlLocalRules()),
		"--data", filepath.Join(dir, "data"), "--socket", r.socket, "--listen", "127.0.0.1:0", "--trust-domain", "cluster.test")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	ready, ended := make(chan string, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the process ends with the thread that started it
		ended <- follow(t, cmd, out, ready)
	}()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("control ended with %v", err)
			}
		case <-time.After(time.Minute):
			cmd.Process.Kill()
			t.Errorf("control does not end: %v", <-ended)
		}
	})
	select {
	case r.address = <-ready:
	case err := <-ended:
		ended <- err
		t.Fatal("control has ended")
	case <-time.After(2 * time.Minute):
		t.Fatal("control is not ready")
	}
	c.Eventually(t, "control has published its roots", func() error { return r.trust(t, c) })
	c.Eventually(t, "control has heard the API server", func() error {
		if _, err := r.join(t, "nobody's token"); assay.KindOf(err) == assay.Unavailable {
			return err
		}
		return nil
	})
	return r
}

// trust takes the roots that are published now.
func (r *controlling) trust(t *testing.T, c *kubernetes.Cluster) error {
	t.Helper()
	roots, pool := trusted(t, c), x509.NewCertPool()
	if !pool.AppendCertsFromPEM(roots) {
		return fmt.Errorf("roots are %q", roots)
	}
	r.pool = pool
	return nil
}

// follow runs control, logs what it says, and tells where it listens.
func follow(t *testing.T, cmd *exec.Cmd, out io.Reader, ready chan<- string) error {
	if err := cmd.Start(); err != nil {
		return err
	}
	at := regexp.MustCompile(`msg="control is ready".* hosts=(\S+)`)
	for lines := bufio.NewScanner(out); lines.Scan(); {
		t.Logf("control: %s", lines.Text())
		if m := at.FindStringSubmatch(lines.Text()); m != nil {
			ready <- m[1]
		}
	}
	return cmd.Wait()
}

// trusted reads the roots as agents do.
func trusted(t *testing.T, c *kubernetes.Cluster) []byte {
	t.Helper()
	var m struct{ Data map[string]string }
	c.Get(t, "/api/v1/namespaces/assay-system/configmaps/assay-trust", &m)
	return []byte(m.Data["roots.pem"])
}

// run runs a command of assay's against control.
func (r *controlling) run(t *testing.T, input string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, r.assay, append(args, "--control", r.socket)...)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// dial connects with a certificate, or without one.
func (r *controlling) dial(t *testing.T, cert tls.Certificate) api.HostsClient {
	t.Helper()
	conn, err := grpc.NewClient(r.address, grpc.WithTransportCredentials(credentials.NewTLS(api.ClientTLS(api.Credentials{
		TrustDomain: "cluster.test", Roots: func() *x509.CertPool { return r.pool }, Certificate: func() (*tls.Certificate, error) { return &cert, nil },
	}))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return api.NewHostsClient(conn)
}

// TestControl: control as nodes and people of a real cluster meet it.
func TestControl(t *testing.T) {
	kubernetes.Require(t)
	before, name := machineState(t, "none"), ""
	t.Run("cluster", func(t *testing.T) {
		c := kubernetes.Up(t, 2)
		name = c.Name()
		c.Import(t, echoImage(t, "assay.test/echo:1", "one"))
		installGatewayAPI(t, c)
		c.Kubectl(t, "create", "namespace", "assay-system")
		c.Apply(t, agentsManifest)
		c.Apply(t, everywhereManifest)
		c.Rollout(t, "assay-system", "daemonset/assay-agent")
		c.Rollout(t, "default", "daemonset/everywhere")
		r := startControl(t, c)
		t.Run("stolen tokens", func(t *testing.T) { stolenTokens(t, c, r) })
		t.Run("routes", func(t *testing.T) { routeStatus(t, c, r) })
		t.Run("roots", func(t *testing.T) { rootsAreKept(t, c, r) })
		t.Run("a node goes", func(t *testing.T) { nodeGoes(t, c, r) })
	})
	sameAs(t, before, name)
}

// mounted reads the token of the agent on a node, as a thief there does.
func mounted(t *testing.T, c *kubernetes.Cluster, node string) string {
	t.Helper()
	pod := podsOf(t, c, "assay-system", "app%3Dagent")[node]
	return strings.TrimSpace(c.Kubectl(t, "exec", "-n", "assay-system", pod.name, "--", "/bin/echo", "cat", "/var/run/secrets/assay/token"))
}

// stolenTokens: an agent's token speaks for the pods of its node. What else there is of
// tokens speaks for nobody.
func stolenTokens(t *testing.T, c *kubernetes.Cluster, r *controlling) {
	create := func(args ...string) string {
		return strings.TrimSpace(c.Kubectl(t, append([]string{"create", "token"}, args...)...))
	}
	agents := podsOf(t, c, "assay-system", "app%3Dagent")
	for what, token := range map[string]string{
		"without our audience":          create("assay-agent", "-n", "assay-system", "--bound-object-kind=Pod", "--bound-object-name="+agents["node-1"].name),
		"for another audience":          create("assay-agent", "-n", "assay-system", "--audience=vault", "--bound-object-kind=Pod", "--bound-object-name="+agents["node-1"].name),
		"bound to nothing":              create("assay-agent", "-n", "assay-system", "--audience=assay"),
		"of another account":            create("default", "-n", "assay-system", "--audience=assay", "--bound-object-kind=Node", "--bound-object-name=node-1"),
		"of another namespace":          create("default", "-n", "default", "--audience=assay"),
		"of control":                    create("assay-control", "-n", "assay-system", "--audience=assay"),
		"with a signature that is none": func() string { s := mounted(t, c, "node-1"); return s[:strings.LastIndexByte(s, '.')+1] + "AAAA" }(),
		"that is none":                  "assay1.0123456789abcdef.AAAA.AAAA",
	} {
		if _, err := r.join(t, token); assay.KindOf(err) != assay.Denied {
			t.Errorf("a token %s: %v", what, err)
		} else {
			t.Logf("a token %s: %v", what, err)
		}
	}
	h, err := r.join(t, mounted(t, c, "node-1"))
	if err != nil {
		t.Fatal(err)
	}
	h.speak(t)
	pods := podsOf(t, c, "default", "app%3Deverywhere")
	own, other := pods["node-1"], pods["node-2"]
	if answer := h.say(t, c, own, nil); answer != "" {
		t.Errorf("a pod of its own: %s", answer)
	}
	if id, err := h.issue(t, own.uid); err != nil || id != "spiffe://cluster.test/ns/default/sa/default" {
		t.Errorf("a certificate for a pod of its own: %s, %v", id, err)
	}
	if answer := h.say(t, c, other, nil); !strings.Contains(answer, "on node node-2") {
		t.Errorf("a pod of the other node: %q", answer)
	}
	if id, err := h.issue(t, other.uid); err == nil {
		t.Errorf("a certificate for a pod of the other node: %s", id)
	}
	for what, change := range map[string]func(w *assay.Workload){
		"another account":   func(w *assay.Workload) { w.Name, w.Identity.Account = "admin", "admin" },
		"another's address": func(w *assay.Workload) { w.Addrs = other.addrs },
		"a service":         func(w *assay.Workload) { w.Service = "everywhere" },
	} {
		if answer := h.say(t, c, own, change); answer == "" {
			t.Errorf("its own pod with %s is taken", what)
		} else {
			t.Logf("its own pod with %s: %s", what, answer)
		}
	}
	hidden := realPod{uid: strings.TrimSpace(c.Kubectl(t, "get", "pod", "of-the-node", "-o", "jsonpath={.metadata.uid}")), namespace: "default", account: "default", addrs: own.addrs}
	if answer := h.say(t, c, hidden, nil); !strings.Contains(answer, "its node's network") {
		t.Errorf("a pod of the node's network: %q", answer)
	}
	if answer := h.say(t, c, own, nil); answer != "" {
		t.Errorf("the truth again: %s", answer)
	}
	// Endpoints are those of the API server, and the identity that of the workload.
	c.Eventually(t, "the service has an endpoint of the mesh and one that is not", func() error {
		out, err := r.run(t, "", "get", "services", "everywhere", "-o", "json")
		if err == nil && (strings.Count(out, `"spiffe://cluster.test/ns/default/sa/default"`) != 1 || !strings.Contains(out, own.uid) || !strings.Contains(out, other.uid)) {
			err = errors.New("not yet")
		}
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	// A pod that ends is nobody's.
	c.Kubectl(t, "delete", "pod", own.name)
	c.Eventually(t, "there is no certificate for a pod that has ended", func() error {
		if id, err := h.issue(t, own.uid); err == nil {
			return errors.New("one for " + id)
		}
		return nil
	})
	out, err := r.run(t, "apiVersion: v1\nkind: Service\nmetadata: {name: x}\nspec: {ports: [{port: 1}]}\n", "apply", "-f", "-")
	if err == nil || !strings.Contains(out, "kubectl apply") {
		t.Errorf("assay apply: %v, %s", err, out)
	}
}

// routeStatus: what became of a route stands in its status, beside what others write there.
func routeStatus(t *testing.T, c *kubernetes.Cluster, r *controlling) {
	manifest := func(port int) string {
		return fmt.Sprintf(`apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: everywhere}
spec:
  parentRefs: [{group: "", kind: Service, name: everywhere, port: %d}, {name: edge}]
  rules: [{backendRefs: [{name: everywhere, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: gateways}
spec:
  parentRefs: [{name: edge}]
  rules: [{backendRefs: [{name: everywhere, port: 80}]}]
`, port)
	}
	c.Apply(t, manifest(80))
	c.Kubectl(t, "patch", "httproute", "everywhere", "--subresource=status", "--type=merge", "-p",
		`{"status":{"parents":[{"parentRef":{"name":"edge"},"controllerName":"example.com/edge","conditions":[{"type":"Accepted","status":"True","reason":"Own","message":"","lastTransitionTime":"2021-01-01T00:00:00Z"}]}]}}`)
	type condition struct {
		Type, Status, Reason, LastTransitionTime string
		ObservedGeneration                       int
	}
	type route struct {
		Metadata struct{ ResourceVersion string }
		Status   struct {
			Parents []struct {
				ControllerName string
				ParentRef      map[string]any
				Conditions     []condition
			}
		}
	}
	get := func(name string) (o route) {
		c.Get(t, "/apis/gateway.networking.k8s.io/v1/namespaces/default/httproutes/"+name, &o)
		return o
	}
	shows := func(what, status string, generation int) (at string) {
		t.Helper()
		c.Eventually(t, what, func() error {
			o := get("everywhere")
			raw, _ := json.Marshal(o)
			if len(o.Status.Parents) != 2 || o.Status.Parents[0].ControllerName != "example.com/edge" || o.Status.Parents[0].Conditions[0].Reason != "Own" {
				return fmt.Errorf("%s", raw)
			}
			p := o.Status.Parents[1]
			i := slices.IndexFunc(p.Conditions, func(x condition) bool { return x.Type == "Accepted" })
			if p.ControllerName != "assay.dev/mesh" || p.ParentRef["kind"] != "Service" || i < 0 || p.Conditions[i].Status != status || p.Conditions[i].ObservedGeneration != generation {
				return fmt.Errorf("%s", raw)
			}
			at = p.Conditions[i].LastTransitionTime
			return nil
		})
		return at
	}
	first := shows("the route is accepted", "True", 1)
	c.Apply(t, manifest(81))
	shows("a port that is not there", "False", 2)
	c.Apply(t, manifest(80))
	if again := shows("the route is accepted again", "True", 3); again < first {
		t.Errorf("accepted since %s, and before that since %s", again, first)
	}
	version := get("everywhere").Metadata.ResourceVersion
	if o := get("gateways"); len(o.Status.Parents) != 0 {
		t.Errorf("the status of a gateway's route: %+v", o.Status)
	}
	out, err := r.run(t, "", "get", "httproutes", "everywhere", "-o", "json")
	if err != nil || !strings.Contains(out, `"source": "cluster"`) && !strings.Contains(out, `"source":"cluster"`) {
		t.Errorf("%v: %s", err, out)
	}
	// What somebody takes away comes back, and what does not differ is not written.
	if now := get("everywhere").Metadata.ResourceVersion; now != version {
		t.Errorf("the route was written again: version %s, then %s", version, now)
	}
	c.Kubectl(t, "patch", "httproute", "everywhere", "--subresource=status", "--type=json", "-p", `[{"op":"remove","path":"/status/parents/1"}]`)
	shows("the entry is back", "True", 3)
	c.Kubectl(t, "delete", "httproute", "--all")
}

// rootsAreKept: the ConfigMap follows the authority, and whoever spoils it.
func rootsAreKept(t *testing.T, c *kubernetes.Cluster, r *controlling) {
	before := trusted(t, c)
	if out, err := r.run(t, "", "rotate"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c.Eventually(t, "both roots are published", func() error {
		now := trusted(t, c)
		if n := bytes.Count(now, []byte("BEGIN CERTIFICATE")); n != 2 || !bytes.Contains(now, bytes.TrimSpace(before)) {
			return fmt.Errorf("%d roots", n)
		}
		return nil
	})
	good := trusted(t, c)
	c.Kubectl(t, "patch", "configmap", "assay-trust", "-n", "assay-system", "--type=merge", "-p", `{"data":{"roots.pem":"spoilt"}}`)
	c.Eventually(t, "the roots are back", func() error {
		if !bytes.Equal(trusted(t, c), good) {
			return errors.New("not yet")
		}
		return nil
	})
}

// nodeGoes: with a node goes its host, and its agent's certificate is worth nothing.
func nodeGoes(t *testing.T, c *kubernetes.Cluster, r *controlling) {
	if err := r.trust(t, c); err != nil { // they may have been rotated
		t.Fatal(err)
	}
	h, err := r.join(t, mounted(t, c, "node-2"))
	if err != nil {
		t.Fatal(err)
	}
	h.speak(t)
	pod := podsOf(t, c, "default", "app%3Deverywhere")["node-2"]
	if answer := h.say(t, c, pod, nil); answer != "" {
		t.Fatal(answer)
	}
	c.Kubectl(t, "delete", "node", "node-2", "--wait=false")
	c.Eventually(t, "its host is gone", func() error {
		out, err := r.run(t, "", "get", "hosts")
		if err == nil && strings.Contains(out, h.id) {
			err = errors.New(out)
		}
		return err
	})
	if _, err := h.issue(t, pod.uid); err == nil {
		t.Error("a certificate for a pod of a node that is gone")
	}
	if out, err := r.run(t, "", "get", "audit"); err != nil || !strings.Contains(out, "the API server") {
		t.Errorf("the audit trail does not tell of it: %v\n%s", err, out)
	}
}
