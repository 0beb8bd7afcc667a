package kubernetes_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"assay.dev"
	"assay.dev/kube/node"
	"assay.dev/test/kubernetes"
	"assay.dev/test/lab"
)

// mesh is the mesh of a cluster of one node, as processes of its machines.
type mesh struct {
	t     *testing.T
	c     *kubernetes.Cluster
	node  *kubernetes.Machine
	agent *lab.Process
	args  []string // of agents
}

// programs is where the commands are in the machines.
const programs = "/usr/local/assay"

// put copies a program of this machine into one of the cluster's.
func put(t *testing.T, m *kubernetes.Machine, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.MkdirAll(m.Path(filepath.Dir(to)), 0o755)
	}
	if err == nil {
		err = os.WriteFile(m.Path(to), b, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// account writes a kubeconfig into the node that may do what agents may and nothing else.
func (m *mesh) account() {
	m.t.Helper()
	rules, err := json.Marshal(node.Rules())
	if err != nil {
		m.t.Fatal(err)
	}
	local, err := json.Marshal(node.SystemRules())
	if err != nil {
		m.t.Fatal(err)
	}
	m.c.Apply(m.t, fmt.Sprintf(`apiVersion: v1
kind: Namespace
metadata: {name: assay-system}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: assay-agent, namespace: assay-system}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: assay-trust, namespace: assay-system}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: assay-agent}
rules: %s
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: assay-agent}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: assay-agent}
subjects: [{kind: ServiceAccount, name: assay-agent, namespace: assay-system}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: assay-agent, namespace: assay-system}
rules: %s
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: assay-agent, namespace: assay-system}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: assay-agent}
subjects: [{kind: ServiceAccount, name: assay-agent, namespace: assay-system}]
`, rules, local))
	authority := strings.TrimSpace(m.c.Kubectl(m.t, "config", "view", "--raw", "-o", "jsonpath={.clusters[0].cluster.certificate-authority-data}"))
	token := strings.TrimSpace(m.c.Kubectl(m.t, "create", "token", "assay-agent", "-n", "assay-system", "--duration=2h"))
	write(m.t, m.node, "/etc/assay/kubeconfig", fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://%s:6443", certificate-authority-data: %s}}]
users: [{name: agent, user: {token: %s}}]
contexts: [{name: c, context: {cluster: c, user: agent}}]
current-context: c
`, m.c.Control.IPv4, authority, token))
}

func write(t *testing.T, m *kubernetes.Machine, file, text string) {
	t.Helper()
	err := os.MkdirAll(m.Path(filepath.Dir(file)), 0o700)
	if err == nil {
		err = os.WriteFile(m.Path(file), []byte(text), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// startMesh starts control on the control plane's machine and an agent on the node.
func startMesh(t *testing.T, c *kubernetes.Cluster) *mesh {
	t.Helper()
	m := &mesh{t: t, c: c, node: c.Nodes[0]}
	command, proxy := kubernetes.BuildStatic(t, "assay.dev/cmd/assay"), kubernetes.BuildStatic(t, "assay.dev/cmd/assay-proxy")
	put(t, c.Control, command, programs+"/assay")
	put(t, m.node, command, programs+"/assay")
	put(t, m.node, proxy, programs+"/assay-proxy")
	admin, err := os.ReadFile(c.Kubeconfig())
	if err != nil {
		t.Fatal(err)
	}
	api := "https://" + c.Control.IPv4.String() + ":6443"
	m.account()
	write(t, c.Control, "/etc/assay/kubeconfig", regexp.MustCompile(`server: \S+`).ReplaceAllString(string(admin), "server: "+api))
	c.Control.Start(t, "env", programs+"/assay", "control", "--kubernetes", "--kubeconfig", "/etc/assay/kubeconfig", "--data", "/var/lib/assay/control", "--listen", c.Control.IPv4.String()+":7400")
	write(m.t, m.node, "/etc/assay/token", c.Kubectl(t, "create", "token", "assay-agent", "-n", "assay-system", "--audience=assay", "--bound-object-kind=Node", "--bound-object-name="+m.node.Name))
	m.args = []string{
		"agent", "--node", m.node.Name, "--control", c.Control.IPv4.String() + ":7400", "--kubeconfig", "/etc/assay/kubeconfig",
		"--node-token", "/etc/assay/token",
	}
	m.startAgent(programs)
	return m
}

// startAgent starts an agent out of a folder. Of the cgroups it sees what programs of the
// node see.
func (m *mesh) startAgent(folder string) {
	m.t.Helper()
	m.agent = m.node.Start(m.t, append([]string{"nsenter", "--cgroup=/proc/1/ns/cgroup", folder + "/assay"}, m.args...)...)
}

// list is what control has of a kind.
func (m *mesh) list(kind string, into any) error {
	out, err := m.c.Control.Try(m.t.Context(), "env", programs+"/assay", "get", kind, "-o", "json")
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(out), into)
}

// workloads are those that control knows, by ID.
func (m *mesh) workloads() (map[string]assay.Workload, error) {
	var items []assay.Workload
	if err := m.list("workloads", &items); err != nil {
		return nil, err
	}
	list := map[string]assay.Workload{}
	for _, w := range items {
		list[w.ID] = w
	}
	return list, nil
}

// pod is what the API server has of one.
type pod struct {
	Name, UID, IP string
	Restarts      int
	Ready         bool
}

func (m *mesh) pods() map[string]pod {
	m.t.Helper()
	var list struct {
		Items []struct {
			Metadata struct{ Name, UID, DeletionTimestamp string }
			Status   struct {
				PodIP             string
				ContainerStatuses []struct {
					RestartCount int
					Ready        bool
				}
			}
		}
	}
	m.c.Get(m.t, "/api/v1/namespaces/bank/pods", &list)
	pods := map[string]pod{}
	for _, p := range list.Items {
		if p.Metadata.DeletionTimestamp != "" {
			continue
		}
		x := pod{Name: p.Metadata.Name, UID: p.Metadata.UID, IP: p.Status.PodIP, Ready: true}
		for _, s := range p.Status.ContainerStatuses {
			x.Restarts += s.RestartCount
			x.Ready = x.Ready && s.Ready
		}
		name, _, _ := strings.Cut(x.Name, "-")
		pods[name] = x
	}
	return pods
}

// certified waits until control has workloads of all these pods, with artifacts.
func (m *mesh) certified(pods ...pod) map[string]assay.Workload {
	m.t.Helper()
	var list map[string]assay.Workload
	lab.Eventually(m.t, 2*time.Minute, "the pods are meshed and attested", func() (err error) {
		if m.agent.Ended() {
			m.t.Fatal("the agent has ended")
		}
		if list, err = m.workloads(); err != nil {
			return err
		}
		for _, p := range pods {
			if w, ok := list[p.UID]; !ok || len(w.Artifacts) == 0 || w.MeshedSince.IsZero() {
				return fmt.Errorf("of %s control knows %+v", p.Name, w)
			}
		}
		return nil
	})
	return list
}

// get asks from a pod.
func (m *mesh) get(from, url string) (string, error) {
	return m.c.TryKubectl(m.t.Context(), "", "exec", "-n", "bank", from, "-c", "client", "--", "/bin/echo", "get", url)
}

// proxy is the number, on the node, of a pod's proxy.
func (m *mesh) proxy(uid string) string {
	m.t.Helper()
	out, _ := m.node.Try(m.t.Context(), "pgrep", "-f", "^assay-proxy "+uid)
	if list := strings.Fields(out); len(list) == 1 {
		return list[0]
	}
	return ""
}

// left is what there still is of a pod on the node.
func (m *mesh) left(uid string) string {
	var left []string
	if out, _ := m.node.Try(m.t.Context(), "pgrep", "-f", "^assay-proxy "+uid); out != "" {
		left = append(left, "process "+out)
	}
	for _, pattern := range []string{"/sys/fs/cgroup/assay/" + uid, "/sys/fs/cgroup/*/assay/" + uid, "/var/lib/assay/agent/workloads/" + uid + ".*", "/run/assay/workloads/" + uid} {
		files, _ := filepath.Glob(m.node.Path(pattern))
		left = append(left, files...)
	}
	return strings.Join(left, " ")
}

// load asks for ever from a pod of its own; failures returns what was not answered so far.
func (m *mesh) startLoad(at string) (failures func() string) {
	m.t.Helper()
	m.c.Apply(m.t, fmt.Sprintf(loadManifest, at))
	logs := func() string { return m.c.Kubectl(m.t, "logs", "-n", "bank", "load", "--tail=-1") }
	m.c.Kubectl(m.t, "wait", "-n", "bank", "pod/load", "--for=condition=Ready", "--timeout=120s")
	said := 0
	return func() string {
		m.t.Helper()
		m.c.Eventually(m.t, "the load goes on", func() error {
			if now := strings.Count(logs(), "answered"); now > said+1 {
				said = now
				return nil
			}
			return fmt.Errorf("it has said nothing more")
		})
		var failed []string
		for line := range strings.Lines(logs()) {
			if strings.HasPrefix(line, "FAILED") {
				failed = append(failed, line)
			}
		}
		return strings.Join(failed, "")
	}
}
