package proxy

import (
	"context"
	"net"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"assay.dev"
	"assay.dev/proxy/detect"
	"assay.dev/proxy/egress"
)

// dialOutside is about when the kernel gives up by itself.
const dialOutside = 2 * time.Minute

// resolveWithin bounds how long a connection waits for the proxy to find out whose
// address it goes to.
const resolveWithin = 3 * time.Second

// passThrough carries a connection to where there is no mesh: decide as far as it is
// known who is there, dial, listen to who speaks first, decide again, relay. Where
// egress is strict nothing is dialled before it is allowed; nothing is forwarded, in
// either direction, before the last decision.
func (o *outbound) passThrough() error {
	o.protocol = assay.Opaque
	h := &hearing{client: newSniffer(o.conn, o.raw)}
	defer h.client.free()
	if err := o.judge(egress.Claim{}, false); err != nil {
		return err
	}
	if o.beyond.Verdict == egress.Unknown {
		if err := o.await(h); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(o.ctx, dialOutside)
	peer, err := dialNetwork(ctx, o.dst, o.snap.OwnMark)
	cancel()
	if err != nil {
		return &refusal{refusedOutside, err}
	}
	stop := context.AfterFunc(o.ctx, func() { abort(peer) })
	defer stop()
	claim, err := h.both(o, peer)
	o.protocol = claim.Protocol
	if err != nil { // before anybody said anything
		abort(peer)
		return &refusal{refusedOutside, err}
	}
	if err := o.judge(claim, true); err != nil {
		abort(peer)
		return err
	}
	h.client.free()
	series := o.series()
	series.Opened(o.accepted)
	series.Begin()
	ok := o.p.splice(o.conn, peer, series)
	series.End(time.Since(o.accepted), !ok, time.Now())
	series.Closed()
	return nil
}

// judge decides, resolving names if that can change anything. It leaves Unknown only
// when the client has not spoken.
func (o *outbound) judge(claim egress.Claim, spoken bool) error {
	policy, addr := o.snap.egress, o.dst.Addr()
	if o.port != nil && o.snap.listed(&o.snap.services.At(o.port.service).Service, o.port.port, o.dst) {
		o.beyond = egress.Decision{Verdict: egress.Allow}
		return nil
	}
	o.beyond = policy.Decide(o.dst, o.p.known.Of(addr), claim, spoken)
	if o.beyond.Verdict == egress.Unknown && len(o.beyond.Resolve) > 0 {
		o.resolve(o.beyond.Resolve)
		o.beyond = policy.Decide(o.dst, o.p.known.Of(addr), claim, spoken)
	}
	switch {
	case o.beyond.Verdict == egress.Allow, o.beyond.Verdict == egress.Unknown && !spoken:
		return nil
	case o.beyond.Verdict == egress.Unknown && claim.Name != "":
		o.p.finding(refusedUnproven, o.destination(), "a connection to "+o.dst.String()+" says that it is for "+claim.Name+", which does not have this address",
			"if it is right, list the address in an Egress of namespace "+o.snap.Identity.Namespace+" (spec.addresses)")
		return &refusal{refusedUnproven, nil}
	}
	o.p.finding(refusedUnlisted, o.destination(), "TCP to "+o.dst.String()+" outside the mesh, refused: egress of namespace "+o.snap.Identity.Namespace+" is strict",
		"allow it with an Egress of the namespace (spec.hosts or spec.addresses, and spec.ports), or set the namespace's egress to observe")
	return &refusal{refusedUnlisted, nil}
}

// destination is what a person would call it.
func (o *outbound) destination() string {
	if o.beyond.Name == "" {
		return o.dst.String()
	}
	return net.JoinHostPort(o.beyond.Name, strconv.Itoa(int(o.dst.Port())))
}

// resolve asks for names at once; what comes of it is remembered.
func (o *outbound) resolve(names []string) {
	ctx, cancel := context.WithTimeout(o.ctx, resolveWithin)
	defer cancel()
	var g sync.WaitGroup
	for _, n := range names {
		g.Go(func() {
			if err := o.p.names.Resolve(ctx, n, o.dst.Addr().Is6()); err != nil {
				o.p.log.Debug("egress", "name", n, "error", err)
			}
		})
	}
	g.Wait()
}

// await listens to the client before anything is dialled: what it says decides. A
// client that is silent may wait for the server: then names that may be it decide.
func (o *outbound) await(h *hearing) error {
	silence := time.Now().Add(detect.Patience)
	limit := time.Now().Add(detect.Dribble)
	asked := false
	for {
		claim, done := egress.Claimed(h.client.bytes())
		over := !time.Now().Before(limit)
		switch {
		case done, over, h.client.end:
			if h.client.n == 0 && h.client.end && !over {
				return &refusal{} // a check: it connected and that was all
			}
			o.protocol = claim.Protocol
			return o.judge(claim, true)
		case h.client.n == 0 && !asked && !time.Now().Before(silence):
			asked = true
			names := o.snap.egress.Candidates(o.dst)
			o.resolve(names)
			if d := o.snap.egress.Decide(o.dst, o.p.known.Of(o.dst.Addr()), egress.Claim{}, true); d.Verdict == egress.Allow {
				o.beyond = d
				clearWake(o.conn)
				return nil
			}
			continue
		}
		deadline := limit
		if h.client.n == 0 && !asked {
			deadline = silence
		}
		o.conn.SetReadDeadline(deadline)
		err := h.client.more()
		clearWake(o.conn)
		if err != nil && !isTimeout(err) {
			return &refusal{err: err}
		}
	}
}

// hearing waits for whoever speaks first, and takes nothing from either.
type hearing struct{ client *sniffer }

// both returns what the client claims, once it has said it or the server has spoken,
// or one of them has ended. A client that begins a line and does not end it is waited
// for a moment; one that says nothing, for ever: so is its server.
//
// An error is the server's reset, which looking at it took from the socket.
func (h *hearing) both(o *outbound, peer *net.TCPConn) (egress.Claim, error) {
	o.raw.Control(func(fd uintptr) { h.client.try(fd) })
	claim, done := egress.Claimed(h.client.bytes())
	if done || h.client.end || h.client.err != nil {
		return claim, h.client.err
	}
	raw, err := peer.SyscallConn()
	if err != nil {
		return claim, err
	}
	server := newSniffer(peer, raw)
	var spoke atomic.Bool
	var broken error
	watched := make(chan struct{})
	o.p.wg.Go(func() {
		defer close(watched)
		defer server.free()
		broken = server.more() // bytes and the end are left for the relay
		spoke.Store(true)
		wakeReads(o.conn)
	})
	var limit time.Time // for the rest of what the client has begun to say
	for !done && !h.client.end && !spoke.Load() {
		if h.client.n > 0 && limit.IsZero() {
			limit = time.Now().Add(detect.Dribble)
		}
		o.conn.SetReadDeadline(limit)
		if spoke.Load() { // it woke us by the deadline that was just overwritten
			break
		}
		if err = h.client.more(); err != nil {
			break // woken, too slow, or gone
		}
		claim, done = egress.Claimed(h.client.bytes())
	}
	wakeReads(peer)
	<-watched
	clearWake(peer)
	clearWake(o.conn)
	for _, e := range []error{err, broken} {
		if e != nil && !isTimeout(e) {
			return claim, e
		}
	}
	return claim, nil
}

// maxRemotes bounds the names and addresses outside that are told apart in series.
const maxRemotes = 256

// remotes are those.
type remotes struct {
	mu   sync.Mutex
	list []string // sorted
}

// name returns s, or that it found no place.
func (r *remotes) name(s string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	i, there := slices.BinarySearch(r.list, s)
	switch {
	case there:
	case len(r.list) == maxRemotes:
		return assay.Overflow
	default:
		r.list = slices.Insert(r.list, i, s)
	}
	return s
}
