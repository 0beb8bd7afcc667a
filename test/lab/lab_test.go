package lab

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) { Main(m) }

// TestLeaksAreSeen leaves something of each kind behind: a check that finds
// nothing would pass every suite.
func TestLeaksAreSeen(t *testing.T) {
	Require(t, "ip", "nft")
	l := New(t)
	if left, err := l.Leaks(); err != nil || len(left) > 0 {
		t.Fatalf("in a new lab: %v, %v", left, err)
	}
	for _, c := range []struct {
		kind string
		make []string
	}{
		{"link", []string{"ip", "link", "add", "leak0", "type", "bridge"}},
		{"ruleset", []string{"nft", "add", "table", "inet", "leak"}},
		{"rule", []string{"ip", "rule", "add", "fwmark", "77", "lookup", "100"}},
		{"file", []string{"touch", "/run/leak"}},
		{"mount", []string{"mount", "-t", "tmpfs", "leak", "/var/log"}},
		{"process", []string{"sh", "-c", "setsid sleep 60 >/dev/null 2>&1 </dev/null &"}},
	} {
		before, err := l.Leaks()
		if err != nil {
			t.Fatal(err)
		}
		l.MustExec(t, c.make...)
		Eventually(t, 30*time.Second, "a leaked "+c.kind+" is seen", func() error {
			left, err := l.Leaks()
			if err == nil && len(left) <= len(before) {
				err = fmt.Errorf("%v", left)
			}
			return err
		})
	}
}

// TestLabEndsWithItsMaker: closing the pipe ends everything in the lab.
func TestLabEndsWithItsMaker(t *testing.T) {
	Require(t, "ip", "nft")
	l := New(t)
	n := l.Node(t, "somebody")
	p := n.Start(t, "sleep", "infinity")
	l.control.Close()
	select {
	case <-p.Done():
	case <-time.After(5 * time.Second):
		t.Errorf("a program outlived its lab")
	}
}

// TestNodes: two hosts find and reach each other by name, over both families.
func TestNodes(t *testing.T) {
	Require(t, "ip", "nft", "getent")
	w := NewWorld(t, Direct)
	a, b := w.Workload(t, "alpha", Spec{}), w.Workload(t, "beta", Spec{})
	b.Serve(t, 7000, func(c *net.TCPConn) {
		io.WriteString(c, c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().String())
	})
	if list := a.Resolve(t, "beta"); len(list) != 2 || list[0] != b.IPv4 || list[1] != b.IPv6 {
		t.Fatalf("beta is %v, want %v", list, b.Addrs())
	}
	for i, addr := range b.Addrs() {
		c := a.MustDial(t, netip.AddrPortFrom(addr, 7000))
		got, err := io.ReadAll(c)
		if want := a.Addrs()[i].String(); err != nil || string(got) != want {
			t.Errorf("over %s the server saw %q, want %s (%v)", addr, got, want, err)
		}
	}
	if r := a.Exec(t, "sh", "-c", "echo out; echo err >&2; exit 3"); r.Code != 3 || r.Stdout != "out\n" || r.Stderr != "err\n" {
		t.Errorf("exec: %+v", r)
	}
}

// TestNothingOutside: a lab leaves this machine as it was.
func TestNothingOutside(t *testing.T) {
	Require(t, "ip", "nft")
	read := func() string {
		var b strings.Builder
		for _, file := range []string{"/proc/self/mountinfo", "/etc/resolv.conf", "/etc/hosts"} {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			b.Write(text)
		}
		return b.String()
	}
	before := read()
	l := New(t)
	l.Node(t, "x")
	if read() != before {
		t.Errorf("a lab changed what is outside of it")
	}
}
