package control

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"assay.dev"
	"assay.dev/discovery"
	"assay.dev/store"
)

// A cluster is a platform that knows hosts and workloads by itself, as Kubernetes does: its
// nodes are the mesh's hosts, its pods the workloads. A node speaks for the pods that the
// platform says run on it, and for no other.

// Cluster says how nodes of a platform join.
type Cluster struct {
	// Bearer says whose agent holds a token that a host shows in place of a join token. It
	// asks the platform. Denied: it is not an agent's, nor that of a pod that may speak for itself.
	Bearer func(ctx context.Context, token string) (Bearer, error)
	// Sidecars lets pods speak for themselves into which one was injected.
	Sidecars bool
}

// Bearer is an agent that has shown its token, or a pod.
type Bearer struct {
	Node string // its node; "" where the token does not say
	Pod  string // the UID of its pod, by which the node is known then
	// Account is "NAMESPACE/NAME" of the service account of a pod that speaks for itself; "" for an agent.
	Account string
}

// Pod is what a platform says of a workload that runs, or is about to.
type Pod struct {
	UID       string
	Namespace string
	Name      string
	Account   string
	Node      string
	Addrs     []netip.Addr // none yet: the node has not told the platform
	Labels    map[string]string
	// HostNetwork pods have their node's addresses; nobody can speak for them.
	HostNetwork bool
	// Sidecar is the image of what was injected into the pod, which speaks for it; "" for none.
	Sidecar string
	// Asks: it is to have one.
	Asks bool
	// Wants: its node's agent is to mesh it; told where there are sidecars.
	Wants bool
	// Artifacts are the images that the platform says it runs; known of pods with a Sidecar.
	Artifacts assay.ArtifactSet
}

// Placed is a service and where its clients may be sent. The hosts of places are named by their
// nodes.
type Placed struct {
	discovery.DeclaredService
	Places []discovery.Place
}

// Node is a machine of a platform.
type Node struct {
	Name string
	Zone string // what it fails together with, "" where the platform does not say
	// Addrs are its own, at which services have node ports.
	Addrs []netip.Addr
	// Agentless nodes cannot have an agent.
	Agentless bool
}

// External is a service that stands for a name outside of the mesh.
type External struct {
	Namespace, Name string
	ExternalName    string
	Notes           []string
}

// Key returns "NAMESPACE/NAME".
func (e *External) Key() string { return e.Namespace + "/" + e.Name }

// ClusterChanges is what differs from what Follow was told before; at the first time it
// is everything.
type ClusterChanges struct {
	Services        []Placed
	Externals       []External
	RemovedServices []string // keys, of either
	Pods            []Pod
	RemovedPods     []string // UIDs
	Nodes           []Node
	RemovedNodes    []string
	Declared        *Declared // all that people declared, when any of it differs; else nil
}

// Declared is what people declared to a platform beside services.
type Declared struct {
	Intent   discovery.Intent
	Objects  []store.Object // whole, with Created and Generation
	Problems map[store.Key]Unsound
	Missing  []string // kinds of which the platform has no definition, sorted
}

// Unsound is why an object has no effect.
type Unsound struct {
	Reason string // as a word of the platform: Invalid, Conflicted …
	Text   string
}

// clusterView is what a platform has said. The model's lock guards it.
type clusterView struct {
	told      bool            // everything there is has been told once
	pods      map[string]*Pod // by UID
	at        map[netip.Addr]map[string]bool
	nodes     map[string]Node         // by name
	services  map[string][]netip.Addr // their addresses, by key
	externals map[string]External     // by key
	missing   []string
	vips      map[netip.Addr]string // the same, the other way round
	waiting   map[string]*waiting   // reports that are too early, by workload
	claims    map[string]claim      // by pod
	injected  map[string]time.Time  // pods with a sidecar, and since when they are known
}

func newClusterView() *clusterView {
	return &clusterView{
		pods: map[string]*Pod{}, at: map[netip.Addr]map[string]bool{}, nodes: map[string]Node{}, externals: map[string]External{},
		services: map[string][]netip.Addr{}, vips: map[netip.Addr]string{}, waiting: map[string]*waiting{}, claims: map[string]claim{}, injected: map[string]time.Time{},
	}
}

// setPod adds or replaces a pod; nil removes it.
func (v *clusterView) setPod(uid string, p *Pod) {
	if old := v.pods[uid]; old != nil {
		for _, a := range old.Addrs {
			if delete(v.at[a], uid); len(v.at[a]) == 0 {
				delete(v.at, a)
			}
		}
		delete(v.pods, uid)
	}
	if p == nil {
		return
	}
	v.pods[uid] = p
	for _, a := range p.Addrs {
		if v.at[a] == nil {
			v.at[a] = map[string]bool{}
		}
		v.at[a][uid] = true
	}
}

func (v *clusterView) setService(key string, addrs []netip.Addr) {
	for _, a := range v.services[key] {
		if v.vips[a] == key {
			delete(v.vips, a)
		}
	}
	delete(v.services, key)
	if len(addrs) == 0 {
		return
	}
	v.services[key] = addrs
	for _, a := range addrs {
		v.vips[a] = key
	}
}

// vouched decides whether the platform's word is what the agent of a node says of a pod.
func (m *model) vouched(h *host, w *assay.Workload) error {
	v := m.cluster
	deny := func(format string, args ...any) error {
		return &assay.Error{Kind: assay.Denied, Op: "take workload " + w.ID, Err: fmt.Errorf(format, args...)}
	}
	if v == nil {
		return deny("it is of node %s, and this control is not one of a cluster", h.Node)
	}
	if !h.itself() {
		return deny("the record of host %s does not say which node or pod it is", h.ID)
	}
	p := v.pods[w.ID]
	switch {
	case h.Pod != "" && h.Pod != w.ID:
		return deny("%s speaks for itself alone", h.Name)
	case p == nil:
		return tooEarly{errors.New("the API server knows of no such pod that has not ended")}
	case p.Node != h.Node:
		return deny("the pod is on node %s, and node %s speaks for it", p.Node, h.Node)
	case p.HostNetwork:
		return deny("the pod has its node's network")
	case !h.maySpeakFor(p):
		return deny("the pod has a sidecar, which speaks for it")
	case w.Namespace != p.Namespace || w.Name != p.Account:
		return deny("the pod is of namespace %s and service account %s, not %s/%s", p.Namespace, p.Account, w.Namespace, w.Name)
	case w.Service != "":
		return deny("which services a pod is part of is not its node's to say")
	case len(w.Addrs) == 0:
		return deny("it has no address")
	}
	for _, a := range w.Addrs {
		if slices.Contains(p.Addrs, a) {
			continue
		}
		if !a.IsGlobalUnicast() {
			return deny("%s is no pod's address", a)
		}
		if len(p.Addrs) > 0 || h.Pod != "" { // of the others on its node it knows nothing
			return tooEarly{fmt.Errorf("the pod's addresses are %v, not %s", p.Addrs, a)}
		}
		if owner := v.ownedBy(a, p); owner != "" {
			return tooEarly{fmt.Errorf("%s is the address of %s", a, owner)}
		}
	}
	return nil
}

// ownedBy says who has an address that the node of a pod claims for it, "" when nobody
// has. Of the pods of one node the node itself knows best which have ended.
func (v *clusterView) ownedBy(a netip.Addr, p *Pod) string {
	if key := v.vips[a]; key != "" {
		return "service " + key
	}
	for _, uid := range slices.Sorted(maps.Keys(v.at[a])) {
		if other := v.pods[uid]; uid != p.UID && (other.Node != p.Node || other.HostNetwork) {
			return "pod " + uid + " on node " + other.Node
		}
	}
	return ""
}

// Follow takes in what the platform says. It is called by one goroutine, and waits for nobody.
func (c *Control) Follow(ch ClusterChanges) error {
	if c.model.cluster == nil {
		return &assay.Error{Kind: assay.Internal, Op: "follow the cluster", Err: errors.New("this control is not one of a cluster")}
	}
	if ch.Declared != nil {
		c.declare(ch.Declared)
	}
	if c.model.follow(&ch) {
		c.log.Info("the API server has told everything", "services", len(ch.Services), "pods", len(ch.Pods), "nodes", len(ch.Nodes))
	}
	return nil
}

// declare puts into effect what people declared to the platform. What is not sound as a
// whole leaves the last in effect.
func (c *Control) declare(d *Declared) {
	c.intent.mu.Lock()
	defer c.intent.mu.Unlock()
	objects := make(map[store.Key]store.Object, len(d.Objects))
	now := c.now()
	for _, o := range d.Objects {
		o.Source, o.Changed = fromCluster, now
		if was, ok := c.intent.get(o.Key()); ok && was.Generation == o.Generation && was.Created.Equal(o.Created) {
			o.Changed = was.Changed
		} else if !ok && !c.model.following() {
			o.Changed = o.Created // before this control began, nobody knows when
		}
		objects[o.Key()] = o
	}
	c.intent.shown.Lock()
	c.intent.objects, c.intent.problems = objects, d.Problems
	c.intent.shown.Unlock()
	err := c.effect(d.Intent)
	if c.intent.broke(err, now) && err != nil {
		c.log.Error("intent is not in effect; "+c.instead(), "err", err)
	}
}

// Roots returns the certificates of the authority's roots, in DER: those that sign, and those that
// will or did; none while another control may know better (see several.cutOff).
func (c *Control) Roots() [][]byte {
	if c.several.cutOff() {
		return nil
	}
	return c.authority.Bundle().Roots
}

// RouteStatus returns what became of a route at each of its parents, by assay.Route.Key; none of
// a route that is not known. The caller changes nothing of it.
func (c *Control) RouteStatus(key string) []assay.RouteParentStatus {
	c.model.mu.Lock()
	defer c.model.mu.Unlock()
	return c.model.routes[key]
}

// following reports whether the platform has been heard.
func (m *model) following() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cluster == nil || m.cluster.told
}

// follow takes in changes; first reports whether they were the first.
func (m *model) follow(ch *ClusterChanges) (first bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v := m.cluster
	suspects := map[string]bool{} // workloads about which something has changed
	note := func(addrs []netip.Addr) {
		for _, a := range addrs {
			if id, ok := m.owner[a]; ok {
				suspects[id] = true
			}
		}
	}
	m.followNodes(ch.Nodes)
	for _, n := range ch.RemovedNodes {
		delete(v.nodes, n)
	}
	m.nodesLeft(func(node string) bool { return slices.Contains(ch.RemovedNodes, node) })
	for i := range ch.Services {
		s := &ch.Services[i]
		delete(v.externals, s.Key())
		v.setService(s.Key(), s.ClusterIPs)
		m.catalog.SetPlaced(s.DeclaredService, onHosts(s.Places))
		note(s.ClusterIPs)
	}
	gone := func(key string) {
		v.setService(key, nil)
		m.catalog.RemovePlaced(key)
		delete(v.externals, key)
	}
	for i := range ch.Externals {
		e := &ch.Externals[i]
		gone(e.Key())
		v.externals[e.Key()] = *e
	}
	for _, key := range ch.RemovedServices {
		gone(key)
	}
	if ch.Declared != nil {
		v.missing = ch.Declared.Missing
	}
	var came []string // or got a network
	for i := range ch.Pods {
		p := &ch.Pods[i]
		if old := v.pods[p.UID]; v.told && (old == nil || len(old.Addrs) == 0 && len(p.Addrs) > 0) {
			came = append(came, p.UID)
		}
		v.setPod(p.UID, p)
		m.noteSidecar(p)
		suspects[p.UID] = true
		note(p.Addrs)
	}
	for _, uid := range ch.RemovedPods {
		v.setPod(uid, nil)
		m.disclaimPod(uid)
		m.forgetSidecar(uid)
		m.catalog.SetEnded(uid)
		suspects[uid] = true
	}
	m.claimNew(came)
	if first = !v.told; first {
		v.told = true
		m.nodesLeft(func(node string) bool { _, there := v.nodes[node]; return !there })
		m.disclaim(func(id string, _ claim) bool { return v.pods[id] == nil })
		for _, w := range m.catalog.Workloads() {
			suspects[w.ID] = true
		}
	}
	for _, id := range slices.Sorted(maps.Keys(suspects)) {
		m.suspect(id)
	}
	m.tryWaiting()
	m.publish()
	return first
}

// suspect looks again at a workload about which the platform has said something new: it is
// withdrawn when that contradicts its node. A pod that is gone contradicts nobody.
func (m *model) suspect(id string) {
	w, ok := m.catalog.Workload(id)
	if !ok {
		return
	}
	h := m.hosts[w.Host]
	if h == nil {
		return
	}
	if h.elsewhere() { // its control says what is to be said to it
		if err := m.forged(h, w); err != nil {
			m.contradict(h, w, err)
		}
		return
	}
	err := m.vouched(h, w)
	if err == nil {
		if other := m.cluster.pods[id].describe(h, w); !maps.Equal(other.Labels, w.Labels) || !slices.Equal(other.Artifacts, w.Artifacts) {
			m.setWorkload(other)
			m.behind.workload(id, other)
		}
		return
	}
	m.removeWorkload(id)
	m.behind.gone(id, "")
	if m.cluster.pods[id] == nil {
		return
	}
	m.claim(h, h.session, id)
	m.findingLocked(assay.Finding{Kind: "workload-withdrawn", Subject: id, Detail: cut(fmt.Sprintf("host %s (%s): %v", h.ID, h.Name, err), 1000),
		Remedy: "the API server does not say what the node's agent said; if that lasts, look at the node"})
	if h.session != nil {
		m.wait(h.session, w, err)
	}
}
