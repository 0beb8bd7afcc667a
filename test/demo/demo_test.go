package demo

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"assay.dev/test/lab"
)

// bin holds what a user has after `make build`, and the saboteurs.
var bin string

func TestMain(m *testing.M) {
	code := func() int {
		if os.Getenv(lab.EndToEnd) != "1" {
			return m.Run()
		}
		dir, err := os.MkdirTemp("", "assay-e2e-demo-")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		if err := os.Chmod(dir, 0o755); err != nil {
			panic(err)
		}
		bin = dir
		return m.Run()
	}()
	os.Exit(code)
}

// build compiles a command once; in is the folder of its module.
func build(t *testing.T, in, pkg, name string, flags ...string) string {
	t.Helper()
	path := filepath.Join(bin, name)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	cmd := exec.Command("go", append(append([]string{"build", "-trimpath", "-o", path}, flags...), pkg)...)
	cmd.Dir = in
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build %s: %v\n%s", pkg, err, out)
	}
	return path
}

func buildAll(t *testing.T) string {
	t.Helper()
	lab.Require(t)
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	build(t, root, "./cmd/assay-proxy", "assay-proxy")
	build(t, filepath.Join(root, "examples/bank"), ".", "bank")
	return build(t, root, "./cmd/assay", "assay")
}

// check runs `assay demo --check` and returns its exit code, its output, and the
// checks that failed.
func check(t *testing.T, as *syscall.Credential, args ...string) (int, string, map[string]string) {
	t.Helper()
	assay := buildAll(t)
	before := leftovers(t)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, assay, append([]string{"demo", "--check"}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	if as != nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/nonexistent"}
		cmd.Dir = "/"
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if _, ok := err.(*exec.ExitError); err != nil && !ok {
		t.Fatal(err)
	}
	failed := map[string]string{}
	for _, m := range regexp.MustCompile(`(?m)^FAIL  +(.+?)  +(.*)$`).FindAllStringSubmatch(out.String(), -1) {
		failed[m[1]] = m[2]
	}
	if after := leftovers(t); after != before {
		t.Errorf("left behind:\nbefore:\n%s\nafter:\n%s", before, after)
	}
	return cmd.ProcessState.ExitCode(), out.String(), failed
}

// leftovers is what a demo could leave on the host: links, folders, processes of bin.
func leftovers(t *testing.T) string {
	t.Helper()
	var list []string
	for _, pattern := range []string{"/sys/class/net/*", "/run/assay-demo-*", filepath.Join(os.TempDir(), "assay-demo-[0-9]*")} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range found {
			if !locked(t, path) {
				list = append(list, path)
			}
		}
	}
	exes, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range exes {
		if exe, err := os.Readlink(link); err == nil && strings.HasPrefix(exe, bin+"/") {
			list = append(list, link+" "+exe)
		}
	}
	return strings.Join(list, "\n")
}

// locked reports whether a folder is that of a demo which runs: somebody else's. A demo
// holds a lock on its folder for as long as it lives.
func locked(t *testing.T, path string) bool {
	t.Helper()
	st, err := os.Lstat(path)
	if err != nil || !st.IsDir() {
		return false
	}
	locks, err := os.ReadFile("/proc/locks")
	if err != nil {
		t.Fatal(err)
	}
	// "7: FLOCK ADVISORY WRITE 4711 00:1a:987654 0 EOF"
	for line := range strings.Lines(string(locks)) {
		f := strings.Fields(line)
		if len(f) > 5 && f[1] == "FLOCK" && strings.HasSuffix(f[5], fmt.Sprintf(":%d", st.Sys().(*syscall.Stat_t).Ino)) {
			return true
		}
	}
	return false
}

func TestCheck(t *testing.T) {
	code, out, failed := check(t, nil)
	if code != 0 || len(failed) > 0 || !strings.Contains(out, "checks passed") {
		t.Errorf("exit code %d\n%s", code, out)
	}
}

// TestCheckWithoutRoot does the same as a user who is nobody.
func TestCheckWithoutRoot(t *testing.T) {
	buildAll(t)
	nobody := &syscall.Credential{Uid: 65534, Gid: 65534}
	try := exec.Command("/bin/true")
	try.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET, Credential: nil}
	if err := try.Run(); err != nil {
		t.Skipf("user namespaces: %v", err)
	}
	code, out, failed := check(t, nobody)
	if code != 0 || len(failed) > 0 || !strings.Contains(out, "checks passed") {
		t.Errorf("exit code %d\n%s", code, out)
	}
}

// TestSabotage puts a false data plane in place of the real one: the check must fail,
// and for the reason that is true.
func TestSabotage(t *testing.T) {
	for mode, want := range map[string]string{
		"clear":    "nothing readable on the links",
		"identity": "identities, as a peer sees them",
	} {
		t.Run(mode, func(t *testing.T) {
			buildAll(t)
			root, err := filepath.Abs("../..")
			if err != nil {
				t.Fatal(err)
			}
			proxy := build(t, root, "./test/demo/sabotage", "sabotage-"+mode, "-tags", "sabotage", "-ldflags", "-X main.mode="+mode)
			code, out, failed := check(t, nil, "--proxy", proxy)
			if code != 1 {
				t.Errorf("exit code %d, want 1", code)
			}
			if _, ok := failed[want]; !ok {
				t.Errorf("%q did not fail", want)
			}
			if mode == "clear" && !strings.Contains(failed[want], "XX00ASSAYBANK") {
				t.Errorf("the payload was not found: %s", failed[want])
			}
			if t.Failed() {
				t.Log(out)
			}
		})
	}
}

// TestMissingBank says what to do.
func TestMissingBank(t *testing.T) {
	assay := buildAll(t)
	out, err := exec.Command(assay, "demo", "--bank", "/nonexistent/bank").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "make build") {
		t.Errorf("%v %s", err, out)
	}
}

// TestLive runs the demo that people watch: the page and the metrics answer, edges
// appear, and an interrupt ends everything.
func TestLive(t *testing.T) {
	assay := buildAll(t)
	before := leftovers(t)
	cmd := exec.Command(assay, "demo")
	var errs bytes.Buffer
	cmd.Stderr = &errs
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	out := &shared{}
	copied := make(chan struct{})
	go func() { defer close(copied); io.Copy(out, pipe) }()

	url := regexp.MustCompile(`http://127\.0\.0\.1:\d+/(metrics)?`)
	lab.Eventually(t, 30*time.Second, "it says what to look at", func() error {
		if len(url.FindAllString(out.String(), -1)) < 2 {
			return fmt.Errorf("%s%s", out.String(), errs.String())
		}
		return nil
	})
	for _, u := range url.FindAllString(out.String(), -1) {
		want := "XX00ASSAYBANK"
		if strings.HasSuffix(u, "metrics") {
			want = "assay_"
		}
		lab.Eventually(t, 30*time.Second, u, func() error {
			resp, err := http.Get(u)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			b, err := io.ReadAll(resp.Body)
			if err != nil || !strings.Contains(string(b), want) {
				return fmt.Errorf("%s: %v\n%.500s", resp.Status, err, b)
			}
			return nil
		})
	}
	http.DefaultClient.CloseIdleConnections()
	lab.Eventually(t, 30*time.Second, "edges and requests", func() error {
		if !regexp.MustCompile(`[1-9]\d* of \d+ edges under mutual TLS.*, [1-9]\d* requests/s, success 100\.00 %`).MatchString(out.String()) {
			return fmt.Errorf("%s", out.String())
		}
		return nil
	})
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	<-copied
	if err := cmd.Wait(); err != nil {
		t.Errorf("after an interrupt: %v\n%s", err, errs.String())
	}
	if after := leftovers(t); after != before {
		t.Errorf("left behind:\nbefore:\n%s\nafter:\n%s", before, after)
	}
}

// TestLiveKilled ends it without a warning: no process may outlive it, and the next
// demo removes its folder.
func TestLiveKilled(t *testing.T) {
	assay := buildAll(t)
	before := leftovers(t)
	cmd := exec.Command(assay, "demo")
	out := &shared{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lab.Eventually(t, 30*time.Second, "workloads", func() error {
		if !strings.Contains(out.String(), "7 of 7 workloads meshed") {
			return fmt.Errorf("%s", out.String())
		}
		return nil
	})
	cmd.Process.Kill()
	cmd.Wait()
	lab.Eventually(t, 30*time.Second, "everything has ended", func() error {
		if after := leftovers(t); strings.Contains(after, bin) {
			return fmt.Errorf("%s", after)
		}
		return nil
	})
	next := exec.Command(assay, "demo")
	stopped := &shared{}
	next.Stdout, next.Stderr = stopped, stopped
	if err := next.Start(); err != nil {
		t.Fatal(err)
	}
	defer next.Process.Kill()
	lab.Eventually(t, 30*time.Second, "the next demo", func() error {
		if !strings.Contains(stopped.String(), "Ctrl-C ends it") {
			return fmt.Errorf("%s", stopped.String())
		}
		return nil
	})
	next.Process.Signal(syscall.SIGTERM)
	if err := next.Wait(); err != nil {
		t.Errorf("%v\n%s", err, stopped.String())
	}
	if after := leftovers(t); after != before {
		t.Errorf("left behind:\nbefore:\n%s\nafter:\n%s", before, after)
	}
}

// shared is a buffer that is written and read at the same time.
type shared struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (s *shared) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(p)
}

func (s *shared) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}
