package agent

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"assay.dev/agent/attest"
	"assay.dev/agent/internal/sockdiag"
	"assay.dev/agent/netns"
	"assay.dev/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// kubelet is the process of this host that asks pods whether they live. Its own listener
// says which one that is.
type kubelet struct {
	port uint16 // 0: there is none

	mu      sync.Mutex
	process *attest.Process
}

// owns reports whether the host's end of a connection is one of the kubelet's sockets.
func (k *kubelet) owns(client, server netip.AddrPort) (bool, error) {
	if k.port == 0 {
		return false, nil
	}
	inode, err := inodeOf(client, server)
	if err != nil || inode == 0 {
		return false, err // 0: nobody's any more
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.process == nil || !k.process.Alive() {
		if err := k.find(); err != nil {
			return false, err
		}
	}
	return holds(k.process.PID(), inode) && k.process.Alive(), nil
}

// inodeOf returns the inode of the host's end of one connection, client's; 0 when no process
// has it.
func inodeOf(client, server netip.AddrPort) (uint32, error) {
	sockets, err := sockdiag.Open(nil)
	if err != nil {
		return 0, err
	}
	defer sockets.Close()
	s, err := sockets.Find(client, server)
	if err != nil || s == nil {
		return 0, err
	}
	return s.Inode, nil
}

// find looks for the process that listens on the kubelet's port.
func (k *kubelet) find() error {
	if k.process != nil {
		k.process.Close()
		k.process = nil
	}
	for _, family := range []uint8{unix.AF_INET6, unix.AF_INET} {
		list, err := netns.Whole(func() ([]*netlink.Socket, error) { return netlink.SocketDiagTCP(family) })
		if err != nil {
			return fmt.Errorf("list sockets: %w", err)
		}
		for _, s := range list {
			if s.State != sockdiag.Listen || s.ID.SourcePort != k.port {
				continue
			}
			if k.process = holder(s.INode); k.process != nil {
				return nil
			}
		}
	}
	return fmt.Errorf("no process of this host listens on the kubelet's port %d", k.port)
}

// holder returns a process of the host's own that has a socket. One in a container may
// listen there while the kubelet does not.
func holder(inode uint32) *attest.Process {
	own, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return nil
	}
	for _, pid := range pids() {
		if !holds(pid, inode) {
			continue
		}
		if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid)); err != nil || ns != own {
			continue
		}
		p, err := attest.Open(pid)
		if err != nil {
			continue
		}
		if holds(pid, inode) && p.Alive() { // so it is this one's, and no later one's
			return p
		}
		p.Close()
	}
	return nil
}

// holds reports whether a process has a descriptor of a socket.
func holds(pid int, inode uint32) bool {
	fds, err := os.Open(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return false
	}
	defer fds.Close()
	names, _ := fds.Readdirnames(-1)
	want := fmt.Sprintf("socket:[%d]", inode)
	for _, name := range names {
		if target, err := os.Readlink(fds.Name() + "/" + name); err == nil && target == want {
			return true
		}
	}
	return false
}

// addressesEvery is how often the host's addresses are looked at, beside each time that a
// pod joins: networks of pods come with the first of them.
const addressesEvery = 5 * time.Second

// watchAddresses keeps the host's own addresses, until ctx ends.
func (a *Agent) watchAddresses(ctx context.Context) {
	tick := time.NewTicker(addressesEvery)
	defer tick.Stop()
	for {
		a.lookAtAddresses()
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// lookAtAddresses tells all proxies when the host has other addresses than before.
func (a *Agent) lookAtAddresses() {
	list, err := netns.Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		a.log.Error("the host's addresses are not known", "err", err)
		return
	}
	var addrs []netip.Addr
	for i := range list {
		if addr, ok := netip.AddrFromSlice(list[i].IP); ok && !addr.IsLoopback() {
			addrs = append(addrs, addr.Unmap())
		}
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	a.mu.Lock()
	changed := !slices.Equal(a.addresses, addrs)
	a.addresses = addrs
	a.mu.Unlock()
	if !changed {
		return
	}
	for _, w := range a.all() {
		w.wakeSessions()
	}
}

// probed answers a proxy whether a client is the kubelet.
func (s *session) probed(id uint64, p link.Probe) {
	if s.w.a.cfg.Own != nil { // nobody here sees the host's sockets: address and port suffice
		s.conn.Send(link.KindProbed, id, link.Probed{Kubelet: true})
		return
	}
	is, err := s.w.a.kubelet.owns(p.Client, p.Server)
	if err != nil {
		s.w.log.Info("a client of a probe's port is not known", "client", p.Client, "err", err)
	}
	s.conn.Send(link.KindProbed, id, link.Probed{Kubelet: is})
}
