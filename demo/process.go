package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// process is a program that runs until it ends or is told to.
type process struct {
	name   string
	log    string // file with what it wrote to standard error, and to standard output if nobody reads that
	cmd    *exec.Cmd
	done   chan struct{} // closed when it has ended
	err    error         // how; valid after done
	output *os.File      // standard output, when it is kept apart
}

// launch describes a process.
type launch struct {
	name  string
	path  string
	args  []string
	env   []string // besides ours
	files []*os.File
	input *os.File // standard input; nil: nothing
	keep  bool     // keep standard output apart, for process.result
}

// start runs a program in a process group of its own, so that Ctrl-C reaches only
// us, who end the processes in order.
func (s *Stage) start(l launch) (*process, error) {
	p := &process{name: l.name, log: filepath.Join(s.Dir, "log", l.name+".log"), done: make(chan struct{})}
	file, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", l.name, err)
	}
	defer file.Close() // the child has its own
	cmd := exec.Command(l.path, l.args...)
	cmd.Stdout, cmd.Stderr = file, file
	if l.keep {
		if p.output, err = os.CreateTemp(s.Dir, l.name+"-*.out"); err != nil {
			return nil, fmt.Errorf("start %s: %w", l.name, err)
		}
		cmd.Stdout = p.output
	}
	if l.input != nil {
		cmd.Stdin = l.input
	}
	cmd.Env = append(os.Environ(), l.env...)
	cmd.ExtraFiles = l.files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", l.name, err)
	}
	p.cmd = cmd
	go p.wait()
	return p, nil
}

func (p *process) wait() {
	p.err = p.cmd.Wait()
	close(p.done)
}

// ended reports whether the process is gone.
func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// failure says how a process ended that should not have, with the end of its log.
func (p *process) failure() error {
	<-p.done
	how := "ended"
	if p.err != nil {
		how = p.err.Error()
	}
	return fmt.Errorf("%s: %s: %s", p.name, how, p.tail())
}

// tail is the end of the log in one line.
func (p *process) tail() string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-3):], " | ")
}

// result waits for the process and returns its standard output.
func (p *process) result(ctx context.Context) ([]byte, error) {
	select {
	case <-p.done:
	case <-ctx.Done():
		return nil, fmt.Errorf("%s: %w", p.name, context.Cause(ctx))
	}
	b, err := os.ReadFile(p.output.Name())
	if err != nil {
		return nil, err
	}
	if p.err != nil {
		return b, p.failure()
	}
	return b, nil
}

// stop ends a process: SIGTERM, and SIGKILL when it takes longer than grace.
func (p *process) stop(grace time.Duration) error {
	if p.output != nil {
		defer p.output.Close()
	}
	if !p.ended() {
		p.cmd.Process.Signal(syscall.SIGTERM)
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(grace):
	}
	p.cmd.Process.Kill()
	<-p.done
	return fmt.Errorf("%s did not end within %s of SIGTERM and was killed: %s", p.name, grace, p.tail())
}

// stopAll ends processes together and waits for them.
func stopAll(list []*process, grace time.Duration) error {
	results := make(chan error, len(list))
	for _, p := range list {
		go func() { results <- p.stop(grace) }()
	}
	var err error
	for range list {
		err = errors.Join(err, <-results)
	}
	return err
}

// Tails writes the end of every log, for who has to find out what went wrong.
func (s *Stage) Tails(w io.Writer) {
	logs, _ := filepath.Glob(filepath.Join(s.Dir, "log", "*.log")) // the pattern is valid
	for _, path := range logs {
		p := process{log: path}
		if t := p.tail(); t != "" {
			fmt.Fprintf(w, "  %s: %s\n", strings.TrimSuffix(filepath.Base(path), ".log"), t)
		}
	}
}
