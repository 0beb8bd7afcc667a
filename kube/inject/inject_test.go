package inject

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"assay.dev"
	"assay.dev/kube"
)

func injector() *Injector {
	return &Injector{Image: "assay.test/assay:1", PullPolicy: "IfNotPresent", PullSecrets: []string{"mesh", "both"}, Metrics: 9181, Control: "[10.96.0.7]:7400", Namespace: "assay-system", Version: "1",
		Roots: func() []byte { return []byte("roots") }}
}

// parse reads a pod as the API server has it.
func parse(t testing.TB, text []byte) *corev1.Pod {
	t.Helper()
	var p corev1.Pod
	if err := json.Unmarshal(text, &p); err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	return &p
}

// apply applies operations as RFC 6902 says, as far as they are used here.
func apply(t testing.TB, text []byte, patch []Operation) []byte {
	t.Helper()
	var doc any
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	for _, o := range patch {
		raw, err := json.Marshal(o.Value)
		if err != nil {
			t.Fatal(err)
		}
		var value any
		if err := json.Unmarshal(raw, &value); err != nil {
			t.Fatal(err)
		}
		path := strings.Split(o.Path, "/")[1:]
		for i := range path {
			path[i] = strings.ReplaceAll(strings.ReplaceAll(path[i], "~1", "/"), "~0", "~")
		}
		doc = change(t, doc, path, o.Op, value)
	}
	out, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func change(t testing.TB, at any, path []string, op string, value any) any {
	t.Helper()
	switch at := at.(type) {
	case map[string]any:
		name := path[0]
		_, there := at[name]
		switch {
		case len(path) > 1 && there:
			at[name] = change(t, at[name], path[1:], op, value)
		case len(path) > 1 || op != "add" && !there:
			t.Fatalf("%s: there is no %s", op, name)
		case op == "remove":
			delete(at, name)
		default:
			at[name] = value
		}
		return at
	case []any:
		i := len(at)
		if path[0] != "-" {
			var err error
			if i, err = strconv.Atoi(path[0]); err != nil {
				t.Fatal(err)
			}
		}
		switch {
		case i > len(at) || i == len(at) && (op != "add" || len(path) > 1):
			t.Fatalf("%s: there is no %d of %d", op, i, len(at))
		case len(path) > 1:
			at[i] = change(t, at[i], path[1:], op, value)
		case op == "add":
			return slices.Insert(at, i, value)
		case op == "remove":
			return slices.Delete(at, i, i+1)
		default:
			at[i] = value
		}
		return at
	}
	t.Fatalf("%s %v: what is there is no object and no list", op, path)
	return nil
}

// others is a pod without what is ours.
func others(t testing.TB, text []byte) map[string]any {
	t.Helper()
	var doc map[string]any
	if err := json.Unmarshal(text, &doc); err != nil {
		t.Fatal(err)
	}
	without := func(in map[string]any, list string, names ...string) {
		items, _ := in[list].([]any)
		items = slices.DeleteFunc(items, func(x any) bool { return slices.Contains(names, x.(map[string]any)["name"].(string)) })
		if in[list] = items; len(items) == 0 {
			delete(in, list)
		}
	}
	spec, meta := doc["spec"].(map[string]any), doc["metadata"].(map[string]any)
	without(spec, "initContainers", kube.SidecarContainer)
	without(spec, "volumes", tokenVolume, stateVolume)
	without(spec, "imagePullSecrets", "mesh", "both")
	annotations, _ := meta["annotations"].(map[string]any)
	maps.DeleteFunc(annotations, func(name string, _ any) bool { return strings.HasPrefix(name, scrape) })
	if delete(annotations, kube.InjectedAnnotation); len(annotations) == 0 {
		delete(meta, "annotations")
	}
	return doc
}

// random makes a pod of any shape, with fields that no version of Kubernetes knows.
func random(r *rand.Rand) []byte {
	some := func(n int) bool { return r.IntN(n) == 0 }
	port := func() any {
		if some(3) {
			return "named"
		}
		return r.IntN(70000)
	}
	container := func(name string) map[string]any {
		c := map[string]any{"name": name, "image": "i", "future": map[string]any{"x": r.IntN(9)}}
		if some(2) {
			c["ports"] = []any{map[string]any{"name": "named", "containerPort": 1 + r.IntN(65535)}, map[string]any{"containerPort": 53, "protocol": "UDP"}}
		}
		switch r.IntN(5) {
		case 0:
			c["readinessProbe"] = map[string]any{"httpGet": map[string]any{"port": port(), "path": "/"}}
		case 1:
			c["livenessProbe"] = map[string]any{"tcpSocket": map[string]any{"port": port()}}
		case 2:
			c["startupProbe"] = map[string]any{"grpc": map[string]any{"port": r.IntN(70000)}}
		case 3:
			c["livenessProbe"] = map[string]any{"exec": map[string]any{"command": []any{"true"}}}
		}
		if some(2) {
			limits := map[string]any{"cpu": "1", "memory": "1Gi"}
			c["resources"] = map[string]any{"limits": limits}
			if some(2) {
				c["resources"].(map[string]any)["requests"] = map[string]any{"cpu": "0.1"}
			}
		}
		return c
	}
	list := func(prefix string, n int) []any {
		out := []any{}
		for i := range n {
			out = append(out, container(fmt.Sprint(prefix, i)))
		}
		return out
	}
	spec := map[string]any{"containers": list("app", 1+r.IntN(3)), "future": []any{1.5, nil, "x"}}
	switch n := r.IntN(5); n {
	case 0:
	case 1:
		spec["initContainers"] = nil
	default:
		spec["initContainers"] = list("init", n-2)
	}
	switch r.IntN(3) {
	case 0:
		spec["volumes"] = []any{}
	case 1:
		spec["volumes"] = []any{map[string]any{"name": "v", "emptyDir": map[string]any{}, "future": true}}
	}
	switch r.IntN(4) {
	case 0:
		spec["imagePullSecrets"] = []any{}
	case 1:
		spec["imagePullSecrets"] = []any{map[string]any{"name": "own"}, map[string]any{"name": "both"}}
	case 2:
		spec["imagePullSecrets"] = nil
	}
	meta := map[string]any{"generateName": "web-", "future": 1}
	switch r.IntN(4) {
	case 0:
		meta["annotations"] = map[string]any{"a/b~c": "d"}
	case 1:
		meta["annotations"] = map[string]any{}
	case 2:
		meta["annotations"] = nil
	}
	text, err := json.Marshal(map[string]any{"metadata": meta, "spec": spec, "kind": "Pod", "apiVersion": "v1", "future": "y"})
	if err != nil {
		panic(err)
	}
	return text
}

// FuzzPatch: whatever a pod is like, it gets what is ours, keeps everything else, and is
// left alone the second time; what somebody has made of what is ours is put right.
func FuzzPatch(f *testing.F) {
	for seed := range uint64(64) {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, seed uint64) {
		r := rand.New(rand.NewPCG(seed, 0))
		j, before := injector(), random(r)
		patch, skipped, err := j.Patch(parse(t, before), "shop")
		if err != nil || skipped != "" {
			t.Fatalf("%v %q\n%s", err, skipped, before)
		}
		after := apply(t, before, patch)
		whole(t, before, after)
		if again, _, err := j.Patch(parse(t, after), "shop"); err != nil || len(again) > 0 {
			t.Errorf("a second time: %v %v\n%s", again, err, after)
		}
		spoilt := spoil(t, r, after)
		patch, _, err = j.Patch(parse(t, spoilt), "shop")
		if err != nil || len(patch) == 0 {
			t.Fatalf("what was spoilt: %v %v\n%s", patch, err, spoilt)
		}
		whole(t, before, apply(t, spoilt, patch))
	})
}

// whole checks that a pod has what is ours, where it belongs, and the rest of it.
func whole(t *testing.T, before, after []byte) {
	t.Helper()
	if was, is := others(t, before), others(t, after); !reflect.DeepEqual(was, is) {
		t.Errorf("was\n%v\nand is\n%v", was, is)
	}
	p := parse(t, after)
	if p.Annotations[kube.InjectedAnnotation] != "1" || p.Spec.InitContainers[0].Name != kube.SidecarContainer || p.Spec.InitContainers[0].Image != "assay.test/assay:1" ||
		*p.Spec.InitContainers[0].RestartPolicy != corev1.ContainerRestartPolicyAlways {
		t.Errorf("not injected:\n%s", after)
	}
	names := map[string]int{}
	for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
		names[c.Name]++
	}
	for _, v := range p.Spec.Volumes {
		names["volume "+v.Name]++
	}
	for _, s := range p.Spec.ImagePullSecrets {
		names["pull secret "+s.Name]++
	}
	if names["pull secret mesh"]+names["pull secret both"] != 2 {
		t.Errorf("no pull secrets:\n%s", after)
	}
	for name, n := range names {
		if n > 1 {
			t.Errorf("%s is there %d times", name, n)
		}
	}
	if names["volume "+tokenVolume]+names["volume "+stateVolume] != 2 {
		t.Errorf("no volumes:\n%s", after)
	}
}

// spoil changes something of ours in an injected pod.
func spoil(t *testing.T, r *rand.Rand, text []byte) []byte {
	t.Helper()
	var patch []Operation
	switch r.IntN(6) {
	case 0:
		patch = []Operation{{"replace", "/spec/initContainers/0/image", "evil"}}
	case 1:
		patch = []Operation{{"add", "/spec/initContainers/0", map[string]any{"name": "injected-by-another"}}}
		before := apply(t, text, patch)
		return apply(t, before, []Operation{{"remove", "/spec/initContainers/0", nil}, {"replace", "/spec/initContainers/0/command", []string{"sh"}}})
	case 2:
		patch = []Operation{{"remove", "/spec/volumes/" + strconv.Itoa(len(parse(t, text).Spec.Volumes)-1), nil}}
	case 3:
		patch = []Operation{{"replace", "/spec/volumes/" + strconv.Itoa(len(parse(t, text).Spec.Volumes)-1) + "/emptyDir", map[string]any{}}}
	case 4:
		patch = []Operation{{"remove", "/spec/initContainers/0", nil}}
	default:
		patch = []Operation{{"replace", "/spec/initContainers/0/securityContext", map[string]any{"privileged": true}}}
	}
	return apply(t, text, patch)
}

// TestAnotherCameFirst: what another webhook has put before our container comes after it, with
// its port; what others have added to ours stays.
func TestAnotherCameFirst(t *testing.T) {
	j := injector()
	text := []byte(`{"metadata":{},"spec":{"containers":[{"name":"app"}]}}`)
	patch, _, err := j.Patch(parse(t, text), "shop")
	if err != nil {
		t.Fatal(err)
	}
	text = apply(t, text, append(patch,
		Operation{"add", "/spec/initContainers/0/volumeMounts/-", map[string]any{"name": "kube-api-access", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}},
		Operation{"add", "/spec/initContainers/0/resources/limits/cpu", "2"},
		Operation{"add", "/spec/initContainers/0", map[string]any{"name": "other", "livenessProbe": map[string]any{"tcpSocket": map[string]any{"port": 99}}}}))
	patch, _, err = j.Patch(parse(t, text), "shop")
	if err != nil {
		t.Fatal(err)
	}
	text = apply(t, text, patch)
	p := parse(t, text)
	c := p.Spec.InitContainers[0]
	if c.Name != kube.SidecarContainer || p.Spec.InitContainers[1].Name != "other" || len(c.VolumeMounts) != 3 || c.Resources.Limits.Cpu().Value() != 2 {
		t.Errorf("it is\n%s", text)
	}
	if !slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == "ASSAY_PROBES" && e.Value == "99" }) {
		t.Errorf("the environment: %v", c.Env)
	}
}

// TestMetrics: a sidecar's metrics are found by its port's name, and by annotations unless the
// application has some itself; an application that has the port keeps it.
func TestMetrics(t *testing.T) {
	const found = "map[assay.dev/injected:1 prometheus.io/path:/metrics prometheus.io/port:9181 prometheus.io/scrape:true]"
	for _, c := range []struct{ annotations, container, want, annotated, warning string }{
		{`null`, `{}`, "9181", found, ""},
		{`{}`, `{"ports":[{"containerPort":9181,"protocol":"UDP"}]}`, "9181", found, ""},
		{`{"prometheus.io/scrape":"false"}`, `{}`, "9181", "map[assay.dev/injected:1 prometheus.io/scrape:false]", ""},
		{`{"prometheus.io/port":"8080"}`, `{}`, "9181", "map[assay.dev/injected:1 prometheus.io/port:8080]", ""},
		{`null`, `{"ports":[{"containerPort":9181}]}`, "", "map[assay.dev/injected:1]", "port 9181"},
		{`null`, `{"livenessProbe":{"httpGet":{"port":9181}}}`, "", "map[assay.dev/injected:1]", "port 9181"},
	} {
		text := []byte(`{"metadata":{"annotations":` + c.annotations + `},"spec":{"containers":[` + strings.Replace(c.container, "{", `{"name":"app",`, 1) + `]}}`)
		text = []byte(strings.ReplaceAll(string(text), `"app",}`, `"app"}`))
		j := injector()
		patch, warning, err := j.Patch(parse(t, text), "shop")
		if err != nil || warning == "" != (c.warning == "") || !strings.Contains(warning, c.warning) {
			t.Fatalf("%s: %q %v", text, warning, err)
		}
		after := parse(t, apply(t, text, patch))
		sidecar := after.Spec.InitContainers[0]
		want := "[sidecar] []"
		if c.want != "" {
			want = "[sidecar --metrics=:" + c.want + "] [{assay-metrics 0 " + c.want + " TCP }]"
		}
		if got := fmt.Sprint(sidecar.Args, sidecar.Ports); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
		if got := fmt.Sprint(after.Annotations); got != c.annotated {
			t.Errorf("%s: %s, want %s", text, got, c.annotated)
		}
		if again, _, err := j.Patch(after, "shop"); err != nil || len(again) > 0 {
			t.Errorf("a second time: %v %v", again, err)
		}
	}
	j := injector()
	j.Metrics = 0
	patch, _, err := j.Patch(parse(t, []byte(`{"metadata":{},"spec":{"containers":[{"name":"app"}]}}`)), "shop")
	if text := fmt.Sprint(patch); err != nil || strings.Contains(text, "metrics") || strings.Contains(text, scrape) {
		t.Errorf("without a port: %s %v", text, err)
	}
}

// TestContainer: what the container may do, and what it is told.
func TestContainer(t *testing.T) {
	text := []byte(`{"metadata":{},"spec":{"securityContext":{"runAsNonRoot":true,"runAsUser":7},"containers":[
		{"name":"app","ports":[{"name":"web","containerPort":8080},{"containerPort":8443}],"readinessProbe":{"httpGet":{"port":"web"}},"livenessProbe":{"tcpSocket":{"port":9090}}},
		{"name":"b","startupProbe":{"grpc":{"port":7}},"lifecycle":{"preStop":{"httpGet":{"port":6}}},"livenessProbe":{"httpGet":{"port":5,"host":"192.0.2.1"}}}]}}`)
	j := injector()
	patch, _, err := j.Patch(parse(t, text), "shop")
	if err != nil {
		t.Fatal(err)
	}
	c := parse(t, apply(t, text, patch)).Spec.InitContainers[0]
	env := map[string]string{}
	for _, e := range c.Env {
		env[e.Name] = e.Value
		if e.ValueFrom != nil {
			env[e.Name] = e.ValueFrom.FieldRef.FieldPath
		}
	}
	want := map[string]string{
		"POD_NAMESPACE": "metadata.namespace", "POD_NAME": "metadata.name", "POD_UID": "metadata.uid", "POD_IPS": "status.podIPs", "HOST_IPS": "status.hostIPs",
		"NODE_NAME": "spec.nodeName", "SERVICE_ACCOUNT": "spec.serviceAccountName", "ASSAY_CONTROL": "[10.96.0.7]:7400", "ASSAY_TRUST": "roots",
		"ASSAY_PORTS": "8080,8443", "ASSAY_PROBES": "6,7,8080,9090",
	}
	if !maps.Equal(env, want) {
		t.Errorf("the environment: %v", env)
	}
	s := c.SecurityContext
	if *s.RunAsUser != 0 || *s.RunAsNonRoot || *s.Privileged || *s.AllowPrivilegeEscalation || !*s.ReadOnlyRootFilesystem || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) {
		t.Errorf("what it may do: %+v", s)
	}
}

// TestClassOfService: a guaranteed pod stays one.
func TestClassOfService(t *testing.T) {
	for resources, want := range map[string]bool{
		`{}`: false, `{"limits":{"cpu":"1"}}`: false, `{"limits":{"cpu":"1","memory":"1Gi"}}`: true,
		`{"limits":{"cpu":"1","memory":"1Gi"},"requests":{"cpu":"1","memory":"1Gi"}}`: true, `{"limits":{"cpu":"1","memory":"1Gi"},"requests":{"cpu":"0.5"}}`: false,
	} {
		j, text := injector(), []byte(`{"metadata":{},"spec":{"containers":[{"name":"app","resources":`+resources+`}]}}`)
		patch, _, err := j.Patch(parse(t, text), "shop")
		if err != nil {
			t.Fatal(err)
		}
		if got := guaranteed(parse(t, text)); got != want {
			t.Errorf("%s is guaranteed: %v", resources, got)
		}
		r := parse(t, apply(t, text, patch)).Spec.InitContainers[0].Resources
		if got := !r.Limits.Cpu().IsZero() && r.Limits.Cpu().Equal(*r.Requests.Cpu()) && r.Limits.Memory().Equal(*r.Requests.Memory()); got != want {
			t.Errorf("beside %s the container has %v", resources, r)
		}
	}
}

// TestResourcesOfThePod: what a pod asks for as a whole is what it gets with a sidecar, which
// takes its part of it: a sum of requests above the pod's, and a limit above it, is refused by
// the API server, which gives a container with a limit and no request that limit as its request.
func TestResourcesOfThePod(t *testing.T) {
	type have struct{ cpu, memory, cpuLimit, memoryLimit string }
	for resources, want := range map[string]have{
		`{}`: {"20m", "64Mi", "0", "256Mi"},
		`{"requests":{"cpu":"1","memory":"1Gi"}}`:                                           {"0", "0", "0", "256Mi"},
		`{"requests":{"cpu":"1"}}`:                                                          {"0", "64Mi", "0", "256Mi"},
		`{"requests":{"memory":"50Mi"},"limits":{"memory":"100Mi"}}`:                        {"20m", "0", "0", "100Mi"},
		`{"limits":{"memory":"100Mi"}}`:                                                     {"20m", "0", "0", "100Mi"},
		`{"requests":{"cpu":"1","memory":"1Gi"},"limits":{"cpu":"1","memory":"1Gi"}}`:       {"0", "0", "0", "256Mi"},
		`{"requests":{"hugepages-2Mi":"2Mi"},"limits":{"hugepages-2Mi":"2Mi"}}`:             {"20m", "64Mi", "0", "256Mi"},
		`{"requests":{"cpu":"100m","memory":"1Gi"},"limits":{"cpu":"200m","memory":"2Gi"}}`: {"0", "0", "0", "256Mi"},
	} {
		for _, app := range []string{`{}`, `{"limits":{"cpu":"50m","memory":"10Mi"},"requests":{"cpu":"50m","memory":"10Mi"}}`} {
			if resources == "{}" && app != "{}" {
				continue // a guaranteed pod
			}
			j, text := injector(), []byte(`{"metadata":{},"spec":{"resources":`+resources+`,"containers":[{"name":"app","resources":`+app+`}]}}`)
			patch, _, err := j.Patch(parse(t, text), "shop")
			if err != nil {
				t.Fatal(err)
			}
			after := parse(t, apply(t, text, patch))
			r := after.Spec.InitContainers[0].Resources
			if got := (have{r.Requests.Cpu().String(), r.Requests.Memory().String(), r.Limits.Cpu().String(), r.Limits.Memory().String()}); got != want {
				t.Errorf("in a pod of %s the container has %v, want %v", resources, got, want)
			}
			for name := range r.Limits {
				if _, asks := r.Requests[name]; !asks {
					t.Errorf("in a pod of %s the container's request of %s is its limit", resources, name)
				}
			}
			if again, _, err := j.Patch(after, "shop"); err != nil || len(again) > 0 {
				t.Errorf("in a pod of %s, a second time: %v %v", resources, again, err)
			}
		}
	}
}

// TestLeftAlone: pods that are not injected, and why.
func TestLeftAlone(t *testing.T) {
	plain := `{"metadata":{},"spec":{"containers":[{"name":"app"}]}}`
	for _, c := range []struct{ namespace, pod, warning string }{
		{"kube-system", plain, "are not meshed"},
		{"assay-system", plain, "are not meshed"},
		{"shop", `{"metadata":{},"spec":{"hostNetwork":true,"containers":[{"name":"app"}]}}`, "node's network"},
		{"shop", `{"metadata":{},"spec":{"os":{"name":"windows"},"containers":[{"name":"app"}]}}`, "Windows"},
		{"shop", `{"metadata":{"labels":{"assay.dev/mesh":"disabled"}},"spec":{"containers":[{"name":"app"}]}}`, ""},
		{"shop", `{"metadata":{"labels":{"assay.dev/mesh":"enabled"}},"spec":{"containers":[{"name":"app"}]}}`, ""},
	} {
		patch, skipped, err := injector().Patch(parse(t, []byte(c.pod)), c.namespace)
		if err != nil || len(patch) > 0 || !strings.Contains(skipped, c.warning) || (skipped == "") != (c.warning == "") {
			t.Errorf("%s in %s: %v %q %v", c.pod, c.namespace, patch, skipped, err)
		}
	}
}

// TestForgedInjection: what a pod says was injected has nothing of its author's beside it.
func TestForgedInjection(t *testing.T) {
	j := injector()
	text := []byte(`{"metadata":{},"spec":{"volumes":[{"name":"mine","emptyDir":{}}],"containers":[{"name":"app"}]}}`)
	patch, _, err := j.Patch(parse(t, text), "shop")
	if err != nil {
		t.Fatal(err)
	}
	text = apply(t, text, append(patch,
		Operation{"add", "/spec/initContainers/0/volumeMounts/-", map[string]any{"name": "mine", "mountPath": "/usr/local/bin"}},
		Operation{"add", "/spec/initContainers/0/volumeMounts/-", map[string]any{"name": "mine", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}}))
	if patch, _, err = j.Patch(parse(t, text), "shop"); err != nil {
		t.Fatal(err)
	}
	var at []string
	for _, m := range parse(t, apply(t, text, patch)).Spec.InitContainers[0].VolumeMounts {
		at = append(at, m.MountPath)
	}
	if !slices.Equal(at, []string{tokenFolder, stateFolder, "/var/run/secrets/kubernetes.io/serviceaccount"}) {
		t.Errorf("it mounts %v", at)
	}
}

// TestForeign: what has our names and is not ours is refused.
func TestForeign(t *testing.T) {
	for pod, why := range map[string]string{
		`{"metadata":{},"spec":{"containers":[{"name":"assay-proxy"}]}}`:                                                     "container assay-proxy",
		`{"metadata":{"annotations":{"assay.dev/injected":"1"}},"spec":{"containers":[{"name":"assay-proxy"}]}}`:             "container assay-proxy",
		`{"metadata":{},"spec":{"initContainers":[{"name":"assay-proxy"}],"containers":[{"name":"app"}]}}`:                   "init container assay-proxy",
		`{"metadata":{},"spec":{"volumes":[{"name":"assay-token"}],"containers":[{"name":"app"}]}}`:                          "volume assay-token",
		`{"metadata":{"name":"web"},"spec":{"volumes":[{"name":"a"},{"name":"assay-state"}],"containers":[{"name":"app"}]}}`: "volume assay-state",
		`{"metadata":{},"spec":{"containers":[{"name":"app","volumeMounts":[{"name":"assay-state","mountPath":"/s"}]}]}}`:    "container app that mounts volume assay-state",
		`{"metadata":{"annotations":{"assay.dev/injected":"1"}},"spec":{"volumes":[{"name":"assay-token"}],"initContainers":[{"name":"assay-proxy"},{"name":"i","volumeMounts":[{"name":"x"},{"name":"assay-token","mountPath":"/t"}]}],"containers":[{"name":"app"}]}}`: "container i that mounts volume assay-token",
		`{"metadata":{"annotations":{"assay.dev/injected":"1"}},"spec":{"containers":[{"name":"app","volumeDevices":[{"name":"assay-state","devicePath":"/dev/s"}]}]}}`:                                                                                                  "container app that mounts volume assay-state",
	} {
		patch, _, err := injector().Patch(parse(t, []byte(pod)), "shop")
		if assay.KindOf(err) != assay.Conflict || !strings.Contains(err.Error(), why) || len(patch) > 0 {
			t.Errorf("%s: %v %v", pod, patch, err)
		}
	}
	j := injector()
	j.Roots = func() []byte { return nil }
	if _, _, err := j.Patch(parse(t, []byte(`{"metadata":{},"spec":{"containers":[{"name":"app"}]}}`)), "shop"); assay.KindOf(err) != assay.Unavailable {
		t.Errorf("without roots: %v", err)
	}
}
