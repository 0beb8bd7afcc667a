package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"assay.dev"
	"assay.dev/agent/attest"
	"assay.dev/agent/netns"
	"assay.dev/link"
	"golang.org/x/sys/unix"
)

const (
	helloWithin  = 10 * time.Second // a proxy that says nothing is replaced
	redialWithin = 5 * time.Second  // so is one that lost its link and does not come back
	drainWithin  = 2 * time.Second
	// A proxy that lived this long may be replaced at once again.
	settledAfter = 10 * time.Second
	respawnFirst = 100 * time.Millisecond
	respawnMost  = 5 * time.Second
	maxProxyLog  = 1 << 20
)

// spawn starts a proxy in the workload's namespace: its own session, its own user,
// one capability, no new privileges, nothing open but the link. The executable is
// the file that was digested, whatever its path leads to meanwhile. A successor waits
// for its certificate before it accepts.
func (w *workload) spawn(successor bool) (_ *generation, err error) {
	exe, err := os.Open(w.a.cfg.Proxy)
	if err != nil {
		return nil, err
	}
	defer exe.Close()
	digest, _, err := w.a.digester.File(exe)
	if err != nil {
		return nil, err
	}
	// Out of the way of the descriptors 0 to 3 that the child gets.
	exeFD, err := unix.FcntlInt(exe.Fd(), unix.F_DUPFD_CLOEXEC, 16)
	if err != nil {
		return nil, err
	}
	defer unix.Close(exeFD)
	near, far, err := link.Pair()
	if err != nil {
		return nil, err
	}
	defer far.Close()
	defer func() {
		if err != nil {
			near.Close()
		}
	}()
	out, err := w.openLog()
	if err != nil {
		return nil, err
	}
	defer out.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()

	w.mu.Lock()
	uid := w.a.cfg.ProxyUIDs + w.rec.Number
	w.mu.Unlock()
	pid := 0
	outside := w.outside()
	group, limited, err := outside.group(w.id)
	if err != nil {
		return nil, fmt.Errorf("its control group: %w", err)
	}
	if limited != nil {
		w.log.Warn("the proxy's memory is not bounded", "err", limited)
	}
	birth, err := group.open()
	if err != nil {
		return nil, fmt.Errorf("its control group: %w", err)
	}
	sys := &syscall.SysProcAttr{Setsid: true, AmbientCaps: []uintptr{unix.CAP_NET_RAW}}
	if birth != nil {
		defer birth.Close()
		sys.UseCgroupFD, sys.CgroupFD = true, int(birth.Fd())
	}
	if uidMapped(uid) {
		sys.Credential = &syscall.Credential{Uid: uid, Gid: uid}
	}
	attr := &syscall.ProcAttr{Dir: "/", Files: []uintptr{null.Fd(), out.Fd(), out.Fd(), far.Fd()}, Env: w.environment(), Sys: sys}
	err = netns.OnThread(func() error {
		if err := group.enter(); err != nil {
			return err
		}
		if err := outside.enter(); err != nil {
			return err
		}
		if err := w.ns.Enter(); err != nil {
			return err
		}
		if err := confineThread(unix.CAP_NET_RAW, sys.Credential != nil); err != nil {
			return err
		}
		// Whatever the agent inherited and nobody marked: a table of descriptors of
		// the thread's own, in which all are closed on exec.
		if err := unix.CloseRange(3, math.MaxInt32, unix.CLOSE_RANGE_UNSHARE|unix.CLOSE_RANGE_CLOEXEC); err != nil {
			return fmt.Errorf("descriptors: %w", err)
		}
		// One word, for those who look at processes: a proxy takes no arguments.
		pid, err = syscall.ForkExec(fmt.Sprintf("/proc/self/fd/%d", exeFD), []string{proxyName + " " + w.id}, attr)
		return err
	})
	if err != nil {
		return nil, &assay.Error{Op: "start " + w.a.cfg.Proxy, Err: err, Remedy: "everybody must be able to execute it (chmod 755), and its file system must not be mounted noexec"}
	}
	proc, err := attest.Open(pid) // our child: the number is its own until it is reaped
	if err != nil {
		unix.Kill(pid, unix.SIGKILL)
		unix.Wait4(pid, nil, 0, nil)
		return nil, fmt.Errorf("start %s: %w%s", w.a.cfg.Proxy, err, w.logTail())
	}
	w.scoreProxy(pid)
	g := newGeneration(proc, digest, w.noun().Identity.TrustDomain)
	g.conn, g.successor = near, successor
	// Recorded before it is configured: a proxy that nobody configured ends by
	// itself when its link does.
	w.mu.Lock()
	w.rec.NetNS = w.ns.Inode()
	if successor {
		w.next = g
	} else {
		w.current = g
	}
	w.mu.Unlock()
	if err := w.saveGenerations(); err != nil {
		proc.Signal(syscall.SIGKILL)
		proc.Wait(context.Background())
		unix.Wait4(proc.PID(), nil, 0, nil)
		w.forget(g)
		return nil, err
	}
	w.log.Info("proxy started", "pid", proc.PID(), "digest", digest.Short(), "successor", successor)
	return g, nil
}

// outside is where a pod's proxies are; nil for all others.
func (w *workload) outside() *Outside {
	if w.given {
		return w.a.cfg.Outside
	}
	return nil
}

func (w *workload) environment() []string {
	if own := w.a.cfg.Own; own != nil {
		return own.environment()
	}
	return w.outside().environment()
}

// scoreProxy has the kernel think of a pod's proxy as it does of the pod, when memory is
// short.
func (w *workload) scoreProxy(pid int) {
	w.mu.Lock()
	score := 0
	if w.given {
		score = w.rec.Given.OOMScore
	}
	w.mu.Unlock()
	if !w.given || w.a.cfg.Outside == nil {
		return
	}
	if err := write(fmt.Sprintf("/proc/%d/oom_score_adj", pid), strconv.Itoa(score)); err != nil {
		w.log.Warn("the proxy has not the pod's oom_score_adj", "want", score, "err", err)
	}
}

// confineThread takes all capabilities but one out of the thread's bounding set, so
// that nothing it executes can have them, also not as root, and forbids to gain any. An
// agent in a pod may not do the first; for another user the second is enough.
func confineThread(keep uintptr, another bool) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no new privileges: %w", err)
	}
	for c := uintptr(0); c <= unix.CAP_LAST_CAP; c++ {
		if c == keep {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if err == unix.EPERM && another {
			return nil
		}
		if err != nil && err != unix.EINVAL {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	return nil
}

// uidMapped reports whether the user namespace has uid.
func uidMapped(uid uint32) bool {
	for _, file := range []string{"/proc/self/uid_map", "/proc/self/gid_map"} {
		b, err := os.ReadFile(file)
		if err != nil {
			return false
		}
		found := false
		for line := range strings.Lines(string(b)) {
			var inside, outside, n uint64
			if _, err := fmt.Sscan(line, &inside, &outside, &n); err == nil {
				found = found || uint64(uid) >= inside && uint64(uid) < inside+n
			}
		}
		if !found {
			return false
		}
	}
	return true
}

// openLog opens the file for the proxy's standard error. It is a file and no pipe,
// because the proxy outlives the agent.
func (w *workload) openLog() (*os.File, error) {
	f, err := os.OpenFile(w.a.store.path("workloads", w.id+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && st.Size() > maxProxyLog {
		err = f.Truncate(0)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	w.mu.Lock()
	w.logFrom = st.Size()
	if st.Size() > maxProxyLog {
		w.logFrom = 0
	}
	w.mu.Unlock()
	return f, nil
}

// logTail is the last lines that this proxy wrote, for whoever reads why it died.
func (w *workload) logTail() string {
	f, err := os.Open(w.a.store.path("workloads", w.id+".log"))
	if err != nil {
		return ""
	}
	defer f.Close()
	const most = 2048
	w.mu.Lock()
	from := w.logFrom
	w.mu.Unlock()
	if st, err := f.Stat(); err == nil {
		from = max(from, st.Size()-most)
	}
	if _, err := f.Seek(from, io.SeekStart); err != nil {
		return ""
	}
	b, err := io.ReadAll(f)
	if err != nil || len(b) == 0 {
		return ""
	}
	return string(bytes.TrimSpace(b))
}

// findProxy looks beside the running executable, then in PATH.
func findProxy() (string, error) {
	if exe, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(exe), proxyName)
		if st, err := os.Stat(beside); err == nil && st.Mode().IsRegular() {
			return beside, nil
		}
	}
	path, err := exec.LookPath(proxyName)
	if err != nil {
		return "", &assay.Error{Kind: assay.NotFound, Op: "find " + proxyName, Err: errors.New("it is neither beside this executable nor in PATH"), Remedy: "install both commands in one folder"}
	}
	return filepath.Abs(path)
}

// proxyEnv is all that a proxy finds in its environment. Goroutines that begin with the average
// stack of the others begin with 8 KiB when there are few, and keep that; they need half of it.
var proxyEnv = []string{"GODEBUG=adaptivestackstart=0"}
