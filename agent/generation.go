package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"

	"assay.dev"
	"assay.dev/agent/attest"
	"assay.dev/link"
	"golang.org/x/sys/unix"
)

// generation is one proxy process of a workload, from its start or its adoption to
// its end. The current one accepts; one that an upgrade has replaced drains; the next
// one is being started.
type generation struct {
	proc      *attest.Process
	exe       assay.Digest
	domain    string     // the trust domain of its identity, which it has for life
	conn      *link.Conn // made when it was started; nil: it dials
	successor bool       // it was started beside another one
	redialed  chan orphan
	accepts   *latch
	ended     chan struct{} // closed when nothing of it is left

	// The workload's mu.
	session *session
	until   time.Time // when its drain ends; zero: it does not drain
	told    bool      // to drain, in favour of the current one
	bundle  uint64    // that it uses
	report  *link.Report
}

func newGeneration(proc *attest.Process, exe assay.Digest, domain string) *generation {
	return &generation{proc: proc, exe: exe, domain: domain, redialed: make(chan orphan), accepts: newLatch(), ended: make(chan struct{})}
}

func (g *generation) hasEnded() bool {
	select {
	case <-g.ended:
		return true
	default:
		return false
	}
}

// orphan is a proxy that dialled agent.sock, with its greeting.
type orphan struct {
	conn  *link.Conn
	hello link.Message
}

// living returns the workload's proxies; mu is held.
func (w *workload) living() []*generation {
	list := append([]*generation(nil), w.older...)
	for _, g := range []*generation{w.current, w.next} {
		if g != nil {
			list = append(list, g)
		}
	}
	return list
}

// generationOf finds the proxy that a process is.
func (w *workload) generationOf(ref processRef) *generation {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, g := range w.living() {
		if refOf(g.proc) == ref {
			return g
		}
	}
	return nil
}

// saveGenerations records which proxies there are.
func (w *workload) saveGenerations() error {
	w.mu.Lock()
	w.rec.Proxy, w.rec.ProxyExe, w.rec.ProxyDomain, w.rec.Next, w.rec.Older = processRef{}, "", "", nil, nil
	if g := w.current; g != nil {
		w.rec.Proxy, w.rec.ProxyExe, w.rec.ProxyDomain = refOf(g.proc), g.exe, g.domain
	}
	if g := w.next; g != nil {
		w.rec.Next = &proxyRecord{Process: refOf(g.proc), Exe: g.exe, Domain: g.domain}
	}
	for _, g := range w.older {
		w.rec.Older = append(w.rec.Older, proxyRecord{Process: refOf(g.proc), Exe: g.exe, Domain: g.domain, Until: g.until})
	}
	w.mu.Unlock()
	return w.save()
}

// forget takes a proxy that has ended out of the workload. What it counted stays.
func (w *workload) forget(g *generation) {
	w.mu.Lock()
	if w.current == g {
		w.current = nil
	}
	if w.next == g {
		w.next = nil
	}
	for i, x := range w.older {
		if x == g {
			w.older = append(w.older[:i:i], w.older[i+1:]...)
			break
		}
	}
	if g.report != nil {
		w.past = addReports(w.past, settled(g.report))
		w.report = w.wholeReport()
	}
	w.mu.Unlock()
	g.proc.Close()
	close(g.ended)
	if err := w.saveGenerations(); err != nil {
		w.log.Error("the record is not on disk", "err", err)
	}
	select {
	case w.fewer <- struct{}{}:
	default:
	}
}

// superviseProxy keeps a proxy running until ctx ends: the one that was adopted, if
// there is one, and then its successors. All use the same listeners. In a pod that leaves
// the mesh it returns when they have drained.
func (w *workload) superviseProxy(ctx context.Context) {
	var g sync.WaitGroup
	defer g.Wait()
	serve := func(x *generation) { g.Go(func() { w.serveProxy(ctx, x) }) }
	w.mu.Lock()
	current, next := w.current, w.next
	for _, old := range w.older {
		serve(old)
	}
	w.mu.Unlock()
	if next != nil {
		serve(next)
	}
	if current != nil && w.leaving.is() {
		serve(current)
	}
	retry := time.Duration(0)
	for ctx.Err() == nil && !w.leaving.is() {
		began := time.Now()
		if current == nil {
			var err error
			if current, err = w.spawn(false); err != nil {
				w.log.Error("the proxy cannot be started", "err", err)
				w.failedStart(err)
			}
		}
		if current != nil {
			serve(current)
			pid := w.upgrades(ctx, current, next, serve)
			current, next = nil, nil
			if ctx.Err() != nil || w.leaving.is() {
				break
			}
			served := time.Since(began).Round(time.Millisecond)
			w.log.Error("the proxy has ended and is replaced", "pid", pid, "served", served)
			w.a.outbox.finding(&assay.Finding{
				Time: time.Now(), Workload: w.id, Kind: "proxy-ended", Subject: w.id,
				Detail: fmt.Sprintf("its proxy ended after %s, with the connections that went through it; it is replaced", served),
				Remedy: "the end of its log says why: " + w.a.store.path("workloads", w.id+".log") + "; without a word there, somebody has ended it, or the kernel for want of memory",
			})
			if !w.accepts.is() {
				w.failedStart(fmt.Errorf("the proxy ended before it accepted: %s", w.logTail()))
			}
		}
		if time.Since(began) > settledAfter {
			retry = 0
		}
		select {
		case <-ctx.Done():
		case <-w.leaving.ch:
		case <-time.After(retry):
		}
		retry = min(max(2*retry, respawnFirst), respawnMost)
	}
	if ctx.Err() == nil {
		w.retire()
	}
}

// maxFailedStarts is after how many a placement gives up.
const maxFailedStarts = 3

// failedStart counts proxies that ended before one accepted.
func (w *workload) failedStart(err error) {
	w.mu.Lock()
	w.spawning = err
	w.failures++
	n := w.failures
	w.mu.Unlock()
	if n == maxFailedStarts {
		w.stillborn.set()
	}
}

// serveProxy speaks with a proxy until it has ended, or until ctx ends: then it
// drains the proxy, or leaves it to the next agent.
func (w *workload) serveProxy(ctx context.Context, g *generation) {
	defer w.forgetUnlessLeft(ctx, g)
	proc, conn := g.proc, g.conn
	ended, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	reaped := make(chan struct{})
	go func() {
		defer close(reaped)
		if proc.Wait(ended) == nil {
			unix.Wait4(proc.PID(), nil, unix.WNOHANG, nil) // ours to reap, unless another agent started it
			stop(attest.ErrGone)
		}
	}()
	defer func() { <-reaped }()
	var hello link.Message
	for ended.Err() == nil {
		if conn == nil {
			select {
			case <-ended.Done():
				continue
			case o := <-g.redialed:
				conn, hello = o.conn, o.hello
			case <-time.After(redialWithin):
				w.log.Error("the proxy does not come back and is ended", "pid", proc.PID())
				proc.Signal(syscall.SIGKILL)
				<-ended.Done()
				continue
			}
		}
		s := newSession(w, g, conn)
		err := s.run(ended, hello)
		if errors.Is(err, errSilent) {
			w.log.Error("the proxy says nothing and is ended", "pid", proc.PID())
			proc.Signal(syscall.SIGKILL)
		} else if ended.Err() == nil {
			w.log.Warn("the link with the proxy ended", "pid", proc.PID(), "err", err)
		}
		conn, hello = nil, link.Message{}
	}
	if conn != nil { // the end came before the first word: a proxy that hears nothing ends by this
		w.log.Warn("the proxy is not spoken with", "pid", proc.PID(), "err", context.Cause(ended))
		hello.Discard()
		conn.Close()
	}
	cause := context.Cause(ended)
	stop(nil)
	<-reaped
	if !errors.Is(cause, attest.ErrGone) && !errors.Is(cause, errAgentStops) {
		w.drainProxy(proc)
	}
}

// forgetUnlessLeft forgets a proxy that has ended, and keeps the record of one that
// is left to the next agent.
func (w *workload) forgetUnlessLeft(ctx context.Context, g *generation) {
	if errors.Is(context.Cause(ctx), errAgentStops) {
		g.proc.Close()
		close(g.ended)
		return
	}
	w.forget(g)
}

// drainProxy ends a proxy whose workload has ended; its session has sent Drain.
func (w *workload) drainProxy(proc *attest.Process) {
	ctx, cancel := context.WithTimeout(context.Background(), drainWithin)
	defer cancel()
	if proc.Wait(ctx) != nil {
		proc.Signal(syscall.SIGKILL)
		proc.Wait(context.Background())
	}
	unix.Wait4(proc.PID(), nil, unix.WNOHANG, nil)
}
