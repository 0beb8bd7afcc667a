package proxy

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"assay.dev"
)

// A connection in plaintext is served or refused when it begins. What was served before the
// namespace was strict goes on for a time then, which its people set, and is ended: strict says
// that there is no plaintext. What is beside the proxy is the agent's to end.

const (
	// olderGrace is what an agent that says nothing means.
	olderGrace = 10 * time.Minute
	// olderEvery is how often they are looked at when much changes.
	olderEvery = time.Second
	// olderNamed is how many of them a finding names.
	olderNamed = 5
)

// guestList are the connections in plaintext that were let in, and since when they would not be.
type guestList struct {
	mu   sync.Mutex
	m    map[*inbound]time.Time
	wake chan struct{} // something may have changed for one of them
}

func newGuestList() guestList {
	return guestList{m: map[*inbound]time.Time{}, wake: make(chan struct{}, 1)}
}

// letIn notes that a connection in plaintext is served, which leave ends.
func (i *inbound) letIn() {
	l := &i.p.guestList
	l.mu.Lock()
	if _, there := l.m[i]; !there {
		l.m[i] = time.Time{}
	}
	l.mu.Unlock()
	if i.p.snap.Load() != i.snap {
		l.changed() // since it was decided
	}
}

func (i *inbound) leave() {
	l := &i.p.guestList
	l.mu.Lock()
	delete(l.m, i)
	l.mu.Unlock()
}

// changed has the connections looked at.
func (l *guestList) changed() {
	l.mu.Lock()
	some := len(l.m) > 0
	l.mu.Unlock()
	if !some {
		return
	}
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// welcome reports whether a connection in plaintext that was let in would be still. Who is in
// the mesh by now is no matter of this: it came before.
func (i *inbound) welcome(s *snapshot) bool {
	if s.mode() == assay.Observe {
		return true
	}
	_, meshed := s.table.Lookup(i.remote.Addr())
	return s.Transition && (meshed || s.stranger(i.remote.Addr()))
}

// limitGuests ends connections in plaintext whose time is over, until ctx ends.
func (p *Proxy) limitGuests(ctx context.Context) {
	due := time.NewTimer(time.Hour)
	defer due.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.guestList.wake:
		case <-due.C:
		}
		next := p.reviewGuests(p.snap.Load(), time.Now())
		due.Reset(max(next, olderEvery))
		select {
		case <-ctx.Done():
			return
		case <-time.After(olderEvery):
		}
	}
}

// reviewGuests looks at them all, and returns how long it may be until the next one is over.
func (p *Proxy) reviewGuests(s *snapshot, now time.Time) (next time.Duration) {
	grace := s.OlderGrace
	if grace == 0 {
		grace = olderGrace
	}
	next = time.Hour
	var told, over []*inbound
	l := &p.guestList
	l.mu.Lock()
	for i, since := range l.m {
		switch {
		case i.welcome(s):
			l.m[i] = time.Time{}
			continue
		case since.IsZero():
			since = now
			l.m[i] = now
			told = append(told, i)
		case now.Sub(since) >= grace:
			delete(l.m, i)
			over = append(over, i)
			continue
		}
		next = min(next, since.Add(grace).Sub(now))
	}
	l.mu.Unlock()
	for _, i := range over {
		p.rec.Refusals.Inc(refusedOlder)
		abort(i.conn)
	}
	namespace := s.Identity.Namespace
	p.tellGuests("older-plaintext", told, fmt.Sprintf("of before namespace %s was strict; they are closed at %s", namespace, now.Add(grace).UTC().Format(time.RFC3339)),
		"restart their clients, or have them join the mesh, at a time that suits")
	p.tellGuests("older-plaintext-closed", over, fmt.Sprintf("were closed: namespace %s has been strict for %s", namespace, grace), "")
	return next
}

// tellGuests makes a finding of connections, if there are any.
func (p *Proxy) tellGuests(kind string, list []*inbound, what, remedy string) {
	if len(list) == 0 {
		return
	}
	names := make([]string, 0, olderNamed+1)
	for _, i := range list[:min(len(list), olderNamed)] {
		names = append(names, i.remote.String()+" -> "+i.dst.String())
	}
	slices.Sort(names)
	if more := len(list) - len(names); more > 0 {
		names = append(names, fmt.Sprintf("%d more", more))
	}
	p.finding(kind, p.snap.Load().Workload, fmt.Sprintf("%d connections in plaintext %s (%s)", len(list), what, strings.Join(names, ", ")), remedy)
}
