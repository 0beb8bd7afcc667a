package kubernetes

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"assay.dev/agent/netns"
	"assay.dev/test/lab"
)

// Machine is one machine of a cluster. Its Space runs programs in it as on any
// host of the lab, although outside of the machine's cgroup.
type Machine struct {
	*lab.Space
	Name string
	IPv4 netip.Addr
	IPv6 netip.Addr
	Pods []netip.Prefix // the addresses of its pods; none on the control plane

	dir    string
	init   *exec.Cmd
	life   io.Closer // process 1 ends when this closes
	group  *cgroup
	birth  *os.File   // the version 2 group that programs are born in; nil without version 2
	spaces []*os.File // in the order in which they are entered

	mu       sync.Mutex
	programs map[string]*program
}

// kinds are the namespaces of a machine, the mount namespace last: after it, paths
// are the machine's.
var kinds = []struct {
	name string
	flag int
}{
	{"cgroup", unix.CLONE_NEWCGROUP}, {"uts", unix.CLONE_NEWUTS}, {"ipc", unix.CLONE_NEWIPC},
	{"net", unix.CLONE_NEWNET}, {"pid", unix.CLONE_NEWPID}, {"mnt", unix.CLONE_NEWNS},
}

// boot starts the machine's process 1, which makes everything that the machine sees.
func (m *Machine) boot(s seat) error {
	if err := os.MkdirAll(m.dir, 0o755); err != nil {
		return err
	}
	spec, err := json.Marshal(s)
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", "machine", m.Name)
	cmd.Env = []string{initEnv + "=" + string(spec), "GOMAXPROCS=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Setpgid:    true, // a terminal's Ctrl-C is for whoever made the cluster
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	m.init, m.life = cmd, in
	if m.birth, err = m.group.open(); err != nil {
		return err
	}
	if err := netns.OnThread(func() error {
		if err := m.group.enter(); err != nil {
			return err
		}
		return m.launch(cmd)
	}); err != nil {
		m.init = nil
		return fmt.Errorf("machine %s: %w", m.Name, err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	if line != "ready\n" {
		return fmt.Errorf("machine %s: %s", m.Name, strings.TrimSpace(line))
	}
	if m.birth != nil { // process 1 has moved on, and others follow it
		m.birth.Close()
		if m.birth, err = m.group.open(); err != nil {
			return err
		}
	}
	for _, k := range kinds {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", cmd.Process.Pid, k.name))
		if err != nil {
			return err
		}
		m.spaces = append(m.spaces, f)
	}
	m.Space, err = lab.OpenSpace(cmd.Process.Pid)
	return err
}

// launch starts a program so that it is born in the machine's cgroup.
func (m *Machine) launch(cmd *exec.Cmd) error {
	if m.birth != nil {
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(m.birth.Fd())
	}
	return cmd.Start()
}

// shutDown ends everything in the machine at once, as pulling its plug does.
func (m *Machine) shutDown() {
	if m.init == nil {
		return
	}
	m.mu.Lock()
	running := m.programs
	m.programs = nil
	m.mu.Unlock()
	for _, p := range running {
		close(p.stop)
	}
	m.life.Close()
	ended := time.AfterFunc(5*time.Second, func() { m.init.Process.Kill() })
	m.init.Wait()
	ended.Stop()
	m.init = nil
	for _, p := range running {
		<-p.done
	}
	for _, f := range m.spaces {
		f.Close()
	}
	m.spaces = nil
	if m.birth != nil {
		m.birth.Close()
	}
	if m.Space != nil {
		m.Space.Close()
	}
}

// inside runs fn on a thread whose children are born in the machine.
func (m *Machine) inside(fn func() error) error {
	return netns.OnThread(func() error {
		if err := m.group.enter(); err != nil {
			return err
		}
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		for i, k := range kinds {
			if err := unix.Setns(int(m.spaces[i].Fd()), k.flag); err != nil {
				return fmt.Errorf("enter the %s namespace of %s: %w", k.name, m.Name, err)
			}
		}
		return fn()
	})
}

// Path is where this process sees a path of the machine.
func (m *Machine) Path(inside string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", m.init.Process.Pid), inside)
}

// write makes a file in the machine.
func (m *Machine) write(inside, text string, mode os.FileMode) error {
	file := m.Path(inside)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, []byte(text), mode)
}

// program is one of the cluster's own programs on a machine. Like systemd, the
// machine starts it again when it ends by itself: a kubelet, for one, ends when it
// finds no containerd.
type program struct {
	machine *Machine
	argv    []string
	before  func() error
	log     string
	stop    chan struct{} // closed when its end is wanted
	done    chan struct{}

	mu   sync.Mutex
	cmd  *exec.Cmd
	ends int   // by itself
	last error // of the last end
}

const (
	pause    = time.Second // before a program that has ended is started again
	patience = 20          // how many ends are too many
)

// launch starts the program once.
func (p *program) launch() error {
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := &exec.Cmd{Path: p.argv[0], Args: p.argv, Dir: "/", Stdout: log, Stderr: log, Env: environment}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = p.machine.inside(func() error {
		if p.before != nil {
			if err := p.before(); err != nil {
				return err
			}
		}
		return p.machine.launch(cmd)
	})
	if err != nil {
		return fmt.Errorf("start %s on %s: %w", filepath.Base(p.argv[0]), p.machine.Name, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cmd = cmd
	return nil
}

// keep waits for the program's ends until one is wanted.
func (p *program) keep() {
	defer close(p.done)
	for {
		err := p.cmd.Wait()
		again := time.NewTimer(pause)
		select {
		case <-p.stop:
			again.Stop()
			return
		case <-again.C:
		}
		p.mu.Lock()
		p.ends++
		p.last = err
		p.mu.Unlock()
		if err := p.launch(); err != nil {
			p.mu.Lock()
			p.ends, p.last = patience, err
			p.mu.Unlock()
			<-p.stop
			return
		}
	}
}

// end asks the program to end, insists after a while, and waits.
func (p *program) end() {
	close(p.stop)
	signal := func(s os.Signal) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.cmd.Process.Signal(s)
	}
	signal(syscall.SIGTERM)
	tick := time.NewTicker(5 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-p.done:
			return
		case <-tick.C:
			signal(syscall.SIGKILL)
		}
	}
}

// start starts one of the cluster's programs. before, if there is one, runs where
// the program will, and its mounts are not seen by the machine's other programs.
func (m *Machine) start(before func() error, argv ...string) error {
	name := filepath.Base(argv[0])
	p := &program{
		machine: m, argv: argv, before: before, log: filepath.Join(m.dir, name+".log"),
		stop: make(chan struct{}), done: make(chan struct{}),
	}
	if err := p.launch(); err != nil {
		return err
	}
	go p.keep()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.programs == nil {
		m.programs = map[string]*program{}
	}
	m.programs[name] = p
	return nil
}

var environment = []string{"PATH=" + partsDir + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8"}

// run runs a program in the machine to its end and returns what it printed.
func (m *Machine) run(ctx context.Context, argv ...string) (string, error) {
	cmd := exec.CommandContext(ctx, argv[0])
	cmd.Args, cmd.Dir, cmd.Env = argv, "/", environment
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 2 * time.Second
	err := m.inside(func() error { return m.launch(cmd) })
	if err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return out.String(), fmt.Errorf("%s on %s: %w: %s", argv[0], m.Name, err, strings.TrimSpace(out.String()))
	}
	return out.String(), nil
}

// Stop ends one of the machine's programs (kubelet, containerd, kube-proxy, etcd,
// kube-apiserver …) and waits for it.
func (m *Machine) Stop(name string) error {
	m.mu.Lock()
	p := m.programs[name]
	delete(m.programs, name)
	m.mu.Unlock()
	if p == nil {
		return fmt.Errorf("stop %s on %s: it does not run", name, m.Name)
	}
	p.end()
	return nil
}

// ended returns an error for a program that ends again and again, with its last words.
func (m *Machine) ended() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	var errs error
	for name, p := range m.programs {
		p.mu.Lock()
		if p.ends >= patience {
			errs = errors.Join(errs, fmt.Errorf("%s on %s ends whenever it is started: %v\n%s", name, m.Name, p.last, lastLines(p.log, 15)))
		}
		p.mu.Unlock()
	}
	return errs
}

// lastLines reads the end of a log.
func lastLines(file string, n int) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	lines := strings.SplitAfter(string(text), "\n")
	lines = lines[max(0, len(lines)-n-1):]
	for i, line := range lines {
		if len(line) > 250 {
			lines[i] = line[:250] + "…\n"
		}
	}
	return strings.Join(lines, "")
}
