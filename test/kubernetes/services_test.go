package kubernetes_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"regexp"
	"slices"
	"strings"
	"testing"

	"assay.dev/api"
	"assay.dev/test/kubernetes"
)

// servicesManifest has the same client twice on node-1, meshed and not, and services that say
// who their clients are sent to. %[1]s is the image.
const servicesManifest = `apiVersion: v1
kind: Namespace
metadata: {name: meshed, labels: {assay.dev/mesh: enabled}}
---
apiVersion: v1
kind: Namespace
metadata: {name: plain}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: meshed}
spec:
  nodeName: node-1
  terminationGracePeriodSeconds: 1
  containers: [{name: c, image: %[1]s, args: [sleep]}]
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: plain}
spec:
  nodeName: node-1
  terminationGracePeriodSeconds: 1
  containers: [{name: c, image: %[1]s, args: [sleep]}]
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: each, namespace: meshed}
spec:
  selector: {matchLabels: {app: each}}
  template:
    metadata: {labels: {app: each}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: c, image: %[1]s, args: [serve], ports: [{name: web, containerPort: 8080}], readinessProbe: {httpGet: {port: web}, periodSeconds: 1, timeoutSeconds: 20}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: four, namespace: meshed}
spec:
  replicas: 4
  selector: {matchLabels: {app: four}}
  template:
    metadata: {labels: {app: four}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: c, image: %[1]s, args: [serve], ports: [{name: web, containerPort: 8080}], readinessProbe: {httpGet: {port: web}, periodSeconds: 1, timeoutSeconds: 20}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: far, namespace: meshed}
spec:
  selector: {matchLabels: {app: far}}
  template:
    metadata: {labels: {app: far}}
    spec:
      nodeSelector: {kubernetes.io/hostname: node-2}
      terminationGracePeriodSeconds: 1
      containers:
      - {name: c, image: %[1]s, args: [serve], ports: [{name: web, containerPort: 8080}], readinessProbe: {httpGet: {port: web}, periodSeconds: 1, timeoutSeconds: 20}}
---
apiVersion: v1
kind: Pod
metadata: {name: never, namespace: meshed, labels: {app: never}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: c, image: %[1]s, args: [serve], ports: [{name: web, containerPort: 8080}], readinessProbe: {httpGet: {port: 9}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {name: any, namespace: meshed}
spec: {selector: {app: four}, ports: [{port: 80, targetPort: web}]}
---
apiVersion: v1
kind: Service
metadata: {name: sticky, namespace: meshed}
spec: {sessionAffinity: ClientIP, selector: {app: four}, ports: [{port: 80, targetPort: web}]}
---
apiVersion: v1
kind: Service
metadata: {name: local, namespace: meshed}
spec: {internalTrafficPolicy: Local, selector: {app: each}, ports: [{port: 80, targetPort: web}]}
---
apiVersion: v1
kind: Service
metadata: {name: elsewhere, namespace: meshed}
spec: {internalTrafficPolicy: Local, selector: {app: far}, ports: [{port: 80, targetPort: web}]}
---
apiVersion: v1
kind: Service
metadata: {name: samenode, namespace: meshed}
spec: {trafficDistribution: PreferSameNode, selector: {app: each}, ports: [{port: 80, targetPort: web}]}
---
apiVersion: v1
kind: Service
metadata: {name: samezone, namespace: meshed}
spec: {trafficDistribution: PreferSameZone, selector: {app: each}, ports: [{port: 80, targetPort: web}]}
---
apiVersion: v1
kind: Service
metadata: {name: unready, namespace: meshed}
spec: {publishNotReadyAddresses: true, selector: {app: never}, ports: [{port: 80, targetPort: web}]}
---
apiVersion: v1
kind: Service
metadata: {name: outside, namespace: meshed}
spec: {type: LoadBalancer, externalTrafficPolicy: Local, externalIPs: [192.0.2.10], selector: {app: far}, ports: [{port: 80, targetPort: web, appProtocol: example.com/own}]}
---
apiVersion: v1
kind: Service
metadata: {name: six, namespace: meshed}
spec: {ipFamilies: [IPv6], ipFamilyPolicy: SingleStack, selector: {app: far}, ports: [{port: 80, targetPort: web}]}
---
apiVersion: v1
kind: Service
metadata: {name: named, namespace: meshed}
spec: {type: ExternalName, externalName: any.meshed.svc.cluster.local}
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: meshed}
spec: {clusterIP: None, sessionAffinity: ClientIP, selector: {app: far}, ports: [{port: 8080, targetPort: web}]}
`

// services is the suite's cluster with the mesh.
type services struct {
	*person
	nodes map[string]string // of pods, by name
}

// TestServices: what a Service says of its clients' endpoints means to a meshed client what it
// means to one of kube-proxy's.
func TestServices(t *testing.T) {
	kubernetes.Require(t)
	c := kubernetes.Up(t, 2)
	if err := c.LoadAssay(t.Context()); err != nil {
		t.Fatal(err)
	}
	s := &services{newPerson(t, c), map[string]string{}}
	// Control stays on node-1: node-2 is to be forgotten.
	c.Kubectl(t, "cordon", c.Nodes[1].Name)
	s.must(t, "assay", installArgs...)
	c.Kubectl(t, "uncordon", c.Nodes[1].Name)
	c.Apply(t, fmt.Sprintf(servicesManifest, kubernetes.EchoImage))
	for _, object := range []string{"daemonset/each", "deployment/four", "deployment/far"} {
		c.Rollout(t, "meshed", object)
	}
	for _, ns := range []string{"meshed", "plain"} {
		c.Kubectl(t, "wait", "-n", ns, "pod/client", "--for=condition=Ready", "--timeout=150s")
	}
	s.locate(t)
	t.Run("any", s.any)
	t.Run("affinity", s.affinity)
	t.Run("near", s.near)
	t.Run("local without endpoints", s.localWithout)
	t.Run("others", s.others)
	t.Run("notes", s.notes)
	t.Run("node", s.nodeReturns)
}

// locate learns on which nodes pods are.
func (s *services) locate(t *testing.T) {
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Spec     struct{ NodeName string }
		}
	}
	s.cluster.Get(t, "/api/v1/namespaces/meshed/pods", &list)
	for _, p := range list.Items {
		s.nodes[p.Metadata.Name] = p.Spec.NodeName
	}
}

var answerLine = regexp.MustCompile(`host=(\S+) `)

// ask has the client of a namespace ask, by a new connection each time, and returns who answered.
func (s *services) ask(t *testing.T, namespace, url string, times int) ([]string, error) {
	t.Helper()
	out, err := s.cluster.TryKubectl(t.Context(), "", "exec", "-n", namespace, "client", "--", "/bin/echo", "get", url, fmt.Sprint(times))
	who := map[string]bool{}
	for _, m := range answerLine.FindAllStringSubmatch(out, -1) {
		who[m[1]] = true
	}
	return slices.Sorted(maps.Keys(who)), err
}

// both asks as both clients until both have the answer that ok takes.
func (s *services) both(t *testing.T, url string, times int, ok func(who []string) error) {
	t.Helper()
	for _, namespace := range []string{"plain", "meshed"} {
		s.cluster.Eventually(t, "who "+url+" is for the client in namespace "+namespace, func() error {
			who, err := s.ask(t, namespace, url, times)
			if err == nil {
				err = ok(who)
			}
			return err
		})
	}
}

// on takes answers that came from one node alone.
func (s *services) on(node string) func([]string) error {
	return func(who []string) error {
		for _, pod := range who {
			if s.nodes[pod] != node {
				return fmt.Errorf("%s on %s answers", pod, s.nodes[pod])
			}
		}
		if len(who) == 0 {
			return fmt.Errorf("nobody answers")
		}
		return nil
	}
}

// any: what says nothing is spread.
func (s *services) any(t *testing.T) {
	s.both(t, "http://any.meshed/", 40, func(who []string) error {
		if len(who) < 2 {
			return fmt.Errorf("40 requests went to %v", who)
		}
		return nil
	})
	s.both(t, "http://named.meshed/", 1, func([]string) error { return nil }) // another name of it
}

// affinity: one endpoint for each client, until that is gone; then another one.
func (s *services) affinity(t *testing.T) {
	one := func(who []string) error {
		if len(who) != 1 {
			return fmt.Errorf("%v answer", who)
		}
		return nil
	}
	for _, namespace := range []string{"plain", "meshed"} {
		first, err := s.ask(t, namespace, "http://sticky.meshed/", 20)
		if err == nil {
			err = one(first)
		}
		if err != nil {
			t.Fatalf("the client in namespace %s: %v", namespace, err)
		}
		if again, err := s.ask(t, namespace, "http://sticky.meshed/", 20); err != nil || !slices.Equal(again, first) {
			t.Errorf("the client in namespace %s: %v, and then %v, %v", namespace, first, again, err)
		}
		s.cluster.Kubectl(t, "delete", "pod", "-n", "meshed", first[0], "--wait=true")
		s.cluster.Eventually(t, "another endpoint for the client in namespace "+namespace, func() error {
			who, err := s.ask(t, namespace, "http://sticky.meshed/", 20)
			if err == nil {
				err = one(who)
			}
			if err == nil && who[0] == first[0] {
				err = fmt.Errorf("%s, which is gone, answers", who[0])
			}
			return err
		})
	}
	s.cluster.Rollout(t, "meshed", "deployment/four")
	s.locate(t)
}

// near: endpoints of the own node, or of the own zone, which is one node here.
func (s *services) near(t *testing.T) {
	for _, service := range []string{"local", "samenode", "samezone"} {
		s.both(t, "http://"+service+".meshed/", 20, s.on("node-1"))
	}
}

// localWithout: kube-proxy drops what comes; a proxy says why it refuses.
func (s *services) localWithout(t *testing.T) {
	for _, namespace := range []string{"plain", "meshed"} {
		ctx := "http://elsewhere.meshed/"
		if who, err := s.ask(t, namespace, ctx, 1); err == nil {
			t.Errorf("the client in namespace %s is answered by %v", namespace, who)
		}
	}
	s.cluster.Eventually(t, "the refusal is listed", func() error {
		out, _ := s.run(t, "kubectl", "assay", "get", "edges", "-n", "meshed", "-o", "json")
		if !strings.Contains(out, `"no-local-endpoint"`) {
			return fmt.Errorf("edges have no reason no-local-endpoint:\n%s", out)
		}
		return nil
	})
}

// others: what else services say.
func (s *services) others(t *testing.T) {
	for _, url := range []string{"http://outside.meshed/", "http://192.0.2.10/", "http://six.meshed/", "http://headless.meshed:8080/"} {
		s.both(t, url, 3, s.on("node-2"))
	}
	s.both(t, "http://"+s.nodePort(t)+"/", 3, s.on("node-2"))
	s.both(t, "http://unready.meshed/", 1, func(who []string) error {
		if !slices.Equal(who, []string{"never"}) {
			return fmt.Errorf("%v answer", who)
		}
		return nil
	})
	// At its balancer's address, and at a node's, a meshed client has mutual TLS, too.
	out := s.must(t, "kubectl", "assay", "get", "edges", "-n", "meshed", "-o", "json")
	for _, address := range []string{"192.0.2.10", strings.Fields(s.address(t, "node-1"))[0]} {
		if strings.Contains(out, `"remote":"`+address) || strings.Contains(out, `"remote": "`+address) {
			t.Errorf("%s is taken for an address outside:\n%s", address, out)
		}
	}
}

// address is a node's own.
func (s *services) address(t *testing.T, node string) string {
	return s.cluster.Kubectl(t, "get", "node", node, "-o", `jsonpath={.status.addresses[?(@.type=="InternalIP")].address}`)
}

// nodePort is where the service "outside" is reached at node-1.
func (s *services) nodePort(t *testing.T) string {
	port := s.cluster.Kubectl(t, "get", "service", "-n", "meshed", "outside", "-o", "jsonpath={.spec.ports[0].nodePort}")
	return net.JoinHostPort(strings.Fields(s.address(t, "node-1"))[0], port)
}

// notes: what the mesh does not do of what services say is told.
func (s *services) notes(t *testing.T) {
	var list []api.ServiceView
	if err := json.Unmarshal([]byte(s.must(t, "kubectl", "assay", "get", "services", "-n", "meshed", "-o", "json")), &list); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"headless": "spec.sessionAffinity", "outside": "spec.ports[0].appProtocol", "named": "spec.externalName", "sticky": ""} {
		i := slices.IndexFunc(list, func(v api.ServiceView) bool { return v.Name == name })
		if i < 0 {
			t.Errorf("service %s is not listed", name)
		} else if got := strings.Join(list[i].Notes, "\n"); want == "" && got != "" || !strings.HasPrefix(got, want) {
			t.Errorf("service %s: notes %q, want one of %q", name, got, want)
		}
	}
	s.cluster.Apply(t, `apiVersion: assay.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: lost, namespace: meshed}
spec: {targetRefs: [{name: nobody}]}
`)
	s.cluster.Eventually(t, "a policy of nobody is a finding", func() error {
		if out, code := s.run(t, "kubectl", "assay", "check"); code != 2 || !strings.Contains(out, "target-missing: TrafficPolicy meshed/lost\n") {
			return fmt.Errorf("exit code %d\n%s", code, out)
		}
		return nil
	})
	s.cluster.Kubectl(t, "delete", "trafficpolicy", "-n", "meshed", "lost")
}

// nodeReturns: a node that the API server forgot, and that came back, is a host of the mesh again.
func (s *services) nodeReturns(t *testing.T) {
	hosts := func() (map[string]api.HostView, error) {
		text, code := s.run(t, "kubectl", "assay", "get", "hosts", "-o", "json")
		var list []api.HostView
		if err := json.Unmarshal([]byte(text), &list); err != nil {
			return nil, fmt.Errorf("exit code %d: %s", code, text)
		}
		out := map[string]api.HostView{}
		for _, h := range list {
			out[h.Name] = h
		}
		return out, nil
	}
	if h, err := hosts(); err != nil || h["node-1"].Zone != "zone-1" || h["node-2"].Zone != "zone-2" {
		t.Errorf("the hosts' zones: %+v, %v", h, err)
	}
	node := s.cluster.Nodes[1]
	s.cluster.Kubectl(t, "delete", "node", node.Name)
	s.cluster.Eventually(t, "its host is gone", func() error {
		h, err := hosts()
		if _, there := h[node.Name]; there {
			err = fmt.Errorf("it is there")
		}
		return err
	})
	if err := node.Stop("kubelet"); err != nil {
		t.Fatal(err)
	}
	if err := s.cluster.Start(node, "kubelet"); err != nil {
		t.Fatal(err)
	}
	s.cluster.Ready(t, node)
	s.cluster.Eventually(t, "its host is back", func() error {
		h, err := hosts()
		if err == nil && !h[node.Name].Ready {
			err = fmt.Errorf("the host: %+v", h[node.Name])
		}
		return err
	})
	s.cluster.Rollout(t, "meshed", "daemonset/each")
	s.cluster.Rollout(t, "meshed", "deployment/far")
	s.locate(t)
	s.both(t, "http://outside.meshed/", 3, s.on(node.Name))
}
