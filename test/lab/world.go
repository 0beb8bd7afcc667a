package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Mode is how a scenario's hosts are joined.
type Mode string

const (
	Direct Mode = "direct" // plain hosts on the uplink
	Meshed Mode = "meshed" // workloads of `assay up`
)

// World runs a scenario's hosts in one of the modes.
type World struct {
	*Lab
	Mode Mode
	Mesh *Mesh // nil in direct mode
}

// NewWorld makes a lab, and in meshed mode starts `assay up` in it. At the end of
// the test `assay up` must end cleanly and leave nothing behind.
func NewWorld(t TB, mode Mode, args ...string) *World {
	t.Helper()
	w := &World{Lab: New(t), Mode: mode}
	if mode == Direct {
		// A router's answers for what is beyond it; a mesh's host routes by itself.
		w.MustExec(t, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding")
		return w
	}
	w.Mesh = w.StartMesh(t, args...)
	t.Cleanup(func() { w.Mesh.Finish(t) })
	return w
}

// Modes runs a scenario as two subtests, one in each mode.
func Modes(t *testing.T, scenario func(t *testing.T, w *World)) {
	for _, mode := range []Mode{Direct, Meshed} {
		t.Run(string(mode), func(t *testing.T) { scenario(t, NewWorld(t, mode)) })
	}
}

// Finish stops `assay up` and fails the test when anything is left but its data.
func (m *Mesh) Finish(t TB) {
	t.Helper()
	if m.Agent != nil && !m.Agent.Ended() {
		m.awaitRemovals(t)
	}
	for _, p := range []*Process{m.Agent, m.Control} {
		if p == nil || p.Ended() && p == m.Up {
			continue
		}
		if code, willingly := p.Stop(8 * time.Second); code != 0 || !willingly {
			t.Errorf("%s: asked to end: exit code %d, by itself: %v\n%s", strings.Join(p.cmd.Args, " "), code, willingly, p.Output())
		}
	}
	m.ExpectNoLeaks(t)
}

// ExpectNoLeaks fails the test when anything of the mesh is left but its data.
func (m *Mesh) ExpectNoLeaks(t TB) {
	t.Helper()
	err := WaitFor(context.WithoutCancel(t.Context()), 5*time.Second, func() error {
		left, err := m.Leaks()
		var list []error
		for _, line := range left {
			if m.accounts(line) {
				list = append(list, errors.New(line))
			}
		}
		return errors.Join(err, errors.Join(list...))
	})
	if err != nil {
		t.Errorf("left behind:\n%v", err)
	}
}

// accounts reports whether what is left is the mesh's fault. Its data stays, and the
// lock in the runtime folder, which cannot be removed without a race; other files are
// those of the programs that a scenario ran.
func (m *Mesh) accounts(line string) bool {
	if m.Up == nil && !strings.HasPrefix(line, "process ") && !strings.HasPrefix(line, "mount ") {
		// An agent leaves the bridge with its rules and routes to the next one.
		return strings.HasPrefix(line, "ip -o link") && !strings.Contains(line, " assay0: ")
	}
	file, ok := strings.CutPrefix(line, "file ")
	switch file {
	case runtimeDir, runtimeDir + "/up.lock", runtimeDir + "/workloads":
		return false
	}
	return !ok || strings.HasPrefix(file, runtimeDir) || strings.Contains(file, "assay") && !strings.HasPrefix(file, m.Data)
}

// Workload starts a host with its command; nil waits for ever. The host has its
// name in DNS in both modes.
func (w *World) Workload(t TB, name string, spec Spec) *Workload {
	t.Helper()
	if w.Mode == Meshed {
		return w.Mesh.Run(t, name, spec)
	}
	n := w.Node(t, name)
	if spec.Command == nil {
		spec.Command = []string{"sleep", "infinity"}
	}
	p := n.Start(t, spec.Command...)
	return &Workload{Space: n.Space, Name: name, Main: p, PID: p.PID, IPv4: n.IPv4, IPv6: n.IPv6}
}

// Addrs returns both addresses of the host.
func (w *Workload) Addrs() []netip.Addr { return []netip.Addr{w.IPv4, w.IPv6} }

// Resolve asks the host's own resolver, as programs on it do.
func (w *Workload) Resolve(t TB, name string) []netip.Addr {
	t.Helper()
	var addrs []netip.Addr
	for _, family := range []string{"ahostsv4", "ahostsv6"} {
		r := w.Exec(t, "getent", family, name)
		for line := range strings.Lines(r.Stdout) {
			f := strings.Fields(line)
			if len(f) < 2 || f[1] != "STREAM" {
				continue
			}
			if a, err := netip.ParseAddr(f[0]); err == nil && (family == "ahostsv4" || a.Is6() && !a.Is4In6()) {
				addrs = append(addrs, a)
			}
		}
	}
	return addrs
}

// Target returns the addresses that the host finds for a service, IPv4 first.
func (w *Workload) Target(t TB, service string, port int) netip.AddrPort {
	t.Helper()
	addrs := w.Resolve(t, service)
	if len(addrs) == 0 {
		t.Fatalf("%s cannot resolve %s", w.Name, service)
	}
	return netip.AddrPortFrom(addrs[0], uint16(port))
}

// Dial connects from the host.
func (s *Space) Dial(to netip.AddrPort) (*net.TCPConn, error) {
	var c net.Conn
	err := s.In(func() (err error) {
		d := net.Dialer{Timeout: 10 * time.Second, FallbackDelay: -1}
		c, err = d.Dial("tcp", to.String())
		return err
	})
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// MustDial is Dial that fails the test; the test's end closes the connection.
func (s *Space) MustDial(t TB, to netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := s.Dial(to)
	if err != nil {
		t.Fatalf("connect to %s: %v", to, err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// Listen listens on the host, on IPv4 and IPv6.
func (s *Space) Listen(t TB, port int) *net.TCPListener {
	t.Helper()
	var l net.Listener
	err := s.In(func() (err error) {
		var cfg net.ListenConfig
		cfg.SetMultipathTCP(false)
		l, err = cfg.Listen(context.Background(), "tcp", net.JoinHostPort("", strconv.Itoa(port)))
		return err
	})
	if err != nil {
		t.Fatalf("listen: %v", err)
	}
	t.Cleanup(func() { l.Close() })
	return l.(*net.TCPListener)
}

// Serve runs handle for each connection to a port of the host until the test
// ends, which closes all of them.
func (s *Space) Serve(t TB, port int, handle func(c *net.TCPConn)) {
	t.Helper()
	l := s.Listen(t, port)
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	t.Cleanup(func() { stop(); l.Close(); <-done })
	go func() {
		defer close(done)
		serve(ctx, l, handle)
	}()
}

func serve(ctx context.Context, l *net.TCPListener, handle func(c *net.TCPConn)) {
	handlers := make(chan struct{}, 4096)
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			break
		}
		handlers <- struct{}{}
		undo := context.AfterFunc(ctx, func() { c.Close() })
		go func() {
			defer func() { undo(); c.Close(); <-handlers }()
			handle(c)
		}()
	}
	for range cap(handlers) {
		handlers <- struct{}{}
	}
}

// AwaitService waits until the client can connect to a service's port.
func (w *World) AwaitService(t TB, client *Workload, service string, port int) netip.AddrPort {
	t.Helper()
	var to netip.AddrPort
	Eventually(t, 20*time.Second, fmt.Sprintf("%s reaches %s:%d", client.Name, service, port), func() error {
		if addrs := client.Resolve(t, service); len(addrs) == 0 {
			return fmt.Errorf("no address for %s", service)
		} else {
			to = netip.AddrPortFrom(addrs[0], uint16(port))
		}
		c, err := client.Dial(to)
		if err == nil {
			c.Close()
		}
		return err
	})
	return to
}
