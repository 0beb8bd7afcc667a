package guard

import "sync/atomic"

// Decision names what was decided. The names are stable: they are a metric's labels.
type Decision uint8

const (
	RetryUnread  Decision = iota // sent again: nobody had read it
	RetryBroken                  // sent again: idempotent, and the way broke
	RetryTimeout                 // sent again: no answer within the try's time
	RetryStatus                  // sent again: a status to try again for
	RetryLimit                   // not sent again: too often already
	RetryBudget                  // not sent again: the service's budget is spent
	Timeout                      // ended: the request's time is over
	TryTimeout                   // ended: the last try's time is over
	decisions
)

var decisionNames = [decisions]string{
	RetryUnread: "retry-unread", RetryBroken: "retry-broken", RetryTimeout: "retry-timeout", RetryStatus: "retry-status",
	RetryLimit: "retry-limit", RetryBudget: "retry-budget", Timeout: "timeout", TryTimeout: "try-timeout",
}

func (d Decision) String() string { return decisionNames[d] }

// Service is what the requests of one client to one port of a service share. A nil
// Service has no budget and counts nothing.
type Service struct {
	Budget Budget
	counts [decisions]atomic.Uint64
}

func (s *Service) count(d Decision) {
	if s != nil {
		s.counts[d].Add(1)
	}
}

// Count counts a decision that an engine took by itself.
func (s *Service) Count(d Decision) { s.count(d) }

// Counts calls f with each decision that was ever taken.
func (s *Service) Counts(f func(name string, n uint64)) {
	for d := range s.counts {
		if n := s.counts[d].Load(); n > 0 {
			f(Decision(d).String(), n)
		}
	}
}
