package agent

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"assay.dev"
	"assay.dev/agent/attest"
	"assay.dev/agent/netns"
)

// Agent is the agent of one host. Make one with New and call Run once.
type Agent struct {
	cfg       Config
	log       *slog.Logger
	digester  attest.Digester
	outbox    *outbox
	upgrading chan struct{} // slots for upgrades
	spans     *spans        // nil: none are sent
	kubelet   kubelet
	converge  convergence
	unlogged  atomic.Uint64 // requests that an access log lacks
	untraced  atomic.Uint64 // spans that the collector lacks
	meshing   sync.Mutex    // one pod begins at a time
	accessLog *accessLog    // nil without cfg.AccessLog
	taps      []assay.Watch // that operators hold open; mu

	dirty     chan struct{} // the snapshot has changed
	view      atomic.Pointer[view]
	fresh     *latch // the view is newer than what adopted proxies may know
	settled   *latch // it is, or control let this agent wait
	hostReady *latch // prefixes are known and the host's network was set up, or could not be
	ready     *latch // workloads may come
	workloads workloads
	boot      string
	store     *store

	publishing sync.Mutex // one view after the other
	publisher  *publisher
	saving     sync.Mutex  // one snapshot on disk after the other
	routed     string      // the peers that are routed to
	routedBy   *netns.Host // and by whom
	deltas     deltas      // of the newest view, as proxies are sent them

	mu          sync.Mutex
	state       hostState
	host        *netns.Host
	hostError   error
	snapshot    *snapshot
	news        map[string]*resource // what has changed since the last view; nil: perhaps everything
	table       sharedTable
	connected   bool
	leaving     Leaving
	leavingView uint64         // the first with leaving
	relay       netip.AddrPort // of names, when the host needs one
	inUse       map[netip.Addr]bool
	addresses   []netip.Addr // the host's own, where pods are probed
}

// workloads are those of the host, and the goroutines of all.
type workloads struct {
	ctx   context.Context
	group sync.WaitGroup

	mu sync.Mutex
	m  map[string]*workload
}

func (s *workloads) add(w *workload) {
	s.mu.Lock()
	s.m[w.id] = w
	s.mu.Unlock()
}

func (s *workloads) remove(w *workload) {
	s.mu.Lock()
	delete(s.m, w.id)
	s.mu.Unlock()
}

func (a *Agent) workload(id string) *workload {
	a.workloads.mu.Lock()
	defer a.workloads.mu.Unlock()
	return a.workloads.m[id]
}

func (a *Agent) all() []*workload {
	a.workloads.mu.Lock()
	defer a.workloads.mu.Unlock()
	list := make([]*workload, 0, len(a.workloads.m))
	for _, w := range a.workloads.m {
		list = append(list, w)
	}
	slices.SortFunc(list, func(x, y *workload) int {
		if x.id < y.id {
			return -1
		}
		return 1
	})
	return list
}

// New checks the configuration. It starts and touches nothing.
func New(cfg Config) (*Agent, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	a := &Agent{
		cfg: cfg, log: cfg.Log, outbox: newOutbox(), dirty: make(chan struct{}, 1),
		upgrading: make(chan struct{}, maxUpgrading),
		fresh:     newLatch(), settled: newLatch(), hostReady: newLatch(), ready: newLatch(), publisher: newPublisher(), snapshot: newSnapshot(0), inUse: map[netip.Addr]bool{},
	}
	if cfg.AccessLog != nil {
		a.accessLog = newAccessLog(cfg.AccessLog, &a.unlogged)
	}
	if cfg.OTLP != "" {
		a.spans = newSpans(cfg.OTLP, &a.untraced)
	}
	a.kubelet.port = cfg.Kubelet
	a.workloads.m = map[string]*workload{}
	a.view.Store(a.publisher.view)
	return a, nil
}

// Ready is closed when workloads are adopted, agent.sock answers, and control has said
// what there is; without control, settleWithin later.
func (a *Agent) Ready() <-chan struct{} { return a.ready.ch }

// Run is the agent. It returns when ctx ends, after everything that it started has
// ended or, without Config.EndWorkloads, was left for the next agent.
func (a *Agent) Run(ctx context.Context) (err error) {
	defer func() {
		for _, l := range []net.Listener{a.cfg.Metrics, listenerOf(a.cfg.Listener)} {
			if l != nil {
				l.Close()
			}
		}
	}()
	if a.store, err = openStore(a.cfg.DataDir); err != nil {
		return err
	}
	defer a.store.Close()
	if err := a.load(); err != nil {
		return err
	}
	sock, err := a.listen()
	if err != nil {
		return err
	}
	defer sock.Close()

	// Workloads end first (or are left), then what serves them.
	serving, stopServing := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stopServing(nil)
	var stopWorkloads context.CancelCauseFunc
	a.workloads.ctx, stopWorkloads = context.WithCancelCause(context.WithoutCancel(ctx))
	defer stopWorkloads(nil)

	var g sync.WaitGroup
	a.publish()
	g.Go(func() { a.publishLoop(serving) })
	failed := make(chan error, 2)
	if a.cfg.Metrics != nil {
		g.Go(func() { failed <- a.serveMetrics(serving) })
	}
	// Control forgets what it is not told at the beginning of a stream: what runs must
	// be known before.
	a.adopt()
	g.Go(func() { a.syncLoop(serving) })
	if a.accessLog != nil {
		g.Go(func() { a.accessLog.run(serving) })
	}
	if a.spans != nil {
		g.Go(func() { a.spans.run(serving, a.log.Warn) })
	}
	g.Go(func() { // once there is a control that certifies successors
		select {
		case <-a.fresh.ch:
		case <-serving.Done():
			return
		}
		if err := a.Upgrade(); err != nil {
			a.log.Error("adopted proxies are not upgraded", "err", err)
		}
	})
	if a.cfg.Kubelet != 0 {
		g.Go(func() { a.watchAddresses(serving) })
	}
	g.Go(func() { a.relayNames(serving, loopbackResolver()) })
	g.Go(func() { failed <- a.serve(serving, sock) })
	g.Go(func() { a.settle(serving) })
	if a.cfg.Pods != nil {
		g.Go(func() { a.tellUnmeshed(serving) })
	}

	select {
	case <-a.settled.ch:
		a.ready.set()
		a.log.Info("agent is ready", "socket", a.socketPath(), "workloads", len(a.all()))
		select {
		case <-ctx.Done():
		case err = <-failed:
		}
	case <-ctx.Done():
	case err = <-failed:
	}
	cause := errAgentStops
	if a.cfg.EndWorkloads {
		cause = errors.New("the mesh on this host is stopped")
	}
	stopWorkloads(cause)
	a.workloads.group.Wait()
	stopServing(errAgentStops)
	g.Wait()
	if a.cfg.EndWorkloads {
		if host := a.hostNetwork(); host != nil {
			err = errors.Join(err, host.Remove())
		}
	}
	a.mu.Lock()
	if a.table.file != nil {
		a.table.file.Close()
	}
	a.mu.Unlock()
	return err
}

// settle waits for control's word on what there is. What is on disk may be of another
// time: it serves what runs already, and whoever starts now should not meet it.
func (a *Agent) settle(ctx context.Context) {
	if !a.fresh.within(ctx, settleWithin) && ctx.Err() == nil {
		a.log.Warn("control has not said yet what there is; going on with what is on disk")
	}
	a.settled.set()
}

// load reads what the last agent left on disk.
func (a *Agent) load() error {
	var err error
	if a.boot, err = attest.BootID(); err != nil {
		return &assay.Error{Op: "start agent", Err: err}
	}
	if a.state, err = a.store.loadHost(); err != nil {
		return &assay.Error{Op: "start agent", Err: err, Remedy: "restore the file, or remove it while no workload runs"}
	}
	if a.snapshot, err = loadSnapshot(a.store.path("snapshot")); err != nil {
		a.log.Warn("the snapshot on disk is not used", "err", err)
	}
	if len(a.state.Addresses) > 0 {
		if err := a.setupHost(a.state); err != nil {
			a.log.Error("the host's network could not be set up", "err", err)
		}
	}
	return nil
}

func (a *Agent) hostNetwork() *netns.Host {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.host
}

func (a *Agent) socketPath() string { return filepath.Join(a.cfg.RuntimeDir, SocketName) }

// runDir holds what a workload sees of the agent's.
func (a *Agent) runDir(id string) string { return filepath.Join(a.cfg.RuntimeDir, "workloads", id) }

// listen opens agent.sock, unless somebody did.
func (a *Agent) listen() (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Join(a.cfg.RuntimeDir, "workloads"), 0o755); err != nil {
		return nil, &assay.Error{Op: "start agent", Err: err, Remedy: "run as root, or name a folder of your own"}
	}
	if dir := untraversable(a.cfg.RuntimeDir); dir != "" && uidMapped(a.cfg.ProxyUIDs) && !a.cfg.Last {
		a.log.Warn("proxies will not find the next agent: only its owner may enter a folder above agent.sock", "folder", dir, "remedy", "chmod o+x, or another folder")
	}
	if a.cfg.Listener != nil {
		return a.cfg.Listener, nil
	}
	return ListenSocket(a.socketPath())
}

// untraversable returns a folder on the way to dir that others may not enter, or "".
func untraversable(dir string) string {
	for ; ; dir = filepath.Dir(dir) {
		if st, err := os.Stat(dir); err == nil && st.Mode().Perm()&0o001 == 0 {
			return dir
		}
		if dir == filepath.Dir(dir) {
			return ""
		}
	}
}

// ListenSocket opens agent.sock at path. The folder of the agent that owned it before
// is locked by openStore, so what is there is a leftover. Everybody may connect: who
// may do what is decided by the peer's credentials.
func ListenSocket(path string) (*net.UnixListener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, &assay.Error{Op: "open " + path, Err: err}
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, &assay.Error{Op: "open " + path, Err: err}
	}
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, &assay.Error{Op: "open " + path, Err: err}
	}
	return l, nil
}

func listenerOf(l *net.UnixListener) net.Listener {
	if l == nil {
		return nil
	}
	return l
}
