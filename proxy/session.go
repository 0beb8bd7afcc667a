package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"assay.dev"
	"assay.dev/proxy/http1"
	"assay.dev/proxy/mtls"
	"assay.dev/proxy/mux"
	"assay.dev/proxy/route"
	"golang.org/x/sys/unix"
)

// session is one mux session with another proxy.
type session struct {
	p          *Proxy
	mux        *mux.Session
	peer       mtls.Peer
	security   assay.Security
	reason     string // why it is not mutual TLS
	generation uint64 // of our identity when it was made
	born       time.Time
	life       time.Duration
	idle       int // sweeps without a stream; the janitor's

	// Of the server's side: where the connection came from and to. On the way to an
	// endpoint that is not meshed, local is that one, on both sides.
	remote, local netip.AddrPort
	// What the last stream of HTTP/1 said, and how it is counted; the reader's.
	lastOpen    []byte
	lastCounted *counted
	certOfPeer  *route.HeadEdit // certEdit's
	// The port's guard, nil for one that is no service's, by the snapshot.
	lastSnap  *snapshot
	lastGuard http1.Guard
	// The same of HTTP/2.
	lastOpen2    []byte
	lastCounted2 *counted2
}

func (s *session) run() error {
	s.p.addSession(s)
	defer s.p.removeSession(s)
	return s.mux.Run()
}

// connect makes a session as a client.
func (pe *peer) connect(ctx context.Context) (*session, error) {
	switch {
	case pe.local:
		return pe.connectLocal()
	case pe.plain():
		return pe.connectPlain()
	}
	p := pe.p
	generation := p.creds.generation()
	id, err := p.creds.await(ctx)
	if err != nil {
		return nil, &refusal{refusedNoCertificate, err}
	}
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	tcp, err := pe.reach(ctx)
	if err != nil {
		return nil, &refusal{refusedUnreachable, err}
	}
	sock := mux.NewSocket(tcp)
	tc := tls.Client(sock, id.Client(pe.key.id))
	peer, err := mtls.Handshake(ctx, tc)
	if err != nil {
		abort(tcp)
		p.handshakeFailed(pe.key.addr, err)
		return nil, &refusal{refusedHandshake, err}
	}
	p.rec.Handshakes.Inc()
	return &session{
		p: p, mux: mux.New(tc, true, mux.Config{}, nil), peer: peer, security: assay.MutualTLS,
		generation: generation, born: time.Now(), life: lifetime(),
	}, nil
}

// reach connects to the peer's proxy: where one family has no way there, by the other.
// Between proxies the family does not matter; who is there is proven afterwards.
func (pe *peer) reach(ctx context.Context) (*net.TCPConn, error) {
	snap := pe.p.snap.Load()
	tcp, err := dialNetwork(ctx, pe.key.addr, snap.OwnMark)
	if !errors.Is(err, unix.ENETUNREACH) && !errors.Is(err, unix.EHOSTUNREACH) {
		return tcp, err
	}
	addr := pe.key.addr.Addr()
	other, ok := snap.table.Sibling(addr, !addr.Is4())
	if !ok {
		return nil, err
	}
	tcp, otherErr := dialNetwork(ctx, netip.AddrPortFrom(other, pe.key.addr.Port()), snap.OwnMark)
	if otherErr != nil {
		return nil, errors.Join(err, otherErr)
	}
	return tcp, nil
}

// handshakeFailed counts a handshake that failed on either side. That somebody else
// is at an address than the mesh says is worth more than a count. at is where a server
// is dialled, or the address of a client: its port means nothing.
func (p *Proxy) handshakeFailed(at fmt.Stringer, err error) {
	reason := mtls.ReasonOf(err)
	p.rec.HandshakeFailures.Inc(string(reason))
	e, ok := errors.AsType[*mtls.Error](err)
	if ok && (reason == mtls.IdentityMismatch || reason == mtls.UnknownAuthority) {
		p.finding(string(reason), at.String(), err.Error(), e.Remedy())
	}
	p.refusals.add(refused{message: "handshake", peer: at.String(), reason: string(reason)}, err)
}

// connectLocal makes a session with this very proxy: a workload may be an endpoint
// of a service that it calls. The bytes stay in the process and its own sockets.
func (pe *peer) connectLocal() (*session, error) {
	ends, err := socketPair()
	if err != nil {
		return nil, err
	}
	self := func() *session {
		return &session{
			p: pe.p, peer: mtls.Peer{Identity: pe.key.id}, security: assay.Plaintext, reason: reasonHairpin,
			generation: pe.p.creds.generation(), born: time.Now(), life: lifetime(),
		}
	}
	server := self()
	server.remote, server.local = netip.AddrPortFrom(pe.key.addr.Addr(), 0), pe.key.addr
	server.mux = mux.New(ends[0], false, mux.Config{}, server.accept)
	pe.p.wg.Go(func() { server.run() })
	client := self()
	client.mux = mux.New(ends[1], true, mux.Config{}, nil)
	return client, nil
}

// socketPair connects two ends within the process.
func socketPair() (ends [2]net.Conn, err error) {
	fd, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return ends, os.NewSyscallError("socketpair", err)
	}
	for i := range fd {
		f := os.NewFile(uintptr(fd[i]), "hairpin")
		c, e := net.FileConn(f)
		f.Close()
		if e != nil {
			err = e
		}
		ends[i] = c
	}
	if err != nil {
		for _, c := range ends {
			if c != nil {
				c.Close()
			}
		}
	}
	return ends, err
}

// Reasons why a connection is not under mutual TLS.
const (
	reasonHairpin = "hairpin" // it never leaves the workload
)

// refusal is an error with the reason that it is counted under.
type refusal struct {
	reason string
	err    error
}

func (r *refusal) Error() string {
	if r.err == nil {
		return r.reason
	}
	return r.reason + ": " + r.err.Error()
}

func (r *refusal) Unwrap() error { return r.err }
