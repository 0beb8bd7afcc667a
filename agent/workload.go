package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"assay.dev"
	"assay.dev/agent/attest"
	"assay.dev/agent/capture"
	"assay.dev/agent/netns"
	"assay.dev/api"
	"assay.dev/link"
)

// workload is one workload of this host, from its place in the network to its end.
type workload struct {
	a     *Agent
	id    string
	addrs []netip.Addr
	log   *slog.Logger

	ns      *netns.Namespace
	capture *capture.Capture
	beside  *beside
	adopted bool // from the last agent
	given   bool // a pod: the namespace is somebody else's

	life      context.Context         // of the workload, once it is started
	end       context.CancelCauseFunc // ends it, and says why
	done      chan struct{}           // closed when its goroutines have ended, and everything is removed or left
	over      *latch                  // everything is removed
	wake      chan struct{}           // there is a new view
	lookNow   chan struct{}           // something about its sockets may have changed
	upgrade   chan struct{}           // its proxy should be replaced
	fewer     chan struct{}           // one of its proxies has ended
	owned     chan *attest.Process    // processes whose end is the workload's
	accepts   *latch                  // the proxy accepts
	decided   *latch                  // control accepted or refused it
	attested  *latch                  // its artifacts are known
	stillborn *latch                  // no proxy could be started
	leaving   *latch                  // a pod is taken out of the mesh
	gone      *latch                  // a pod has ended
	requests  *pace                   // for certificates, by its proxies
	findings  *pace

	saving    sync.Mutex // held before mu
	forgotten bool       // it has no record any more; saving

	mu        sync.Mutex
	rec       record
	listeners *listeners
	command   *attest.Process
	exeID     attest.FileID
	current   *generation   // the proxy that accepts
	next      *generation   // that will
	older     []*generation // that did, and finish what they have
	session   *session      // with the current one
	refused   error         // by control
	spawning  error         // why the proxy did not start
	failures  int           // proxies that ended before one accepted
	logFrom   int64         // where the proxy's log begins in its file
	report    *link.Report  // of all its proxies
	past      *link.Report  // of those that have ended
	counted   time.Time     // when the proxy answered last
	kernel    capture.Refused
	bundle    uint64       // in use by all its proxies
	notAfter  time.Time    // of the certificate that was issued last
	certified assay.Digest // the digest of its artifacts
	asked     assay.Digest // the digest of those for which another one was asked for
	withdrawn bool         // control was told that it is gone
	// transition says that a pod has joined, or leaves, and not everybody has heard of it.
	transition bool
	reported   time.Time
}

func (a *Agent) newWorkload(rec record, ns *netns.Namespace) *workload {
	w := &workload{
		a: a, id: rec.Workload.ID, addrs: rec.Workload.Addrs, log: a.log.With("workload", rec.Workload.ID),
		ns: ns, capture: capture.New(ns), beside: newBeside(ns, rec.Began),
		done: make(chan struct{}), wake: make(chan struct{}, 1), lookNow: make(chan struct{}, 1), upgrade: make(chan struct{}, 1), fewer: make(chan struct{}, 1),
		owned: make(chan *attest.Process), over: newLatch(), accepts: newLatch(), decided: newLatch(), attested: newLatch(), stillborn: newLatch(),
		leaving: newLatch(), gone: newLatch(), given: rec.Given != nil,
		requests: newPace(requestEvery, requestBurst), findings: newPace(findingEvery, findingBurst),
		rec: rec,
	}
	if a.cfg.Own != nil {
		w.attested.set() // by control
	}
	return w
}

// errAgentStops ends a workload's goroutines and leaves the workload alone.
var errAgentStops = errors.New("the agent stops")

// start begins the workload's goroutines.
func (w *workload) start() {
	ctx, end := context.WithCancelCause(w.a.workloads.ctx)
	w.life, w.end = ctx, end
	w.a.workloads.add(w)
	w.a.workloads.group.Go(func() { w.live(ctx) })
}

func (w *workload) live(ctx context.Context) {
	defer close(w.done)
	defer w.a.workloads.remove(w)
	// The proxy outlives the rest: it carries the last bytes of what ends.
	proxyCtx, endProxy := context.WithCancelCause(context.WithoutCancel(ctx))
	var proxy, rest sync.WaitGroup
	proxy.Go(func() { w.superviseProxy(proxyCtx) })
	rest.Go(func() { w.watchReadiness(ctx) })
	rest.Go(func() { w.distribute(ctx) })
	rest.Go(func() { w.watchOwners(ctx) })
	rest.Go(func() { w.pollReports(ctx) })
	rest.Go(func() { w.arrive(ctx) })
	<-ctx.Done()
	cause := context.Cause(ctx)
	rest.Wait()
	if errors.Is(cause, errAgentStops) {
		endProxy(errAgentStops)
		proxy.Wait()
		w.letGo()
		return
	}
	w.log.Info("workload ends", "reason", cause)
	leaves := errors.Is(cause, errReleased) && !w.isReleased()
	if leaves {
		w.setTransition(true)
	}
	// What dials a pod that ends must find the mesh, or nobody: the address stays meshed
	// until nothing listens there.
	ends := errors.Is(cause, errPodEnded)
	if ends {
		w.drain()
		w.settleReport()
	} else {
		w.settleReport()
		w.withdraw(leaves)
	}
	if leaves && !w.heard(w.a.workloads.ctx) && !w.gone.is() {
		cause = context.Cause(w.a.workloads.ctx) // the next agent is asked once more to release it
	}
	if !w.given {
		w.killAll()
	}
	if errors.Is(cause, errReleased) {
		ended := make(chan struct{})
		go func() { proxy.Wait(); close(ended) }()
		if w.leave(ended) {
			cause = errAgentStops
		}
	}
	endProxy(cause)
	proxy.Wait()
	if errors.Is(cause, errAgentStops) {
		w.letGo()
		return
	}
	if err := w.remove(); err != nil {
		w.log.Error("something of the workload is left", "err", err)
	}
	if ends {
		w.withdraw(false)
	}
	w.over.set()
}

// withdraw takes back "meshed", and gives control a moment to tell the others. Without
// control there is nobody to tell.
func (w *workload) withdraw(released bool) {
	w.mu.Lock()
	w.withdrawn = true
	w.mu.Unlock()
	w.a.outbox.workloadGone(w.id, departure{w.reportMessage(), released})
	const most = 300 * time.Millisecond
	for deadline := time.Now().Add(most); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if !w.published() {
			return
		}
	}
}

// killAll ends what still runs in the workload's namespace: children that its
// command left behind. Its end is theirs.
func (w *workload) killAll() {
	for deadline, sig := time.Now().Add(time.Second), syscall.SIGTERM; ; {
		list := inNamespace(w.ns.Inode(), w.proxyPIDs()...)
		if len(list) == 0 {
			return
		}
		for _, p := range list {
			if err := p.Signal(sig); err != nil && !errors.Is(err, attest.ErrGone) {
				w.log.Error("a process of the workload cannot be ended", "pid", p.PID(), "err", err)
			}
			p.Close()
		}
		if time.Now().After(deadline) {
			if sig == syscall.SIGKILL {
				w.log.Error("processes of the workload do not end", "processes", len(list))
				return
			}
			sig, deadline = syscall.SIGKILL, time.Now().Add(2*time.Second)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (w *workload) proxyPIDs() (list []int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, g := range w.living() {
		list = append(list, g.proc.PID())
	}
	return list
}

// remove takes away everything that the workload had.
func (w *workload) remove() error {
	w.mu.Lock()
	port := w.rec.Port
	w.mu.Unlock()
	var failed error
	if w.given {
		if !w.gone.is() {
			failed = w.uncapture()
		}
	} else if host := w.a.hostNetwork(); host != nil {
		failed = host.Detach(port)
	}
	failed = errors.Join(failed, w.outside().removeGroup(w.id), os.RemoveAll(w.a.runDir(w.id)), w.forgetRecord())
	w.letGo()
	w.a.releaseAddrs(w.addrs)
	return failed
}

// letGo closes descriptors and nothing else.
func (w *workload) letGo() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.listeners.Close()
	w.listeners = nil
	if w.command != nil {
		w.command.Close()
		w.command = nil
	}
	if err := w.capture.Close(); err != nil {
		w.log.Warn("capture", "err", err)
	}
	w.ns.Close()
}

// setArtifacts is told what the workload runs. When something else is said than before,
// control hears of it; the proxy gets another certificate when something else runs.
func (w *workload) setArtifacts(set assay.ArtifactSet) (changed bool) {
	w.mu.Lock()
	again := w.attested.is()
	old := w.rec.Workload.Artifacts
	w.rec.Workload.Artifacts = set
	s := w.session
	w.mu.Unlock()
	w.attested.set()
	if slices.Equal(old, set) {
		return false
	}
	if err := w.save(); err != nil {
		w.log.Error("the record is not on disk", "err", err)
	}
	w.a.outbox.workloadUp(w.id)
	if again && s != nil && old.Digest() != set.Digest() {
		s.renew()
	}
	return true
}

// markMeshed is called when the proxy accepts.
func (w *workload) markMeshed() {
	w.mu.Lock()
	first := w.rec.Workload.MeshedSince.IsZero()
	if first {
		w.rec.Workload.MeshedSince = time.Now().UTC().Truncate(time.Microsecond)
	}
	w.mu.Unlock()
	if first {
		if err := w.save(); err != nil {
			w.log.Error("the record is not on disk", "err", err)
		}
		w.a.outbox.workloadUp(w.id)
	}
	w.accepts.set()
}

func (w *workload) setListening(ports []uint16) bool {
	w.mu.Lock()
	same := slices.Equal(w.rec.Workload.Listening, ports)
	w.rec.Workload.Listening = ports
	w.mu.Unlock()
	if !same {
		// The next agent reports it before it has looked: else nothing would be ready
		// for a moment.
		if err := w.save(); err != nil {
			w.log.Error("the record is not on disk", "err", err)
		}
		w.a.outbox.workloadUp(w.id)
	}
	return !same
}

// allListening reports whether every declared port listens.
func (w *workload) allListening() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, p := range w.rec.Workload.Ports {
		if !slices.Contains(w.rec.Workload.Listening, p) {
			return false
		}
	}
	return true
}

func (w *workload) drain() {
	w.mu.Lock()
	was := w.rec.Workload.Draining
	w.rec.Workload.Draining = true
	w.mu.Unlock()
	if !was {
		w.a.outbox.workloadUp(w.id)
	}
}

// answered takes in control's decision.
func (w *workload) answered(refused error) {
	w.mu.Lock()
	w.refused = refused
	w.mu.Unlock()
	w.decided.set()
	if refused != nil {
		w.log.Error("control refused the workload", "err", refused)
	}
}

func (w *workload) refusal() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.refused
}

// message is what control is told, nil before the proxy accepts and after the
// workload was withdrawn.
func (w *workload) message() *api.Workload {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.rec.Workload.MeshedSince.IsZero() || w.withdrawn {
		return nil
	}
	return api.FromWorkload(&w.rec.Workload)
}

func (w *workload) markReported() {
	w.mu.Lock()
	w.reported = time.Now()
	w.mu.Unlock()
}

func (w *workload) bundleInUse() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.bundle
}

func (w *workload) namespace() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rec.Workload.Namespace
}

// noun is a copy of the workload as it is now.
func (w *workload) noun() assay.Workload {
	w.mu.Lock()
	defer w.mu.Unlock()
	v := w.rec.Workload
	v.Artifacts = slices.Clone(v.Artifacts)
	return v
}

// belong makes the workload one of this host and trust domain, which are others than when it
// began where the host has joined another mesh since. What it was called before nobody there takes: a
// proxy of the new name follows, and the old one ends with its connections.
func (w *workload) belong(host, domain string) {
	w.mu.Lock()
	n := &w.rec.Workload
	other := n.Identity.TrustDomain != domain
	same := !other && n.Host == host
	n.Host, n.Identity.TrustDomain = host, domain
	w.mu.Unlock()
	if same {
		return
	}
	if err := w.save(); err != nil {
		w.log.Error("the record is not on disk", "err", err)
	}
	if other {
		w.log.Warn("this host has joined another mesh; the workload gets an identity there", "trustDomain", domain)
		w.wantUpgrade()
	}
}

func (w *workload) save() error {
	w.saving.Lock() // an older record must not be written last
	defer w.saving.Unlock()
	if w.forgotten {
		return nil // whoever attests it has not heard yet
	}
	w.mu.Lock()
	rec := w.rec
	w.mu.Unlock()
	return w.a.store.saveRecord(&rec)
}

// forgetRecord takes the record away, for good.
func (w *workload) forgetRecord() error {
	w.saving.Lock()
	defer w.saving.Unlock()
	w.forgotten = true
	return w.a.store.forget(w.id)
}
