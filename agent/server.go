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

// firstWithin bounds how long a connection may say nothing, maxConns how many there
// are: everybody on the host may connect.
const (
	firstWithin = 5 * time.Second
	maxConns    = 1024
)

// serve answers agent.sock until ctx ends.
func (a *Agent) serve(ctx context.Context, l *net.UnixListener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var g sync.WaitGroup
	defer g.Wait()
	slots := make(chan struct{}, maxConns)
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
		select {
		case slots <- struct{}{}:
		default:
			c.Close() // whoever it is dials again
			continue
		}
		g.Go(func() {
			defer func() { <-slots }()
			a.connection(ctx, link.NewConn(c))
		})
	}
}

// connection finds out who it is by what it says first, and believes only what the
// kernel says of the peer.
func (a *Agent) connection(ctx context.Context, conn *link.Conn) {
	peer, uid, err := peerOf(conn.Socket())
	if err != nil {
		a.log.Warn("agent.sock: peer is not known", "err", err)
		conn.Close()
		return
	}
	conn.Socket().SetReadDeadline(time.Now().Add(firstWithin))
	m, err := conn.Receive()
	if err != nil {
		peer.Close()
		conn.Close()
		return
	}
	conn.Socket().SetReadDeadline(time.Time{})
	switch m.Kind {
	case link.KindHello:
		if err := a.proxyIsBack(ctx, conn, m, peer); err != nil {
			a.log.Warn("a proxy was not adopted", "pid", peer.PID(), "err", err)
			m.Discard()
			conn.Close()
		}
	case kindWhere:
		conn.Send(kindWhere, m.ID, Where{PID: os.Getpid(), Rootless: inUserNamespace()})
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
	w.mu.Lock()
	rec := w.rec
	w.mu.Unlock()
	if refOf(peer) != rec.Proxy {
		return errors.Join(errors.New("it is not the process on record"), a.endStray(peer, h.Workload))
	}
	facts, err := peer.Facts()
	if err != nil {
		return err
	}
	if facts.NetNS != rec.NetNS {
		return errors.New("it is not in its workload's network namespace")
	}
	select {
	case w.redialed <- orphan{conn, m}:
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
	exe, facts, err := a.digester.Executable(p)
	if err != nil {
		return err
	}
	f, err := os.Open(a.cfg.Proxy)
	if err != nil {
		return err
	}
	defer f.Close()
	ours, _, err := a.digester.File(f)
	if err != nil {
		return err
	}
	if self, err := hostNamespace(); err != nil || exe.Digest != ours || facts.NetNS == self {
		return errors.New("no such workload")
	}
	p.Signal(unix.SIGKILL)
	return fmt.Errorf("workload %q has ended, and so has its proxy now", workload)
}

func hostNamespace() (uint64, error) {
	var st unix.Stat_t
	err := unix.Stat("/proc/self/ns/net", &st)
	return st.Ino, err
}
