package proxy

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"assay.dev"
	"assay.dev/proxy/balance"
	"assay.dev/proxy/http1"
	"assay.dev/proxy/http2"
	"assay.dev/proxy/mux"
)

// Endpoints that are not meshed, says their service: they are dialled in plaintext, and
// counted as the exceptions that they are. The table has the last word: an address that it
// has somebody at is dialled under mutual TLS, or not at all, whatever a service says and
// whenever the table came to know it.
//
// The way there is a session within this process, whose far half does what the proxy of a
// server does: so requests and connections are routed, balanced, tried again and counted
// as they are among the meshed, and their path does not know of plaintext.

// proven returns the peer at an endpoint that has no identity.
//
//go:noinline
func (p *Proxy) proven(e *balance.Endpoint) (*peer, error) {
	s, a := p.snap.Load(), e.Addr.Addr()
	if who, ok := s.table.Lookup(a); ok {
		return p.peers.get(peerKey{e.Addr, who.Identity}), nil
	}
	switch {
	case s.own(a):
		return p.peers.get(peerKey{e.Addr, s.Identity}), nil
	case s.meshPrefix(a):
		return nil, &refusal{refusedUnknown, nil}
	}
	return e.Value.(*peer), nil
}

// plain reports whether an address may be dialled in plaintext now.
func (s *snapshot) plain(a netip.Addr) bool {
	_, meshed := s.table.Lookup(a)
	return !meshed && !s.meshPrefix(a)
}

var errMeshed = errors.New("the address has come into the mesh")

// dialPlain connects to an endpoint that is not meshed. That is looked at before and
// after: nothing is sent to one that has come to be meshed on the way.
func (p *Proxy) dialPlain(ctx context.Context, to netip.AddrPort) (*net.TCPConn, error) {
	s := p.snap.Load()
	if !s.plain(to.Addr()) {
		return nil, errMeshed
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	c, err := dialNetwork(ctx, to, s.OwnMark)
	if err != nil {
		return nil, err
	}
	if !p.snap.Load().plain(to.Addr()) {
		abort(c)
		return nil, errMeshed
	}
	return c, nil
}

// connectPlain makes a session with the far half of the way to an endpoint.
func (pe *peer) connectPlain() (*session, error) {
	ends, err := socketPair()
	if err != nil {
		return nil, err
	}
	half := func() *session {
		return &session{
			p: pe.p, security: assay.Plaintext, reason: assay.ReasonUnmeshed, local: pe.key.addr,
			generation: pe.p.creds.generation(), born: time.Now(), life: lifetime(),
		}
	}
	far := half()
	far.mux = mux.New(ends[0], false, mux.Config{}, far.acceptPlain)
	pe.p.wg.Go(func() { far.run() })
	near := half()
	near.mux = mux.New(ends[1], true, mux.Config{}, nil)
	return near, nil
}

// acceptPlain takes a stream for an endpoint that is not meshed. One that has come to be
// meshed is to be chosen again.
func (s *session) acceptPlain(st mux.Stream, open []byte) (mux.Handler, mux.Code) {
	p, snap := s.p, s.p.snap.Load()
	if !snap.plain(s.local.Addr()) {
		return nil, mux.Refused
	}
	switch headerProtocol(open) {
	case assay.HTTP1:
		o := http1.Origin{Target: s.local}
		if snap.certified(s.local) {
			o.Edit = &nobodysCert
		}
		return p.http.in.Accept(st, o), 0
	case assay.HTTP2:
		o := http2.Origin{Target: s.local}
		if snap.certified(s.local) {
			o.Edit = &nobodysCert
		}
		return p.http2.in.Accept(st, o)
	}
	v := &served{s: s, stream: st, pipe: newPipe(p, nil)}
	p.begin()
	p.wg.Go(v.runPlain)
	return v.pipe, 0
}

// runPlain carries an opaque stream to and from an endpoint that is not meshed.
func (v *served) runPlain() {
	p := v.s.p
	defer p.end()
	far, err := p.dialPlain(p.ctx, v.s.local)
	if err == nil {
		if err = p.snap.Load().announce(far, addrPort(far.LocalAddr()), v.s.local, assay.Identity{}, assay.Plaintext); err != nil {
			abort(far)
		}
	}
	if err != nil {
		v.stream.Reset(mux.Unreachable)
		p.log.Debug("an endpoint that is not meshed", "destination", v.s.local.String(), "error", err)
		return
	}
	defer far.Close()
	stop := context.AfterFunc(p.ctx, func() { abort(far) })
	defer stop()
	raw, err := far.SyscallConn()
	if err != nil {
		v.stream.Reset(mux.Unreachable)
		return
	}
	v.pipe.release(far, raw, nil)
	v.pump(far, raw, func(int) {}) // the near half counts
}

// hostsOf are what a service is called in an Egress.
func (s *snapshot) hostsOf(service *assay.Service) []string {
	name := service.Name + "." + service.Namespace
	domain := s.DNS.Domain
	if domain == "" {
		domain = "cluster.local"
	}
	return []string{name, name + ".svc", name + ".svc." + domain}
}

// listed reports whether an endpoint that is not meshed may be reached: any, unless
// egress is strict. Then an Egress must name its service or hold its address.
func (s *snapshot) listed(service *assay.Service, port uint16, at netip.AddrPort) bool {
	if !s.egress.Strict() || s.egress.AllowsAddr(at) {
		return true
	}
	return slices.ContainsFunc(s.hostsOf(service), func(h string) bool {
		return s.egress.AllowsName(h, netip.AddrPortFrom(at.Addr(), port))
	})
}

// nobody is why there is no endpoint of the port to choose.
func (o *outbound) nobody(sp *servicePort) error {
	if sp.unlisted == 0 && sp.elsewhere > 0 {
		return &refusal{refusedNotLocal, fmt.Errorf("service %s keeps clients to their own host, and its %d ready endpoints are on others", sp.service, sp.elsewhere)}
	}
	if sp.unlisted == 0 {
		return &refusal{refusedNoEndpoint, errors.New("service " + sp.service + " has none")}
	}
	o.unlisted(sp)
	return &refusal{refusedUnlisted, errors.New("what there is of service " + sp.service + " is not meshed")}
}

func (o *outbound) unlisted(sp *servicePort) {
	port := strconv.Itoa(int(sp.port))
	o.p.finding(refusedUnlisted, sp.service+":"+port,
		"TCP to service "+sp.service+" port "+port+", refused: no endpoint of it is meshed, and egress of namespace "+o.snap.Identity.Namespace+" is strict",
		"mesh it, or allow it with an Egress of the namespace (spec.hosts: the service's name, as NAME.NAMESPACE; and spec.ports), or set the namespace's egress to observe")
}
