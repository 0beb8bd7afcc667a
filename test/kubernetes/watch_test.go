package kubernetes_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"

	"assay.dev/discovery"
	"assay.dev/kube/apiserver"
	"assay.dev/kube/cluster"
	"assay.dev/test/kubernetes"
)

// view is what a watcher has told so far.
type view struct {
	mu       sync.Mutex
	services map[string]cluster.Service
	pods     map[string]cluster.Pod
	config   *cluster.Configuration
	calls    int
}

func (v *view) take(c cluster.Changes) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.calls++
	if c.Configuration != nil {
		v.config = c.Configuration
	}
	for _, s := range c.Services {
		v.services[s.Key()] = s
	}
	for _, key := range c.RemovedServices {
		if _, ok := v.services[key]; !ok {
			return fmt.Errorf("service %s is removed and was never there", key)
		}
		delete(v.services, key)
	}
	for _, p := range c.Pods {
		v.pods[p.UID] = p
	}
	for _, uid := range c.RemovedPods {
		if _, ok := v.pods[uid]; !ok {
			return fmt.Errorf("pod %s is removed and was never there", uid)
		}
		delete(v.pods, uid)
	}
	return nil
}

// service returns a service, and the names of the pods behind it that are ready.
func (v *view) service(key string) (s cluster.Service, ready []string, there bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	s, there = v.services[key]
	for _, p := range s.Places {
		if p.Ready {
			ready = append(ready, v.pods[p.Workload].Name)
		}
	}
	return s, ready, there
}

// account makes a service account that may do what the rules say, local ones in its own
// namespace, and nothing else, and returns a kubeconfig for it.
func account(t *testing.T, c *kubernetes.Cluster, namespace, name string, rules, local []rbacv1.PolicyRule) string {
	t.Helper()
	var text [2][]byte
	for i, r := range [][]rbacv1.PolicyRule{rules, local} {
		var err error
		if text[i], err = json.Marshal(r); err != nil {
			t.Fatal(err)
		}
	}
	c.Apply(t, strings.NewReplacer("NAMESPACE", namespace, "NAME", name, "RULES", string(text[0]), "LOCAL", string(text[1])).Replace(`apiVersion: v1
kind: ServiceAccount
metadata: {name: NAME, namespace: NAMESPACE}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: NAME}
rules: RULES
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: NAME}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: NAME}
subjects: [{kind: ServiceAccount, name: NAME, namespace: NAMESPACE}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: NAME, namespace: NAMESPACE}
rules: LOCAL
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: NAME, namespace: NAMESPACE}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: NAME}
subjects: [{kind: ServiceAccount, name: NAME, namespace: NAMESPACE}]
`))
	read := func(args ...string) string { return strings.TrimSpace(c.Kubectl(t, args...)) }
	server := read("config", "view", "--raw", "-o", "jsonpath={.clusters[0].cluster.server}")
	authority := read("config", "view", "--raw", "-o", "jsonpath={.clusters[0].cluster.certificate-authority-data}")
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(file, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, certificate-authority-data: %s}}]
users: [{name: %s, user: {token: %s}}]
contexts: [{name: c, context: {cluster: c, user: %[3]s}}]
current-context: c
`, server, authority, name, read("create", "token", name, "-n", namespace, "--duration=1h")), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// watch starts a watcher that may do what cluster.Rules says and nothing else.
func watch(t *testing.T, c *kubernetes.Cluster) *view {
	t.Helper()
	config, err := apiserver.Config(account(t, c, "default", "watcher", cluster.Rules(), nil), "assay-watcher")
	if err != nil {
		t.Fatal(err)
	}
	w := cluster.New(config, slog.New(slog.NewTextHandler(t.Output(), nil)))
	v := &view{services: map[string]cluster.Service{}, pods: map[string]cluster.Pod{}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx, v.take) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != context.Canceled {
				t.Errorf("the watcher ended with %v", err)
			}
		case <-time.After(time.Minute):
			t.Error("the watcher does not end")
		}
	})
	return v
}

// watching: what a watcher tells is what the cluster is, and goes on being so.
func watching(t *testing.T, c *kubernetes.Cluster) {
	v := watch(t, c)
	ready := func(n int) {
		t.Helper()
		c.Eventually(t, fmt.Sprintf("the watcher tells of %d ready pods", n), func() error {
			if _, ready, _ := v.service("default/echo"); len(ready) != n {
				return fmt.Errorf("ready are %q", ready)
			}
			return nil
		})
	}
	ready(2)
	s, _, _ := v.service("default/echo")
	if len(s.ClusterIPs) != 2 || !s.ClusterIPs[0].Is4() || len(s.Ports) != 1 || s.Ports[0].Port.Port != 80 {
		t.Errorf("the service: %+v", s)
	}
	for _, p := range s.Places {
		v.mu.Lock()
		pod := v.pods[p.Workload]
		v.mu.Unlock()
		if len(p.Addrs) != 2 || len(p.Targets) != 1 || p.Targets[0] != 8080 || p.Zone != "zone-1" || pod.Account != "default" || pod.Node != "node-1" || pod.Labels["app"] != "echo" {
			t.Errorf("the place %+v of pod %+v", p, pod)
		}
	}
	if s, ready, there := v.service("kube-system/kube-dns"); !there || len(ready) != 1 || len(s.Ports) != 1 || len(s.Notes) != 1 {
		t.Errorf("of DNS, TCP is the mesh's: %+v", s)
	}

	configuration(t, c, v)

	began := time.Now()
	c.Kubectl(t, "scale", "deployment/echo", "--replicas=3")
	ready(3)
	t.Logf("a third pod was told of %.1f s after it was asked for", time.Since(began).Seconds())

	// Without the API server the last state stands; with it again, changes come.
	if err := c.Control.Stop("kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	ready(3)
	if err := c.Start(c.Control, "kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	c.Eventually(t, "the API server is back", func() error {
		_, err := c.TryKubectl(t.Context(), "", "scale", "deployment/echo", "--replicas=1")
		return err
	})
	ready(1)
	c.Kubectl(t, "delete", "service/echo")
	c.Eventually(t, "the watcher tells that the service is gone", func() error {
		if s, _, there := v.service("default/echo"); there {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	v.mu.Lock()
	defer v.mu.Unlock()
	t.Logf("%d changes were told", v.calls)
}

// configuration: the Gateway API is found when somebody installs it, and a route that
// cannot be understood breaks no other.
func configuration(t *testing.T, c *kubernetes.Cluster, v *view) {
	told := func(what string, ok func(*cluster.Configuration) bool) {
		t.Helper()
		c.Eventually(t, what, func() error {
			v.mu.Lock()
			defer v.mu.Unlock()
			if v.config == nil || !ok(v.config) {
				return fmt.Errorf("the configuration is %+v", v.config)
			}
			return nil
		})
	}
	told("nothing is installed", func(g *cluster.Configuration) bool {
		return len(g.Missing) == 7 && len(g.Intent.Routes) == 0
	})
	installGatewayAPI(t, c)
	told("the Gateway API is there", func(g *cluster.Configuration) bool {
		return slices.Equal(g.Missing, []string{"MeshConfig", "Egress", "TrafficPolicy"})
	})
	c.Apply(t, `apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: echo}
spec:
  parentRefs: [{group: "", kind: Service, name: echo, port: 80}]
  rules:
  - matches: [{path: {value: /old}}]
    backendRefs: [{name: echo, port: 80}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: elsewhere}
spec:
  parentRefs: [{name: a-gateway}]
  rules: [{matches: [{path: {value: /}}]}]
`)
	told("both routes are there", func(g *cluster.Configuration) bool {
		return len(g.Intent.Routes) == 2 && len(g.Problems) == 0
	})
	v.mu.Lock()
	r := v.config.Intent.Routes[slices.IndexFunc(v.config.Intent.Routes, func(r discovery.DeclaredRoute) bool { return r.Name == "echo" })]
	v.mu.Unlock()
	if r.Generation != 1 || time.Since(r.Created) > time.Hour || len(r.Rules) != 1 || len(r.ParentRefs) != 1 || r.ParentRefs[0].Problem.Reason != "" {
		t.Errorf("the route: %+v", r)
	}
	c.Kubectl(t, "delete", "httproute", "--all")
	told("the routes are gone", func(g *cluster.Configuration) bool { return len(g.Intent.Routes) == 0 })
}

// installGatewayAPI installs the definitions of what is watched.
func installGatewayAPI(t *testing.T, c *kubernetes.Cluster) {
	t.Helper()
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/gateway-api").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, resource := range []string{"httproutes", "grpcroutes", "tlsroutes", "referencegrants"} {
		file := filepath.Join(strings.TrimSpace(string(dir)), "config/crd/experimental/gateway.networking.k8s.io_"+resource+".yaml")
		c.Kubectl(t, "apply", "--server-side", "-f", file)
		c.Eventually(t, resource+" are established", func() error { // kubectl fails while there are no conditions at all
			out, err := c.TryKubectl(t.Context(), "", "wait", "crd/"+resource+".gateway.networking.k8s.io", "--for=condition=Established", "--timeout=30s")
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
	}
}
