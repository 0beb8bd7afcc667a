package http2

import "time"

// flood counts, for each second, what costs us work and its sender next to nothing. What
// the exchange of data explains is allowed on top: gRPC measures bandwidth with a PING for
// each burst of data, and every reader opens its windows as it reads.
type flood struct {
	second  time.Duration
	counts  [floodKinds]int
	carried int // exchanges completed and DATA frames, both ways, in this second
}

const (
	floodReset = iota
	floodPing
	floodSettings
	floodPriority
	floodEmpty
	floodWindow
	floodUnknown
	floodMalformed
	floodKinds
)

// floodLimits are counts for each second, and how many more each thing carried allows.
var floodLimits = [floodKinds]struct {
	base, more int
	refusal    *Refusal
}{
	floodReset:     {1000, 1, ErrRapidReset},
	floodPing:      {100, 1, ErrPingFlood},
	floodSettings:  {50, 0, ErrSettingsFlood},
	floodPriority:  {1000, 2, ErrPriorityFlood},
	floodEmpty:     {200, 0, ErrEmptyFlood},
	floodWindow:    {1000, 4, ErrDribble},
	floodUnknown:   {200, 1, ErrUnknownFlood},
	floodMalformed: {1000, 0, ErrMalformFlood},
}

// count notes one thing of a kind and reports the refusal when it is one too many.
func (f *flood) count(what int) *Refusal {
	f.counts[what]++
	l := &floodLimits[what]
	if f.counts[what] <= l.base {
		return nil
	}
	if s := now() / time.Second; s != f.second {
		*f = flood{second: s}
		f.counts[what] = 1
		return nil
	}
	if f.counts[what] <= l.base+l.more*f.carried {
		return nil
	}
	return l.refusal
}
