package control

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/identity"
	"assay.dev/store"
)

// Join exchanges a token and a request for a host's certificate. The host's ID
// follows from the token and the key, so that a join whose answer was lost can be
// repeated with the same key, and with no other.
func (c *Control) Join(ctx context.Context, req *api.JoinRequest) (*api.JoinResponse, error) {
	fail := func(kind assay.Kind, err error, remedy string) (*api.JoinResponse, error) {
		return nil, &assay.Error{Kind: kind, Op: "join", Err: err, Remedy: remedy}
	}
	if c.cfg.Cluster != nil {
		return c.joinNode(ctx, req)
	}
	k := callOf(ctx)
	token, err := assay.ParseJoinToken(req.GetToken())
	if err != nil {
		return fail(assay.Invalid, err, "make a new one with: assay token create")
	}
	k.who, k.subject = "token "+token.ID, cut(req.GetHostName(), 253)
	name, err := api.HostName(req.GetHostName())
	if err != nil {
		return fail(assay.Invalid, err, "")
	}
	csr, err := x509.ParseCertificateRequest(req.GetCsr())
	if err != nil {
		return fail(assay.Invalid, fmt.Errorf("certificate request: %w", err), "")
	}
	// Whoever calls is nobody yet, and there may be many: what they are answered costs
	// no signature and no transaction.
	if !c.model.knowsToken(token.ID, identity.TokenHash(token)) {
		c.catchUp(ctx) // it may be new, from another control
	}
	if !c.model.knowsToken(token.ID, identity.TokenHash(token)) {
		return fail(assay.NotFound, errors.New("there is no such token"), "make a new one with: assay token create")
	}
	id := hostID(token.ID, csr.RawSubjectPublicKeyInfo)
	// The request is checked, with its signature, before the token is spent.
	cert, err := c.authority.IssueHost(req.GetCsr(), id)
	if err != nil {
		return nil, err
	}
	now := c.now()
	spent, err := c.store.ConsumeToken(ctx, token.ID, identity.TokenHash(token), id, now)
	if err != nil {
		return nil, err
	}
	if !now.Before(spent.Expires) { // a repeated join of its own consumer
		return fail(assay.Denied, errors.New("the token has expired"), "make a new one with: assay token create")
	}
	number, err := c.store.AllocatePrefix(ctx, id, c.model.network.hosts())
	if err != nil {
		return nil, err
	}
	prefixes, err := c.model.network.hostPrefixes(number)
	if err != nil {
		return fail(assay.Unavailable, err, "configure a larger network")
	}
	h := store.Host{Host: assay.Host{ID: id, Name: name, Prefixes: prefixes, Covers: spent.Covers}, Joined: now, Seen: now}
	if err := c.storeFor(ctx, "host "+id+" ("+name+")").PutHost(ctx, h); err != nil {
		return nil, err
	}
	c.model.setHost(h)
	c.model.consumed(spent)
	c.inventory(cert, "", id, "")
	return c.joined(id, cert), nil
}

// maxBearer bounds a service account's token; they have about 1 KiB.
const maxBearer = 16 << 10

// joinNode exchanges the token of a node's agent, or of a pod that speaks for itself, and a request
// for the certificate of that host. It may be repeated with another key: whoever has the token is the host.
func (c *Control) joinNode(ctx context.Context, req *api.JoinRequest) (*api.JoinResponse, error) {
	k := callOf(ctx)
	k.who, k.subject = "a service account's token", cut(req.GetHostName(), 253)
	if n := len(req.GetToken()); n == 0 || n > maxBearer {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "join", Err: fmt.Errorf("a token of %d bytes", n), Remedy: "hosts of this mesh are nodes, which join with their agent's service account token"}
	}
	if !c.model.following() {
		return nil, &assay.Error{Kind: assay.Unavailable, Op: "join", Err: errors.New("the API server has not told control yet what there is"), Remedy: "try again"}
	}
	bearer, err := c.cfg.Cluster.Bearer(ctx, req.GetToken())
	if err != nil {
		return nil, err
	}
	who, err := c.model.bearerHost(bearer, c.cfg.Cluster.Sidecars)
	if err != nil {
		return nil, err
	}
	id := who.ID
	k.who = "the agent of node " + who.Node
	if who.Pod != "" {
		k.who = "pod " + who.Name
	}
	now := c.now() // what was signed before is not this host's
	if err := c.model.mayCertify("join", id); err != nil {
		return nil, err
	}
	cert, err := c.issueHost(req.GetCsr(), who)
	if err != nil {
		return nil, err
	}
	h, ok := c.model.host(id)
	if !ok {
		h = store.Host{Host: assay.Host{ID: id}, Joined: now}
	}
	h.Node, h.Pod, h.Name, h.Seen = who.Node, who.Pod, who.Name, now
	db := c.store
	if k.again = ok && h.Pod != ""; !k.again {
		db = c.storeFor(ctx, "host "+id+" ("+h.Name+")")
	}
	if err := db.PutHost(ctx, h); err != nil {
		return nil, err
	}
	c.model.setHost(h)
	c.inventory(cert, "", id, "")
	if c.authority.SignedBy(cert.Leaf.NotBefore).Before(h.Joined) {
		return nil, &assay.Error{Kind: assay.Unavailable, Op: "join", Err: fmt.Errorf("the host joined at another control at %s, and here it is %s", h.Joined.Format(time.RFC3339), now.Format(time.RFC3339)),
			Remedy: "see to the clocks of the controls' machines; it comes right when this one has come so far"}
	}
	return c.joined(id, cert), nil
}

// issueHost signs the certificate of a host that is known.
func (c *Control) issueHost(csr []byte, h store.Host) (*identity.Certificate, error) {
	if h.Pod != "" {
		return c.authority.IssuePod(csr, h.ID)
	}
	return c.authority.IssueHost(csr, h.ID)
}

// nodeID names the host that a node is.
func nodeID(node string) string {
	sum := sha256.Sum256([]byte(node))
	return "node-" + hex.EncodeToString(sum[:8])
}

// hostID names a host after its token and key.
func hostID(token string, spki []byte) string {
	sum := sha256.Sum256(append([]byte(token+"\x00"), spki...))
	return "host-" + hex.EncodeToString(sum[:8])
}

func (c *Control) joined(id string, cert *identity.Certificate) *api.JoinResponse {
	b := c.authority.Bundle()
	return &api.JoinResponse{HostId: id, TrustDomain: c.authority.TrustDomain(), Chain: cert.Chain,
		Bundle: api.FromBundle(b.Version, b.Roots), RenewAt: api.FromTime(cert.RenewAt)}
}

// Renew replaces a host's certificate.
func (c *Control) Renew(ctx context.Context, req *api.RenewRequest) (*api.JoinResponse, error) {
	who := callerOf(ctx)
	h, ok := c.model.host(who.name)
	if !ok {
		return nil, unknownHost(who.name)
	}
	if err := c.model.mayCertify("renew", who.name); err != nil {
		return nil, err
	}
	cert, err := c.issueHost(req.GetCsr(), h)
	if err != nil {
		return nil, err
	}
	c.inventory(cert, "", who.name, "")
	return c.joined(who.name, cert), nil
}

// Issue signs a workload's certificate. It asks nobody: what it checks is in
// memory, so renewals go on while the store is away.
func (c *Control) Issue(ctx context.Context, req *api.IssueRequest) (*api.IssueResponse, error) {
	who := callerOf(ctx)
	w, err := c.model.mayIssue(who.name, req.GetWorkloadId())
	if err != nil {
		if assay.KindOf(err) != assay.Denied {
			return nil, err
		}
		c.model.findingBy(who.name, assay.Finding{Kind: "certificate-refused", Subject: cut(req.GetWorkloadId(), 128), Detail: "host " + who.name + ": " + err.Error()})
		return refusal(err), nil
	}
	set, err := c.evidence(who.name, w, req)
	if err != nil {
		return nil, err
	}
	if len(set) == 0 {
		return refusal(&assay.Error{Err: errors.New("the agent attested no artifact"), Remedy: "start the workload through the agent"}), nil
	}
	if err := ctx.Err(); err != nil {
		// When thousands ask at once, those who have given up and ask again come first.
		return nil, &assay.Error{Kind: assay.Unavailable, Op: "issue for workload " + w.ID, Err: err, Remedy: "ask again"}
	}
	if err := c.model.mayCertify("issue for workload "+w.ID, who.name); err != nil {
		return nil, err
	}
	cert, err := c.authority.IssueWorkload(req.GetCsr(), w.Identity, set.Digest())
	if err != nil {
		return nil, err
	}
	c.inventory(cert, w.ID, w.Host, set.Digest())
	return &api.IssueResponse{Chain: cert.Chain, RenewAt: api.FromTime(cert.RenewAt)}, nil
}

// evidence is what a workload runs: what its host's agent attests or, of a pod that speaks for
// itself, what the platform says.
func (c *Control) evidence(host string, w *assay.Workload, req *api.IssueRequest) (assay.ArtifactSet, error) {
	op := "issue for workload " + w.ID
	if h, _ := c.model.host(host); h.Pod != "" {
		if len(w.Artifacts) == 0 {
			return nil, &assay.Error{Kind: assay.NotFound, Op: op, Err: errors.New("the API server knows of no image that the pod runs yet"), Remedy: "try again when one of its containers has started"}
		}
		return w.Artifacts, nil
	}
	set, err := api.Artifacts(req.GetArtifacts())
	if err != nil {
		return nil, &assay.Error{Kind: assay.Invalid, Op: op, Err: err}
	}
	return set, nil
}

func refusal(err error) *api.IssueResponse {
	r := &api.IssueResponse{Refused: err.Error()}
	if e, ok := errors.AsType[*assay.Error](err); ok {
		r.Refused, r.Remedy = strings.TrimSuffix(e.Err.Error(), "."), e.Remedy
	}
	return r
}

// mayIssue returns the workload that a host asks a certificate for. Everything that
// was true when the workload was reported is asked again: a host's covers may have
// changed.
func (m *model) mayIssue(hostID, id string) (*assay.Workload, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	op := "issue for workload " + cut(id, 128)
	h := m.hosts[hostID]
	if h == nil {
		return nil, unknownHost(hostID)
	}
	w, ok := m.catalog.Workload(id)
	switch {
	case !ok:
		return nil, &assay.Error{Kind: assay.NotFound, Op: op, Err: errors.New("it was not reported, or not yet"), Remedy: "report the workload and wait until it is accepted"}
	case w.Host != hostID:
		return nil, &assay.Error{Kind: assay.Denied, Op: op, Err: fmt.Errorf("it runs on another host")}
	case m.cluster != nil && !m.cluster.told:
		return w, nil // it was asked when it was reported, and a restart of control is no reason to end it
	}
	err := m.mayRun(h, w)
	if early, ok := errors.AsType[tooEarly](err); ok {
		return nil, &assay.Error{Kind: assay.NotFound, Op: op, Err: early, Remedy: "try again when the API server says so"}
	}
	if denied, ok := errors.AsType[*assay.Error](err); ok {
		return nil, &assay.Error{Kind: denied.Kind, Op: op, Err: denied.Err, Remedy: denied.Remedy}
	}
	return w, nil
}

// inventory records a certificate that was issued.
func (c *Control) inventory(cert *identity.Certificate, workload, host string, artifacts assay.Digest) {
	c.model.issued(inventoryLine(cert, workload, host, artifacts))
}

func inventoryLine(cert *identity.Certificate, workload, host string, artifacts assay.Digest) store.Certificate {
	return store.Certificate{
		Serial: fmt.Sprintf("%032x", cert.Leaf.SerialNumber), Subject: cert.Leaf.URIs[0].String(), Workload: workload, Host: host,
		Artifacts: artifacts, Issuer: fmt.Sprintf("%032x", cert.Issuer.SerialNumber),
		NotBefore: cert.Leaf.NotBefore, NotAfter: cert.Leaf.NotAfter, IssuedAt: cert.Issued,
	}
}
