package install

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// helm runs the tool that `make chart` compiles; without it, the test is skipped.
func helm(t *testing.T, args ...string) (string, error) {
	t.Helper()
	tool, err := filepath.Abs("../../bin/tools/helm")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(tool); err != nil {
		t.Skip("skipped: no bin/tools/helm: make chart compiles it")
	}
	cmd := exec.CommandContext(t.Context(), tool, args...)
	home := t.TempDir()
	cmd.Env = []string{"HOME=" + home, "HELM_CONFIG_HOME=" + home, "HELM_CACHE_HOME=" + home, "HELM_DATA_HOME=" + home, "KUBECONFIG=" + filepath.Join(home, "none")}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err = cmd.Run()
	return out.String(), err
}

// values are options in the chart's words, as far as they are not its defaults.
func values(o *Options) map[string]any {
	v := map[string]any{"image": o.Image}
	for name, x := range map[string]string{
		"imagePullPolicy": o.PullPolicy, "trustDomain": o.TrustDomain, "storeSecret": o.StoreSecret, "volume": o.Volume, "volumeSize": o.VolumeSize,
		"storageClass": o.StorageClass, "cniConf": o.CNIConf, "cniBin": o.CNIBin, "cri": o.CRISocket, "olderGrace": o.OlderGrace, "keepCertificates": o.KeepCertificates,
	} {
		if x != "" {
			v[name] = x
		}
	}
	if o.PullSecrets != nil {
		v["imagePullSecrets"] = o.PullSecrets
	}
	if o.MetricsPort != 0 {
		v["metricsPort"] = o.MetricsPort
	}
	if o.SidecarMetricsPort != 0 {
		v["sidecarMetricsPort"] = o.SidecarMetricsPort
	}
	if o.PodMonitor {
		v["podMonitor"] = true
	}
	if o.Replicas != 0 {
		v["replicas"] = o.Replicas
	}
	if o.ServiceMonitor {
		v["serviceMonitor"] = true
	}
	if o.Injector {
		v["injector"] = true
	}
	if o.NoAgent {
		v["agent"] = false
	}
	return v
}

func write(t *testing.T, v any) string {
	text, err := yaml.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "values.yaml")
	if err := os.WriteFile(file, text, 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// byName reads objects, without what only Helm wants of them.
func byName(t *testing.T, text string) map[string]map[string]any {
	m := map[string]map[string]any{}
	for _, part := range strings.Split(text, "\n---\n") {
		var o map[string]any
		if err := yaml.Unmarshal([]byte(part), &o); err != nil {
			t.Fatalf("%v\n%s", err, part)
		}
		if o == nil {
			continue
		}
		meta := o["metadata"].(map[string]any)
		delete(meta, "annotations")
		name := o["kind"].(string) + "/" + meta["name"].(string)
		if m[name] != nil {
			t.Errorf("%s is there twice", name)
		}
		m[name] = o
	}
	return m
}

// TestChart: what Helm makes of the chart is what `assay install` applies, but for the
// namespace, which Helm's user makes.
func TestChart(t *testing.T) {
	forms["cri in /run"] = Options{Image: "assay.test/assay:4", CRISocket: "/var/run/crio/crio.sock"}
	defer delete(forms, "cri in /run")
	for name, o := range forms {
		full, err := o.Complete()
		if err != nil {
			t.Fatal(err)
		}
		out, err := helm(t, "template", "mesh", chart, "--namespace", full.Namespace, "-f", write(t, values(&o)))
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
		objects, err := Objects(o)
		if err != nil {
			t.Fatal(err)
		}
		text, err := YAML(objects[1:])
		if err != nil {
			t.Fatal(err)
		}
		got, want := byName(t, out), byName(t, string(text))
		for name, w := range want {
			if !reflect.DeepEqual(got[name], w) {
				g, _ := yaml.Marshal(got[name])
				x, _ := yaml.Marshal(w)
				t.Errorf("%s is\n%s\nwant\n%s", name, g, x)
			}
			delete(got, name)
		}
		for name := range got {
			t.Errorf("the chart has %s, `assay install` has not", name)
		}
	}
}

// TestChartRefuses: what options cannot be, values cannot be.
func TestChartRefuses(t *testing.T) {
	for want, v := range map[string]map[string]any{
		"build one as docs/kubernetes.md": {},
		"one control's alone":             {"image": "a", "replicas": 2},
		"there are no metrics":            {"image": "a", "metricsPort": -1, "serviceMonitor": true},
		"nothing would ever be meshed":    {"image": "a", "agent": false},
		"finds the metrics of agents":     {"image": "a", "agent": false, "injector": true, "serviceMonitor": true},
		"no pod gets a sidecar":           {"image": "a", "sidecarMetricsPort": 9181},
		"finds the metrics of sidecars":   {"image": "a", "injector": true, "podMonitor": true},
		"/volume":                         {"image": "a", "volume": "tape"},
		"additional properties 'imagee'":  {"imagee": "a"},
		"/metricsPort":                    {"image": "a", "metricsPort": 70000},
		"/cniBin":                         {"image": "a", "cniBin": "opt/cni"},
		"/image":                          {"image": "a b"},
		"/keepCertificates":               {"image": "a", "keepCertificates": "30m"},
	} {
		out, err := helm(t, "template", "mesh", chart, "--namespace", "mesh", "-f", write(t, v))
		if err == nil || !strings.Contains(out, want) {
			t.Errorf("%v: want a refusal with %q: %v\n%s", v, want, err, out)
		}
	}
	if out, err := helm(t, "template", "mesh", chart, "--namespace", "kube-system", "--set", "image=a"); err == nil || !strings.Contains(out, "a namespace of its own") {
		t.Errorf("in kube-system: %v\n%s", err, out)
	}
}

// TestChartLint: Helm's own rules, and every value is in the schema with its default.
func TestChartLint(t *testing.T) {
	if out, err := helm(t, "lint", "--strict", chart); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	text, err := os.ReadFile(filepath.Join(chart, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var defaults map[string]any
	if err := yaml.UnmarshalStrict(text, &defaults); err != nil {
		t.Fatal(err)
	}
	text, err = os.ReadFile(filepath.Join(chart, "values.schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	var schema struct{ Properties map[string]any }
	if err := json.Unmarshal(text, &schema); err != nil {
		t.Fatal(err)
	}
	delete(schema.Properties, "global")
	for name := range defaults {
		if schema.Properties[name] == nil {
			t.Errorf("values.schema.json has no %s", name)
		}
		delete(schema.Properties, name)
	}
	for name := range schema.Properties {
		t.Errorf("values.yaml has no %s", name)
	}
}
