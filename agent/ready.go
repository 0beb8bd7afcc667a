package agent

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"assay.dev/agent/internal/sockdiag"
)

// Listening sockets are asked for often while something changes and seldom when
// nothing does. What a workload declares and does not listen on may come late, or never: it
// is found after at most a twentieth of the time that it took.
const (
	readyFast = 200 * time.Millisecond
	readySlow = 2 * time.Second
	// verifyEvery is how often the capture's routes and settings are read back, verifyWhole how
	// often its rules are, too, and verifySoon how soon when somebody has changed rules.
	verifyEvery = 30 * time.Second
	verifyWhole = 5 * time.Minute
	verifySoon  = 2 * time.Second
	// endsWithin is how long a pod's lo may be down before that is somebody's doing: a runtime
	// that ends a pod begins with that link, which takes the routes along.
	endsWithin = 10 * time.Second
)

// listening returns the ports on which a connection to one of addrs would be
// accepted, in order. A socket bound to loopback alone is nobody's endpoint.
func listening(sockets *sockdiag.Conn, addrs []netip.Addr, except []uint16) ([]uint16, error) {
	var ports []uint16
	for _, family := range sockdiag.Families {
		err := sockets.List(family, 1<<sockdiag.Listen, func(s *sockdiag.Socket) {
			a := s.Local.Addr()
			if (a.IsUnspecified() || slices.Contains(addrs, a)) && !slices.Contains(except, s.Local.Port()) {
				ports = append(ports, s.Local.Port())
			}
		})
		if err != nil {
			return nil, err
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports), nil
}

// watchReadiness keeps Listening and the executable's digest what the kernel says,
// and looks after the capture rules.
func (w *workload) watchReadiness(ctx context.Context) {
	sockets, err := sockdiag.Open(w.ns)
	if err != nil {
		w.log.Error("readiness cannot be watched", "err", err)
		return
	}
	defer sockets.Close()
	wait, rules, still := readyFast, verifying{at: time.Now()}, time.Now()
	for {
		changed := w.checkArtifacts()
		ports, err := listening(sockets, w.addrs, w.ownPorts())
		if err != nil {
			w.log.Error("readiness", "err", err)
		} else if w.setListening(ports) {
			changed = true
		}
		w.lookAtCapture(&rules)
		wait = min(wait*3/2, readySlow)
		if changed {
			wait, still = readyFast, time.Now()
		} else if !w.allListening() {
			wait = min(max(time.Since(still)/20, readyFast), readySlow)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		case <-w.lookNow:
		}
	}
}
