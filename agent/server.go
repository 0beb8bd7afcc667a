package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/agent/attest"
	"assay.dev/link"
	"golang.org/x/sys/unix"
)

// firstWithin bounds how long a connection may say nothing.
const firstWithin = 5 * time.Second

// Everybody on the host may connect, so what strangers can hold is bounded, for all of
// them and for each, and a proxy cannot hold what is another's. What is left is for
// those who may run workloads.
const (
	maxConns         = 1024
	maxStrangers     = 64
	maxConnsOfOthers = 8 // of one user who is no runner
)

// doors counts the open connections to agent.sock.
type doors struct {
	mu             sync.Mutex
	all, strangers int
	of             map[uint32]int // by user, without runners
}

// rank is what a user is to the agent, as far as the number tells.
type rank int

const (
	stranger rank = iota
	proxyUser
	runnerUser
)

// proxyUsers is how many users proxies can have.
const proxyUsers = 1 << 24

func (c *Config) rankOf(uid uint32) rank {
	switch {
	case uid == 0 || uid == uint32(os.Geteuid()):
		return runnerUser
	case uid >= c.ProxyUIDs && uid-c.ProxyUIDs < proxyUsers:
		return proxyUser
	}
	return stranger
}

func (d *doors) enter(uid uint32, r rank) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.all == maxConns || r == stranger && d.strangers == maxStrangers || r != runnerUser && d.of[uid] == maxConnsOfOthers {
		return false
	}
	d.count(uid, r, 1)
	return true
}

func (d *doors) leave(uid uint32, r rank) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.count(uid, r, -1)
}

func (d *doors) count(uid uint32, r rank, n int) {
	d.all += n
	if r == stranger {
		d.strangers += n
	}
	if r != runnerUser {
		if d.of[uid] += n; d.of[uid] == 0 {
			delete(d.of, uid)
		}
	}
}

// serve answers agent.sock until ctx ends.
func (a *Agent) serve(ctx context.Context, l *net.UnixListener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var g sync.WaitGroup
	defer g.Wait()
	open := doors{of: map[uint32]int{}}
	for {
		c, err := l.AcceptUnix()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return &assay.Error{Op: "serve " + a.socketPath(), Err: err}
			}
			a.log.Error("agent.sock", "err", err) // out of descriptors, most likely
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(50 * time.Millisecond):
			}
			continue
		}
		uid, err := userOf(c)
		r := a.cfg.rankOf(uid)
		if err != nil || !open.enter(uid, r) {
			c.Close() // whoever it is dials again
			continue
		}
		g.Go(func() {
			defer open.leave(uid, r)
			a.connection(ctx, link.NewConn(c), r)
		})
	}
}

// connection finds out who it is by what it says first, and believes only what the
// kernel says of the peer.
func (a *Agent) connection(ctx context.Context, conn *link.Conn, r rank) {
	conn.Limit(0) // nobody has shown yet that this agent should hold megabytes for him
	peer, uid, err := peerOf(conn.Socket())
	if err != nil {
		a.log.Warn("agent.sock: peer is not known", "err", err)
		conn.Close()
		return
	}
	conn.Socket().SetReadDeadline(time.Now().Add(firstWithin))
	stop := context.AfterFunc(ctx, func() { conn.Socket().SetReadDeadline(time.Unix(1, 0)) })
	m, err := conn.Receive()
	stop()
	if err != nil {
		peer.Close()
		conn.Close()
		return
	}
	conn.Socket().SetReadDeadline(time.Time{})
	switch m.Kind {
	case link.KindHello:
		if r == stranger {
			m.Discard()
			conn.Close()
			break
		}
		if err := a.proxyIsBack(ctx, conn, m, peer); err != nil {
			a.log.Warn("a proxy was not adopted", "pid", peer.PID(), "err", err)
			m.Discard()
			conn.Close()
		}
	case kindWhere:
		conn.Send(kindWhere, m.ID, Where{PID: os.Getpid(), Rootless: inUserNamespace()})
		m.Discard()
		conn.Close()
	case kindSandboxAdd, kindSandboxCheck, kindSandboxDel, kindSandboxReady:
		a.sandbox(ctx, conn, m, peer, uid)
		m.Discard()
		conn.Close()
	case kindRun, kindResume:
		a.runner(ctx, conn, m, peer, uid)
		conn.Close()
	default:
		m.Discard()
		conn.Close()
	}
	peer.Close()
}

// userOf is the user of the process that dialled.
func userOf(c *net.UnixConn) (uid uint32, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var failed error
	if err := raw.Control(func(fd uintptr) {
		cred, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil || failed != nil {
		return 0, errors.Join(err, failed)
	}
	return cred.Uid, nil
}

// peerOf holds the process that dialled.
func peerOf(c *net.UnixConn) (*attest.Process, uint32, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, 0, err
	}
	var cred *unix.Ucred
	pidfd := -1
	var failed error
	if err := raw.Control(func(fd uintptr) {
		if cred, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); failed != nil {
			return
		}
		// Linux 6.5. Without it the number may be of a process that came later; every
		// use compares start times with a record or asks for root.
		if v, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD); err == nil {
			pidfd = v
		}
	}); err != nil {
		return nil, 0, err
	}
	if failed != nil {
		return nil, 0, failed
	}
	var p *attest.Process
	if pidfd >= 0 {
		p, err = attest.FromPidfd(os.NewFile(uintptr(pidfd), "pidfd"))
	} else {
		p, err = attest.Open(int(cred.Pid))
	}
	return p, cred.Uid, err
}

// proxyIsBack hands a proxy that lost its agent to its workload, if it is the one on
// record. A proxy of this agent's that no workload has is ended: nobody else will.
func (a *Agent) proxyIsBack(ctx context.Context, conn *link.Conn, m link.Message, peer *attest.Process) error {
	var h link.Hello
	if err := m.Decode(&h); err != nil {
		return err
	}
	w := a.workload(h.Workload)
	if w == nil {
		return a.endStray(peer, h.Workload)
	}
	g := w.generationOf(refOf(peer))
	if g == nil {
		return errors.Join(errors.New("it is not the process on record"), a.endStray(peer, h.Workload))
	}
	facts, err := peer.Facts()
	if err != nil {
		return err
	}
	if facts.NetNS != w.ns.Inode() {
		return errors.New("it is not in its workload's network namespace")
	}
	select {
	case g.redialed <- orphan{conn, m}:
		return nil
	case <-w.done:
		return errors.New("its workload has ended")
	case <-time.After(redialWithin):
		return errors.New("it has a link already")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// endStray ends a process that says it is a proxy and belongs to no workload, if it
// is one: it executes what this agent's proxies do and is in another network
// namespace.
func (a *Agent) endStray(p *attest.Process, workload string) error {
	unknown := errors.New("no such workload")
	f, err := os.Open(a.cfg.Proxy)
	if err != nil {
		return err
	}
	defer f.Close()
	ours, id, err := a.digester.File(f)
	if err != nil {
		return err
	}
	// What is cheap to ask comes first: whoever dialled chose the file to be read.
	facts, err := p.Facts()
	if err != nil {
		return err
	}
	if self, err := hostNamespace(); err != nil || facts.NetNS == self || facts.ExeID.Size != id.Size {
		return unknown
	}
	if exe, _, err := a.digester.Executable(p); err != nil || exe.Digest != ours {
		return unknown
	}
	p.Signal(unix.SIGKILL)
	return fmt.Errorf("workload %q has ended, and so has its proxy now", workload)
}

func hostNamespace() (uint64, error) {
	var st unix.Stat_t
	err := unix.Stat("/proc/self/ns/net", &st)
	return st.Ino, err
}
