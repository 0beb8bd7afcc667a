package node

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"

	"assay.dev"
)

// Control publishes the roots that hosts know it by in a ConfigMap of Assay's namespace.
const (
	TrustMap = "assay-trust"
	TrustKey = "roots.pem"
)

// SystemRules is what a Source must be allowed in Assay's own namespace, for Roots.
func SystemRules() []rbacv1.PolicyRule {
	return []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"configmaps"}, ResourceNames: []string{TrustMap}, Verbs: []string{"get"}},
	}
}

// Roots reads control's roots. Until control has run once there are none: NotFound.
func (s *Source) Roots(ctx context.Context) ([]*x509.Certificate, error) {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	op := fmt.Sprintf("read control's roots from ConfigMap %s/%s", s.cfg.System, TrustMap)
	object := &corev1.ConfigMap{}
	if err := s.client.Get().Namespace(s.cfg.System).Resource("configmaps").Name(TrustMap).Do(ctx).Into(object); err != nil {
		e := s.failed(op, err).(*assay.Error)
		switch e.Kind {
		case assay.NotFound:
			e.Remedy = "control writes it when it starts: see whether it runs"
		case assay.Denied:
			e.Remedy = "the agent's service account needs get of that ConfigMap"
		}
		return nil, e
	}
	roots, err := ParseRoots([]byte(object.Data[TrustKey]))
	if err != nil {
		return nil, &assay.Error{Kind: assay.Invalid, Op: op, Err: fmt.Errorf("%s: %w", TrustKey, err)}
	}
	return roots, nil
}

// ParseRoots reads certificates in PEM, of which there must be one.
func ParseRoots(text []byte) ([]*x509.Certificate, error) {
	var roots []*x509.Certificate
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			break
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		roots = append(roots, c)
	}
	if len(roots) == 0 {
		return nil, errors.New("it holds no certificate in PEM")
	}
	return roots, nil
}
