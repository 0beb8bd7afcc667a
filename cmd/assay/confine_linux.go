package main

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mounts gives the calling thread mounts of its own: names are resolved by the
// workload's proxy, the artifact cannot be changed from inside, nor can the kernel's
// settings (a command of root's could, without any capability), and what belongs to
// agent and control is out of sight: their keys, and their sockets, at which root is
// let in for being root.
func mounts(resolvConf, artifact string, hidden []string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("mount namespace: %w", err)
	}
	if err := unix.Mount(resolvConf, "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s over /etc/resolv.conf: %w", resolvConf, err)
	}
	readOnly := []string{"/proc/sys"}
	if artifact != "" {
		readOnly = append(readOnly, artifact)
	}
	for _, path := range readOnly {
		if err := mountReadOnly(path); err != nil {
			return fmt.Errorf("mount %s read-only: %w", path, err)
		}
	}
	for _, path := range hidden {
		err := unix.Mount("assay", path, "tmpfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0555,size=4k")
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("hide %s: %w", path, err)
		}
	}
	return nil
}

func mountReadOnly(path string) error {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// Only adds an attribute: in a user namespace the others may be locked.
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return err
	}
	return unix.MoveMount(fd, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// landlockSignals is the version of Landlock's interface that can scope signals
// (Linux 6.12).
const landlockSignals = 6

// scopeSignals takes from the calling thread, and from what it starts, the power over
// processes that are not the workload's: they get no signal from it, and cannot be
// traced or looked into through /proc, whoever they and it belong to. Its proxy, other
// workloads', the agent and control would otherwise be any command of root's to kill.
// It changes nothing else, and nothing on a kernel that cannot do it.
func scopeSignals() error {
	version, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 || version < landlockSignals {
		return nil
	}
	rules := struct{ files, network, scoped uint64 }{scoped: unix.LANDLOCK_SCOPE_SIGNAL}
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&rules)), unsafe.Sizeof(rules), 0)
	if errno != 0 {
		return fmt.Errorf("landlock: %w", errno)
	}
	defer unix.Close(int(fd))
	// Without no_new_privs, which would take sudo and the like from the command: we
	// still have the capability that it takes instead.
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0); errno != 0 {
		return fmt.Errorf("landlock: %w", errno)
	}
	return nil
}
