package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"assay.dev"
	"assay.dev/proxy/mux"
)

// errProbe ends a stream that was opened to see who speaks first: it was the client,
// who is served on another stream.
var errProbe = errors.New("the stream was a probe")

func isEOF(err error) bool { return errors.Is(err, io.EOF) }

// accept takes a stream that a peer opened. It is the session's reader.
func (s *session) accept(st mux.Stream, open []byte) (mux.Handler, mux.Code) {
	switch proto := headerProtocol(open); proto {
	case assay.HTTP1, assay.HTTP2:
		// Connections to the application are shared by requests there: nobody could be
		// announced on one.
		if s.p.snap.Load().announced(s.local) {
			return s.refuseHeader()
		}
		if proto == assay.HTTP2 {
			return s.acceptHTTP2(st, open)
		}
		return s.acceptHTTP(st, open)
	}
	h, rest, err := ParseHeader(open)
	if err != nil || len(rest) > 0 || s.p.snap.Load().certified(s.local) {
		return s.refuseHeader() // or an application that trusts the field would believe the client
	}
	var in *protection
	if sp := s.p.snap.Load().target(s.local); sp != nil {
		if in = sp.care.inbound; !in.Connect() {
			s.p.rec.Refusals.Inc(refusedCrowded)
			return nil, mux.Overloaded
		}
	}
	v := &served{s: s, in: in, header: h, stream: st, pipe: newPipe(s.p, nil), accepted: time.Now()}
	s.p.begin()
	s.p.wg.Go(v.run)
	return v.pipe, 0
}

func (s *session) refuseHeader() (mux.Handler, mux.Code) {
	s.p.rec.Refusals.Inc(refusedHeader)
	return nil, mux.BadRequest
}

// served is an opaque stream of a peer, and the connection to the application.
type served struct {
	s        *session
	in       *protection // of the port; nil for one that is no service's
	header   Header
	stream   mux.Stream
	pipe     *pipe
	accepted time.Time
}

// run dials the application and carries bytes both ways.
func (v *served) run() {
	p := v.s.p
	defer p.end()
	if v.in != nil {
		defer v.in.Disconnect()
	}
	app, err := v.dial()
	series := p.rec.Series(v.key())
	if err != nil {
		v.stream.Reset(mux.Unreachable)
		p.rec.Refusals.Inc(refusedApplication)
		series.Refused(time.Now())
		p.refusals.add(refused{direction: assay.Inbound, peer: v.s.peer.Identity.String(), destination: v.s.local, reason: refusedApplication}, err)
		return
	}
	defer app.Close()
	stop := context.AfterFunc(p.ctx, func() { abort(app) })
	defer stop()
	raw, err := app.SyscallConn()
	if err != nil {
		v.stream.Reset(mux.Unreachable)
		return
	}
	series.Opened(v.accepted)
	series.Begin()
	v.pipe.release(app, raw, series)
	err = v.pump(app, raw, series.Out)
	if err == errProbe {
		series.Forget()
		return
	}
	series.End(time.Since(v.accepted), err != nil, time.Now())
	series.Closed()
}

func (v *served) dial() (*net.TCPConn, error) {
	from := netip.AddrPortFrom(v.s.remote.Addr(), v.header.ClientPort)
	ctx, cancel := context.WithTimeout(v.s.p.ctx, appDialTimeout)
	defer cancel()
	app, err := v.s.p.dialApp(ctx, from, v.s.local)
	if err != nil {
		return nil, err
	}
	if err := v.s.p.snap.Load().announce(app, from, v.s.local, v.s.peer.Identity, v.s.security); err != nil {
		abort(app)
		return nil, err
	}
	return app, nil
}

// dialApp connects to the workload's own application. A workload that calls itself
// is seen as itself.
//
// Names resolve to both families, and many servers listen on one: when the
// application refuses, and the client has an address of the other family, it is asked
// there too. Between the proxies the family does not matter.
func (p *Proxy) dialApp(ctx context.Context, from, to netip.AddrPort) (*net.TCPConn, error) {
	snap := p.snap.Load()
	c, err := snap.dialApp(ctx, from, to)
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return c, err
	}
	is4 := !to.Addr().Is4()
	i := slices.IndexFunc(snap.Addrs, func(a netip.Addr) bool { return a.Is4() == is4 })
	client, ok := snap.table.Sibling(from.Addr(), is4)
	if i < 0 || !ok {
		return nil, err
	}
	c, other := snap.dialApp(ctx, netip.AddrPortFrom(client, from.Port()), netip.AddrPortFrom(snap.Addrs[i], to.Port()))
	if other != nil {
		return nil, err
	}
	return c, nil
}

func (s *snapshot) dialApp(ctx context.Context, from, to netip.AddrPort) (*net.TCPConn, error) {
	if s.own(from.Addr()) {
		return dialNetwork(ctx, to, s.OwnMark)
	}
	return dialAs(ctx, from, to, s.OwnMark)
}

// pump moves bytes until both directions have ended, or one broke.
func (v *served) pump(app *net.TCPConn, raw syscall.RawConn, count func(int)) error {
	from := newSource(raw)
	finished := false
	for {
		if !finished {
			clearWake(app)
		}
		switch st := v.pipe.look(); {
		case st.broken != nil:
			v.stream.Reset(mux.AppReset)
			return st.broken
		case st.reset == mux.Cancelled && !st.anything:
			return errProbe
		case st.reset != 0:
			abort(app)
			return errPeerReset
		}
		if finished {
			<-v.pipe.done
			if st := v.pipe.look(); st.reset == 0 && st.broken == nil {
				return nil
			}
			continue
		}
		b, err := from.read()
		switch {
		case err == nil:
			count(len(b))
			v.stream.Write(b, false) // a failure shows in the pipe
			from.free()
		case isTimeout(err): // woken
		case isEOF(err):
			finished = true
			v.stream.Write(nil, true)
		default:
			v.stream.Reset(mux.AppReset)
			return err
		}
	}
}

// key is what the stream is counted under. The service is the peer's word, so only
// names that we know count.
func (v *served) key() assay.SignalKey { return v.s.key(&v.header) }

func (s *session) key(h *Header) assay.SignalKey {
	key := assay.SignalKey{
		Direction: assay.Inbound, Peer: s.peer.Identity, PeerArtifacts: s.peer.Artifacts,
		Port: h.Port, Protocol: h.Protocol, Security: s.security, Reason: s.reason,
	}
	if s.p.snap.Load().services.At(h.Service) != nil {
		key.Service = h.Service
	}
	return key
}
