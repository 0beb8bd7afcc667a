package kubernetes_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"assay.dev/kube/install"
)

// conditionsManifest has an object of each of our kinds that is in effect, and one that is not.
const conditionsManifest = `apiVersion: v1
kind: Namespace
metadata: {name: fine}
---
apiVersion: v1
kind: Namespace
metadata: {name: wrong}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: fine}
spec: {ports: [{port: 80}]}
---
apiVersion: assay.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: web, namespace: fine}
spec: {targetRefs: [{name: web}], timeouts: {request: 5s}}
---
apiVersion: assay.dev/v1alpha1
kind: Egress
metadata: {name: partner, namespace: fine}
spec: {hosts: [example.com], ports: [443]}
---
apiVersion: assay.dev/v1alpha1
kind: MeshConfig
metadata: {name: default, namespace: fine}
spec: {mode: strict}
---
apiVersion: assay.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: web, namespace: wrong}
spec: {targetRefs: [{name: web}], timeouts: {request: 5s}}
---
apiVersion: assay.dev/v1alpha1
kind: Egress
metadata: {name: partner, namespace: wrong}
spec: {addresses: [192.0.2.1/24], ports: [443]}
---
apiVersion: assay.dev/v1alpha1
kind: MeshConfig
metadata: {name: default, namespace: wrong}
spec: {mode: strict, accessLog: much}
`

// mendedManifest is what mends those that are not.
const mendedManifest = `apiVersion: v1
kind: Service
metadata: {name: web, namespace: wrong}
spec: {ports: [{port: 80}]}
---
apiVersion: assay.dev/v1alpha1
kind: Egress
metadata: {name: partner, namespace: wrong}
spec: {addresses: [192.0.2.0/24], ports: [443]}
---
apiVersion: assay.dev/v1alpha1
kind: MeshConfig
metadata: {name: default, namespace: wrong}
spec: {mode: strict, accessLog: "1%"}
`

// conditions: every object of our kinds says whether it is in effect, and why not, in its columns,
// its condition and an event; and follows when that is mended.
func (m *person) conditions(t *testing.T) {
	c := m.cluster
	c.Apply(t, conditionsManifest)
	wait := func(namespace, object, status string) {
		t.Helper()
		c.Kubectl(t, "wait", "-n", namespace, object, "--for=condition=Accepted="+status, "--timeout=120s")
	}
	columns := func(namespace, kind, want string) {
		t.Helper()
		out := c.Kubectl(t, "get", kind, "-n", namespace)
		if !regexp.MustCompile(`(?m)^NAME .* ACCEPTED +REASON +AGE *$`).MatchString(out) || !regexp.MustCompile(`(?m)^`+want+` +\S+ *$`).MatchString(out) {
			t.Errorf("columns of %s in %s, want %s:\n%s", kind, namespace, want, out)
		}
	}
	for _, o := range []struct{ kind, name, fine, wrong, mended, reason, says string }{
		{"trafficpolicies", "web", `web +web +5s +True +Accepted`, `web +web +5s +False +TargetNotFound`, `web +web +5s +True +Accepted`,
			"TargetNotFound", "there is no Service wrong/web (it has no effect: make the Service, or correct targetRefs)"},
		{"egresses", "partner", `partner +\["example.com"\] +\[443\] +True +Accepted`, `partner +\["192.0.2.1/24"\] +\[443\] +False +Invalid`, `partner +\["192.0.2.0/24"\] +\[443\] +True +Accepted`,
			"Invalid", `spec.addresses[0]: "192.0.2.1/24" has bits beyond its length; want 192.0.2.0/24`},
		{"meshconfigs", "default", `default +strict +True +Accepted`, `default +strict +False +Invalid`, `default +strict +True +Accepted`,
			"Invalid", `spec.accessLog: "much": want a share`},
	} {
		object := o.kind + "/" + o.name
		wait("fine", object, "True")
		columns("fine", o.kind, o.fine)
		wait("wrong", object, "False")
		columns("wrong", o.kind, o.wrong)
		if says := c.Kubectl(t, "get", "-n", "wrong", object, "-o", `jsonpath={.status.conditions[?(@.type=="Accepted")].message}`); !strings.HasPrefix(says, o.says) {
			t.Errorf("%s says %s", object, says)
		}
		c.Eventually(t, object+" has an event", func() error {
			out, err := c.TryKubectl(t.Context(), "", "describe", "-n", "wrong", object)
			if err == nil && !regexp.MustCompile(`(?m)^ +Warning +`+o.reason+` .*`+regexp.QuoteMeta(o.says)).MatchString(out) {
				err = fmt.Errorf("it is described as\n%s", out)
			}
			return err
		})
	}
	// (Of the policy control may hear before it hears of the service.)
	if out := c.Kubectl(t, "get", "events", "-n", "fine", "--field-selector", "reason!=TargetNotFound", "-o", "name"); strings.TrimSpace(out) != "" {
		t.Errorf("events of what is in effect: %s", out)
	}
	// Of two that say the same the younger one is told which is older.
	c.Apply(t, `apiVersion: assay.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: younger, namespace: fine}
spec: {targetRefs: [{name: web}]}
`)
	wait("fine", "trafficpolicy/younger", "False")
	columns("fine", "trafficpolicies", `younger +web +False +Conflicted`)
	c.Kubectl(t, "delete", "trafficpolicy", "-n", "fine", "web")
	wait("fine", "trafficpolicy/younger", "True")

	c.Apply(t, mendedManifest)
	for kind, row := range map[string]string{"trafficpolicies/web": `web +web +5s`, "egresses/partner": `partner +\["192.0.2.0/24"\] +\[443\]`, "meshconfigs/default": `default +strict`} {
		wait("wrong", kind, "True")
		columns("wrong", strings.Split(kind, "/")[0], row+` +True +Accepted`)
	}
	versions := func() string {
		return c.Kubectl(t, "get", "assay", "-A", "-o", `jsonpath={range .items[*]}{.kind} {.metadata.namespace}/{.metadata.name} {.metadata.resourceVersion}{"\n"}{end}`)
	}
	// What stands is not written again: an object more takes a look of control's.
	before := versions()
	c.Apply(t, `apiVersion: assay.dev/v1alpha1
kind: Egress
metadata: {name: later, namespace: fine}
spec: {hosts: [example.org], ports: [443]}
`)
	wait("fine", "egress/later", "True")
	after := versions()
	for line := range strings.Lines(before) {
		if !strings.Contains(after, line) {
			t.Errorf("it was written again: %s%s", line, after)
		}
	}
	c.Kubectl(t, "delete", "namespace", "fine", "wrong", "--wait=true")
}

// olderDefinitions: with a definition of before objects had a status, control tells events, says so
// once, and is quiet; an installation brings the one of its release.
func (m *person) olderDefinitions(t *testing.T) {
	c := m.cluster
	control := c.Kubectl(t, "get", "pods", "-n", install.DefaultNamespace, "-l", "app.kubernetes.io/component=control", "-o", "name")
	c.Kubectl(t, "create", "namespace", "older")
	c.Kubectl(t, "patch", "customresourcedefinition", "egresses.assay.dev", "--type=json", "-p", `[{"op": "remove", "path": "/spec/versions/0/subresources"}]`)
	n := 0
	c.Eventually(t, "control says that the definition is old", func() error {
		n++ // the API server takes some moments until it serves it so
		c.Apply(t, fmt.Sprintf(`apiVersion: assay.dev/v1alpha1
kind: Egress
metadata: {name: e%d, namespace: older}
spec: {hosts: ["not a name"], ports: [443]}
`, n))
		out, err := c.TryKubectl(t.Context(), "", "logs", "-n", install.DefaultNamespace, strings.TrimSpace(control))
		if err == nil && !strings.Contains(out, "the definition of egresses is of an earlier release") {
			err = fmt.Errorf("control says\n%s", out)
		}
		return err
	})
	c.Eventually(t, "there is an event of each", func() error {
		out, err := c.TryKubectl(t.Context(), "", "get", "events", "-n", "older", "--field-selector", "reason=Invalid,type=Warning", "-o", "name")
		if got := len(strings.Fields(out)); err == nil && got != n {
			err = fmt.Errorf("%d events of %d", got, n)
		}
		return err
	})
	out := c.Kubectl(t, "logs", "-n", install.DefaultNamespace, strings.TrimSpace(control))
	if strings.Count(out, "of an earlier release") != 1 || strings.Contains(out, "conditions of Assay's own kinds: cannot be written") {
		t.Errorf("control says\n%s", out)
	}
	c.Kubectl(t, "delete", "namespace", "older", "--wait=true")
	if out := m.must(t, "assay", installArgs...); !strings.Contains(out, "customresourcedefinition/egresses.assay.dev changed\n") {
		t.Errorf("install says\n%s", out)
	}
	m.haveStatus(t)
}

// haveStatus: every definition has a status of its own.
func (m *person) haveStatus(t *testing.T) {
	t.Helper()
	for _, name := range []string{"egresses", "meshconfigs", "trafficpolicies"} {
		if out := m.cluster.Kubectl(t, "get", "customresourcedefinition", name+".assay.dev", "-o", "jsonpath={.spec.versions[0].subresources}"); !strings.Contains(out, "status") {
			t.Errorf("%s have subresources %q", name, out)
		}
	}
}

// olderChart is the chart as it was before objects had a status.
func olderChart(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS("../../charts/assay")); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "templates", "definitions.yaml")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	older := strings.ReplaceAll(string(text), "    subresources:\n      status: {}\n", "")
	if older == string(text) {
		t.Fatal("the chart's definitions have no status")
	}
	if err := os.WriteFile(file, []byte(older), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}
