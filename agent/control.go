package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"assay.dev"
	"assay.dev/agent/netns"
	"assay.dev/api"
)

// Reconnecting begins at once and backs off to a bound that an operator can wait for.
const (
	retryFirst  = 100 * time.Millisecond
	retryMost   = 5 * time.Second
	reportEvery = time.Second
	// staleFor is how long a new agent leaves adopted workloads with what they know,
	// which may be newer than the snapshot on its disk, while it waits for control.
	staleFor = 5 * time.Second
)

// syncLoop keeps a stream to control. Without control the agent goes on with what it
// has: proxies serve, and new workloads wait for certificates.
func (a *Agent) syncLoop(ctx context.Context) {
	if a.cfg.Hosts == nil {
		a.fresh.set()
		return
	}
	a.mu.Lock()
	something := len(a.snapshot.resources) > 0
	a.mu.Unlock()
	if something { // nothing is older than whatever they know
		stale := time.AfterFunc(staleFor, a.fresh.set)
		defer stale.Stop()
	}
	retry := retryFirst
	for ctx.Err() == nil {
		began := time.Now()
		err := a.sync(ctx)
		a.setConnected(false)
		a.setTaps(nil)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > retryMost {
			retry = retryFirst
		}
		a.log.Warn("stream to control ended", "err", err, "retry", retry)
		select {
		case <-ctx.Done():
		case <-time.After(retry/2 + rand.N(retry)):
		}
		retry = min(2*retry, retryMost)
	}
}

// sync is one stream.
func (a *Agent) sync(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stream, err := a.cfg.Hosts.Sync(ctx)
	if err != nil {
		return api.StatusError("connect to control", err)
	}
	a.mu.Lock()
	hello := &api.HostHello{Build: a.cfg.Build, HostName: a.cfg.HostName, Known: a.snapshot.known(), Epoch: a.snapshot.epoch, Revision: a.snapshot.revision}
	a.mu.Unlock()
	if a.cfg.Advertise.IsValid() {
		hello.Advertise = a.cfg.Advertise.Unmap().AsSlice()
	}
	if six := netns.Beside(a.cfg.Advertise); six.IsValid() {
		hello.Advertise6 = six.AsSlice()
	}
	if err := stream.Send(&api.HostUpdate{Update: &api.HostUpdate_Hello{Hello: hello}}); err != nil {
		_, err = stream.Recv() // says why
		return api.StatusError("greet control", err)
	}
	first, err := stream.Recv()
	if err != nil {
		return api.StatusError("greet control", err)
	}
	welcome := first.GetWelcome()
	if welcome == nil {
		return errors.New("greet control: the first answer is not a welcome")
	}
	if err := a.welcome(welcome); err != nil {
		return err
	}
	sent := make(chan error, 1)
	go func() {
		err := a.sendUpdates(ctx, stream)
		cancel(err)
		sent <- err
	}()
	err = a.receiveUpdates(stream, welcome.GetEpoch())
	cancel(err)
	if cause := <-sent; cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	return api.StatusError("stream to control", err)
}

type hostStream interface {
	Send(*api.HostUpdate) error
	Recv() (*api.ControlUpdate, error)
}

// welcome makes the host's network as control says.
func (a *Agent) welcome(w *api.Welcome) error {
	prefixes, err := api.Prefixes(w.GetPrefixes())
	if err != nil {
		return fmt.Errorf("welcome from control: prefixes: %w", err)
	}
	mesh, err := api.Prefixes(w.GetMeshPrefixes())
	if err != nil {
		return fmt.Errorf("welcome from control: mesh prefixes: %w", err)
	}
	if !api.ValidID(w.GetHostId()) || !assay.ValidTrustDomain(w.GetTrustDomain()) {
		return fmt.Errorf("welcome from control: host %q, trust domain %q", w.GetHostId(), w.GetTrustDomain())
	}
	a.mu.Lock()
	state := a.state
	state.HostID, state.TrustDomain, state.Mesh = w.GetHostId(), w.GetTrustDomain(), mesh
	var addresses []netns.Allocator
	for _, p := range prefixes {
		i := slices.IndexFunc(state.Addresses, func(x netns.Allocator) bool { return x.Prefix == p })
		if i < 0 {
			addresses = append(addresses, netns.Allocator{Prefix: p})
		} else {
			addresses = append(addresses, state.Addresses[i])
		}
	}
	state.Addresses = addresses
	a.mu.Unlock()
	if err := a.setupHost(state); err != nil {
		// Control can do nothing about it, and what runs goes on.
		a.log.Error("the host's network could not be set up", "err", err)
	}
	for _, w := range a.all() {
		w.belong(state.HostID, state.TrustDomain)
	}
	return nil
}

// setupHost makes bridge and rules and keeps the state. A host whose workloads come with
// their addresses needs neither.
func (a *Agent) setupHost(state hostState) error {
	var host *netns.Host
	if prefixes := state.prefixes(); len(prefixes) > 0 {
		host = &netns.Host{Bridge: a.cfg.Bridge, Prefixes: prefixes, Mesh: state.Mesh}
	}
	a.mu.Lock()
	same := a.host != nil && host != nil && slices.Equal(a.host.Prefixes, host.Prefixes) && slices.Equal(a.host.Mesh, host.Mesh)
	a.mu.Unlock()
	var err error
	if host != nil && !same {
		err = host.Setup()
	}
	a.mu.Lock()
	a.hostError = err
	if err == nil {
		a.host = host
	}
	state.LastNumber = a.state.LastNumber
	a.state = state
	if failed := a.store.saveHost(state); failed != nil {
		err = errors.Join(err, failed)
	}
	a.mu.Unlock()
	a.hostReady.set()
	a.changed()
	return err
}

func (a *Agent) setConnected(yes bool) {
	a.mu.Lock()
	a.connected = yes
	a.mu.Unlock()
}

// sendUpdates sends everything that control has to know of this host, then what
// changes.
func (a *Agent) sendUpdates(ctx context.Context, stream hostStream) error {
	a.outbox.restore(a.outbox.take(true).findings) // all else is sent now
	for _, w := range a.all() {
		if m := w.message(); m != nil {
			if err := stream.Send(&api.HostUpdate{Update: &api.HostUpdate_WorkloadUp{WorkloadUp: m}}); err != nil {
				return err
			}
			w.markReported()
		}
	}
	if err := stream.Send(&api.HostUpdate{Update: &api.HostUpdate_Synced{Synced: &api.Synced{}}}); err != nil {
		return err
	}
	for _, w := range a.all() {
		a.outbox.report(w.id)
		if v := w.bundleInUse(); v > 0 {
			a.outbox.ack(w.id, v)
		}
	}
	a.mu.Lock()
	bundle := a.snapshot.bundle
	a.connected = true
	a.mu.Unlock()
	if bundle != nil {
		a.outbox.ack("", bundle.GetVersion())
	}
	return a.sendChanges(ctx, stream)
}

func (a *Agent) sendChanges(ctx context.Context, stream hostStream) error {
	tick := time.NewTicker(reportEvery)
	defer tick.Stop()
	due := true
	for {
		b := a.outbox.take(due)
		due = false
		if err := a.sendBatch(stream, b); err != nil {
			a.outbox.restore(b.findings)
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-a.outbox.wake:
		case <-tick.C:
			due = true
		}
	}
}

func (a *Agent) sendBatch(stream hostStream, b batch) error {
	send := func(u *api.HostUpdate) error { return stream.Send(u) }
	for id, d := range b.gone {
		if d.last != nil {
			if err := send(api.ReportUpdate(d.last)); err != nil {
				return err
			}
		}
		if d.released {
			if err := send(&api.HostUpdate{Update: &api.HostUpdate_WorkloadReleased{WorkloadReleased: id}}); err != nil {
				return err
			}
		}
		if err := send(&api.HostUpdate{Update: &api.HostUpdate_WorkloadGone{WorkloadGone: id}}); err != nil {
			return err
		}
	}
	for _, id := range b.up {
		w := a.workload(id)
		if w == nil {
			continue
		}
		if m := w.message(); m != nil {
			if err := send(&api.HostUpdate{Update: &api.HostUpdate_WorkloadUp{WorkloadUp: m}}); err != nil {
				return err
			}
			w.markReported()
		}
	}
	for id, v := range b.acks {
		if err := send(&api.HostUpdate{Update: &api.HostUpdate_BundleAck{BundleAck: &api.BundleAck{WorkloadId: id, Version: v}}}); err != nil {
			return err
		}
	}
	for _, id := range b.reports {
		if w := a.workload(id); w != nil {
			if r := w.reportMessage(); r != nil {
				if err := send(api.ReportUpdate(r)); err != nil {
					return err
				}
			}
		}
	}
	if b.records != nil {
		if err := send(&api.HostUpdate{Update: &api.HostUpdate_Records{Records: b.records}}); err != nil {
			return err
		}
	}
	for _, f := range b.findings {
		if err := send(&api.HostUpdate{Update: &api.HostUpdate_Finding{Finding: f}}); err != nil {
			return err
		}
	}
	return nil
}

// receiveUpdates takes in what control says until the stream ends.
func (a *Agent) receiveUpdates(stream hostStream, epoch uint64) error {
	a.mu.Lock()
	next := &news{anew: a.snapshot.epoch != epoch, epoch: epoch}
	a.mu.Unlock()
	for {
		u, err := stream.Recv()
		if err != nil {
			return err
		}
		switch {
		case u.GetDelta() != nil:
			if err := next.apply(u.GetDelta()); err != nil {
				a.log.Error("control sent what cannot be read", "err", err)
			}
			if u.GetDelta().GetComplete() {
				a.take(next)
				next = &news{}
				if !a.fresh.is() {
					a.publish()
					a.fresh.set()
				}
			}
		case u.GetBundle() != nil:
			if _, err := u.GetBundle().Certificates(); err != nil {
				a.log.Error("control sent a trust bundle that cannot be read", "err", err)
				continue
			}
			if a.cfg.Bundle != nil {
				if err := a.cfg.Bundle(u.GetBundle()); err != nil {
					a.log.Error("the trust bundle is not in use", "err", err)
					continue
				}
			}
			a.setBundle(u.GetBundle())
			a.outbox.ack("", u.GetBundle().GetVersion())
		case u.GetWatches() != nil:
			a.setTaps(u.GetWatches())
		case u.GetAccepted() != nil:
			if w := a.workload(u.GetAccepted().GetWorkloadId()); w != nil {
				w.answered(nil)
			}
		case u.GetRefused() != nil:
			r := u.GetRefused()
			if w := a.workload(r.GetWorkloadId()); w != nil {
				w.answered(&assay.Error{Kind: assay.Denied, Op: "workload " + r.GetWorkloadId(), Err: errors.New(r.GetReason()), Remedy: r.GetRemedy()})
			}
		}
	}
}

// take takes in what control has said wholly.
func (a *Agent) take(n *news) {
	a.mu.Lock()
	a.snapshot.take(n)
	if n.anew {
		a.news = nil
	} else if a.news != nil {
		maps.Copy(a.news, n.pieces)
	}
	a.converge.changed()
	a.mu.Unlock()
	a.changed()
}

func (a *Agent) setBundle(b *api.Bundle) {
	a.mu.Lock()
	a.snapshot.bundle = b
	a.mu.Unlock()
	a.changed()
}
