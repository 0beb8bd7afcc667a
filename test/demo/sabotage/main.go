//go:build sabotage

// Sabotage is a data plane that must not be: the demo's check has to see through it.
// It speaks the agent's protocol, so that the mesh believes in it, resolves names and
// carries connections, and reports each of them as mutual TLS with the right peer.
// But, as it was built (-ldflags -X main.mode=…):
//
//	clear      it carries everything in clear
//	identity   it encrypts, and shows a certificate with another identity
//
// No code of the real proxy knows of it; it is put in its place with `assay demo --proxy`.
package main

import (
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log"
	"log/slog"
	"maps"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"assay.dev"
	"assay.dev/link"
	"assay.dev/proxy/dns"
)

var mode = "clear"

// saboteur is one workload's false proxy.
// services are what names can mean.
type services map[string]assay.Service

func (l services) Service(key string) *assay.Service {
	if s, ok := l[key]; ok {
		return &s
	}
	return nil
}

func (l services) Owner(netip.Addr) *assay.Service { return nil } // nobody asks

type saboteur struct {
	conn  *link.Conn
	names *dns.Server
	zone  atomic.Pointer[dns.Snapshot]
	cert  tls.Certificate

	mu       sync.Mutex
	config   link.Configure
	services services
	table    *link.AddressTable
	ack      link.Ack
	signals  map[assay.SignalKey]*assay.Signals
	started  time.Time
}

func main() {
	conn, err := link.FileConn(os.NewFile(3, "link"))
	if err != nil {
		log.Fatal(err)
	}
	s := &saboteur{conn: conn, services: services{}, signals: map[assay.SignalKey]*assay.Signals{}, started: time.Now()}
	s.names = dns.NewServer(dns.Options{Snapshot: s.zone.Load, Log: slog.New(slog.DiscardHandler)})
	if err := s.run(); err != nil {
		log.Fatal(err)
	}
}

// run follows the agent until it says drain, or is gone.
func (s *saboteur) run() error {
	if err := s.conn.Send(link.KindHello, 0, link.Hello{PID: os.Getpid(), Build: "sabotage"}); err != nil {
		return err
	}
	ready := false
	for {
		m, err := s.conn.Receive()
		if err != nil {
			return err
		}
		if m.Kind == link.KindDrain {
			return nil
		}
		if err := s.handle(&m); err != nil {
			return err
		}
		s.mu.Lock()
		now := s.config.Workload != "" && s.table != nil && s.ack.Services != 0
		s.mu.Unlock()
		if now && !ready {
			ready = true
			if err := s.accept(); err != nil {
				return err
			}
		}
	}
}

var listeners = map[string]int{}

func (s *saboteur) handle(m *link.Message) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch m.Kind {
	case link.KindConfigure:
		if err := m.Decode(&s.config); err != nil {
			return err
		}
		for i, role := range s.config.Listeners {
			listeners[role] = m.Files[i]
		}
	case link.KindServices:
		var d link.Services
		if err := m.Decode(&d); err != nil {
			return err
		}
		if d.Full {
			clear(s.services)
		}
		for _, key := range d.Remove {
			delete(s.services, key)
		}
		for _, svc := range d.Upsert {
			s.services[svc.Key()] = svc
		}
		s.zone.Store(dns.NewSnapshot(s.config.Identity.Namespace, s.config.DNS.Domain, maps.Clone(s.services), nil))
		s.ack.Services = d.Version
	case link.KindTable:
		var t link.Table
		if err := m.Decode(&t); err != nil {
			return err
		}
		table, err := link.OpenTable(m.Files[0])
		if err != nil {
			return err
		}
		s.table, s.ack.Table = table, t.Version
	case link.KindBundle:
		var b link.Bundle
		if err := m.Decode(&b); err != nil {
			return err
		}
		s.ack.Bundle = b.Version
	case link.KindReportNow:
		r := link.Report{Started: s.started}
		for _, sig := range s.signals {
			r.Signals = append(r.Signals, *sig)
		}
		return s.conn.Send(link.KindReport, m.ID, r)
	case link.KindRenew:
		return s.request()
	}
	return s.conn.Send(link.KindAck, 0, s.ack)
}

// request asks for a certificate, so that the mesh counts the workload as certified.
func (s *saboteur) request() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{s.config.Identity.URL()}}, key)
	if err != nil {
		return err
	}
	return s.conn.Send(link.KindCSR, 1, link.CSR{DER: der})
}

// accept takes the workload's connections and says that it does.
func (s *saboteur) accept() error {
	if err := s.forge(); err != nil {
		return err
	}
	for role, fd := range listeners {
		f := os.NewFile(uintptr(fd), role)
		if role == link.ListenDNSUDP {
			c, err := net.FilePacketConn(f)
			if err != nil {
				return err
			}
			go s.names.ServeUDP(context.Background(), c.(*net.UDPConn))
			continue
		}
		l, err := net.FileListener(f)
		if err != nil {
			return err
		}
		serve := map[string]func(*net.TCPConn){link.ListenOutbound: s.outbound, link.ListenInbound: s.inbound,
			link.ListenDNSTCP: func(c *net.TCPConn) { s.names.ServeTCP(context.Background(), c) }}[role]
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					log.Fatal(err)
				}
				go serve(c.(*net.TCPConn))
			}
		}()
	}
	if err := s.conn.Send(link.KindReady, 0, nil); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.request()
}

// forge makes a certificate with an identity that nobody has given us.
func (s *saboteur) forge() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	other := s.config.Identity
	other.Account = "somebody-else"
	t := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{other.URL()},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, t, t, &key.PublicKey, key)
	s.cert = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	return err
}

// outbound carries a connection of the application to the service's first endpoint.
func (s *saboteur) outbound(app *net.TCPConn) {
	defer app.Close()
	dst, err := originalDst(app)
	if err != nil {
		return
	}
	key := assay.SignalKey{Direction: assay.Outbound, Port: dst.Port(), Protocol: assay.Opaque, Security: assay.MutualTLS}
	to := dst
	s.mu.Lock()
	for _, name := range slices.Sorted(maps.Keys(s.services)) {
		svc := s.services[name]
		if !slices.Contains(svc.VIPs, dst.Addr()) {
			continue
		}
		key.Service = name
		i := slices.IndexFunc(svc.Ports, func(p assay.Port) bool { return p.Port == dst.Port() })
		for _, e := range svc.Endpoints {
			for _, a := range e.Addrs {
				if i >= 0 && e.Targets[i] != 0 && a.Is4() == dst.Addr().Is4() {
					to = netip.AddrPortFrom(a, e.Targets[i])
				}
			}
		}
	}
	peer, _ := s.table.Lookup(to.Addr())
	s.mu.Unlock()
	key.Peer = peer.Identity
	raw, err := s.dial(to)
	if err != nil {
		return
	}
	defer raw.Close()
	var conn net.Conn = raw
	if mode == "identity" {
		conn = tls.Client(raw, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"assay/1"}, Certificates: []tls.Certificate{s.cert}, MinVersion: tls.VersionTLS13})
	}
	s.carry(key, app, conn)
}

// inbound carries whatever comes to the application.
func (s *saboteur) inbound(c *net.TCPConn) {
	defer c.Close()
	dst, err := originalDst(c)
	if err != nil {
		return
	}
	from := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	s.mu.Lock()
	peer, _ := s.table.Lookup(from)
	s.mu.Unlock()
	key := assay.SignalKey{Direction: assay.Inbound, Peer: peer.Identity, Port: dst.Port(), Protocol: assay.Opaque, Security: assay.MutualTLS}
	var conn net.Conn = c
	if mode == "identity" {
		t := tls.Server(c, &tls.Config{NextProtos: []string{"assay/1"}, Certificates: []tls.Certificate{s.cert}, MinVersion: tls.VersionTLS13})
		if t.Handshake() != nil {
			return
		}
		conn = t
	}
	app, err := s.dial(dst)
	if err != nil {
		return
	}
	defer app.Close()
	s.carry(key, conn, app)
}

// carry copies both ways and counts what it says it was.
func (s *saboteur) carry(key assay.SignalKey, a, b net.Conn) {
	now := time.Now()
	s.mu.Lock()
	sig := s.signals[key]
	if sig == nil {
		sig = &assay.Signals{SignalKey: key, FirstSeen: now}
		s.signals[key] = sig
	}
	sig.Requests++
	sig.Opened++
	sig.LastSeen = now
	s.mu.Unlock()
	var g sync.WaitGroup
	half := func(to, from net.Conn) {
		io.Copy(to, from)
		if c, ok := to.(interface{ CloseWrite() error }); ok {
			c.CloseWrite()
		}
	}
	g.Go(func() { half(b, a) })
	half(a, b)
	g.Wait()
}

// dial marks the socket, so that capture lets it pass.
func (s *saboteur) dial(to netip.AddrPort) (*net.TCPConn, error) {
	d := net.Dialer{Timeout: 5 * time.Second, Control: func(_, _ string, raw syscall.RawConn) error {
		var err error
		e := raw.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(s.config.OwnMark))
		})
		return cmp.Or(e, err)
	}}
	c, err := d.Dial("tcp", to.String())
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// originalDst is where the kernel redirected a connection from.
func originalDst(c *net.TCPConn) (dst netip.AddrPort, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return dst, err
	}
	v4 := c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap().Is4()
	e := raw.Control(func(fd uintptr) {
		if v4 {
			var sa *unix.IPv6Mreq // a buffer of the right size for struct sockaddr_in
			if sa, err = unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, unix.SO_ORIGINAL_DST); err == nil {
				b := sa.Multiaddr
				dst = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3]))
			}
			return
		}
		var info *unix.IPv6MTUInfo // begins with struct sockaddr_in6
		if info, err = unix.GetsockoptIPv6MTUInfo(int(fd), unix.SOL_IPV6, unix.SO_ORIGINAL_DST); err == nil {
			dst = netip.AddrPortFrom(netip.AddrFrom16(info.Addr.Addr), info.Addr.Port<<8|info.Addr.Port>>8)
		}
	})
	return dst, cmp.Or(e, err)
}
