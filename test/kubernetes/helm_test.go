package kubernetes_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"assay.dev/kube/install"
	"assay.dev/test/kubernetes"
)

// TestHelm: who has Helm installs, upgrades and takes out the mesh with it, as
// docs/kubernetes.md says, in a cluster of IPv4 alone.
func TestHelm(t *testing.T) {
	tool, err := filepath.Abs("../../bin/tools/helm")
	if err != nil {
		t.Fatal(err)
	}
	kubernetes.Require(t)
	if _, err := os.Stat(tool); err != nil {
		t.Skip("skipped: no bin/tools/helm: make chart compiles it")
	}
	c := kubernetes.UpAs(t, kubernetes.Options{Nodes: 1, Families: "4", Proxy: "iptables"})
	if err := c.LoadAssay(t.Context()); err != nil {
		t.Fatal(err)
	}
	m := newPerson(t, c)
	if err := os.Symlink(tool, filepath.Join(m.bin, "helm")); err != nil {
		t.Fatal(err)
	}
	m.try(t)
	objects, files := m.objects(t), m.files(t)
	c.Kubectl(t, "create", "namespace", install.DefaultNamespace)
	c.Kubectl(t, "label", "namespace", install.DefaultNamespace, "pod-security.kubernetes.io/enforce=privileged")
	helm := func(args ...string) string {
		return m.must(t, "helm", append(args, "--namespace", install.DefaultNamespace, "--wait", "--timeout", "7m")...)
	}
	values := []string{"assay", "../../charts/assay", "--set", "image=" + kubernetes.AssayImage, "--set", "imagePullPolicy=Never", "--set", "volume=emptyDir"}
	older := slices.Clone(values)
	older[1] = olderChart(t)
	out := helm(append([]string{"install"}, older...)...)
	if !strings.Contains(out, "assay.dev/mesh=enabled") {
		t.Errorf("helm says:\n%s", out)
	}
	failed := len(m.failures(t)) // before the server was there
	m.meshed(t)

	if out, code := m.run(t, "assay", installArgs...); code != 1 || !strings.Contains(out, "use helm upgrade") {
		t.Errorf("what is Helm's is changed by others: exit code %d\n%s", code, out)
	}
	m.helmRefuses(t, values)
	helm(append(append([]string{"upgrade"}, values...), "--set", "olderGrace=1m")...)
	m.haveStatus(t)
	if out := c.Kubectl(t, "get", "daemonset", "-n", install.DefaultNamespace, install.AgentName, "-o", "jsonpath={.spec.template.spec.containers[0].args}"); !strings.Contains(out, "1m") {
		t.Errorf("the agent's arguments after the upgrade: %s", out)
	}

	t.Logf("the nodes are released:\n%s", m.must(t, "assay", "uninstall", "--nodes-only", "--timeout", "7m"))
	helm("uninstall", "assay")
	c.Kubectl(t, "delete", "namespace", install.DefaultNamespace, "--wait=true")
	c.Kubectl(t, "delete", "customresourcedefinitions", "-l", "app.kubernetes.io/part-of=assay")
	if now := m.files(t); now != files {
		t.Errorf("on the node were\n%s\nand are\n%s", files, now)
	}
	m.leaves(t, objects)
	m.asBefore(t, failed)
}

// helmRefuses: what would lose the authority, or pods, is refused by what is in the cluster.
func (m *person) helmRefuses(t *testing.T, values []string) {
	t.Helper()
	c, namespace := m.cluster, install.DefaultNamespace
	upgrade := func(sets ...string) (string, int) {
		args := append([]string{"upgrade"}, values...)
		for _, s := range sets {
			args = append(args, "--set", s)
		}
		return m.run(t, "helm", append(args, "--namespace", namespace, "--dry-run=server")...)
	}
	if out, code := upgrade("agent=false", "injector=true"); code == 0 || !strings.Contains(out, "assay uninstall --nodes-only first") {
		t.Errorf("agents would go and leave their nodes as they are: exit code %d\n%s", code, out)
	}
	several := []string{"replicas=2", "storeSecret=store"}
	if out, code := upgrade(several...); code != 0 {
		t.Errorf("several controls, and no authority elsewhere: exit code %d\n%s", code, out)
	}
	c.Apply(t, `apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: `+install.ControlName+`, namespace: `+namespace+`}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}
`)
	if out, code := upgrade(several...); code == 0 || !strings.Contains(out, "authority is in the volume") {
		t.Errorf("several controls over one that has the authority in its volume: exit code %d\n%s", code, out)
	}
	c.Apply(t, `apiVersion: v1
kind: Secret
metadata:
  name: `+install.AuthorityName+`
  namespace: `+namespace+`
  labels: {app.kubernetes.io/managed-by: Helm}
  annotations: {meta.helm.sh/release-name: assay, meta.helm.sh/release-namespace: `+namespace+`}
stringData: {key: sealing}
`)
	if out, code := upgrade(several...); code != 0 {
		t.Errorf("the authority is in the store: exit code %d\n%s", code, out)
	}
	c.Kubectl(t, "delete", "-n", namespace, "secret/"+install.AuthorityName, "persistentvolumeclaim/"+install.ControlName, "--wait=true")
}
