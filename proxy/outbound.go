package proxy

import (
	"cmp"
	"context"
	"errors"
	"net/netip"
	"syscall"
	"time"

	"assay.dev"
	"assay.dev/proxy/balance"
	"assay.dev/proxy/detect"
	"assay.dev/proxy/egress"
	"assay.dev/proxy/golden"
	"assay.dev/proxy/guard"
	"assay.dev/proxy/mux"
	"assay.dev/proxy/nowait"
	"assay.dev/proxy/route"
)

const (
	maxAttempts = 3        // endpoints that are tried for one connection
	maxReplay   = 16 << 10 // first bytes that are kept to be sent to another endpoint
)

// outbound is a connection that the application dialled.
type outbound struct {
	p        *Proxy
	ctx      context.Context
	conn     *nowait.TCP
	raw      syscall.RawConn
	src, dst netip.AddrPort
	snap     *snapshot
	accepted time.Time

	// route
	target
	rules   *route.Table // for requests to port; nil: there are none
	names   *route.Names // for connections of TLS to port; nil: there are none
	byName  bool         // port is what one of them chose
	outside bool
	beyond  egress.Decision // about who is there
	handed  bool            // not the workload's own: requests of guests that go to somebody else

	protocol assay.Protocol
	outcome  detect.Outcome

	// forward
	chosen   func(*balance.Endpoint) // told before an endpoint is opened; nil: nobody
	tried    []*balance.Endpoint
	spent    bool // direct was tried
	attempts int
	endpoint *balance.Endpoint // of the stream that is open
	session  *session
	stream   mux.Stream
	pipe     *pipe
	sent     []byte // everything that was sent so far
	lost     bool   // it is no longer kept: nothing can be sent again
	finished bool   // the application finished sending
}

// target is where bytes go: what the application dialled or, by a rule, something else.
type target struct {
	port   *servicePort      // nil when the address is no service's
	set    *balance.Set      // endpoints; nil: direct
	direct *peer             // nil: set
	sticky *balance.Endpoint // to be tried first; nil: any
}

// serveOutbound carries one connection from its beginning to its end.
func (p *Proxy) serveOutbound(ctx context.Context, c *nowait.TCP) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { abort(c) })
	defer stop()
	o := p.newOutbound(ctx, c)
	if err := o.serve(); err != nil {
		o.refuse(err)
	}
}

func (p *Proxy) newOutbound(ctx context.Context, c *nowait.TCP) *outbound {
	return &outbound{p: p, ctx: ctx, conn: c, snap: p.snap.Load(), accepted: time.Now(), src: c.Remote()}
}

func (o *outbound) serve() (err error) {
	if o.raw, err = o.conn.SyscallConn(); err != nil {
		return err
	}
	if err := o.original(); err != nil {
		return err
	}
	if err := o.route(); err != nil {
		return err
	}
	if o.outside {
		return o.passThrough()
	}
	if err := o.detect(); err != nil {
		return err
	}
	switch closed := o.names != nil && o.rules == nil; {
	case closed: // a port for TLS alone
	case o.protocol == assay.HTTP1:
		return o.serveHTTP(nil)
	case o.protocol == assay.HTTP2:
		return o.serveHTTP2()
	}
	switch {
	case o.rules == nil && o.names == nil:
		return o.relay()
	case o.outcome == detect.ClientClosed:
		return nil // a check: it connected and that was all
	case o.names != nil && o.protocol == assay.TLS:
		return o.relayByName()
	case o.rules != nil:
		// What rules cannot look into must not pass them by.
		return &refusal{refusedNotHTTP, nil}
	}
	return &refusal{refusedNotTLS, nil}
}

// original learns where the application wanted to go.
func (o *outbound) original() (err error) {
	local := o.conn.Local()
	if o.dst, err = originalDst(o.conn); err != nil || o.dst == local {
		return &refusal{refusedLoop, err}
	}
	return nil
}

// route decides who that is. The order matters: what is known as meshed is never
// treated as anything else.
func (o *outbound) route() error {
	s, a := o.snap, o.dst.Addr()
	if svc := s.vip(a); svc != nil {
		if o.port = svc.port(o.dst.Port()); o.port == nil {
			return &refusal{refusedNoPort, nil}
		}
		o.rules, o.names = s.rules(o.port), s.namesOf(o.port)
		if o.set = o.port.endpoints(a); o.set.Len() == 0 && o.rules == nil && o.names == nil {
			return o.nobody(o.port)
		}
		return nil
	}
	if sp := s.sole(o.dst); sp != nil {
		// Its service is meant, so that nobody passes its routes by.
		o.port, o.set, o.rules, o.names = sp, sp.endpoints(a), s.rules(sp), s.namesOf(sp)
		return nil
	}
	if who, ok := s.table.Lookup(a); ok {
		o.port = s.target(o.dst)
		o.direct = o.p.peers.get(peerKey{o.dst, who.Identity})
		return nil
	}
	if s.own(a) {
		o.port = s.target(o.dst)
		o.direct = o.p.peers.get(peerKey{o.dst, s.Identity})
		return nil
	}
	if s.meshPrefix(a) {
		return &refusal{refusedUnknown, nil}
	}
	if sp := s.external(o.dst); sp != nil {
		o.port, o.set, o.rules, o.names = sp, sp.endpoints(a), s.rules(sp), s.namesOf(sp)
		if o.set.Len() == 0 && o.rules == nil && o.names == nil {
			return o.nobody(sp)
		}
		return nil
	}
	o.outside, o.port = true, s.target(o.dst) // of a service whose clients choose endpoints themselves
	return nil
}

// detect waits until it is settled what is spoken. On the way the stream to the
// peer may have been opened, with nothing forwarded in either direction.
func (o *outbound) detect() error {
	sn := newSniffer(o.conn, o.raw)
	defer sn.free()
	var first time.Time // of the client
	in := detect.Input{NoPatience: o.rules != nil || o.names != nil}
	if o.port != nil {
		in.Declared, in.Learned = o.port.declared, o.port.memory.ServerFirst(o.accepted)
	}
	for {
		now := time.Now()
		in.Client, in.ClientEnd, in.Age = sn.bytes(), sn.end, now.Sub(o.accepted)
		if len(in.Client) > 0 {
			if first.IsZero() {
				first = now
			}
			in.ClientAge = now.Sub(first)
		}
		var st pipeState
		if o.pipe != nil {
			st = o.pipe.look()
			if st.reset != 0 && !st.anything {
				if err := o.retry(st.reset); err != nil {
					return err
				}
				continue
			}
			in.Opened, in.Server, in.ServerEnd = true, st.server[:st.n], st.fin || st.reset != 0
			if st.anything {
				in.ServerAge = now.Sub(st.since)
			}
		}
		d := detect.Decide(in)
		switch d.Action {
		case detect.Settle:
			o.protocol, o.outcome = d.Protocol, d.Outcome
			o.p.rec.Detections.Inc(string(d.Outcome))
			if o.port != nil && o.outcome != detect.Declared {
				o.port.memory.Observe(d.Outcome, now)
			}
			clearWake(o.conn)
			return nil
		case detect.Open:
			if err := o.open(nil, false); err != nil {
				return err
			}
			continue
		}
		deadline := time.Time{}
		if d.For > 0 {
			deadline = now.Add(d.For)
		}
		o.conn.SetReadDeadline(deadline)
		if o.pipe != nil { // it wakes us by the deadline that was just overwritten
			if is := o.pipe.look(); is.n != st.n || is.fin != st.fin || is.reset != st.reset {
				continue
			}
		}
		if err := sn.more(); err != nil && !isTimeout(err) {
			o.drop(mux.AppReset)
			return &refusal{err: err} // the application is gone
		}
	}
}

// header is what the server's proxy is told.
func (o *outbound) header(proto assay.Protocol) *Header {
	h := &Header{Protocol: proto, Port: o.dst.Port(), ClientPort: o.src.Port(), Destination: o.dst}
	if proto == assay.Detect {
		h.Protocol = assay.Opaque
	}
	if o.port != nil {
		h.Service = o.port.service
		if o.byName {
			h.Port = o.port.port
		}
	}
	return h
}

// choose picks the next endpoint and its peer.
func (o *outbound) choose() (*balance.Endpoint, *peer) {
	if o.direct != nil {
		if o.spent {
			return nil, nil
		}
		o.spent = true
		return nil, o.direct
	}
	e := o.sticky
	o.sticky = nil
	switch {
	case e != nil:
	case o.protocol == assay.HTTP1 || o.protocol == assay.HTTP2:
		e = o.set.Pick(time.Now(), o.tried)
	default:
		e = o.set.PickConnection(time.Now(), o.tried)
	}
	if e == nil {
		return nil, nil
	}
	if o.chosen != nil {
		o.chosen(e)
	}
	return e, e.Value.(*peer)
}

// open opens a stream with data to an endpoint that takes it: the chosen one or, as
// nothing has been read there, another.
func (o *outbound) open(data []byte, fin bool) error {
	payload := o.header(o.protocol).AppendTo(make([]byte, 0, maxHeader))
	k := newPipe(o.p, o.conn)
	e, s, st, n, err := o.openAny(o.ctx, payload, data, fin, k)
	if err != nil {
		return err
	}
	o.endpoint, o.session, o.stream, o.pipe = e, s, st, k
	if n < len(data) {
		st.Write(data[n:], fin) // its failure is the pipe's to tell
	}
	return nil
}

// openAny tries endpoints that were not tried until one takes the stream. The
// endpoint is begun. An error is always a refusal.
func (o *outbound) openAny(ctx context.Context, payload, data []byte, fin bool, h mux.Handler) (*balance.Endpoint, *session, mux.Stream, int, error) {
	var last error
	for ; o.attempts < maxAttempts; o.attempts++ {
		e, pe := o.choose()
		if pe == nil {
			break
		}
		if e != nil {
			o.tried = append(o.tried, e)
			if e.Identity.IsZero() {
				var err error
				if pe, err = o.p.proven(e); err != nil {
					last = err
					continue
				}
			}
			e.Begin()
		}
		s, st, n, err := pe.open(ctx, payload, data, fin, h)
		if err == nil {
			o.attempts++
			return e, s, st, n, nil
		}
		last = failedOpen(e, err)
		if e != nil {
			e.Done()
		}
	}
	if last == nil && len(o.tried) == 0 && o.set.Len() > 0 {
		o.port.care.guard.Count(guard.HeldBack)
		last = errHeldBack
	}
	if last == nil {
		return nil, nil, mux.Stream{}, 0, errNobody
	}
	if _, ok := errors.AsType[*refusal](last); !ok {
		last = &refusal{refusedUnreachable, last}
	}
	return nil, nil, mux.Stream{}, 0, last
}

// failedOpen tells the endpoint, if there is one, why no stream could be opened to it. That
// we have as many under way there as a session takes is no fault of its.
func failedOpen(e *balance.Endpoint, err error) error {
	busy := errors.Is(err, mux.ErrBusy)
	switch now := time.Now(); {
	case e == nil:
	case busy:
		e.Avoid(now)
	default:
		e.Failed(now)
	}
	if busy {
		return errHeldBack
	}
	return err
}

// errNobody says that every endpoint was tried before.
var errNobody = &refusal{refusedUnreachable, nil}

// errHeldBack says that every endpoint has as much as it takes.
var errHeldBack = &refusal{refusedHeldBack, nil}

// drop forgets the open stream.
func (o *outbound) drop(code mux.Code) {
	if o.pipe == nil {
		return
	}
	o.stream.Reset(code)
	if o.endpoint != nil {
		o.endpoint.Done()
	}
	o.endpoint, o.session, o.stream, o.pipe = nil, nil, mux.Stream{}, nil
}

// retry opens the stream that ended with code elsewhere, if that is safe: nobody
// has read it, and everything that was sent can be sent again.
func (o *outbound) retry(code mux.Code) error {
	safe := code == mux.Unreachable || code == mux.Refused || code == mux.Overloaded
	switch {
	case o.endpoint == nil:
	case code == mux.Refused || code == mux.Overloaded:
		o.endpoint.Avoid(time.Now()) // it drains, or has too much to do
	case code != mux.Denied && code != mux.Limited:
		o.endpoint.Failed(time.Now())
	}
	o.forgive(code)
	o.drop(mux.Cancelled)
	clearWake(o.conn)
	if !safe || o.lost {
		return &refusal{refusedPeer + "-" + code.String(), nil}
	}
	if err := o.open(o.sent, o.finished); err != nil {
		if r, _ := errors.AsType[*refusal](err); r.err == nil {
			return &refusal{refusedPeer + "-" + code.String(), nil}
		}
		return err
	}
	return nil
}

// forgive lets the last endpoint be tried again when all that it did was to end a
// session: another one may be had there.
func (o *outbound) forgive(code mux.Code) {
	if code != mux.Refused {
		return
	}
	o.spent = false
	if n := len(o.tried); n > 0 {
		o.tried = o.tried[:n-1]
	}
}

// series is what the connection is counted under.
func (o *outbound) series() *golden.Series {
	key := o.key()
	if s := o.session; s != nil {
		key.Peer, key.PeerArtifacts = s.peer.Identity, s.peer.Artifacts
		key.Security, key.Reason = s.security, s.reason
		if s.reason == assay.ReasonUnmeshed {
			key.Remote = o.p.shown.name(s.local.Addr().String())
		}
	}
	if o.handed && key.Reason == "" {
		key.Reason = reasonHanded
	}
	return o.p.rec.Series(key)
}

// key is the series of a connection before it has a session.
func (o *outbound) key() assay.SignalKey {
	key := assay.SignalKey{Direction: assay.Outbound, Port: o.dst.Port(), Protocol: o.protocol, Security: assay.MutualTLS}
	if o.port != nil {
		key.Service = o.port.service
		if o.rules != nil || o.byName {
			key.Port = o.port.port
		}
	}
	switch {
	case o.outside:
		key.Security, key.Reason = assay.Plaintext, assay.ReasonOutside
		switch {
		case o.port != nil:
			key.Reason = assay.ReasonUnmeshed
		case o.beyond.Listed:
			key.Reason = assay.ReasonEgress
		}
		key.Remote, key.RemoteBy = o.p.shown.name(cmp.Or(o.beyond.Name, o.dst.Addr().String())), o.beyond.By
	case o.direct != nil:
		key.Peer = o.direct.key.id
	}
	return key
}

// relay carries opaque bytes both ways.
func (o *outbound) relay() error {
	var service *guard.Service
	if o.port != nil {
		service = o.port.care.guard
		counted, err := enter(o.port.care.guard)
		if err != nil {
			o.drop(mux.Cancelled)
			return err
		}
		if counted {
			defer o.port.care.guard.Leave()
		}
	}
	if o.pipe == nil {
		if err := o.open(nil, false); err != nil {
			failed.conclude(service, 0, time.Now())
			return err
		}
	}
	series := o.series()
	series.Opened(o.accepted)
	series.Begin()
	err := o.pump(series)
	if o.endpoint != nil {
		o.endpoint.Done()
	}
	now := time.Now()
	switch {
	case o.pipe != nil && o.pipe.look().anything:
		if o.endpoint != nil {
			o.endpoint.Alive(now)
		}
		alive.conclude(service, 0, now)
	case isUnreachable(err):
		failed.conclude(service, 0, now)
	}
	series.End(time.Since(o.accepted), err != nil, now)
	series.Closed()
	if err != nil {
		if r, ok := errors.AsType[*refusal](err); ok && r.reason != "" {
			o.p.rec.Refusals.Inc(r.reason)
			o.log(r, "")
		}
		abort(o.conn)
	}
	return nil
}

// pump moves bytes until both directions have ended, or one broke. Only it decides
// what a stream's early end means.
func (o *outbound) pump(series *golden.Series) error {
	from := newSource(o.raw)
	o.pipe.release(o.conn, o.raw, series)
	for {
		if !o.finished {
			clearWake(o.conn)
		}
		st := o.pipe.look()
		switch {
		case st.broken != nil:
			o.stream.Reset(mux.AppReset)
			return st.broken
		case st.reset != 0 && !st.anything:
			if err := o.retry(st.reset); err != nil {
				return err
			}
			o.pipe.release(o.conn, o.raw, series)
			continue
		case st.reset != 0:
			return &refusal{err: errPeerReset}
		case st.anything:
			o.sent, o.lost = nil, true
		}
		if o.finished {
			<-o.pipe.done
			if st := o.pipe.look(); st.reset == 0 && st.broken == nil {
				return nil
			}
			continue
		}
		b, err := from.read()
		switch {
		case err == nil:
			series.Out(len(b))
			if !o.lost {
				if len(o.sent)+len(b) > maxReplay {
					o.sent, o.lost = nil, true
				} else {
					o.sent = append(o.sent, b...)
				}
			}
			o.stream.Write(b, false) // a failure shows in the pipe
			from.free()
		case isTimeout(err): // woken
		case isEOF(err):
			o.finished = true
			o.stream.Write(nil, true)
		default:
			o.stream.Reset(mux.AppReset)
			return err
		}
	}
}

// isUnreachable reports whether err says that nobody took the connection.
func isUnreachable(err error) bool {
	r, ok := errors.AsType[*refusal](err)
	return ok && (r.reason == refusedUnreachable || r.reason == refusedPeer+"-"+mux.Unreachable.String())
}

var errPeerReset = errors.New("the peer reset the connection")

// refuse resets the application's connection and says why.
func (o *outbound) refuse(err error) {
	defer abort(o.conn) // after it is counted, so that who sees it can find it
	r, ok := errors.AsType[*refusal](err)
	if !ok {
		r = &refusal{"internal", err}
	}
	if r.reason == "" {
		return // the application went away by itself
	}
	o.p.rec.Refusals.Inc(r.reason)
	if o.protocol == assay.Detect {
		o.protocol = assay.Opaque
	}
	key := o.key()
	key.Reason = r.reason
	o.p.rec.Series(key).Refused(time.Now())
	o.log(r, "")
}

func (o *outbound) log(r *refusal, rule string) {
	service := ""
	if o.port != nil {
		service = o.port.service
	}
	o.p.refusals.add(refused{direction: assay.Outbound, destination: o.dst, service: service, reason: r.reason, rule: rule}, r.err)
}
