package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"assay.dev/agent"
	"assay.dev/control"
)

// sockets are what a person or a machine connects to. Without root they are opened
// before the network namespace is left, and inherited by the process in it.
type sockets struct {
	control net.Listener      // operators, on a unix socket
	agent   *net.UnixListener // `assay run` and proxies
	metrics net.Listener      // Prometheus; nil without an address
	remote  net.Listener      // other hosts and remote operators; nil without an address
}

// open opens what is not there yet. The caller holds the runtime folder's lock, so
// whoever had the paths is gone.
func (s *sockets) open(runtimeDir, metrics, remote string) (err error) {
	if s.control == nil {
		if s.control, err = control.ListenSocket(filepath.Join(runtimeDir, controlSocket), 0); err != nil {
			return err
		}
	}
	if s.agent == nil {
		if s.agent, err = agent.ListenSocket(filepath.Join(runtimeDir, agent.SocketName)); err != nil {
			return err
		}
	}
	if s.metrics == nil && metrics != "" {
		if s.metrics, err = listenTCP(metrics); err != nil {
			return fmt.Errorf("--metrics %s: %w", metrics, err)
		}
	}
	if s.remote == nil && remote != "" {
		if s.remote, err = listenTCP(remote); err != nil {
			return fmt.Errorf("--listen %s: %w", remote, err)
		}
	}
	return nil
}

// listenTCP opens an address, or takes "fd:N", a listening socket that we inherited.
func listenTCP(addr string) (net.Listener, error) {
	n, ok := strings.CutPrefix(addr, "fd:")
	if !ok {
		return net.Listen("tcp", addr)
	}
	fd, err := strconv.Atoi(n)
	if err != nil || fd < 3 {
		return nil, fmt.Errorf("want fd:N with a descriptor from 3 up, not %q", addr)
	}
	l, err := inheritedListener(fd)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", addr, err)
	}
	return l, nil
}

func inheritedListener(fd int) (net.Listener, error) {
	f := os.NewFile(uintptr(fd), "listener")
	if f == nil {
		return nil, errors.New("no such descriptor")
	}
	defer f.Close() // FileListener has its own
	return net.FileListener(f)
}

// bequeath returns the sockets as files to inherit, and the value of the flag that
// tells which is which. The caller closes the files.
func (s *sockets) bequeath() (files []*os.File, flag string, err error) {
	var names []string
	for _, l := range []struct {
		name string
		l    net.Listener
	}{{"control", s.control}, {"agent", listener(s.agent)}, {"metrics", s.metrics}, {"remote", s.remote}} {
		if l.l == nil {
			continue
		}
		f, err := l.l.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			return files, "", err
		}
		names = append(names, fmt.Sprintf("%s=%d", l.name, 3+len(files)))
		files = append(files, f)
	}
	return files, strings.Join(names, ","), nil
}

func listener(l *net.UnixListener) net.Listener {
	if l == nil {
		return nil
	}
	return l
}

// inherit is the other side of bequeath.
func (s *sockets) inherit(flag string) error {
	for part := range strings.SplitSeq(flag, ",") {
		if part == "" {
			continue
		}
		name, n, _ := strings.Cut(part, "=")
		fd, err := strconv.Atoi(n)
		if err != nil {
			return fmt.Errorf("inherited socket %q: %w", part, err)
		}
		l, err := inheritedListener(fd)
		if err != nil {
			return fmt.Errorf("inherited socket %q: %w", part, err)
		}
		unix, _ := l.(*net.UnixListener)
		if unix != nil {
			unix.SetUnlinkOnClose(false) // whoever opened it removes it
		}
		switch {
		case name == "control" && unix != nil:
			s.control = l
		case name == "agent" && unix != nil:
			s.agent = unix
		case name == "metrics":
			s.metrics = l
		case name == "remote":
			s.remote = l
		default:
			return fmt.Errorf("inherited socket %q: not known", part)
		}
	}
	return nil
}

func (s *sockets) close() {
	for _, l := range []net.Listener{s.control, listener(s.agent), s.metrics, s.remote} {
		if l != nil {
			l.Close()
		}
	}
}
