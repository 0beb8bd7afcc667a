package proxy

import (
	"cmp"
	"slices"
	"time"

	"assay.dev"
	"assay.dev/proxy/balance"
	"assay.dev/proxy/guard"
	"assay.dev/proxy/http1"
	"assay.dev/proxy/mux"
)

// What package guard decides, told to engines and to the agent.

// protection guards one port of this workload. It is what the engines ask.
type protection struct{ guard.Inbound }

// Admit implements http1.Guard.
func (g *protection) Admit(now time.Duration) mux.Code {
	switch g.Inbound.Admit(now) {
	case guard.Overloaded:
		return mux.Overloaded
	case guard.TooFast:
		return mux.Limited
	}
	return 0
}

// Answered implements http1.Guard.
func (g *protection) Answered(took, now time.Duration) { g.Limiter.Done(took, now) }

var _ http1.Guard = (*protection)(nil)

// care is what outlives a snapshot of how a service's port is protected: on the
// client's side budget and health, on the server's its limits.
type care struct {
	guard   *guard.Service
	group   *balance.Group
	inbound *protection
}

func newCare(counts *guard.Counts) *care {
	c := &care{guard: &guard.Service{Counts: counts}, group: balance.NewGroup(counts), inbound: new(protection)}
	c.inbound.Counts = counts
	return c
}

// configure changes the rules; nil are the defaults.
func (c *care) configure(p *assay.TrafficPolicy) {
	rules := p.WithDefaults()
	c.guard.Set(&rules)
	c.inbound.Set(&rules.Inbound)
	c.group.Configure(p)
}

// Statuses of a server that fails. What they say of the request (501, 505) is no fault
// of the endpoint's.
func faulty(status int) bool { return status >= 500 && status != 501 && status != 505 }

// judge takes what became of an exchange with an endpoint.
func judge(e *balance.Endpoint, x *http1.Exchange, took time.Duration, now time.Time) {
	switch x.Failure {
	case "":
		switch {
		case x.Tunnel:
			e.Alive(now)
		case faulty(x.Status):
			e.Erred(took, now)
		default:
			e.Answered(took, now)
		}
	case http1.ClientGone, http1.Aborted, "denied", "rate-limited":
		// They say nothing about it.
	case "overloaded", "refused":
		e.Avoid(now)
	default:
		e.Failed(now)
	}
}

// judgeTry takes why an attempt is repeated.
func judgeTry(e *balance.Endpoint, x *http1.Exchange, now time.Time) {
	switch x.Cause {
	case guard.Unread:
		e.Avoid(now) // it drains, or has too much to do
	case guard.Answered:
		e.Erred(0, now)
	default:
		e.Failed(now)
	}
}

// unfit lists the endpoints that this proxy finds wanting, at most so many as a report
// takes.
func (p *Proxy) unfit() []assay.Unfit {
	var out []assay.Unfit
	s := p.snap.Load()
	for _, svc := range s.services {
		for _, sp := range svc.ports {
			sp.care.group.Unfit(func(e *balance.Endpoint, why string, until time.Duration) {
				out = append(out, assay.Unfit{
					Service: sp.service, Workload: e.Workload, Addr: e.Addr.String(), Ejected: e.Ejected(), Why: why,
					Until: time.Now().Add(until - guard.Now()).Round(time.Second),
				})
			})
		}
	}
	slices.SortFunc(out, func(a, b assay.Unfit) int {
		return cmp.Or(cmp.Compare(a.Service, b.Service), cmp.Compare(a.Addr, b.Addr))
	})
	return out[:min(len(out), assay.MaxUnfit)]
}
