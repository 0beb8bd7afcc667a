package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"assay.dev"
	"assay.dev/link"
	"assay.dev/proxy/dns"
	"assay.dev/proxy/egress"
	"assay.dev/proxy/golden"
	"assay.dev/proxy/guard"
	"assay.dev/proxy/http1"
	"assay.dev/proxy/http2"
	"assay.dev/proxy/nowait"
	"golang.org/x/sys/unix"
)

// Options are what a proxy needs besides its link.
type Options struct {
	Log   *slog.Logger
	Build string // version, for Hello
	// Notes are told to the agent in the log once it is there: what of the sandbox
	// this kernel does not have.
	Notes []string
}

// Proxy is one workload's proxy.
type Proxy struct {
	log     *slog.Logger
	build   string
	started time.Time

	snap      atomic.Pointer[snapshot]
	creds     *credentials
	peers     *peers
	agent     *agent
	probes    probes
	guestList guestList
	rec       *golden.Recorder
	names     *dns.Server
	known     *egress.Names // of addresses outside
	shown     remotes
	// What is watched, nil for nothing, and what was seen.
	watches  atomic.Pointer[watches]
	watcher  *watcher
	http     httpEngines
	http2    http2Engines
	guard    guard.Service // of requests to addresses that are no service's
	pipes    kernelPipes
	decided  guard.Registry
	refusals refusalLog
	mirrors  chan struct{} // slots for copies of requests
	sift     chan struct{} // slots for handshakes as a server

	listeners map[string]int // descriptors by role: what the agent gave, to be handed back
	accepting atomic.Bool

	ctx      context.Context // of Run, for what outlives the connection that asked for it
	wg       sync.WaitGroup  // everything that Run waits for
	draining chan struct{}   // closed: accept nothing more
	drain    sync.Once
	sooner   chan struct{}             // the deadline was brought forward
	heir     atomic.Pointer[link.Conn] // takes what can move while draining

	mu       sync.Mutex
	sessions map[*session]struct{} // all that run, of both sides
	work     int                   // connections being served, and what may bring more
	idle     chan struct{}         // closed when a drain has nothing to wait for any more
	deadline time.Time             // of the drain
}

// maxHandshakes bounds the handshakes that run at once: each costs a signature.
const maxHandshakes = 64

// New makes a proxy over its link, which it closes when Run returns.
func New(conn *link.Conn, o Options) *Proxy {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	p := &Proxy{
		log:       o.Log,
		build:     o.Build,
		started:   time.Now(),
		rec:       golden.New(0),
		pipes:     make(kernelPipes, 64),
		probes:    newProbes(),
		guestList: newGuestList(),
		sift:      make(chan struct{}, maxHandshakes),
		mirrors:   make(chan struct{}, maxMirrors),
		listeners: map[string]int{},
		draining:  make(chan struct{}),
		sessions:  map[*session]struct{}{},
		idle:      make(chan struct{}),
		sooner:    make(chan struct{}, 1),
	}
	p.refusals.log = p.log
	p.snap.Store(&snapshot{})
	p.guard.Counts = p.decided.Of("")
	p.known = egress.NewNames(time.Now)
	p.creds = newCredentials(p)
	p.peers = newPeers(p)
	p.watcher = newWatcher(p)
	p.http.in = http1.NewInbound(application{p}, http1.InboundConfig{})
	p.http2.out.Config.Memory = http2.NewMemory(0)
	p.http2.in = http2.NewInbound(application2{p}, http2.InboundConfig{Config: p.http2.out.Config})
	p.agent = newAgent(p, conn, o.Notes)
	p.names = dns.NewServer(dns.Options{Snapshot: func() *dns.Snapshot { return p.snap.Load().named() }, Log: o.Log, Answered: p.known.Add})
	return p
}

// Run serves until ctx ends, or a drain is complete (nil).
func (p *Proxy) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p.ctx = ctx
	p.wg.Go(func() { p.creds.run(ctx) })
	p.wg.Go(func() { p.peers.janitor(ctx) })
	p.wg.Go(func() { p.watcher.run(ctx) })
	p.wg.Go(func() { p.limitGuests(ctx) })
	p.wg.Go(func() { p.http.in.Run(ctx) })
	p.wg.Go(func() { p.http2.in.Run(ctx) })
	p.wg.Go(func() {
		if err := p.agent.run(ctx); err != nil {
			cancel(err)
		}
	})
	p.wg.Go(func() { p.awaitDrain(ctx, cancel) })
	<-ctx.Done()
	p.closeListeners()
	p.closeSessions(errors.New("proxy ends"))
	p.wg.Wait()
	p.refusals.close()
	p.pipes.closeAll()
	for _, fd := range p.listeners {
		unix.Close(fd)
	}
	if err := context.Cause(ctx); !errors.Is(err, errDrained) {
		return err
	}
	return nil
}

var errDrained = errors.New("drained")

// takeListeners keeps the descriptors that came with Configure.
func (p *Proxy) takeListeners(roles []string, files []int) error {
	if len(roles) != len(files) {
		return fmt.Errorf("configure: %d listener roles with %d descriptors", len(roles), len(files))
	}
	for i, role := range roles {
		if _, has := p.listeners[role]; has {
			unix.Close(files[i]) // and accepts on it
			continue
		}
		p.listeners[role] = files[i]
	}
	return nil
}

// accept starts to accept once everything that a connection needs is known, and
// says so. Connections made before wait in the backlog.
func (p *Proxy) accept(ctx context.Context) error {
	s := p.snap.Load()
	if p.accepting.Load() || !s.ready() || s.Successor && p.creds.status().Serial == "" {
		return nil
	}
	for role, fd := range p.listeners {
		// The descriptor itself is kept untouched, to be handed back.
		fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("listener %s: %w", role, err)
		}
		switch role {
		case link.ListenOutbound, link.ListenInbound, link.ListenDNSTCP:
			serve, alive := p.serveOutbound, net.KeepAliveConfig{} // whose other end is in this kernel
			switch role {
			case link.ListenInbound:
				serve, alive = p.serveInbound, keepalive
			case link.ListenDNSTCP:
				serve = p.serveNames
			}
			l, err := nowait.Listen(fd, alive)
			if err != nil {
				return fmt.Errorf("listener %s: %w", role, err)
			}
			p.wg.Go(func() { <-p.draining; l.Close() })
			p.begin()
			p.wg.Go(func() { p.acceptLoop(ctx, role, l, serve) })
		case link.ListenDNSUDP:
			f := os.NewFile(uintptr(fd), role)
			c, err := net.FilePacketConn(f)
			f.Close()
			if err != nil {
				return fmt.Errorf("listener %s: %w", role, err)
			}
			udp, ok := c.(*net.UDPConn)
			if !ok {
				c.Close()
				return fmt.Errorf("listener %s: is for %s", role, c.LocalAddr().Network())
			}
			p.wg.Go(func() { <-p.draining; udp.SetReadDeadline(longAgo) })
			p.begin()
			p.wg.Go(func() {
				defer p.end()
				defer udp.Close()
				p.names.ServeUDP(ctx, udp)
			})
		default:
			unix.Close(fd)
			return fmt.Errorf("listener %s: unknown role", role)
		}
	}
	p.accepting.Store(true)
	return nil
}

func (p *Proxy) serveNames(ctx context.Context, c *nowait.TCP) { p.names.ServeTCP(ctx, c) }

// closeListeners stops accepting. The sockets stay open: they are the agent's too.
func (p *Proxy) closeListeners() { p.drain.Do(func() { close(p.draining) }) }

// begin and end count a connection that is being served, or who accepts them.
func (p *Proxy) begin() {
	p.mu.Lock()
	p.work++
	p.mu.Unlock()
}

func (p *Proxy) end() {
	p.mu.Lock()
	p.work--
	p.checkIdle()
	p.mu.Unlock()
}

// checkIdle ends the wait of a drain; p.mu is held.
func (p *Proxy) checkIdle() {
	select {
	case <-p.draining:
	default:
		return
	}
	if p.work == 0 {
		select {
		case <-p.idle:
		default:
			close(p.idle)
		}
	}
}

// addSession and removeSession keep the set of sessions that run.
func (p *Proxy) addSession(s *session) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sessions[s] = struct{}{}
	select {
	case <-p.draining:
		s.drain()
	default:
	}
}

func (p *Proxy) removeSession(s *session) {
	p.mu.Lock()
	delete(p.sessions, s)
	p.mu.Unlock()
}

func (p *Proxy) closeSessions(reason error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for s := range p.sessions {
		s.mux.Close(reason)
	}
}

// report is everything that was counted.
func (p *Proxy) report() link.Report {
	counters := p.rec.Counters()
	counters.Decisions, counters.Unfit = p.decided.Decided(), p.unfit()
	return link.Report{Started: p.started, Signals: p.rec.Signals(), Counters: counters}
}

// finding tells the agent of something that a person should look at.
func (p *Proxy) finding(kind, subject, detail, remedy string) {
	p.agent.find(assay.Finding{
		Time: time.Now(), Workload: p.snap.Load().Workload,
		Kind: kind, Subject: subject, Detail: detail, Remedy: remedy,
	})
}

// Reasons of refusals, in the metric and the log.
const (
	refusedLoop          = "own-listener"          // the original destination is the listener itself
	refusedNoPort        = "no-such-port"          // the service has no such port
	refusedNotHTTP       = "not-http"              // a port with routes, and no requests to route
	refusedNotTLS        = "not-tls"               // a port with routes by name, and no TLS
	refusedNoRule        = "no-rule"               // no rule takes the request
	refusedRule          = "invalid-rule"          // a rule or its backend cannot be used
	refusedMirror        = "mirror-dropped"        // a copy of a request, which went its way
	refusedNoEndpoint    = "no-ready-endpoint"     // nobody is ready
	refusedNotLocal      = "no-local-endpoint"     // somebody is, on other hosts than the one that must be
	refusedUnknown       = "unknown-mesh-address"  // in a mesh network, not in the table
	refusedUnreachable   = "peer-unreachable"      // no session with any endpoint
	refusedCrowded       = "crowded"               // more at once than the service's policy allows one client
	refusedHeldBack      = "overloaded"            // every endpoint has as much as it takes
	refusedCircuit       = "circuit-open"          // the service whole answers badly
	refusedPeer          = "refused-by-peer"       // the peer's proxy or application did
	refusedOutside       = "outside-unreachable"   // a plain destination did not answer
	refusedUnlisted      = "egress-unlisted"       // no Egress allows it, where egress is strict
	refusedUnproven      = "egress-unproven"       // a name that an Egress allows, and another's address
	refusedStrict        = "plaintext-in-strict"   // plaintext from outside the mesh
	refusedOlder         = "older-plaintext"       // plaintext of before the namespace was strict, when its time was over
	refusedFromMeshed    = "plaintext-from-meshed" // plaintext from a meshed address
	refusedForeign       = "not-our-address"       // an inbound connection to somebody else
	refusedSilent        = "silent"                // a mesh or strict connection that says nothing
	refusedHandshake     = "handshake"             // mutual TLS as a server
	refusedNoCertificate = "no-certificate"        // mutual TLS before there is one
	refusedHeader        = "bad-header"            // a stream whose header cannot be read
	refusedHTTP2         = "http2"                 // a message or connection that is not HTTP/2 as it must be
	refusedHTTP          = "http"                  // a message that is not HTTP/1 as it must be
	refusedApplication   = "application"           // the application did not take it
)
