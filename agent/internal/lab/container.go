package lab

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"assay.dev/agent/netns"
	"golang.org/x/sys/unix"
)

// A container here is what a platform gives to one that may do no more than its network's
// settings: its own processes and mounts, /proc/sys to read, root with few capabilities, and no
// way to more.

const contained = "ASSAY_CONTAINER"

// capabilities are those of a container.
var capabilities = []int{unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_KILL}

// StartContained starts a test binary's role as the first process of a container in ns. Its
// TestMain must call Contain before anything else.
func StartContained(t testing.TB, ns *netns.Namespace, cmd *exec.Cmd) {
	t.Helper()
	cmd.Env = append(cmd.Environ(), contained+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID}
	if err := ns.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
}

// Contain makes a process that StartContained has started the first one of a container, by
// executing it once more. In any other it does nothing.
func Contain() {
	if os.Getenv(contained) == "" {
		return
	}
	os.Unsetenv(contained)
	if err := contain(); err != nil {
		fmt.Fprintln(os.Stderr, "lab: container:", err)
		os.Exit(1)
	}
}

func contain() error {
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
	}{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE},
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"/proc/sys", "/proc/sys", "", unix.MS_BIND},
		{"/proc/sys", "/proc/sys", "", unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
	} {
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	last, err := os.ReadFile("/proc/sys/kernel/cap_last_cap")
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(last)))
	if err != nil {
		return err
	}
	// Of this thread alone, which executes.
	return netns.OnThread(func() error {
		var keep uint64
		for _, c := range capabilities {
			keep |= 1 << c
		}
		for c := 0; c <= n; c++ {
			if keep&(1<<c) == 0 {
				if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil {
					return fmt.Errorf("drop capability %d: %w", c, err)
				}
			}
		}
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			return err
		}
		head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		data := [2]unix.CapUserData{{Effective: uint32(keep), Permitted: uint32(keep)}, {}}
		if err := unix.Capset(&head, &data[0]); err != nil {
			return err
		}
		return unix.Exec("/proc/self/exe", os.Args, os.Environ())
	})
}
