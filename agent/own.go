package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"assay.dev"
	"assay.dev/agent/capture"
	"assay.dev/agent/netns"
	"github.com/vishvananda/netlink"
)

// Own is what an agent knows that is in a pod, beside its containers, and serves no
// other. It enters no namespace, makes no setting of the kernel's, and sees no process but its
// own: what the pod runs, control hears from the platform; that the kubelet asks, is known by
// the node's addresses and the port alone. What it starts ends with it; its rules stay, so that
// the pod is cut off rather than open while there is no agent.
type Own struct {
	Node  string       // the ID of the node's host, which endpoints are near to or not
	Addrs []netip.Addr // the node's own
	// Memory is what a proxy may use, in bytes, before it must collect garbage more often; 0:
	// as much as it likes.
	Memory int64
	// Metrics is the port of Config.Metrics, which is one of the pod's: who is not in the mesh reads it in
	// plaintext, in a strict namespace, too. 0: none, or only from within.
	Metrics uint16
}

// environment is a proxy's.
func (o *Own) environment() []string {
	if o.Memory == 0 {
		return proxyEnv
	}
	return append([]string{"GOMEMLIMIT=" + strconv.FormatInt(o.Memory, 10)}, proxyEnv...)
}

// podProxyUsers of a pod whose user namespace has not those of a host.
const podProxyUsers = 64000

// users is the first user ID of proxies.
func (o *Own) users(first uint32) uint32 {
	if o != nil && !uidMapped(first+1) {
		return podProxyUsers
	}
	return first
}

// retryOwn is how often an agent that cannot mesh its pod yet tries again.
const retryOwn = 500 * time.Millisecond

// TrackOwn has the kernel track the agent's own connections from their beginning. It comes before
// the first of them.
func (a *Agent) TrackOwn() error {
	ns, err := netns.Own()
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := capture.Track(ns, a.cfg.OwnMark); err != nil {
		return &assay.Error{Op: "begin to capture this pod", Err: err, Remedy: "see that the container has CAP_NET_ADMIN, and that the node's kernel has nftables and connection tracking"}
	}
	return nil
}

// MeshOwn joins the pod that the agent is in, which Run must have begun for. It tries until rules
// and proxy are there, and returns then, or with the context's cause; NetNS and Link of p it finds
// by itself. It waits until control has said what there is, unless an agent of the same pod has
// heard it before.
func (a *Agent) MeshOwn(ctx context.Context, p Pod) error {
	if err := wait(ctx, a.settled); err != nil {
		return err
	}
	if !a.knowsMesh() {
		if err := wait(ctx, a.fresh); err != nil {
			return err
		}
	}
	said := ""
	for {
		err := a.meshOwn(ctx, p)
		if err == nil {
			return nil
		}
		if kind := assay.KindOf(err); kind == assay.Invalid {
			return err
		}
		if err.Error() != said && ctx.Err() == nil {
			said = err.Error()
			a.log.Error("this pod is not in the mesh yet", "err", err)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(retryOwn):
		}
	}
}

func wait(ctx context.Context, l *latch) error {
	select {
	case <-l.ch:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (a *Agent) meshOwn(ctx context.Context, p Pod) error {
	var err error
	if p.Link, err = linkOf(p.Addrs); err != nil {
		return err
	}
	gateways, err := nextHops()
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.addresses = slices.Concat(a.cfg.Own.Addrs, gateways)
	a.mu.Unlock()
	p.NetNS = "/proc/self/ns/net"
	return a.Mesh(ctx, p)
}

// knowsMesh reports whether control has said what there is, now or to the last agent.
func (a *Agent) knowsMesh() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.snapshot.version > 0
}

// linkOf returns the link that has the first address.
func linkOf(addrs []netip.Addr) (string, error) {
	if len(addrs) == 0 {
		return "", &assay.Error{Kind: assay.Invalid, Op: "find the pod's link", Err: errors.New("it has no address of its own: it shares the host's network")}
	}
	links, err := netns.Whole(netlink.LinkList)
	if err != nil {
		return "", fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		list, err := netns.Whole(func() ([]netlink.Addr, error) { return netlink.AddrList(l, netlink.FAMILY_ALL) })
		if err != nil {
			return "", fmt.Errorf("list addresses of %s: %w", l.Attrs().Name, err)
		}
		for i := range list {
			if x, ok := netip.AddrFromSlice(list[i].IP); ok && x.Unmap() == addrs[0].Unmap() {
				return l.Attrs().Name, nil
			}
		}
	}
	return "", &assay.Error{Kind: assay.Unavailable, Op: "find the pod's link", Err: fmt.Errorf("none has the address %s", addrs[0])}
}

// nextHops are where the pod's default routes lead to: where pods are on a bridge, the node
// asks them from there.
func nextHops() (list []netip.Addr, err error) {
	routes, err := netns.Whole(func() ([]netlink.Route, error) { return netlink.RouteList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		if r.Dst != nil && !r.Dst.IP.IsUnspecified() {
			continue
		}
		if x, ok := netip.AddrFromSlice(r.Gw); ok {
			list = append(list, x.Unmap())
		}
	}
	return list, nil
}

// certified notes which artifacts a new certificate names.
func (a *Agent) certified(w *workload, leaf *x509.Certificate) {
	if a.cfg.Own == nil {
		return
	}
	digest, err := assay.CertificateArtifacts(leaf)
	if err != nil {
		w.log.Error("a certificate's artifacts cannot be read", "err", err)
		return
	}
	w.mu.Lock()
	w.certified = digest
	w.mu.Unlock()
	a.recertify()
}

// recertify has the proxy ask for a certificate when the pod runs something else, as control
// hears from the platform, than its last one says, or has none: once for each set, since what
// was published may be older than the certificate.
func (a *Agent) recertify() {
	if a.cfg.Own == nil {
		return
	}
	for _, w := range a.all() {
		a.mu.Lock()
		var runs assay.Digest
		if r := a.snapshot.resources["workload/"+w.id]; r != nil && r.workload != nil {
			runs = r.workload.Artifacts.Digest()
		}
		a.mu.Unlock()
		w.mu.Lock()
		s := w.session
		news := runs != "" && w.certified != runs && w.asked != runs && s != nil
		if news {
			w.asked = runs
		} else if w.certified == runs {
			w.asked = ""
		}
		w.mu.Unlock()
		if news {
			w.log.Info("what the pod runs is new; a certificate is asked for", "artifacts", runs)
			s.renew()
		}
	}
}
