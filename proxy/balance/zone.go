package balance

import (
	"math/rand/v2"
	"time"

	"assay.dev/proxy/guard"
)

// farther is how much better one in another zone must be: its way is longer and often
// paid for, and what it took to answer shows the way alone.
const farther = 4

// suffice is the share of near endpoints that must be fit for all requests to stay
// near; what is below it goes elsewhere in proportion. Spare capacity is seldom less
// than that.
const suffice = 0.7

// pickNear chooses where some endpoints are in the chooser's zone and some are not: a
// near one, unless that has so much more to do than a far one that the way is worth
// it. Load moves over as it grows, not at once.
func (s *Set) pickNear(now time.Time, busy bool) *Endpoint {
	near, far := s.list[:s.near], s.list[s.near:]
	if busy {
		if e := s.group.due(s.list, now, nil); e != nil {
			return e
		}
		fit := 0
		for _, e := range near {
			if !e.out.Load() {
				fit++
			}
		}
		if f := float64(fit) / float64(len(near)) / suffice; f < 1 && rand.Float64() > f {
			if e := s.group.careful(s, far, now); e != nil {
				s.group.Counts.Count(guard.Failover)
				return e
			}
		}
		a := s.group.careful(s, near, now)
		b := s.group.careful(s, far, now)
		if a == nil && b == nil {
			return s.whatever(now)
		}
		return s.nearer(a, b, stamp(now))
	}
	at := stamp(now)
	return s.nearer(pickOf(near, at), far[rand.IntN(len(far))], at)
}

func (s *Set) nearer(a, b *Endpoint, at uint32) *Endpoint {
	switch {
	case b == nil:
		return a
	case a != nil && a.load(at) <= farther*b.load(at):
		return a
	}
	if s.group != nil {
		s.group.Counts.Count(guard.Failover)
	}
	return b
}
