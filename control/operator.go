package control

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/discovery"
	"assay.dev/identity"
	"assay.dev/store"
)

// Apply validates files together with what is declared already, stores them and
// puts them into effect, or changes nothing.
func (c *Control) Apply(ctx context.Context, req *api.ApplyRequest) (*api.ApplyResponse, error) {
	var files []discovery.File
	var names []string
	for _, f := range req.GetFiles() {
		files = append(files, discovery.File{Name: f.GetName(), YAML: f.GetYaml()})
		names = append(names, f.GetName())
	}
	subject := strings.Join(names, " ")
	if req.GetPrune() {
		subject += " (prune)"
	}
	var changes []store.Change
	var err error
	if req.GetDryRun() {
		callOf(ctx).subject = subject + " (dry run)"
		var p *plan
		c.intent.mu.Lock()
		if p, err = c.plan(fromApply, files, req.GetPrune()); err == nil {
			changes = p.changes
		}
		c.intent.mu.Unlock()
	} else {
		changes, err = c.apply(ctx, c.storeFor(ctx, subject), fromApply, files, req.GetPrune())
	}
	if err != nil {
		return nil, err
	}
	resp := &api.ApplyResponse{}
	for _, ch := range changes {
		resp.Changes = append(resp.Changes, &api.Change{Kind: ch.Kind, Namespace: ch.Namespace, Name: ch.Name, Action: string(ch.Action)})
	}
	return resp, nil
}

// Delete removes one object of intent, or forgets a host.
func (c *Control) Delete(ctx context.Context, req *api.DeleteRequest) (*api.DeleteResponse, error) {
	key := store.Key{Kind: req.GetKind(), Namespace: req.GetNamespace(), Name: req.GetName()}
	callOf(ctx).subject = key.String()
	var err error
	switch strings.ToLower(req.GetKind()) {
	case "host", "hosts":
		err = c.deleteHost(ctx, req.GetName())
	case "token", "tokens":
		err = c.deleteToken(ctx, req.GetName())
	case "certificate", "certificates":
		err = c.refuseCertificate(ctx, req.GetName())
	default:
		err = c.remove(ctx, key)
	}
	if err != nil {
		return nil, err
	}
	return &api.DeleteResponse{}, nil
}

// deleteHost cuts a host off and forgets it with its workloads. Its token goes
// too: it could be used again by whoever has the host's key.
func (c *Control) deleteHost(ctx context.Context, id string) error {
	op := "delete host " + id
	if _, ok := c.model.host(id); !ok {
		return &assay.Error{Kind: assay.NotFound, Op: op, Err: errors.New("there is no such host"), Remedy: "see assay get hosts"}
	}
	if id == localHost {
		return &assay.Error{Kind: assay.Conflict, Op: op, Err: errors.New("control runs on it")}
	}
	if token, ok := c.model.tokenOf(id); ok {
		if err := c.deleteToken(ctx, token); err != nil {
			return err
		}
	}
	err := c.behind.alone(id, func() error {
		_, err := c.storeFor(ctx, "host "+id).DeleteHost(ctx, id)
		if err == nil {
			c.model.removeHost(id)
		}
		return err
	})
	return err
}

func (c *Control) deleteToken(ctx context.Context, id string) error {
	found, err := c.storeFor(ctx, "token "+id).DeleteToken(ctx, id)
	if err == nil && !found {
		err = &assay.Error{Kind: assay.NotFound, Op: "delete token " + id, Err: errors.New("there is no such token"), Remedy: "see assay get tokens"}
	}
	if err == nil {
		c.model.forgetToken(id)
	}
	return err
}

// Bounds of a token's life.
const (
	leastTokenLife = time.Minute
	mostTokenLife  = 7 * 24 * time.Hour
)

// CreateToken makes a one-time join token.
func (c *Control) CreateToken(ctx context.Context, req *api.CreateTokenRequest) (*api.CreateTokenResponse, error) {
	fail := func(err error, remedy string) (*api.CreateTokenResponse, error) {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "create a token", Err: err, Remedy: remedy}
	}
	if c.cfg.Cluster != nil {
		return fail(errors.New("hosts of this mesh are nodes, which join with their agent's service account token"), "run the agent on the node")
	}
	list := req.GetCovers()
	callOf(ctx).subject = cut(strings.Join(list, " "), 1000)
	if len(list) == 0 || len(list) > 100 {
		return fail(fmt.Errorf("%d patterns", len(list)), "say with 1 to 100 patterns NAMESPACE/SERVICE what the host may run")
	}
	for _, p := range list {
		if !api.ValidCover(p) {
			return fail(fmt.Errorf("pattern %q", p), "want NAMESPACE/SERVICE, each a name or '*'")
		}
	}
	life := time.Duration(req.GetTtlSeconds()) * time.Second
	if req.GetTtlSeconds() < 0 || req.GetTtlSeconds() > int64(mostTokenLife/time.Second) || life < leastTokenLife {
		return fail(fmt.Errorf("a life of %d s", req.GetTtlSeconds()), "want a minute to seven days")
	}
	token, hash := identity.NewToken(c.authority.SigningRoot())
	now := c.now()
	t := store.Token{ID: token.ID, Hash: hash, Covers: list, Creator: callerOf(ctx).who, Created: now, Expires: now.Add(life)}
	if err := c.storeFor(ctx, "token "+token.ID+" for "+strings.Join(list, " ")).CreateToken(ctx, t); err != nil {
		return nil, err
	}
	c.model.consumed(t)
	return &api.CreateTokenResponse{Token: token.String(), Expires: api.FromTime(t.Expires)}, nil
}

// IssueOperator signs a certificate for a person or machine elsewhere.
func (c *Control) IssueOperator(ctx context.Context, req *api.IssueOperatorRequest) (*api.IssueOperatorResponse, error) {
	callOf(ctx).subject = cut(req.GetRole()+" "+req.GetName(), 200)
	if s := req.GetTtlSeconds(); s < 0 || s > int64(identity.MaxOperatorLife/time.Second) {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "sign operator " + cut(req.GetName(), 63), Err: fmt.Errorf("a life of %d s", s), Remedy: "want a minute to 30 days"}
	}
	cert, err := c.authority.IssueOperator(req.GetCsr(), req.GetName(), req.GetRole(), time.Duration(req.GetTtlSeconds())*time.Second)
	if err != nil {
		return nil, err
	}
	// Stored before it is given away: nobody has a certificate that no list shows, or that
	// outlives its root.
	if c.cfg.Authority != nil {
		if err := c.rotate(identity.Tick{}); err != nil {
			return nil, err
		}
	}
	line := inventoryLine(cert, "", "", "")
	if err := c.storeFor(ctx, req.GetRole()+" "+req.GetName()+", serial "+line.Serial).InsertCertificates(ctx, line); err != nil {
		return nil, err
	}
	c.model.noteCertificate(line)
	b := c.authority.Bundle()
	return &api.IssueOperatorResponse{Chain: cert.Chain, Bundle: api.FromBundle(b.Version, b.Roots)}, nil
}

// Rotate begins the replacement of the root.
func (c *Control) Rotate(ctx context.Context, req *api.RotateRequest) (*api.RotateResponse, error) {
	k := callOf(ctx)
	s := req.GetDeadlineSeconds()
	if s < 0 || s > 365*24*3600 {
		return nil, &assay.Error{Kind: assay.Invalid, Op: "rotate", Err: fmt.Errorf("a deadline in %d s", s), Remedy: "want 0 (wait for everybody) to a year"}
	}
	var deadline time.Time
	if s > 0 {
		deadline = c.now().Add(time.Duration(s) * time.Second)
		k.subject = "until " + deadline.UTC().Format(time.RFC3339)
	}
	if err := c.rotate(identity.Rotate{Deadline: deadline}); err != nil {
		return nil, err
	}
	select {
	case c.rotateSoon <- struct{}{}:
	default:
	}
	return &api.RotateResponse{BundleVersion: c.authority.Bundle().Version}, nil
}

// forgetToken forgets a token that was deleted.
func (m *model) forgetToken(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.tokens, id)
}

// noteCertificate keeps a certificate that is stored already.
func (m *model) noteCertificate(c store.Certificate) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.issuedLocked(c)
}

// fingerprint is how people compare certificates.
func fingerprint(c *x509.Certificate) assay.Digest { return assay.DigestOf(c.Raw) }
