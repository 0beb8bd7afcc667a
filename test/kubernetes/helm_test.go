package kubernetes_test

import (
	"os"
	"path/filepath"
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
	out := helm(append([]string{"install"}, values...)...)
	if !strings.Contains(out, "assay.dev/mesh=enabled") {
		t.Errorf("helm says:\n%s", out)
	}
	failed := len(m.failures(t)) // before the server was there
	m.meshed(t)

	if out, code := m.run(t, "assay", installArgs...); code != 1 || !strings.Contains(out, "use helm upgrade") {
		t.Errorf("what is Helm's is changed by others: exit code %d\n%s", code, out)
	}
	helm(append(append([]string{"upgrade"}, values...), "--set", "olderGrace=1m")...)
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
