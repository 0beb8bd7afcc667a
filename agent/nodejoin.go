package agent

import (
	"bytes"
	"context"
	"crypto/x509"
	mathrand "math/rand/v2"
	"time"
)

// NodeJoin is how a node of a cluster shows who it is, as often as it must: its agent
// need not wait for control to begin, and joins anew when control's authority is another
// one or the host's certificate has ended.
type NodeJoin struct {
	// Token returns a token of the agent's service account. It lives for an hour or so.
	Token func() (string, error)
	// Roots returns those that control is known by.
	Roots func(ctx context.Context) ([]*x509.Certificate, error)
}

// joinNode joins unless the host has a certificate that control still takes. It tries
// until it has one, or ctx ends.
func (r *Remote) joinNode(ctx context.Context) error {
	said := ""
	for retry := time.Second; ; retry = min(2*retry, 15*time.Second) {
		joined, err := r.joinIfNeeded(ctx)
		if joined && err == nil {
			return nil
		}
		if err != nil && err.Error() != said && ctx.Err() == nil {
			said = err.Error()
			r.cfg.Log.Error("this node has not joined the mesh; its pods wait", "err", err)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(retry/2 + mathrand.N(retry)):
		}
	}
}

func (r *Remote) joinIfNeeded(ctx context.Context) (bool, error) {
	if r.conn.Load() != nil && r.cfg.Now().Before(r.notAfter()) {
		roots, err := r.cfg.Node.Roots(ctx)
		if err != nil || r.knows(roots) {
			// What it has is good, as far as can be known; control decides.
			return true, nil
		}
		r.cfg.Log.Warn("control has another authority than the one this host's certificate is of; it joins anew")
	}
	if err := r.join(ctx); err != nil {
		return false, err
	}
	return true, r.redial()
}

// knows reports whether this host trusts one of the roots already.
func (r *Remote) knows(roots []*x509.Certificate) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, have := range r.host.Roots {
		for _, c := range roots {
			if bytes.Equal(have, c.Raw) {
				return true
			}
		}
	}
	return false
}
