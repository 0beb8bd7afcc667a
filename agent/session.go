package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/link"
	"golang.org/x/sys/unix"
)

var errSilent = errors.New("the proxy did not greet")

// session is what is said with one proxy over one connection. Its sender alone writes
// what depends on the view, so that the order on the link is that of package link.
type session struct {
	w    *workload
	g    *generation
	conn *link.Conn
	wake chan struct{}

	knows   bool // the proxy has a snapshot already, from an agent before this one
	patches bool // it takes patches of services

	// What the proxy was told, by the sender.
	configured link.Configure
	told       *view // of its services
	table      uint64
	bundle     uint64
	watches    []assay.Watch

	mu      sync.Mutex
	asked   uint64 // ID of the last report-now
	waiting map[uint64]chan struct{}
	current uint64 // view that the proxy was told of
	first   uint64 // version of the services that it was sent first, all of them; 0: not yet
	sent    uint64 // and of those that it was sent last
	acked   uint64 // and of those that it said it uses
	pending []delta
}

func newSession(w *workload, g *generation, conn *link.Conn) *session {
	conn.Limit(maxFromProxy)
	return &session{w: w, g: g, conn: conn, wake: make(chan struct{}, 1), waiting: map[uint64]chan struct{}{}}
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
	s.knows, s.patches = h.Services > 0, h.Patches
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
	c.Successor, c.Identity.TrustDomain = s.g.successor, s.g.domain
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
	mesh, host, leaving := slices.Clone(w.a.state.Mesh), w.a.state.HostID, w.a.leaving
	var gateways []netip.Addr
	for _, a := range w.a.state.Addresses {
		gateways = append(gateways, a.Gateway())
	}
	if w.given {
		gateways = append(gateways, w.a.addresses...)
	}
	if own := w.a.cfg.Own; own != nil {
		host = own.Node
	}
	w.a.mu.Unlock()
	names, zone := w.a.dns(), w.a.zone()
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
		MeshPrefixes: mesh, Gateways: gateways, DNS: names, CertificateWait: cfg.CertificateWait, OlderGrace: cfg.OlderGrace, Zone: zone, Host: host, Nodes: w.a.view.Load().nodes,
	}
	if w.given {
		c.Probes, c.Transition = w.rec.Given.Probes, w.transition || leaving.Serve
	}
	if cfg.Last {
		c.AgentSocket = ""
	}
	if cfg.Own != nil {
		c.Metrics = cfg.Own.Metrics
	}
	if !withListeners {
		return c, nil, nil
	}
	c.Listeners = w.listeners.roles
	return c, w.listeners.fds, nil
}

// receive follows what the proxy says.
func (s *session) receive(ctx context.Context, g *sync.WaitGroup) error {
	stop := context.AfterFunc(ctx, func() { s.conn.Socket().SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	issuing := make(chan struct{}, 1) // one request at a time: a proxy has one key to certify
	said := newSpeech()
	for {
		m, err := s.conn.Receive()
		if err != nil {
			return err
		}
		m.Discard()
		if !said.of(m.Kind).wait(ctx) {
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
		case link.KindProbe:
			var p link.Probe
			if err := m.Decode(&p); err != nil {
				return err
			}
			s.probed(m.ID, p)
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
