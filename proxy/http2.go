package proxy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/proxy/balance"
	"assay.dev/proxy/golden"
	"assay.dev/proxy/guard"
	"assay.dev/proxy/http1"
	"assay.dev/proxy/http2"
	"assay.dev/proxy/mux"
)

// http2Engines are the two sides of HTTP/2.
type http2Engines struct {
	out http2.Outbound
	in  *http2.Inbound
}

// serveHTTP2 gives the application's connection to the engine, which asks streams for an
// upstream with each request.
func (o *outbound) serveHTTP2() error {
	o.drop(mux.Cancelled)
	d := &streams{dispatcher: dispatcher{o: o}}
	d.payload = o.header(assay.HTTP2).AppendTo(make([]byte, 0, maxHeader))
	defer d.close()
	if err := o.p.http2.out.Serve(o.ctx, o.conn, d); err != nil {
		o.p.log.Debug("http2 connection", "source", o.src.String(), "destination", o.dst.String(), "error", err)
	}
	return nil
}

// streams chooses upstreams for the requests of one connection of HTTP/2, which run at
// the same time: mu guards what dispatcher has for one request after the other, and where
// each of them goes is in its way.
type streams struct {
	mu sync.Mutex
	dispatcher
	byRule *golden.Series                          // of requests that a rule answers by itself
	tried  map[*http2.Exchange][]*balance.Endpoint // of those that are tried again
}

// way is where a request may go.
type way struct {
	target
	tried  []*balance.Endpoint
	chosen func(e *balance.Endpoint) // told before anything is sent there; may be nil
	header []byte
}

// way takes over a newer snapshot, and what was tried before; d.mu is held.
func (d *streams) way(x *http2.Exchange) (way, error) {
	o := d.o
	x.Policy, x.Guard = nil, &o.p.guard
	if err := d.follow(); err != nil {
		return way{}, err
	}
	w := way{target: o.target, header: d.payload}
	r := planned(x.Plan)
	if r != nil {
		if err := d.aimed(r, &w); err != nil {
			return w, err
		}
	}
	if w.port != nil {
		x.Policy, x.Guard = w.port.request, w.port.care.guard
	}
	if r != nil {
		x.Policy = r.rule.Request.Over(x.Policy)
	}
	if x.Attempt == 0 {
		return w, nil
	}
	c, ok := x.Tag.(*call)
	if ok {
		c.series.Undo()
		if c.endpoint != nil {
			c.endpoint.Done()
			fateOfTry(x.Cause, x.Last).tell(c.endpoint, 0, time.Now())
			// An endpoint that only ended a session may be tried again.
			if x.Last != mux.Refused {
				if d.tried == nil {
					d.tried = map[*http2.Exchange][]*balance.Endpoint{}
				}
				d.tried[x] = append(d.tried[x], c.endpoint)
			}
		}
		x.Tag = nil
	}
	w.tried = d.tried[x]
	switch {
	case x.Cause == guard.Unread:
		if ok && w.direct != nil && x.Last != mux.Refused {
			return w, errNobody
		}
	case w.set.Len() <= len(w.tried):
		w.tried = nil // they may do better now
	}
	return w, nil
}

// Dispatch implements http2.Dispatcher.
func (d *streams) Dispatch(ctx context.Context, x *http2.Exchange, data []byte, fin bool, h mux.Handler, batch *mux.Batch, wait bool) (mux.Stream, int, error) {
	d.mu.Lock()
	w, err := d.way(x)
	d.mu.Unlock()
	if x.Attempt == 0 && !wait {
		x.Guard.Budget.Request()
	}
	if err == errNobody {
		return d.nobody(x)
	}
	if f, ok := err.(*http2.Failure); ok {
		return mux.Stream{}, 0, f
	}
	if err != nil {
		return mux.Stream{}, 0, d.refuse(err)
	}
	if x.Attempt == 0 && !wait {
		counted, err := enter(x.Guard)
		if err != nil {
			return mux.Stream{}, 0, d.refuse(err)
		}
		if counted {
			x.Entered = x.Guard
		}
	}
	if left, ok := x.Remaining(); ok && wait {
		bound := &deadline{ctx, time.Now().Add(left)}
		ctx = bound
	}
	e, s, st, n, err := d.o.p.openWay(ctx, &w, w.header, data, fin, h, batch, wait)
	left, limited := x.Remaining()
	switch {
	case err == nil:
	case err == http2.ErrWait:
		return st, 0, err
	case x.Attempt > 0 && err == errNobody:
		return d.nobody(x)
	case errors.Is(err, context.DeadlineExceeded) && limited && left == 0:
		x.Guard.Count(guard.Timeout)
		return mux.Stream{}, 0, http2.ErrTimeout
	default:
		return mux.Stream{}, 0, d.refuse(err)
	}
	d.mu.Lock()
	c := d.call(w.target, e, s)
	d.mu.Unlock()
	c.series.Begin() // the endpoint was begun when it was chosen
	x.Tag = c
	return st, n, nil
}

func (d *streams) nobody(x *http2.Exchange) (mux.Stream, int, error) {
	d.o.p.rec.Refusals.Inc(refusedPeer + "-" + x.Last.String())
	return mux.Stream{}, 0, http2.ErrNoOther
}

// openWay tries endpoints until one takes the stream. The endpoint is begun. Without wait
// it returns http2.ErrWait when the chosen one has no session yet.
func (p *Proxy) openWay(ctx context.Context, w *way, payload, data []byte, fin bool, h mux.Handler, batch *mux.Batch, wait bool) (*balance.Endpoint, *session, mux.Stream, int, error) {
	var last error
	for range maxAttempts {
		e, pe := (*balance.Endpoint)(nil), w.direct
		if pe == nil {
			if e = w.pick(); e == nil {
				break
			}
			if w.chosen != nil {
				w.chosen(e)
			}
			pe = e.Value.(*peer)
			if e.Identity.IsZero() {
				var err error
				if pe, err = p.proven(e); err != nil {
					w.tried = append(w.tried[:len(w.tried):len(w.tried)], e)
					last = err
					continue
				}
			}
		}
		if !wait {
			s, st, n, err := pe.openNow(batch, payload, data, fin, h)
			if err != nil {
				return nil, nil, st, 0, http2.ErrWait
			}
			if e != nil {
				e.Begin()
			}
			return e, s, st, n, nil
		}
		if e != nil {
			e.Begin()
		}
		s, st, n, err := pe.open(ctx, payload, data, fin, h)
		if err == nil {
			return e, s, st, n, nil
		}
		last = failedOpen(e, err)
		if e == nil {
			break
		}
		e.Done()
		w.tried = append(w.tried[:len(w.tried):len(w.tried)], e)
	}
	if last == nil && len(w.tried) == 0 && w.set.Len() > 0 {
		w.port.care.guard.Count(guard.HeldBack)
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

// refuse is failure in HTTP/2's terms.
func (d *streams) refuse(err error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	f, _ := errors.AsType[*http1.Failure](d.failure(err))
	return &http2.Failure{Status: f.Status, Code: grpcUnavailable, Reason: f.Reason, Text: f.Text, RetryAfter: f.RetryAfter}
}

const grpcUnavailable = 14

// Begin implements http2.Observer.
func (d *streams) Begin(x *http2.Exchange) {
	if ws := d.o.p.watches.Load(); ws != nil {
		service := ""
		d.mu.Lock()
		if d.o.port != nil {
			service = d.o.port.service
		}
		d.mu.Unlock()
		ws.note2(x, assay.Outbound, service)
	}
}

// End implements http2.Observer.
func (d *streams) End(x *http2.Exchange) {
	now := time.Now()
	c, ok := x.Tag.(*call)
	if x.Entered != nil {
		x.Entered.Leave()
		x.Entered = nil
	}
	d.o.p.malformed2(x)
	planned(x.Plan).end()
	if !ok || x.Attempt > 0 {
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.tried, x)
	}
	if !ok {
		d.nowhere(x, now)
		return
	}
	if x.Note != nil {
		d.o.p.watcher.end2(x, c.series, assay.SignalKey{})
	}
	observe2(c.series, x, now, false)
	// A stream may last for hours: what counts is when it was answered.
	f := fateOf(x.Failure, x.Tunnel, faulty(x.Status) || x.GRPC && grpcFaulty(x.Code))
	if c.endpoint != nil {
		c.endpoint.Done()
		f.tell(c.endpoint, x.First, now)
	}
	f.conclude(x.Guard, x.First, now)
}

// nowhere counts a request that a rule answered, or that was refused, before it went
// anywhere; d.mu is held.
func (d *streams) nowhere(x *http2.Exchange, now time.Time) {
	key := d.o.key()
	if x.Note != nil {
		d.o.p.watcher.end2(x, nil, key)
	}
	if x.Plan != nil && x.Plan.Answer != nil && x.Failure == "" {
		if d.byRule == nil {
			key.Reason = reasonRule
			d.byRule = d.o.p.rec.Series(key)
		}
		d.byRule.Begin()
		observe2(d.byRule, x, now, false)
		return
	}
	if d.refused == nil {
		key.Reason = "refused"
		d.refused = d.o.p.rec.Series(key)
	}
	d.refused.Refused(now)
	if x.Failure == refusedUnreachable {
		failed.conclude(x.Guard, 0, now)
	}
}

// grpcFaulty reports whether a gRPC status says that the endpoint is not fit, as faulty
// says of statuses: UNAVAILABLE, INTERNAL, DATA_LOSS. UNKNOWN is what an application's own
// error becomes, and DEADLINE_EXCEEDED is the caller's.
func grpcFaulty(code int) bool { return code == 13 || code == 14 || code == 15 }

// Refused implements http2.Observer.
func (d *streams) Refused(why *http2.Refusal) { d.o.p.refused2(why) }

// observe2 counts an exchange that ended.
func observe2(s *golden.Series, x *http2.Exchange, now time.Time, inbound bool) {
	failed := x.Status >= 500 || x.Failure != "" && x.Failure != http2.ClientGone && x.Failure != http2.Aborted
	in, out := x.ResponseBytes, x.RequestBytes
	if inbound {
		in, out = out, in
	}
	s.In(int(in))
	s.Out(int(out))
	if x.GRPC {
		failed = failed || http2.ServerFault(x.Code)
		in, out := x.ResponseMessages, x.RequestMessages
		if inbound {
			in, out = out, in
		}
		s.GRPC(x.Code, in, out)
	}
	s.End(x.Duration, failed, now)
}

// malformed2 counts a message that was refused for what it is, refused2 a connection.
func (p *Proxy) malformed2(x *http2.Exchange) {
	if x.Refused {
		p.rec.Refusals.Inc(refusedHTTP2 + "-" + x.Failure)
	}
}

func (p *Proxy) refused2(why *http2.Refusal) { p.rec.Refusals.Inc(refusedHTTP2 + "-" + why.Reason) }

// application2 implements http2.Backend.
type application2 struct{ p *Proxy }

// Dial connects to the application as the client.
func (a application2) Dial(ctx context.Context, o http2.Origin) (*net.TCPConn, error) {
	return application(a).Dial(ctx, http1.Origin{Client: o.Client, Target: o.Target})
}

// counted2 implements http2.Observer for the server's side.
type counted2 struct {
	p      *Proxy
	series *golden.Series
}

func (c *counted2) Begin(x *http2.Exchange) {
	if ws := c.p.watches.Load(); ws != nil {
		ws.note2(x, assay.Inbound, c.series.Key().Service)
	}
	c.series.Begin()
}

func (c *counted2) End(x *http2.Exchange) {
	if x.Note != nil {
		c.p.watcher.end2(x, c.series, assay.SignalKey{})
	}
	c.p.malformed2(x)
	observe2(c.series, x, time.Now(), true)
}

func (c *counted2) Refused(why *http2.Refusal) { c.p.refused2(why) }

// acceptHTTP2 takes a stream of HTTP/2, as acceptHTTP does one of HTTP/1.
func (s *session) acceptHTTP2(st mux.Stream, open []byte) (mux.Handler, mux.Code) {
	if !sameButClientPort(s.lastOpen2, open) {
		h, rest, err := ParseHeader(open)
		if err != nil || len(rest) > 0 {
			return s.refuseHeader()
		}
		s.lastOpen2 = append(s.lastOpen2[:0], open...)
		s.lastCounted2 = &counted2{s.p, s.p.rec.Series(s.key(&h))}
	}
	o := http2.Origin{Client: netip.AddrPortFrom(s.remote.Addr(), 0), Target: s.local, Observer: s.lastCounted2, Guard: s.protection()}
	if s.p.snap.Load().certified(s.local) {
		o.Edit = s.certEdit()
	}
	return s.p.http2.in.Accept(st, o)
}

// openNow is open for a caller that may not wait.
func (pe *peer) openNow(batch *mux.Batch, payload, data []byte, fin bool, h mux.Handler) (*session, mux.Stream, int, error) {
	s := pe.pick()
	if s == nil {
		return nil, mux.Stream{}, 0, http2.ErrWait
	}
	batch.Hold(s.mux)
	st, n, err := s.mux.Open(payload, data, fin, h)
	return s, st, n, err
}
