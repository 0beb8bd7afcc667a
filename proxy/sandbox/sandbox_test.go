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
	"unsafe"

	"golang.org/x/sys/unix"
)

const probeEnv = "ASSAY_SANDBOX_PROBE"

func TestMain(m *testing.M) {
	if os.Getenv(probeEnv) != "" {
		probe()
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

// runProbe builds this test again, because the race detector links cgo, and cgo the
// way that the environment says.
func runProbe(t *testing.T, cgo string) result {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "probe")
	build := exec.Command("go", "test", "-c", "-o", bin, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	cmd := exec.Command(bin)
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

func TestFilterForBothArchitectures(t *testing.T) {
	for _, arch := range []string{"amd64", "arm64"} {
		p, err := filter(arch, 1)
		if err != nil || len(p) < len(allowed) || len(p) > 4096 {
			t.Errorf("%s: %d instructions, %v", arch, len(p), err)
		}
	}
	if _, err := filter("mips", 1); err == nil {
		t.Error("a filter for an architecture whose numbers are not known")
	}
}
