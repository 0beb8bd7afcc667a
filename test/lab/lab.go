package lab

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The uplink is the lab's network outside the mesh.
const (
	UplinkIPv4 = "10.90.0.1"
	UplinkIPv6 = "fd00:90::1"
	uplinkName = "uplink0"
)

// Lab is one machine inside this one. Its own Space is the host on which `assay
// up` runs.
type Lab struct {
	*Space
	Names *Names // DNS outside the mesh

	t       TB
	init    *exec.Cmd
	pidns   string // what /proc/PID/ns/pid links to for the lab's processes
	control io.Closer
	before  state

	mu    sync.Mutex
	nodes int
}

// New makes a lab that ends with the test.
func New(t TB) *Lab {
	t.Helper()
	Require(t)
	l, err := newLab(t)
	if l != nil {
		t.Cleanup(l.close)
	}
	if err != nil {
		t.Fatalf("make a lab: %v", err)
	}
	return l
}

func newLab(t TB) (*Lab, error) {
	dir, err := buildDir()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("/proc/self/exe", "lab")
	cmd.Env = []string{initEnv + "=" + dir, "GOMAXPROCS=1", "GODEBUG=madvdontneed=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET,
		Setpgid:    true, // a terminal's Ctrl-C is for the test, which ends the lab itself
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("namespaces: %w", err)
	}
	l := &Lab{t: t, init: cmd, control: in}
	line, _ := bufio.NewReader(out).ReadString('\n')
	if line != "ready\n" {
		return l, fmt.Errorf("process 1: %s", strings.TrimSpace(line))
	}
	if l.Space, err = OpenSpace(cmd.Process.Pid); err != nil {
		return l, err
	}
	if l.pidns, err = os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", cmd.Process.Pid)); err != nil {
		return l, err
	}
	if err := l.In(setUpUplink); err != nil {
		return l, fmt.Errorf("uplink: %w", err)
	}
	if l.Names, err = newNames(l.Space); err != nil {
		return l, fmt.Errorf("DNS: %w", err)
	}
	l.before, err = l.state()
	return l, err
}

func setUpUplink() error {
	// No waiting for duplicate address detection on links that we made.
	for _, which := range []string{"all", "default"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+which+"/accept_dad", []byte("0"), 0); err != nil {
			return err
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	// An address of its own: without one a bridge takes the lowest of its ports',
	// and every neighbour's memory is wrong when that port goes.
	mac := net.HardwareAddr{0x02, 0, 0, 0x90, 0, 1}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: uplinkName, HardwareAddr: mac}}
	if err := errors.Join(netlink.LinkSetUp(lo), netlink.LinkAdd(bridge)); err != nil {
		return err
	}
	return errors.Join(
		addAddr(bridge, UplinkIPv4+"/24"),
		addAddr(bridge, UplinkIPv6+"/64"),
		netlink.LinkSetUp(bridge))
}

func addAddr(link netlink.Link, prefix string) error {
	a, err := netlink.ParseAddr(prefix)
	if err != nil {
		return err
	}
	a.Flags = unix.IFA_F_NODAD
	if err := netlink.AddrAdd(link, a); err != nil {
		return fmt.Errorf("address %s: %w", prefix, err)
	}
	return nil
}

// close ends everything in the lab at once.
func (l *Lab) close() {
	if l.Names != nil {
		l.Names.Close()
	}
	l.control.Close()
	ended := time.AfterFunc(5*time.Second, func() { l.init.Process.Kill() })
	l.init.Wait()
	ended.Stop()
	if l.Space != nil {
		l.Space.Close()
	}
}

// Path is where this process sees a path of the lab.
func (l *Lab) Path(inside string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", l.init.Process.Pid), inside)
}

// Write makes a file (and its folder) in the lab and returns its path there.
func (l *Lab) Write(t TB, inside, text string) string {
	t.Helper()
	file := l.Path(inside)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatalf("%v", err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatalf("%v", err)
	}
	return inside
}

// Dir makes a folder in the lab, owned by a user ("" is root), and returns its
// path there.
func (l *Lab) Dir(t TB, inside, user string) string {
	t.Helper()
	if err := os.MkdirAll(l.Path(inside), 0o755); err != nil {
		t.Fatalf("%v", err)
	}
	if user != "" {
		l.MustExec(t, "chown", user, inside)
	}
	return inside
}
