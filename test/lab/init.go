package lab

import (
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Where things are inside every lab.
const (
	root   = "/run/lab"
	BinDir = root + "/bin" // what Build made, read-only
	etcDir = root + "/etc" // files mounted over those in /etc
)

const initEnv = "ASSAY_LAB_INIT"

// hidden are folders in which Debian's programs keep state: each lab sees them
// empty and its own.
var hidden = []string{"/run", "/tmp", "/var/tmp", "/var/spool", "/var/log", "/var/lib/nginx", "/var/lib/mysql", "/dev/shm"}

// Init turns this process into process 1 of a lab and never returns, when it was
// started to be one; else it does nothing. Programs other than tests call it
// first in main.
func Init() {
	dir := os.Getenv(initEnv)
	if dir == "" {
		return
	}
	if err := prepare(dir); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	BeInit()
}

// BeInit is the life of a process 1 that has made its namespaces: it says "ready" on
// its standard output, and ends with whoever holds the other end of its standard input.
func BeInit() {
	fmt.Println("ready")
	go untilParentEnds()
	reap()
}

// prepare makes the private folders of a lab. dir is where builds are.
func prepare(dir string) error {
	mount := func(source, target, kind string, flags uintptr, data string) error {
		if err := unix.Mount(source, target, kind, flags, data); err != nil {
			return fmt.Errorf("mount %s: %w", target, err)
		}
		return nil
	}
	if err := mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return err
	}
	// The builds may lie under a folder that is about to be hidden.
	bin, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dir, err)
	}
	for _, dir := range hidden {
		if _, err := os.Stat(dir); err != nil {
			continue
		}
		if err := mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
			return err
		}
	}
	for _, dir := range []string{"/tmp", "/var/tmp", "/dev/shm"} {
		if err := os.Chmod(dir, 0o1777); err != nil {
			return err
		}
	}
	for _, dir := range []string{BinDir, etcDir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := mount(fmt.Sprintf("/proc/self/fd/%d", bin), BinDir, "", unix.MS_BIND, ""); err != nil {
		return err
	}
	if err := mount("", BinDir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return err
	}
	unix.Close(bin)
	for name, text := range map[string]string{
		"resolv.conf":   "nameserver " + UplinkIPv4 + "\noptions timeout:2 attempts:2\n",
		"hosts":         "127.0.0.1 localhost\n::1 localhost\n",
		"nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nservices: files\nprotocols: files\n",
	} {
		file := filepath.Join(etcDir, name)
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			return err
		}
		if _, err := os.Stat("/etc/" + name); err != nil {
			continue
		}
		if err := mount(file, "/etc/"+name, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	return nil
}

// untilParentEnds ends everything with whoever made it: its end of the pipe closes.
func untilParentEnds() {
	io.Copy(io.Discard, os.Stdin)
	os.Exit(0)
}

// reap is what process 1 is for: orphans of its programs end here.
func reap() {
	child := make(chan os.Signal, 1)
	signal.Notify(child, unix.SIGCHLD)
	for range child {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if pid <= 0 && err != unix.EINTR {
				break
			}
		}
	}
}
