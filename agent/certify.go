package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"math/rand/v2"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/link"
)

// Certificates for a proxy, and the bundles that it knows.

// issueWithin bounds one request for a certificate, refusedRetry is when a proxy asks
// again after a refusal that may pass.
const (
	issueWithin  = 10 * time.Second
	refusedRetry = 2 * time.Second
)

func (s *session) acknowledged(ack link.Ack) {
	s.acknowledgedServices(ack.Services)
	s.w.mu.Lock()
	s.g.bundle = max(s.g.bundle, ack.Bundle)
	s.w.mu.Unlock()
	s.w.bundlesChanged()
}

// acknowledgedServices takes in which view's services the proxy uses. Until it has what this
// session sent first it says what another agent told it, who numbered views of its own.
func (s *session) acknowledgedServices(version uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.first == 0 || version < s.first || version > s.sent {
		return
	}
	if version > s.acked {
		s.acked = version
		s.w.wakeUp()
	}
	for len(s.pending) > 0 && s.pending[0].version <= version {
		s.w.a.converge.used(s.pending[0].since)
		s.pending = s.pending[1:]
	}
}

// bundlesChanged tells control which bundle all of the workload's proxies use: a new
// root signs only when the last of them knows it.
func (w *workload) bundlesChanged() {
	w.mu.Lock()
	least := uint64(0)
	for _, g := range w.living() {
		if g.bundle > 0 && (least == 0 || g.bundle < least) {
			least = g.bundle
		}
	}
	news := least > 0 && least != w.bundle
	if news {
		w.bundle = least
	}
	w.mu.Unlock()
	if news {
		w.a.outbox.ack(w.id, least)
	}
}

// renew asks the proxy for a new key and a new request: what it runs has changed.
func (s *session) renew() {
	if err := s.conn.Send(link.KindRenew, 0, nil); err != nil {
		s.w.log.Warn("renewal was not asked for", "err", err)
	}
}

// issue gets a certificate for a proxy. It waits until the workload is attested and
// control has it; the proxy bounds how long connections wait.
func (s *session) issue(ctx context.Context, id uint64, csr link.CSR) {
	for _, l := range []*latch{s.w.attested, s.w.decided} {
		select {
		case <-l.ch:
		case <-ctx.Done():
			return
		}
	}
	if s.w.a.cfg.Hosts == nil {
		s.refuse(id, errors.New("this agent has no control"))
		return
	}
	ctx, cancel := context.WithTimeout(ctx, issueWithin)
	defer cancel()
	w := s.w.noun()
	answer, err := s.w.a.cfg.Hosts.Issue(ctx, &api.IssueRequest{WorkloadId: s.w.id, Csr: csr.DER, Artifacts: api.FromArtifacts(w.Artifacts)})
	if err != nil {
		s.refuse(id, api.StatusError("issue", err))
		return
	}
	c := link.Certificate{Chain: answer.GetChain(), Refused: answer.GetRefused(), Remedy: answer.GetRemedy()}
	if c.RenewAt, err = api.Time(answer.GetRenewAt()); err != nil {
		s.refuse(id, err)
		return
	}
	if c.Refused != "" {
		c.Retry = refusedRetry
		s.w.log.Error("control refused a certificate", "reason", c.Refused, "remedy", c.Remedy)
	} else if len(c.Chain) == 0 {
		s.refuse(id, errors.New("control sent no certificate"))
		return
	} else {
		s.w.issued(c)
	}
	s.conn.Send(link.KindCertificate, id, c)
}

func (s *session) refuse(id uint64, err error) {
	c := link.Certificate{Refused: err.Error(), Retry: refusedRetry/2 + rand.N(refusedRetry)}
	if e, ok := errors.AsType[*assay.Error](err); ok {
		c.Remedy = e.Remedy
	}
	s.w.log.Warn("no certificate", "reason", c.Refused, "retry", c.Retry)
	s.conn.Send(link.KindCertificate, id, c)
}

// issued notes a certificate for the metrics.
func (w *workload) issued(c link.Certificate) {
	w.log.Info("certificate issued", "renew", c.RenewAt)
	leaf, err := x509.ParseCertificate(c.Chain[0])
	if err != nil {
		w.log.Error("control sent a certificate that cannot be read", "err", err)
		return
	}
	w.mu.Lock()
	w.notAfter = leaf.NotAfter
	w.mu.Unlock()
	w.a.certified(w, leaf)
}
