package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"assay.dev"
	"assay.dev/agent/attest"
	"assay.dev/link"
	"golang.org/x/sys/unix"
)

// runner serves one `assay run`: it places the workload, takes in what the command
// is, and ends the workload when the command has ended. A connection that breaks ends
// nothing, since `assay run` dials again; its process and the command's are watched.
func (a *Agent) runner(ctx context.Context, conn *link.Conn, first link.Message, peer *attest.Process, uid uint32) {
	defer first.Discard()
	if err := a.mayRun(peer, uid); err != nil {
		conn.Send(kindFailed, first.ID, failureOf("run", err))
		return
	}
	var w *workload
	var err error
	if first.Kind == kindRun {
		w, err = a.runNew(ctx, conn, first, peer)
	} else {
		w, err = a.runAgain(&first, peer)
	}
	if err != nil {
		conn.Send(kindFailed, first.ID, failureOf("run", err))
		return
	}
	if first.Kind == kindResume {
		if err := conn.Send(kindReady, first.ID, w.placed()); err != nil {
			return
		}
	}
	a.converse(ctx, conn, w)
}

// mayRun lets root on the host, and in a user namespace its owner, make workloads: a
// workload's identity is more than an ordinary user has. A process that is a workload
// itself may not, whoever it is.
func (a *Agent) mayRun(peer *attest.Process, uid uint32) error {
	if uid != 0 && uid != uint32(os.Geteuid()) {
		return &assay.Error{Kind: assay.Denied, Op: "run", Err: fmt.Errorf("user %d may not make workloads", uid), Remedy: "run as root (the command may run as another user: --user)"}
	}
	facts, err := peer.Facts()
	if err != nil {
		return err
	}
	if self, err := hostNamespace(); err != nil || facts.NetNS != self {
		return &assay.Error{Kind: assay.Denied, Op: "run", Err: errors.New("the caller is not in the agent's network namespace"), Remedy: "a workload cannot start workloads; run it on the host"}
	}
	return nil
}

func (a *Agent) runNew(ctx context.Context, conn *link.Conn, m link.Message, peer *attest.Process) (*workload, error) {
	var req RunRequest
	if err := m.Decode(&req); err != nil {
		return nil, err
	}
	w, err := a.place(ctx, req, peer)
	if err != nil {
		return nil, err
	}
	if err := conn.Send(kindReady, m.ID, w.placed(), w.ns.FD()); err != nil {
		w.end(fmt.Errorf("assay run is gone: %w", err))
		return nil, err
	}
	return w, nil
}

// runAgain continues with an `assay run` whose agent was gone.
func (a *Agent) runAgain(m *link.Message, peer *attest.Process) (*workload, error) {
	var r resume
	if err := m.Decode(&r); err != nil {
		return nil, err
	}
	w := a.workload(r.Workload)
	if w == nil {
		return nil, &assay.Error{Kind: assay.NotFound, Op: "continue " + r.Workload, Err: errors.New("the agent knows no such workload")}
	}
	w.mu.Lock()
	owner := w.rec.Owner
	w.mu.Unlock()
	if refOf(peer) != owner {
		return nil, &assay.Error{Kind: assay.Denied, Op: "continue " + r.Workload, Err: errors.New("it belongs to another process")}
	}
	if len(m.Files) == 0 {
		return w, nil
	}
	command, err := takePidfd(m)
	if err != nil {
		return nil, err
	}
	return w, w.started(command)
}

func takePidfd(m *link.Message) (*attest.Process, error) {
	if len(m.Files) == 0 {
		return nil, fmt.Errorf("%s: no pidfd", m.Kind)
	}
	files := m.Take()
	for _, fd := range files[1:] {
		unix.Close(fd)
	}
	return attest.FromPidfd(os.NewFile(uintptr(files[0]), "pidfd"))
}

// converse follows an `assay run` until its connection or its workload ends.
func (a *Agent) converse(ctx context.Context, conn *link.Conn, w *workload) {
	ended, told := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(told)
		select {
		case <-w.over.ch: // not when it is left to the next agent
			conn.Send(kindOver, 0, over{})
			conn.Socket().SetReadDeadline(time.Unix(1, 0)) // ends Receive, whatever the peer does
		case <-ctx.Done():
			conn.Close()
		case <-ended:
		}
	}()
	defer func() { close(ended); <-told }()
	for {
		m, err := conn.Receive()
		if err != nil {
			return
		}
		switch m.Kind {
		case kindStarted:
			command, err := takePidfd(&m)
			if err == nil {
				err = w.started(command)
			}
			if err != nil && !errors.Is(err, attest.ErrGone) {
				w.end(err)
			}
		case kindDraining:
			w.drain()
		case kindEnded:
			w.end(errors.New("the command has ended"))
		}
		m.Discard()
	}
}

func (w *workload) placed() Placed {
	n := w.noun()
	p := Placed{Workload: w.id, Identity: n.Identity, Addrs: n.Addrs, ResolvConf: filepath.Join(w.a.runDir(w.id), "resolv.conf"), Hidden: w.a.cfg.Hidden, Last: w.a.cfg.Last}
	w.a.mu.Lock()
	if !w.a.connected {
		p.Warning = "control is away: the workload gets its certificate, and meshed connections, when it is back"
	}
	w.a.mu.Unlock()
	return p
}
