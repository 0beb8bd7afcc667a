package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// TB is what the lab needs of a test. *testing.T and *testing.B have it, and so
// has the benchmark command.
type TB interface {
	Helper()
	Name() string
	Context() context.Context
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Skipf(format string, args ...any)
	Failed() bool
	Cleanup(func())
}

// Main is a suite's TestMain: it becomes a lab's process 1 when it was started as
// one, else it runs the suite and removes what was built for it.
func Main(m interface{ Run() int }) {
	Init()
	if signal.Ignored(syscall.SIGHUP) { // by nohup: what is ignored here would be ignored by every program of a lab
		signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	}
	code := m.Run()
	RemoveBuilds()
	os.Exit(code)
}

// EndToEnd is the variable that must be "1" for suites of tests to use labs: they
// take minutes. `make test` sets it.
const EndToEnd = "ASSAY_E2E"

// Require skips the test, with what is missing, when the lab cannot be made here
// or a program is not installed.
func Require(t TB, programs ...string) {
	t.Helper()
	if os.Getenv(EndToEnd) != "1" {
		t.Skipf("skipped: an end-to-end test; set %s=1 (make test does)", EndToEnd)
	}
	if os.Geteuid() != 0 {
		t.Skipf("skipped: needs root, to make network namespaces")
	}
	for _, p := range programs {
		if _, err := lookProgram(p); err != nil {
			t.Skipf("skipped: needs %s, which is not installed", p)
		}
	}
}

// lookProgram finds a program where Debian puts those for root too.
func lookProgram(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if st, err := os.Stat(filepath.Join(dir, name)); err == nil && st.Mode()&0o111 != 0 {
			return filepath.Join(dir, name), nil
		}
	}
	return "", exec.ErrNotFound
}

// Builds are made once for each process that uses the lab.
var builds struct {
	sync.Mutex
	dir  string
	done map[string]error
}

// buildDir returns the folder that holds what was built; every lab sees it,
// read-only, as BinDir.
func buildDir() (string, error) {
	builds.Lock()
	defer builds.Unlock()
	if builds.dir == "" {
		dir, err := os.MkdirTemp("", "assay-lab-")
		if err != nil {
			return "", err
		}
		if err := os.Chmod(dir, 0o755); err != nil {
			return "", err
		}
		builds.dir = dir
		builds.done = map[string]error{}
	}
	return builds.dir, nil
}

// Build compiles the command in the package pkg, once, and returns its path
// inside every lab.
func Build(pkg string) (string, error) {
	_, err := BuildHere(pkg)
	return filepath.Join(BinDir, filepath.Base(pkg)), err
}

// BuildHere is Build that returns the path outside of labs.
func BuildHere(pkg string) (string, error) {
	dir, err := buildDir()
	if err != nil {
		return "", err
	}
	name := filepath.Base(pkg)
	builds.Lock()
	defer builds.Unlock()
	err, ok := builds.done[pkg]
	if !ok {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", filepath.Join(dir, name), pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // the proxy's sandbox is whole only without C's threads
		out, runErr := cmd.CombinedOutput()
		if runErr != nil {
			err = fmt.Errorf("go build %s: %w\n%s", pkg, runErr, out)
		}
		builds.done[pkg] = err
	}
	return filepath.Join(dir, name), err
}

// BuildAssay compiles both commands and returns the path of `assay`.
func BuildAssay() (string, error) {
	p, err := Build("assay.dev/cmd/assay")
	_, err2 := Build("assay.dev/cmd/assay-proxy")
	return p, errors.Join(err, err2)
}

// RemoveBuilds removes what Build made.
func RemoveBuilds() {
	builds.Lock()
	defer builds.Unlock()
	if builds.dir != "" {
		os.RemoveAll(builds.dir)
		builds.dir, builds.done = "", nil
	}
}

// Eventually tries until ok returns nil, and fails the test with the last error
// after the time is over.
func Eventually(t TB, within time.Duration, what string, ok func() error) {
	t.Helper()
	if err := WaitFor(t.Context(), within, ok); err != nil {
		t.Fatalf("%s: not within %s: %v", what, within, err)
	}
}

// WaitFor tries every few milliseconds until ok returns nil, and returns the last
// error after the time is over.
func WaitFor(ctx context.Context, within time.Duration, ok func() error) error {
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ok()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			return err
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}
