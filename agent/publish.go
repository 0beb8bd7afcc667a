package agent

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"os"
	"sync"
	"time"

	"assay.dev/agent/netns"
	"assay.dev/link"
	"golang.org/x/sys/unix"
)

// How long the publisher waits for more after something changed: what comes after quiet goes on
// at once. Every view wakes every proxy of the host, which costs more than what it says.
const (
	coalesceEach = 2 * time.Millisecond // for each workload
	coalesce     = 50 * time.Millisecond
	coalesceMost = 250 * time.Millisecond
)

// coalesced is how long that is on this host.
func (a *Agent) coalesced() time.Duration {
	return min(max(time.Duration(len(a.all()))*coalesceEach, coalesce), coalesceMost)
}

// sharedTable is the newest address table. It is replaced while others send it, so a
// sender takes a copy of the descriptor.
type sharedTable struct {
	version uint64
	file    *os.File
}

// zone is this host's: what it was told, or what its platform says of it.
func (a *Agent) zone() string { return cmp.Or(a.cfg.Zone, a.view.Load().zone) }

// changed tells the publisher that something did.
func (a *Agent) changed() {
	select {
	case a.dirty <- struct{}{}:
	default:
	}
}

// publishLoop turns snapshots into views, at most one in each interval.
func (a *Agent) publishLoop(ctx context.Context) {
	unsaved := make(chan struct{}, 1)
	var saver sync.WaitGroup
	defer saver.Wait()
	saver.Go(func() { a.saveLoop(ctx, unsaved) })
	for {
		select {
		case <-ctx.Done():
			return
		case <-a.dirty:
		}
		a.publish()
		select {
		case unsaved <- struct{}{}:
		default:
		}
		select {
		case <-ctx.Done():
		case <-time.After(a.coalesced()):
		}
	}
}

// saveEvery bounds how often the snapshot is written to disk. It is so for each quarter of a
// megabyte, up to saveMost: all of it is written each time.
const (
	saveEvery = time.Second
	saveMost  = 30 * time.Second
)

// saveLoop keeps the snapshot on disk. It is apart from publishing, which no slow disk
// may hold up.
func (a *Agent) saveLoop(ctx context.Context, unsaved <-chan struct{}) {
	for {
		select {
		case <-ctx.Done():
			select {
			case <-unsaved:
				a.saveSnapshot()
			default:
			}
			return
		case <-unsaved:
		}
		size := a.saveSnapshot()
		select {
		case <-ctx.Done():
		case <-time.After(min(time.Duration(1+size>>18)*saveEvery, saveMost)):
		}
	}
}

// saveSnapshot writes it now, and returns its size in bytes.
func (a *Agent) saveSnapshot() int {
	a.saving.Lock()
	defer a.saving.Unlock()
	a.mu.Lock()
	updates := a.snapshot.updates()
	a.mu.Unlock()
	b, err := encode(updates)
	if err == nil {
		err = writeFile(a.store.path("snapshot"), b, 0o600)
	}
	if err != nil {
		a.log.Error("the snapshot is not on disk", "err", err)
	}
	return len(b)
}

// publish makes a view of the newest snapshot and wakes everybody who waits for one.
func (a *Agent) publish() {
	a.publishing.Lock()
	defer a.publishing.Unlock()
	p := a.publisher
	last := p.view
	a.mu.Lock()
	host, news, bundle := a.host, a.news, a.snapshot.bundle
	b := basis{epoch: a.snapshot.epoch, leaving: a.leaving, self: a.state.HostID, near: a.state.HostID}
	if a.cfg.Own != nil {
		b.near = a.cfg.Own.Node
	}
	var all map[string]*resource
	if b != p.basis || news == nil {
		all = maps.Clone(a.snapshot.resources)
	}
	a.news = map[string]*resource{}
	a.converge.published(last.number + 1)
	a.mu.Unlock()
	var v *view
	if all != nil {
		v = p.anew(b, all)
	} else {
		v = p.next(news)
	}
	if bundle != nil {
		v.bundle = &link.Bundle{Version: bundle.GetVersion(), Roots: bundle.GetRoots()}
	}
	a.publishTable(v)
	if host != nil && (p.hostsNew || host != a.routedBy) {
		p.hostsNew = !a.routePeers(host, p.peers())
	}
	if last.namespaces != nil && !sameSettings(last.namespaces, v.namespaces) {
		a.saveSnapshot()
	}
	a.view.Store(v)
	a.recertify()
	for _, w := range a.all() {
		w.wakeUp()
		w.wakeOthers()
	}
}

// publishTable makes a new address table when what it would say is new.
func (a *Agent) publishTable(v *view) {
	p := a.publisher
	if !p.tableNew {
		return
	}
	fd, err := p.table.Build(v.number)
	if err != nil {
		a.log.Error("the address table stays old", "err", err)
		return
	}
	a.mu.Lock()
	if a.table.file != nil {
		a.table.file.Close()
	}
	a.table = sharedTable{version: v.number, file: os.NewFile(uintptr(fd), "address table")}
	a.mu.Unlock()
	p.tableNew = false
}

// tableAfter returns the newest table for sending, which the caller closes, or -1 when that
// is version old.
func (a *Agent) tableAfter(old uint64) (version uint64, fd int, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.table.file == nil || a.table.version == old {
		return old, -1, nil
	}
	fd, err = unix.FcntlInt(a.table.file.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	return a.table.version, fd, err
}

// routePeers reports whether the other hosts' prefixes are routed to.
func (a *Agent) routePeers(host *netns.Host, peers []netns.Peer) bool {
	key := fmt.Sprint(host.Prefixes, peers)
	if key == a.routed {
		a.routedBy = host
		return true
	}
	if err := host.SetPeers(peers); err != nil {
		a.log.Error("routes to other hosts", "err", err)
		return false
	}
	a.routed, a.routedBy = key, host
	return true
}
