package kubernetes_test

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"assay.dev/kube/install"
	"assay.dev/test/kubernetes"
)

// volume is that of one control.
const volume = `{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {name: assay-control, namespace: NAMESPACE},
  spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}}`

// TestReplicas: two controls on one PostgreSQL store serve a cluster. One is killed, then all
// are replaced one after the other: pods talk on, and new ones are meshed meanwhile. The
// cluster is one of IPv6 alone.
func TestReplicas(t *testing.T) {
	c := kubernetes.UpAs(t, kubernetes.Options{Nodes: 2, Families: "6", Proxy: "iptables"})
	if err := c.LoadAssay(t.Context()); err != nil {
		t.Fatal(err)
	}
	m := newPerson(t, c)
	m.try(t)
	c.Kubectl(t, "create", "namespace", install.DefaultNamespace)
	c.Kubectl(t, "create", "secret", "generic", "store", "-n", install.DefaultNamespace, "--from-literal=url="+database(t, c))
	several := append([]string{"install", "--replicas", "2", "--store-secret", "store"}, installArgs[1:]...)
	// One control with a volume was there before.
	c.Apply(t, strings.ReplaceAll(volume, "NAMESPACE", install.DefaultNamespace))
	if out, code := m.run(t, "assay", several...); code != 1 || !strings.Contains(out, "authority") || !strings.Contains(out, "one replica first") {
		t.Errorf("several controls without the authority: exit code %d\n%s", code, out)
	}
	c.Kubectl(t, "delete", "persistentvolumeclaim", "-n", install.DefaultNamespace, "assay-control")
	out := m.must(t, "assay", several...)
	t.Logf("install says:\n%s", out)
	if !strings.Contains(out, "control answers, and 2 of 2 nodes have joined\n") {
		t.Errorf("install does not say that every node has joined")
	}
	if out := c.Kubectl(t, "get", "poddisruptionbudget", "-n", install.DefaultNamespace, "assay-control", "-o", "jsonpath={.status.disruptionsAllowed}"); out != "1" {
		t.Errorf("disruptions allowed: %q", out)
	}
	c.Kubectl(t, "label", "namespace", "try", install.MeshLabel+"=enabled")
	m.workloads(t, 3)
	c.Eventually(t, "the client calls the server under mutual TLS", func() error {
		if out := m.must(t, "kubectl", "assay", "edges"); !regexp.MustCompile(`(?m)^try/client .* try/server:80 .* mtls `).MatchString(out) {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	failed, answered := len(m.failures(t)), m.answered(t)

	controls := strings.Fields(c.Kubectl(t, "get", "pods", "-n", install.DefaultNamespace, "-l", "app.kubernetes.io/component=control", "-o", "name"))
	if len(controls) != 2 {
		t.Fatalf("controls: %v", controls)
	}
	c.Kubectl(t, "delete", "-n", install.DefaultNamespace, controls[0], "--grace-period=0", "--force")
	c.Kubectl(t, "scale", "-n", "try", "deployment/server", "--replicas=4")
	m.workloads(t, 5)
	c.Rollout(t, install.DefaultNamespace, "deployment/assay-control")
	c.Kubectl(t, "rollout", "restart", "-n", install.DefaultNamespace, "deployment/assay-control")
	c.Kubectl(t, "scale", "-n", "try", "deployment/server", "--replicas=5")
	c.Rollout(t, install.DefaultNamespace, "deployment/assay-control")
	m.workloads(t, 6)
	c.Eventually(t, "every node has its stream", func() error {
		if out := m.must(t, "kubectl", "assay", "get", "hosts"); strings.Count(out, "node-") < 2 {
			return fmt.Errorf("%s", out)
		}
		if out, _ := m.run(t, "kubectl", "assay", "check"); strings.Contains(out, "host-not-connected") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	c.Eventually(t, "the client is answered all the while", func() error {
		if n := m.answered(t); n <= answered+100 {
			return fmt.Errorf("%d answers, and %d before", n, answered)
		}
		return nil
	})
	if now := m.failures(t); len(now) > failed {
		t.Errorf("%d requests failed while controls ended:\n%s", len(now)-failed, strings.Join(now[failed:], "\n"))
	}
	out = m.must(t, "kubectl", "assay", "uninstall", "--purge", "--timeout", "7m")
	t.Logf("uninstall says:\n%s", out)
}

// workloads waits until n pods of the namespace try are in the mesh, with certificates.
func (m *person) workloads(t *testing.T, n int) {
	t.Helper()
	m.cluster.Eventually(t, fmt.Sprintf("%d pods are meshed", n), func() error {
		out, code := m.run(t, "kubectl", "assay", "get", "workloads", "-n", "try")
		if lines := regexp.MustCompile(`(?m)^try `).FindAllString(out, -1); code != 0 || len(lines) != n {
			return fmt.Errorf("exit code %d\n%s", code, out)
		}
		if out, _ := m.run(t, "kubectl", "assay", "check"); strings.Contains(out, "proxy-not-ready") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
}

// database starts PostgreSQL beside the API server and returns the URL of a database for pods.
func database(t *testing.T, c *kubernetes.Cluster) string {
	t.Helper()
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if len(found) == 0 {
		t.Skip("skipped: this machine has no PostgreSQL (/usr/lib/postgresql/*/bin/initdb): several controls, and clusters of IPv6 alone, are not tested here")
	}
	bin := filepath.Dir(found[len(found)-1])
	const dir = "/tmp/assay-pg"                                                   // the machine's own
	as := []string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"} // it refuses to be root
	c.Control.MustExec(t, "install", "-d", "-o", "65534", "-g", "65534", dir)
	c.Control.MustExec(t, append(as, filepath.Join(bin, "initdb"), "-D", dir+"/data", "-U", "assay", "-A", "trust", "-N", "--wal-segsize=1")...)
	c.Control.MustExec(t, "sh", "-c", "echo host all all all trust >> "+dir+"/data/pg_hba.conf")
	c.Control.Start(t, append(as, filepath.Join(bin, "postgres"), "-D", dir+"/data", "-k", dir,
		"-h", c.Control.IPv6.String(), "-p", "5432", "-c", "fsync=off", "-c", "shared_buffers=16MB")...)
	c.Eventually(t, "PostgreSQL answers", func() error {
		if r := c.Control.Exec(t, filepath.Join(bin, "psql"), "-h", c.Control.IPv6.String(), "-U", "assay", "-c", "select 1", "postgres"); r.Code != 0 {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	return fmt.Sprintf("postgres://assay@[%s]:5432/postgres?sslmode=disable", c.Control.IPv6)
}
