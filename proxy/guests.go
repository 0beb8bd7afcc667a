package proxy

import (
	"assay.dev"
	"assay.dev/proxy/balance"
	"assay.dev/proxy/http1"
)

// guests is the dispatcher for a client from outside the mesh that dialled the workload's
// address, where that can only mean a service with routes. The client's proxy would have
// followed them, and there is none, so the server's does: by their weights most requests
// are for the application here, which sees its real client; the surplus goes on to whom
// the rules name, from this workload.
type guests struct{ dispatcher }

// reasonHanded marks requests of guests that went on to somebody else.
const reasonHanded = "handed-on"

// guests returns nil when no rule is for the client.
func (i *inbound) guests() *guests {
	if i.snap.rules(i.snap.sole(i.dst)) == nil {
		return nil
	}
	o := i.asOutbound(assay.HTTP1)
	if o.route() != nil || o.rules == nil {
		return nil
	}
	return &guests{dispatcher{o: o, payload: o.header(assay.HTTP1).AppendTo(make([]byte, 0, maxHeader))}}
}

// asOutbound is the connection as if the workload had made it: what is for others.
func (i *inbound) asOutbound(protocol assay.Protocol) *outbound {
	return &outbound{p: i.p, ctx: i.ctx, conn: i.conn, snap: i.snap, src: i.remote, dst: i.dst, accepted: i.accepted, protocol: protocol, handed: true}
}

// Plan implements http1.Planner.
func (g *guests) Plan(x *http1.Exchange, head []byte) *http1.Plan {
	p := g.dispatcher.Plan(x, head)
	if p == nil || p.Failure != nil || p.Answer != nil {
		return p
	}
	if e := g.routed.here(g.o); e != nil {
		p.Local = true
		g.routed.chosen(e)
	}
	return p
}

// here returns the endpoint of the request's backend that is this workload, unless the
// client is kept at another one.
func (d *decision) here(o *outbound) *balance.Endpoint {
	sp := o.snap.backend(d.backend.Service, d.backend.Port)
	if sp == nil {
		return nil
	}
	if e := d.kept(o, sp, d.backend); e != nil && e.Addr != o.dst {
		return nil
	}
	return sp.at(o.dst)
}

// End implements http1.Observer. What the application here was asked is counted there.
func (g *guests) End(x *http1.Exchange) {
	if x.Plan == nil || x.Plan.Local {
		if g.routed != nil {
			for _, m := range g.routed.mirrors {
				m.end()
			}
		}
		return
	}
	g.dispatcher.End(x)
}
