package kubernetes

import (
	"context"
	"os"
	"path/filepath"
	"time"

	"assay.dev/test/lab"
)

// Enabled is the variable that must be "1", beside lab.EndToEnd, for suites to make
// clusters: `make test-kubernetes` sets both.
const Enabled = "ASSAY_KUBERNETES"

// Main is a suite's TestMain: it becomes a machine's process 1 when it was started
// as one, else it is the lab's.
func Main(m interface{ Run() int }) {
	Init()
	lab.Main(m)
}

// Require skips the test, with what is missing, when no cluster can be made here.
func Require(t lab.TB) {
	t.Helper()
	lab.Require(t)
	if os.Getenv(Enabled) != "1" {
		t.Skipf("skipped: brings up a Kubernetes; set %s=1 (make test-kubernetes does)", Enabled)
	}
	if err := missing(); err != nil {
		t.Skipf("skipped: %v", err)
	}
}

// Up brings up a cluster that is taken down at the end of the test.
func Up(t lab.TB, nodes int) *Cluster {
	t.Helper()
	return UpAs(t, Options{Nodes: nodes})
}

// UpAs is Up for a cluster of another kind.
func UpAs(t lab.TB, o Options) *Cluster {
	t.Helper()
	Require(t)
	// Its end has a time of its own: a context of the test's is over by then.
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Minute)
	defer cancel()
	o.Log = t.Logf
	c, err := New(ctx, o)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			c.explain(t)
		}
		if err := c.Close(); err != nil {
			t.Errorf("%v", err)
		}
	})
	t.Logf("cluster %s, %s, %d nodes, IPv%s, kube-proxy with %s: %s", c.name, c.Version(), o.Nodes, c.kind.Families, c.kind.Proxy, c.Figures)
	return c
}

// explain logs what a reader of a failed test asks first. It is no reason, and says so
// (test/failures.awk).
func (c *Cluster) explain(t lab.TB) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, args := range [][]string{{"get", "nodes,pods,services", "-A", "-o", "wide"}, {"get", "events", "-A", "--sort-by=.lastTimestamp"}} {
		out, err := c.TryKubectl(ctx, "", args...)
		if err != nil {
			out = err.Error()
		}
		t.Logf("for the record: kubectl %v:\n%s", args, out)
	}
	for _, m := range c.machines() {
		logs, _ := filepath.Glob(filepath.Join(m.dir, "*.log"))
		for _, log := range logs {
			t.Logf("for the record: the end of %s on %s:\n%s", filepath.Base(log), m.Name, lastLines(log, 8))
		}
	}
}

// Kubectl runs kubectl as the administrator and returns what it printed; anything but
// success fails the test.
func (c *Cluster) Kubectl(t lab.TB, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	out, err := c.TryKubectl(ctx, "", args...)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return out
}

// Apply applies manifests.
func (c *Cluster) Apply(t lab.TB, manifests string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	if out, err := c.TryKubectl(ctx, manifests, "apply", "-f", "-"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
}

// Import makes an image and gives it to every node.
func (c *Cluster) Import(t lab.TB, img Image) Digests {
	t.Helper()
	d, err := c.TryImport(t.Context(), img)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return d
}

// Rollout waits until every pod of a Deployment, DaemonSet or StatefulSet is ready.
func (c *Cluster) Rollout(t lab.TB, namespace, object string) {
	t.Helper()
	c.Kubectl(t, "rollout", "status", "-n", namespace, object, "--timeout=150s")
}

// Eventually tries until ok succeeds, and fails the test after four minutes.
func (c *Cluster) Eventually(t lab.TB, what string, ok func() error) {
	t.Helper()
	if err := c.await(t.Context(), 4*time.Minute, what, ok); err != nil {
		t.Fatalf("%v", err)
	}
}

// Ready waits until a node is Ready.
func (c *Cluster) Ready(t lab.TB, m *Machine) {
	t.Helper()
	c.Eventually(t, m.Name, func() error { return c.ready(t.Context(), m) })
}

// Get reads an object of the API by its path and decodes it.
func (c *Cluster) Get(t lab.TB, path string, into any) {
	t.Helper()
	if err := c.api(t.Context(), "GET", path, nil, into); err != nil {
		t.Fatalf("%v", err)
	}
}

// BuildStatic compiles a command of this module as it can run in an image without
// anything else, and returns its path here.
func BuildStatic(t lab.TB, pkg string) string {
	t.Helper()
	file, err := lab.BuildHere(pkg)
	if err != nil {
		t.Fatalf("%v", err)
	}
	return file
}
