package sandbox

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const probeEnv = "ASSAY_SANDBOX_PROBE"

func TestMain(m *testing.M) {
	switch os.Getenv(probeEnv) {
	case "1":
		probe()
		return
	case "trap":
		Enter()
		openForbidden()
		return
	}
	os.Exit(m.Run())
}

// attempts are what the tests try inside: the error's text by name.
var attempts = map[string]func() error{
	"open a file":          func() error { _, err := unix.Open("/etc/hostname", unix.O_RDONLY, 0); return err },
	"make a file":          func() error { _, err := unix.Open("/tmp/assay-sandbox", unix.O_CREAT|unix.O_WRONLY, 0o600); return err },
	"open itself":          func() error { _, err := os.Open("/proc/self/status"); return err },
	"raw socket":           func() error { return socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP) },
	"raw IPv6 socket":      func() error { return socket(unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_ICMPV6) },
	"ping socket":          func() error { return socket(unix.AF_INET, unix.SOCK_DGRAM, unix.IPPROTO_ICMP) },
	"packet socket":        func() error { return socket(unix.AF_PACKET, unix.SOCK_RAW, 0) },
	"packet socket, typed": func() error { return socket(unix.AF_PACKET, unix.SOCK_DGRAM, 0) },
	"netlink socket":       func() error { return socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE) },
	"vsock":                func() error { return socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0) },
	"execute":              func() error { return unix.Exec("/bin/true", []string{"true"}, nil) },
	"fork":                 func() error { return exec.Command("/bin/true").Start() },
	"ptrace":               func() error { return unix.PtraceAttach(os.Getppid()) },
	"signal its parent":    func() error { return unix.Kill(os.Getppid(), 0) },
	"tgkill its parent":    func() error { return unix.Tgkill(os.Getppid(), os.Getppid(), 0) },
	"new namespace":        func() error { return unix.Unshare(unix.CLONE_NEWUSER) },
	"mount":                func() error { return unix.Mount("none", "/tmp", "tmpfs", 0, "") },
	"bpf": func() error {
		_, _, errno := unix.Syscall(unix.SYS_BPF, 0, 0, 0)
		return errno
	},
	"executable memory": func() error {
		_, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_ANON|unix.MAP_PRIVATE)
		return err
	},
	"make memory executable": func() error {
		b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err != nil {
			return nil // that one is allowed: report it as a success of the attempt
		}
		return unix.Mprotect(b, unix.PROT_READ|unix.PROT_EXEC)
	},
	"change the filter": func() error {
		allow := []unix.SockFilter{{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW}}
		prog := unix.SockFprog{Len: 1, Filter: &allow[0]}
		_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog)))
		if errno == 0 {
			return nil
		}
		return errno
	},
}

// permitted are what a proxy does all the time.
var permitted = map[string]func() error{
	"TCP socket":      func() error { return socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0) },
	"TCP IPv6 socket": func() error { return socket(unix.AF_INET6, unix.SOCK_STREAM, unix.IPPROTO_TCP) },
	"UDP socket":      func() error { return socket(unix.AF_INET, unix.SOCK_DGRAM, 0) },
	"link socket":     func() error { return socket(unix.AF_UNIX, unix.SOCK_SEQPACKET, 0) },
	"memfd":           func() error { _, err := unix.MemfdCreate("x", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING); return err },
	"thread": func() error {
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() { runtime.LockOSThread() }) // the thread ends with it
		}
		wg.Wait()
		return nil
	},
	"collect garbage": func() error { runtime.GC(); return nil },
}

func socket(family, kind, proto int) error {
	fd, err := unix.Socket(family, kind, proto)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// result is what the probe writes.
type result struct {
	Notes    []string
	Err      string
	Got, May map[string]string
	Status   map[string]string // from before files could no longer be opened
}

// probe enters the sandbox and tries everything, each on a thread of its own, so
// that threads from before and after Enter are both tried.
func probe() {
	status, _ := os.Open("/proc/self/status") // kept open: reading is allowed
	parked := make(chan func())
	var threads sync.WaitGroup
	threads.Go(func() {
		runtime.LockOSThread()
		for f := range parked {
			f()
		}
	})
	var r result
	var err error
	if r.Notes, err = Enter(); err != nil {
		r.Err = err.Error()
	}
	try := func(list map[string]func() error) map[string]string {
		out := map[string]string{}
		for name, f := range list {
			done := make(chan string)
			run := func() { done <- fmt.Sprint(f()) }
			go func() { parked <- run }()
			out[name] = <-done
			go run()
			if again := <-done; again != out[name] {
				out[name] += ", on another thread " + again
			}
		}
		return out
	}
	if r.Err == "" {
		r.Got, r.May = try(attempts), try(permitted)
	}
	close(parked)
	threads.Wait()
	r.Status = map[string]string{}
	buf := make([]byte, 8192)
	n, _ := status.ReadAt(buf, 0)
	for line := range strings.Lines(string(buf[:n])) {
		k, v, _ := strings.Cut(strings.TrimSpace(line), ":")
		r.Status[k] = strings.TrimSpace(v)
	}
	json.NewEncoder(os.Stdout).Encode(r)
}

// buildProbe builds this test again, because the race detector links cgo, and cgo the
// way that the environment says.
func buildProbe(t *testing.T, cgo string, args ...string) (bin string) {
	t.Helper()
	bin = filepath.Join(t.TempDir(), "probe")
	build := exec.Command("go", append(append([]string{"test", "-c", "-o", bin}, args...), ".")...)
	build.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return bin
}

func runProbe(t *testing.T, cgo string) result {
	t.Helper()
	cmd := exec.Command(buildProbe(t, cgo))
	cmd.Env = append(os.Environ(), probeEnv+"=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("probe: %v\n%s", err, out)
	}
	var r result
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatalf("probe: %v in %q", err, out)
	}
	return r
}

func TestInside(t *testing.T) {
	r := runProbe(t, "0")
	if r.Err != "" {
		t.Fatal(r.Err)
	}
	t.Logf("notes: %q", r.Notes)
	checkCalls(t, r)
	for key, want := range map[string]string{"NoNewPrivs": "1", "Seccomp": "2", "CapInh": "0000000000000000", "CapAmb": "0000000000000000"} {
		if r.Status[key] != want {
			t.Errorf("%s is %s, want %s", key, r.Status[key], want)
		}
	}
	const netRaw = "0000000000002000"
	for _, key := range []string{"CapEff", "CapPrm", "CapBnd"} {
		if os.Geteuid() == 0 && r.Status[key] != netRaw {
			t.Errorf("%s is %s, want %s", key, r.Status[key], netRaw)
		}
	}
}

// TestInsideWithCgo is about a build that was not made as it should be: the filter
// holds all the same, and the rest is told.
func TestInsideWithCgo(t *testing.T) {
	if _, err := exec.LookPath("gcc"); err != nil {
		t.Skip("no C compiler")
	}
	r := runProbe(t, "1")
	if r.Err != "" {
		t.Fatal(r.Err)
	}
	if len(r.Notes) == 0 || r.Status["Seccomp"] != "2" || r.Status["NoNewPrivs"] != "1" {
		t.Errorf("notes %q, seccomp %s, no_new_privs %s", r.Notes, r.Status["Seccomp"], r.Status["NoNewPrivs"])
	}
	checkCalls(t, r)
}

func checkCalls(t *testing.T, r result) {
	t.Helper()
	for name := range attempts {
		if got := r.Got[name]; !strings.HasSuffix(got, "operation not permitted") || strings.Contains(got, "another thread") {
			t.Errorf("%s: %q", name, got)
		}
	}
	for name := range permitted {
		if got := r.May[name]; got != "<nil>" {
			t.Errorf("%s: %s", name, got)
		}
	}
}

//go:noinline
func openForbidden() { unix.Open("/etc/hostname", unix.O_RDONLY, 0) }

// TestTrap: a build with the tag assay_trap dies of a call that is not allowed, and
// shows which one and who made it.
func TestTrap(t *testing.T) {
	cmd := exec.Command(buildProbe(t, "0", "-tags", "assay_trap"))
	cmd.Env = append(os.Environ(), probeEnv+"=trap")
	out, err := cmd.CombinedOutput()
	for _, want := range []string{"SIGSYS", "openForbidden"} {
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("%v, and no %s in\n%s", err, want, out)
		}
	}
}

// TestRefusalsAreLogged: with auditing in the kernel, a refused call is in its log.
func TestRefusalsAreLogged(t *testing.T) {
	logged, err := os.ReadFile("/proc/sys/kernel/seccomp/actions_logged")
	if err != nil || !strings.Contains(string(logged), "errno") {
		t.Skipf("this machine logs no refused calls: %q, %v", logged, err)
	}
	log, err := os.OpenFile("/dev/kmsg", os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Skip("the kernel's log cannot be read:", err)
	}
	defer log.Close()
	if _, err := unix.Seek(int(log.Fd()), 0, unix.SEEK_END); err != nil {
		t.Skip("the kernel's log cannot be read:", err)
	}
	// The kernel prints a few in a while: others may have had their share.
	probe := buildProbe(t, "0")
	buf := make([]byte, 8192)
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Second) {
		cmd := exec.Command(probe)
		cmd.Env = append(os.Environ(), probeEnv+"=1")
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		for {
			n, err := unix.Read(int(log.Fd()), buf)
			if err != nil {
				break
			}
			if line := string(buf[:n]); strings.Contains(line, "type=1326") && strings.Contains(line, probe) {
				return
			}
		}
	}
	t.Skip("no refused call is in the kernel's log: it has no auditing, or others fill it")
}
