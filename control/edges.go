package control

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"assay.dev"
)

// edgeKey is what two edges differ in.
type edgeKey struct {
	client, server assay.Party
	service        string
	port           uint16
	protocol       assay.Protocol
	security       assay.Security
	reason         string
	remote, by     string
}

// tally is what one end counted on an edge, over all its workloads.
type tally struct {
	seen bool
	assay.Edge
}

func (t *tally) add(s *assay.Signals, inbound bool, counted time.Time) {
	if counted.After(t.Counted) {
		t.Counted = counted
	}
	up, down := s.BytesOut, s.BytesIn
	if inbound {
		up, down = down, up
	}
	t.Requests += s.Requests
	t.Failures += s.Failures
	t.Opened += s.Opened
	t.Open += s.Open
	t.BytesUp += up
	t.BytesDown += down
	packetsUp, packetsDown := s.PacketsOut, s.PacketsIn
	if inbound {
		packetsUp, packetsDown = packetsDown, packetsUp
	}
	t.PacketsUp += packetsUp
	t.PacketsDown += packetsDown
	t.Latency.Add(&s.Latency)
	if !t.seen || s.FirstSeen.Before(t.FirstSeen) {
		t.FirstSeen = s.FirstSeen
	}
	if s.LastSeen.After(t.LastSeen) {
		t.LastSeen = s.LastSeen
	}
	t.seen = true
}

// edges puts together what both ends of each edge counted. What both counted is
// shown once, with the client's numbers: it waited for the answer.
func (m *model) edges() []assay.Edge {
	type ends struct{ outbound, inbound tally }
	all := map[edgeKey]*ends{}
	for r := range m.counts {
		self := assay.Party{Identity: r.workload.Identity, Artifacts: r.workload.Artifacts.Digest()}
		for i := range r.Signals {
			s := &r.Signals[i]
			peer := assay.Party{Identity: s.Peer, Artifacts: s.PeerArtifacts}
			k := edgeKey{self, peer, s.Service, s.Port, s.Protocol, s.Security, s.Reason, s.Remote, s.RemoteBy}
			inbound := s.Direction == assay.Inbound
			if inbound {
				k.client, k.server = peer, self
			}
			e := all[k]
			if e == nil {
				e = &ends{}
				all[k] = e
			}
			if inbound {
				e.inbound.add(s, true, r.Counted)
			} else {
				e.outbound.add(s, false, r.Counted)
			}
		}
	}
	out := make([]assay.Edge, 0, len(all))
	for k, e := range all {
		edge := e.outbound.Edge
		if !e.outbound.seen {
			edge = e.inbound.Edge
		}
		edge.Client, edge.Server, edge.Service, edge.Port = k.client, k.server, k.service, k.port
		edge.Protocol, edge.Security, edge.Reason, edge.Remote, edge.RemoteBy = k.protocol, k.security, k.reason, k.remote, k.by
		if e.outbound.seen {
			edge.SeenBy = append(edge.SeenBy, assay.Outbound)
		}
		if e.inbound.seen {
			edge.SeenBy = append(edge.SeenBy, assay.Inbound)
		}
		out = append(out, edge)
	}
	slices.SortFunc(out, func(a, b assay.Edge) int {
		return cmp.Or(
			strings.Compare(a.Client.Identity.String(), b.Client.Identity.String()),
			strings.Compare(a.Server.Identity.String(), b.Server.Identity.String()),
			cmp.Compare(a.Service, b.Service), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Protocol, b.Protocol),
			cmp.Compare(a.Security, b.Security), cmp.Compare(a.Reason, b.Reason), cmp.Compare(a.Remote, b.Remote), cmp.Compare(a.RemoteBy, b.RemoteBy),
			cmp.Compare(a.Client.Artifacts, b.Client.Artifacts), cmp.Compare(a.Server.Artifacts, b.Server.Artifacts))
	})
	return out
}
