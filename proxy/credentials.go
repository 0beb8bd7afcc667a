package proxy

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"assay.dev"
	"assay.dev/link"
	"assay.dev/proxy/mtls"
)

const (
	defaultCertificateWait = 2 * time.Second
	answerTimeout          = 10 * time.Second
	retryFirst             = 250 * time.Millisecond
	retryMost              = 30 * time.Second
)

// credentials keeps the workload's certificate fresh: the first one as soon as there
// is a bundle, the next ones when the agent says, each with a key of its own that
// mtls makes and keeps. Until a renewal succeeds the old certificate is used.
type credentials struct {
	p    *Proxy
	id   atomic.Pointer[mtls.Identity] // nil before the first Configure
	made atomic.Uint64                 // certificates and bundles that were put to use

	wake chan struct{} // something changed that run looks at

	mu       sync.Mutex
	wait     time.Duration
	asked    uint64        // ID of the last request
	answered chan error    // takes the answer to it; nil when none is awaited
	retry    time.Duration // that came with a refusal
	renewAt  time.Time
	now      bool // a renewal was asked for
}

func newCredentials(p *Proxy) *credentials {
	return &credentials{p: p, wake: make(chan struct{}, 1)}
}

func (c *credentials) configure(id assay.Identity, wait time.Duration) {
	if c.id.Load() == nil {
		c.id.Store(mtls.New(id))
	}
	c.mu.Lock()
	c.wait = cmp.Or(wait, defaultCertificateWait)
	c.mu.Unlock()
}

func (c *credentials) setBundle(b link.Bundle) error {
	id := c.id.Load()
	if id == nil {
		return errors.New("bundle: came before the configuration")
	}
	if err := id.SetBundle(b.Version, b.Roots); err != nil {
		return err
	}
	c.made.Add(1)
	c.poke()
	return nil
}

// generation changes with every certificate and bundle.
func (c *credentials) generation() uint64 { return c.made.Load() }

// status describes what is in use.
func (c *credentials) status() mtls.Status {
	if id := c.id.Load(); id != nil {
		return id.Status()
	}
	return mtls.Status{}
}

// await returns the identity once it can be used, or says that it cannot in time.
func (c *credentials) await(ctx context.Context) (*mtls.Identity, error) {
	id := c.id.Load()
	if id == nil {
		return nil, errors.New("not configured")
	}
	c.mu.Lock()
	wait := c.wait
	c.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	return id, id.Wait(ctx)
}

// kick asks for a new certificate at once.
func (c *credentials) kick() {
	c.mu.Lock()
	c.now = true
	c.mu.Unlock()
	c.poke()
}

// adopted asks a new agent for what the last one did not answer.
func (c *credentials) adopted() {
	c.mu.Lock()
	waiting := c.answered != nil
	c.mu.Unlock()
	if waiting || c.status().Serial == "" {
		c.kick()
	}
}

func (c *credentials) poke() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// answer takes what the agent said to request id.
func (c *credentials) answer(id uint64, reply link.Certificate) {
	var err error
	if reply.Refused != "" {
		err = &assay.Error{Kind: assay.Denied, Op: "get a certificate", Err: errors.New(reply.Refused), Remedy: reply.Remedy}
	} else if err = c.id.Load().Install(reply.Chain); err == nil {
		c.installed(reply.RenewAt)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.answered == nil || id != c.asked && id != 0 {
		return // to an older request: nobody waits for it
	}
	c.retry = reply.Retry
	c.answered <- err
	c.answered = nil
}

// installed puts a new certificate to use: peers see it from the next session on,
// and sessions under the old one take nothing new.
func (c *credentials) installed(renewAt time.Time) {
	s := c.status()
	if life := s.NotAfter.Sub(s.NotBefore); renewAt.IsZero() || renewAt.After(s.NotAfter) {
		renewAt = s.NotBefore.Add(life/2 - rand.N(life/20+1))
	}
	c.mu.Lock()
	c.renewAt = renewAt
	c.mu.Unlock()
	c.made.Add(1)
	c.p.peers.rotate()
	c.p.agent.ack()
	c.p.log.Info("certificate", "serial", s.Serial, "notAfter", s.NotAfter, "renewAt", renewAt)
}

// run asks for certificates when they are due until ctx ends.
func (c *credentials) run(ctx context.Context) {
	backoff := retryFirst
	var retryAt time.Time
	for {
		c.mu.Lock()
		due := c.renewAt
		if c.now {
			due, retryAt, c.now = time.Time{}, time.Time{}, false
		}
		c.mu.Unlock()
		if due.Before(retryAt) {
			due = retryAt
		}
		wait := time.Until(due)
		if c.status().Bundle == 0 {
			wait = time.Hour
		}
		if wait > 0 {
			t := time.NewTimer(min(wait, time.Hour)) // not longer: the wall clock may be set
			select {
			case <-ctx.Done():
			case <-c.wake:
			case <-t.C:
			}
			t.Stop()
			if ctx.Err() != nil {
				return
			}
			continue
		}
		err := c.request(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			backoff, retryAt = retryFirst, time.Time{}
			continue
		}
		c.mu.Lock()
		retry := cmp.Or(c.retry, backoff)
		c.retry = 0
		c.mu.Unlock()
		backoff = min(2*backoff, retryMost)
		c.p.log.Warn("certificate", "error", err, "retry", retry, "inUseUntil", c.status().NotAfter)
		retryAt = time.Now().Add(retry/2 + rand.N(retry/2+1))
	}
}

// request asks once and waits for the answer.
func (c *credentials) request(ctx context.Context) error {
	der, err := c.id.Load().Request()
	if err != nil {
		return err
	}
	answered := make(chan error, 1)
	c.mu.Lock()
	c.asked++
	asked := c.asked
	c.answered = answered
	c.mu.Unlock()
	if err := c.p.agent.send(link.KindCSR, asked, link.CSR{DER: der}); err != nil {
		return err
	}
	t := time.NewTimer(answerTimeout)
	defer t.Stop()
	select {
	case err := <-answered:
		return err
	case <-t.C:
		return errors.New("the agent did not answer the certificate request")
	case <-ctx.Done():
		return ctx.Err()
	}
}
