package proxy

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"

	"assay.dev/link"
)

const (
	// probeAnswerWithin bounds how long a probe waits for the agent's word. The kubelet itself
	// gives up after one second unless it is told otherwise.
	probeAnswerWithin = 500 * time.Millisecond
	// maxProbes are asked about at once, so that nobody makes the agent's word late by asking
	// for much of it; of one address half as many.
	maxProbes     = 16
	maxProbesFrom = maxProbes / 2
	// agentSilent is how long an agent that answers nothing counts as there.
	agentSilent = 10 * time.Second
)

// probes are questions to the agent that wait for an answer.
type probes struct {
	mu      sync.Mutex
	last    uint64
	waiting map[uint64]chan bool
	silent  time.Time     // since when nothing was answered that was asked; zero: it was
	slots   chan struct{} // maxProbes
	// from are those of each address, which is one of the host's own.
	from map[netip.Addr]chan struct{} // maxProbesFrom
}

func newProbes() probes {
	return probes{waiting: map[uint64]chan bool{}, slots: make(chan struct{}, maxProbes), from: map[netip.Addr]chan struct{}{}}
}

// enter takes a slot for a client, before late; leave gives it back. It returns false when
// there was none in time, or ctx ended.
func (q *probes) enter(ctx context.Context, client netip.Addr, late <-chan time.Time) (leave func(), ok bool) {
	q.mu.Lock()
	from := q.from[client]
	if from == nil {
		from = make(chan struct{}, maxProbesFrom)
		q.from[client] = from
	}
	q.mu.Unlock()
	for i, slots := range []chan struct{}{from, q.slots} {
		select {
		case slots <- struct{}{}:
			continue
		case <-late:
		case <-ctx.Done():
		}
		if i > 0 {
			<-from
		}
		return nil, false
	}
	return func() { <-q.slots; <-from }, true
}

// mayProbe reports whether a client can be the kubelet: it has one of the host's own
// addresses and asks for a port that the pod declares to be probed.
func (i *inbound) mayProbe() bool {
	return slices.Contains(i.snap.Probes, i.dst.Port()) && slices.Contains(i.snap.Gateways, i.remote.Addr()) && !i.meshed
}

// isProbe asks the agent whether the client is the kubelet. While there is no agent, or one
// that has long said nothing, it is taken for it: a pod that could not be asked would be
// restarted, and whoever can end the agent and speak from the host's address can do
// anything here. An answer that is merely late is none: others may have made it so.
func (p *Proxy) isProbe(ctx context.Context, client, server netip.AddrPort) bool {
	t := time.NewTimer(probeAnswerWithin)
	defer t.Stop()
	leave, ok := p.probes.enter(ctx, client.Addr(), t.C)
	if !ok {
		return false
	}
	defer leave()
	id, answer := p.probes.begin()
	defer p.probes.end(id)
	if err := p.agent.send(link.KindProbe, id, link.Probe{Client: client, Server: server}); err != nil {
		return true
	}
	select {
	case is := <-answer:
		return is
	case <-t.C:
		return p.probes.unheard()
	case <-ctx.Done():
		return false
	}
}

func (q *probes) begin() (uint64, chan bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.silent.IsZero() {
		q.silent = time.Now()
	}
	q.last++
	c := make(chan bool, 1)
	q.waiting[q.last] = c
	return q.last, c
}

func (q *probes) end(id uint64) {
	q.mu.Lock()
	delete(q.waiting, id)
	q.mu.Unlock()
}

// answer takes the agent's word, also when it is late: it is not silent.
func (q *probes) answer(id uint64, is bool) {
	q.mu.Lock()
	c := q.waiting[id]
	delete(q.waiting, id)
	q.silent = time.Time{}
	q.mu.Unlock()
	if c != nil {
		c <- is
	}
}

// attached says that there is an agent which has not been asked yet.
func (q *probes) attached() {
	q.mu.Lock()
	q.silent = time.Time{}
	q.mu.Unlock()
}

func (q *probes) unheard() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return !q.silent.IsZero() && time.Since(q.silent) > agentSilent
}
