package wire

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// namespaces runs f with a thread in each of two fresh network namespaces that a veth
// pair joins: here has 192.0.2.1 and its links, there has 192.0.2.2.
func namespaces(t *testing.T, f func(here, there func(func()))) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
	type thread struct {
		work chan func()
		tid  int
	}
	start := func() *thread {
		th := &thread{work: make(chan func())}
		ready := make(chan error)
		go func() {
			runtime.LockOSThread() // never unlocked: the thread ends with its namespace
			err := unix.Unshare(unix.CLONE_NEWNET)
			th.tid = unix.Gettid()
			ready <- err
			for f := range th.work {
				f()
			}
		}()
		if err := <-ready; err != nil {
			t.Skipf("network namespaces: %v", err)
		}
		return th
	}
	do := func(th *thread) func(func()) {
		return func(f func()) {
			done := make(chan struct{})
			th.work <- func() { defer close(done); f() }
			<-done
		}
	}
	a, b := start(), start()
	defer close(a.work)
	defer close(b.work)
	must := func(err error) {
		if err != nil {
			t.Error(err)
			runtime.Goexit()
		}
	}
	up := func(name, addr string) {
		link, err := netlink.LinkByName(name)
		must(err)
		ip, err := netlink.ParseAddr(addr)
		must(err)
		must(netlink.AddrAdd(link, ip))
		must(netlink.LinkSetUp(link))
		lo, err := netlink.LinkByName("lo")
		must(err)
		must(netlink.LinkSetUp(lo))
	}
	do(a)(func() {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "one"
		must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "two", PeerNamespace: netlink.NsFd(mustOpen(t, fmt.Sprintf("/proc/self/task/%d/ns/net", b.tid)))}))
		up("one", "192.0.2.1/24")
	})
	do(b)(func() { up("two", "192.0.2.2/24") })
	f(do(a), do(b))
}

func mustOpen(t *testing.T, path string) int {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Error(err)
		runtime.Goexit()
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

func TestCapture(t *testing.T) {
	namespaces(t, func(here, there func(func())) {
		var (
			in       = NewInspector(marker)
			capture  *Capture
			servers  [2]net.Listener
			loopback net.Listener
			err      error
			wg       sync.WaitGroup
		)
		here(func() {
			if capture, err = Open(in); err != nil {
				return
			}
			loopback, err = net.Listen("tcp", "127.0.0.1:0")
		})
		if err != nil {
			t.Fatal(err)
		}
		defer capture.Close()
		there(func() {
			for i := range servers {
				if servers[i], err = net.Listen("tcp", "192.0.2.2:0"); err != nil {
					return
				}
			}
		})
		if err != nil {
			t.Fatal(err)
		}
		echo := func(ln net.Listener) {
			conn, err := ln.Accept()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			io.Copy(conn, conn)
		}
		for _, ln := range []net.Listener{servers[0], servers[1], loopback} {
			defer ln.Close()
			wg.Go(func() { echo(ln) })
		}
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		done := make(chan error, 1)
		go func() { done <- capture.Run(ctx) }()

		payload := strings.Repeat("x", 100_000) + marker
		say := func(conn net.Conn) {
			defer conn.Close()
			wg.Go(func() { io.WriteString(conn, payload) })
			if _, err := io.ReadFull(conn, make([]byte, len(payload))); err != nil {
				t.Error(err)
			}
		}
		dial := func(ln net.Listener) (conn net.Conn) {
			here(func() { conn, err = net.Dial("tcp", ln.Addr().String()) })
			if err != nil {
				t.Fatal(err)
			}
			return conn
		}
		say(dial(servers[0]))
		say(dial(loopback))
		// Real TLS, relayed byte by byte as it was recorded, in both directions.
		for _, s := range record(t, &tls.Config{}, &tls.Config{}, payload) {
			if s.up {
				func() {
					conn := dial(servers[1])
					defer conn.Close()
					io.WriteString(conn, s.data)
					io.ReadFull(conn, make([]byte, len(s.data)))
				}()
				break
			}
		}
		wg.Wait()
		stop()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		r := in.Report()
		if len(r.Conns) != 2 || r.Missed+r.Cut != 0 {
			t.Fatalf("want the two connections that crossed the link, whole: %+v", r)
		}
		for _, c := range r.Conns {
			clear := c.Server.String() == servers[0].Addr().String()
			if c.Incomplete || clear != (c.Clear() != "") || clear != (len(c.Found) == 1) {
				t.Errorf("%+v", c)
			}
			if clear && c.Down.Bytes != uint64(len(payload)) {
				t.Errorf("%d bytes of %d seen", c.Down.Bytes, len(payload))
			}
			if !clear && (c.Up.Speaks != "tls" || !c.Hello.Seen) {
				t.Errorf("TLS not recognised: %+v", c)
			}
		}
	})
}
