package sandbox

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"assay.dev"
	"golang.org/x/sys/unix"
)

// Enter restricts the process. notes say what this kernel or this build does not
// offer.
func Enter() (notes []string, err error) {
	for _, step := range []struct {
		what string
		do   func() (note string, err error)
	}{
		{"drop capabilities", capabilities},
		{"set no_new_privs", noNewPrivs},
		{"restrict files by Landlock", landlock},
		{"restrict system calls by seccomp", seccomp},
	} {
		note, err := step.do()
		if errors.Is(err, syscall.ENOTSUP) {
			note, err = "built with cgo, cannot "+step.what+" on all threads (build with CGO_ENABLED=0)", nil
		}
		if err != nil {
			return notes, &assay.Error{Op: step.what, Err: err}
		}
		if note != "" {
			notes = append(notes, note)
		}
	}
	return notes, nil
}

// onAllThreads makes a system call on every thread.
func onAllThreads(nr, a, b, c, d uintptr) error {
	if _, _, errno := syscall.AllThreadsSyscall6(nr, a, b, c, d, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// capabilities keeps CAP_NET_RAW.
func capabilities() (string, error) {
	header := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	if err := unix.Capget(header, &have[0]); err != nil {
		return "", os.NewSyscallError("capget", err)
	}
	// The bounding set says what an executed program could gain. Nothing is executed
	// here, so it may stay where it cannot be changed.
	if have[0].Effective&(1<<unix.CAP_SETPCAP) != 0 {
		for c := uintptr(0); c <= 63; c++ {
			if c == unix.CAP_NET_RAW {
				continue
			}
			err := onAllThreads(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0, 0)
			if err == syscall.EINVAL {
				break // beyond the last one of this kernel
			}
			if err != nil {
				return "", os.NewSyscallError("prctl PR_CAPBSET_DROP", err)
			}
		}
	}
	if err := onAllThreads(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0); err != nil {
		return "", os.NewSyscallError("prctl PR_CAP_AMBIENT_CLEAR_ALL", err)
	}
	keep := [2]unix.CapUserData{{
		Effective: have[0].Permitted & (1 << unix.CAP_NET_RAW),
		Permitted: have[0].Permitted & (1 << unix.CAP_NET_RAW),
	}}
	err := onAllThreads(unix.SYS_CAPSET, uintptr(unsafe.Pointer(header)), uintptr(unsafe.Pointer(&keep[0])), 0, 0)
	runtime.KeepAlive(header)
	runtime.KeepAlive(&keep)
	if err != nil {
		return "", os.NewSyscallError("capset", err)
	}
	if keep[0].Permitted == 0 {
		return "CAP_NET_RAW is missing: the application cannot be shown its clients' addresses", nil
	}
	return "", nil
}

func noNewPrivs() (string, error) {
	return "", os.NewSyscallError("prctl PR_SET_NO_NEW_PRIVS", onAllThreads(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0))
}

// landlock denies everything that this kernel's Landlock can deny about files, and
// unix sockets without a file.
func landlock() (string, error) {
	version, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno == unix.ENOSYS || errno == unix.EOPNOTSUPP {
		return "Landlock is not available: files are protected by seccomp alone", nil
	}
	if errno != 0 {
		return "", os.NewSyscallError("landlock_create_ruleset", errno)
	}
	attr := unix.LandlockRulesetAttr{Handled_access_fs: 1<<13 - 1} // ABI 1
	if version >= 2 {
		attr.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_REFER
	}
	if version >= 3 {
		attr.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_TRUNCATE
	}
	if version >= 5 {
		attr.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	}
	if version >= 6 {
		attr.Scoped = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET
	}
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0) // zeros beyond what it knows are fine
	if errno != 0 {
		return "", os.NewSyscallError("landlock_create_ruleset", errno)
	}
	defer unix.Close(int(fd))
	return "", os.NewSyscallError("landlock_restrict_self", onAllThreads(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0, 0))
}

// seccomp installs the filter on all threads at once.
func seccomp() (string, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	program, err := filter(process{runtime.GOARCH, uint32(os.Getpid())})
	if err != nil {
		return "", err
	}
	// A thread may filter itself once it can gain no privileges, and the filter's
	// TSYNC gives both to all others; that holds with cgo's threads too.
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return "", os.NewSyscallError("prctl PR_SET_NO_NEW_PRIVS", err)
	}
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	// Refusals go to the kernel's log (FLAG_LOG): an error that a library swallows would
	// be seen by nobody.
	const flags = unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_LOG
	r, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return "", os.NewSyscallError("seccomp", errno)
	}
	if r != 0 {
		return "", fmt.Errorf("seccomp: thread %d cannot be restricted", r)
	}
	return "", nil
}
