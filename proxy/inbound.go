package proxy

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"time"

	"assay.dev"
	"assay.dev/link"
	"assay.dev/proxy/detect"
	"assay.dev/proxy/mtls"
	"assay.dev/proxy/mux"
	"assay.dev/proxy/nowait"
)

const (
	// helloTimeout bounds how long a connection that may be the mesh's can take to
	// say so.
	helloTimeout = 10 * time.Second
	// guestPatience is how long a silent client from outside is waited for before the
	// application is dialled: it may be one that waits for the server.
	guestPatience    = 10 * time.Millisecond
	appDialTimeout   = 10 * time.Second
	handshakeTimeout = 10 * time.Second
)

// inbound is a connection that somebody dialled to the workload.
type inbound struct {
	p           *Proxy
	ctx         context.Context
	conn        *nowait.TCP
	raw         syscall.RawConn
	remote, dst netip.AddrPort
	snap        *snapshot
	accepted    time.Time
	meshed      bool // the table knows the remote address
	strange     bool // it does not, and the address is a workload's
	who         link.Meshed
	protocol    assay.Protocol
	app         *net.TCPConn // dialled while the client was silent
	quiet       bool         // and has said nothing since
}

// serveInbound carries one connection from its beginning to its end.
func (p *Proxy) serveInbound(ctx context.Context, c *nowait.TCP) {
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { abort(c) })
	defer stop()
	i := p.newInbound(ctx, c)
	defer i.leave()
	if err := i.serve(); err != nil {
		i.refuse(err)
	}
}

func (p *Proxy) newInbound(ctx context.Context, c *nowait.TCP) *inbound {
	return &inbound{p: p, ctx: ctx, conn: c, snap: p.snap.Load(), accepted: time.Now(), remote: c.Remote()}
}

func (i *inbound) serve() error {
	if err := i.identify(); err != nil {
		return err
	}
	if i.mayProbe() && i.p.isProbe(i.ctx, i.remote, i.dst) {
		return i.pass(assay.ReasonProbe)
	}
	if i.readsMetrics() {
		return i.pass(assay.ReasonMetrics)
	}
	mesh, err := i.sniff()
	switch {
	case err != nil:
		return err
	case mesh:
		return i.mesh()
	}
	return i.plaintext(nil)
}

// readsMetrics reports whether somebody from outside the mesh asks the agent itself, which is in this
// pod.
func (i *inbound) readsMetrics() bool {
	return i.dst.Port() == i.snap.Metrics && !i.meshed && !i.strange
}

// identify learns who is asking for what.
func (i *inbound) identify() (err error) {
	if i.raw, err = i.conn.SyscallConn(); err != nil {
		return err
	}
	if err := i.original(); err != nil {
		return err
	}
	i.who, i.meshed = i.snap.table.Lookup(i.remote.Addr())
	i.strange = !i.meshed && i.snap.stranger(i.remote.Addr())
	return nil
}

// original learns which of the workload's ports is meant.
func (i *inbound) original() (err error) {
	local := i.conn.Local()
	if i.dst, err = originalDst(i.conn); err != nil || i.dst == local {
		return &refusal{refusedLoop, err}
	}
	if !i.snap.own(i.dst.Addr()) {
		return &refusal{refusedForeign, nil}
	}
	return nil
}

// guest reports whether plaintext would be served. A workload that the table does not
// know yet is none: its proxy may take a while to say hello, and an application that
// speaks first would not wait for it.
func (i *inbound) guest() bool {
	return i.behind() || !i.meshed && !i.strange && i.snap.mode() == assay.Observe
}

// behind reports whether the client may not have heard that the workload has joined the
// mesh, or has left it.
func (i *inbound) behind() bool { return i.snap.Transition && (i.meshed || i.strange) }

// reason is why plaintext that is served is not under mutual TLS.
func (i *inbound) reason() string {
	if i.behind() {
		return assay.ReasonTransition
	}
	return assay.ReasonOutside
}

// sniff decides by the first bytes whether this is another proxy.
func (i *inbound) sniff() (mesh bool, err error) {
	sn := newSniffer(i.conn, i.raw)
	defer sn.free()
	limit := i.accepted.Add(helloTimeout)
	for {
		switch detect.ClientHello(sn.bytes(), mtls.ALPN) {
		case detect.HelloOurs:
			i.conn.SetReadDeadline(time.Time{})
			return true, nil
		case detect.HelloForeign:
			i.protocol = assay.TLS
			i.conn.SetReadDeadline(time.Time{})
			return false, nil
		case detect.HelloNone:
			// Only for the engine and the metric, and only where it will be served.
			proto, done := detect.Client(sn.bytes())
			if done || sn.end || !i.guest() || time.Since(i.accepted) > detect.Dribble {
				i.protocol = proto
				i.conn.SetReadDeadline(time.Time{})
				return false, nil
			}
			limit = i.accepted.Add(detect.Dribble)
		}
		if sn.end {
			i.conn.SetReadDeadline(time.Time{})
			if !i.guest() && sn.n == 0 {
				return false, &refusal{} // a check: it connected and that was all
			}
			return false, nil
		}
		if sn.n == 0 && i.guest() {
			i.conn.SetReadDeadline(i.accepted.Add(guestPatience))
		} else {
			i.conn.SetReadDeadline(limit)
		}
		err := sn.more()
		switch {
		case err == nil:
		case !isTimeout(err):
			return false, &refusal{err: err}
		case sn.n == 0 && i.guest():
			return i.awaitEither(sn)
		case i.guest():
			clearWake(i.conn)
			return false, nil // half a line, or half a hello: the application's to judge
		default:
			return false, &refusal{refusedSilent, nil}
		}
	}
}

// awaitEither dials the application for a client that says nothing and waits for
// whoever speaks first. A client that speaks late is still recognised (a proxy that the
// table does not know yet, and HTTP), unless the application spoke.
func (i *inbound) awaitEither(sn *sniffer) (mesh bool, err error) {
	clearWake(i.conn)
	if err := i.dial(); err != nil {
		return false, err
	}
	i.letIn()
	raw, err := i.app.SyscallConn()
	if err != nil {
		return false, err
	}
	other := newSniffer(i.app, raw)
	watch := make(chan error, 1)
	var spoke atomic.Bool
	i.p.wg.Go(func() {
		defer other.free()
		// Bytes, the end or a reset: all are for the client.
		err := other.more()
		spoke.Store(!isTimeout(err))
		wakeReads(i.conn)
		watch <- err
	})
	mesh, err = i.awaitClient(sn, &spoke)
	wakeReads(i.app)
	broken := <-watch
	clearWake(i.app)
	clearWake(i.conn)
	i.quiet = !spoke.Load()
	if err == nil && !mesh && broken != nil && !i.quiet {
		// Whoever reads the connection now is told of an end: the kernel tells of a reset once.
		err = &refusal{err: broken}
	}
	if mesh {
		i.leave()
	}
	if mesh || err != nil {
		i.app.Close()
		i.app = nil
	}
	return mesh, err
}

// awaitClient looks at what a client says that was silent, until it is known what that
// is, or the application has spoken.
func (i *inbound) awaitClient(sn *sniffer, spoke *atomic.Bool) (mesh bool, err error) {
	for limit := time.Duration(0); ; {
		err := sn.more()
		switch {
		case isTimeout(err):
			return false, nil // the application spoke, or this is half a line: its to judge
		case err != nil:
			return false, &refusal{err: err}
		}
		switch detect.ClientHello(sn.bytes(), mtls.ALPN) {
		case detect.HelloOurs:
			return true, nil
		case detect.HelloForeign:
			i.protocol = assay.TLS
			return false, nil
		case detect.HelloMore:
			limit = helloTimeout
		case detect.HelloNone:
			proto, done := detect.Client(sn.bytes())
			if i.protocol = proto; done {
				return false, nil
			}
			limit = detect.Dribble
		}
		if sn.end {
			return false, nil
		}
		i.conn.SetReadDeadline(time.Now().Add(limit))
		if spoke.Load() { // its call may have come before that deadline
			return false, nil
		}
	}
}

// dial connects to the application as the client.
func (i *inbound) dial() (err error) {
	ctx, cancel := context.WithTimeout(i.ctx, appDialTimeout)
	defer cancel()
	if i.app, err = dialAs(ctx, i.remote, i.dst, i.snap.OwnMark); err != nil {
		return &refusal{refusedApplication, err}
	}
	if err := i.snap.announce(i.app, i.remote, i.dst, assay.Identity{}, assay.Plaintext); err != nil {
		return &refusal{refusedApplication, err}
	}
	return nil
}

// plaintext serves a client from outside the mesh, or refuses it. first are bytes that
// were read already, of HTTP/1.
func (i *inbound) plaintext(first []byte) error {
	if i.meshed && !i.behind() {
		i.p.finding(refusedFromMeshed, i.remote.Addr().String(),
			"plaintext to "+i.dst.String()+" from the address of "+i.who.Identity.String(),
			"a process of that workload escaped its capture, or its port is excluded there")
		return &refusal{refusedFromMeshed, nil}
	}
	if i.strange && !i.behind() {
		i.p.finding(refusedUnknown, i.remote.Addr().String(),
			"plaintext to "+i.dst.String()+" from an address of the mesh that no workload is known to have",
			"a process of a workload that has just started or ended escaped its capture")
		return &refusal{refusedUnknown, nil}
	}
	if i.snap.mode() != assay.Observe && !i.behind() {
		i.p.finding(refusedStrict, i.remote.Addr().String(),
			"plaintext to "+i.dst.String()+" from outside the mesh, refused: namespace "+i.snap.Identity.Namespace+" is strict",
			"have the client join the mesh, or set the namespace to observe")
		return &refusal{refusedStrict, nil}
	}
	i.letIn()
	closed := i.protocol == assay.TLS
	if sp := i.snap.target(i.dst); sp != nil && sp.declared != assay.Detect {
		i.protocol = sp.declared
	}
	quiet := i.app == nil || i.quiet
	if i.snap.certified(i.dst) && (i.protocol != assay.HTTP1 && i.protocol != assay.HTTP2 || !quiet) {
		return &refusal{refusedHTTP, nil} // only what is read as HTTP has the field stripped
	}
	if quiet && !i.snap.announced(i.dst) {
		switch i.protocol {
		case assay.HTTP1:
			return i.serveGuestHTTP(first)
		case assay.HTTP2:
			return i.serveGuestHTTP2()
		}
		if closed {
			if done, err := i.byName(); done {
				return err
			}
		}
	}
	return i.pass(i.reason())
}

// pass carries plaintext to the application as it is.
func (i *inbound) pass(reason string) error {
	if i.app == nil {
		if err := i.dial(); err != nil {
			return err
		}
	}
	app := i.app
	stop := context.AfterFunc(i.ctx, func() { abort(app) })
	defer stop()
	series := i.p.rec.Series(i.key(reason))
	series.Opened(i.accepted)
	series.Begin()
	ok := i.p.splice(app, i.conn, series)
	series.End(time.Since(i.accepted), !ok, time.Now())
	series.Closed()
	return nil
}

func (i *inbound) key(reason string) assay.SignalKey {
	key := assay.SignalKey{
		Direction: assay.Inbound, Port: i.dst.Port(), Protocol: cmp.Or(i.protocol, assay.Opaque), Security: assay.Plaintext, Reason: reason,
	}
	if sp := i.snap.target(i.dst); sp != nil {
		key.Service, key.Port = sp.service, sp.port
	}
	return key
}

// mesh completes mutual TLS and serves the session's streams until it ends.
func (i *inbound) mesh() error {
	p := i.p
	select {
	case p.sift <- struct{}{}:
	case <-i.ctx.Done():
		return &refusal{}
	}
	s, err := i.handshake()
	<-p.sift
	if err != nil {
		return err
	}
	if err := s.run(); err != nil {
		p.log.Debug("session ended", "peer", s.peer.Identity.String(), "address", i.remote.String(), "error", err)
	}
	return nil
}

func (i *inbound) handshake() (*session, error) {
	p := i.p
	id, err := p.creds.await(i.ctx)
	if err != nil {
		return nil, &refusal{refusedNoCertificate, err}
	}
	sock := mux.NewSocket(i.conn)
	ctx, cancel := context.WithTimeout(i.ctx, handshakeTimeout)
	defer cancel()
	// Of the newest table: a client that has just started may have come to be known
	// since this connection began. One that is still unknown proves itself alone.
	who, _ := p.snap.Load().table.Lookup(i.remote.Addr())
	tc := tls.Server(sock, id.Server(who.Identity))
	peer, err := mtls.Handshake(ctx, tc)
	if err != nil {
		p.handshakeFailed(i.remote.Addr(), err)
		return nil, &refusal{refusedHandshake, err}
	}
	p.rec.Handshakes.Inc()
	s := &session{p: p, peer: peer, security: assay.MutualTLS, born: time.Now(), remote: i.remote, local: i.dst}
	s.mux = mux.New(tc, false, mux.Config{}, s.accept)
	return s, nil
}

// refuse resets the client's connection and says why.
func (i *inbound) refuse(err error) {
	r, ok := errors.AsType[*refusal](err)
	if !ok {
		r = &refusal{"internal", err}
	}
	if i.app != nil {
		abort(i.app)
	}
	if r.reason == "" {
		if r.err != nil {
			abort(i.conn)
		}
		return // the client went away by itself
	}
	i.p.rec.Refusals.Inc(r.reason)
	i.p.rec.Series(i.key(r.reason)).Refused(time.Now())
	if r.reason == refusedHandshake {
		i.conn.Close() // not a reset: it would overtake the alert that says why
	} else {
		abort(i.conn)
	}
	i.p.refusals.add(refused{direction: assay.Inbound, source: i.remote.Addr(), destination: i.dst, reason: r.reason}, r.err)
}
