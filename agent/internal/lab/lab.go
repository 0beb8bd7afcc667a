// Package lab gives tests a host of their own: a new network and mount namespace in
// which they may do what an agent does, without touching the machine's.
package lab

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"assay.dev/agent/netns"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
)

const inside = "ASSAY_LAB"

// Main is a TestMain: it runs the tests again in namespaces of their own and looks
// for goroutines that they left behind. Without root it says so and passes, since
// nothing can be made then.
func Main(m *testing.M) {
	if os.Getenv(inside) != "" {
		if err := up(); err != nil {
			fmt.Fprintln(os.Stderr, "lab:", err)
			os.Exit(1)
		}
		goleak.VerifyTestMain(m)
		return
	}
	if os.Geteuid() != 0 {
		fmt.Println("lab: these tests need root: skipped")
		return
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		if exit, ok := err.(*exec.ExitError); ok {
			os.Exit(max(exit.ExitCode(), 1))
		}
		fmt.Fprintln(os.Stderr, "lab:", err)
		os.Exit(1)
	}
}

func up() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// Namespace makes a namespace that the test closes.
func Namespace(t testing.TB) *netns.Namespace {
	t.Helper()
	ns, err := netns.Create()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// Host sets up a bridge that the test removes.
func Host(t testing.TB, bridge string, prefixes, mesh []netip.Prefix) *netns.Host {
	t.Helper()
	h := &netns.Host{Bridge: bridge, Prefixes: prefixes, Mesh: mesh}
	t.Cleanup(func() {
		if err := h.Remove(); err != nil {
			t.Error(err)
		}
	})
	if err := h.Setup(); err != nil {
		t.Fatal(err)
	}
	return h
}

// In runs fn inside ns.
func In[T any](t testing.TB, ns *netns.Namespace, fn func() (T, error)) T {
	t.Helper()
	var v T
	if err := ns.Do(func() (err error) { v, err = fn(); return err }); err != nil {
		t.Fatal(err)
	}
	return v
}

// Listen listens inside ns.
func Listen(t testing.TB, ns *netns.Namespace, network, addr string) net.Listener {
	t.Helper()
	l := In(t, ns, func() (net.Listener, error) { return net.Listen(network, addr) })
	t.Cleanup(func() { l.Close() })
	return l
}

// Dial dials from inside ns.
func Dial(ns *netns.Namespace, addr string) (net.Conn, error) {
	var c net.Conn
	err := ns.Do(func() (err error) {
		c, err = net.DialTimeout("tcp", addr, 3*time.Second)
		return err
	})
	return c, err
}

// Eventually waits until ok, which is asked again and again, and fails the test
// after 30 seconds.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 seconds: %s", what)
		}
	}
}

// Prefixes parses a list.
func Prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// Addrs parses a list.
func Addrs(list ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// Lines counts the lines of text that contain part.
func Lines(text, part string) int {
	n := 0
	for line := range strings.Lines(text) {
		if strings.Contains(line, part) {
			n++
		}
	}
	return n
}
