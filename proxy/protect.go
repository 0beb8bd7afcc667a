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

// fate is what an exchange, or a try, says of the endpoint that it was with.
type fate uint8

const (
	unknown    fate = iota // nothing
	answered               // well
	alive                  // well, where there is no answer to time
	erred                  // it answered that it failed
	failed                 // it did not answer
	away                   // it takes nothing for now
	overloaded             // it takes no more for now
)

// tell tells the endpoint.
func (f fate) tell(e *balance.Endpoint, took time.Duration, now time.Time) {
	switch f {
	case answered:
		e.Answered(took, now)
	case alive:
		e.Alive(now)
	case erred:
		e.Erred(took, now)
	case failed:
		e.Failed(now)
	case away:
		e.Avoid(now)
	case overloaded:
		e.Overloaded(now)
	}
}

// conclude tells the service's circuit, at a request's end. That there was no room is no
// fault of anybody's.
func (f fate) conclude(s *guard.Service, took time.Duration, now time.Time) {
	if s == nil {
		return
	}
	switch f {
	case answered:
		s.Circuit.Answered(took, guard.At(now))
	case alive:
		s.Circuit.Answered(0, guard.At(now))
	case erred, failed:
		s.Circuit.Failed(guard.At(now))
	}
}

// fateOf is that of an exchange that ended. failure is http1's or http2's word for how,
// and fault whether the answer was a server's.
func fateOf(failure string, tunnel, fault bool) fate {
	switch failure {
	case "":
		switch {
		case tunnel:
			return alive
		case fault:
			return erred
		}
		return answered
	case http1.ClientGone, http1.Aborted, "denied", "rate-limited":
		return unknown
	case "overloaded":
		return overloaded
	case "refused":
		return away
	}
	return failed
}

// fateOfTry is that of a try after which there is another.
func fateOfTry(cause guard.Cause, last mux.Code) fate {
	switch {
	case last == mux.Unreachable:
		return failed
	case cause == guard.Unread && last == mux.Overloaded:
		return overloaded
	case cause == guard.Unread:
		return away // it drains
	case cause == guard.Answered:
		return erred
	}
	return failed
}

// enter lets a request or a connection to a service begin, or says why not. What was
// counted in must be counted out with Leave.
func enter(s *guard.Service) (counted bool, err error) {
	ok, counted := s.Enter()
	if !ok {
		return false, &refusal{refusedCrowded, nil}
	}
	if !s.Circuit.Allow(guard.Now()) {
		if counted {
			s.Leave()
		}
		return false, &refusal{refusedCircuit, nil}
	}
	return counted, nil
}

// unfit lists the endpoints that this proxy finds wanting, at most so many as a report
// takes.
func (p *Proxy) unfit() []assay.Unfit {
	var out []assay.Unfit
	s := p.snap.Load()
	for _, svc := range s.services.All() {
		for _, sp := range svc.ports {
			if why, until := sp.care.guard.Circuit.Open(); why != "" {
				out = append(out, assay.Unfit{
					Service: sp.service, Addr: assay.WholeService, Ejected: true, Why: why,
					Until: time.Now().Add(until - guard.Now()).Round(time.Second),
				})
			}
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
