package agent

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/agent/netns"
	"golang.org/x/sys/unix"
)

// Outside says where proxies of pods are, when that is not where the agent is: an agent
// in a container ends with everything in its control group and its mounts, and its
// proxies must not. The agent needs the node's process numbers (hostPID), and root.
type Outside struct {
	// Runtime is the socket of the container runtime: whoever serves it has the mounts
	// that proxies have, and in which the paths of network namespaces are meant.
	Runtime string
	// Cgroup is where the node's control groups are mounted: version 1, 2 or both. Each
	// pod's proxies get a group of their own there, cgroupFolder/ID. "": they stay in the
	// agent's.
	Cgroup string
	// Memory bounds a pod's proxies, in bytes; 0 does not.
	Memory int64

	folder string // cgroupFolder

	mu     sync.Mutex
	mounts *os.File // a mount namespace; it is the node's for as long as that runs
}

// cgroupFolder is what is ours in every hierarchy.
const cgroupFolder = "assay"

// in runs fn on a thread of its own that has the runtime's mounts; without an Outside it
// has the agent's.
func (o *Outside) in(fn func() error) error {
	return netns.OnThread(func() error {
		if err := o.enter(); err != nil {
			return err
		}
		return fn()
	})
}

// enter gives the runtime's mounts to the calling thread, which must end with its caller.
func (o *Outside) enter() error {
	if o == nil {
		return nil
	}
	file, err := o.mountNamespace()
	if err == nil {
		err = unix.Unshare(unix.CLONE_FS)
	}
	if err == nil {
		err = unix.Setns(int(file.Fd()), unix.CLONE_NEWNS)
	}
	if err != nil {
		return &assay.Error{Kind: assay.Unavailable, Op: "enter the mounts of whoever serves " + o.Runtime, Err: err,
			Remedy: "see that the runtime runs, and that the agent is privileged and has hostPID"}
	}
	return nil
}

func (o *Outside) mountNamespace() (*os.File, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.mounts != nil {
		return o.mounts, nil
	}
	conn, err := net.Dial("unix", o.Runtime)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var failed error
	if err := raw.Control(func(fd uintptr) {
		cred, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil || failed != nil {
		return nil, errors.Join(err, failed)
	}
	if cred.Pid == 0 {
		return nil, errors.New("its process is not among those that the agent sees: hostPID is missing")
	}
	// While the connection is open the number may still have been given to another; a
	// runtime that ends just now is noticed by its socket.
	o.mounts, err = os.Open(fmt.Sprintf("/proc/%d/ns/mnt", cred.Pid))
	return o.mounts, err
}

// hierarchy is a mounted tree of control groups.
type hierarchy struct {
	dir string
	v2  bool
}

// hierarchies lists those that are mounted at or below Cgroup.
func (o *Outside) hierarchies() ([]hierarchy, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var list []hierarchy
	for line := range strings.Lines(string(text)) {
		mount, kind, _ := strings.Cut(line, " - ")
		where, what := strings.Fields(mount), strings.Fields(kind)
		if len(where) < 5 || len(what) == 0 || what[0] != "cgroup" && what[0] != "cgroup2" {
			continue
		}
		root, dir := where[3], where[4]
		if dir != o.Cgroup && !strings.HasPrefix(dir, strings.TrimSuffix(o.Cgroup, "/")+"/") {
			continue
		}
		if root != "/" {
			return nil, &assay.Error{Kind: assay.Invalid, Op: "use the control groups at " + dir, Err: fmt.Errorf("they are those below %s alone", root),
				Remedy: "give the agent the node's /sys/fs/cgroup (a hostPath volume), and its path with --cgroup"}
		}
		list = append(list, hierarchy{dir, what[0] == "cgroup2"})
	}
	if len(list) == 0 {
		return nil, &assay.Error{Kind: assay.NotFound, Op: "use the control groups at " + o.Cgroup, Err: errors.New("none are mounted there"),
			Remedy: "give the agent the node's /sys/fs/cgroup (a hostPath volume), and its path with --cgroup"}
	}
	return list, nil
}

// group is one workload's control group in every hierarchy.
type group struct {
	id     string
	folder string
	list   []hierarchy
}

func (g *group) dir(h hierarchy) string { return filepath.Join(h.dir, g.folder, g.id) }

func (o *Outside) ours() string { return cmp.Or(o.folder, cgroupFolder) }

// group makes the control group of a workload, which may be there; nil without any.
// limited says whether it bounds memory as it should.
func (o *Outside) group(id string) (g *group, limited error, err error) {
	if o == nil || o.Cgroup == "" {
		return nil, nil, nil
	}
	list, err := o.hierarchies()
	if err != nil {
		return nil, nil, err
	}
	g = &group{id, o.ours(), list}
	limited = errors.New("no hierarchy has the memory controller")
	for _, h := range list {
		if h.v2 {
			delegateMemory(h.dir)
		}
		for _, dir := range []string{filepath.Join(h.dir, g.folder), g.dir(h)} {
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return nil, nil, err
			}
			if err := inheritProcessors(dir); err != nil {
				return nil, nil, err
			}
			if h.v2 && dir != g.dir(h) {
				delegateMemory(dir)
			}
		}
		if err := o.limit(g.dir(h)); err == nil {
			limited = nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			limited = err
		}
	}
	if o.Memory == 0 {
		limited = nil
	}
	return g, limited, nil
}

// limit bounds memory, where dir has that controller: by either version's file.
func (o *Outside) limit(dir string) error {
	value := strconv.FormatInt(o.Memory, 10)
	if o.Memory == 0 {
		value = "-1"
	}
	err := write(filepath.Join(dir, "memory.limit_in_bytes"), value)
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if o.Memory == 0 {
		value = "max"
	}
	return write(filepath.Join(dir, "memory.max"), value)
}

// write writes to a file that must be there: the kernel makes those of control groups.
func write(file, text string) error {
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// delegateMemory lets groups below dir bound memory (version 2). Where the controller is
// version 1's there is nothing to give.
func delegateMemory(dir string) {
	have, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err == nil && bytes.Contains(have, []byte("memory")) {
		_ = write(filepath.Join(dir, "cgroup.subtree_control"), "+memory") // the limit says whether it helped
	}
}

// inheritProcessors gives a new group of the cpuset hierarchy what its parent has;
// without, nothing can run in it (version 1).
func inheritProcessors(dir string) error {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		file := filepath.Join(dir, name)
		if now, err := os.ReadFile(file); err != nil || len(bytes.TrimSpace(now)) > 0 {
			continue
		}
		parent, err := os.ReadFile(filepath.Join(filepath.Dir(dir), name))
		if err == nil && len(bytes.TrimSpace(parent)) > 0 {
			err = write(file, string(parent))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// enter moves the calling thread, and so what it starts, into the groups of version 1.
func (g *group) enter() error {
	if g == nil {
		return nil
	}
	for _, h := range g.list {
		if h.v2 {
			continue
		}
		if err := write(filepath.Join(g.dir(h), "tasks"), strconv.Itoa(unix.Gettid())); err != nil {
			return fmt.Errorf("join control group: %w", err)
		}
	}
	return nil
}

// open opens the group of version 2, which moves no single threads: a process is born in
// it. It is nil without one.
func (g *group) open() (*os.File, error) {
	if g == nil {
		return nil, nil
	}
	for _, h := range g.list {
		if h.v2 {
			return os.Open(g.dir(h))
		}
	}
	return nil, nil
}

// removeGroup removes a workload's group, which its processes have left or soon have.
func (o *Outside) removeGroup(id string) error {
	if o == nil || o.Cgroup == "" {
		return nil
	}
	list, err := o.hierarchies()
	if err != nil {
		return err
	}
	g := &group{id, o.ours(), list}
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		var failed error
		for _, h := range list {
			if err := unix.Rmdir(g.dir(h)); err != nil && err != unix.ENOENT {
				failed = errors.Join(failed, &fs.PathError{Op: "rmdir", Path: g.dir(h), Err: err})
			}
		}
		if failed == nil || time.Now().After(deadline) {
			return failed
		}
	}
}

// groups lists the workloads that have a group.
func (o *Outside) groups() []string {
	if o == nil || o.Cgroup == "" {
		return nil
	}
	list, err := o.hierarchies()
	if err != nil {
		return nil
	}
	var ids []string
	for _, h := range list {
		entries, _ := os.ReadDir(filepath.Join(h.dir, o.ours()))
		for _, e := range entries {
			if e.IsDir() {
				ids = append(ids, e.Name())
			}
		}
	}
	return ids
}

// environment is what the runtime of a proxy's language should know of the limit: it
// collects garbage before the kernel must end it.
func (o *Outside) environment() []string {
	if o == nil || o.Memory == 0 || o.Memory > math.MaxInt64/4 {
		return proxyEnv
	}
	return append([]string{"GOMEMLIMIT=" + strconv.FormatInt(o.Memory*3/4, 10)}, proxyEnv...)
}
