package proxy

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"assay.dev"
	"assay.dev/link"
)

// redialEvery is how often an orphaned proxy tries to find an agent.
const redialEvery = 200 * time.Millisecond

// agent is the proxy's end of its link. Its reader is the only one that makes
// snapshots.
type agent struct {
	p     *Proxy
	notes []string
	// missed is that a delta of services could not be used: others may be of what it said.
	missed bool

	mu       sync.Mutex
	conn     *link.Conn // nil while there is no agent
	findings []assay.Finding
	told     map[[2]string]time.Time // of findings, so that one is not told again and again
}

const (
	maxFindings  = 64 // that wait for an agent; more are dropped, the counters still tell
	findingEvery = time.Minute
)

func newAgent(p *Proxy, conn *link.Conn, notes []string) *agent {
	return &agent{p: p, conn: conn, notes: notes, told: map[[2]string]time.Time{}}
}

// run speaks with one agent after the other until ctx ends. It fails when the first
// one goes before it configured the proxy: nobody knows then where another would be;
// and when the configuration said that there is no other.
func (a *agent) run(ctx context.Context) error {
	conn := a.conn
	for _, n := range a.notes {
		a.p.log.Warn("sandbox", "note", n)
	}
	for {
		err := a.speak(ctx, conn)
		a.mu.Lock()
		a.conn = nil
		a.mu.Unlock()
		conn.Close()
		if ctx.Err() != nil {
			return nil
		}
		path := a.p.snap.Load().AgentSocket
		if path == "" && a.p.isDraining() {
			<-ctx.Done() // the last bytes need no agent
			return nil
		}
		if path == "" && a.p.snap.Load().Workload != "" {
			return &assay.Error{Op: "follow the agent", Err: errors.New("it has ended, and no other comes")}
		}
		if path == "" {
			return &assay.Error{Op: "wait for configuration", Err: err, Remedy: "assay-proxy is started by an agent"}
		}
		a.p.log.Warn("agent is gone; serving what is known", "error", err)
		if conn = a.redial(ctx, path); conn == nil {
			return nil
		}
	}
}

func (a *agent) redial(ctx context.Context, path string) *link.Conn {
	t := time.NewTicker(redialEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		if conn, err := link.Dial(path); err == nil {
			return conn
		}
	}
}

// speak introduces the proxy and follows what the agent says until the link ends.
func (a *agent) speak(ctx context.Context, conn *link.Conn) error {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := a.hello(conn); err != nil {
		return err
	}
	adopted := a.p.snap.Load().Workload != ""
	if !adopted {
		a.attach(conn)
	}
	for {
		m, err := conn.Receive()
		if err != nil {
			return err
		}
		if adopted { // only an agent that answers has adopted us
			a.attach(conn)
			a.p.creds.adopted()
			adopted = false
		}
		if err := a.handle(ctx, conn, &m); errors.Is(err, errOutOfStep) {
			m.Discard()
			return err // the next agent, or this one on a new link, tells everything anew
		} else if err != nil {
			a.p.log.Error("agent said what cannot be used; keeping what is known", "message", m.Kind, "error", err)
		}
		m.Discard()
	}
}

// errOutOfStep is that the agent takes the proxy to know something else than it does.
var errOutOfStep = errors.New("agent and proxy are out of step")

// attach makes conn the one that everybody sends on, and sends what waited.
func (a *agent) attach(conn *link.Conn) {
	a.mu.Lock()
	a.conn = conn
	waiting := a.findings
	a.findings = nil
	a.mu.Unlock()
	a.p.probes.attached()
	for _, f := range waiting {
		conn.Send(link.KindFinding, 0, f)
	}
}

func (a *agent) hello(conn *link.Conn) error {
	s := a.p.snap.Load()
	h := link.Hello{
		PID: os.Getpid(), Build: a.p.build, Workload: s.Workload,
		Services: s.servicesVersion, Table: s.tableVersion, Patches: true,
	}
	status := a.p.creds.status()
	h.Draining = a.p.isDraining()
	h.Bundle, h.Serial, h.NotAfter = status.Bundle, status.Serial, status.NotAfter
	var files []int
	for role, fd := range a.p.listeners {
		h.Listeners = append(h.Listeners, role)
		files = append(files, fd)
	}
	return conn.Send(link.KindHello, 0, h, files...)
}

// handle follows one message. An error leaves everything as it was.
func (a *agent) handle(ctx context.Context, conn *link.Conn, m *link.Message) error {
	p, old := a.p, a.p.snap.Load()
	switch m.Kind {
	case link.KindConfigure:
		var c link.Configure
		if err := m.Decode(&c); err != nil {
			return err
		}
		if old.Workload != "" && (c.Workload != old.Workload || c.Identity != old.Identity) {
			return fmt.Errorf("configure: is for %s (%s), this is the proxy of %s", c.Workload, c.Identity, old.Workload)
		}
		if c.Workload == "" || c.Identity.IsZero() || len(c.Addrs) == 0 {
			return errors.New("configure: names no workload, identity or address")
		}
		for i := range c.Addrs {
			c.Addrs[i] = c.Addrs[i].Unmap()
		}
		if len(c.Listeners) > 0 {
			if err := p.takeListeners(c.Listeners, m.Take()); err != nil {
				return err
			}
		}
		p.names.SetMark(c.OwnMark)
		p.creds.configure(c.Identity, c.CertificateWait)
		p.learn(old.withConfigure(c, p))
		if p.accepting.Load() { // adopted by another agent
			return conn.Send(link.KindReady, 0, nil)
		}
	case link.KindServices:
		if err := a.takeServices(old, m); err != nil {
			return err
		}
		a.ack()
	case link.KindTable:
		var t link.Table
		if err := m.Decode(&t); err != nil {
			return err
		}
		if len(m.Files) != 1 {
			return fmt.Errorf("table: %d descriptors, want one", len(m.Files))
		}
		table, err := link.OpenTable(m.Take()[0])
		if err != nil {
			return err
		}
		p.learn(old.withTable(table, t.Version))
		a.ack()
	case link.KindBundle:
		var b link.Bundle
		if err := m.Decode(&b); err != nil {
			return err
		}
		if err := p.creds.setBundle(b); err != nil {
			return err
		}
		p.peers.rotate()
		a.ack()
	case link.KindCertificate:
		var c link.Certificate
		if err := m.Decode(&c); err != nil {
			return err
		}
		if p.creds.id.Load() == nil {
			return errors.New("certificate: came before the configuration")
		}
		p.creds.answer(m.ID, c)
	case link.KindProbed:
		var is link.Probed
		if err := m.Decode(&is); err != nil {
			return err
		}
		p.probes.answer(m.ID, is.Kubelet)
	case link.KindRenew:
		p.creds.kick()
	case link.KindWatch:
		var w link.Watch
		if err := m.Decode(&w); err != nil {
			return err
		}
		p.watcher.set(w.List)
	case link.KindReportNow:
		return conn.Send(link.KindReport, m.ID, p.report())
	case link.KindDrain:
		var d link.Drain
		if err := m.Decode(&d); err != nil {
			return err
		}
		var heir *link.Conn
		if len(m.Files) > 0 {
			var err error
			if heir, err = fileConn(m); err != nil {
				return err
			}
		}
		p.Drain(d.Deadline, heir)
	case link.KindInherit:
		from, err := fileConn(m)
		if err != nil {
			return err
		}
		p.begin()
		p.wg.Go(func() { p.inherit(ctx, from) })
	default:
		return fmt.Errorf("%s: unknown message", m.Kind)
	}
	was := p.accepting.Load()
	if err := p.accept(ctx); err != nil {
		return err
	}
	if !was && p.accepting.Load() {
		return conn.Send(link.KindReady, 0, nil)
	}
	return nil
}

// takeServices makes what is known what a delta says.
func (a *agent) takeServices(old *snapshot, m *link.Message) error {
	missed := a.missed
	a.missed = true
	var d link.Services
	if err := m.Decode(&d); err != nil {
		return err
	}
	if !d.Full && !old.hasServices {
		return errors.New("services: a delta before anything that it could change")
	}
	if missed && len(d.Patch) > 0 {
		return fmt.Errorf("%w: patches of what could not be used", errOutOfStep)
	}
	if err := old.patched(&d); err != nil {
		return fmt.Errorf("%w: %w", errOutOfStep, err)
	}
	a.missed = missed && !d.Full
	a.p.learn(old.withServices(d, a.p))
	return nil
}

// learn puts a snapshot in use.
func (p *Proxy) learn(s *snapshot) {
	p.snap.Store(s)
	p.guestList.changed()
}

// ack tells which versions are in use.
func (a *agent) ack() {
	s, status := a.p.snap.Load(), a.p.creds.status()
	a.send(link.KindAck, 0, link.Ack{Services: s.servicesVersion, Table: s.tableVersion, Bundle: status.Bundle, Serial: status.Serial})
}

// send sends to the agent, if there is one.
func (a *agent) send(kind link.Kind, id uint64, body any) error {
	a.mu.Lock()
	conn := a.conn
	a.mu.Unlock()
	if conn == nil {
		return errors.New("there is no agent")
	}
	return conn.Send(kind, id, body)
}

// find sends a finding, or keeps it for the next agent.
func (a *agent) find(f assay.Finding) {
	key := [2]string{f.Kind, f.Subject}
	a.mu.Lock()
	if f.Time.Sub(a.told[key]) < findingEvery {
		a.mu.Unlock()
		return
	}
	if len(a.told) >= 1024 {
		clear(a.told)
	}
	a.told[key] = f.Time
	conn := a.conn
	if conn == nil && len(a.findings) < maxFindings {
		a.findings = append(slices.Clip(a.findings), f)
	}
	a.mu.Unlock()
	a.p.log.Warn("finding", "kind", f.Kind, "subject", f.Subject, "detail", f.Detail, "remedy", f.Remedy)
	if conn != nil {
		conn.Send(link.KindFinding, 0, f)
	}
}
