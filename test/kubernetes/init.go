package kubernetes

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"assay.dev/test/lab"
)

const initEnv = "ASSAY_KUBERNETES_MACHINE"

// seat is what a machine's process 1 is told.
type seat struct {
	Name  string
	Dir   string // the machine's folder here
	Parts string // the programs' folder here
	Hosts string // /etc/hosts
}

// Where things are inside every machine.
const (
	partsDir = "/opt/kubernetes/bin"
	keysDir  = "/etc/kubernetes"
)

// disks are the folders that survive a machine's reboot, and that must not be on
// the overlay: containerd lays overlays of its own.
var disks = []string{
	"/var/lib/containerd", "/var/lib/kubelet", "/var/lib/etcd", "/var/lib/cni", "/var/lib/assay",
	"/var/log", "/etc/kubernetes", "/etc/cni/net.d", "/opt/cni/bin", "/opt/assay",
}

func init() {
	if os.Getenv(initEnv) != "" {
		runtime.LockOSThread() // the main thread's namespaces are the process's
	}
}

// Init turns this process into process 1 of a machine and never returns, when it
// was started to be one; else it does nothing. It is the first call in main.
func Init() {
	text := os.Getenv(initEnv)
	if text == "" {
		return
	}
	var s seat
	err := json.Unmarshal([]byte(text), &s)
	if err == nil {
		err = s.furnish()
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	lab.BeInit()
}

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	return nil
}

// furnish makes the machine's root folder and moves into it.
func (s *seat) furnish() error {
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("cgroup namespace: %w", err)
	}
	if err := unix.Sethostname([]byte(s.Name)); err != nil {
		return fmt.Errorf("host name: %w", err)
	}
	if err := mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	root, err := s.layOut()
	if err != nil {
		return err
	}
	if err := errors.Join(s.mountKernel(root), s.mountDisks(root), s.writeEtc(root)); err != nil {
		return err
	}
	if err := unix.Chdir(root); err != nil {
		return fmt.Errorf("enter %s: %w", root, err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change the root folder: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("let go of the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	// As systemd does: what one program mounts, all see.
	return mount("", "/", "", unix.MS_REC|unix.MS_SHARED, "")
}

// layOut mounts the root: this machine's own below, memory above.
func (s *seat) layOut() (string, error) {
	memory, root := filepath.Join(s.Dir, "memory"), filepath.Join(s.Dir, "root")
	for _, dir := range []string{memory, root} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", err
		}
	}
	if err := mount("tmpfs", memory, "tmpfs", 0, "mode=0755"); err != nil {
		return "", err
	}
	upper, work := filepath.Join(memory, "upper"), filepath.Join(memory, "work")
	if err := errors.Join(os.Mkdir(upper, 0o755), os.Mkdir(work, 0o755)); err != nil {
		return "", err
	}
	return root, mount("overlay", root, "overlay", 0, "lowerdir=/,upperdir="+upper+",workdir="+work)
}

// mountKernel mounts what the kernel shows of itself: processes, devices, the
// network's and the cgroups' view from inside the namespaces.
func (s *seat) mountKernel(root string) error {
	const tight = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	at := func(dir string) string { return filepath.Join(root, dir) }
	if err := errors.Join(
		mount("proc", at("proc"), "proc", tight, ""),
		mount("sysfs", at("sys"), "sysfs", tight, ""),
		mount("/dev", at("dev"), "", unix.MS_BIND|unix.MS_REC, ""),
		mount("tmpfs", at("run"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"),
		mount("tmpfs", at("tmp"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"),
	); err != nil {
		return err
	}
	// The kernel may lack it, and then nobody misses it.
	_ = mount("bpf", at("sys/fs/bpf"), "bpf", tight, "mode=0700")
	return s.mountCgroups(at("sys/fs/cgroup"), tight)
}

func (s *seat) mountCgroups(dir string, flags uintptr) error {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(own)), "\n")
	if len(lines) == 1 && strings.HasPrefix(lines[0], "0::") {
		if err := mount("cgroup2", dir, "cgroup2", flags, ""); err != nil {
			return err
		}
		return leaveTop(dir)
	}
	if err := mount("tmpfs", dir, "tmpfs", flags, "mode=0755"); err != nil {
		return err
	}
	for _, line := range lines {
		_, rest, _ := strings.Cut(line, ":")
		controllers, _, _ := strings.Cut(rest, ":")
		name, kind, option := controllers, "cgroup", controllers
		switch {
		case controllers == "":
			name, kind = "unified", "cgroup2"
		case strings.HasPrefix(controllers, "name="):
			name, option = strings.TrimPrefix(controllers, "name="), "none,"+controllers
		}
		at := filepath.Join(dir, name)
		if err := os.Mkdir(at, 0o755); err != nil {
			return err
		}
		if err := mount(kind, at, kind, flags, option); err != nil {
			return err
		}
		for _, one := range strings.Split(controllers, ",") {
			if kind == "cgroup" && strings.Contains(controllers, ",") {
				if err := os.Symlink(name, filepath.Join(dir, one)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// leaveTop moves process 1 out of the top group, so that the kubelet can give
// controllers to groups below it.
func leaveTop(dir string) error {
	leaf := filepath.Join(dir, initGroup)
	if err := os.Mkdir(leaf, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := os.WriteFile(filepath.Join(leaf, "cgroup.procs"), []byte("0"), 0); err != nil {
		return fmt.Errorf("move to cgroup %s: %w", initGroup, err)
	}
	delegate(dir)
	return nil
}

func (s *seat) mountDisks(root string) error {
	bind := func(source, inside string) error {
		target := filepath.Join(root, inside)
		if err := errors.Join(os.MkdirAll(source, 0o755), os.MkdirAll(target, 0o755)); err != nil {
			return err
		}
		return mount(source, target, "", unix.MS_BIND, "")
	}
	var errs error
	for _, dir := range disks {
		errs = errors.Join(errs, bind(filepath.Join(s.Dir, "disk", dir), dir))
	}
	return errors.Join(errs, bind(s.Parts, partsDir))
}

func (s *seat) writeEtc(root string) error {
	var errs error
	for name, text := range map[string]string{
		"hostname":      s.Name + "\n",
		"hosts":         s.Hosts,
		"resolv.conf":   "# there is nobody to ask outside the cluster\n",
		"nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nservices: files\nprotocols: files\n",
		"machine-id":    fmt.Sprintf("%x\n", fmt.Appendf(nil, "%-16.16s", s.Name)),
	} {
		file := filepath.Join(root, "etc", name)
		_ = os.Remove(file) // it may be a link to somewhere else
		errs = errors.Join(errs, os.WriteFile(file, []byte(text), 0o644))
	}
	return errs
}
