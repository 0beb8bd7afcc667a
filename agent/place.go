package agent

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"assay.dev"
	"assay.dev/agent/attest"
	"assay.dev/agent/netns"
)

// Bounds of a placement's steps.
const (
	hostWithin   = 5 * time.Second  // until control has said which addresses are the host's
	settleWithin = 2 * time.Second  // from the agent's start, until control has said what there is
	acceptWithin = 10 * time.Second // until the proxy accepts
	decideWithin = 2 * time.Second  // until control has taken the workload
)

// place makes a workload: its namespace, addresses, rules, listeners and proxy, in
// that order, so that nothing of it was ever reachable uncaptured. owner is the
// process whose workload it is; it stays the caller's.
func (a *Agent) place(ctx context.Context, req RunRequest, owner *attest.Process) (*workload, error) {
	op := "run " + req.Service
	if req.Account == "" {
		req.Account = req.Service
	}
	if req.Namespace == "" {
		req.Namespace = "default"
	}
	for what, s := range map[string]string{"service": req.Service, "namespace": req.Namespace, "account": req.Account} {
		if !assay.ValidName(s) {
			return nil, &assay.Error{Kind: assay.Invalid, Op: op, Err: fmt.Errorf("%s %q", what, s), Remedy: "a name may hold a-z, 0-9 and '-', 63 characters at most"}
		}
	}
	if !a.hostReady.within(ctx, hostWithin) {
		return nil, &assay.Error{Kind: assay.Unavailable, Op: op, Err: errors.New("control has not yet told this host its addresses"), Remedy: "see why the agent does not reach control: its log says"}
	}
	select {
	case <-a.settled.ch: // else it would begin with services of another time
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	var artifacts assay.ArtifactSet
	if req.Artifact != "" {
		tree, err := a.digester.Tree(req.Artifact)
		if err != nil {
			return nil, &assay.Error{Kind: assay.Invalid, Op: op, Err: err}
		}
		artifacts = assay.ArtifactSet{tree}
	}
	rec, host, err := a.reserve(req)
	if err != nil {
		return nil, &assay.Error{Kind: assay.KindOf(err), Op: op, Err: err}
	}
	rec.Owner, rec.Workload.Artifacts = refOf(owner), artifacts
	w, err := a.prepare(rec, host)
	if err != nil {
		a.releaseAddrs(rec.Workload.Addrs)
		return nil, &assay.Error{Op: op, Err: err}
	}
	file, err := owner.File()
	if err == nil {
		owner, err = attest.FromPidfd(file)
	}
	w.start()
	if err != nil {
		w.end(err)
		<-w.done
		return nil, &assay.Error{Op: op, Err: err}
	}
	w.own(owner)
	if err := w.settle(ctx); err != nil {
		w.end(err)
		<-w.done
		if e, ok := errors.AsType[*assay.Error](err); ok {
			return nil, &assay.Error{Kind: e.Kind, Op: op, Err: e.Err, Remedy: e.Remedy}
		}
		return nil, &assay.Error{Op: op, Err: err}
	}
	return w, nil
}

// settle waits until the workload is meshed. Control that is away is waited for by
// the certificate, not by the start.
func (w *workload) settle(ctx context.Context) error {
	t := time.NewTimer(acceptWithin)
	defer t.Stop()
	select {
	case <-w.accepts.ch:
	case <-w.stillborn.ch:
	case <-t.C:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if !w.accepts.is() {
		w.mu.Lock()
		err := w.spawning
		w.mu.Unlock()
		if err == nil {
			err = fmt.Errorf("the proxy does not accept after %v: %s", acceptWithin, w.logTail())
		}
		return err
	}
	w.a.mu.Lock()
	connected := w.a.connected
	w.a.mu.Unlock()
	if connected {
		w.decided.within(ctx, decideWithin)
	}
	return w.refusal()
}

// reserve takes a number and addresses, on disk before anything is made of them.
func (a *Agent) reserve(req RunRequest) (record, *netns.Host, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.hostError != nil {
		return record{}, nil, a.hostError
	}
	if a.host == nil {
		return record{}, nil, &assay.Error{Kind: assay.Unavailable, Op: "reserve addresses", Err: errors.New("this host has none: its workloads are those of a platform"), Remedy: "start it as the platform does, in a pod"}
	}
	state := a.state
	state.Addresses = append([]netns.Allocator(nil), a.state.Addresses...)
	state.LastNumber++
	var addrs []netip.Addr
	for i := range state.Addresses {
		addr, err := state.Addresses[i].Next(func(x netip.Addr) bool { return a.inUse[x] })
		if err != nil {
			return record{}, nil, err
		}
		addrs = append(addrs, addr)
	}
	if err := a.store.saveHost(state); err != nil {
		return record{}, nil, err
	}
	a.state = state
	for _, x := range addrs {
		a.inUse[x] = true
	}
	id := assay.Identity{TrustDomain: state.TrustDomain, Namespace: req.Namespace, Account: req.Account}
	return record{
		Boot: a.boot, Number: state.LastNumber, Port: a.host.Port(state.LastNumber), Tree: req.Artifact,
		Workload: assay.Workload{
			ID: newID(req.Service), Namespace: req.Namespace, Name: req.Account, Service: req.Service, Host: state.HostID, Zone: a.cfg.Zone,
			Identity: id, Addrs: addrs, Labels: req.Labels, Ports: req.Ports,
		},
	}, a.host, nil
}

func (a *Agent) releaseAddrs(addrs []netip.Addr) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, x := range addrs {
		delete(a.inUse, x)
	}
}

// newID names a workload for the life of the mesh: 80 random bits.
func newID(service string) string {
	var b [10]byte
	rand.Read(b[:])
	return service + "-" + strings.ToLower(base32.StdEncoding.EncodeToString(b[:]))
}

// prepare makes everything but the proxy. What it made is gone again when it fails:
// the namespace with its descriptor, the rest by hand.
func (a *Agent) prepare(rec record, host *netns.Host) (_ *workload, err error) {
	ns, err := netns.Create()
	if err != nil {
		return nil, err
	}
	rec.NetNS, rec.Began = ns.Inode(), time.Now()
	w := a.newWorkload(rec, ns)
	defer func() {
		if err != nil {
			err = errors.Join(err, w.remove())
		}
	}()
	if err := a.store.saveRecord(&rec); err != nil {
		return nil, err
	}
	l, out, in, err := listen(ns, rec.roles(), 0, 0)
	if err != nil {
		return nil, err
	}
	w.listeners, w.rec.Outbound, w.rec.Inbound, w.rec.Listeners = l, out, in, l.inodes()
	// Rules first, then the link: nothing ever passes uncaptured.
	v := a.view.Load()
	if err := w.capture.Install(w.rules(v.config(rec.Workload.Namespace)), v.open); err != nil {
		return nil, err
	}
	if err := host.Attach(ns, rec.Port, rec.Workload.Addrs); err != nil {
		return nil, err
	}
	rules := w.rules(v.config(rec.Workload.Namespace))
	w.installMeter(rules.OwnMark, rules.Excluded)
	dir := a.runDir(rec.Workload.ID)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "resolv.conf"), resolvConf(rec.Workload.Namespace, a.cfg.Domain), 0o644); err != nil {
		return nil, err
	}
	return w, nil
}
