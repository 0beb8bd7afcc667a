package lab

import (
	"fmt"
	"path/filepath"
	"strings"
	"time"
)

// NewRoles is NewWorld in meshed mode with control and agent as processes of their
// own, so that each can be ended without the other.
func NewRoles(t TB, args ...string) *World {
	t.Helper()
	w := &World{Lab: New(t), Mode: Meshed}
	bin, err := BuildAssay()
	if err != nil {
		t.Fatalf("%v", err)
	}
	w.Mesh = &Mesh{Lab: w.Lab, Host: w.Lab.Space, Assay: bin, Data: dataDir, args: args}
	w.Mesh.StartControl(t)
	w.Mesh.join(t)
	w.Mesh.StartAgent(t)
	t.Cleanup(func() { w.Mesh.Finish(t) })
	return w
}

// controlAddress is where agents find control in a lab.
const controlAddress = UplinkIPv4 + ":7443"

// StartControl starts control (again) and waits until it answers.
func (m *Mesh) StartControl(t TB) {
	t.Helper()
	if m.Up != nil {
		m.Start(t)
		return
	}
	m.Control = m.Lab.launch(t, append([]string{m.Assay, "control", "--data", filepath.Join(m.Data, "control"), "--listen", controlAddress}, m.args...)...)
	Eventually(t, 20*time.Second, "control answers", func() error {
		if m.Control.Ended() {
			return fmt.Errorf("ended with exit code %d: %s", m.Control.Code(), m.Control.Output())
		}
		_, err := m.Try(t.Context(), m.Assay, "get", "hosts", "-o", "json")
		return err
	})
}

// join makes the token with which the agent joins.
func (m *Mesh) join(t TB) {
	t.Helper()
	token := strings.TrimSpace(m.MustExec(t, m.Assay, "token", "create", "--cover", "*/*"))
	m.Write(t, "/tmp/token", token)
}

// StartAgent starts the agent (again) and waits until it takes workloads.
func (m *Mesh) StartAgent(t TB) {
	t.Helper()
	if m.Up != nil {
		m.Start(t)
		return
	}
	m.Agent = m.Host.launch(t, append([]string{m.Assay, "agent", "--data", filepath.Join(m.Data, "agent"), "--control", controlAddress, "--token-file", "/tmp/token"}, m.agentArgs...)...)
	Eventually(t, 20*time.Second, "the agent is ready", func() error {
		if m.Agent.Ended() {
			return fmt.Errorf("ended with exit code %d: %s", m.Agent.Code(), m.Agent.Output())
		}
		if !strings.Contains(m.Agent.Output(), "ready") {
			return fmt.Errorf("has not said that it is ready")
		}
		return nil
	})
}

// Listed returns nil when a workload of this name is listed.
func (m *Mesh) Listed(t TB, name string) error {
	t.Helper()
	var list []struct {
		Name string `json:"name"`
	}
	m.Get(t, "workloads", &list)
	for _, w := range list {
		if w.Name == name {
			return nil
		}
	}
	return fmt.Errorf("%s is not among the %d workloads", name, len(list))
}

// Strict makes a namespace refuse plaintext from outside.
func (m *Mesh) Strict(t TB, namespace string) {
	t.Helper()
	file := m.Write(t, "/tmp/strict-"+namespace+".yaml", "apiVersion: assay.dev/v1alpha1\nkind: MeshConfig\nmetadata:\n  name: default\n  namespace: "+namespace+"\nspec:\n  mode: strict\n")
	m.MustExec(t, m.Assay, "apply", "-f", file)
}

// CertificateStatus is what the tests read of `assay get certificates -o json`.
type CertificateStatus struct {
	Identity string `json:"identity"`
	Subject  string `json:"subject"`
	Workload string `json:"workload"`
	Serial   string `json:"serial"`
}

// Names reports whether the certificate is an account's.
func (c CertificateStatus) Names(account string) bool {
	return strings.HasSuffix(c.Identity, "/sa/"+account) || strings.HasSuffix(c.Subject, "/sa/"+account)
}

// SecondHost adds a machine to the mesh's network, with an agent of its own, and
// returns the mesh as seen from there: its workloads start on that machine. args are
// more of its agent's.
func (m *Mesh) SecondHost(t TB, name string, args ...string) *Mesh {
	t.Helper()
	node := m.Node(t, name)
	// A mount namespace with a runtime folder of its own; everything else is shared.
	holder := node.Start(t, "unshare", "--mount", "--propagation", "private", "sh", "-c",
		"mkdir -p "+runtimeDir+" && mount -t tmpfs tmpfs "+runtimeDir+" && echo mounted && exec sleep infinity")
	Eventually(t, 30*time.Second, "the machine is there", func() error {
		if !strings.Contains(holder.Output(), "mounted") {
			return fmt.Errorf("%s", holder.Output())
		}
		return nil
	})
	host, err := OpenSpace(holder.PID)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(host.Close)
	second := &Mesh{Lab: m.Lab, Host: host, Assay: m.Assay, Data: m.Data + "-" + name, Control: m.Control, agentArgs: args}
	second.join(t)
	second.StartAgent(t)
	t.Cleanup(func() {
		second.awaitRemovals(t)
		if code, willingly := second.Agent.Stop(15 * time.Second); code != 0 || !willingly {
			t.Errorf("assay agent on %s: asked to end: exit code %d, by itself: %v", name, code, willingly)
		}
	})
	return second
}
