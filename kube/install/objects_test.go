package install

import (
	"strings"
	"testing"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"sigs.k8s.io/yaml"

	"assay.dev"
)

// forms are choices of options whose objects are kept in testdata.
var forms = map[string]Options{
	"default": {Image: "assay.test/assay:1"},
	"other": {
		Image: "assay.test/assay:2", Namespace: "mesh", PullPolicy: "Never", PullSecrets: []string{"pull"}, TrustDomain: "bank.test",
		StoreSecret: "store", VolumeSize: "5Gi", StorageClass: "fast", CNIConf: "/etc/rancher/cni", CNIBin: "/var/lib/rancher/bin",
		CRISocket: "/var/lib/rancher/containerd.sock", MetricsPort: 9999, ServiceMonitor: true, OlderGrace: "90s", KeepCertificates: "400d",
	},
	"several": {Image: "assay.test/assay:4", Replicas: 3, StoreSecret: "store"},
	"sidecars": {Image: "assay.test/assay:5", Namespace: "mesh", PullPolicy: "Never", Injector: true, NoAgent: true, Volume: EmptyDir, PullSecrets: []string{"pull", "other"},
		SidecarMetricsPort: 9182, PodMonitor: true},
	"both": {Image: "assay.test/assay:6", Injector: true},
	"try":  {Image: "assay.test/assay:3", Volume: EmptyDir, MetricsPort: -1, CRISocket: "/run/k3s/containerd.sock"},
}

// TestObjects compares what is applied with what a person has looked at.
func TestObjects(t *testing.T) {
	for name, o := range forms {
		objects, err := Objects(o)
		if err != nil {
			t.Fatal(err)
		}
		var rest []Object
		for _, o := range objects {
			if _, ok := o.(*apiextensionsv1.CustomResourceDefinition); !ok {
				rest = append(rest, o)
			}
			kind := o.GetObjectKind().GroupVersionKind()
			gvr, ok := resources[kind.Kind]
			if !ok || gvr.GroupVersion() != kind.GroupVersion() {
				t.Errorf("where the API has %v is not known", kind)
			}
		}
		text, err := YAML(rest)
		if err != nil {
			t.Fatal(err)
		}
		same(t, "testdata/"+name+".yaml", text)
		for _, line := range strings.SplitAfter(string(text), "---\n") {
			var o map[string]any
			if err := yaml.UnmarshalStrict([]byte(line), &o); err != nil {
				t.Errorf("not YAML: %v\n%s", err, line)
			}
		}
	}
}

func TestOptionsThatAreWrong(t *testing.T) {
	for want, change := range map[string]func(*Options){
		"build one":                func(o *Options) { o.Image = "" },
		"no image's name":          func(o *Options) { o.Image = "a b" },
		"no namespace's name":      func(o *Options) { o.Namespace = "A" },
		"one of its own":           func(o *Options) { o.Namespace = "kube-system" },
		"want Always":              func(o *Options) { o.PullPolicy = "Sometimes" },
		"want a DNS name":          func(o *Options) { o.TrustDomain = "Not Valid" },
		"want claim or emptyDir":   func(o *Options) { o.Volume = "tape" },
		"want for instance 1Gi":    func(o *Options) { o.VolumeSize = "much" },
		"no absolute path":         func(o *Options) { o.CNIBin = "opt/cni" },
		"no Secret's name":         func(o *Options) { o.StoreSecret = "a/b" },
		"want for instance 10m":    func(o *Options) { o.OlderGrace = "soon" },
		"want for instance 400d":   func(o *Options) { o.KeepCertificates = "30m" },
		"want 1 to 65535":          func(o *Options) { o.MetricsPort = 70000 },
		"there are no metrics":     func(o *Options) { o.MetricsPort, o.ServiceMonitor = -1, true },
		"no pod gets a sidecar":    func(o *Options) { o.SidecarMetricsPort = 9181 },
		"metrics of sidecars, and": func(o *Options) { o.Injector, o.PodMonitor = true, true },
		"or 0 for no metrics":      func(o *Options) { o.Injector, o.SidecarMetricsPort = true, 70000 },
		"nothing would ever be":    func(o *Options) { o.NoAgent = true },
		"finds the metrics of":     func(o *Options) { o.NoAgent, o.Injector, o.ServiceMonitor = true, true, true },
		"one control's alone":      func(o *Options) { o.Replicas = 2 },
		"a mesh has one at least":  func(o *Options) { o.Replicas = -1 },
	} {
		o := forms["default"]
		change(&o)
		_, err := Objects(o)
		if assay.KindOf(err) != assay.Invalid || !strings.Contains(err.Error(), want) {
			t.Errorf("want an error with %q: %v", want, err)
		}
	}
}

// TestOrderOfDeletion: from the last to the first everything can be deleted: no pod that asks for a
// sidecar is refused because control went first, and nothing waits for who holds it.
func TestOrderOfDeletion(t *testing.T) {
	all, err := everything(DefaultNamespace)
	if err != nil {
		t.Fatal(err)
	}
	at := map[string]int{}
	for i, o := range all {
		at[o.GetObjectKind().GroupVersionKind().Kind+"/"+o.GetName()] = i
	}
	order := []string{"PersistentVolumeClaim/" + ControlName, "ClusterRole/" + ControlName, "Service/" + ControlName, "Deployment/" + ControlName, "DaemonSet/" + AgentName, "MutatingWebhookConfiguration/" + InjectorName}
	for i, name := range order {
		if _, there := at[name]; !there || i > 0 && at[order[i-1]] > at[name] {
			t.Errorf("%s is in the wrong place: %v", name, at)
		}
	}
}
