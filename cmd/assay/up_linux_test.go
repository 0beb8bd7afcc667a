package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// upProcess is an `assay up` in a network namespace of its own.
type upProcess struct {
	*exec.Cmd
	out, errs bytes.Buffer
	ready     time.Duration
}

// openFolder is a folder that other users can reach.
func openFolder(t *testing.T) string {
	t.Helper()
	base := os.TempDir()
	if os.Geteuid() == 0 {
		base = "/run"
	}
	dir, err := os.MkdirTemp(base, "assay-up-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// startUp starts it, as root or as nobody, and waits until it says that it is ready.
func startUp(t *testing.T, dir string, nobody bool, files []*os.File, args ...string) *upProcess {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	exe, err := exec.LookPath("assay")
	if err != nil {
		t.Fatal(err)
	}
	if nobody { // the folder of exe is root's
		open := filepath.Join(dir, "assay")
		b, err := os.ReadFile(exe)
		if err == nil {
			err = os.WriteFile(open, b, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
		exe = open
	}
	path := filepath.Join(dir, "notify")
	os.Remove(path) // of the process before
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	if err := os.Chmod(path, 0o777); err != nil {
		t.Fatal(err)
	}
	p := &upProcess{}
	args = append([]string{"up", "--data", filepath.Join(dir, "data"), "--runtime", filepath.Join(dir, "run"), "--proxy", "/bin/true"}, args...)
	attr := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if nobody {
		attr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, Pdeathsig: syscall.SIGKILL}
	} else {
		args = append([]string{"space", "--dir", dir, "--"}, args...)
	}
	p.Cmd = exec.Command(exe, args...)
	p.Stdout, p.Stderr, p.ExtraFiles, p.SysProcAttr = &p.out, &p.errs, files, attr
	p.Env = append(os.Environ(), "NOTIFY_SOCKET="+path)
	begun := time.Now()
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Process.Kill(); p.Wait() })
	notify.SetReadDeadline(begun.Add(20 * time.Second))
	b := make([]byte, 256)
	n, err := notify.Read(b)
	if err != nil || !strings.Contains(string(b[:n]), "READY=1") {
		p.Process.Kill()
		p.Wait()
		t.Fatalf("not ready: %q %v\n%s%s", b[:n], err, p.out.Bytes(), p.errs.Bytes())
	}
	p.ready = time.Since(begun)
	return p
}

// end asks it to end and checks that it does so well.
func (p *upProcess) end(t *testing.T, dir string) {
	t.Helper()
	p.Process.Signal(syscall.SIGTERM)
	if err := p.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v\n%s", err, p.errs.Bytes())
	}
	if !strings.Contains(p.out.String(), "assay is ready") || !strings.Contains(p.out.String(), "assay run --service") {
		t.Errorf("what to do next is missing:\n%s", p.out.Bytes())
	}
	for _, name := range []string{"control.sock", "agent.sock"} {
		if _, err := os.Lstat(filepath.Join(dir, "run", name)); err == nil {
			t.Errorf("%s is left", name)
		}
	}
}

func assayCommand(t *testing.T, args ...string) (int, string) {
	t.Helper()
	cmd := exec.Command("assay", args...)
	out, err := cmd.CombinedOutput()
	if _, ok := err.(*exec.ExitError); err != nil && !ok {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

func TestUp(t *testing.T) {
	metrics, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer metrics.Close()
	file, err := metrics.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	dir := openFolder(t)
	p := startUp(t, dir, false, []*os.File{file}, "--metrics", "fd:3", "--trust-domain", "up.test")
	if p.ready > 3*time.Second {
		t.Errorf("ready after %s, want less than 3 s", p.ready)
	}
	if code, out := assayCommand(t, "get", "hosts", "--control", filepath.Join(dir, "run", "control.sock")); code != 0 || !strings.Contains(out, "local") {
		t.Errorf("assay get hosts: %d %s", code, out)
	}
	resp, err := http.Get("http://" + metrics.Addr().String() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	if resp.StatusCode != 200 || !strings.Contains(string(body), "assay_") {
		t.Errorf("metrics: %s %.300s", resp.Status, body)
	}
	pid := strconv.Itoa(p.Process.Pid)
	if rss := resident(t, pid); rss > 120 {
		t.Errorf("%d MB resident, want less than 120", rss)
	}
	for _, second := range [][2]string{{"data", "run2"}, {"data2", "run"}} {
		code, out := assayCommand(t, "up", "--data", filepath.Join(dir, second[0]), "--runtime", filepath.Join(dir, second[1]))
		if code != 1 || !strings.Contains(out, "in use by process") || !strings.Contains(out, dir) {
			t.Errorf("a second up with %v: %d %s", second, code, out)
		}
	}
	p.end(t, dir)
	if !strings.Contains(p.out.String(), "up.test") {
		t.Errorf("%s", p.out.Bytes())
	}

	// Killed without a warning, it starts again on what is there.
	p = startUp(t, dir, false, nil)
	p.Process.Kill()
	p.Wait()
	startUp(t, dir, false, nil).end(t, dir)
}

func TestUpWithoutRoot(t *testing.T) {
	try := exec.Command("/bin/true")
	try.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET}
	if err := try.Run(); err != nil {
		t.Skipf("user namespaces: %v", err)
	}
	dir := openFolder(t)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	p := startUp(t, dir, true, nil)
	if code, out := assayCommand(t, "get", "hosts", "--control", filepath.Join(dir, "run", "control.sock")); code == 0 {
		t.Errorf("root, who is nobody in there, was let in: %s", out)
	}
	p.end(t, dir)
	if !strings.Contains(p.out.String(), "without root") {
		t.Errorf("what is missing is not said:\n%s", p.out.Bytes())
	}
}

// resident is a process's memory in MB.
func resident(t *testing.T, pid string) int {
	t.Helper()
	b, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "VmRSS:")
	var kb int
	fmt.Sscan(rest, &kb)
	return kb >> 10
}

func TestUpRefuses(t *testing.T) {
	dir := openFolder(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	closed := filepath.Join(dir, "closed")
	if err := os.Mkdir(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	base := []string{"up", "--data", filepath.Join(dir, "data"), "--runtime", filepath.Join(dir, "run")}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"--config", filepath.Join(dir, "nothing")}, "name a folder that exists"},
		{[]string{"--config", file}, "not a folder"},
		{[]string{"--trust-domain", "Not A Domain"}, "not a trust domain"},
		{[]string{"--advertise", "everywhere"}, "name one IP address"},
		{[]string{"--runtime", filepath.Join(closed, "run")}, "closed to other users"},
		{[]string{"extra"}, "unknown command"},
	} {
		if os.Geteuid() != 0 && c.args[0] == "--runtime" {
			continue
		}
		if code, out := assayCommand(t, append(append([]string{}, base...), c.args...)...); code != 1 || !strings.Contains(out, c.want) {
			t.Errorf("up %v: %d %s", c.args, code, out)
		}
	}
	for _, name := range []string{"data", "run"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			t.Errorf("%s was made for a command that was refused", name)
		}
	}
}

// Somebody who made the folder first gets no file written through a link of his.
func TestUpRefusesAForeignFolder(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes files of others")
	}
	dir := openFolder(t)
	precious := filepath.Join(dir, "precious")
	if err := os.WriteFile(precious, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, owner := range []int{12345, 0} {
		run := filepath.Join(dir, fmt.Sprint("run", owner))
		if err := os.Mkdir(run, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(precious, filepath.Join(run, "up.lock")); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(run, owner, owner); err != nil {
			t.Fatal(err)
		}
		if code, out := assayCommand(t, "up", "--data", filepath.Join(dir, "data"), "--runtime", run); code != 1 || owner != 0 && !strings.Contains(out, "belongs to user 12345") {
			t.Errorf("up in a folder of user %d: %d %s", owner, code, out)
		}
		if b, err := os.ReadFile(precious); string(b) != "mine" {
			t.Fatalf("the file that the link leads to holds %q (%v)", b, err)
		}
	}
}

func TestDemoRefuses(t *testing.T) {
	for _, c := range [][2]string{{"--rate=-1", "not between"}, {"--bank=/nonexistent/bank", "make build"}} {
		if code, out := assayCommand(t, "demo", c[0]); code != 1 || !strings.Contains(out, c[1]) {
			t.Errorf("demo %s: %d %s", c[0], code, out)
		}
	}
}
