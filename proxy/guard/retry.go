package guard

import (
	"math/rand/v2"
	"time"
)

// Cause says why an attempt came to nothing.
type Cause uint8

const (
	Unread   Cause = iota + 1 // refused, provably before anybody read it
	Broken                    // the way there broke: it may have been acted upon
	TimedOut                  // there was no answer within TryTimeout
	Answered                  // with a status that is one to try again for
)

// Attempt is what is known of an attempt that came to nothing. All that was sent of
// the request is at hand, and nothing of a response has been passed on.
type Attempt struct {
	Number     int // 0 for the first
	Cause      Cause
	Status     int           // when Answered
	Idempotent bool          // by its method (RFC 9110 section 9.2.2)
	Expires    time.Duration // of the whole request; 0: never
}

// Retry decides whether a request may be sent again, and after which wait. It takes
// from the budget, and counts. A nil policy is the default one.
func (s *Service) Retry(p *Request, a Attempt, now time.Duration) (wait time.Duration, ok bool) {
	why := a.Cause.decision()
	harmless := a.Idempotent || p != nil && p.Retry.Repeatable
	switch a.Cause {
	case Unread:
		harmless = true
	case Broken, TimedOut:
	case Answered:
		harmless = harmless && p.HasCode(a.Status)
	default:
		return 0, false
	}
	if !harmless || p.retries() == 0 {
		return 0, false
	}
	if a.Number >= p.retries() {
		s.Count(RetryLimit)
		return 0, false
	}
	wait = p.backoff(a)
	if a.Expires > 0 && now+wait >= a.Expires {
		return 0, false // it could not be answered in time
	}
	if s != nil && !s.Budget.Take(now) {
		s.Count(RetryBudget)
		return 0, false
	}
	s.Count(why)
	return wait, true
}

// GiveBack undoes a Retry that found nobody to try.
func (s *Service) GiveBack(c Cause) {
	if s != nil {
		s.Budget.giveBack()
		s.Counts.takeBack(c.decision())
	}
}

func (c Cause) decision() Decision {
	switch c {
	case Broken:
		return RetryBroken
	case TimedOut:
		return RetryTimeout
	case Answered:
		return RetryStatus
	}
	return RetryUnread
}

func (p *Request) backoff(a Attempt) time.Duration {
	least := DefaultBackoff
	if p != nil && p.Retry.Backoff > 0 {
		least = p.Retry.Backoff
	} else if a.Cause == Unread && a.Number == 0 {
		return 0 // another endpoint has not been asked yet
	}
	d := least
	for range a.Number {
		d = min(2*d, maxBackoff*least)
	}
	return d + time.Duration(rand.Int64N(int64(d)/2+1))
}
