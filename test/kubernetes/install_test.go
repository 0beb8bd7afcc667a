package kubernetes_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"assay.dev/kube/install"
	"assay.dev/test/kubernetes"
)

// person is who installs: with the command, as kubectl's plugin too.
type person struct {
	cluster *kubernetes.Cluster
	bin     string // a folder with kubectl and kubectl-assay
}

func newPerson(t *testing.T, c *kubernetes.Cluster) *person {
	m := &person{c, t.TempDir()}
	assay := kubernetes.BuildStatic(t, "assay.dev/cmd/assay")
	for name, to := range map[string]string{"kubectl": c.KubectlPath(), "kubectl-assay": assay, "assay": assay} {
		if err := os.Symlink(to, filepath.Join(m.bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// run executes a command of the folder; it returns what it printed and its exit code.
func (m *person) run(t *testing.T, name string, args ...string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(m.bin, name), args...)
	cmd.Env = []string{"KUBECONFIG=" + m.cluster.Kubeconfig(), "PATH=" + m.bin, "HOME=" + m.bin}
	out, err := cmd.CombinedOutput()
	failed, ended := errors.AsType[*exec.ExitError](err)
	if err != nil && !ended {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	if ended {
		return string(out), failed.ExitCode()
	}
	return string(out), 0
}

// must is run that has to succeed.
func (m *person) must(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, code := m.run(t, name, args...)
	if code != 0 {
		t.Fatalf("%s %v: exit code %d\n%s", name, args, code, out)
	}
	return out
}

// install is how the suite installs.
var installArgs = []string{"install", "--image", kubernetes.AssayImage, "--image-pull-policy", "Never", "--volume", "emptyDir", "--timeout", "7m"}

// virtualNode is one in name only, as of a virtual-kubelet.
const virtualNode = `apiVersion: v1
kind: Node
metadata: {name: virtual, labels: {type: virtual-kubelet, kubernetes.io/os: linux}}
spec:
  taints: [{key: virtual-kubelet.io/provider, value: other, effect: NoSchedule}]
`

// TestInstall: a mesh is installed, used, upgraded and taken out, and nothing of it is left.
func TestInstall(t *testing.T) {
	c := kubernetes.Up(t, 1)
	if err := c.LoadAssay(t.Context()); err != nil {
		t.Fatal(err)
	}
	m := newPerson(t, c)
	m.try(t) // before the mesh is there
	objects, files := m.objects(t), m.files(t)

	t.Run("before", m.before)
	t.Run("reason", m.reason)
	c.Apply(t, virtualNode)
	out := m.must(t, "assay", installArgs...)
	t.Logf("install says:\n%s", out)
	if !strings.Contains(out, "control answers, and 1 of 1 nodes have joined\n") {
		t.Errorf("install does not say that every node has joined")
	}
	t.Run("again", func(t *testing.T) {
		for line := range strings.Lines(m.must(t, "assay", installArgs...)) {
			if strings.HasSuffix(line, " created\n") || strings.HasSuffix(line, " changed\n") || strings.HasSuffix(line, " deleted\n") {
				t.Errorf("an installation over itself: %s", line)
			}
		}
	})
	t.Run("restricted", m.restricted)
	t.Run("accounts", m.accounts)
	t.Run("definitions", m.definitions)
	t.Run("conditions", m.conditions)
	t.Run("older definitions", m.olderDefinitions)
	if t.Failed() {
		t.FailNow()
	}
	failed := len(m.failures(t)) // before the server was there
	t.Run("mesh", m.meshed)

	out = m.must(t, "kubectl", "assay", "uninstall", "--purge", "--timeout", "7m")
	t.Logf("uninstall says:\n%s", out)
	if !strings.Contains(out, "left: label assay.dev/mesh on namespace/try") || strings.Count(out, "left: ") != 1 {
		t.Errorf("uninstall does not say what it leaves")
	}
	if now := m.files(t); now != files {
		t.Errorf("on the node were\n%s\nand are\n%s", files, now)
	}
	m.leaves(t, objects)
	m.asBefore(t, failed)
}

// leaves fails the test for what is in the cluster now and was not there before.
func (m *person) leaves(t *testing.T, before []string) {
	t.Helper()
	for _, o := range m.objects(t) {
		if !slices.Contains(before, o) {
			t.Errorf("left in the cluster: %s", o)
		}
	}
}

// try runs what the documentation tries the mesh with.
func (m *person) try(t *testing.T) {
	t.Helper()
	text, err := os.ReadFile("../../examples/kubernetes/try.yaml")
	if err != nil {
		t.Fatal(err)
	}
	m.cluster.Apply(t, string(text))
	m.cluster.Rollout(t, "try", "deployment/server")
	m.cluster.Rollout(t, "try", "deployment/client")
}

// objects are the names of all that the installation could leave in the cluster.
func (m *person) objects(t *testing.T) []string {
	t.Helper()
	const kinds = "namespaces,customresourcedefinitions,clusterroles,clusterrolebindings,roles,rolebindings,serviceaccounts,configmaps,secrets," +
		"services,deployments,daemonsets,networkpolicies,persistentvolumeclaims,poddisruptionbudgets,validatingwebhookconfigurations,mutatingwebhookconfigurations"
	out := m.cluster.Kubectl(t, "get", kinds, "-A", "--no-headers", "-o", "custom-columns=K:.kind,N:.metadata.namespace,M:.metadata.name")
	var list []string
	for line := range strings.Lines(out) {
		list = append(list, strings.Join(strings.Fields(line), " "))
	}
	return list
}

// files are those of the node that the installation could change.
func (m *person) files(t *testing.T) string {
	t.Helper()
	node := m.cluster.Nodes[0]
	list := node.MustExec(t, "sh", "-c",
		`ls /etc/cni/net.d; sha256sum /opt/cni/bin/*; ls -d /run/assay /var/lib/assay/agent /var/lib/assay/bin /sys/fs/cgroup/assay /sys/fs/cgroup/*/assay 2>/dev/null; true`)
	var network any // its meaning; spaces may be others
	if err := json.Unmarshal([]byte(node.MustExec(t, "cat", "/etc/cni/net.d/10-pods.conflist")), &network); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%s%v\n", list, network)
}

// before: what the mesh can do in this cluster is known before.
func (m *person) before(t *testing.T) {
	out, code := m.run(t, "assay", "check", "--pre", "-o", "json")
	var list []install.Judgement
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	checks := map[string]bool{}
	for _, j := range list {
		checks[j.Check] = true
		if j.Status != install.OK {
			t.Errorf("%+v", j)
		}
	}
	if code != 0 || !checks["kubernetes"] || !checks["kernel"] || !checks["runtime"] || !checks["network"] || !checks["gateway-api"] {
		t.Errorf("exit code %d, checks %v", code, slices.Sorted(maps.Keys(checks)))
	}
	m.cluster.Apply(t, `apiVersion: v1
kind: Pod
metadata: {name: host, namespace: default}
spec:
  hostNetwork: true
  terminationGracePeriodSeconds: 1
  containers: [{name: c, image: `+kubernetes.EchoImage+`, args: [sleep]}]
`)
	out, code = m.run(t, "assay", "check", "--pre")
	if code != 2 || !strings.Contains(out, "warn  host-network: namespace default: host\n") {
		t.Errorf("with a pod in the host's network: exit code %d\n%s", code, out)
	}
	m.cluster.Kubectl(t, "delete", "pod", "host", "--wait=true")
}

// reason: an installation that does not come to its end says why.
func (m *person) reason(t *testing.T) {
	out, code := m.run(t, "assay", "install", "--image", "assay.test/nothing:1", "--image-pull-policy", "Never", "--volume", "emptyDir", "--timeout", "20s")
	if code != 1 || !strings.Contains(out, "ErrImageNeverPull") {
		t.Errorf("exit code %d\n%s", code, out)
	}
}

// restricted: of the namespace's pods only the agent's need privileges.
func (m *person) restricted(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, m.cluster.KubectlPath(), "label", "--overwrite", "--dry-run=server", "namespace", install.DefaultNamespace, "pod-security.kubernetes.io/enforce=restricted")
	cmd.Env = []string{"KUBECONFIG=" + m.cluster.Kubeconfig(), "HOME=" + m.bin}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "assay-agent-") || strings.Contains(string(out), "assay-control-") {
		t.Errorf("pods that are not restricted: %v\n%s", err, out)
	}
}

// accounts: they may do what is documented, and nothing else that not everybody may.
func (m *person) accounts(t *testing.T) {
	everybody := m.allowed(t, "system:serviceaccount:default:default", install.DefaultNamespace)
	for _, account := range []string{install.ControlName, install.AgentName} {
		user := "system:serviceaccount:" + install.DefaultNamespace + ":" + account
		for namespace, where := range map[string][]string{"try": {"every namespace"}, install.DefaultNamespace: {"every namespace", install.DefaultNamespace}} {
			var got []string
			for _, line := range m.allowed(t, user, namespace) {
				if !slices.Contains(everybody, line) {
					got = append(got, line)
				}
			}
			if want := documented(t, account, where...); !slices.Equal(got, want) {
				t.Errorf("%s in %s may\n%s\nand the documentation says\n%s", account, namespace, strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		}
	}
}

var listed = regexp.MustCompile(`^(\S*)\s+\[(.*?)\]\s+\[(.*?)\]\s+\[(.*?)\]$`)

// allowed is what the API server lets an account do: "verb,… resource.group names".
func (m *person) allowed(t *testing.T, user, namespace string) []string {
	t.Helper()
	var list []string
	for line := range strings.Lines(m.cluster.Kubectl(t, "auth", "can-i", "--list", "--no-headers", "-n", namespace, "--as", user)) {
		f := listed.FindStringSubmatch(strings.TrimRight(line, "\n"))
		if f == nil {
			f = []string{"", "", strings.TrimSpace(line), "", ""}
		}
		verbs := strings.Fields(f[4])
		slices.Sort(verbs)
		list = append(list, strings.TrimSpace(strings.Join(verbs, ",")+" "+f[1]+f[2]+" "+f[3]))
	}
	slices.Sort(list)
	return list
}

// documented reads the table in docs/kubernetes.md, in the words of allowed.
func documented(t *testing.T, account string, where ...string) []string {
	t.Helper()
	text, err := os.ReadFile("../../docs/kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	verbs := map[string][]string{} // by resource.group and names
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.TrimSuffix(strings.TrimSpace(line), " |"), " | ")
		if len(cells) != 4 || cells[0] != "| `"+account+"`" || !slices.Contains(where, cells[1]) {
			continue
		}
		what, name, _ := strings.Cut(cells[2], " named ")
		resources, group, grouped := strings.Cut(what, " of ")
		for r := range strings.SplitSeq(resources, ", ") {
			kind, sub, hasSub := strings.Cut(r, "/")
			if grouped {
				kind += "." + group
			}
			if hasSub {
				kind += "/" + sub
			}
			key := strings.TrimSpace(kind + " " + name)
			verbs[key] = append(verbs[key], strings.Split(cells[3], ", ")...)
		}
	}
	if len(verbs) == 0 {
		t.Fatalf("docs/kubernetes.md says nothing of %s in %v", account, where)
	}
	var list []string
	for key, v := range verbs {
		slices.Sort(v)
		list = append(list, strings.Join(slices.Compact(v), ",")+" "+key)
	}
	slices.Sort(list)
	return list
}

// definitions: the API server finds nothing to object to, takes what is right, and
// refuses what is not.
func (m *person) definitions(t *testing.T) {
	for _, name := range []string{"egresses", "meshconfigs", "trafficpolicies"} {
		var d struct {
			Status struct {
				Conditions []struct{ Type, Status, Message string }
			}
		}
		m.cluster.Get(t, "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/"+name+".assay.dev", &d)
		established := false
		for _, c := range d.Status.Conditions {
			established = established || c.Type == "Established" && c.Status == "True"
			if c.Type == "NonStructuralSchema" && c.Status == "True" {
				t.Errorf("%s: %s", name, c.Message)
			}
		}
		if !established {
			t.Errorf("%s: %+v", name, d.Status.Conditions)
		}
	}
	m.cluster.Apply(t, `apiVersion: assay.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: server, namespace: try}
spec:
  targetRefs: [{name: server}]
  timeouts: {request: 5s}
`)
	if out := m.cluster.Kubectl(t, "get", "trafficpolicies", "-n", "try"); !regexp.MustCompile(`(?m)^server +server +5s `).MatchString(out) {
		t.Errorf("columns:\n%s", out)
	}
	for manifest, want := range map[string]string{
		`{"kind": "TrafficPolicy", "spec": {"targetRefs": [{"name": "a"}], "timeouts": {"request": "soon"}}}`: "spec.timeouts.request",
		`{"kind": "TrafficPolicy", "spec": {"targetRefs": [{"name": "a"}], "retries": 3}}`:                    `unknown field "spec.retries"`,
		`{"kind": "MeshConfig", "spec": {"mode": "lenient"}}`:                                                 "spec.mode",
		`{"kind": "Egress", "spec": {"hosts": ["example.com"]}}`:                                              "spec.ports: Required",
	} {
		var o map[string]any
		if err := json.Unmarshal([]byte(manifest), &o); err != nil {
			t.Fatal(err)
		}
		o["apiVersion"], o["metadata"] = "assay.dev/v1alpha1", map[string]any{"name": "default", "namespace": "try"}
		text, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		out, err := m.cluster.TryKubectl(t.Context(), string(text), "apply", "--dry-run=server", "-f", "-")
		if err == nil || !strings.Contains(out+err.Error(), want) {
			t.Errorf("%s: %v\n%s", manifest, err, out)
		}
	}
	m.cluster.Kubectl(t, "delete", "trafficpolicy", "-n", "try", "server")
}

// meshed: pods that ran before the mesh are in it once their namespace is labelled, and nobody
// fails for that.
func (m *person) meshed(t *testing.T) {
	names := m.cluster.Kubectl(t, "get", "pods", "-n", "try", "-o", "name")
	m.cluster.Kubectl(t, "label", "namespace", "try", install.MeshLabel+"=enabled")
	m.cluster.Eventually(t, "the client calls the server under mutual TLS", func() error {
		out := m.must(t, "kubectl", "assay", "edges")
		if !regexp.MustCompile(`(?m)^try/client .* try/server:80 .* mtls `).MatchString(out) {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	if out := m.must(t, "kubectl", "assay", "get", "workloads", "-n", "try"); strings.Count(out, "\ntry ") != 3 {
		t.Errorf("three workloads are wanted:\n%s", out)
	}
	if now := m.cluster.Kubectl(t, "get", "pods", "-n", "try", "-o", "name"); now != names {
		t.Errorf("pods were\n%s\nand are\n%s", names, now)
	}
}

// failures are what the client has to say of requests that failed.
func (m *person) failures(t *testing.T) (list []string) {
	t.Helper()
	for line := range strings.Lines(m.cluster.Kubectl(t, "logs", "-n", "try", "deployment/client")) {
		if strings.Contains(line, "FAILED") {
			list = append(list, strings.TrimSpace(line))
		}
	}
	return list
}

// answered is how many answers the client has had.
func (m *person) answered(t *testing.T) int {
	t.Helper()
	found := regexp.MustCompile(`answered (\d+)\n`).FindAllStringSubmatch(m.cluster.Kubectl(t, "logs", "-n", "try", "deployment/client"), -1)
	if len(found) == 0 {
		return 0
	}
	n, err := strconv.Atoi(found[len(found)-1][1])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// asBefore: the pods talk, were not restarted, and have nothing of the mesh. failed are
// the requests that failed before the mesh came.
func (m *person) asBefore(t *testing.T, failed int) {
	c := m.cluster
	if out := c.Kubectl(t, "get", "pods", "-n", "try", "-o", "jsonpath={range .items[*]}{.status.containerStatuses[0].restartCount} {end}"); strings.TrimSpace(out) != "0 0 0" {
		t.Errorf("restarts: %s", out)
	}
	now := m.failures(t)
	if len(now) > failed {
		t.Errorf("%d requests failed while the mesh came, was there and went:\n%s", len(now)-failed, strings.Join(now[failed:], "\n"))
	}
	answered := m.answered(t)
	c.Eventually(t, "the client is answered as before", func() error {
		if n := m.answered(t); n <= answered+100 {
			return fmt.Errorf("%d answers, and %d a while ago", n, answered)
		}
		return nil
	})
	if out := m.failures(t); len(out) > len(now) {
		t.Errorf("requests fail without the mesh:\n%s", strings.Join(out[len(now):], "\n"))
	}
	node := c.Nodes[0]
	if out := node.MustExec(t, "ps", "-eo", "args"); strings.Contains(out, "assay") && strings.Contains(out, "assay-proxy") {
		t.Errorf("proxies run:\n%s", out)
	}
	rules := node.MustExec(t, "sh", "-c", `for n in /run/netns/*; do nsenter --net="$n" nft list tables; nsenter --net="$n" ip rule; done`)
	if strings.Contains(rules, "assay") || strings.Contains(rules, "fwmark") {
		t.Errorf("rules in pods' namespaces:\n%s", rules)
	}
	c.Kubectl(t, "delete", "namespace", "try", "--wait=true")
}
