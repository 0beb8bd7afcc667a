package control

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/discovery"
)

// From what has changed in the model to the snapshots of hosts.

// publishEvery is the least time between two computations of what hosts' facts
// have touched: a host that starts a thousand replicas of one service costs a few
// computations of that service, not a thousand.
const publishEvery = 10 * time.Millisecond

// publishSoon has publisher publish.
func (m *model) publishSoon() {
	select {
	case m.changed <- struct{}{}:
	default:
	}
}

// publisher publishes what was touched, at once and then at most every
// publishEvery, until ctx ends.
func (m *model) publisher(ctx context.Context) error {
	t := time.NewTimer(0)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-m.changed:
		}
		m.mu.Lock()
		m.publish()
		m.mu.Unlock()
		t.Reset(publishEvery)
	}
}

// publish recomputes what was touched, puts it into the snapshot and wakes the
// streams.
func (m *model) publish() {
	ch := m.catalog.Changes(func(key string) ([]netip.Addr, bool) {
		n, ok := m.vips[key]
		if !ok {
			return nil, false
		}
		addrs, err := m.network.vips(n)
		return addrs, err == nil
	})
	for i := range ch.Services {
		s := &ch.Services[i]
		m.snapshot.put("service/"+s.Key(), &api.Resource{Body: &api.Resource_Service{Service: api.FromService(s)}})
	}
	for _, key := range ch.RemovedServices {
		m.snapshot.remove("service/" + key)
		m.number(key, false)
	}
	for _, key := range ch.Pending {
		m.number(key, true)
	}
	for i := range ch.Namespaces {
		n := &ch.Namespaces[i]
		m.snapshot.put("namespace/"+n.Namespace, &api.Resource{Body: &api.Resource_Namespace{Namespace: api.FromNamespaceConfig(n)}})
	}
	for _, ns := range ch.RemovedNamespaces {
		m.snapshot.remove("namespace/" + ns)
	}
	for i := range ch.Routes {
		r := &ch.Routes[i]
		m.snapshot.put("route/"+r.Key(), &api.Resource{Body: &api.Resource_Route{Route: api.FromRoute(r)}})
	}
	for _, key := range ch.RemovedRoutes {
		m.snapshot.remove("route/" + key)
	}
	for _, key := range ch.RouteStatus {
		m.noteRoute(key)
	}
	for i := range ch.Misplaced {
		m.findingLocked(misplaced(&ch.Misplaced[i]))
	}
	m.noteIdle()
	for s := range m.sessions {
		s.wake()
	}
}

// number asks for a service's number, from which its addresses follow, or gives it back.
func (m *model) number(key string, want bool) {
	if m.network != (Network{}) {
		m.behind.vip(key, want)
	}
}

// noteRoute keeps the status of a route, and since when it is so.
func (m *model) noteRoute(key string) {
	status := m.catalog.RouteStatus(key)
	if len(status) == 0 {
		delete(m.routes, key)
		return
	}
	since := map[string]time.Time{}
	name := func(p *assay.RouteParentStatus, c *assay.RouteCondition) string {
		return fmt.Sprint(p.ParentRef, c.Type, c.Status)
	}
	for i := range m.routes[key] {
		p := &m.routes[key][i]
		for j := range p.Conditions {
			since[name(p, &p.Conditions[j])] = p.Conditions[j].LastTransitionTime
		}
	}
	now := m.now().UTC().Truncate(time.Second)
	for i := range status {
		p := &status[i]
		for j := range p.Conditions {
			c := &p.Conditions[j]
			if c.LastTransitionTime = since[name(p, c)]; c.LastTransitionTime.IsZero() {
				c.LastTransitionTime = now
			}
		}
	}
	m.routes[key] = status
}

// misplaced says what is wrong about a place that is no endpoint.
func misplaced(p *discovery.Misplaced) assay.Finding {
	says, has := "an address that it gives no pod for", "workload "+p.Owner+" has it"
	if p.Place != "" {
		says = "the address of workload " + p.Place
	}
	if p.Owner == "" {
		has = "that workload has others"
	}
	return assay.Finding{
		Kind: "misplaced-endpoint", Subject: p.Service + " at " + p.Addr.String(), Detail: "it is said to be " + says + ", but " + has + "; nobody is sent there",
		Remedy: "correct the EndpointSlice of the service, or find out who wrote it",
	}
}

// publishHost puts a host's resource into the snapshot.
func (m *model) publishHost(h *host) {
	m.snapshot.put(hostKey(h.ID), &api.Resource{Body: &api.Resource_Host{Host: api.FromHost(&h.Host.Host)}})
}
