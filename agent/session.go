package agent

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/api"
	"assay.dev/link"
	"golang.org/x/sys/unix"
)

// issueWithin bounds one request for a certificate, refusedRetry is when a proxy asks
// again after a refusal that may pass.
const (
	issueWithin  = 10 * time.Second
	refusedRetry = 2 * time.Second
)

var errSilent = errors.New("the proxy did not greet")

// session is what is said with one proxy over one connection. Its sender alone writes
// what depends on the view, so that the order on the link is that of package link.
type session struct {
	w    *workload
	g    *generation
	conn *link.Conn
	wake chan struct{}

	knows bool // the proxy has a snapshot already, from an agent before this one

	// What the proxy was told, by the sender.
	configured link.Configure
	services   map[string]version
	routes     map[string]version
	namespace  assay.NamespaceConfig
	table      uint64
	bundle     uint64
	watches    []assay.Watch

	mu      sync.Mutex
	asked   uint64 // ID of the last report-now
	waiting map[uint64]chan struct{}
	current uint64 // view that the proxy was told of
	sent    uint64 // version of the services that it was sent last
	acked   uint64 // and of those that it said it uses
}

func newSession(w *workload, g *generation, conn *link.Conn) *session {
	conn.Limit(maxFromProxy)
	return &session{w: w, g: g, conn: conn, wake: make(chan struct{}, 1), services: map[string]version{}, routes: map[string]version{}, waiting: map[uint64]chan struct{}{}}
}

func (s *session) wakeUp() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// run speaks until the connection or ctx ends. greeting is the proxy's Hello when it
// was read already.
func (s *session) run(ctx context.Context, greeting link.Message) error {
	life := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer s.conn.Close()
	if greeting.Kind == "" {
		s.conn.Socket().SetReadDeadline(time.Now().Add(helloWithin))
		stop := context.AfterFunc(ctx, func() { s.conn.Close() })
		m, err := s.conn.Receive()
		stop()
		if err != nil {
			return fmt.Errorf("%w: %w", errSilent, err)
		}
		s.conn.Socket().SetReadDeadline(time.Time{})
		greeting = m
	}
	if err := s.greet(greeting); err != nil {
		return err
	}
	s.w.mu.Lock()
	s.g.session = s
	if s.w.current == s.g {
		s.w.session = s
	}
	s.w.mu.Unlock()
	defer func() {
		s.w.mu.Lock()
		s.g.session = nil
		if s.w.session == s {
			s.w.session = nil
		}
		s.w.mu.Unlock()
	}()
	s.w.drainOlder()
	var g sync.WaitGroup
	defer g.Wait()
	// A proxy that reads nothing must not hold up its workload's end.
	stop := context.AfterFunc(ctx, func() { s.conn.Socket().SetWriteDeadline(time.Now().Add(time.Second)) })
	defer stop()
	g.Go(func() { cancel(s.receive(ctx, &g)) })
	err := s.send(ctx)
	if cause := context.Cause(life); cause != nil && !errors.Is(cause, errAgentStops) {
		// The workload has ended: the proxy finishes what it has.
		s.conn.Send(link.KindDrain, 0, link.Drain{Deadline: time.Now().Add(drainWithin / 2)})
	}
	s.conn.Close()
	return err
}

// greet takes in Hello and answers with Configure.
func (s *session) greet(m link.Message) error {
	defer m.Discard()
	var h link.Hello
	if m.Kind != link.KindHello {
		return fmt.Errorf("%w: it began with %s", errSilent, m.Kind)
	}
	if err := m.Decode(&h); err != nil {
		return err
	}
	w := s.w
	if h.Workload != "" && h.Workload != w.id {
		return fmt.Errorf("proxy %d is of %s", h.PID, h.Workload)
	}
	s.knows = h.Services > 0
	w.mu.Lock()
	back := &listeners{roles: h.Listeners, fds: m.Files}
	switch {
	case w.listeners == nil && back.complete(w.rec.roles()):
		if err := back.verify(w.ns, w.rec.roles(), w.rec.Outbound, w.rec.Inbound); err != nil {
			w.mu.Unlock()
			return fmt.Errorf("proxy %d: %w", h.PID, err)
		}
		back.fds = m.Take() // the agent that made them is gone
		w.listeners, w.rec.Listeners = back, back.inodes()
	case w.listeners == nil && h.Workload != "":
		w.mu.Unlock()
		return fmt.Errorf("proxy %d has no listeners", h.PID)
	}
	s.g.bundle, s.g.told = h.Bundle, h.Draining
	if h.NotAfter.After(w.notAfter) {
		w.notAfter = h.NotAfter
	}
	w.mu.Unlock()
	w.bundlesChanged() // whether the stream to control began before or after: it hears of it
	c, files, err := w.configuration(len(h.Listeners) == 0)
	if err != nil {
		return err
	}
	c.Successor = s.g.successor
	if err := w.save(); err != nil { // the listeners' ports may be new
		return err
	}
	s.configured = c
	return s.conn.Send(link.KindConfigure, 0, c, files...)
}

// configuration returns what a proxy is configured with, and the listeners if it
// needs them.
func (w *workload) configuration(withListeners bool) (link.Configure, []int, error) {
	w.a.mu.Lock()
	mesh := slices.Clone(w.a.state.Mesh)
	var gateways []netip.Addr
	for _, a := range w.a.state.Addresses {
		gateways = append(gateways, a.Gateway())
	}
	w.a.mu.Unlock()
	names := w.a.dns()
	cfg := &w.a.cfg
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.listeners == nil {
		l, out, in, err := listen(w.ns, w.rec.roles(), w.rec.Outbound, w.rec.Inbound)
		if errors.Is(err, unix.EADDRINUSE) {
			l, out, in, err = listen(w.ns, w.rec.roles(), 0, 0)
		}
		if err != nil {
			return link.Configure{}, nil, err
		}
		w.listeners, w.rec.Outbound, w.rec.Inbound, w.rec.Listeners = l, out, in, l.inodes()
		w.wakeUp() // new ports need new rules
	}
	c := link.Configure{
		Workload: w.id, Identity: w.rec.Workload.Identity, Addrs: w.addrs,
		Config:      w.a.view.Load().config(w.rec.Workload.Namespace),
		AgentSocket: w.a.socketPath(), OwnMark: cfg.OwnMark, ReturnMark: cfg.ReturnMark,
		MeshPrefixes: mesh, Gateways: gateways, DNS: names, CertificateWait: cfg.CertificateWait, Zone: cfg.Zone,
	}
	if cfg.Last {
		c.AgentSocket = ""
	}
	if !withListeners {
		return c, nil, nil
	}
	c.Listeners = w.listeners.roles
	return c, w.listeners.fds, nil
}

// send brings the proxy up to date with each new view, until ctx ends.
func (s *session) send(ctx context.Context) error {
	if s.knows {
		select { // what it knows is at least as new as what this agent read
		case <-s.w.a.fresh.ch:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	full := true
	for {
		if err := s.update(s.w.a.view.Load(), full); err != nil {
			return err
		}
		full = false
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.wake:
		}
	}
}

// uses reports whether the proxy uses the services of view number n, or newer ones.
func (s *session) uses(n uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current >= n && s.acked >= min(s.sent, n)
}

func (s *session) update(v *view, full bool) error {
	c, _, err := s.w.configuration(false)
	if err != nil {
		return err
	}
	c.Listeners, c.Config, c.Successor = s.configured.Listeners, s.configured.Config, s.configured.Successor
	if !reflect.DeepEqual(c, s.configured) {
		again := c
		again.Listeners = nil
		if err := s.conn.Send(link.KindConfigure, 0, again); err != nil {
			return err
		}
		s.configured = c
	}
	if version, fd, err := s.w.a.tableCopy(); err != nil {
		return err
	} else if fd >= 0 {
		if version != s.table {
			err = s.conn.Send(link.KindTable, 0, link.Table{Version: version}, fd)
			s.table = version
		}
		unix.Close(fd)
		if err != nil {
			return err
		}
	}
	if err := s.updateServices(v, full); err != nil {
		return err
	}
	if err := s.updateWatches(v); err != nil {
		return err
	}
	s.mu.Lock()
	news := s.current != v.number
	s.current = v.number
	s.mu.Unlock()
	if news {
		s.w.wakeUp() // the view may have had nothing for the proxy to acknowledge
	}
	if v.bundle != nil && v.bundle.Version != s.bundle {
		if err := s.conn.Send(link.KindBundle, 0, v.bundle); err != nil {
			return err
		}
		s.bundle = v.bundle.Version
	}
	return nil
}

func (s *session) updateServices(v *view, full bool) error {
	delta := link.Services{Version: v.number, Full: full}
	for key, x := range v.services {
		if sent, ok := s.services[key]; !ok || sent != x.version {
			delta.Upsert = append(delta.Upsert, *x.service)
		}
	}
	for key := range s.services {
		if _, there := v.services[key]; !there {
			delta.Remove = append(delta.Remove, key)
			delete(s.services, key)
		}
	}
	namespace := s.w.noun().Namespace
	for key, x := range v.routes {
		if sent, ok := s.routes[key]; !ok || sent != x.version {
			if r, here := routeFor(x.route, namespace); here {
				delta.Routes = append(delta.Routes, r)
			} else if ok {
				delta.RemoveRoutes = append(delta.RemoveRoutes, key)
			}
		}
	}
	for key := range s.routes {
		if _, there := v.routes[key]; !there {
			delta.RemoveRoutes = append(delta.RemoveRoutes, key)
			delete(s.routes, key)
		}
	}
	if config := v.config(namespace); full || !reflect.DeepEqual(config, s.namespace) {
		delta.Config, s.namespace = &config, config
	}
	if !full && len(delta.Upsert) == 0 && len(delta.Remove) == 0 && delta.Config == nil && len(delta.Routes) == 0 && len(delta.RemoveRoutes) == 0 {
		return nil
	}
	s.mu.Lock()
	s.sent = delta.Version
	s.mu.Unlock()
	if err := s.conn.Send(link.KindServices, 0, delta); err != nil {
		return err
	}
	for key, x := range v.services {
		s.services[key] = x.version
	}
	for key, x := range v.routes {
		s.routes[key] = x.version
	}
	return nil
}

// routeFor returns what of a route workloads of a namespace meet: a consumer's route is
// for its own namespace alone.
func routeFor(r *assay.Route, namespace string) (assay.Route, bool) {
	out := *r
	out.Parents = nil
	for _, p := range r.Parents {
		if r.Producer(p) || r.Namespace == namespace {
			out.Parents = append(out.Parents, p)
		}
	}
	return out, len(out.Parents) > 0
}

// receive follows what the proxy says.
func (s *session) receive(ctx context.Context, g *sync.WaitGroup) error {
	stop := context.AfterFunc(ctx, func() { s.conn.Socket().SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	issuing := make(chan struct{}, 1) // one request at a time: a proxy has one key to certify
	said := newPace(messageEvery, messageBurst)
	for {
		m, err := s.conn.Receive()
		if err != nil {
			return err
		}
		m.Discard()
		if !said.wait(ctx) {
			return context.Cause(ctx)
		}
		switch m.Kind {
		case link.KindReady:
			s.w.markMeshed()
			s.g.accepts.set()
		case link.KindCSR:
			var csr link.CSR
			if err := m.Decode(&csr); err != nil {
				return err
			}
			if !s.w.requests.allow() {
				s.conn.Send(link.KindCertificate, m.ID, link.Certificate{Refused: "this workload's proxies ask too often", Retry: refusedRetry})
				continue
			}
			select {
			case issuing <- struct{}{}:
				id := m.ID
				g.Go(func() {
					defer func() { <-issuing }()
					s.issue(ctx, id, csr)
				})
			default:
				s.refuse(m.ID, errors.New("another request of this proxy is being answered"))
			}
		case link.KindAck:
			var ack link.Ack
			if err := m.Decode(&ack); err != nil {
				return err
			}
			s.acknowledged(ack)
		case link.KindReport:
			if !s.isAwaited(m.ID) {
				continue
			}
			var r link.Report
			if err := m.Decode(&r); err != nil {
				return err
			}
			if err := s.w.checkReport(&r); err != nil {
				s.w.log.Error("the proxy's report is not passed on", "err", err)
				continue
			}
			s.reported(m.ID, &r)
		case link.KindRecords:
			var r link.Records
			if err := m.Decode(&r); err != nil {
				return err
			}
			s.records(&r)
		case link.KindFinding:
			var f assay.Finding
			if err := m.Decode(&f); err != nil {
				return err
			}
			if !s.w.findings.allow() {
				continue // the counters still tell
			}
			if err := s.w.checkFinding(&f); err != nil {
				s.w.log.Error("the proxy's finding is not passed on", "err", err)
				continue
			}
			s.w.a.outbox.finding(&f)
		default:
			s.w.log.Warn("the proxy said what this agent does not know", "kind", m.Kind)
		}
	}
}

func (s *session) acknowledged(ack link.Ack) {
	s.mu.Lock()
	if ack.Services > s.acked {
		s.acked = ack.Services
		s.w.wakeUp()
	}
	s.mu.Unlock()
	s.w.mu.Lock()
	s.g.bundle = max(s.g.bundle, ack.Bundle)
	s.w.mu.Unlock()
	s.w.bundlesChanged()
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
}
