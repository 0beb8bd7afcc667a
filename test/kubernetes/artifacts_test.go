package kubernetes_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"assay.dev"
	"assay.dev/kube/cri"
	"assay.dev/test/kubernetes"
)

const several = `
apiVersion: v1
kind: Pod
metadata: {name: several}
spec:
  terminationGracePeriodSeconds: 1
  initContainers:
  - {name: before, image: assay.test/echo:init, args: [lookup, localhost]}
  - {name: beside, image: assay.test/echo:1, args: [sleep], restartPolicy: Always}
  containers:
  - {name: main, image: assay.test/echo:main, args: [sleep]}
  - {name: again, image: assay.test/echo:1, args: [sleep]}
`

// artifacts: what a pod runs is the set of its containers' platform manifests, whatever
// the pod names them by.
func artifacts(t *testing.T, c *kubernetes.Cluster, one kubernetes.Digests) {
	plain := echoImage(t, "assay.test/echo:main", "main")
	plain.Plain = true
	want := map[string]kubernetes.Digests{
		"assay.test/echo:1":    one,
		"assay.test/echo:init": c.Import(t, echoImage(t, "assay.test/echo:init", "init")),
		"assay.test/echo:main": c.Import(t, plain),
	}
	c.Apply(t, several)
	c.Kubectl(t, "wait", "pod/several", "--for=condition=Ready", "--timeout=120s")
	runtime, err := cri.Open(c.Nodes[0].Path("/run/containerd/containerd.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer runtime.Close()
	find := func(name string) *cri.Sandbox {
		t.Helper()
		list, err := runtime.Sandboxes(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(list, func(s cri.Sandbox) bool { return s.Namespace == "default" && s.Name == name })
		if i < 0 {
			return nil
		}
		return &list[i]
	}
	s := find("several")
	if s == nil {
		t.Fatal("the runtime does not tell of the pod")
	}
	if uid := c.Kubectl(t, "get", "pod", "several", "-o", "jsonpath={.metadata.uid}"); s.UID != uid {
		t.Errorf("uid %s, want %s", s.UID, uid)
	}
	var names []string
	for _, x := range s.Containers {
		names = append(names, fmt.Sprint(x.Name, " ", x.Running))
		d := want[x.Image.Name]
		if got := (cri.Image{Name: x.Image.Name, Config: assay.Digest(d.Config), Manifest: assay.Digest(d.Manifest), Index: assay.Digest(d.Index)}); x.Image != got {
			t.Errorf("%s is %+v\nwant %+v", x.Name, x.Image, got)
		}
	}
	if want := []string{"again true", "before false", "beside true", "main true"}; !slices.Equal(names, want) {
		t.Errorf("containers %v, want %v", names, want)
	}
	set := s.Artifacts()
	if len(set) != 3 {
		t.Errorf("the set is %v", set)
	}
	for _, a := range set {
		d := want[a.Name]
		if a != (assay.Artifact{Kind: assay.Image, Name: a.Name, Digest: assay.Digest(d.Manifest), Config: assay.Digest(d.Config), Index: assay.Digest(d.Index)}) {
			t.Errorf("in the set: %+v", a)
		}
	}

	// The namespace is the pod's: by path, and by the process.
	if s.NetNS == "" || s.Process == 0 {
		t.Fatalf("network namespace %q, process %d", s.NetNS, s.Process)
	}
	byPath, err := os.Stat(c.Nodes[0].Path(strings.TrimPrefix(s.NetNS, "/var"))) // a link that is absolute
	if err != nil {
		t.Fatal(err)
	}
	byProcess, err := os.Stat(c.Nodes[0].Path(filepath.Join("/proc", fmt.Sprint(s.Process), "ns/net")))
	if err != nil || !os.SameFile(byPath, byProcess) {
		t.Errorf("path and process of the sandbox are in two namespaces (%v)", err)
	}

	// An ephemeral container joins the set.
	debug := c.Import(t, echoImage(t, "assay.test/echo:debug", "debug"))
	c.Kubectl(t, "debug", "several", "--image=assay.test/echo:debug", "--container=debugger", "--image-pull-policy=Never", "--", "/bin/echo", "sleep")
	c.Eventually(t, "the ephemeral container is in the set", func() error {
		if s := find("several"); s != nil {
			if set := s.Artifacts(); len(set) == 4 && slices.ContainsFunc(set, func(a assay.Artifact) bool { return a.Digest == assay.Digest(debug.Manifest) }) {
				return nil
			}
		}
		return fmt.Errorf("%+v", find("several"))
	})
	c.Kubectl(t, "delete", "pod", "several", "--wait=true")
	c.Eventually(t, "the pod is gone", func() error {
		if s := find("several"); s != nil {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	if _, err := (func() ([]cri.Sandbox, error) {
		away, err := cri.Open(c.Nodes[0].Path("/run/containerd/none.sock"))
		if err != nil {
			return nil, err
		}
		defer away.Close()
		return away.Sandboxes(t.Context())
	})(); assay.KindOf(err) != assay.Unavailable {
		t.Errorf("a runtime that is away: %v", err)
	}
}
