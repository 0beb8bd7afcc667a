package demo

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"assay.dev"
	"assay.dev/demo/wire"
)

// Verdict is one line of the summary.
type Verdict struct {
	Check  string
	OK     bool
	Detail string
}

// Bounds that the check holds the mesh to.
const (
	readyWithin     = 3 * time.Second
	firstByteWithin = 20.0 // milliseconds over direct, on a workload's first connection
	laterByteWithin = 5.0  // and on later ones, in the median
)

// judge decides. It is a pure function of the evidence; what is not there is not ok.
func judge(ev *evidence) []Verdict {
	var list []Verdict
	add := func(check string, wrong []string, ok string) {
		v := Verdict{Check: check, OK: len(wrong) == 0, Detail: ok}
		if !v.OK {
			v.Detail = some(wrong)
		}
		list = append(list, v)
	}
	add("ready in time", ev.checkReady(), fmt.Sprintf("up in %s; slowest workload in %s", short(ev.ready), short(ev.meshed)))
	add("every service is meshed", ev.checkMembers(), fmt.Sprintf("%d workloads", len(ev.members)))
	add("every expected edge", ev.checkWanted(), fmt.Sprintf("%d edges, counted at both ends", len(wanted)))
	add("no other edge", ev.checkUnwanted(), "nobody talks to whom it should not")
	add("mutual TLS on every edge", ev.checkSecurity(), "from workload to workload, no exception")
	add("artifacts at both ends", ev.checkArtifacts(), "every end ran "+ev.artifact.Short())
	add("identities, as a peer sees them", ev.checkPresented(), fmt.Sprintf("%d certificates read from the workloads", len(ev.presented)))
	add("no request failed", ev.checkLoads(), ev.loadDetail())
	add("nothing readable on the links", ev.checkClear(), fmt.Sprintf("%d packets, %d connections", ev.wire.Packets, len(ev.wire.Conns)))
	add("TLS 1.3 seen on the links", ev.checkRecords(), "application data in both directions of every edge")
	add("server speaks first", ev.checkFirst(), ev.firstDetail())
	add("strict refuses plaintext", ev.checkStrict(), ev.refusal())
	add("observe serves and lists it", ev.checkObserve(), "plaintext to "+web.String()+" is an exception with a reason")
	add("an interpreter proves nothing", ev.checkScript(), ev.script.Artifacts.Unproven())
	add("control and agent killed", ev.checkOutage(), fmt.Sprintf("%s without them; %d proxies adopted after", short(ev.outage.length), len(ev.outage.before)))
	add("nothing left behind", ev.left, "no link, no process")
	return list
}

// some joins what is wrong, the first few.
func some(wrong []string) string {
	const most = 4
	if n := len(wrong); n > most {
		return fmt.Sprintf("%s; and %d more", strings.Join(wrong[:most], "; "), n-most)
	}
	return strings.Join(wrong, "; ")
}

func short(d time.Duration) string {
	if d < time.Second {
		return d.Round(time.Millisecond).String()
	}
	return d.Round(10 * time.Millisecond).String()
}

func (ev *evidence) checkReady() (wrong []string) {
	if ev.ready <= 0 || ev.ready > readyWithin {
		wrong = append(wrong, fmt.Sprintf("up was ready after %s, want less than %s", short(ev.ready), readyWithin))
	}
	return wrong
}

func (ev *evidence) checkMembers() (wrong []string) {
	count := map[name]int{}
	for i := range ev.members {
		if !ev.members[i].MeshedSince.IsZero() {
			count[nameOf(ev.members[i].Identity)]++
		}
	}
	for _, m := range cast {
		if got := count[name{m.namespace, m.name}]; got != m.replicas {
			wrong = append(wrong, fmt.Sprintf("%s/%s: %d of %d", m.namespace, m.name, got, m.replicas))
		}
	}
	return wrong
}

// inMesh reports whether an edge has workloads at both ends.
func inMesh(e *assay.Edge) bool { return !e.Client.Identity.IsZero() && !e.Server.Identity.IsZero() }

func edgeName(e *assay.Edge) string {
	client, server := "outside", "outside"
	if !e.Client.Identity.IsZero() {
		client = nameOf(e.Client.Identity).String()
	}
	if !e.Server.Identity.IsZero() {
		server = nameOf(e.Server.Identity).String()
	}
	return fmt.Sprintf("%s -> %s:%d", client, server, e.Port)
}

func (ev *evidence) match(e *assay.Edge, w want) bool {
	return inMesh(e) && nameOf(e.Client.Identity) == w.client && nameOf(e.Server.Identity) == w.server && e.Port == w.port &&
		e.Client.Identity.TrustDomain == ev.trustDomain && e.Server.Identity.TrustDomain == ev.trustDomain
}

func (ev *evidence) checkWanted() (wrong []string) {
	for _, w := range wanted {
		seen := map[assay.Direction]bool{}
		requests := uint64(0)
		for i := range ev.edges {
			if e := &ev.edges[i]; ev.match(e, w) {
				requests += e.Requests + uint64(max(e.Open, 0))
				for _, d := range e.SeenBy {
					seen[d] = true
				}
			}
		}
		label := fmt.Sprintf("%s -> %s:%d", w.client, w.server, w.port)
		switch {
		case len(seen) == 0:
			wrong = append(wrong, label+" is missing")
		case requests == 0:
			wrong = append(wrong, label+" carried nothing")
		case !seen[assay.Outbound]:
			wrong = append(wrong, label+" was not counted by the client's proxy")
		case !seen[assay.Inbound]:
			wrong = append(wrong, label+" was not counted by the server's proxy")
		}
	}
	return wrong
}

// checkUnwanted allows, besides the wanted edges, what we did from outside: plaintext
// to web, and what was refused (plaintext to payments, and reading certificates
// without having one).
func (ev *evidence) checkUnwanted() (wrong []string) {
	for i := range ev.edges {
		e := &ev.edges[i]
		if slices.ContainsFunc(wanted, func(w want) bool { return ev.match(e, w) }) {
			continue
		}
		if e.Client.Identity.IsZero() && (nameOf(e.Server.Identity) == web || e.Failures == e.Requests) {
			continue
		}
		wrong = append(wrong, edgeName(e))
	}
	return wrong
}

func (ev *evidence) checkSecurity() (wrong []string) {
	n := 0
	for i := range ev.edges {
		e := &ev.edges[i]
		if !inMesh(e) {
			continue
		}
		n++
		if e.Security != assay.MutualTLS {
			wrong = append(wrong, fmt.Sprintf("%s is %s: %s", edgeName(e), e.Security, cmp.Or(e.Reason, "no reason given")))
		}
	}
	if n == 0 {
		wrong = append(wrong, "there is no edge")
	}
	return wrong
}

func (ev *evidence) checkArtifacts() (wrong []string) {
	n := 0
	for i := range ev.edges {
		e := &ev.edges[i]
		if !inMesh(e) {
			continue
		}
		n++
		for _, p := range []assay.Party{e.Client, e.Server} {
			if p.Artifacts != ev.artifact {
				wrong = append(wrong, fmt.Sprintf("%s: %s shows %s, its binary is %s", edgeName(e), nameOf(p.Identity),
					cmp.Or(p.Artifacts.Short(), "none"), ev.artifact.Short()))
			}
		}
	}
	if n == 0 || ev.artifact == "" {
		wrong = append(wrong, "there is no edge")
	}
	return wrong
}

func (ev *evidence) checkPresented() (wrong []string) {
	for i := range ev.members {
		w := &ev.members[i]
		for _, port := range w.Ports {
			for _, a := range w.Addrs {
				at := netip.AddrPortFrom(a, port)
				p, ok := ev.presented[at]
				switch {
				case !ok:
					wrong = append(wrong, fmt.Sprintf("%s at %s was not asked", nameOf(w.Identity), at))
				case p.Err != nil:
					wrong = append(wrong, fmt.Sprintf("%s at %s: %v", nameOf(w.Identity), at, p.Err))
				case p.Identity != w.Identity:
					wrong = append(wrong, fmt.Sprintf("%s at %s shows %s", nameOf(w.Identity), at, p.Identity))
				case p.Artifacts != ev.artifact:
					wrong = append(wrong, fmt.Sprintf("%s at %s shows artifacts %s", nameOf(w.Identity), at, cmp.Or(p.Artifacts.Short(), "none")))
				}
			}
		}
	}
	if len(ev.presented) == 0 {
		wrong = append(wrong, "no certificate was read")
	}
	return wrong
}

func (ev *evidence) checkLoads() (wrong []string) {
	for _, l := range ev.loads {
		switch {
		case l.summary.Failures > 0:
			wrong = append(wrong, fmt.Sprintf("%s: %d of %d failed: %s", l.act, l.summary.Failures, l.summary.Requests, strings.Join(l.summary.Errors, ", ")))
		case l.err != nil:
			wrong = append(wrong, fmt.Sprintf("%s: %v", l.act, l.err))
		case l.summary.Requests == 0:
			wrong = append(wrong, l.act+": no request")
		}
	}
	if len(ev.loads) == 0 {
		wrong = append(wrong, "there was no load")
	}
	for i := range ev.edges {
		if e := &ev.edges[i]; inMesh(e) && e.Failures > 0 {
			wrong = append(wrong, fmt.Sprintf("%s: %d of %d failed", edgeName(e), e.Failures, e.Requests))
		}
	}
	return wrong
}

func (ev *evidence) loadDetail() string {
	var n, failed uint64
	worst := 0.0
	for _, l := range ev.loads {
		n += l.summary.Requests
		failed += l.summary.Failures
		worst = max(worst, l.summary.LatencyMS.P99)
	}
	if n == 0 {
		return ""
	}
	return fmt.Sprintf("%d requests, %.2f %% successful, p99 at worst %.0f ms", n, 100*float64(n-failed)/float64(n), worst)
}

// who says who lived at an address, "" for nobody of the mesh.
func (ev *evidence) who(a netip.Addr) string {
	set := ev.addresses[a.Unmap()]
	names := make([]string, 0, len(set))
	for n := range set {
		names = append(names, n.String())
	}
	slices.Sort(names)
	return strings.Join(names, " or ")
}

func (ev *evidence) checkClear() (wrong []string) {
	if ev.wire.Packets == 0 {
		wrong = append(wrong, "no packet was captured")
	}
	if n := ev.wire.Missed + ev.wire.Cut; n > 0 {
		wrong = append(wrong, fmt.Sprintf("%d packets were not seen whole", n))
	}
	if len(ev.wire.Other) > 0 {
		wrong = append(wrong, "payload in packets that are not TCP: "+strings.Join(ev.wire.Other, ", "))
	}
	for i := range ev.wire.Conns {
		c := &ev.wire.Conns[i]
		client, server := ev.who(c.Client.Addr()), ev.who(c.Server.Addr())
		_, ours := ev.gateway[c.Client.Addr().Unmap()]
		if ours && client == "" {
			// We ourselves, from outside: plaintext to web is served, to payments refused.
			if _, ok := ev.addresses[c.Server.Addr().Unmap()][payments]; ok && c.Clear() != "" && c.Down.Bytes > 0 {
				wrong = append(wrong, fmt.Sprintf("%s answered plaintext from outside", payments))
			}
			continue
		}
		label := fmt.Sprintf("%s %s -> %s %s", client, c.Client, server, c.Server)
		switch clear := c.Clear(); {
		case clear != "":
			wrong = append(wrong, label+": "+clear)
		case c.Incomplete:
			wrong = append(wrong, label+": not all of it was seen")
		case client == "" || server == "":
			wrong = append(wrong, label+": not between workloads")
		case c.Hello.Name != "":
			wrong = append(wrong, label+": the hello names "+c.Hello.Name)
		}
	}
	return wrong
}

const tls13 = 0x0304

func (ev *evidence) checkRecords() (wrong []string) {
	for _, w := range wanted {
		if !slices.ContainsFunc(ev.wire.Conns, func(c wire.Conn) bool {
			_, client := ev.addresses[c.Client.Addr().Unmap()][w.client]
			_, server := ev.addresses[c.Server.Addr().Unmap()][w.server]
			return client && server && c.Server.Port() == w.port && c.TLS() && c.Version == tls13 && slices.Equal(c.Hello.ALPN, []string{"assay/1"})
		}) {
			wrong = append(wrong, fmt.Sprintf("no TLS 1.3 with assay/1 from %s to %s:%d", w.client, w.server, w.port))
		}
	}
	return wrong
}

// checkFirst takes the best of the fresh workloads: a machine that is busy delays one
// of them, a wait that is built in delays all.
func (ev *evidence) checkFirst() (wrong []string) {
	for _, f := range ev.first {
		switch {
		case f.err != nil:
			wrong = append(wrong, f.err.Error())
		case len(f.Probed.MS) == 0 || len(f.Direct.MS) == 0:
			wrong = append(wrong, "nothing was measured")
		}
	}
	if len(ev.first) == 0 {
		wrong = append(wrong, "nobody listened")
	}
	if wrong != nil {
		return wrong
	}
	first, later := ev.firstBytes()
	if first > firstByteWithin {
		wrong = append(wrong, fmt.Sprintf("the first connection waits %.1f ms longer than a direct one for its first byte, want at most %v", first, firstByteWithin))
	}
	if later > laterByteWithin {
		wrong = append(wrong, fmt.Sprintf("later connections wait %.1f ms longer than direct ones, want at most %v", later, laterByteWithin))
	}
	return wrong
}

// firstBytes returns, in milliseconds over direct, the first byte of the best first
// connection and of the best median.
func (ev *evidence) firstBytes() (first, later float64) {
	for i, f := range ev.first {
		a, b := max(f.Probed.MS[0]-f.Direct.MS[0], 0), max(f.Probed.P50-f.Direct.P50, 0)
		if i == 0 {
			first, later = a, b
		}
		first, later = min(first, a), min(later, b)
	}
	return first, later
}

func (ev *evidence) firstDetail() string {
	if len(ev.checkFirst()) > 0 {
		return ""
	}
	first, later := ev.firstBytes()
	return fmt.Sprintf("first byte %.1f ms over direct on a first connection, %.1f ms on later ones", first, later)
}

// checkStrict wants the refusal on the wire, and a finding that says why and what
// would allow it.
func (ev *evidence) checkStrict() (wrong []string) {
	a, ok := ev.outside[payments.String()]
	switch {
	case !ok:
		return []string{"nobody tried"}
	case a.err == nil || a.answer != "":
		return []string{fmt.Sprintf("%s at %s answered %q", payments, a.target, a.answer)}
	}
	f, ok := ev.refused(payments)
	switch {
	case !ok:
		wrong = append(wrong, "no finding tells of it")
	case f.Detail == "" || f.Remedy == "":
		wrong = append(wrong, "the finding lacks the reason or what would allow it")
	}
	return wrong
}

// refused is the finding about our own plaintext to a workload.
func (ev *evidence) refused(n name) (assay.Finding, bool) {
	for _, f := range ev.findings {
		i := slices.IndexFunc(ev.members, func(w assay.Workload) bool { return w.ID == f.Workload })
		if i < 0 || nameOf(ev.members[i].Identity) != n {
			continue
		}
		for a := range ev.gateway {
			if strings.Contains(f.Subject+" "+f.Detail, a.String()) {
				return f, true
			}
		}
	}
	return assay.Finding{}, false
}

// refusal is that finding as a sentence.
func (ev *evidence) refusal() string {
	f, ok := ev.refused(payments)
	if !ok {
		return ""
	}
	return fmt.Sprintf("%s: %s (%s)", f.Subject, f.Detail, f.Remedy)
}

func (ev *evidence) checkObserve() []string {
	a, ok := ev.outside[web.String()]
	switch {
	case !ok:
		return []string{"nobody tried"}
	case a.err != nil:
		return []string{fmt.Sprintf("%s at %s: %v", web, a.target, a.err)}
	}
	for i := range ev.edges {
		e := &ev.edges[i]
		if e.Client.Identity.IsZero() && nameOf(e.Server.Identity) == web && e.Security == assay.Plaintext {
			if e.Reason == "" {
				return []string{edgeName(e) + " is listed without a reason"}
			}
			return nil
		}
	}
	return []string{"it was served and is not listed"}
}

func (ev *evidence) checkScript() []string {
	switch {
	case ev.script.ID == "":
		return []string{"the workload is not listed"}
	case ev.script.Artifacts.Unproven() == "":
		return []string{fmt.Sprintf("%s counts as proven", ev.script.Name)}
	}
	return nil
}

func (ev *evidence) checkOutage() (wrong []string) {
	o := &ev.outage
	switch {
	case o.err != nil:
		return []string{o.err.Error()}
	case o.length <= 0 || len(o.before) == 0:
		return []string{"they were not killed"}
	case o.started:
		return []string{"somebody answered in their place"}
	}
	for _, pid := range slices.Sorted(maps.Keys(o.before)) {
		if o.after[pid] != o.before[pid] {
			wrong = append(wrong, fmt.Sprintf("proxy %d was not adopted", pid))
		}
	}
	return wrong
}
