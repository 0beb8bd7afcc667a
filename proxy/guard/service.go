package guard

import (
	"sync/atomic"
	"time"

	"assay.dev"
)

// Service is what the requests of one client to one port of a service share. A nil
// Service has no budget and counts nothing.
type Service struct {
	Counts   *Counts // may be nil
	Budget   Budget
	Circuit  Circuit
	inFlight atomic.Int64
	most     atomic.Int64 // 0: unbounded
}

// Set changes the rules, which must have their defaults.
func (s *Service) Set(p *assay.TrafficPolicy) {
	s.Budget.Set(Budgeted{Percent: p.Retry.BudgetPercent, MinPerSecond: p.Retry.MinPerSecond, Interval: p.Retry.BudgetInterval})
	s.most.Store(int64(max(p.MaxConnections, 0)))
	s.Circuit.Counts = s.Counts
	s.Circuit.Set(p.Circuit)
}

// Enter counts a request or connection in, if there is room. What is counted must be
// counted out with Leave; without a bound nothing is.
func (s *Service) Enter() (ok, counted bool) {
	most := s.most.Load()
	if most == 0 {
		return true, false
	}
	if s.inFlight.Add(1) > most {
		s.inFlight.Add(-1)
		s.Count(Crowded)
		return false, false
	}
	return true, true
}

// Leave undoes an Enter that counted.
func (s *Service) Leave() { s.inFlight.Add(-1) }

// Count counts a decision.
func (s *Service) Count(d Decision) {
	if s != nil {
		s.Counts.Count(d)
	}
}

// RequestOf is what p allows a request.
func RequestOf(p *assay.TrafficPolicy) *Request {
	r := &Request{Timeout: p.Timeout, TryTimeout: p.TryTimeout, Retry: Retry{
		Attempts: p.Retry.Attempts, Codes: p.Retry.Codes, Backoff: p.Retry.Backoff, Repeatable: p.Retry.Repeatable,
	}}
	if r.Timeout == 0 && r.TryTimeout == 0 && r.Retry.isZero() {
		return nil
	}
	return r
}

// Inbound protects one port of a workload from its clients.
type Inbound struct {
	Counts  *Counts // may be nil
	Limiter Limiter
	rate    RateLimit
	conns   atomic.Int64
	most    atomic.Int64
}

// Verdict is what becomes of a request where its server is.
type Verdict uint8

const (
	Admitted   Verdict = iota
	Overloaded         // more than the application can do; another endpoint may have room
	TooFast            // over its rate; it may come again later
)

// Set changes the rules, which must have their defaults.
func (in *Inbound) Set(p *assay.InboundPolicy) {
	in.Limiter.Set(*p)
	in.rate.Set(p.RateLimit, p.RateBurst)
	in.most.Store(int64(max(p.MaxConnections, 0)))
}

// Admit decides on a request before anything of it reaches the application. What is
// Admitted must be given back with Limiter.Done.
func (in *Inbound) Admit(now time.Duration) Verdict {
	if !in.rate.Take(now) {
		in.Counts.Count(RateLimited)
		return TooFast
	}
	if !in.Limiter.Admit(now) {
		in.Counts.Count(Shed)
		return Overloaded
	}
	return Admitted
}

// Connect counts in a connection of an opaque protocol, if there is room. Disconnect
// counts it out.
func (in *Inbound) Connect() bool {
	most := in.most.Load()
	if n := in.conns.Add(1); most > 0 && n > most {
		in.conns.Add(-1)
		in.Counts.Count(TooManyAtOnce)
		return false
	}
	return true
}

// Disconnect undoes a Connect.
func (in *Inbound) Disconnect() { in.conns.Add(-1) }
