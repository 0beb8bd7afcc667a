package kubernetes_test

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"assay.dev/kube/install"
	"assay.dev/test/kubernetes"
	"assay.dev/test/lab"
)

// lifeManifest is an application on two nodes: four servers, and a client on each node that
// never stops asking (test/kubernetes/echo/steady.go).
const lifeManifest = `apiVersion: v1
kind: Namespace
metadata: {name: life}
---
apiVersion: v1
kind: Service
metadata: {name: server, namespace: life}
spec:
  selector: {app: server}
  ports:
  - {name: http, port: 80, targetPort: 8080}
  - {name: raw, port: 9000, targetPort: 9000}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: server, namespace: life}
spec: {maxUnavailable: 1, selector: {matchLabels: {app: server}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: server, namespace: life}
spec:
  replicas: 4
  selector: {matchLabels: {app: server}}
  strategy: {rollingUpdate: {maxUnavailable: 0, maxSurge: 1}}
  template:
    metadata: {labels: {app: server}}
    spec:
      terminationGracePeriodSeconds: 10
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: ScheduleAnyway, labelSelector: {matchLabels: {app: server}}}
      containers:
      - name: server
        image: ` + kubernetes.EchoImage + `
        args: [serve, ":8080", ":9000"]
        ports: [{name: http, containerPort: 8080}, {name: raw, containerPort: 9000}]
        readinessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 1, timeoutSeconds: 20}
`

const lifeClients = `apiVersion: apps/v1
kind: DaemonSet
metadata: {name: client, namespace: life}
spec:
  selector: {matchLabels: {app: client}}
  template:
    metadata: {labels: {app: client}}
    spec:
      terminationGracePeriodSeconds: 1
      tolerations: [{operator: Exists}]
      containers: [{name: client, image: ` + kubernetes.EchoImage + `, args: [steady, "http://%[1]s/in-the-clear", "%[1]s:9000"]}]
`

// lifeVolume is where control keeps its keys, on the first node.
const lifeVolume = `apiVersion: v1
kind: PersistentVolume
metadata: {name: authority}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  storageClassName: local
  persistentVolumeReclaimPolicy: Retain
  local: {path: /opt/assay}
  nodeAffinity:
    required:
      nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [%s]}]}]
`

const lifeStrict = `apiVersion: assay.dev/v1alpha1
kind: MeshConfig
metadata: {name: default, namespace: life}
spec: {mode: strict}
`

var lifeInstall = []string{"install", "--image", kubernetes.AssayImage, "--image-pull-policy", "Never", "--volume", "claim", "--storage-class", "local", "--timeout", "7m"}

// life is an application in a mesh whose parts come and go.
type life struct {
	*person
	at   string            // the service's address
	said map[string]int    // lines of each client that were looked at
	last map[string][3]int // answers that each client had, when they were
	wire []*lab.Capture
}

// TestLifecycle: what happens to clusters happens under a constant load, on new connections
// and on those that are kept, across two nodes, in a strict namespace. No request fails but
// those to pods that ended, and nothing is ever on the wire that is not encrypted. Each part
// can be run alone: -run TestLifecycle/drain.
func TestLifecycle(t *testing.T) {
	c := kubernetes.Up(t, 2)
	if err := c.LoadAssay(t.Context()); err != nil {
		t.Fatal(err)
	}
	l := &life{person: newPerson(t, c), said: map[string]int{}, last: map[string][3]int{}}
	l.settle(t)
	l.install(t)
	for _, part := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"rolling restart", l.rollingRestart},
		{"agent", l.agent},
		{"control", l.control},
		{"API server", l.apiServer},
		{"drain", l.drain},
		{"reboot", l.reboot},
		{"cold start", l.coldStart},
		{"uninstall", l.uninstall},
	} {
		began := time.Now()
		t.Run(part.name, part.run)
		t.Logf("%s took %s", part.name, time.Since(began).Round(time.Second))
	}
}

// away is how long parts of the cluster are missing.
func away(t *testing.T) time.Duration {
	t.Helper()
	text := os.Getenv("ASSAY_AWAY")
	if text == "" {
		return 30 * time.Second
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("ASSAY_AWAY: %v", err)
	}
	return d
}

// settle starts the application, without a mesh.
func (l *life) settle(t *testing.T) {
	c := l.cluster
	c.Nodes[0].MustExec(t, "chmod", "0777", "/opt/assay")
	c.Apply(t, fmt.Sprintf(lifeVolume, c.Nodes[0].Name))
	c.Apply(t, lifeManifest)
	c.Rollout(t, "life", "deployment/server")
	l.at = c.Kubectl(t, "get", "service", "-n", "life", "server", "-o", "jsonpath={.spec.clusterIP}")
	c.Apply(t, fmt.Sprintf(lifeClients, l.at))
	c.Rollout(t, "life", "daemonset/client")
	l.flows(t, "before the mesh")
	l.forget(t)
}

// install brings the mesh, and makes the namespace strict.
func (l *life) install(t *testing.T) {
	c := l.cluster
	l.must(t, "assay", lifeInstall...)
	for _, n := range c.Nodes { // what docs/kubernetes.md lets people wait for
		agent := strings.TrimSpace(c.Kubectl(t, "get", "pods", "-n", install.DefaultNamespace, "-l", "app.kubernetes.io/component=agent", "--field-selector", "spec.nodeName="+n.Name, "-o", "name"))
		c.Eventually(t, "the first agent of "+n.Name+" says that its plugin is chained", func() error {
			if out := c.Kubectl(t, "logs", "-n", install.DefaultNamespace, agent); !strings.Contains(out, "the network plugin is chained") {
				return fmt.Errorf("%s", out)
			}
			return nil
		})
	}
	l.unbroken(t, "the mesh was installed")
	c.Kubectl(t, "label", "namespace", "life", install.MeshLabel+"=enabled")
	l.meshed(t, 6)
	l.flows(t, "meshed")
	l.unbroken(t, "the pods were meshed")
	l.encrypted(t, "80")
	// The connections that were there before stay outside the mesh, and strict mode is
	// not for them.
	c.Kubectl(t, "rollout", "restart", "-n", "life", "daemonset/client")
	c.Rollout(t, "life", "daemonset/client")
	l.meshed(t, 6)
	l.encrypted(t, "80", "9000")
	c.Apply(t, lifeStrict)
	l.flows(t, "strict")
	for _, n := range c.Nodes {
		l.watch(t, n)
	}
	l.forget(t)
	l.flows(t, "watched")
	l.unbroken(t, "the namespace became strict")
}

func (l *life) watch(t *testing.T, n *kubernetes.Machine) {
	t.Helper()
	l.wire = append(l.wire, n.Capture(t, "in-the-clear"), n.Capture(t, "in the clear"))
}

// unread fails the test when anything in the clear was on a wire.
func (l *life) unread(t *testing.T) {
	t.Helper()
	for _, w := range l.wire {
		if packets, found, first := w.Seen(); found > 0 {
			t.Errorf("of %d packets %d are in the clear, first %s", packets, found, first)
		}
	}
}

// meshed waits until control has n workloads that are attested.
func (l *life) meshed(t *testing.T, n int) {
	t.Helper()
	l.cluster.Eventually(t, fmt.Sprintf("%d pods are meshed", n), func() error {
		out, code := l.run(t, "kubectl", "assay", "get", "workloads", "-n", "life", "-o", "json")
		if code != 0 {
			return fmt.Errorf("%s", out)
		}
		if found := strings.Count(out, `"meshedSince"`); found != n {
			return fmt.Errorf("there are %d", found)
		}
		return nil
	})
}

// encrypted waits until the service's ports are asked under mutual TLS.
func (l *life) encrypted(t *testing.T, ports ...string) {
	t.Helper()
	l.cluster.Eventually(t, "asked under mutual TLS: "+strings.Join(ports, ", "), func() error {
		out, _ := l.run(t, "kubectl", "assay", "edges")
		for _, port := range ports {
			if !regexp.MustCompile(`(?m)^life/default .* life/server:` + port + ` .* mtls `).MatchString(out) {
				return fmt.Errorf("%s", out)
			}
		}
		return nil
	})
}

// clients are the clients' pods, by node.
func (l *life) clients(t *testing.T) map[string]string {
	t.Helper()
	list := map[string]string{}
	out := l.cluster.Kubectl(t, "get", "pods", "-n", "life", "-l", "app=client", "-o", `jsonpath={range .items[*]}{.metadata.deletionTimestamp}|{.spec.nodeName}|{.metadata.name}{"\n"}{end}`)
	for line := range strings.Lines(out) {
		if f := strings.Split(strings.TrimSpace(line), "|"); len(f) == 3 && f[0] == "" {
			list[f[1]] = f[2]
		}
	}
	return list
}

// servers are the names of the servers' pods that have not been told to end; of those,
// kubectl's more select.
func (l *life) servers(t *testing.T, more ...string) (list []string) {
	t.Helper()
	get := []string{"get", "pods", "-n", "life", "-l", "app=server", "-o", `jsonpath={range .items[*]}{.metadata.deletionTimestamp}|{.metadata.name}{"\n"}{end}`}
	out := l.cluster.Kubectl(t, append(get, more...)...)
	for line := range strings.Lines(out) {
		if at, name, _ := strings.Cut(strings.TrimSpace(line), "|"); at == "" {
			list = append(list, name)
		}
	}
	return list
}

// news are the lines that clients have said since somebody asked.
func (l *life) news(t *testing.T) (list []string) {
	t.Helper()
	for node, name := range l.clients(t) {
		out, err := l.cluster.TryKubectl(t.Context(), "", "logs", "-n", "life", name)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(out, "\n")
		lines = lines[:len(lines)-1]
		if l.said[name] > len(lines) { // its container is another one
			l.said[name] = 0
		}
		for _, line := range lines[l.said[name]:] {
			if answered, yes := strings.CutPrefix(line, "answered "); yes {
				var a [3]int
				fmt.Sscan(answered, &a[0], &a[1], &a[2])
				l.last[name] = a
				continue
			}
			list = append(list, node+" "+line)
		}
		l.said[name] = len(lines)
	}
	return list
}

// forget takes what was said so far as seen.
func (l *life) forget(t *testing.T) { l.news(t) }

// flows waits until every client has more answers of each kind.
func (l *life) flows(t *testing.T, when string) {
	t.Helper()
	began := map[string][3]int{}
	l.cluster.Eventually(t, "requests of every kind are answered: "+when, func() error {
		clients := l.clients(t)
		if len(clients) != len(l.cluster.Nodes) {
			return fmt.Errorf("there are %d clients", len(clients))
		}
		for node, name := range clients {
			out, err := l.cluster.TryKubectl(t.Context(), "", "logs", "-n", "life", name, "--tail=50")
			if err != nil {
				return err
			}
			var a [3]int
			for line := range strings.Lines(out) {
				if answered, yes := strings.CutPrefix(line, "answered "); yes {
					fmt.Sscan(answered, &a[0], &a[1], &a[2])
				}
			}
			was, seen := began[name]
			if !seen || a[0] < was[0] {
				began[name] = a
			}
			for kind := range a {
				if a[kind] < was[kind]+10 || !seen {
					return fmt.Errorf("on %s: %v, and before %v", node, a, was)
				}
			}
		}
		return nil
	})
}

var brokenHeld = regexp.MustCompile(`^\S+ BROKEN held (\S*): `)

// unbroken fails the test for each request that was not answered, and each connection that
// broke while its server is there. ended are servers that were told to end.
func (l *life) unbroken(t *testing.T, when string, ended ...string) {
	t.Helper()
	l.judge(t, when, l.news(t), ended)
}

func (l *life) judge(t *testing.T, when string, news, ended []string) {
	t.Helper()
	moved, broken, bad := 0, 0, []string{}
	for _, line := range news {
		held := brokenHeld.FindStringSubmatch(line)
		switch {
		case strings.HasSuffix(line, " MOVED kept"):
			moved++
		case held != nil && slices.Contains(ended, held[1]):
			broken++
		default:
			bad = append(bad, line)
		}
	}
	total := 0
	for _, a := range l.last {
		total += a[0] + a[1] + a[2]
	}
	t.Logf("%s: %d answers so far, %d failures; %d kept connections were closed between requests, %d ended with their servers", when, total, len(bad), moved, broken)
	if len(bad) > 0 {
		t.Errorf("%s: %d failures:\n%s", when, len(bad), strings.Join(bad[:min(len(bad), 30)], "\n"))
	}
	l.unread(t)
}

// proxies are the numbers of all proxies of a node.
func (l *life) proxies(t *testing.T, n *kubernetes.Machine) []int {
	t.Helper()
	out, _ := n.Try(t.Context(), "pgrep", "-f", "^assay-proxy ")
	var list []int
	for _, f := range strings.Fields(out) {
		if pid, err := strconv.Atoi(f); err == nil {
			list = append(list, pid)
		}
	}
	slices.Sort(list)
	return list
}
