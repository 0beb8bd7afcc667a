package netns

import (
	"fmt"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// OnThread runs fn on an operating-system thread of its own, which ends with it:
// whatever fn does to its thread (namespaces, capabilities, priorities) is never
// seen by other goroutines, also when it could not be undone. Processes that fn
// starts inherit the thread's state.
func OnThread(fn func() error) error {
	done := make(chan error, 1)
	go onThread(fn, done)
	return <-done
}

func onThread(fn func() error, done chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == os.Getpid() {
		// The main thread cannot end; it would be parked for ever in whatever
		// namespace fn left it, and /proc/PID would show that namespace. It is
		// held here, so the next goroutine gets another one.
		next := make(chan error, 1)
		go onThread(fn, next)
		done <- <-next
		runtime.UnlockOSThread()
		return
	}
	done <- fn()
	// The thread stays locked, so the runtime ends it with this goroutine.
}

// Namespace is a network namespace that is held open by a descriptor.
type Namespace struct {
	file  *os.File
	inode uint64
	own   bool // the process's own, which nobody has to enter
}

// Create makes a new namespace in which only lo is there, and up: a datagram socket
// that is bound to a loopback address before lo is up answers from another address
// for ever (the kernel then takes the address for none of its own, and forgets it as
// the source).
func Create() (*Namespace, error) {
	var ns *Namespace
	err := OnThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("new network namespace: %w", err)
		}
		lo, err := netlink.LinkByName("lo")
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		if err != nil {
			return fmt.Errorf("lo: %w", err)
		}
		ns, err = Current()
		return err
	})
	return ns, err
}

// Current returns the calling thread's namespace.
func Current() (*Namespace, error) { return open("/proc/thread-self/ns/net") }

// Own returns the namespace that this process is in. It never enters it, for which it
// would need CAP_SYS_ADMIN; so no thread of the process may be in another one.
func Own() (*Namespace, error) {
	n, err := open("/proc/self/ns/net")
	if err == nil {
		n.own = true
	}
	return n, err
}

// OfProcess returns the namespace that the process pid is in.
func OfProcess(pid int) (*Namespace, error) { return open(fmt.Sprintf("/proc/%d/ns/net", pid)) }

// FromFile takes over an open descriptor of a namespace.
func FromFile(f *os.File) (*Namespace, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	if kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE); err != nil || kind != unix.CLONE_NEWNET {
		f.Close()
		return nil, fmt.Errorf("descriptor %s is not a network namespace", f.Name())
	}
	return &Namespace{file: f, inode: st.Ino}, nil
}

func open(path string) (*Namespace, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return FromFile(os.NewFile(uintptr(fd), path))
}

// Inode identifies the namespace for as long as somebody holds it.
func (n *Namespace) Inode() uint64 { return n.inode }

// FD returns the descriptor, which stays the Namespace's.
func (n *Namespace) FD() int { return int(n.file.Fd()) }

// Close lets go of the namespace.
func (n *Namespace) Close() error { return n.file.Close() }

// Do runs fn inside the namespace, on a thread that ends with it.
func (n *Namespace) Do(fn func() error) error {
	return OnThread(func() error {
		if err := n.Enter(); err != nil {
			return err
		}
		return fn()
	})
}

// Enter moves the calling thread into the namespace for good. The caller must have
// locked it (or be inside OnThread).
func (n *Namespace) Enter() error {
	if n.own {
		return nil
	}
	if err := unix.Setns(n.FD(), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace %d: %w", n.inode, err)
	}
	return nil
}
