package agent

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/agent/capture"
	"assay.dev/agent/meter"
	"assay.dev/agent/netns"
)

// maxBeside bounds the series of what passes beside one workload's proxy. What finds
// no place is counted under assay.Overflow.
const maxBeside = 256

// beside is what passes a workload's link and not its proxy: listed as exceptions and
// held against the link's own counters. The kernel counts; here the counts become
// series with the peer's identity.
type beside struct {
	meter *meter.Meter

	mu        sync.Mutex
	since     time.Time // when the meter began
	problem   string
	installed meter.Config
	installs  int           // of the meter
	link      meter.Traffic // when it was read last
	read      time.Time     // that was
	was       map[meter.FlowKey]meter.Flow
	series    map[assay.SignalKey]*assay.Signals
	balance   *assay.Balance
	older     olderConnections
}

func newBeside(ns *netns.Namespace, since time.Time) *beside {
	return &beside{meter: meter.New(ns), since: since, was: map[meter.FlowKey]meter.Flow{}, series: map[assay.SignalKey]*assay.Signals{}}
}

// link is the name of the workload's link in its namespace.
func (w *workload) link() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.rec.Given != nil {
		return w.rec.Given.Link
	}
	return netns.Interface
}

// linkTraffic reads the host's end of the workload's link; of a pod's, its own end.
func (w *workload) linkTraffic() (meter.Traffic, error) {
	if w.given {
		l, err := w.ns.Traffic(w.link())
		return meter.Traffic{In: meter.Count{Packets: l.InPackets, Bytes: l.InBytes}, Out: meter.Count{Packets: l.OutPackets, Bytes: l.OutBytes}}, err
	}
	host := w.a.hostNetwork()
	if host == nil {
		return meter.Traffic{}, fmt.Errorf("this host has no network")
	}
	w.mu.Lock()
	port := w.rec.Port
	w.mu.Unlock()
	l, err := host.Traffic(port)
	return meter.Traffic{In: meter.Count{Packets: l.InPackets, Bytes: l.InBytes}, Out: meter.Count{Packets: l.OutPackets, Bytes: l.OutBytes}}, err
}

// installRules writes the capture's rules and the meter's. A port that is no longer
// excluded, or not yet, is excluded for the meter while the two change: nothing that
// was allowed to pass is taken for an escape.
func (w *workload) installRules(r capture.Rules, open map[netip.AddrPort]bool) error {
	b := w.beside
	b.mu.Lock()
	was := b.installed
	b.mu.Unlock()
	if was.Link != "" && !slices.Equal(was.Excluded, r.Excluded) {
		w.installMeter(r.OwnMark, union(was.Excluded, r.Excluded))
	}
	if err := w.capture.Install(r, open); err != nil {
		return err
	}
	w.installMeter(r.OwnMark, r.Excluded)
	return nil
}

func union(a, b []uint16) []uint16 {
	all := slices.Concat(a, b)
	slices.Sort(all)
	return slices.Compact(all)
}

// installMeter begins to count, or goes on with other settings. A kernel that cannot
// count is no reason not to run: it is told with the balance.
func (w *workload) installMeter(mark uint32, excluded []uint16) {
	b := w.beside
	cfg := meter.Config{Link: w.link(), OwnMark: mark, Excluded: slices.Clone(excluded)}
	err := b.meter.Install(cfg, w.linkTraffic)
	b.mu.Lock()
	defer b.mu.Unlock()
	if err != nil {
		if b.problem == "" {
			w.log.Error("traffic beside the proxy is not counted", "err", err)
		}
		b.problem = err.Error()
		return
	}
	b.installed, b.problem = cfg, ""
	b.installs++
}

// besideEvery is how often the meter of a busy link is read: half a millisecond each.
const besideEvery = 2 * time.Second

// countBeside reads the meter when something passed the link since it did last, at
// most every interval. It reports whether there is anything new to tell.
func (w *workload) countBeside(interval time.Duration) bool {
	b := w.beside
	b.mu.Lock()
	early := time.Since(b.read) < interval
	b.mu.Unlock()
	if early {
		return false
	}
	before, err := w.linkTraffic()
	b.mu.Lock()
	quiet := err == nil && b.balance != nil && b.balance.Problem == b.problem && before == b.link
	off := b.installed.Link == ""
	b.mu.Unlock()
	if quiet {
		return false
	}
	var r *meter.Reading
	if err == nil && !off {
		r, err = b.meter.Read()
	}
	after, lateErr := w.linkTraffic()
	err = cmp.Or(err, lateErr)
	b.mu.Lock()
	defer b.mu.Unlock()
	if err != nil || r == nil {
		problem := b.problem
		if err != nil {
			problem = err.Error()
		}
		news := b.balance == nil || b.balance.Problem != problem
		last := assay.Balance{Since: b.since}
		if b.balance != nil {
			last = *b.balance
		}
		last.Problem = problem
		b.balance = &last
		return news
	}
	b.take(r, w.a.publisher.owners, time.Now())
	b.balance, b.link = balanceOf(r, before, after), before
	b.balance.Since, b.balance.Problem, b.read = b.since, b.problem, time.Now()
	return true
}

// take adds what flows have more than they had.
func (b *beside) take(r *meter.Reading, of *owners, now time.Time) {
	was := b.was
	b.was = make(map[meter.FlowKey]meter.Flow, len(r.Flows))
	for _, f := range r.Flows {
		last := b.was[f.FlowKey] // the other way of the same flow, when there is
		last.FlowKey, last.In, last.Out = f.FlowKey, sum(last.In, f.In), sum(last.Out, f.Out)
		b.was[f.FlowKey] = last
	}
	listed := map[string]meter.Traffic{}
	for key, f := range b.was {
		old := was[key]
		if f.In.Packets < old.In.Packets || f.Out.Packets < old.Out.Packets {
			old = meter.Flow{} // forgotten by the kernel, and here again
		}
		in, out := less(f.In, old.In), less(f.Out, old.Out)
		if in.Packets+out.Packets == 0 {
			continue
		}
		b.of(flowSeries(key, of), now).add(in, out, now)
	}
	for key, s := range b.series {
		if key.Remote != assay.Overflow {
			t := listed[key.Reason]
			t.In = sum(t.In, meter.Count{Packets: s.PacketsIn, Bytes: s.BytesIn})
			t.Out = sum(t.Out, meter.Count{Packets: s.PacketsOut, Bytes: s.BytesOut})
			listed[key.Reason] = t
		}
	}
	// What is in a class's total and in no flow: there was no room, or the kernel forgot
	// it while nobody read.
	for class, total := range r.Exceptions {
		in, out := less(total.In, listed[string(class)].In), less(total.Out, listed[string(class)].Out)
		if in.Packets+out.Packets == 0 {
			continue
		}
		key := assay.SignalKey{Direction: assay.Outbound, Protocol: protocolOf(class), Security: assay.Plaintext, Reason: string(class), Remote: assay.Overflow}
		s := b.series[key]
		if s == nil {
			s = &assay.Signals{SignalKey: key, FirstSeen: now}
			b.series[key] = s
		}
		if in.Packets > s.PacketsIn || out.Packets > s.PacketsOut {
			s.LastSeen = now
		}
		s.PacketsIn, s.BytesIn = max(s.PacketsIn, in.Packets), max(s.BytesIn, in.Bytes)
		s.PacketsOut, s.BytesOut = max(s.PacketsOut, out.Packets), max(s.BytesOut, out.Bytes)
	}
}

func sum(a, b meter.Count) meter.Count {
	return meter.Count{Packets: a.Packets + b.Packets, Bytes: a.Bytes + b.Bytes}
}

func less(a, b meter.Count) meter.Count {
	return meter.Count{Packets: a.Packets - min(a.Packets, b.Packets), Bytes: a.Bytes - min(a.Bytes, b.Bytes)}
}

// tally adds to a series that has a place of its own.
type tally struct{ *assay.Signals }

func (t tally) add(in, out meter.Count, now time.Time) {
	if t.Signals == nil {
		return // it shows in the class's total
	}
	t.PacketsIn += in.Packets
	t.PacketsOut += out.Packets
	t.BytesIn += in.Bytes
	t.BytesOut += out.Bytes
	t.LastSeen = now
}

// of returns the series of key; none when there is no room.
func (b *beside) of(key assay.SignalKey, now time.Time) tally {
	s := b.series[key]
	if s == nil && len(b.series) < maxBeside {
		s = &assay.Signals{SignalKey: key, FirstSeen: now}
		b.series[key] = s
	}
	return tally{s}
}

// flowSeries is what a flow is counted under. An address of the mesh is its workload.
func flowSeries(f meter.FlowKey, of *owners) assay.SignalKey {
	key := assay.SignalKey{Direction: assay.Outbound, Port: f.Port, Protocol: protocolOf(f.Class), Security: assay.Plaintext, Reason: string(f.Class)}
	if f.Inbound {
		key.Direction = assay.Inbound
	}
	if peer := of.owner(f.Remote); peer != nil {
		key.Peer, key.PeerArtifacts = peer.Identity, peer.Artifacts.Digest()
	} else {
		key.Remote = f.Remote.String()
	}
	if f.Class == meter.IP {
		key.Remote = fmt.Sprintf("%s protocol %d", f.Remote, f.Protocol)
	}
	return key
}

func protocolOf(c meter.Class) assay.Protocol {
	switch c {
	case meter.UDP:
		return assay.UDP
	case meter.UDPLite:
		return assay.UDPLite
	case meter.SCTP:
		return assay.SCTP
	case meter.DCCP:
		return assay.DCCP
	case meter.ICMP:
		return assay.ICMP
	case meter.IP:
		return assay.OtherIP
	}
	return assay.Opaque
}

// balanceOf is a reading between two looks at the link.
func balanceOf(r *meter.Reading, before, after meter.Traffic) *assay.Balance {
	in, out := r.Unexplained(before, after)
	way := func(of func(meter.Traffic) meter.Count, unexplained int64) assay.BalanceWay {
		count := func(c meter.Count) assay.FrameCount { return assay.FrameCount(c) }
		bw := assay.BalanceWay{Link: count(less(of(after), of(r.Before))), Proxy: count(of(r.Proxy)), Control: map[string]assay.FrameCount{}, Unexplained: unexplained}
		for _, t := range r.Exceptions {
			bw.Exceptions = count(sum(meter.Count(bw.Exceptions), of(t)))
		}
		for name, t := range r.Control {
			if c := of(t); c.Packets > 0 {
				bw.Control[name] = count(c)
			}
		}
		return bw
	}
	return &assay.Balance{
		In:  way(func(t meter.Traffic) meter.Count { return t.In }, in),
		Out: way(func(t meter.Traffic) meter.Count { return t.Out }, out),
	}
}

// exceptions returns copies of the series and the balance.
func (w *workload) exceptions() ([]assay.Signals, *assay.Balance) {
	b := w.beside
	b.mu.Lock()
	defer b.mu.Unlock()
	var list []assay.Signals
	for _, s := range slices.SortedFunc(maps.Values(b.series), func(x, y *assay.Signals) int { return x.FirstSeen.Compare(y.FirstSeen) }) {
		list = append(list, *s)
	}
	return list, b.balance
}
