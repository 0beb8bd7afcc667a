package agent

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"assay.dev"
	"assay.dev/agent/meter"
)

// Connections that a pod had when it was captured go on as they were, in plaintext and
// beside its proxy. They are listed. In a namespace that is strict they have some time
// to end by themselves, and are then closed: what opens them anew goes through the proxy.

const (
	// olderEvery is how often it is looked which ones there still are, until there are none.
	olderEvery = 2 * time.Second
	// olderNamed is how many of them a finding names.
	olderNamed = 5
)

// olderConnections is what is known of a workload's.
type olderConnections struct {
	left   int       // that there were when it was looked last
	none   int       // it is clear that there are none since the meter was installed so many times
	looked time.Time // at them
	strict time.Time // since when the namespace is strict, as far as this agent knows
	failed bool      // the kernel does not end them
}

// lookAtOlder lists them, and closes them when their time is over.
func (w *workload) lookAtOlder(now time.Time) {
	b := w.beside
	b.mu.Lock()
	o, installs := b.older, b.installs
	b.mu.Unlock()
	if o.none == installs || now.Sub(o.looked) < olderEvery || w.leaving.is() {
		return
	}
	w.mu.Lock()
	outbound, inbound := w.rec.Outbound, w.rec.Inbound
	w.mu.Unlock()
	list, unclear, err := b.meter.OlderConnections(outbound, inbound)
	if err != nil {
		w.log.Debug("connections older than the capture", "err", err) // its namespace is going
		return
	}
	o.looked, o.left = now, len(list)
	if len(list)+unclear == 0 {
		o.none = installs
	}
	switch w.a.view.Load().config(w.noun().Namespace).Mode {
	case assay.Strict:
		o = w.limitOlder(o, list, now)
	default:
		o.strict = time.Time{}
	}
	b.mu.Lock()
	b.older = o
	b.mu.Unlock()
}

// limitOlder tells of those of a strict namespace once, and closes them when their time is
// over.
func (w *workload) limitOlder(o olderConnections, list []meter.OlderConnection, now time.Time) olderConnections {
	grace := w.a.cfg.OlderGrace
	switch {
	case len(list) == 0 || o.failed:
	case o.strict.IsZero():
		o.strict = now
		w.tellOlder("older-connections", list, fmt.Sprintf("of before the capture, beside its proxy; they are closed at %s", now.Add(grace).UTC().Format(time.RFC3339)),
			"restart the pod, or who is connected with it, at a time that suits")
	case now.Sub(o.strict) >= grace:
		if err := w.beside.meter.End(list); err != nil {
			o.failed = true
			w.log.Error("connections older than the capture cannot be closed", "err", err)
			w.tellOlder("older-connections", list, "of before the capture, beside its proxy; the kernel does not close them: "+err.Error(), "restart the pod, or who is connected with it")
			break
		}
		w.log.Info("connections older than the capture are closed", "connections", len(list))
		w.tellOlder("older-connections-closed", list, fmt.Sprintf("of before the capture were closed: the namespace has been strict for %s", grace), "")
	}
	return o
}

// olderLeft is how many there are.
func (w *workload) olderLeft() int {
	w.beside.mu.Lock()
	defer w.beside.mu.Unlock()
	return w.beside.older.left
}

// tellOlder makes a finding of connections.
func (w *workload) tellOlder(kind string, list []meter.OlderConnection, what, remedy string) {
	var names []string
	for _, c := range list[:min(len(list), olderNamed)] {
		from, to := c.Local, c.Remote
		if c.Inbound {
			from, to = to, from
		}
		names = append(names, from.String()+" -> "+to.String())
	}
	slices.Sort(names)
	if more := len(list) - len(names); more > 0 {
		names = append(names, fmt.Sprintf("%d more", more))
	}
	w.a.outbox.finding(&assay.Finding{
		Time: time.Now(), Workload: w.id, Kind: kind, Subject: w.id, Detail: fmt.Sprintf("%d connections %s (%s)", len(list), what, strings.Join(names, ", ")), Remedy: remedy,
	})
}
