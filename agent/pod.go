package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"assay.dev"
	"assay.dev/agent/capture"
	"assay.dev/agent/meter"
	"assay.dev/agent/netns"
)

// Pod is a workload in a network namespace that somebody else makes and ends, as a
// container runtime does. The agent is a guest there: it adds a proxy, rules and
// nothing else, ends no process but its proxies, and can leave again.
type Pod struct {
	ID        string // names it for its whole life, on this host
	Namespace string
	Account   string
	Service   string
	Labels    map[string]string
	Ports     []uint16     // that it declares
	Addrs     []netip.Addr // of its own, in its namespace
	Probes    []uint16     // those at which the kubelet asks whether it lives
	OOMScore  int          // oom_score_adj, of its proxy too
	Sandbox   string       // the runtime's name of what holds the namespace; another one follows if it dies
	NetNS     string       // a path of the namespace
	Link      string       // its link ("eth0")
	Running   bool         // and has clients, perhaps, which have not heard that it joins
}

// given is what a record holds of a pod.
type given struct {
	Sandbox  string   `json:"sandbox,omitempty"`
	NetNS    string   `json:"netns"`
	Link     string   `json:"link"`
	OOMScore int      `json:"oomScore,omitempty"`
	Probes   []uint16 `json:"probes,omitempty"`
	Released bool     `json:"released,omitempty"`
}

var (
	errReleased = errors.New("the pod leaves the mesh")
	errPodEnded = errors.New("the pod has ended")
)

// Mesh joins a pod, which may run already: connections that it has are left alone. It
// returns when the rules are installed and the proxy accepts; the certificate comes when
// the artifacts are known (Attest). A pod that is meshed already is not touched, also when
// control does not take it any more, which is the error; one whose namespace is another
// than before has begun anew.
func (a *Agent) Mesh(ctx context.Context, p Pod) error {
	op := "mesh pod " + p.ID
	if p.Link == "" {
		p.Link = netns.Interface
	}
	if err := p.check(); err != nil {
		return &assay.Error{Kind: assay.Invalid, Op: op, Err: err}
	}
	select {
	case <-a.settled.ch: // else it would begin with services of another time
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	ns, err := a.namespaceAt(p.NetNS)
	if err != nil {
		return &assay.Error{Kind: assay.KindOf(err), Op: op, Err: err}
	}
	w, made, err := a.podIn(ctx, ns, p)
	if err == nil {
		err = w.settle(ctx)
		switch {
		case err == nil || w.life.Err() != nil:
		case made:
			w.end(err)
			<-w.done
		default: // it goes on as it is, and control is asked again
			a.outbox.workloadUp(w.id)
		}
	}
	if err == nil {
		return nil
	}
	e := &assay.Error{Kind: assay.KindOf(err), Op: op, Err: err}
	if inner, ok := errors.AsType[*assay.Error](err); ok {
		e.Err, e.Remedy = inner.Err, inner.Remedy
	}
	return e
}

// namespaceAt opens a network namespace by the path that a runtime tells.
func (a *Agent) namespaceAt(path string) (ns *netns.Namespace, err error) {
	if a.cfg.Own != nil {
		return netns.Own()
	}
	if a.cfg.Outside == nil {
		return netns.At(path)
	}
	err = a.cfg.Outside.in(func() error {
		ns, err = netns.At(path)
		return err
	})
	return ns, err
}

// podIn returns the workload of a pod in a namespace, which it takes over, and makes it if
// there is none.
func (a *Agent) podIn(ctx context.Context, ns *netns.Namespace, p Pod) (_ *workload, made bool, _ error) {
	a.meshing.Lock() // a runtime and whoever looks after pods may ask for the same one
	defer a.meshing.Unlock()
	if self, err := hostNamespace(); a.cfg.Own == nil && (err != nil || self == ns.Inode()) {
		ns.Close()
		return nil, false, errors.Join(errors.New("it shares the host's network, which cannot be captured"), err)
	}
	if w := a.workload(p.ID); w != nil {
		switch {
		case !w.given || w.ns.Inode() == ns.Inode() && w.life.Err() == nil:
			ns.Close()
			return w, false, nil
		case w.ns.Inode() == ns.Inode():
			ns.Close()
			return nil, false, &assay.Error{Kind: assay.Unavailable, Err: errors.New("it is leaving the mesh, and connections still go through its proxy"), Remedy: "try again when they have ended, or restart the pod"}
		}
		if err := a.PodEnded(ctx, p.ID); err != nil {
			ns.Close()
			return nil, false, err
		}
	}
	if a.cfg.Kubelet != 0 {
		a.lookAtAddresses()
	}
	rec, err := a.reservePod(p)
	if err != nil {
		ns.Close()
		return nil, false, err
	}
	w, err := a.preparePod(rec, ns)
	if err != nil {
		a.releaseAddrs(rec.Workload.Addrs)
		return nil, false, err
	}
	w.transition = p.Running
	w.start()
	return w, true, nil
}

func (p *Pod) check() error {
	for what, s := range map[string]string{"namespace": p.Namespace, "account": p.Account} {
		if !assay.ValidName(s) {
			return fmt.Errorf("%s %q", what, s)
		}
	}
	switch {
	case !assay.ValidName(p.ID):
		return fmt.Errorf("name %q", p.ID)
	case p.Service != "" && !assay.ValidName(p.Service):
		return fmt.Errorf("service %q", p.Service)
	case len(p.Addrs) == 0:
		return errors.New("it has no address of its own: it shares the host's network")
	case p.NetNS == "":
		return errors.New("its network namespace is not known")
	}
	return nil
}

// reservePod takes a number and the pod's addresses.
func (a *Agent) reservePod(p Pod) (record, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.state.HostID == "" {
		return record{}, &assay.Error{Kind: assay.Unavailable, Err: errors.New("control has not yet said who this host is"), Remedy: "see why the agent does not reach control: its log says"}
	}
	var addrs []netip.Addr
	for _, x := range p.Addrs {
		x = x.Unmap()
		if a.inUse[x] {
			return record{}, &assay.Error{Kind: assay.Conflict, Err: fmt.Errorf("%s belongs to another workload of this host", x)}
		}
		addrs = append(addrs, x)
	}
	state := a.state
	state.LastNumber++
	if err := a.store.saveHost(state); err != nil {
		return record{}, err
	}
	a.state = state
	for _, x := range addrs {
		a.inUse[x] = true
	}
	return record{
		Boot: a.boot, Number: state.LastNumber, Given: &given{Sandbox: p.Sandbox, NetNS: p.NetNS, Link: p.Link, Probes: p.Probes, OOMScore: p.OOMScore},
		Workload: assay.Workload{
			ID: p.ID, Namespace: p.Namespace, Name: p.Account, Service: p.Service, Host: state.HostID, Zone: a.zone(),
			Identity: assay.Identity{TrustDomain: state.TrustDomain, Namespace: p.Namespace, Account: p.Account},
			Addrs:    addrs, Labels: p.Labels, Ports: p.Ports,
		},
	}, nil
}

// preparePod makes everything but the proxy, and takes back what it made when it fails.
func (a *Agent) preparePod(rec record, ns *netns.Namespace) (_ *workload, err error) {
	rec.NetNS, rec.Began = ns.Inode(), time.Now()
	w, captured := a.newWorkload(rec, ns), false
	defer func() {
		if err != nil && captured {
			err = errors.Join(err, w.uncapture())
		}
		if err != nil {
			err = errors.Join(err, a.store.forget(rec.Workload.ID))
			w.letGo()
		}
	}()
	if err := a.store.saveRecord(&rec); err != nil {
		return nil, err
	}
	if w.listeners, w.rec.Outbound, w.rec.Inbound, err = listen(ns, rec.roles(), 0, 0); err != nil {
		return nil, err
	}
	w.rec.Listeners = w.listeners.inodes()
	if a.cfg.Own == nil {
		if err := ns.Loosen(); err != nil {
			return nil, err
		}
	}
	v := a.view.Load()
	rules := w.rules(v.config(rec.Workload.Namespace))
	captured = true
	if err := w.capture.Install(rules, v.open); err != nil {
		return nil, err
	}
	w.installMeter(rules.OwnMark, rules.Excluded)
	return w, nil
}

// Release takes a pod out of the mesh and returns at once: control is told, what is new
// goes direct, and the proxy ends with the last connection that goes through it, at most
// Config.ProxyDrain later. Then nothing of Assay is left in the pod.
func (a *Agent) Release(id string) error {
	w, err := a.pod("release pod "+id, id)
	if err == nil {
		w.end(errReleased)
	}
	return err
}

// PodEnded removes what is kept of a pod, and waits for that. One that is not meshed is
// no error.
func (a *Agent) PodEnded(ctx context.Context, id string) error {
	w := a.workload(id)
	if w == nil || !w.given {
		return nil
	}
	w.gone.set()
	w.end(errPodEnded)
	select {
	case <-w.done:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Attest says what a pod runs, as the container runtime tells it. A change of the set
// has the proxy ask for another certificate.
func (a *Agent) Attest(id string, set assay.ArtifactSet) error {
	w, err := a.pod("attest pod "+id, id)
	if err == nil {
		w.setArtifacts(set)
	}
	return err
}

// Pods lists the pods that are meshed, also those that are leaving.
func (a *Agent) Pods() []string {
	var list []string
	for _, w := range a.all() {
		if w.given {
			list = append(list, w.id)
		}
	}
	return list
}

func (a *Agent) pod(op, id string) (*workload, error) {
	w := a.workload(id)
	if w == nil || !w.given {
		return nil, &assay.Error{Kind: assay.NotFound, Op: op, Err: errors.New("it is not meshed on this host")}
	}
	return w, nil
}

// uncapture takes the rules away.
func (w *workload) uncapture() error {
	if w.a.cfg.Own != nil {
		return nil // its containers may run: without a proxy they reach nobody, and not everybody
	}
	return errors.Join(w.capture.Remove(w.a.cfg.ReturnMark), w.beside.meter.Remove())
}

func (w *workload) isReleased() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rec.Given != nil && w.rec.Given.Released
}

// release begins a pod's way out of the mesh: on disk, in its rules, and for its proxy.
func (w *workload) release() {
	w.mu.Lock()
	out := *w.rec.Given // a record that is being written has the old one
	out.Released = true
	w.rec.Given = &out
	w.mu.Unlock()
	if err := w.save(); err != nil {
		w.log.Error("the record is not on disk", "err", err)
	}
	if err := w.capture.Install(w.rules(w.a.view.Load().config(w.noun().Namespace)), nil); err != nil {
		w.log.Error("capture rules", "err", err)
	}
	w.leaving.set()
}

// leave waits until a released pod's proxies have ended, which is when their last
// connection has, or must. It reports whether the agent stops before that.
func (w *workload) leave(ended <-chan struct{}) (stops bool) {
	w.release()
	over := time.NewTimer(w.a.cfg.ProxyDrain + overstay)
	defer over.Stop()
	select {
	case <-ended:
	case <-w.gone.ch:
	case <-over.C:
		w.log.Error("a proxy outlives the pod's way out of the mesh and is ended")
	case <-w.a.workloads.ctx.Done():
		return errors.Is(context.Cause(w.a.workloads.ctx), errAgentStops)
	}
	return false
}

// retire drains the current proxy in favour of nobody.
func (w *workload) retire() {
	w.mu.Lock()
	if g := w.current; g != nil {
		g.until, g.told = time.Now().Add(w.a.cfg.ProxyDrain).UTC(), false
		w.current, w.session = nil, nil
		w.older = append(slices.Clone(w.older), g)
	}
	for _, g := range w.older {
		g.told = false // those that had a successor to give to
	}
	w.mu.Unlock()
	if err := w.saveGenerations(); err != nil {
		w.log.Error("the record is not on disk", "err", err)
	}
	w.drainOlder()
}

// adoptPod continues a pod of the last agent. Whether it still is there, those who watch
// pods know.
func (a *Agent) adoptPod(rec record) error {
	proxies := a.adoptable(rec)
	ns, err := a.namespaceAt(rec.Given.NetNS)
	if err == nil && ns.Inode() != rec.NetNS {
		ns.Close() // another one has its name by now
		ns = nil
	}
	if ns == nil {
		if ns, err = namespaceOf(rec.NetNS, proxies.processes()...); err != nil {
			for _, p := range proxies.processes() {
				p.Close()
			}
			return errors.New("its network namespace is gone")
		}
	}
	w := a.continued(rec, ns, proxies)
	if rec.Given.Released {
		w.leaving.set() // so no proxy is started
	}
	w.start()
	if rec.Given.Released {
		w.end(errReleased)
	}
	return nil
}

// sweepPod ends the proxies of a pod that is gone, and leaves its namespace, if there is
// one, as it was found.
func (a *Agent) sweepPod(rec record) error {
	for _, p := range a.adoptable(rec).processes() {
		p.Signal(syscall.SIGKILL)
		waitGone(p)
		p.Close()
	}
	ns, err := a.namespaceAt(rec.Given.NetNS)
	if err != nil {
		return nil
	}
	defer ns.Close()
	if ns.Inode() != rec.NetNS || a.cfg.Own != nil {
		return nil
	}
	return errors.Join(capture.New(ns).Remove(a.cfg.ReturnMark), meter.New(ns).Remove())
}
