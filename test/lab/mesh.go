package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"
)

// Mesh is a running `assay up` on the lab's host.
type Mesh struct {
	*Lab
	Host      *Space        // where workloads are started: the lab's own host, or another
	Assay     string        // the command's path inside the lab
	Data      string        // its data folder
	Up        *Process      // `assay up`; nil when the roles run apart
	Control   *Process      // `assay control`, or Up
	Agent     *Process      // `assay agent`, or Up
	ReadyTime time.Duration // from start until it took operators and workloads

	args      []string
	agentArgs []string
	placed    []*Workload
}

// Where `assay up` of a lab keeps things. The runtime folder is the default one:
// /run is the lab's own.
const (
	dataDir    = "/tmp/assay-data"
	runtimeDir = "/run/assay"
)

// StartMesh builds Assay, starts `assay up` with more arguments if wanted, and
// waits until it is ready.
func (l *Lab) StartMesh(t TB, args ...string) *Mesh {
	t.Helper()
	bin, err := BuildAssay()
	if err != nil {
		t.Fatalf("%v", err)
	}
	m := &Mesh{Lab: l, Host: l.Space, Assay: bin, Data: dataDir, args: args}
	m.Start(t)
	return m
}

// Start starts `assay up` (again) and waits until it is ready.
func (m *Mesh) Start(t TB) {
	t.Helper()
	began := time.Now()
	m.Up = m.Lab.launch(t, append([]string{m.Assay, "up", "--data", m.Data}, m.args...)...)
	if err := WaitFor(t.Context(), 20*time.Second, m.ready); err != nil {
		t.Fatalf("assay up is not ready: %v\n%s", err, lastLines(m.Up.Output(), 20))
	}
	m.ReadyTime = time.Since(began)
	m.Control, m.Agent = m.Up, m.Up
}

func (m *Mesh) ready() error {
	if m.Up.Ended() {
		return fmt.Errorf("ended with exit code %d", m.Up.Code())
	}
	if !strings.Contains(m.Up.Output(), "assay is ready") {
		return fmt.Errorf("has not said that it is ready")
	}
	return nil
}

// CLI runs `assay` with arguments on the host.
func (m *Mesh) CLI(t TB, args ...string) Result {
	t.Helper()
	return m.Exec(t, append([]string{m.Assay}, args...)...)
}

// Get decodes `assay get KIND -o json` into items.
func (m *Mesh) Get(t TB, kind string, items any) {
	t.Helper()
	out := m.MustExec(t, m.Assay, "get", kind, "-o", "json")
	if err := json.Unmarshal([]byte(out), items); err != nil {
		t.Fatalf("assay get %s: %v\n%s", kind, err, out)
	}
}

// Spec is how a workload is to run.
type Spec struct {
	Namespace string   // "" is the default one
	Ports     []int    // declared with --port
	Args      []string // more arguments of `assay run`
	Command   []string // nil waits for ever
}

// Workload is something under `assay run`, or a plain host with the same face.
type Workload struct {
	*Space
	Name    string
	Main    *Process // what was started: `assay run`, or the command itself
	PID     int      // of the command
	IPv4    netip.Addr
	IPv6    netip.Addr
	RunTime time.Duration // from start until the command ran

	netLink string
}

// Run starts a workload and waits until its command runs.
func (m *Mesh) Run(t TB, name string, spec Spec) *Workload {
	t.Helper()
	w, err := m.StartRun(t, name, spec)
	if err != nil {
		t.Fatalf("assay run %s: %v\n%s\n--- assay up:\n%s", name, err, lastLines(w.Main.Output(), 10), lastLines(m.Agent.Output(), 20))
	}
	return w
}

// StartRun is Run that returns what went wrong.
func (m *Mesh) StartRun(t TB, name string, spec Spec) (*Workload, error) {
	t.Helper()
	argv := []string{m.Assay, "run", "--service", name}
	if spec.Namespace != "" {
		argv = append(argv, "--namespace", spec.Namespace)
	}
	for _, p := range spec.Ports {
		argv = append(argv, "--port", strconv.Itoa(p))
	}
	argv = append(append(argv, spec.Args...), "--")
	if spec.Command == nil {
		spec.Command = []string{"sleep", "infinity"}
	}
	argv = append(argv, spec.Command...)
	w := &Workload{Name: name}
	began := time.Now()
	w.Main = m.Host.Start(t, argv...)
	err := WaitFor(t.Context(), 15*time.Second, func() error {
		if w.Main.Ended() {
			return fmt.Errorf("ended with exit code %d", w.Main.Code())
		}
		for _, p := range m.Children(w.Main.PID) {
			if p.Parent == w.Main.PID && p.Exe != m.Assay && p.Exe != "" {
				w.PID = p.PID
				return nil
			}
		}
		return fmt.Errorf("the command does not run yet")
	})
	if err != nil {
		return w, err
	}
	w.RunTime = time.Since(began)
	if w.Space, err = OpenSpace(w.PID); err != nil {
		return w, err
	}
	if inode, err := w.NetInode(); err == nil {
		w.netLink = netLink(inode)
	}
	m.placed = append(m.placed, w)
	// Programs of the test are born beside the workload, not below it.
	t.Cleanup(w.Space.Close)
	w.IPv4, w.IPv6, err = ownAddresses(w.Space)
	return w, err
}

// ownAddresses reads a workload's addresses from its namespace.
func ownAddresses(s *Space) (v4, v6 netip.Addr, err error) {
	err = s.In(func() error {
		links, err := interfaceAddrs()
		for _, a := range links {
			switch {
			case a.IsLoopback() || a.IsLinkLocalUnicast():
			case a.Is4():
				v4 = a
			case a.Is6():
				v6 = a
			}
		}
		return err
	})
	return v4, v6, err
}

// Proxy returns the process number of a workload's proxy, 0 when there is none.
func (m *Mesh) Proxy(w *Workload) int {
	inode, err := w.NetInode()
	if err != nil {
		return 0
	}
	return m.proxyIn(netLink(inode))
}

// ProxyLogs returns the ends of the logs of workloads' proxies, for a person who wants
// to know why a test failed.
func (m *Mesh) ProxyLogs(t TB, workloads ...*Workload) string {
	t.Helper()
	var text strings.Builder
	for _, w := range workloads {
		r := m.Exec(t, "find", m.Data, "-name", w.Name+"-*.log", "-exec", "tail", "-n", "20", "{}", "+")
		fmt.Fprintf(&text, "--- the proxy of %s:\n%s", w.Name, r.Stdout)
	}
	return text.String()
}

// netLink is what /proc/PID/ns/net links to for processes in the namespace.
func netLink(inode uint64) string { return fmt.Sprintf("net:[%d]", inode) }

func (m *Mesh) proxyIn(net string) int {
	for _, p := range m.Processes() {
		if p.Net == net && strings.HasSuffix(p.Exe, "/assay-proxy") {
			return p.PID
		}
	}
	return 0
}

// awaitRemovals waits until the agent has removed the workloads whose `assay run` has
// ended. An agent that is asked to end before it noticed leaves them to the next one.
func (m *Mesh) awaitRemovals(t TB) {
	t.Helper()
	err := WaitFor(context.WithoutCancel(t.Context()), 10*time.Second, func() error {
		for _, w := range m.placed {
			if net := w.netLink; net != "" && w.Main.Ended() && m.proxyIn(net) != 0 {
				return fmt.Errorf("the proxy of %s runs", w.Name)
			}
		}
		return nil
	})
	if err != nil {
		t.Errorf("after the end of their commands: %v", err)
	}
}

// FileExists reports whether the lab has a file.
func (l *Lab) FileExists(inside string) bool {
	_, err := os.Lstat(l.Path(inside))
	return err == nil
}

// ServiceStatus is what the tests read of `assay get services -o json`.
type ServiceStatus struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	Ports     []struct {
		Port int `json:"port"`
	} `json:"ports"`
	VIPs      []netip.Addr `json:"vips"`
	Endpoints []struct {
		Workload string `json:"workload"`
		Targets  []int  `json:"targets"`
	} `json:"endpoints"`
}

// EndpointReady returns nil once a service has an endpoint that listens.
func (m *Mesh) EndpointReady(t TB, service string, port int) error {
	var list []ServiceStatus
	m.Get(t, "services", &list)
	for _, s := range list {
		if s.Name != service {
			continue
		}
		for i, p := range s.Ports {
			for _, e := range s.Endpoints {
				if p.Port == port && i < len(e.Targets) && e.Targets[i] != 0 {
					return nil
				}
			}
		}
		return fmt.Errorf("%s has no ready endpoint on port %d: %+v", service, port, s)
	}
	return fmt.Errorf("there is no service %s among %d", service, len(list))
}
