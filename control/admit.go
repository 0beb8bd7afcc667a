package control

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"assay.dev"
	"assay.dev/api"
)

// Which workloads of a host the model takes, and how they come and go.

// covers reports whether one of the patterns allows namespace/name.
func covers(patterns []string, namespace, name string) bool {
	for _, p := range patterns {
		ns, n, _ := strings.Cut(p, "/")
		if (ns == "*" || ns == namespace) && (n == "*" || n == name) {
			return true
		}
	}
	return false
}

// admit decides whether a host may report w. It returns the IDs of workloads that
// w pushes out, because they have w's address and their host, the same, has not
// mentioned them since it came back.
func (m *model) admit(h *host, w *assay.Workload, seen map[string]bool) (stale []string, err error) {
	refuse := func(kind assay.Kind, cause error, remedy string) ([]string, error) {
		return nil, &assay.Error{Kind: kind, Op: "take workload " + w.ID, Err: cause, Remedy: remedy}
	}
	if w.Host != h.ID {
		return refuse(assay.Denied, fmt.Errorf("it is said to be on host %s, reported by %s", w.Host, h.ID), "")
	}
	if w.Identity.TrustDomain != m.trustDomain {
		return refuse(assay.Invalid, fmt.Errorf("identity %s is not of trust domain %s", w.Identity, m.trustDomain), "")
	}
	if err := m.mayRun(h, w); err != nil {
		return nil, err
	}
	if old, ok := m.catalog.Workload(w.ID); ok {
		if old.Host != h.ID {
			return refuse(assay.Denied, fmt.Errorf("host %s has a workload of this ID", old.Host), "")
		}
		if old.Identity != w.Identity {
			return refuse(assay.Conflict, fmt.Errorf("its identity was %s and would be %s", old.Identity, w.Identity), "give the new workload an ID of its own")
		}
	} else if h.running >= maxRunning {
		return refuse(assay.Unavailable, fmt.Errorf("host %s has %d workloads already", h.ID, h.running), "run it on another host")
	}
	for _, a := range w.Addrs {
		owner, taken := m.owner[a]
		if !taken || owner == w.ID {
			continue
		}
		if other, ok := m.catalog.Workload(owner); ok && (other.Host != h.ID || seen[owner]) {
			cause := fmt.Errorf("address %s belongs to workload %s", a, owner)
			if h.Node != "" {
				return nil, tooEarly{cause} // a platform gives addresses to the next one fast
			}
			return refuse(assay.Conflict, cause, "report that one gone first")
		}
		stale = append(stale, owner)
	}
	return stale, nil
}

// mayRun decides whether w is one that its host may speak for: by what the host's token
// covers or, in a cluster, by what the platform says of the pod.
func (m *model) mayRun(h *host, w *assay.Workload) error {
	refuse := func(cause error, remedy string) error {
		return &assay.Error{Kind: assay.Denied, Op: "take workload " + w.ID, Err: cause, Remedy: remedy}
	}
	if !m.named(w) {
		return refuse(fmt.Errorf("identity %s is not that of %s/%s", w.Identity, w.Namespace, w.Name), "")
	}
	if m.cluster != nil || h.Node != "" {
		return m.vouched(h, w)
	}
	for _, name := range []string{w.Name, w.Service} {
		if name != "" && !covers(h.Covers, w.Namespace, name) {
			return refuse(fmt.Errorf("host %s may run %s, not %s/%s", cmp.Or(h.Name, h.ID), strings.Join(h.Covers, " "), w.Namespace, name),
				fmt.Sprintf("join the host with a token made by: assay token create --cover %s/%s", w.Namespace, name))
		}
	}
	for _, a := range w.Addrs {
		if !slices.ContainsFunc(h.Prefixes, func(p netip.Prefix) bool { return p.Contains(a) }) {
			return refuse(fmt.Errorf("address %s is not of host %s, which has %v", a, h.ID, h.Prefixes), "")
		}
	}
	return nil
}

// named reports whether a workload has the identity that its names say.
func (m *model) named(w *assay.Workload) bool {
	return w.Identity == assay.Identity{TrustDomain: m.trustDomain, Namespace: w.Namespace, Account: w.Name}
}

// forged says why a workload cannot be what the store says, nil if it can. What others store
// they have asked the platform for; who else writes to the store has not.
func (m *model) forged(h *host, w *assay.Workload) error {
	if m.cluster == nil || !m.cluster.told {
		if !m.named(w) {
			return fmt.Errorf("identity %s is not that of %s/%s", w.Identity, w.Namespace, w.Name)
		}
		return nil
	}
	err := m.mayRun(h, w)
	if _, early := errors.AsType[tooEarly](err); early {
		return nil
	}
	return err
}

// contradict withdraws, or does not take, what a record of the store says that cannot be.
func (m *model) contradict(h *host, w *assay.Workload, cause error) {
	m.removeWorkload(w.ID)
	m.findingLocked(assay.Finding{Kind: "workload-withdrawn", Subject: w.ID, Detail: cut(fmt.Sprintf("host %s (%s), as the store says: %v", h.ID, h.Name, cause), 1000),
		Remedy: "no control stores that: see who can write to the store"})
}

// setWorkload takes a workload that was admitted.
func (m *model) setWorkload(w *assay.Workload) {
	if old, ok := m.catalog.Workload(w.ID); ok {
		for _, a := range old.Addrs {
			delete(m.owner, a)
		}
	} else if h := m.hosts[w.Host]; h != nil {
		h.running++
	}
	for _, a := range w.Addrs {
		m.owner[a] = w.ID
	}
	m.catalog.SetWorkload(w)
	if r := m.reports[w.ID]; r != nil {
		r.workload, r.gone = w, time.Time{}
	}
	m.snapshot.put(workloadKey(w.ID), &api.Resource{Body: &api.Resource_Workload{Workload: told(w)}})
}

// told is what hosts hear of a workload. They know others by the digest of what runs, and
// have no use for what contains it.
func told(w *assay.Workload) *api.Workload {
	m := api.FromWorkload(w)
	for _, a := range m.Artifacts {
		a.Config, a.Index = "", ""
	}
	return m
}

// removeWorkload forgets a workload. Its numbers are shown for a while.
func (m *model) removeWorkload(id string) bool {
	w, ok := m.catalog.Workload(id)
	if !ok {
		return false
	}
	for _, a := range w.Addrs {
		if m.owner[a] == id {
			delete(m.owner, a)
		}
	}
	if h := m.hosts[w.Host]; h != nil {
		h.running--
	}
	delete(m.acks, id)
	m.catalog.RemoveWorkload(id)
	m.snapshot.remove(workloadKey(id))
	if r := m.reports[id]; r != nil {
		r.gone = m.now()
	}
	return true
}
