package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const trustDomain = "cluster.local"

// controlProcess is `assay control`, as installed.
type controlProcess struct {
	program, dir, address string
	env                   []string
	cmd                   *exec.Cmd
	log                   *os.File
	out                   sync.WaitGroup

	mu       sync.Mutex
	live     float64 // bytes of heap in use after the last collection
	liveMost float64
	ready    chan struct{}
	over     chan struct{}
}

func newControlProcess(program, dir, kubeconfig string, env []string) (*controlProcess, error) {
	if err := os.WriteFile(filepath.Join(dir, "kubeconfig"), []byte(kubeconfig), 0o600); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer l.Close()
	log, err := os.Create(filepath.Join(dir, "control.log"))
	return &controlProcess{program: program, dir: dir, address: l.Addr().String(), env: env, log: log}, err
}

// start starts it and waits until it listens.
func (p *controlProcess) start(ctx context.Context) error {
	p.cmd = exec.Command(p.program, "control", "--kubernetes", "--kubeconfig", filepath.Join(p.dir, "kubeconfig"), "--data", filepath.Join(p.dir, "data"),
		"--socket", filepath.Join(p.dir, "control.sock"), "--listen", p.address, "--trust-domain", trustDomain, "--namespace", meshNamespace)
	// The runtime tells of each collection what is in use after it.
	p.cmd.Env = append(append(os.Environ(), "GODEBUG=gctrace=1"), p.env...)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := p.cmd.Start(); err != nil {
		return err
	}
	p.ready, p.over = make(chan struct{}), make(chan struct{})
	p.out.Go(func() { p.read(stderr, p.ready, p.over) })
	select {
	case <-p.ready:
		return nil
	case <-p.over:
		return errors.Join(fmt.Errorf("control ended; see %s", p.log.Name()), p.cmd.Wait())
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// gctrace is what package runtime documents of GODEBUG=gctrace=1: the heap at the beginning
// and the end of a collection, and what of it is live.
var gctrace = regexp.MustCompile(`^gc \d+ .* \d+->\d+->(\d+) MB, `)

func (p *controlProcess) read(r io.Reader, ready, over chan struct{}) {
	defer close(over)
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, 1<<20)
	for said := false; lines.Scan(); {
		line := lines.Text()
		if m := gctrace.FindStringSubmatch(line); m != nil {
			mb, _ := strconv.ParseFloat(m[1], 64)
			p.mu.Lock()
			p.live = mb * (1 << 20)
			p.liveMost = max(p.liveMost, p.live)
			p.mu.Unlock()
			continue
		}
		fmt.Fprintln(p.log, line)
		if !said && strings.Contains(line, "control is ready") {
			said = true
			close(ready)
		}
	}
}

// stop ends it as a rollout does.
func (p *controlProcess) stop() error {
	if p.cmd == nil || p.cmd.Process == nil {
		return nil
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	kill := time.AfterFunc(20*time.Second, func() { p.cmd.Process.Kill() })
	defer kill.Stop()
	p.out.Wait()
	err := p.cmd.Wait()
	p.cmd = nil
	return err
}

// usage is what the process has used and uses.
type usage struct {
	at        time.Time
	cpu       time.Duration // user and system, since it began
	rss, peak int64         // bytes; the peak since resetPeak
	live      float64       // bytes of heap in use
	received  int64         // bytes by all hosts
	watched   int           // bytes from the API server
}

func (p *controlProcess) usage() (usage, error) {
	u, err := usageOf(p.cmd.Process.Pid)
	p.mu.Lock()
	u.live = p.live
	p.mu.Unlock()
	return u, err
}

// usageOf reads what the kernel knows of a process.
func usageOf(pid int) (u usage, err error) {
	u.at = time.Now()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return u, err
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	f := strings.Fields(rest)
	if len(f) < 13 {
		return u, fmt.Errorf("/proc/PID/stat: %q", stat)
	}
	for _, ticks := range f[11:13] { // proc(5): utime, stime, in hundredths of a second on every architecture of today
		n, err := strconv.ParseInt(ticks, 10, 64)
		if err != nil {
			return u, err
		}
		u.cpu += time.Duration(n) * 10 * time.Millisecond
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return u, err
	}
	for line := range strings.Lines(string(status)) {
		name, value, _ := strings.Cut(line, ":")
		kb, _ := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		switch name {
		case "VmRSS":
			u.rss = kb << 10
		case "VmHWM":
			u.peak = kb << 10
		}
	}
	return u, nil
}

// resetPeak has the peak of memory begin anew (proc(5), clear_refs).
func (p *controlProcess) resetPeak() error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", p.cmd.Process.Pid), []byte("5"), 0)
}
