package proxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"assay.dev"
	"assay.dev/proxy/balance"
	"assay.dev/proxy/golden"
	"assay.dev/proxy/guard"
	"assay.dev/proxy/http1"
	"assay.dev/proxy/mux"
)

// httpEngines are the two sides of HTTP/1.
type httpEngines struct {
	out http1.Outbound
	in  *http1.Inbound
}

// serveHTTP gives the application's connection to the engine, which asks dispatcher
// for an upstream with each request. first are bytes that were read already.
func (o *outbound) serveHTTP(first []byte) error {
	o.drop(mux.Cancelled)
	d := o.dispatcher()
	defer d.close()
	if err := o.p.http.out.Serve(o.ctx, o.conn, first, d); err != nil {
		o.ended(err)
	}
	return nil
}

//go:noinline
func (o *outbound) ended(err error) {
	o.p.log.Debug("http connection", "source", o.src.String(), "destination", o.dst.String(), "error", err)
}

// dispatcher makes one, apart from serveHTTP, whose frame lies below all that is done for
// the connection's life.
//
//go:noinline
func (o *outbound) dispatcher() *dispatcher {
	return &dispatcher{o: o, payload: o.header(assay.HTTP1).AppendTo(make([]byte, 0, maxHeader))}
}

// dispatcher chooses upstreams for the requests of one connection.
type dispatcher struct {
	o       *outbound
	payload []byte
	calls   [8]*call // that this connection made, so that a request allocates nothing
	next    int
	refused *golden.Series
	waited  atomic.Int64 // nanoseconds that the last Dispatch took: not the endpoint's fault
	bound   deadline
	routed  *routed        // what rules made of the request; nil until there were some
	astray  error          // why the newest snapshot leads nowhere
	entered *guard.Service // to be left at the request's end
}

// call is what requests of one connection to one endpoint have in common.
type call struct {
	endpoint *balance.Endpoint // nil when the address was dialled directly
	session  *session
	series   *golden.Series
}

// Begin is called when a head was read. Only a stream that carries one request after
// the other knows by then where it goes.
func (d *dispatcher) Begin(x *http1.Exchange) {
	if ws := d.o.p.watches.Load(); ws != nil {
		service := ""
		if d.o.port != nil {
			service = d.o.port.service
		}
		ws.note1(x, assay.Outbound, service)
	}
	if c, ok := x.Tag.(*call); ok {
		c.begin()
	}
}

func (c *call) begin() {
	c.series.Begin()
	if c.endpoint != nil {
		c.endpoint.Begin()
	}
}

// Dispatch implements http1.Dispatcher.
func (d *dispatcher) Dispatch(ctx context.Context, x *http1.Exchange, data []byte, fin bool, h mux.Handler) (mux.Stream, int, error) {
	o := d.o
	o.attempts = 0
	if x.Attempt == 0 {
		o.tried, o.spent = o.tried[:0], false
	} else if c, ok := x.Tag.(*call); ok {
		c.series.Undo()
		if c.endpoint != nil {
			c.endpoint.Done()
			fateOfTry(x.Cause, x.Last).tell(c.endpoint, 0, time.Now())
		}
		o.forgive(x.Last)
		x.Tag = nil
	}
	if err := d.follow(); err != nil {
		return mux.Stream{}, 0, d.failure(err)
	}
	if err := d.aim(); err != nil {
		return mux.Stream{}, 0, err
	}
	if err := d.protect(x); err != nil {
		return mux.Stream{}, 0, d.failure(err)
	}
	start := time.Now()
	if left, ok := x.Remaining(); ok {
		d.bound = deadline{ctx, start.Add(left)}
		ctx = &d.bound
	}
	e, s, st, n, err := o.openAny(ctx, d.payload, data, fin, h)
	switch {
	case err == nil:
	case x.Attempt > 0 && err == errNobody:
		o.p.rec.Refusals.Inc(refusedPeer + "-" + x.Last.String())
		return mux.Stream{}, 0, http1.ErrNoOther
	case errors.Is(err, context.DeadlineExceeded) && x.Late():
		x.Guard.Count(guard.Timeout)
		return mux.Stream{}, 0, http1.ErrTimeout
	default:
		return mux.Stream{}, 0, d.failure(err)
	}
	d.waited.Store(int64(time.Since(start)))
	c := d.call(o.target, e, s)
	c.series.Begin() // the endpoint was begun when it was chosen
	x.Tag = c
	return st, n, nil
}

// protect gives the request what its service allows, and counts it into the service's
// budget.
func (d *dispatcher) protect(x *http1.Exchange) error {
	o := d.o
	x.Policy, x.Guard = nil, &o.p.guard
	if o.port != nil {
		x.Policy, x.Guard = o.port.request, o.port.care.guard
	}
	switch {
	case x.Attempt == 0:
		x.Guard.Budget.Request()
		counted, err := enter(x.Guard)
		if err != nil {
			return err
		}
		if counted {
			d.entered = x.Guard
		}
	case x.Cause != guard.Unread && o.direct != nil:
		o.spent = false
	case x.Cause != guard.Unread && len(o.tried) >= o.set.Len():
		o.tried = o.tried[:0] // they may do better now
	}
	if d.routed != nil && d.routed.rule != nil {
		x.Policy = d.routed.rule.Request.Over(x.Policy)
	}
	return nil
}

// follow takes over a newer snapshot: a connection may live for hours.
func (d *dispatcher) follow() error {
	s := d.o.p.snap.Load()
	if s == d.o.snap {
		if d.routed != nil {
			d.o.target = d.routed.dialled
		}
		return d.astray
	}
	o := d.o
	o.snap, o.target, o.rules, o.outside = s, target{}, nil, false
	d.astray = o.route()
	if d.astray == nil && o.outside {
		d.astray = &refusal{refusedUnknown, errors.New("the address has left the mesh")}
	}
	if d.routed != nil {
		d.routed.dialled, d.routed.payloadOf = o.target, nil
	}
	return d.astray
}

// failure counts a request that reaches nobody and says what the application is told.
func (d *dispatcher) failure(err error) error {
	r, ok := errors.AsType[*refusal](err)
	if !ok {
		r = &refusal{"internal", err}
	}
	d.o.p.rec.Refusals.Inc(r.reason)
	f := &http1.Failure{Status: 503, Reason: r.reason, Text: r.Error()}
	switch r.reason {
	case refusedHeldBack, refusedCircuit, refusedCrowded:
		// Thousands a second, when it is for this that they are there.
		f.RetryAfter = 1
	default:
		d.o.log(r, "")
	}
	return f
}

// call finds or makes the call for an endpoint's session, which at has led to.
func (d *dispatcher) call(at target, e *balance.Endpoint, s *session) *call {
	for _, c := range d.calls {
		if c != nil && c.session == s && c.endpoint == e {
			return c
		}
	}
	o := *d.o
	o.target, o.session = at, s
	c := &call{endpoint: e, session: s, series: o.series()}
	c.series.Opened(time.Now())
	if old := d.calls[d.next]; old != nil {
		old.series.Closed()
	}
	d.calls[d.next] = c
	d.next = (d.next + 1) % len(d.calls)
	return c
}

// End implements http1.Observer.
func (d *dispatcher) End(x *http1.Exchange) {
	now := time.Now()
	if d.entered != nil {
		d.entered.Leave()
		d.entered = nil
	}
	d.o.p.malformed(x)
	c, ok := x.Tag.(*call)
	if x.Note != nil {
		var s *golden.Series
		if ok {
			s = c.series
		}
		d.o.p.watcher.end1(x, s, d.o.key())
	}
	if d.routed != nil && d.routed.end(x, now) {
		return
	}
	if !ok { // refused before it went anywhere
		if d.refused == nil {
			key := d.o.key()
			key.Reason = "refused"
			d.refused = d.o.p.rec.Series(key)
		}
		d.refused.Refused(now)
		if x.Failure == refusedUnreachable {
			failed.conclude(x.Guard, 0, now)
		}
		return
	}
	observe(c.series, x, now, false)
	f, took := fateOf(x.Failure, x.Tunnel, faulty(x.Status)), x.Duration-time.Duration(d.waited.Load())
	if c.endpoint != nil {
		c.endpoint.Done()
		f.tell(c.endpoint, took, now)
	}
	f.conclude(x.Guard, took, now)
}

// observe counts an exchange that ended.
func observe(s *golden.Series, x *http1.Exchange, now time.Time, inbound bool) {
	failed := x.Status >= 500 || x.Failure != "" && x.Failure != http1.ClientGone && x.Failure != http1.Aborted
	if inbound {
		s.In(int(x.RequestBytes))
		s.Out(int(x.ResponseBytes))
	} else {
		s.In(int(x.ResponseBytes))
		s.Out(int(x.RequestBytes))
	}
	s.End(x.Duration, failed, now)
}

func (d *dispatcher) close() {
	for _, c := range d.calls {
		if c != nil {
			c.series.Closed()
		}
	}
}

// application implements http1.Backend.
type application struct{ p *Proxy }

// Dial connects to the application as the client. Connections of one client address
// are shared by its requests, so the port is nobody's.
func (a application) Dial(ctx context.Context, o http1.Origin) (*net.TCPConn, error) {
	if !o.Client.IsValid() { // not the application here
		return a.p.dialPlain(ctx, o.Target)
	}
	if c, ok := o.Observer.(*counted); ok {
		if app := c.spare.Swap(nil); app != nil {
			return app, nil
		}
	}
	ctx, cancel := context.WithTimeout(ctx, appDialTimeout)
	defer cancel()
	c, err := a.p.dialApp(ctx, o.Client, o.Target)
	if err != nil {
		a.p.rec.Refusals.Inc(refusedApplication)
		a.p.refusals.add(refused{direction: assay.Inbound, source: o.Client.Addr(), destination: o.Target, reason: refusedApplication}, err)
	}
	return c, err
}

// counted implements http1.Observer for the server's side.
type counted struct {
	p      *Proxy
	series *golden.Series
	spare  atomic.Pointer[net.TCPConn] // to the application, for the first who dials
}

func (c *counted) Begin(x *http1.Exchange) {
	if ws := c.p.watches.Load(); ws != nil {
		ws.note1(x, assay.Inbound, c.series.Key().Service)
	}
	c.series.Begin()
}

func (c *counted) End(x *http1.Exchange) {
	if x.Note != nil {
		c.p.watcher.end1(x, c.series, assay.SignalKey{})
	}
	c.p.malformed(x)
	observe(c.series, x, time.Now(), true)
}

// malformed counts a message that was refused for what it is.
func (p *Proxy) malformed(x *http1.Exchange) {
	if x.Refused {
		p.rec.Refusals.Inc(refusedHTTP + "-" + x.Failure)
	}
}

// acceptHTTP takes a stream of HTTP/1. The session's reader calls it, so what it
// remembers needs no lock; streams of one service and port differ in the client's
// port alone.
func (s *session) acceptHTTP(st mux.Stream, open []byte) (mux.Handler, mux.Code) {
	if !sameButClientPort(s.lastOpen, open) {
		h, rest, err := ParseHeader(open)
		if err != nil || len(rest) > 0 {
			return s.refuseHeader()
		}
		s.lastOpen = append(s.lastOpen[:0], open...)
		s.lastCounted = &counted{p: s.p, series: s.p.rec.Series(s.key(&h))}
	}
	o := http1.Origin{Client: netip.AddrPortFrom(s.remote.Addr(), 0), Target: s.local, Observer: s.lastCounted, Guard: s.protection()}
	if s.p.snap.Load().certified(s.local) {
		o.Edit = s.certEdit()
	}
	return s.p.http.in.Accept(st, o), 0
}

// protection guards the port that the session is with, if it is a service's. The
// session's reader calls it.
func (s *session) protection() http1.Guard {
	if snap := s.p.snap.Load(); snap != s.lastSnap {
		s.lastSnap, s.lastGuard = snap, nil
		if sp := snap.target(s.local); sp != nil {
			s.lastGuard = sp.care.inbound
		}
	}
	return s.lastGuard
}

// sameButClientPort compares two headers without bytes 5 and 6.
func sameButClientPort(a, b []byte) bool {
	return len(a) == len(b) && len(a) > 7 && string(a[:5]) == string(b[:5]) && string(a[7:]) == string(b[7:])
}

// serveGuestHTTP gives a plaintext client's connection to the engine, so that its
// requests are counted like everybody's.
func (i *inbound) serveGuestHTTP(first []byte) error {
	key := i.key(i.reason())
	key.Protocol = assay.HTTP1
	series := i.p.rec.Series(key)
	series.Opened(i.accepted)
	defer series.Closed()
	c := &counted{p: i.p, series: series}
	c.spare.Store(i.app) // dialled for whoever speaks first
	i.app = nil
	origin := http1.Origin{Client: netip.AddrPortFrom(i.remote.Addr(), 0), Target: i.dst, Observer: c}
	if sp := i.snap.target(i.dst); sp != nil {
		origin.Guard = sp.care.inbound
	}
	var err error
	if i.snap.certified(i.dst) {
		// Not handed to anybody else, who would take the client for this workload.
		origin.Edit = &nobodysCert
		err = i.p.http.in.Serve(i.ctx, i.conn, first, origin)
	} else if g := i.guests(); g != nil {
		err = i.p.http.in.ServeRouted(i.ctx, i.conn, first, origin, g)
		g.close()
	} else {
		err = i.p.http.in.Serve(i.ctx, i.conn, first, origin)
	}
	if app := c.spare.Swap(nil); app != nil {
		app.Close()
	}
	if err != nil {
		i.p.log.Debug("http connection", "source", i.remote.String(), "destination", i.dst.String(), "error", err)
	}
	return nil
}
