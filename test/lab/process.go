package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Result is what a program that ended has left.
type Result struct {
	Stdout, Stderr string
	Code           int
	Took           time.Duration
}

// Process is a running program.
type Process struct {
	PID  int // as numbered here, outside the lab
	cmd  *exec.Cmd
	name string
	out  *tail
	in   interface{ Close() error }
	done chan struct{}
	code int
}

// Start starts a program in the space with its own process group. Its output is
// kept (the last 256 KiB) and shown when the test fails; the test's end kills it.
func (s *Space) Start(t TB, argv ...string) *Process {
	t.Helper()
	p := s.launch(t, argv...)
	t.Cleanup(p.Kill)
	return p
}

// launch is Start for what the lab itself ends.
func (s *Space) launch(t TB, argv ...string) *Process {
	t.Helper()
	p, err := s.start(nil, argv...)
	if err != nil {
		t.Fatalf("start %s: %v", argv[0], err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of the output of %s:\n%s", strings.Join(argv, " "), lastLines(p.Output(), 40))
		}
	})
	return p
}

// lastLines returns at most n lines from the end of s.
func lastLines(s string, n int) string {
	line := strings.SplitAfter(s, "\n")
	return strings.Join(line[max(0, len(line)-n-1):], "")
}

func (s *Space) start(env []string, argv ...string) (*Process, error) {
	path, err := lookProgram(argv[0])
	if err != nil && !strings.HasPrefix(argv[0], root) {
		return nil, err
	}
	if strings.Contains(argv[0], "/") {
		path = argv[0]
	}
	p := &Process{name: argv[0], out: &tail{}, done: make(chan struct{})}
	p.cmd = &exec.Cmd{Path: path, Args: argv, Dir: "/", Env: append(environment(), env...)}
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.cmd.WaitDelay = 2 * time.Second
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := s.inAll(p.cmd.Start); err != nil {
		return nil, err
	}
	p.PID = p.cmd.Process.Pid
	go p.wait()
	return p, nil
}

func environment() []string {
	return []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8", "TMPDIR=/tmp", "TERM=dumb"}
}

func (p *Process) wait() {
	defer close(p.done)
	p.cmd.Wait()
	p.code = p.cmd.ProcessState.ExitCode()
}

// Done is closed when the program has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Ended reports whether the program has ended.
func (p *Process) Ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Code waits for the end and returns the exit code, -1 after a signal.
func (p *Process) Code() int { <-p.done; return p.code }

// Output returns the last of what the program has printed.
func (p *Process) Output() string { return p.out.String() }

// Signal sends sig to the program.
func (p *Process) Signal(sig os.Signal) error { return p.cmd.Process.Signal(sig) }

// Stop asks the program to end and waits, then insists. It returns the exit code
// and whether the program ended by itself.
func (p *Process) Stop(patience time.Duration) (code int, willingly bool) {
	p.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return p.code, true
	case <-time.After(patience):
		// A program in Go says where it hangs.
		p.Signal(syscall.SIGQUIT)
		select {
		case <-p.done:
		case <-time.After(2 * time.Second):
		}
		p.Kill()
		return p.code, false
	}
}

// Kill ends the program and its process group at once and waits.
func (p *Process) Kill() {
	if !p.Ended() {
		syscall.Kill(-p.PID, syscall.SIGKILL)
		p.cmd.Process.Kill()
	}
	<-p.done
	p.in.Close()
}

// Exec runs a program to its end, at most a minute.
func (s *Space) Exec(t TB, argv ...string) Result {
	t.Helper()
	return s.ExecInput(t, "", argv...)
}

// ExecInput is Exec with an input.
func (s *Space) ExecInput(t TB, input string, argv ...string) Result {
	t.Helper()
	r, err := s.run(t.Context(), input, argv...)
	if err != nil {
		t.Fatalf("%s: %v\n%s%s", strings.Join(argv, " "), err, r.Stdout, r.Stderr)
	}
	return r
}

// MustExec is Exec that fails the test unless the program succeeds.
func (s *Space) MustExec(t TB, argv ...string) string {
	t.Helper()
	r := s.Exec(t, argv...)
	if r.Code != 0 {
		t.Fatalf("%s: exit code %d\n%s%s", strings.Join(argv, " "), r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// Try is Exec for conditions: everything but success is an error.
func (s *Space) Try(ctx context.Context, argv ...string) (string, error) {
	r, err := s.run(ctx, "", argv...)
	if err == nil && r.Code != 0 {
		err = fmt.Errorf("exit code %d", r.Code)
	}
	if err != nil {
		return r.Stdout, fmt.Errorf("%s: %w: %s", argv[0], err, strings.TrimSpace(r.Stdout+r.Stderr))
	}
	return r.Stdout, nil
}

func (s *Space) run(ctx context.Context, input string, argv ...string) (Result, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	path, err := lookProgram(argv[0])
	if strings.Contains(argv[0], "/") {
		path, err = argv[0], nil
	}
	if err != nil {
		return Result{}, err
	}
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path)
	cmd.Args, cmd.Dir, cmd.Env = argv, "/", environment()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 2 * time.Second
	began := time.Now()
	if err = s.inAll(cmd.Start); err == nil {
		err = cmd.Wait()
	}
	r := Result{Stdout: stdout.String(), Stderr: stderr.String(), Took: time.Since(began)}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		r.Code, err = exit.ExitCode(), nil
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("ended after %s: %w", r.Took.Round(time.Millisecond), ctx.Err())
	}
	return r, err
}

// tail keeps the last of what is written to it.
type tail struct {
	mu  sync.Mutex
	buf []byte
	cut bool
}

const tailSize = 256 << 10

func (b *tail) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buf = append(b.buf, p...)
	if over := len(b.buf) - tailSize; over > 0 {
		b.buf = append(b.buf[:0], b.buf[over:]...)
		b.cut = true
	}
	return len(p), nil
}

func (b *tail) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cut {
		return "…" + string(b.buf)
	}
	return string(b.buf)
}
