package kubernetes

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroupFolder is the only folder in a cgroup hierarchy that is ours; each
// cluster has a group in it, and each machine one in that.
const cgroupFolder = "assay-kubernetes"

// hierarchy is a mounted cgroup file system.
type hierarchy struct {
	mount string
	v2    bool
}

// hierarchies lists the cgroup file systems as this process sees them.
func hierarchies() ([]hierarchy, error) {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var list []hierarchy
	for line := range strings.Lines(string(info)) {
		mount, kind, ok := strings.Cut(line, " - ")
		where, what := strings.Fields(mount), strings.Fields(kind)
		if !ok || len(where) < 5 || len(what) == 0 || !strings.HasPrefix(what[0], "cgroup") {
			continue
		}
		list = append(list, hierarchy{mount: where[4], v2: what[0] == "cgroup2"})
	}
	if len(list) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted: mount one at /sys/fs/cgroup")
	}
	return list, nil
}

// cgroup is a group of the same name in every hierarchy.
type cgroup struct {
	name string // below cgroupFolder
	in   []hierarchy
}

func newCgroup(name string) (*cgroup, error) {
	in, err := hierarchies()
	if err != nil {
		return nil, err
	}
	g := &cgroup{name, in}
	for _, h := range in {
		dir := h.mount
		for _, part := range strings.Split(filepath.Join(cgroupFolder, name), "/") {
			if h.v2 {
				delegate(dir)
			}
			dir = filepath.Join(dir, part)
			if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
				return nil, fmt.Errorf("make cgroup: %w", err)
			}
			if err := inheritCPUs(dir); err != nil {
				return nil, err
			}
		}
	}
	return g, nil
}

// delegate lets the groups below dir use the controllers that dir has.
func delegate(dir string) {
	have, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	for _, controller := range strings.Fields(string(have)) {
		// One by one: a controller that cannot be delegated must not hold back the others.
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0)
	}
}

// inheritCPUs gives a new group of the cpuset hierarchy its parent's processors;
// without, nothing can run in it (version 1 only).
func inheritCPUs(dir string) error {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		file := filepath.Join(dir, name)
		if now, err := os.ReadFile(file); err != nil || len(bytes.TrimSpace(now)) > 0 {
			continue
		}
		parent, err := os.ReadFile(filepath.Join(filepath.Dir(dir), name))
		if err == nil && len(bytes.TrimSpace(parent)) > 0 {
			err = os.WriteFile(file, parent, 0)
		}
		if err != nil {
			return fmt.Errorf("cgroup %s: %w", dir, err)
		}
	}
	return nil
}

func (g *cgroup) dir(h hierarchy) string { return filepath.Join(h.mount, cgroupFolder, g.name) }

// enter moves the calling thread, and so the processes that it starts, into the
// group. Version 2 moves no single threads: there the new process joins (open).
func (g *cgroup) enter() error {
	tid := strconv.Itoa(unix.Gettid())
	for _, h := range g.in {
		if h.v2 {
			continue
		}
		if err := os.WriteFile(filepath.Join(g.dir(h), "tasks"), []byte(tid), 0); err != nil {
			return fmt.Errorf("join cgroup: %w", err)
		}
	}
	return nil
}

// initGroup is where a machine's own programs are under version 2, which wants no
// processes in a group that has others below it.
const initGroup = "machine"

// open opens the version 2 group that a machine's programs are born in, nil if
// there is none.
func (g *cgroup) open() (*os.File, error) {
	for _, h := range g.in {
		if !h.v2 {
			continue
		}
		if f, err := os.Open(filepath.Join(g.dir(h), initGroup)); err == nil {
			return f, nil
		}
		return os.Open(g.dir(h))
	}
	return nil, nil
}

// processes lists what is in the group or below it.
func (g *cgroup) processes() []int {
	seen := map[int]bool{}
	var list []int
	for _, h := range g.in {
		filepath.WalkDir(g.dir(h), func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return nil
			}
			text, _ := os.ReadFile(filepath.Join(path, "cgroup.procs"))
			for _, field := range strings.Fields(string(text)) {
				if pid, err := strconv.Atoi(field); err == nil && pid > 0 && !seen[pid] {
					seen[pid] = true
					list = append(list, pid)
				}
			}
			return nil
		})
	}
	return list
}

// remove ends what is left in the group and removes it and everything below it.
func (g *cgroup) remove(within time.Duration) error {
	deadline := time.Now().Add(within)
	for {
		for _, pid := range g.processes() {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		var err error
		for _, h := range g.in {
			err = errors.Join(err, removeGroups(g.dir(h)))
		}
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("remove cgroups: %w", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	// Gone with the last cluster; refused, rightly, while there is another.
	for _, h := range g.in {
		_ = unix.Rmdir(filepath.Join(h.mount, cgroupFolder))
	}
	return nil
}

// removeGroups removes a group and those below it, the deepest first.
func removeGroups(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, removeGroups(filepath.Join(dir, e.Name())))
		}
	}
	if rm := unix.Rmdir(dir); rm != nil && rm != unix.ENOENT {
		err = errors.Join(err, &fs.PathError{Op: "rmdir", Path: dir, Err: rm})
	}
	return err
}
