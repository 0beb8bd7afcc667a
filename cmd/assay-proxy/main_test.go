package main

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"assay.dev/link"
	"assay.dev/proxy"
	"context"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"os/signal"
)

// The test binary is three programs: what `go test` starts, the same again in
// namespaces of its own (network, mounts, processes, so that nothing outlives it),
// and, under the race detector, the proxy, which cannot enter its sandbox then.
const (
	roleEnv   = "ASSAY_TEST_ROLE"
	roleLab   = "lab"
	roleProxy = "proxy"
)

// lab is whether tests can make networks; binary is the proxy that they start.
var (
	inLab  bool
	binary string
)

func TestMain(m *testing.M) {
	switch os.Getenv(roleEnv) {
	case roleProxy:
		os.Exit(proxyUnderTest())
	case roleLab:
		if err := enterLab(); err != nil {
			fmt.Fprintln(os.Stderr, "lab:", err)
			os.Exit(1)
		}
		inLab = true
		goleak.VerifyTestMain(m)
	}
	if os.Geteuid() != 0 {
		fmt.Println("not root: tests that need networks of their own are skipped")
		os.Exit(m.Run())
	}
	os.Exit(runInLab())
}

func needLab(t testing.TB) {
	t.Helper()
	if !inLab {
		t.Skip("needs root, to make network namespaces")
	}
}

// runInLab builds the proxy and runs the tests again in new namespaces.
func runInLab() int {
	dir, err := os.MkdirTemp("", "assay-proxy-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	os.Chmod(dir, 0o755) // proxies of other users start from here
	bin := filepath.Join(dir, "assay-proxy")
	if !raceEnabled {
		build := exec.Command("go", "build", "-o", bin, ".")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build: %v\n%s", err, out)
			return 1
		}
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), roleEnv+"="+roleLab, "ASSAY_TEST_BINARY="+bin, "ASSAY_TEST_DIR="+dir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
	}
	if err := cmd.Run(); err != nil {
		if exit, ok := err.(*exec.ExitError); ok {
			return max(exit.ExitCode(), 1)
		}
		fmt.Fprintln(os.Stderr, "lab:", err)
		return 1
	}
	return 0
}

func enterLab() error {
	binary = os.Getenv("ASSAY_TEST_BINARY")
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount proc: %w", err)
	}
	// Sysctls of new network namespaces are written here.
	if err := unix.Mount("sysfs", "/sys", "sysfs", unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("mount sysfs: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// proxyUnderTest is the proxy without its sandbox, and with a look at what it left
// behind.
func proxyUnderTest() int {
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	conn, err := link.FileConn(os.NewFile(linkFD, "link"))
	if err != nil {
		log.Error("stopped", "error", err)
		return 1
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	err = proxy.New(conn, proxy.Options{Log: log, Build: "test"}).Run(ctx)
	interrupted := ctx.Err() != nil
	stop()
	if err != nil && !interrupted {
		log.Error("stopped", "error", err)
		return 1
	}
	if err := goleak.Find(); err != nil {
		log.Error("goroutines left behind", "error", err)
		return 3
	}
	return 0
}

// proxyCommand is the command that starts a proxy as an agent does: its own session,
// its own user with one capability.
func proxyCommand(n int) *exec.Cmd {
	if raceEnabled {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), roleEnv+"="+roleProxy)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		return cmd
	}
	id := uint32(900_000_000 + n)
	cmd := exec.Command(binary)
	cmd.Env = []string{}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:      true,
		Credential:  &syscall.Credential{Uid: id, Gid: id, NoSetGroups: false},
		AmbientCaps: []uintptr{unix.CAP_NET_RAW},
	}
	return cmd
}

func TestVersion(t *testing.T) {
	var out, errs stringWriter
	if code := run([]string{"-version"}, &out, &errs); code != 0 || len(out.s) < len("assay-proxy x\n") || errs.s != "" {
		t.Errorf("-version: %d, %s, %s", code, strconv.Quote(out.s), errs.s)
	}
	if code := run([]string{"-config", "x"}, &out, &errs); code != 1 || errs.s == "" {
		t.Errorf("an unknown argument: %d, %q", code, errs.s)
	}
}

type stringWriter struct{ s string }

func (w *stringWriter) Write(p []byte) (int, error) { w.s += string(p); return len(p), nil }
