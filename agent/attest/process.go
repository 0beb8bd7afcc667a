package attest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process is one process, for as long as it is held the same one. Wait may be called
// by one goroutine at a time, everything else by any.
type Process struct {
	file  *os.File // the pidfd
	pid   int
	start uint64
}

// ErrGone is returned for a process that has ended.
var ErrGone = errors.New("the process has ended")

// Open holds the process that has the number pid now.
func Open(pid int) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err == unix.ESRCH {
		return nil, fmt.Errorf("process %d: %w", pid, ErrGone)
	}
	if err != nil {
		return nil, fmt.Errorf("process %d: pidfd: %w", pid, err)
	}
	p := &Process{file: os.NewFile(uintptr(fd), "pidfd"), pid: pid}
	if p.start, err = startTime(pid); err == nil {
		err = p.check() // still there: the start time is its own
	}
	if err != nil {
		p.file.Close()
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	return p, nil
}

// FromPidfd takes over a pidfd, also with an error.
func FromPidfd(f *os.File) (*Process, error) {
	defer f.Close()
	given := int(f.Fd())
	pid, err := pidOf(given)
	if err != nil {
		return nil, err
	}
	// Another descriptor, for the runtime's poller: waiting for many processes costs no
	// threads. The given one stays blocking, because it may be shared with somebody who
	// waits by it.
	p, err := Open(pid)
	if err != nil {
		return nil, err
	}
	if ended(given) { // so the number may have been another's when it was opened
		p.Close()
		return nil, fmt.Errorf("process %d: %w", pid, ErrGone)
	}
	return p, nil
}

// Reopen holds the process pid if it is the one that started at start (see Start),
// and returns ErrGone otherwise.
func Reopen(pid int, start uint64) (*Process, error) {
	p, err := Open(pid)
	if err != nil {
		return nil, err
	}
	if p.start != start {
		p.Close()
		return nil, fmt.Errorf("process %d: %w; another one has its number", pid, ErrGone)
	}
	return p, nil
}

// PID is the process's number, in the caller's namespace.
func (p *Process) PID() int { return p.pid }

// Start is when it started, in clock ticks since the machine did (proc(5), field
// 22). With the number it names the process for as long as the machine runs.
func (p *Process) Start() uint64 { return p.start }

// Close lets go of it.
func (p *Process) Close() error { return p.file.Close() }

// Alive reports whether it runs. A zombie does not.
func (p *Process) Alive() bool { return p.check() == nil }

// Signal sends a signal to this process and no other.
func (p *Process) Signal(sig syscall.Signal) error {
	return p.control(func(fd int) error {
		err := unix.PidfdSendSignal(fd, sig, nil, 0)
		if err == unix.ESRCH {
			return ErrGone
		}
		return err
	})
}

// Wait returns nil when the process has ended, and the context's cause when that
// came first.
func (p *Process) Wait(ctx context.Context) error {
	p.file.SetReadDeadline(time.Time{})
	stop := context.AfterFunc(ctx, p.interrupt)
	defer stop()
	raw, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	err = raw.Read(func(fd uintptr) bool { return ended(int(fd)) })
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func (p *Process) interrupt() { p.file.SetReadDeadline(time.Unix(1, 0)) }

// Socket returns a copy of the process's socket that has this inode, which the caller
// closes. It needs what tracing the process needs (ptrace(2)).
func (p *Process) Socket(inode uint64) (int, error) {
	dir := fmt.Sprintf("/proc/%d/fd", p.pid)
	names, err := os.ReadDir(dir)
	if err != nil {
		return -1, fmt.Errorf("process %d: descriptors: %w", p.pid, err)
	}
	want := fmt.Sprintf("socket:[%d]", inode)
	for _, e := range names {
		if target, err := os.Readlink(dir + "/" + e.Name()); err != nil || target != want {
			continue
		}
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		got := -1
		err = p.control(func(fd int) (err error) {
			got, err = unix.PidfdGetfd(fd, n, 0)
			return err
		})
		if err != nil {
			return -1, fmt.Errorf("process %d: descriptor %d: %w", p.pid, n, err)
		}
		var st unix.Stat_t
		if err := unix.Fstat(got, &st); err == nil && st.Ino == inode {
			return got, nil
		}
		unix.Close(got) // it was closed and used again in between
	}
	return -1, fmt.Errorf("process %d: has no socket %d", p.pid, inode)
}

// File returns a copy of the pidfd, to send to another process.
func (p *Process) File() (*os.File, error) {
	var f *os.File
	err := p.control(func(fd int) error {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err == nil {
			f = os.NewFile(uintptr(dup), "pidfd")
		}
		return err
	})
	return f, err
}

func (p *Process) control(fn func(fd int) error) error {
	raw, err := p.file.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = fn(int(fd)) }); err != nil {
		return err
	}
	return failed
}

func (p *Process) check() error {
	return p.control(func(fd int) error {
		if ended(fd) {
			return ErrGone
		}
		return nil
	})
}

// ended asks without waiting.
func ended(fd int) bool {
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(poll, 0)
		if err != unix.EINTR {
			return err == nil && n > 0
		}
	}
}

// Facts are what the kernel says about a process.
type Facts struct {
	PID    int
	Start  uint64
	UID    uint32
	NetNS  uint64 // inode of its network namespace
	CGroup string // path in the first hierarchy of /proc/PID/cgroup that names one
	Exe    string // path of its executable, for people
	// ExeID changes when the process executes another file.
	ExeID FileID
}

// Facts reads them. They all belong to this process, or it returns ErrGone.
func (p *Process) Facts() (Facts, error) {
	f := Facts{PID: p.pid, Start: p.start}
	dir := fmt.Sprintf("/proc/%d/", p.pid)
	err := func() error {
		var st unix.Stat_t
		if err := unix.Stat(dir+"ns/net", &st); err != nil {
			return fmt.Errorf("network namespace: %w", err)
		}
		f.NetNS = st.Ino
		if err := unix.Stat(dir, &st); err != nil {
			return err
		}
		f.UID = st.Uid
		status, err := os.ReadFile(dir + "status")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(status)) {
			// The folder's owner is root when the process is not dumpable.
			if v, ok := strings.CutPrefix(line, "Uid:"); ok {
				if field := strings.Fields(v); len(field) > 1 {
					uid, err := strconv.ParseUint(field[1], 10, 32)
					if err != nil {
						return err
					}
					f.UID = uint32(uid)
				}
			}
		}
		if b, err := os.ReadFile(dir + "cgroup"); err == nil {
			f.CGroup = cgroup(string(b))
		}
		if f.Exe, err = os.Readlink(dir + "exe"); err != nil {
			return fmt.Errorf("executable: %w", err)
		}
		if err := unix.Stat(dir+"exe", &st); err != nil {
			return fmt.Errorf("executable: %w", err)
		}
		f.ExeID = fileID(&st)
		return nil
	}()
	if gone := p.check(); gone != nil {
		err = gone
	}
	if err != nil {
		return Facts{}, fmt.Errorf("process %d: %w", p.pid, err)
	}
	return f, nil
}

// cgroup prefers the unified hierarchy.
func cgroup(text string) string {
	first := ""
	for line := range strings.Lines(text) {
		part := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(part) != 3 {
			continue
		}
		if part[0] == "0" {
			return part[2]
		}
		if first == "" {
			first = part[2]
		}
	}
	return first
}

func pidOf(pidfd int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", pidfd))
	if err != nil {
		return 0, fmt.Errorf("pidfd: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "Pid:"); ok {
			pid, err := strconv.Atoi(strings.TrimSpace(v))
			if err != nil || pid <= 0 {
				return 0, fmt.Errorf("pidfd: %w", ErrGone)
			}
			return pid, nil
		}
	}
	return 0, errors.New("descriptor is not a pidfd")
}

func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, ErrGone
	}
	if err != nil {
		return 0, err
	}
	// The second field is the command in parentheses, in which anything can be.
	i := bytes.LastIndexByte(b, ')')
	field := strings.Fields(string(b[i+1:]))
	const starttime = 22 - 3 // fields after the parenthesis begin with the third
	if i < 0 || len(field) <= starttime {
		return 0, fmt.Errorf("/proc/%d/stat: unknown form", pid)
	}
	return strconv.ParseUint(field[starttime], 10, 64)
}

// BootID changes with every start of the machine; process numbers and start times
// mean nothing across it.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}
