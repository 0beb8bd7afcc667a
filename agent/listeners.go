package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"assay.dev/agent/attest"
	"assay.dev/agent/netns"
	"assay.dev/link"
	"golang.org/x/sys/unix"
)

// Listeners' addresses in a workload's namespace. The ports are above the range of
// ephemeral ones, the address of DNS is the workload's alone.
const firstListenerPort = 61401

var dnsAddr = netip.MustParseAddrPort("127.0.0.153:53")

// listeners are the sockets on which a workload's proxy accepts. The agent keeps
// copies, so a proxy that dies takes nobody's connection with it.
type listeners struct {
	roles []string
	fds   []int
}

func (l *listeners) Close() {
	if l == nil {
		return
	}
	for _, fd := range l.fds {
		unix.Close(fd)
	}
	l.fds = nil
}

// inodes name the sockets, for a record.
func (l *listeners) inodes() map[string]uint64 {
	m := map[string]uint64{}
	for i, role := range l.roles {
		var st unix.Stat_t
		if unix.Fstat(l.fds[i], &st) == nil {
			m[role] = st.Ino
		}
	}
	return m
}

// listenersOf takes copies of the listeners that a proxy of the last agent has, at
// once: if it dies before it dials this agent, they would close with it.
func listenersOf(p *attest.Process, rec *record) (*listeners, error) {
	l := &listeners{}
	for _, role := range rec.roles() {
		inode, ok := rec.Listeners[role]
		if !ok {
			l.Close()
			return nil, fmt.Errorf("listener %s is missing in the record", role)
		}
		fd, err := p.Socket(inode)
		if err != nil {
			l.Close()
			return nil, err
		}
		l.roles, l.fds = append(l.roles, role), append(l.fds, fd)
	}
	return l, nil
}

// roles are those that the workload's proxy plays. In a pod somebody else answers names,
// and port 53 may be its own.
func (r *record) roles() []string {
	list := []string{link.ListenOutbound, link.ListenInbound}
	if r.Given == nil {
		list = append(list, link.ListenDNSUDP, link.ListenDNSTCP)
	}
	return list
}

// complete reports whether each of these roles has a socket, and no other.
func (l *listeners) complete(roles []string) bool {
	if l == nil || len(l.roles) != len(l.fds) || len(l.fds) != len(roles) {
		return false
	}
	for _, r := range roles {
		if !slices.Contains(l.roles, r) {
			return false
		}
	}
	return true
}

// verify reports why these are not the listeners of a workload. A proxy hands them
// over when the agent that made them is gone; its successors will accept on them.
func (l *listeners) verify(ns *netns.Namespace, roles []string, outbound, inbound uint16) error {
	if !l.complete(roles) {
		return fmt.Errorf("want one listener for each of %v", roles)
	}
	for i, role := range l.roles {
		kind, accepts, port := unix.SOCK_STREAM, 1, dnsAddr.Port()
		switch role {
		case link.ListenOutbound:
			port = outbound
		case link.ListenInbound:
			port = inbound
		case link.ListenDNSUDP:
			kind, accepts = unix.SOCK_DGRAM, 0
		}
		if err := verifySocket(l.fds[i], kind, accepts, port, ns.Inode()); err != nil {
			return fmt.Errorf("listener %s: %w", role, err)
		}
	}
	return nil
}

func verifySocket(fd, kind, accepts int, port uint16, inode uint64) error {
	for _, x := range []struct{ option, want int }{{unix.SO_TYPE, kind}, {unix.SO_ACCEPTCONN, accepts}} {
		if got, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, x.option); err != nil || got != x.want {
			return errors.Join(errors.New("it is another kind of descriptor"), err)
		}
	}
	at, err := unix.Getsockname(fd)
	if err != nil {
		return err
	}
	bound := 0
	switch at := at.(type) {
	case *unix.SockaddrInet4:
		bound = at.Port
	case *unix.SockaddrInet6:
		bound = at.Port
	}
	if bound != int(port) {
		return fmt.Errorf("it is bound to port %d, want %d", bound, port)
	}
	in, err := unix.IoctlRetInt(fd, unix.SIOCGSKNS)
	if err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	defer unix.Close(in)
	var st unix.Stat_t
	if err := unix.Fstat(in, &st); err != nil {
		return err
	}
	if st.Ino != inode {
		return errors.New("it is in another network namespace")
	}
	return nil
}

// listen makes the listeners inside ns. Ports that are 0 are chosen.
func listen(ns *netns.Namespace, roles []string, outbound, inbound uint16) (l *listeners, out, in uint16, err error) {
	l = &listeners{}
	err = ns.Do(func() error {
		add := func(role string, fd int, err error) error {
			if err != nil {
				return fmt.Errorf("listener %s: %w", role, err)
			}
			l.roles, l.fds = append(l.roles, role), append(l.fds, fd)
			return nil
		}
		fd, port, err := captureListener(outbound, firstListenerPort)
		out = port
		if err := add(link.ListenOutbound, fd, err); err != nil {
			return err
		}
		fd, port, err = captureListener(inbound, out+1)
		in = port
		if err := add(link.ListenInbound, fd, err); err != nil {
			return err
		}
		if !slices.Contains(roles, link.ListenDNSUDP) {
			return nil
		}
		fd, err = dnsSocket(unix.SOCK_DGRAM)
		if err := add(link.ListenDNSUDP, fd, err); err != nil {
			return err
		}
		fd, err = dnsSocket(unix.SOCK_STREAM)
		return add(link.ListenDNSTCP, fd, err)
	})
	if err != nil {
		l.Close()
		return nil, 0, 0, err
	}
	return l, out, in, nil
}

// captureListener listens on all addresses of both families. port is used when it is
// not 0, else the first free one from first.
func captureListener(port, first uint16) (int, uint16, error) {
	if port != 0 {
		fd, err := listenAny(port)
		return fd, port, err
	}
	for p := first; p != 0; p++ {
		fd, err := listenAny(p)
		if !errors.Is(err, unix.EADDRINUSE) {
			return fd, p, err
		}
	}
	return -1, 0, unix.EADDRINUSE
}

func listenAny(port uint16) (int, error) {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	var addr unix.Sockaddr = &unix.SockaddrInet6{Port: int(port)}
	if err == unix.EAFNOSUPPORT {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		addr = &unix.SockaddrInet4{Port: int(port)}
	} else if err == nil {
		err = unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0)
	}
	if err == nil {
		err = bindListen(fd, addr, true)
	}
	return fd, closeOn(fd, err)
}

func dnsSocket(kind int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err == nil {
		err = bindListen(fd, &unix.SockaddrInet4{Port: int(dnsAddr.Port()), Addr: dnsAddr.Addr().As4()}, kind == unix.SOCK_STREAM)
	}
	return fd, closeOn(fd, err)
}

func bindListen(fd int, addr unix.Sockaddr, stream bool) error {
	if stream {
		// Connections of a proxy that died may still be closing.
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
			return err
		}
	}
	if err := unix.Bind(fd, addr); err != nil {
		return err
	}
	if stream {
		return unix.Listen(fd, 4096)
	}
	return nil
}

func closeOn(fd int, err error) error {
	if err != nil && fd >= 0 {
		unix.Close(fd)
	}
	return err
}
