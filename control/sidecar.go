package control

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"time"

	"assay.dev"
	"assay.dev/store"
)

// A pod into which a sidecar was injected is a host of its own, with one workload: itself. It joins with
// the token of its service account, bound to it, and speaks for nobody else; no agent speaks for
// it. What it runs is the platform's to say, since nobody on its node has looked.

// podID names the host that a pod is.
func podID(uid string) string {
	sum := sha256.Sum256([]byte(uid))
	return "pod-" + hex.EncodeToString(sum[:8])
}

// podHost returns the host that a pod is, if the platform agrees that it is one.
func (m *model) podHost(b Bearer) (store.Host, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fail := func(kind assay.Kind, remedy, format string, args ...any) (store.Host, error) {
		return store.Host{}, &assay.Error{Kind: kind, Op: "join", Err: fmt.Errorf(format, args...), Remedy: remedy}
	}
	p := m.cluster.pods[b.Pod]
	switch {
	case p == nil:
		return fail(assay.Unavailable, "try again", "the API server has not told of pod %s yet, or it has ended", cut(b.Pod, 64))
	case b.Account != p.Namespace+"/"+p.Account:
		return fail(assay.Denied, "", "the token is that of %s, and pod %s/%s has service account %s", b.Account, p.Namespace, p.Name, p.Account)
	case p.HostNetwork:
		return fail(assay.Denied, "", "pod %s/%s has its node's network", p.Namespace, p.Name)
	case p.Sidecar == "":
		return fail(assay.Denied, "pods join by what the injector adds to them: label its namespace, and restart it", "pod %s/%s has no sidecar", p.Namespace, p.Name)
	case !p.Asks && m.hosts[podID(p.UID)] == nil: // a label that goes away leaves the pods that have joined
		return fail(assay.Unavailable, "label it, or its namespace, assay.dev/mesh: sidecar, and restart it", "pod %s/%s does not ask for a sidecar", p.Namespace, p.Name)
	}
	return store.Host{Host: assay.Host{ID: podID(p.UID), Name: p.Namespace + "/" + p.Name}, Node: p.Node, Pod: p.UID}, nil
}

// maySpeakFor reports whether a pod is a host's to speak for: of a node those of its own without a
// sidecar, of a pod with one itself.
func (h *host) maySpeakFor(p *Pod) bool {
	if h.Pod != "" {
		return p.UID == h.Pod && p.Sidecar != ""
	}
	return p.Node == h.Node && p.Sidecar == ""
}

// describe returns a workload with what the platform says of it, and not its host.
func (p *Pod) describe(h *host, w *assay.Workload) *assay.Workload {
	known := *w
	known.Labels = p.Labels
	if h.Pod != "" {
		known.Artifacts = p.Artifacts
		return &known
	}
	known.Artifacts = slices.Clone(w.Artifacts)
	for i := range known.Artifacts {
		known.Artifacts[i].Evidence = assay.ByAgent
	}
	return &known
}

// noteSidecar has nobody sent in plaintext to a pod whose sidecar has not joined yet.
func (m *model) noteSidecar(p *Pod) {
	if p.Sidecar == "" {
		return
	}
	if _, known := m.cluster.injected[p.UID]; !known {
		m.cluster.injected[p.UID] = m.now()
		m.catalog.SetClaimed(p.UID, true)
	}
}

func (m *model) forgetSidecar(uid string) {
	if _, known := m.cluster.injected[uid]; known {
		delete(m.cluster.injected, uid)
		m.catalog.SetClaimed(uid, false)
	}
}

// injected reports whether a pod that there is has a sidecar.
func (m *model) injected(uid string) bool {
	_, injected := m.cluster.injected[uid]
	return injected
}

// settleIn is how long another control may know of a pod before this one does, and how long a
// sidecar may take to join before that is worth a word.
const settleIn = time.Minute

// podGone reports whether a host is a pod that has ended. mu is held.
func (m *model) podGone(h *host) bool {
	return h.Pod != "" && m.cluster.pods[h.Pod] == nil && (m.me == "" || m.now().Sub(h.Joined) >= settleIn)
}

// forgetPod removes the host of a pod that has ended. Nobody else is ever that pod, so that its
// certificate needs no refusal: who shows it is of no host that is known.
func (c *Control) forgetPod(ctx context.Context, id string) error {
	return c.behind.alone(id, func() error {
		_, err := c.store.DeleteHost(ctx, id)
		if err == nil {
			c.model.removeHost(id)
		}
		return err
	})
}

// checkSidecars is about pods that should have a sidecar and have none, or one that is not heard
// of, and about those that should have an agent where only sidecars are. mu is held.
func (m *model) checkSidecars() (out []assay.Finding) {
	if m.cluster == nil {
		return nil
	}
	now, agents := m.now(), m.agents()
	for _, uid := range slices.Sorted(maps.Keys(m.cluster.pods)) {
		p := m.cluster.pods[uid]
		f := assay.Finding{Workload: uid, Subject: p.Namespace + "/" + p.Name}
		since, injected := m.cluster.injected[uid]
		_, joined := m.catalog.Workload(uid)
		switch {
		case p.Asks && p.HostNetwork:
			f.Kind, f.Detail, f.Remedy = "pod-without-sidecar", "it is in its node's network, and stays outside of the mesh", "label it assay.dev/mesh: disabled"
		case p.Asks && !injected:
			f.Kind, f.Detail, f.Remedy = "pod-without-sidecar", "it was made before it was labelled, or before the injector was there, and is outside of the mesh", "restart it: kubectl rollout restart"
		case injected && !joined && now.Sub(since) >= settleIn:
			f.Kind, f.Detail, f.Remedy = "sidecar-not-joined", "its sidecar has not joined, or what it says of the pod is not taken: nobody in the mesh is sent there", "see what it says (kubectl logs -c assay-proxy), and restart the pod"
		case joined || !p.Wants || agents[p.Node] || len(agents) > 0 && !m.cluster.nodes[p.Node].Agentless: // an agent tells of it, or its node is named
			continue
		case p.HostNetwork:
			f.Kind, f.Detail, f.Remedy = "pod-without-agent", "it is in its node's network, and stays outside of the mesh", "label it assay.dev/mesh: disabled"
		default:
			f.Kind, f.Detail, f.Remedy = "pod-without-agent", "it is labelled to be meshed by its node's agent, and there is none: it is outside of the mesh", "label it assay.dev/mesh: sidecar and restart it, or install agents"
		}
		out = append(out, f)
	}
	return out
}

// agents are the nodes whose agents have joined. mu is held.
func (m *model) agents() map[string]bool {
	joined := map[string]bool{}
	for _, h := range m.hosts {
		if h.Node != "" && h.Pod == "" {
			joined[h.Node] = true
		}
	}
	return joined
}
