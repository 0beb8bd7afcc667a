package agent

import (
	"context"
	"fmt"
	"os"
	"slices"
	"syscall"
	"time"

	"assay.dev"
	"assay.dev/link"
	"golang.org/x/sys/unix"
)

// A workload's proxy is replaced by a newer executable without losing a connection:
// the successor is started beside it on the same listeners, and accepts once it has a
// certificate. Then the old one is told to drain: it accepts nothing more, HTTP/1
// connections move to the successor between two requests, peers are told to dial anew.
// What is bound to the old process (an opaque connection, a request that runs) stays
// there until Config.ProxyDrain has passed.

const (
	// maxGenerations bounds the living proxies of one workload. An upgrade that would
	// make one more waits until an old one has ended.
	maxGenerations = 3
	// successorWithin bounds how long a successor takes to accept. One that does not is
	// ended, and the old one goes on.
	successorWithin = 15 * time.Second
	upgradeRetry    = time.Minute
	// overstay is how much longer than its drain a proxy may live.
	overstay = 5 * time.Second
	// maxUpgrading bounds the upgrades that a host does at once.
	maxUpgrading = 2
)

// Upgrade replaces the proxies that do not execute what Config.Proxy is now. It
// returns at once; how far it got shows in the log and the metrics.
func (a *Agent) Upgrade() error {
	f, err := os.Open(a.cfg.Proxy)
	if err != nil {
		return &assay.Error{Op: "upgrade proxies", Err: err}
	}
	defer f.Close()
	digest, _, err := a.digester.File(f)
	if err != nil {
		return &assay.Error{Op: "upgrade proxies", Err: err}
	}
	for _, w := range a.all() {
		w.mu.Lock()
		old := w.current != nil && w.current.exe != digest
		w.mu.Unlock()
		if old {
			w.wantUpgrade()
		}
	}
	return nil
}

func (w *workload) wantUpgrade() {
	select {
	case w.upgrade <- struct{}{}:
	default:
	}
}

// upgrades replaces the current proxy as often as that is wanted, until the one that
// is current ends, whose number it returns.
func (w *workload) upgrades(ctx context.Context, current, next *generation, serve func(*generation)) (pid int) {
	var again <-chan time.Time
	for {
		release := func() {}
		if next == nil {
			want := w.upgrade
			w.mu.Lock()
			full := len(w.older)+1 >= maxGenerations
			w.mu.Unlock()
			if full {
				want = nil
			}
			select {
			case <-current.ended:
				return current.proc.PID()
			case <-w.leaving.ch:
				return current.proc.PID()
			case <-w.fewer:
				continue
			case <-again:
				w.wantUpgrade()
				continue
			case <-want:
			}
			if next, release = w.startSuccessor(ctx, current, serve); next == nil {
				again = time.After(upgradeRetry)
				continue
			}
		}
		if w.awaitSuccessor(ctx, current, next) {
			w.replace(current, next)
			current, again = next, nil
		} else if ctx.Err() == nil {
			again = time.After(upgradeRetry)
		}
		release()
		next = nil
	}
}

// startSuccessor starts a proxy beside the current one, when it is the workload's turn
// on this host; release ends that.
func (w *workload) startSuccessor(ctx context.Context, current *generation, serve func(*generation)) (next *generation, release func()) {
	select {
	case w.a.upgrading <- struct{}{}:
	case <-current.ended: // whatever follows it is new
		return nil, nil
	case <-ctx.Done():
		return nil, nil
	}
	w.requests.grant() // its certificate is asked for by this agent's will
	next, err := w.spawn(true)
	if err != nil {
		<-w.a.upgrading
		w.upgradeFailed(err.Error())
		return nil, nil
	}
	serve(next)
	return next, func() { <-w.a.upgrading }
}

// awaitSuccessor waits until next accepts. One that does not is ended, and so is one
// whose predecessor dies meanwhile: the next in its place accepts without waiting.
func (w *workload) awaitSuccessor(ctx context.Context, current, next *generation) bool {
	t := time.NewTimer(successorWithin)
	defer t.Stop()
	select {
	case <-next.accepts.ch:
		return true
	case <-ctx.Done():
		return false
	case <-current.ended:
		next.proc.Signal(syscall.SIGKILL)
		<-next.ended
		return false
	case <-next.ended:
	case <-w.leaving.ch:
		next.proc.Signal(syscall.SIGKILL)
		<-next.ended
		return false
	case <-t.C:
		next.proc.Signal(syscall.SIGKILL)
		<-next.ended
	}
	w.upgradeFailed(fmt.Sprintf("a proxy of digest %s ended before it accepted, or did not within %s: %s", next.exe.Short(), successorWithin, w.logTail()))
	return false
}

// upgradeFailed says that the workload keeps its old proxy.
func (w *workload) upgradeFailed(why string) {
	w.log.Error("the proxy is not upgraded; the old one goes on", "reason", why, "retry", upgradeRetry)
	w.a.outbox.finding(&assay.Finding{
		Time: time.Now(), Workload: w.id, Kind: "upgrade-failed", Subject: w.id, Detail: why,
		Remedy: "install an assay-proxy that starts on this host; it is tried again every minute",
	})
}

// replace makes next the current proxy and drains old.
func (w *workload) replace(old, next *generation) {
	w.mu.Lock()
	w.current, w.next, w.session = next, nil, next.session
	if !old.hasEnded() {
		old.until = time.Now().Add(w.a.cfg.ProxyDrain).UTC()
		w.older = append(slices.Clone(w.older), old)
	}
	for _, g := range w.older {
		g.told = false
	}
	w.mu.Unlock()
	if err := w.saveGenerations(); err != nil {
		w.log.Error("the record is not on disk", "err", err)
	}
	w.log.Info("proxy replaced", "pid", next.proc.PID(), "digest", next.exe.Short(), "old", old.proc.PID(), "until", old.until)
	w.drainOlder()
	w.bundlesChanged()
	w.wakeUp() // what the kernel lets through follows the new one's acknowledgements
}

// drainOlder has the older proxies give to the current one what can move.
func (w *workload) drainOlder() {
	w.mu.Lock()
	current := w.session
	var list []*generation
	for _, g := range w.older {
		if !g.told && g.session != nil {
			list = append(list, g)
		}
	}
	w.mu.Unlock()
	if current == nil && !w.leaving.is() {
		return // its session begins with this
	}
	for _, g := range list {
		if err := w.introduce(g, current); err != nil {
			w.log.Error("the old proxy is not drained", "pid", g.proc.PID(), "err", err)
		}
	}
}

// introduce connects an old proxy with the one that takes its connections.
func (w *workload) introduce(old *generation, current *session) error {
	if current == nil {
		return w.drainAlone(old)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socketpair", err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	w.mu.Lock()
	s, until := old.session, old.until
	w.mu.Unlock()
	if s == nil {
		return nil // it is told when it is back
	}
	if err := current.conn.Send(link.KindInherit, 0, nil, pair[0]); err != nil {
		return err
	}
	if err := s.conn.Send(link.KindDrain, 0, link.Drain{Deadline: until}, pair[1]); err != nil {
		return err
	}
	w.mu.Lock()
	old.told = true
	w.mu.Unlock()
	return nil
}

// drainAlone drains a proxy that nobody follows.
func (w *workload) drainAlone(g *generation) error {
	w.mu.Lock()
	s, until := g.session, g.until
	w.mu.Unlock()
	if s == nil {
		return nil // it is told when it is back
	}
	if err := s.conn.Send(link.KindDrain, 0, link.Drain{Deadline: until}); err != nil {
		return err
	}
	w.mu.Lock()
	g.told = true
	w.mu.Unlock()
	return nil
}

// enforceDrain ends an old proxy that does not end by itself.
func (w *workload) enforceDrain(now time.Time) {
	w.mu.Lock()
	var late []*generation
	for _, g := range w.older {
		if !g.until.IsZero() && now.After(g.until.Add(overstay)) {
			late = append(late, g)
		}
	}
	w.mu.Unlock()
	for _, g := range late {
		w.log.Error("an old proxy outlives its drain and is ended", "pid", g.proc.PID())
		g.proc.Signal(syscall.SIGKILL)
	}
}
