package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"assay.dev"
)

// space is this program run again in namespaces of its own: network and mounts, with
// a user namespace too where the caller is not root, and with processes of its own if
// wanted: then nothing in it outlives it, however it ends.
type space struct {
	args  []string // of the command in it
	files []*os.File
	pids  bool
	dir   string // for a file that lives as long as the space
}

// run starts the space and waits for it. When ctx ends, or somebody stops us, the
// command in it is asked to end. The error is an exitError with the command's code.
func (s *space) run(ctx context.Context) error {
	args := []string{"space", "--dir", s.dir}
	if s.pids {
		args = append(args, "--init")
	}
	// A signal that comes while the child makes itself ready would be lost: one that
	// prepares its namespaces only notes it, and process 1 does not even get it.
	ready, told, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	defer told.Close()
	args = append(args, "--ready", strconv.Itoa(3+len(s.files)))
	cmd := exec.Command("/proc/self/exe", append(append(args, "--"), s.args...)...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = append(s.files[:len(s.files):len(s.files)], told)
	attr := &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS,
		Setpgid:    true, // Ctrl-C reaches us; the command is told once, by us
		Pdeathsig:  syscall.SIGKILL,
	}
	if s.pids {
		attr.Cloneflags |= unix.CLONE_NEWPID
	}
	if os.Geteuid() != 0 {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	cmd.SysProcAttr = attr
	// The signal at our death is sent when the thread that started the child ends.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return cannotIsolate(err)
	}
	told.Close()
	stop := context.AfterFunc(ctx, func() {
		ready.Read(make([]byte, 1)) // ends with the child at the latest
		cmd.Process.Signal(syscall.SIGTERM)
	})
	defer stop()
	err = exitOf(cmd.Wait())
	if e, ok := errors.AsType[*exitError](err); ok && e.code == 128+int(syscall.SIGTERM) && ctx.Err() != nil {
		return nil // we asked before there was anything to end
	}
	return err
}

// unlessStopped is err, but for what follows from being asked to end in the middle of a
// start: that is no failure.
func unlessStopped(ctx context.Context, err error) error {
	if ctx.Err() != nil && (errors.Is(err, ctx.Err()) || errors.Is(err, context.Cause(ctx))) {
		return nil
	}
	return err
}

// exitOf turns how a child ended into our exit code.
func exitOf(err error) error {
	ended, ok := errors.AsType[*exec.ExitError](err)
	if !ok {
		return err
	}
	st, ok := ended.Sys().(syscall.WaitStatus)
	if ok && st.Signaled() {
		return exit(128+int(st.Signal()), nil)
	}
	return exit(ended.ExitCode(), nil)
}

func cannotIsolate(err error) error {
	e := &assay.Error{Kind: assay.Denied, Op: "make a network namespace", Err: err, Remedy: "run as root"}
	switch {
	case os.Geteuid() == 0:
		e.Remedy = "this root lacks CAP_SYS_ADMIN; run outside of the container, or give it that capability"
	case sysctlIs("/proc/sys/kernel/unprivileged_userns_clone", "0"):
		e.Remedy = "run as root, or allow it for everybody: sysctl kernel.unprivileged_userns_clone=1"
	case sysctlIs("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1"):
		e.Remedy = "run as root, or allow it for everybody: sysctl kernel.apparmor_restrict_unprivileged_userns=0"
	case sysctlIs("/proc/sys/user/max_user_namespaces", "0"):
		e.Remedy = "run as root, or allow it for everybody: sysctl user.max_user_namespaces=15000"
	}
	return e
}

func sysctlIs(path, value string) bool {
	b, err := os.ReadFile(path)
	return err == nil && string(b) == value+"\n"
}

// spaceCommand is the first process of a space.
func spaceCommand() *cobra.Command {
	var (
		asInit bool
		dir    string
		ready  int
	)
	cmd := &cobra.Command{
		Use:    "space --dir DIR [--init] -- ARGS",
		Hidden: true,
		Short:  "Run assay ARGS in the namespaces that this process was started in",
		Args:   cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			unix.CloseOnExec(ready)
			if err := prepareSpace(asInit, dir); err != nil {
				return &assay.Error{Op: "prepare a network namespace", Err: err}
			}
			if asInit {
				unix.Close(ready) // from here on the context has heard of every signal
				return beInit(cmd.Context(), args)
			}
			// The signal at the death of whoever started us is a thread's, and of the
			// threads only this one goes on.
			runtime.LockOSThread()
			if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(syscall.SIGKILL), 0, 0, 0); err != nil {
				return err
			}
			if ready >= 0 && hungUp(ready) {
				return exit(128+int(syscall.SIGKILL), nil)
			}
			// ready is closed by the execution, which keeps no signal from its default
			// action, and starts a program that has one of its own.
			return syscall.Exec("/proc/self/exe", append([]string{os.Args[0]}, args...), os.Environ())
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "`folder` for a file that lives as long as the space")
	cmd.Flags().IntVar(&ready, "ready", -1, "`descriptor` to close when signals can come")
	cmd.Flags().BoolVar(&asInit, "init", false, "be process 1: reap, and end everything at the end")
	return cmd
}

// hungUp reports whether nobody reads a pipe any more.
func hungUp(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd)}}
	n, err := unix.Poll(p, 0)
	return err == nil && n == 1 && p[0].Revents&unix.POLLERR != 0
}

// prepareSpace keeps our mounts to ourselves and makes loopback usable.
func prepareSpace(pids bool, dir string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts private: %w", err)
	}
	if pids {
		if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
			return fmt.Errorf("mount /proc: %w", err)
		}
	}
	if err := hideNameServers(dir); err != nil {
		return fmt.Errorf("hide name servers: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// hideNameServers covers the host's resolver configuration: no packet reaches its name
// servers from here, and whoever asked them would wait for nothing.
func hideNameServers(dir string) error {
	file := filepath.Join(dir, "resolv.conf")
	// It stays: nothing can be mounted over a file that was removed, and a workload's
	// own will be.
	if err := os.WriteFile(file, []byte("# a network of its own: it reaches no name server\n"), 0o644); err != nil {
		return err
	}
	for _, path := range []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"} {
		err := unix.Mount(file, path, "", unix.MS_BIND, "")
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

// beInit runs the command and reaps every process that loses its parent. When the
// command has ended, so do we, and the kernel ends whatever is left.
func beInit(ctx context.Context, args []string) error {
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	defer signal.Stop(children)
	// What we inherited (3 and up) is for the command. Not exec.Cmd: its Wait and
	// wait4(-1) would take children from each other.
	files := []uintptr{0, 1, 2}
	for fd := 3; inherited(fd); fd++ {
		files = append(files, uintptr(fd))
	}
	pid, err := syscall.ForkExec("/proc/self/exe", append([]string{os.Args[0]}, args...), &syscall.ProcAttr{Env: os.Environ(), Files: files})
	if err != nil {
		return err
	}
	told := ctx.Done()
	for {
		select {
		case <-told:
			told = nil
			syscall.Kill(pid, syscall.SIGTERM)
		case <-children:
		}
		for {
			var st syscall.WaitStatus
			ended, err := syscall.Wait4(-1, &st, syscall.WNOHANG, nil)
			if err == syscall.EINTR {
				continue
			}
			if err != nil || ended == 0 {
				break
			}
			if ended != pid {
				continue
			}
			if st.Signaled() {
				return exit(128+int(st.Signal()), nil)
			}
			if code := st.ExitStatus(); code != 0 {
				return exit(code, nil)
			}
			return nil
		}
	}
}

// inherited reports whether fd was given to us by whoever started us: what Go opens
// itself is closed on exec.
func inherited(fd int) bool {
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
	return err == nil && flags&unix.FD_CLOEXEC == 0
}
