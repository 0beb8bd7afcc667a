package node

import (
	"cmp"
	"context"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/kube/cri"
)

// Placed is a pod with the network that a runtime made for it.
type Placed struct {
	Pod
	Sandbox string // the runtime's name of it
	NetNS   string // a path, as the runtime sees it; else that of a process in it
	Link    string
	Addrs   []netip.Addr
}

// Host is the node's agent. Its methods are called for several pods at once, never for
// one pod.
type Host interface {
	// Meshed lists the pods that are in the mesh, also those that leave it, by UID.
	Meshed() []string
	// Mesh returns when the pod's connections are captured. One that is meshed already is
	// left alone.
	Mesh(ctx context.Context, p Placed) error
	// Release begins a pod's way out.
	Release(uid string) error
	// Attest says what a pod runs.
	Attest(uid string, set assay.ArtifactSet) error
	// End removes what is kept of a pod that is gone.
	End(ctx context.Context, uid string) error
	// Leave says how far a mesh has come that is taken out (LeavingServe …), "" for one
	// that stays.
	Leave(step string)
}

// Runtime is the node's container runtime.
type Runtime interface {
	Sandboxes(ctx context.Context) ([]cri.Sandbox, error)
	// Events calls wake for whatever happens to containers. It returns with an error when
	// the runtime does not tell, or no more.
	Events(ctx context.Context, wake func()) error
}

// Reconciler brings a node's pods into line with what is wanted.
type Reconciler struct {
	source  *Source
	runtime Runtime
	host    Host
	log     *slog.Logger
	wake    chan struct{} // holds a token when the runtime, or a step that has ended, has news

	mu      sync.Mutex
	pods    map[string]*progress // by UID
	hears   bool                 // the runtime tells of events
	away    error                // why the runtime could not be asked
	since   time.Time            // that it has been away
	absent  map[string]time.Time // pods that run, and since when the runtime has been found not to know them
	running int                  // steps
	again   int                  // of them, those of pods that have failed before
}

// NewReconciler returns a Reconciler; it does nothing yet.
func NewReconciler(source *Source, runtime Runtime, host Host, log *slog.Logger) *Reconciler {
	return &Reconciler{source: source, runtime: runtime, host: host, log: log, wake: make(chan struct{}, 1), pods: map[string]*progress{}}
}

const (
	workers     = 16               // pods at once
	patients    = 4                // of them, pods that have failed before: they may take long
	stepWithin  = 30 * time.Second // for one of them
	lookEvery   = 10 * time.Second // at a runtime that tells of events
	lookOften   = time.Second      // at one that does not, or is away
	settleTime  = 20 * time.Millisecond
	eventsRetry = 5 * time.Second
	absentFor   = time.Minute // a node that starts anew, or a runtime that replaces a sandbox, is not worth a word
)

// Run reconciles until ctx ends.
func (r *Reconciler) Run(ctx context.Context) error {
	var all sync.WaitGroup
	defer all.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	all.Go(func() { r.listen(ctx) })
	for ctx.Err() == nil {
		r.host.Leave(r.source.Leaving())
		steps, next := r.look(ctx)
		for _, s := range steps {
			if r.begin(s.uid) {
				all.Go(func() { r.do(ctx, s) })
			}
		}
		r.rest(ctx, next)
	}
	return context.Cause(ctx)
}

// look asks everybody and says what is to be done.
func (r *Reconciler) look(ctx context.Context) ([]step, time.Time) {
	w := world{meshed: r.host.Meshed()}
	w.pods, w.synced = r.source.Pods()
	within, cancel := context.WithTimeout(ctx, stepWithin)
	defer cancel()
	list, err := r.runtime.Sandboxes(within)
	r.mu.Lock()
	defer r.mu.Unlock()
	if ctx.Err() != nil {
		return nil, time.Time{}
	}
	if err != nil {
		if r.away == nil {
			r.since = time.Now()
		}
		if r.away == nil || err.Error() != r.away.Error() {
			r.log.Error("the container runtime cannot be asked; what is meshed goes on", "err", err)
		}
		r.away = err
		return nil, time.Time{}
	}
	r.away = nil
	w.sandboxes = newest(list)
	r.absent = w.absent(r.absent, time.Now())
	for uid, p := range r.pods {
		if _, runs := w.sandboxes[uid]; !runs && !p.busy && !slices.Contains(w.meshed, uid) {
			delete(r.pods, uid)
		}
	}
	return plan(w, r.pods, time.Now())
}

// newest leaves one sandbox for each pod: while a runtime replaces one, both may be there.
func newest(list []cri.Sandbox) map[string]cri.Sandbox {
	out := map[string]cri.Sandbox{}
	for _, s := range list {
		if old, ok := out[s.UID]; !ok || old.Created.Before(s.Created) {
			out[s.UID] = s
		}
	}
	return out
}

// begin takes a worker for a pod; without, its turn comes when a step has ended.
func (r *Reconciler) begin(uid string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.pods[uid]
	if p == nil {
		p = &progress{}
		r.pods[uid] = p
	}
	if r.running == workers || p.failures > 0 && r.again == patients {
		return false
	}
	p.busy = true
	r.running++
	if p.failures > 0 {
		r.again++
	}
	return true
}

// do takes one step.
func (r *Reconciler) do(ctx context.Context, s step) {
	ctx, cancel := context.WithTimeout(ctx, stepWithin)
	defer cancel()
	var err error
	switch s.verb {
	case meshIt:
		err = r.host.Mesh(ctx, placed(s))
	case attestIt:
		err = r.host.Attest(s.uid, s.sandbox.Artifacts())
	case releaseIt:
		err = r.host.Release(s.uid)
	case endIt:
		err = r.host.End(ctx, s.uid)
	}
	r.ended(s, err)
	r.news()
}

func placed(s step) Placed {
	p := Placed{Pod: s.pod, Sandbox: s.sandbox.ID, NetNS: s.sandbox.Path(), Link: "eth0", Addrs: s.sandbox.Addrs}
	if len(p.Addrs) == 0 {
		p.Addrs = s.pod.Addrs
	}
	return p
}

// name is for people; of a pod that is gone it is not known.
func (s *step) name() string {
	if s.sandbox.ID != "" {
		return s.sandbox.Namespace + "/" + s.sandbox.Name
	}
	return s.pod.Namespace + "/" + s.pod.Name
}

// ended takes in how a step went.
func (r *Reconciler) ended(s step, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	p := r.pods[s.uid]
	p.busy = false
	r.running--
	if p.failures > 0 {
		r.again--
	}
	if err != nil {
		if p.err == nil || p.err.Error() != err.Error() {
			r.log.Error("pod", "step", s.verb, "pod", s.name(), "uid", s.uid, "err", err)
		}
		p.failed(err, time.Now())
		return
	}
	p.failures, p.err, p.next = 0, nil, time.Time{}
	switch s.verb {
	case meshIt:
		p.sandbox, p.attested, p.released = s.sandbox.ID, nil, false
	case attestIt:
		p.attested = s.sandbox.Artifacts()
	case releaseIt:
		p.sandbox, p.attested, p.released = "", nil, true
	}
	if s.verb != attestIt {
		r.log.Info("pod", "step", s.verb, "pod", s.name(), "uid", s.uid)
	}
}

// rest waits until there may be something to do.
func (r *Reconciler) rest(ctx context.Context, next time.Time) {
	r.mu.Lock()
	wait := lookOften
	if r.hears && r.away == nil {
		wait = lookEvery
	}
	r.mu.Unlock()
	if !next.IsZero() {
		wait = max(min(wait, time.Until(next)), 0)
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return
	case <-t.C:
	case <-r.source.Changed():
	case <-r.wake:
	}
	// What belongs together comes one after the other.
	t.Reset(settleTime)
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// listen has the runtime's events wake the Reconciler.
func (r *Reconciler) listen(ctx context.Context) {
	for ctx.Err() == nil {
		r.hear(true)
		err := r.runtime.Events(ctx, r.news)
		r.hear(false)
		r.log.Debug("the container runtime tells of no events; it is asked every second", "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(eventsRetry):
		}
	}
}

func (r *Reconciler) hear(yes bool) {
	r.mu.Lock()
	r.hears = yes
	r.mu.Unlock()
}

func (r *Reconciler) news() {
	select {
	case r.wake <- struct{}{}:
	default: // there is a token
	}
}

// Reason is why a pod that is labelled is not in the mesh.
type Reason string

const (
	Failed      Reason = "failed"       // it is tried on
	HostNetwork Reason = "host-network" // until it is another pod, or labelled otherwise
	Static      Reason = "static"       // the same
	NoRuntime   Reason = "runtime"      // the container runtime is away, or does not know it
)

// Unmeshed is a pod that is labelled and cannot be brought into the mesh, or not be kept
// in line.
type Unmeshed struct {
	UID, Namespace, Name string
	Reason               Reason
	Since                time.Time // zero: as long as it is there
	Attempts             int
	Err                  error
}

// Unmeshed lists the pods that have failed, and those that no attempt could bring into the
// mesh, by namespace and name.
func (r *Reconciler) Unmeshed() []Unmeshed {
	meshed := r.host.Meshed() // asked before the pods
	pods, _ := r.source.Pods()
	r.mu.Lock()
	defer r.mu.Unlock()
	var list []Unmeshed
	for uid, pod := range pods {
		u := Unmeshed{UID: uid, Namespace: pod.Namespace, Name: pod.Name}
		switch p := r.pods[uid]; {
		case pod.Barred:
			u.Reason, u.Err = pod.bar(), pod.barred()
		case pod.Wanted && p != nil && p.failures > 0:
			u.Reason, u.Since, u.Attempts, u.Err = Failed, p.since, p.failures, p.err
		case !pod.Wanted || !pod.running || slices.Contains(meshed, uid):
			continue
		case r.away != nil:
			u.Reason, u.Since, u.Err = NoRuntime, r.since, pod.unknown(r.away)
		case !r.absent[uid].IsZero() && time.Since(r.absent[uid]) >= absentFor:
			u.Reason, u.Since, u.Err = NoRuntime, r.absent[uid], pod.unknown(nil)
		default:
			continue
		}
		list = append(list, u)
	}
	slices.SortFunc(list, func(a, b Unmeshed) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.UID, b.UID))
	})
	return list
}
