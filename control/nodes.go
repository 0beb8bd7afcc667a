package control

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"assay.dev"
	"assay.dev/discovery"
	"assay.dev/store"
)

// The hosts of a platform are its nodes (and pods that speak for themselves, sidecar.go): how they
// join, what is known of them, and that they go.

// itself reports whether a host is the node or pod that its record names: its certificate is that of
// its ID, and who writes records of the store has no say in whose it is.
func (h *host) itself() bool {
	if h.Pod != "" {
		return h.ID == podID(h.Pod)
	}
	return h.Node != "" && h.ID == nodeID(h.Node)
}

// followNodes takes in nodes that are new or have changed.
func (m *model) followNodes(list []Node) {
	if len(list) == 0 {
		return
	}
	changed := map[string]bool{}
	for _, n := range list {
		m.cluster.nodes[n.Name], changed[n.Name] = n, true
	}
	for _, h := range m.hosts {
		if changed[h.Node] {
			n := m.cluster.nodes[h.Node]
			h.Zone, h.Addrs, h.left = n.Zone, n.Addrs, false
			m.publishHost(h)
		}
	}
}

// onHosts names the hosts of places by their IDs.
func onHosts(places []discovery.Place) []discovery.Place {
	if !slices.ContainsFunc(places, func(p discovery.Place) bool { return p.Host != "" || p.Hosts != nil }) {
		return places
	}
	out := slices.Clone(places)
	for i := range out {
		p := &out[i]
		if p.Host != "" {
			p.Host = nodeID(p.Host)
		}
		nodes := p.Hosts
		p.Hosts = nil
		for _, node := range nodes {
			p.Hosts = append(p.Hosts, nodeID(node))
		}
	}
	return out
}

// bearerHost returns the host that a bearer is, as far as the platform says: without what is
// known of one that has joined before.
func (m *model) bearerHost(b Bearer, sidecars bool) (store.Host, error) {
	if b.Account != "" {
		if !sidecars {
			return store.Host{}, &assay.Error{Kind: assay.Denied, Op: "join", Err: errors.New("pods of this mesh do not speak for themselves"), Remedy: "assay install --injector"}
		}
		return m.podHost(b)
	}
	node, err := m.nodeOf(b)
	return store.Host{Host: assay.Host{ID: nodeID(node), Name: node}, Node: node}, err
}

// nodeOf returns the node whose agent a bearer is, if the platform has told of it.
func (m *model) nodeOf(b Bearer) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v := m.cluster
	node := b.Node
	if node == "" {
		p := v.pods[b.Pod]
		if p == nil {
			return "", &assay.Error{Kind: assay.Denied, Op: "join", Err: errors.New("the token is bound to no node, and to no pod that is known to run"), Remedy: "mount a projected service account token into the agent's pod"}
		}
		node = p.Node
	}
	if _, there := v.nodes[node]; !there {
		return "", &assay.Error{Kind: assay.Unavailable, Op: "join", Err: fmt.Errorf("the API server has not told of node %s yet", node), Remedy: "try again"}
	}
	return node, nil
}

// nodesLeft notes which hosts' nodes the platform says are gone. It may not have told this control yet of
// the node that a host joined as at another one.
func (m *model) nodesLeft(which func(node string) bool) {
	for _, h := range m.hosts {
		if h.Node != "" && which(h.Node) {
			h.left = true
		}
	}
}

// gone returns the hosts whose nodes or pods are gone.
func (m *model) gone() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []string
	if m.cluster == nil || !m.cluster.told {
		return nil
	}
	for id, h := range m.hosts {
		if h.left || m.podGone(h) {
			out = append(out, id)
		}
	}
	return out
}

// forgetNodes removes the hosts whose nodes are gone, until ctx ends. With the store away it
// is tried again. Of several controls one does so at once; the others later, since the platform may
// not have told that one.
func (c *Control) forgetNodes(ctx context.Context) error {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	since := map[string]time.Time{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		list := c.model.gone()
		maps.DeleteFunc(since, func(id string, _ time.Time) bool { return !slices.Contains(list, id) })
		first := c.several.first(c.cfg.takeover)
		for _, id := range list {
			if since[id].IsZero() {
				since[id] = time.Now()
			}
			if !first && time.Since(since[id]) < c.cfg.takeover {
				continue
			}
			if err := c.forgetNode(ctx, id); err != nil && ctx.Err() == nil {
				c.log.Error("the host of a node or pod that is gone stays", "host", id, "err", err)
				break
			}
		}
	}
}

func (c *Control) forgetNode(ctx context.Context, id string) error {
	h, ok := c.model.host(id)
	if !ok {
		return nil
	}
	if h.Pod != "" {
		return c.forgetPod(ctx, id)
	}
	line := store.Audit{Time: c.now(), Who: "the API server", Role: "cluster", Call: "Delete", Subject: "host " + id + " (" + h.Name + ")", Outcome: "ok"}
	// The next node of this name is another machine.
	certs := c.model.certificatesOf(assay.Infrastructure(c.authority.TrustDomain(), "host", id).String())
	if err := c.refuseCertificates(ctx, c.store, certs...); err != nil {
		return err
	}
	err := c.behind.alone(id, func() error {
		_, err := c.store.Audited(line).DeleteHost(ctx, id)
		if err == nil {
			c.model.removeHost(id)
		}
		return err
	})
	if err == nil {
		c.model.audited(line)
		c.log.Info("a node is gone, and its host with it", "host", id, "node", h.Node)
	}
	return err
}
