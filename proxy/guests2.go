package proxy

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/proxy/golden"
	"assay.dev/proxy/guard"
	"assay.dev/proxy/http2"
	"assay.dev/proxy/mux"
)

// guestDrain bounds how long a guest's streams may outlive its connection.
const guestDrain = 5 * time.Second

// guests2 carries the requests of one client from outside the mesh: to the application
// here, or, as guests does for HTTP/1, to whom the rules name. A client of HTTP/2 keeps its
// connection for hours, so each request meets the newest rules.
//
// The engine's two halves meet over a session, so the way to the application is one
// within the process.
type guests2 struct {
	streams
	session *mux.Session   // to the application here
	series  *golden.Series // of what goes there
}

// serveGuestHTTP2 gives a plaintext client's connection to the engine, so that its
// requests are counted like everybody's.
func (i *inbound) serveGuestHTTP2() error {
	p := i.p
	if i.app != nil { // dialled for whoever speaks first; the engine dials as it needs
		i.app.Close()
		i.app = nil
	}
	key := i.key(i.reason())
	key.Protocol = assay.HTTP2
	ends, err := socketPair()
	if err != nil {
		return err
	}
	g := &guests2{streams: streams{dispatcher: dispatcher{o: i.asOutbound(assay.HTTP2)}}, series: p.rec.Series(key)}
	g.astray = g.o.route()
	g.payload = g.o.header(assay.HTTP2).AppendTo(make([]byte, 0, maxHeader))
	defer g.close()
	g.series.Opened(i.accepted)
	defer g.series.Closed()
	observer := &counted2{p, g.series}
	g.session = mux.New(ends[0], true, mux.Config{}, nil)
	server := mux.New(ends[1], false, mux.Config{}, func(st mux.Stream, _ []byte) (mux.Handler, mux.Code) {
		o, snap := http2.Origin{Client: netip.AddrPortFrom(i.remote.Addr(), 0), Target: i.dst, Observer: observer}, p.snap.Load()
		if sp := snap.target(i.dst); sp != nil {
			o.Guard = sp.care.inbound
		}
		if snap.certified(i.dst) {
			o.Edit = &nobodysCert
		}
		return p.http2.in.Accept(st, o)
	})
	var wg sync.WaitGroup
	wg.Go(func() { g.session.Run() })
	wg.Go(func() { server.Run() })
	err = p.http2.out.Serve(i.ctx, i.conn, g)
	if err != nil {
		p.log.Debug("http2 connection", "source", i.remote.String(), "destination", i.dst.String(), "error", err)
	}
	g.session.Drain()
	over := time.AfterFunc(guestDrain, func() { g.session.Close(errors.New("the client is gone")) })
	wg.Wait()
	over.Stop()
	return nil
}

// Plan implements http2.Planner.
func (g *guests2) Plan(x *http2.Exchange) *http2.Plan {
	if g.o.p.snap.Load().certified(g.o.dst) {
		// Not handed to anybody else, who would take the client for this workload.
		return nil
	}
	p := g.streams.Plan(x)
	r := planned(p)
	if r == nil || p.Failure != nil || p.Answer != nil {
		return p
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if e := r.here(g.o); e != nil {
		r.local = true
		r.chosen(e)
	}
	return p
}

// stays reports whether the request is for the application here.
func stays(x *http2.Exchange) bool {
	r := planned(x.Plan)
	return r == nil || r.local
}

// Dispatch implements http2.Dispatcher.
func (g *guests2) Dispatch(ctx context.Context, x *http2.Exchange, data []byte, fin bool, h mux.Handler, batch *mux.Batch, wait bool) (mux.Stream, int, error) {
	r := planned(x.Plan)
	if r != nil && !r.local {
		return g.streams.Dispatch(ctx, x, data, fin, h, batch, wait)
	}
	if x.Attempt > 0 && x.Cause == guard.Unread {
		return mux.Stream{}, 0, http2.ErrNoOther // it is this application or none
	}
	if r != nil {
		x.Policy = r.rule.Request.Over(nil)
	}
	if batch != nil {
		batch.Hold(g.session)
	}
	return g.session.Open(nil, data, fin, h)
}

// Begin implements http2.Observer.
func (g *guests2) Begin(x *http2.Exchange) {
	g.mu.Lock()
	routed := g.o.rules != nil
	g.mu.Unlock()
	if routed {
		g.streams.Begin(x)
	}
}

// End implements http2.Observer. What the application here was asked is counted there, but
// for what was refused before.
func (g *guests2) End(x *http2.Exchange) {
	if !stays(x) {
		g.streams.End(x)
		return
	}
	planned(x.Plan).end()
	x.Note = nil
	if x.Refused {
		g.o.p.malformed2(x)
		g.series.Refused(time.Now())
	}
}
