package lab

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"assay.dev/agent/netns"
)

// Space is a set of namespaces that code and programs can be run in.
type Space struct {
	pid, mnt, net *os.File
}

// OpenSpace opens the pid, mount and network namespaces of a process by its number
// here: those of a lab's process 1, or of a machine that another package made.
func OpenSpace(pid int) (*Space, error) {
	var s Space
	var errs [3]error
	s.pid, errs[0] = os.Open(fmt.Sprintf("/proc/%d/ns/pid", pid))
	s.mnt, errs[1] = os.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	s.net, errs[2] = os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err := errors.Join(errs[:]...); err != nil {
		s.Close()
		return nil, err
	}
	return &s, nil
}

// Close forgets the namespaces; they live on while something is in them.
func (s *Space) Close() {
	for _, f := range []*os.File{s.pid, s.mnt, s.net} {
		if f != nil {
			f.Close()
		}
	}
}

// Enter is the beginning of a command with which a person runs a program in the space
// for as long as this process holds it.
func (s *Space) Enter() string {
	at := func(f *os.File) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()) }
	return fmt.Sprintf("nsenter --net=%s --pid=%s --mount=%s", at(s.net), at(s.pid), at(s.mnt))
}

// NetInode identifies the network namespace.
func (s *Space) NetInode() (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(s.net.Fd()), &st); err != nil {
		return 0, err
	}
	return st.Ino, nil
}

// In runs fn on a thread in the space's network namespace: sockets that it makes
// belong there for ever. fn must not start goroutines that make sockets and must
// not end the test; names are to be resolved elsewhere.
func (s *Space) In(fn func() error) error {
	return netns.OnThread(func() error {
		if err := unix.Setns(int(s.net.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return fn()
	})
}

// inAll runs fn on a thread whose children are born in all of the space's
// namespaces.
func (s *Space) inAll(fn func() error) error {
	return netns.OnThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		for _, ns := range []struct {
			file *os.File
			kind int
		}{{s.net, unix.CLONE_NEWNET}, {s.pid, unix.CLONE_NEWPID}, {s.mnt, unix.CLONE_NEWNS}} {
			if err := unix.Setns(int(ns.file.Fd()), ns.kind); err != nil {
				return fmt.Errorf("enter namespace %s: %w", ns.file.Name(), err)
			}
		}
		return fn()
	})
}
