package lab

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"assay.dev/agent/netns"
	"golang.org/x/sys/unix"
)

// A container here is what a platform gives to one that may do no more than its network's
// settings: its own processes and mounts, /proc/sys to read, root with few capabilities, no way
// to more, and none of the system calls that a runtime's own filter forbids.

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
		if err := filter(); err != nil {
			return fmt.Errorf("filter system calls: %w", err)
		}
		return unix.Exec("/proc/self/exe", os.Args, os.Environ())
	})
}

// filter forbids system calls to the calling thread, and to what it executes: seccomp(2).
func filter() error {
	const number = 0 // of struct seccomp_data
	refused := map[uint32]unix.Errno{
		unix.SYS_UNSHARE: unix.EPERM, unix.SYS_SETNS: unix.EPERM, unix.SYS_MOUNT: unix.EPERM, unix.SYS_UMOUNT2: unix.EPERM,
		unix.SYS_PIVOT_ROOT: unix.EPERM, unix.SYS_BPF: unix.EPERM, unix.SYS_PERF_EVENT_OPEN: unix.EPERM, unix.SYS_CLONE3: unix.ENOSYS,
	}
	program := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: number}}
	for call, errno := range refused {
		program = append(program,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: call},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(errno)})
	}
	program = append(program, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	p := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	return unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&p)), 0, 0)
}
