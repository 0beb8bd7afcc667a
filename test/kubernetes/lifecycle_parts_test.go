package kubernetes_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"assay.dev/kube/install"
	"assay.dev/test/kubernetes"
)

// rollingRestart: servers are replaced one by one, first such that stop listening as soon
// as they are told to end, then such that are told three seconds later.
func (l *life) rollingRestart(t *testing.T) {
	c := l.cluster
	l.forget(t)
	old := l.servers(t)
	c.Kubectl(t, "patch", "deployment", "-n", "life", "server", "--type=json", "-p",
		`[{"op": "add", "path": "/spec/template/spec/containers/0/lifecycle", "value": {"preStop": {"sleep": {"seconds": 3}}}}]`)
	c.Rollout(t, "life", "deployment/server")
	l.flows(t, "other servers")
	l.unbroken(t, "servers that end at once were replaced", old...)
	old = l.servers(t)
	c.Kubectl(t, "rollout", "restart", "-n", "life", "deployment/server")
	c.Rollout(t, "life", "deployment/server")
	l.gone(t, old)
	l.flows(t, "other servers again")
	l.unbroken(t, "servers that end later were replaced", old...)
	l.meshed(t, 6)
}

// gone waits until pods have ended.
func (l *life) gone(t *testing.T, names []string) {
	t.Helper()
	l.cluster.Eventually(t, "the old servers have ended", func() error {
		out := l.cluster.Kubectl(t, "get", "pods", "-n", "life", "-o", "name")
		for _, name := range names {
			if strings.Contains(out, "pod/"+name+"\n") {
				return fmt.Errorf("%s is there", name)
			}
		}
		return nil
	})
}

// agent: agents are killed, restarted and upgraded; proxies go on, and are replaced without
// losing a connection when there are others.
func (l *life) agent(t *testing.T) {
	c := l.cluster
	l.forget(t)
	var before [][]int
	for _, n := range c.Nodes {
		before = append(before, l.proxies(t, n))
	}
	same := func(when string) {
		t.Helper()
		for i, n := range c.Nodes {
			if now := l.proxies(t, n); !slices.Equal(now, before[i]) {
				t.Errorf("%s: proxies on %s were %v and are %v", when, n.Name, before[i], now)
			}
		}
	}
	for _, n := range c.Nodes {
		l.killAgent(t, n)
	}
	l.flows(t, "agents were killed")
	l.joined(t)
	same("agents were killed")
	l.unbroken(t, "agents were killed")

	c.Kubectl(t, "rollout", "restart", "-n", install.DefaultNamespace, "daemonset/assay-agent")
	c.Rollout(t, install.DefaultNamespace, "daemonset/assay-agent")
	l.joined(t)
	same("agents were restarted")
	l.flows(t, "agents were restarted")
	l.unbroken(t, "agents were restarted")

	l.withoutAgents(t)
	c.Eventually(t, "the proxies are those of before", func() error {
		for i, n := range c.Nodes {
			if now := l.proxies(t, n); !slices.Equal(now, before[i]) {
				return fmt.Errorf("on %s they were %v and are %v", n.Name, before[i], now)
			}
		}
		return nil
	})

	if err := c.LoadNext(t.Context()); err != nil {
		t.Fatal(err)
	}
	next := slices.Clone(lifeInstall)
	next[2] = kubernetes.NextImage
	l.must(t, "assay", next...)
	l.joined(t)
	c.Eventually(t, "every pod has another proxy", func() error {
		nodes := c.Kubectl(t, "get", "pods", "-n", "life", "-o", "jsonpath={.items[*].spec.nodeName}")
		for i, n := range c.Nodes {
			fresh := slices.DeleteFunc(l.proxies(t, n), func(pid int) bool { return slices.Contains(before[i], pid) })
			if pods := strings.Count(nodes+" ", n.Name+" "); len(fresh) < pods { // the scheduler spreads them as it likes
				return fmt.Errorf("on %s there are %v for %d pods", n.Name, fresh, pods)
			}
		}
		return nil
	})
	l.flows(t, "everything was upgraded")
	l.unbroken(t, "everything was upgraded")
}

// withoutAgents: there is none on any node. What runs goes on, and a pod that starts waits
// for its agent and says so.
func (l *life) withoutAgents(t *testing.T) {
	c := l.cluster
	daemons := []string{"patch", "daemonset", "-n", install.DefaultNamespace, install.AgentName, "--type=json", "-p"}
	c.Kubectl(t, append(daemons, `[{"op": "add", "path": "/spec/template/spec/nodeSelector/away", "value": "yes"}]`)...)
	c.Kubectl(t, "wait", "-n", install.DefaultNamespace, "pod", "-l", "app.kubernetes.io/component=agent", "--for=delete", "--timeout=150s")
	c.Apply(t, lateManifest)
	c.Eventually(t, "a pod says that it waits for its agent", func() error {
		out := c.Kubectl(t, "get", "events", "-n", "life", "--field-selector", "involvedObject.name=late,reason=FailedCreatePodSandBox", "-o", "jsonpath={.items[*].message}")
		if !strings.Contains(out, `plugin type="assay-cni"`) || !strings.Contains(out, "no agent runs there") {
			return fmt.Errorf("its events are %q", out)
		}
		return nil
	})
	l.flows(t, "without agents")
	l.unbroken(t, "agents were away")
	if out := c.Kubectl(t, "get", "pod", "-n", "life", "late", "-o", "jsonpath={.status.phase} {.status.containerStatuses[*].started}"); out != "Pending false" {
		t.Errorf("a pod without its agent is %q", out)
	}
	c.Kubectl(t, append(daemons, `[{"op": "remove", "path": "/spec/template/spec/nodeSelector/away"}]`)...)
	c.Rollout(t, install.DefaultNamespace, "daemonset/"+install.AgentName)
	l.joined(t)
	c.Kubectl(t, "wait", "-n", "life", "pod/late", "--for=condition=Ready", "--timeout=170s")
	l.meshed(t, 7)
	c.Eventually(t, "the pod that waited is answered", func() error {
		_, err := l.ask(t, "late")
		return err
	})
	c.Kubectl(t, "delete", "pod", "-n", "life", "late", "--wait=true")
	l.flows(t, "agents are back")
	l.unbroken(t, "agents are back")
}

// killAgent ends an agent's process; its container is restarted.
func (l *life) killAgent(t *testing.T, n *kubernetes.Machine) {
	t.Helper()
	n.MustExec(t, "pkill", "-9", "-f", "^/usr/local/bin/assay agent --node")
}

// joined waits until every agent has control's word.
func (l *life) joined(t *testing.T) {
	t.Helper()
	l.cluster.Eventually(t, "every agent is connected to control", func() error {
		for _, n := range l.cluster.Nodes {
			out, err := n.Try(t.Context(), "curl", "-sS", "--max-time", "20", "http://"+n.IPv4.String()+":9181/metrics")
			if err == nil && !strings.Contains(out, "\nassay_control_connected 1\n") {
				err = fmt.Errorf("%s has no control", n.Name)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// pass lets time go by, while the load goes on.
func pass(t *testing.T, d time.Duration) {
	t.Helper()
	over := time.NewTimer(d)
	defer over.Stop()
	select {
	case <-over.C:
	case <-t.Context().Done():
		t.Fatal(t.Context().Err())
	}
}

const lateManifest = `apiVersion: v1
kind: Pod
metadata: {name: late, namespace: life}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: client, image: ` + kubernetes.EchoImage + `, args: [sleep]}]
`

// control: it is replaced, and it is missing; what runs goes on, and a pod that starts
// without it is refused until it is back.
func (l *life) control(t *testing.T) {
	c := l.cluster
	l.forget(t)
	c.Kubectl(t, "rollout", "restart", "-n", install.DefaultNamespace, "deployment/assay-control")
	c.Rollout(t, install.DefaultNamespace, "deployment/assay-control")
	l.joined(t)
	l.flows(t, "control was replaced")
	l.unbroken(t, "control was replaced")

	c.Kubectl(t, "scale", "-n", install.DefaultNamespace, "deployment/assay-control", "--replicas=0")
	c.Kubectl(t, "wait", "-n", install.DefaultNamespace, "pod", "-l", "app.kubernetes.io/component=control", "--for=delete", "--timeout=120s")
	began := time.Now()
	c.Apply(t, lateManifest)
	c.Kubectl(t, "wait", "-n", "life", "pod/late", "--for=condition=Ready", "--timeout=150s")
	if out, err := l.ask(t, "late"); err == nil {
		t.Errorf("a pod that started without control is answered: %s", out)
	} else if !strings.Contains(err.Error(), "503 Service Unavailable: assay: no-certificate: ") {
		t.Errorf("a pod that started without control is not told why it is refused: %v", err)
	}
	l.refused(t, "late", "no-certificate")
	l.killAgent(t, c.Nodes[0])
	pass(t, away(t)-time.Since(began))
	l.flows(t, "without control")
	l.unbroken(t, fmt.Sprintf("control was missing for %s", time.Since(began).Round(time.Second)))
	c.Kubectl(t, "scale", "-n", install.DefaultNamespace, "deployment/assay-control", "--replicas=1")
	c.Rollout(t, install.DefaultNamespace, "deployment/assay-control")
	c.Eventually(t, "the pod gets in when control is back", func() error {
		_, err := l.ask(t, "late")
		return err
	})
	l.meshed(t, 7)
	c.Kubectl(t, "delete", "pod", "-n", "life", "late", "--wait=true")
	l.flows(t, "control is back")
	l.unbroken(t, "control is back")
}

// refused waits until the agent of a pod's node tells that the pod was refused, and why.
func (l *life) refused(t *testing.T, pod, reason string) {
	t.Helper()
	node, uid, _ := strings.Cut(l.cluster.Kubectl(t, "get", "pod", "-n", "life", pod, "-o", "jsonpath={.spec.nodeName} {.metadata.uid}"), " ")
	i := slices.IndexFunc(l.cluster.Nodes, func(n *kubernetes.Machine) bool { return n.Name == node })
	if i < 0 {
		t.Fatalf("%s is on %q", pod, node)
	}
	n := l.cluster.Nodes[i]
	l.cluster.Eventually(t, "on "+node+" "+pod+" is counted as refused: "+reason, func() error {
		out, err := n.Try(t.Context(), "curl", "-sS", "--max-time", "20", "http://"+n.IPv4.String()+":9181/metrics")
		if err != nil {
			return err
		}
		var told []string
		for line := range strings.Lines(out) {
			if !strings.HasPrefix(line, "assay_refusals_total{") || !strings.Contains(line, `workload="`+uid+`"`) {
				continue
			}
			if strings.Contains(line, `reason="`+reason+`"`) && !strings.HasSuffix(line, " 0\n") {
				return nil
			}
			told = append(told, line)
		}
		return fmt.Errorf("its refusals are %q", told)
	})
}

// ask asks the service from a pod.
func (l *life) ask(t *testing.T, pod string) (string, error) {
	return l.cluster.TryKubectl(t.Context(), "", "exec", "-n", "life", pod, "--", "/bin/echo", "get", "http://"+l.at+"/in-the-clear")
}

// apiServer: it is missing, and an agent is restarted meanwhile.
func (l *life) apiServer(t *testing.T) {
	c := l.cluster
	l.forget(t)
	if err := c.Control.Stop("kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	l.killAgent(t, c.Nodes[1])
	pass(t, away(t))
	if err := c.Start(c.Control, "kube-apiserver"); err != nil {
		t.Fatal(err)
	}
	l.reachable(t)
	l.flows(t, "the API server is back")
	l.unbroken(t, fmt.Sprintf("the API server was missing for %s", time.Since(began).Round(time.Second)))
	for _, n := range c.Nodes {
		c.Ready(t, n)
	}
	l.joined(t)
	c.Kubectl(t, "rollout", "restart", "-n", "life", "daemonset/client")
	c.Rollout(t, "life", "daemonset/client")
	l.meshed(t, 6)
	l.flows(t, "clients that started after it")
	l.forget(t) // the first requests of those may have been refused, before there was a certificate
	l.flows(t, "the API server is back")
	l.unbroken(t, "the API server is back")
}

// reachable waits until the API server answers.
func (l *life) reachable(t *testing.T) {
	t.Helper()
	l.cluster.Eventually(t, "the API server is back", func() error {
		_, err := l.cluster.TryKubectl(t.Context(), "", "get", "pods", "-n", "life")
		return err
	})
}

// drain: a node's pods are evicted, and it is used again.
func (l *life) drain(t *testing.T) {
	c := l.cluster
	l.forget(t)
	old := l.servers(t)
	c.Kubectl(t, "drain", c.Nodes[1].Name, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=170s")
	c.Rollout(t, "life", "deployment/server")
	l.flows(t, "drained")
	c.Kubectl(t, "uncordon", c.Nodes[1].Name)
	l.meshed(t, 6)
	l.unbroken(t, "a node was drained", old...)
}

// reboot pulls a node's plug. Only what was asked of its pods may fail, and it comes back
// as it was.
func (l *life) reboot(t *testing.T) {
	c := l.cluster
	l.spread(t)
	old := l.servers(t, "--field-selector", "spec.nodeName="+c.Nodes[1].Name)
	l.forget(t)
	if err := c.Reboot(c.Nodes[1]); err != nil {
		t.Fatal(err)
	}
	l.watch(t, c.Nodes[1])
	began := time.Now()
	c.Ready(t, c.Nodes[1])
	c.Eventually(t, "the node's pods run again", func() error { return l.restarted(t, c.Nodes[1].Name) })
	c.Rollout(t, "life", "daemonset/client")
	c.Rollout(t, "life", "deployment/server")
	l.meshed(t, 6)
	l.joined(t)
	l.flows(t, "rebooted")
	lost, rest := []string{}, []string{}
	for _, line := range l.news(t) {
		if strings.Contains(line, " FAILED ") {
			lost = append(lost, line)
		} else {
			rest = append(rest, line)
		}
	}
	t.Logf("the node's pods were back after %s; requests that were lost with them: %d\n%s", time.Since(began).Round(time.Second), len(lost), strings.Join(lost[:min(len(lost), 30)], "\n"))
	l.judge(t, "a node was rebooted", rest, old)
	// Clients ask twice at a time, and wait for an answer longer than a proxy needs to leave
	// a server that says nothing: more than those, and as many again, were asked of nobody who
	// was there.
	if len(lost) > 4 {
		t.Errorf("%d requests were lost", len(lost))
	}
	l.flows(t, "after the reboot")
	l.unbroken(t, "a node was rebooted")
}

// spread puts servers on both nodes.
func (l *life) spread(t *testing.T) {
	t.Helper()
	l.cluster.Kubectl(t, "rollout", "restart", "-n", "life", "deployment/server")
	l.cluster.Rollout(t, "life", "deployment/server")
	l.flows(t, "servers on both nodes")
	l.meshed(t, 6)
}

// restarted says which pods of a node are not ready in a sandbox of its new life: the API
// server still has those of before.
func (l *life) restarted(t *testing.T, node string) error {
	out := l.cluster.Kubectl(t, "get", "pods", "-A", "--field-selector", "spec.nodeName="+node, "-o",
		`jsonpath={range .items[*]}{.metadata.name} {range .status.containerStatuses[*]}{.ready}:{.restartCount} {end}{"\n"}{end}`)
	for line := range strings.Lines(out) {
		if strings.Contains(line, "false:") || !strings.Contains(line, "true:") || strings.Contains(line, ":0 ") {
			return fmt.Errorf("%s", line)
		}
	}
	return nil
}

// coldStart pulls every plug at once. Nobody helps: control and DNS come up without the
// mesh, and the namespace is strict all the while.
func (l *life) coldStart(t *testing.T) {
	c := l.cluster
	l.unread(t)
	if err := c.ColdStart(); err != nil {
		t.Fatal(err)
	}
	l.wire = nil
	for _, n := range c.Nodes {
		l.watch(t, n)
	}
	began := time.Now()
	l.reachable(t)
	for _, n := range c.Nodes {
		c.Ready(t, n)
	}
	for _, n := range c.Nodes {
		c.Eventually(t, "the pods of "+n.Name+" run again", func() error { return l.restarted(t, n.Name) })
	}
	c.Rollout(t, install.DefaultNamespace, "deployment/assay-control")
	c.Rollout(t, install.DefaultNamespace, "daemonset/assay-agent")
	c.Rollout(t, "kube-system", "deployment/coredns")
	c.Rollout(t, "life", "deployment/server")
	c.Rollout(t, "life", "daemonset/client")
	l.meshed(t, 6)
	l.flows(t, "cold start")
	t.Logf("after a cold start everything talks in %s", time.Since(began).Round(time.Second))
	l.forget(t)
	l.flows(t, "after the cold start")
	l.unbroken(t, "a cold start")
}

// uninstall: the mesh is taken out of a strict namespace. What holds a connection through
// it is cut when the drain is over, and nothing else.
func (l *life) uninstall(t *testing.T) {
	c := l.cluster
	l.flows(t, "before it is taken out")
	l.unbroken(t, "before it is taken out")
	l.wire = nil
	servers := l.servers(t)
	t.Logf("uninstall says:\n%s", l.must(t, "assay", "uninstall", "--drain", "5s", "--timeout", "7m"))
	l.flows(t, "without the mesh again")
	l.unbroken(t, "the mesh was taken out", servers...)
	for _, n := range c.Nodes {
		if list := l.proxies(t, n); len(list) > 0 {
			t.Errorf("proxies on %s: %v", n.Name, list)
		}
	}
}
