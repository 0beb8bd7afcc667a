package cluster

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"assay.dev"
)

// injectedPod is a pod with a sidecar, as the API server has it.
const injectedPod = `kind: Pod
metadata: {namespace: shop, name: a, uid: u-1, annotations: {assay.dev/injected: "1", other: x}}
spec:
  nodeName: node-1
  initContainers: [{name: assay-proxy, image: "assay.test/assay:1"}, {name: init, image: "init:1"}]
  containers: [{name: app, image: "app:1"}, {name: helper, image: "helper:1"}]
status:
  phase: Running
  podIPs: [{ip: 10.0.1.1}]
  initContainerStatuses:
  - {name: assay-proxy, image: "assay.test/assay:1", imageID: "assay.test/assay@sha256:AAA", ready: true, restartCount: 0}
  - {name: init, image: "init:1", imageID: "reg.test/init@sha256:BBB", ready: true, restartCount: 0}
  containerStatuses:
  - {name: app, image: "app:1", imageID: "sha256:CCC", ready: true, restartCount: 0}
  - {name: helper, image: "helper:1", imageID: "", ready: false, restartCount: 0}
  - {name: odd, image: "odd:1", imageID: "odd@md5:1", ready: false, restartCount: 0}
  ephemeralContainerStatuses:
  - {name: debug, image: "debug:1", imageID: "docker://sha256:AAA", ready: true, restartCount: 0}
`

func digests(text string) string {
	for _, c := range []string{"A", "B", "C", "D"} {
		text = strings.ReplaceAll(text, strings.Repeat(c, 3), strings.Repeat(strings.ToLower(c), 64))
	}
	return text
}

// TestArtifactsOfAPod: what the kubelet says that it runs, without our own container.
func TestArtifactsOfAPod(t *testing.T) {
	m := newModel()
	m.injects = repository("assay.test/assay:2")
	m.set(read(t, digests(injectedPod))...)
	p := m.changes().Pods[0]
	var got []string
	for _, a := range p.Artifacts {
		if a.Kind != assay.Image || a.Evidence != assay.ByAPIServer {
			t.Errorf("%+v", a)
		}
		got = append(got, a.Name+" "+a.Digest.Short()[:1])
	}
	if p.Sidecar != "assay.test/assay:1" || fmt.Sprint(got) != "[init:1 b app:1 c debug:1 a]" {
		t.Errorf("%s: %v", p.Sidecar, got)
	}
	m.set(read(t, digests(strings.Replace(injectedPod, `imageID: ""`, `imageID: "helper@sha256:BBB"`, 1)))...)
	if c := m.changes(); len(c.Pods) != 1 || len(c.Pods[0].Artifacts) != 4 {
		t.Errorf("another container has started: %+v", c)
	}
	m.set(read(t, digests(strings.Replace(injectedPod, "restartCount: 0", "restartCount: 7", 1)))...)
	m.changes()
	for name, text := range map[string]string{
		"nobody injected it": strings.Replace(injectedPod, `assay.dev/injected: "1"`, `a: b`, 1), "no container of ours": strings.Replace(injectedPod, "{name: assay-proxy, image", "{name: other, image", 1),
	} {
		m := newModel()
		m.set(read(t, digests(text))...)
		if p := m.changes().Pods[0]; p.Sidecar != "" || p.Artifacts != nil {
			t.Errorf("%s: %+v", name, p)
		}
	}
}

// TestArtifactsOfAStranger: what has our container's name and another image is what the pod runs,
// like any other.
func TestArtifactsOfAStranger(t *testing.T) {
	for _, c := range []struct{ injects, image, want string }{
		{"assay.test/assay:2", "assay.test/assay:1", "[b c a]"},
		{"assay.test:5000/assay", "assay.test:5000/assay:1@sha256:x", "[b c a]"},
		{"assay.test/assay@sha256:y", "assay.test/assay", "[b c a]"},
		{"assay.test/assay:2", "evil.test/assay:2", "[d b c a]"},
		{"assay.test/assay:2", "assay.test/assay/evil:2", "[d b c a]"},
		{"assay.test:5000/assay", "assay.test:6000/assay", "[d b c a]"},
		{"", "assay.test/assay:1", "[d b c a]"},
	} {
		text := strings.Replace(injectedPod, "name: assay-proxy, image: \"assay.test/assay:1\"}, {", "name: assay-proxy, image: \""+c.image+"\"}, {", 1)
		text = strings.Replace(text, "assay.test/assay@sha256:AAA", "x@sha256:DDD", 1)
		m := newModel()
		m.injects = repository(c.injects)
		for _, o := range read(t, digests(text)) {
			kept, err := trim(o)
			if err != nil {
				t.Fatal(err)
			}
			m.set(kept)
		}
		var got []string
		for _, a := range m.changes().Pods[0].Artifacts {
			got = append(got, a.Digest.Short()[:1])
		}
		if fmt.Sprint(got) != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}

// TestPodsThatAsk follows the labels of pods and of their namespaces.
func TestPodsThatAsk(t *testing.T) {
	m := newModel()
	m.injects = "assay"
	set := func(uid, namespace, label string) {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: uid, UID: types.UID(uid)}, Spec: corev1.PodSpec{NodeName: "n"}}
		if label != "" {
			p.Labels = map[string]string{"assay.dev/mesh": label}
		}
		m.setPod(p)
	}
	namespace := func(name, label string) *metav1.PartialObjectMetadata {
		kept, err := trim(&metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"assay.dev/mesh": label, "x": "y"}}})
		if err != nil {
			t.Fatal(err)
		}
		if n := kept.(*metav1.PartialObjectMetadata); len(n.Labels) != 1 {
			t.Errorf("kept: %v", n.Labels)
		}
		return kept.(*metav1.PartialObjectMetadata)
	}
	set("a", "shop", "")
	set("b", "shop", "disabled")
	set("c", "shop", "enabled")
	set("d", "bank", "sidecar")
	set("e", "kube-system", "")
	asked := func() (out string) {
		m.changes()
		for _, uid := range []string{"a", "b", "c", "d", "e"} {
			if p := m.outPods[uid]; p.Asks {
				out += uid
			} else if p.Wants {
				out += "(" + uid + ")"
			}
		}
		return out
	}
	for i, c := range []struct {
		change func()
		want   string
	}{
		{func() {}, "(c)d"},
		{func() {
			m.setNamespace(namespace("shop", "sidecar"))
			m.setNamespace(namespace("kube-system", "sidecar"))
		}, "a(c)d"},
		{func() {
			m.setNamespace(namespace("shop", "enabled"))
			m.setNamespace(namespace("kube-system", "enabled"))
		}, "(a)(c)d"},
		{func() { m.setNamespace(namespace("shop", "sidecar")) }, "a(c)d"},
		{func() { m.retainNamespaces([]any{namespace("bank", "")}) }, "(c)d"},
		{func() { m.setNamespace(namespace("shop", "enabled")) }, "(a)(c)d"},
		{func() { m.removeNamespace("shop") }, "(c)d"},
	} {
		c.change()
		if got := asked(); got != c.want {
			t.Errorf("%d: %q ask, want %q", i, got, c.want)
		}
	}
}
