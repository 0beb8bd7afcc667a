// Package joining answers the question that people ask before they join the mesh:
// what changes for my program? A list of observations is made by the same code on
// plain hosts and on workloads. Every difference must stand in the table of
// docs/joining.md, word for word and with its reason; what stands there and is no
// longer so is an error too.
package joining

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"assay.dev/test/lab"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { lab.Main(m) }

// Ports of the server. Each has a handler that the observation sets.
const (
	portText   = 7000 // spoken to in HTTP/1.1
	portBytes  = 7001 // spoken to in nothing known
	portSilent = 7002 // declared, nobody listens
	portOther  = 7003 // not declared, nobody listens
	portHidden = 7004 // not declared, somebody listens
)

// patience bounds every single step of an observation.
const patience = 10 * time.Second

// stage is what the observations are made on.
type stage struct {
	t       testing.TB
	w       *lab.World
	server  *lab.Workload
	client  *lab.Workload
	outside *lab.Node
	handler map[int]*atomic.Pointer[func(*net.TCPConn)]
}

func newStage(t *testing.T, mode lab.Mode) *stage {
	s := &stage{t: t, w: lab.NewWorld(t, mode), handler: map[int]*atomic.Pointer[func(*net.TCPConn)]{}}
	s.outside = s.w.Node(t, "outside.test")
	s.w.Names.Set("v4only.test", s.outside.IPv4)
	s.server = s.w.Workload(t, "target", lab.Spec{Ports: []int{portText, portBytes, portSilent}})
	s.client = s.w.Workload(t, "caller", lab.Spec{})
	for _, port := range []int{portText, portBytes, portHidden} {
		s.handler[port] = &atomic.Pointer[func(*net.TCPConn)]{}
		s.server.Serve(t, port, func(c *net.TCPConn) {
			if h := s.handler[port].Load(); h != nil {
				(*h)(c)
			}
		})
	}
	s.w.AwaitService(t, s.client, "target", portText)
	s.w.AwaitService(t, s.client, "target", portBytes)
	return s
}

// service is the server as its name leads to it; addr is by its own address.
func (s *stage) service(port int) netip.AddrPort { return s.client.Target(s.t, "target", port) }
func (s *stage) addr(port int) netip.AddrPort {
	return netip.AddrPortFrom(s.server.IPv4, uint16(port))
}

// talk makes one connection from the client and returns what the server's side
// and then the client's side have to say about it.
func (s *stage) talk(port int, server, client func(c *net.TCPConn) string) string {
	return s.talkTo(s.service(port), server, client)
}

func (s *stage) talkTo(to netip.AddrPort, server, client func(c *net.TCPConn) string) string {
	said := make(chan string, 1)
	var taken atomic.Bool
	handle := func(c *net.TCPConn) {
		// A client that is slow to speak may be about to listen: its proxy then has the server
		// greet it, on a connection that HTTP does not use.
		if to.Port() == portText && !spoken(c) {
			return
		}
		if !taken.CompareAndSwap(false, true) {
			return
		}
		c.SetDeadline(time.Now().Add(patience))
		said <- server(c)
	}
	h := s.handler[int(to.Port())]
	h.Store(&handle)
	defer h.Store(nil)
	c, err := s.client.Dial(to)
	if errors.Is(err, unix.ECONNRESET) {
		// The reset that follows a connection's beginning may win against Dial.
		return "the client sees ECONNRESET"
	}
	if err != nil {
		return "connect: " + name(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	mine := client(c)
	theirs := "(not connected)"
	select {
	case theirs = <-said:
	case <-time.After(patience):
	}
	return join(theirs, mine)
}

// spoken waits until the client has said something, and leaves it to be read.
func spoken(c *net.TCPConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return false
	}
	c.SetReadDeadline(time.Now().Add(patience))
	n := 0
	err = errors.Join(raw.Read(func(fd uintptr) bool {
		var failed error
		n, _, failed = unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK)
		return failed != unix.EAGAIN
	}), c.SetReadDeadline(time.Time{}))
	return err == nil && n > 0
}

func join(said ...string) string {
	var list []string
	for _, s := range said {
		if s != "" {
			list = append(list, s)
		}
	}
	return strings.Join(list, "; ")
}

func quiet(*net.TCPConn) string { return "" }

// name turns an error into a word that does not depend on addresses.
func name(err error) string {
	var errno syscall.Errno
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, io.EOF):
		return "EOF"
	case errors.Is(err, io.ErrUnexpectedEOF):
		return "EOF too early"
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "nothing"
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	}
	return err.Error()
}

// pace sorts a duration into what a person would call it.
func pace(d time.Duration) string {
	switch {
	case d < 500*time.Millisecond:
		return "at once"
	case d < 5*time.Second:
		return "after seconds"
	}
	return "after long"
}

// connect reports how connect() ends, and, when it succeeds, what the connection
// then says by itself.
func (s *stage) connect(to netip.AddrPort) string {
	began := time.Now()
	c, err := s.client.Dial(to)
	if errors.Is(err, unix.ECONNRESET) {
		return "connected, then ECONNRESET " + pace(time.Since(began))
	}
	if err != nil {
		return fmt.Sprintf("connect: %s %s", name(err), pace(time.Since(began)))
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	_, err = c.Read(make([]byte, 1))
	return fmt.Sprintf("connected, then %s %s", name(err), pace(time.Since(began)))
}

// readAll reads to the end and describes it.
func readAll(c *net.TCPConn) ([]byte, string) {
	b, err := io.ReadAll(c)
	if err == nil {
		err = io.EOF
	}
	return b, name(err)
}

// reset closes a connection with a reset.
func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}
