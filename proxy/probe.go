package proxy

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"time"

	"assay.dev/link"
)

// probeAnswerWithin bounds how long a probe waits for the agent's word. The kubelet itself
// gives up after one second unless it is told otherwise.
const probeAnswerWithin = 500 * time.Millisecond

// probes are questions to the agent that wait for an answer.
type probes struct {
	mu      sync.Mutex
	last    uint64
	waiting map[uint64]chan bool
}

// mayProbe reports whether a client can be the kubelet: it has one of the host's own
// addresses and asks for a port that the pod declares to be probed.
func (i *inbound) mayProbe() bool {
	return slices.Contains(i.snap.Probes, i.dst.Port()) && slices.Contains(i.snap.Gateways, i.remote.Addr()) && !i.meshed
}

// isProbe asks the agent whether the client is the kubelet. While there is no agent it
// is taken for it: a pod that could not be asked would be restarted, and whoever can end
// the agent and speak from the host's address can do anything here.
func (p *Proxy) isProbe(ctx context.Context, client, server netip.AddrPort) bool {
	id, answer := p.probes.begin()
	defer p.probes.end(id)
	if err := p.agent.send(link.KindProbe, id, link.Probe{Client: client, Server: server}); err != nil {
		return true
	}
	t := time.NewTimer(probeAnswerWithin)
	defer t.Stop()
	select {
	case is := <-answer:
		return is
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (q *probes) begin() (uint64, chan bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.waiting == nil {
		q.waiting = map[uint64]chan bool{}
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

func (q *probes) answer(id uint64, is bool) {
	q.mu.Lock()
	c := q.waiting[id]
	delete(q.waiting, id)
	q.mu.Unlock()
	if c != nil {
		c <- is
	}
}
