package control

import "time"

// leases decides when the workloads of a host whose stream is down stop being ready. It
// is pure: what it knows it is told, the time too.
//
// One host that is away is a dead host. When more than half of them go at once it is
// control that is cut off, or all agents fell for the same fault: traffic goes on
// without control, and to call every endpoint dead would end it. Then nobody's lease
// ends, until at most half are away; those get a whole lease from that moment, since
// they may be on their way back like the others.
type leases struct {
	life  time.Duration
	panic bool
	calm  time.Time // when panic ended last
}

// lease is what is known of one host.
type lease struct {
	id        string
	connected bool
	away      time.Time // since when, if not connected
	lost      bool      // its lease has ended before
	idle      bool      // it has no workloads
}

// expire returns the hosts whose lease ends now. Hosts that were lost before count no
// more: who goes one after the other is not gone at once. Nor do hosts without
// workloads, unless they are there.
func (l *leases) expire(hosts []lease, now time.Time) (lost []string) {
	present, away, due := 0, 0, false
	for _, h := range hosts {
		switch {
		case h.connected:
			present++
		case !h.lost && !h.idle:
			present++
			away++
			due = due || l.over(h, now)
		}
	}
	switch most := 2*away > present; {
	case most && due:
		l.panic = true
	case l.panic && !most:
		l.panic, l.calm = false, now
	}
	if l.panic {
		return nil
	}
	for _, h := range hosts {
		if !h.connected && !h.lost && l.over(h, now) {
			lost = append(lost, h.id)
		}
	}
	return lost
}

func (l *leases) over(h lease, now time.Time) bool {
	since := h.away
	if l.calm.After(since) {
		since = l.calm
	}
	return now.Sub(since) >= l.life
}
