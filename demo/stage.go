package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"assay.dev"
)

// Stage is where a bank is played: one network namespace, one folder.
type Stage struct {
	Assay   string       // binary of the mesh
	Bank    string       // binary of the bank
	Proxy   string       // binary of the data plane; "" is the one beside Assay
	Dir     string       // an empty folder; who made it removes it
	Page    net.Listener // outside the namespace: relayed to the web front; may be nil
	Metrics *os.File     // a listening socket outside the namespace for Prometheus; may be nil
	Rate    float64      // requests per second of the load generator

	up       *process
	members  []*process
	operator *operator
}

// Paths that a person may want to know.
func (s *Stage) runtime() string       { return filepath.Join(s.Dir, "run") }
func (s *Stage) ControlSocket() string { return filepath.Join(s.runtime(), "control.sock") }

// grace is how long a process may take to end.
const grace = 10 * time.Second

// raise starts the mesh: `assay up`. It returns once control and agent are ready.
func (s *Stage) raise(ctx context.Context) (time.Duration, error) {
	// Proxies are users of their own and have to find the agent's socket.
	for dir, mode := range map[string]os.FileMode{"": 0o711, "run": 0o755, "data": 0o700, "log": 0o700, "config": 0o700} {
		path := filepath.Join(s.Dir, dir)
		if err := errors.Join(os.MkdirAll(path, mode), os.Chmod(path, mode)); err != nil {
			return 0, err
		}
	}
	if err := os.WriteFile(filepath.Join(s.Dir, "config", "mesh.yaml"), []byte(manifest), 0o600); err != nil {
		return 0, err
	}
	// `assay up` tells readiness as any service of systemd does (sd_notify).
	path := filepath.Join(s.Dir, "notify.sock")
	os.Remove(path) // a former act's
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return 0, err
	}
	defer notify.Close()
	l := launch{name: "up", path: s.Assay, args: s.upArgs(), env: []string{"NOTIFY_SOCKET=" + path}}
	if s.Metrics != nil {
		l.files = []*os.File{s.Metrics}
	}
	begun := time.Now()
	if s.up, err = s.start(l); err != nil {
		return 0, err
	}
	if err := s.awaitReady(ctx, notify); err != nil {
		return 0, err
	}
	took := time.Since(begun)
	if s.operator == nil {
		s.operator, err = dialOperator(s.ControlSocket())
	}
	return took, err
}

func (s *Stage) upArgs() []string {
	args := []string{"up", "--data", filepath.Join(s.Dir, "data"), "--runtime", s.runtime(), "--config", filepath.Join(s.Dir, "config")}
	if s.Metrics != nil {
		args = append(args, "--metrics", "fd:3")
	}
	if s.Proxy != "" {
		args = append(args, "--proxy", s.Proxy)
	}
	return args
}

// awaitReady returns when READY=1 has come, or `assay up` has ended.
func (s *Stage) awaitReady(ctx context.Context, notify *net.UnixConn) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("assay up is not ready after 30 s"))
	defer cancel()
	result := make(chan error, 1)
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := notify.Read(b)
			if err != nil || saysReady(b[:n]) {
				result <- err
				return
			}
		}
	}()
	var err error
	select {
	case err = <-result:
		return err
	case <-ctx.Done():
		err = fmt.Errorf("%w: %s", context.Cause(ctx), s.up.tail())
	case <-s.up.done:
		err = s.up.failure()
	}
	notify.SetReadDeadline(time.Unix(1, 0)) // ends the reader
	<-result
	return err
}

// saysReady looks for READY=1 in a message of sd_notify(3).
func saysReady(msg []byte) bool {
	for line := range strings.SplitSeq(string(msg), "\n") {
		if line == "READY=1" {
			return true
		}
	}
	return false
}

// enter starts a command as a mesh workload.
func (s *Stage) enter(as string, keep bool, args ...string) (*process, error) {
	return s.launch(launch{name: as, keep: keep, args: args})
}

// launch is enter for who wants more.
func (s *Stage) launch(l launch) (*process, error) {
	l.path, l.env = s.Assay, s.env()
	p, err := s.start(l)
	if err == nil {
		s.members = append(s.members, p)
	}
	return p, err
}

// env leads `assay run` to this stage's agent.
func (s *Stage) env() []string { return []string{"ASSAY_RUNTIME=" + s.runtime()} }

// enterCast starts the bank.
func (s *Stage) enterCast() error {
	for i := range cast {
		m := &cast[i]
		for n := range m.replicas {
			as := m.name
			if m.replicas > 1 {
				as = fmt.Sprintf("%s-%d", m.name, n+1)
			}
			if _, err := s.enter(as, false, m.runArgs(s.Bank)...); err != nil {
				return err
			}
		}
	}
	return nil
}

// client returns the arguments of a workload that only calls others.
func (s *Stage) client(n name, args ...string) []string {
	return (&member{namespace: n.namespace, name: n.account, args: args}).runArgs(s.Bank)
}

// failed returns how the first process ended that should live. What has a result may
// end.
func failed(list []*process) error {
	for _, p := range list {
		if p.output == nil && p.ended() {
			return p.failure()
		}
	}
	return nil
}

// strike ends everything: the workloads first, then the mesh.
func (s *Stage) strike() error {
	err := stopAll(s.members, grace)
	s.members = nil
	if s.up != nil {
		err = errors.Join(err, s.up.stop(grace))
		s.up = nil
	}
	if s.operator != nil {
		s.operator.close()
		s.operator = nil
	}
	return err
}

// Live plays the bank with an endless, bounded load until ctx ends, and shows it.
func (s *Stage) Live(ctx context.Context, v *View) (err error) {
	defer func() { err = errors.Join(err, s.strike()) }()
	if _, err := s.raise(ctx); err != nil {
		return err
	}
	if err := s.enterCast(); err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the relay before it is waited for
	open := false
	if v.Terminal {
		io.WriteString(v.Out, clearScreen)
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		if err := failed(append([]*process{s.up}, s.members...)); err != nil && ctx.Err() == nil {
			return err
		}
		now, err := s.operator.sample(ctx)
		if err != nil {
			now = v.before
			now.at, now.note = time.Now(), "control does not answer: "+err.Error()
		}
		if ctx.Err() != nil {
			return nil
		}
		if !open && ready(now.workloads) == castSize() {
			open = true
			if err := s.openDoors(ctx, &wg); err != nil {
				return err
			}
		}
		if err := v.Show(now); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// openDoors lets clients in, once everybody is there: the load generator, and whoever
// looks at the page.
func (s *Stage) openDoors(ctx context.Context, wg *sync.WaitGroup) error {
	if _, err := s.enter("load", false, s.client(load, "load", "--duration", "0", "--rate", fmt.Sprint(s.Rate))...); err != nil {
		return err
	}
	if s.Page != nil {
		wg.Go(func() {
			defer context.AfterFunc(ctx, func() { s.Page.Close() })()
			s.relay(ctx, wg)
		})
	}
	return nil
}

// ready counts the workloads that accept connections on the port that they declared.
func ready(list []assay.Workload) (n int) {
	for _, w := range list {
		if !w.MeshedSince.IsZero() && len(w.Ports) == 1 && slices.Contains(w.Listening, w.Ports[0]) {
			n++
		}
	}
	return n
}

// castSize is how many workloads the bank has.
func castSize() (n int) {
	for _, m := range cast {
		n += m.replicas
	}
	return n
}

// relay leads connections from the page's listener, which is outside our network
// namespace, to the web front, as somebody outside the mesh.
func (s *Stage) relay(ctx context.Context, wg *sync.WaitGroup) {
	for {
		conn, err := s.Page.Accept()
		if err != nil {
			return // closed: the end of Live
		}
		wg.Go(func() { s.relayOne(ctx, conn) })
	}
}

func (s *Stage) relayOne(ctx context.Context, outside net.Conn) {
	defer outside.Close()
	target, err := s.address(ctx, web)
	if err != nil {
		return
	}
	inside, err := new(net.Dialer).DialContext(ctx, "tcp", target.String())
	if err != nil {
		return
	}
	defer inside.Close()
	stop := context.AfterFunc(ctx, func() { outside.Close(); inside.Close() })
	defer stop()
	up := make(chan struct{})
	go func() {
		defer close(up)
		copyHalf(inside, outside)
	}()
	copyHalf(outside, inside)
	<-up
}

// copyHalf passes one direction on, its end too.
func copyHalf(to, from net.Conn) {
	io.Copy(to, from) // an error is the end of the connection
	if t, ok := to.(interface{ CloseWrite() error }); ok {
		t.CloseWrite()
	}
}

// address is where a service's first meshed workload listens.
func (s *Stage) address(ctx context.Context, n name) (netip.AddrPort, error) {
	all, err := list[assay.Workload](ctx, s.operator, "workloads")
	if err != nil {
		return netip.AddrPort{}, err
	}
	for _, w := range all {
		if nameOf(w.Identity) == n && !w.MeshedSince.IsZero() && len(w.Addrs) > 0 && len(w.Ports) > 0 {
			return netip.AddrPortFrom(w.Addrs[0], w.Ports[0]), nil
		}
	}
	return netip.AddrPort{}, fmt.Errorf("%s is not there", n)
}
