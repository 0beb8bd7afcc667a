package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"google.golang.org/grpc/credentials"
)

// Bounds of connections that have shown no certificate, or not yet. Each costs a
// descriptor and a goroutine, so there are only so many, and from one address (one
// network, with IPv6) far fewer: nobody keeps all others out.
const (
	maxStrangers     = 4096
	maxStrangersFrom = 64
	strangerLife     = time.Minute // a join takes a second
)

// strangers bounds the connections to a TLS listener until they show a certificate.
// Hosts and operators who do are not counted.
type strangers struct {
	credentials.TransportCredentials
	life time.Duration

	mu   sync.Mutex
	all  int
	from map[netip.Addr]int
}

func newStrangers(c credentials.TransportCredentials) *strangers {
	return &strangers{TransportCredentials: c, life: strangerLife, from: map[netip.Addr]int{}}
}

func (s *strangers) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	source := sourceOf(raw)
	if !s.enter(source) {
		return nil, nil, fmt.Errorf("too many connections without a certificate from %s", source)
	}
	conn, info, err := s.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		s.leave(source)
		return nil, nil, err
	}
	if t, ok := info.(credentials.TLSInfo); ok && len(t.State.PeerCertificates) > 0 {
		s.leave(source)
		return conn, info, nil
	}
	p := &passing{Conn: conn, left: sync.OnceFunc(func() { s.leave(source) })}
	p.mu.Lock()
	p.timer = time.AfterFunc(s.life, func() { p.Close() })
	p.mu.Unlock()
	return p, info, nil
}

func (s *strangers) enter(source netip.Addr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all == maxStrangers || s.from[source] == maxStrangersFrom {
		return false
	}
	s.all++
	s.from[source]++
	return true
}

func (s *strangers) leave(source netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all--
	if s.from[source]--; s.from[source] == 0 {
		delete(s.from, source)
	}
}

// sourceOf is the address, or for IPv6 the network that a machine can have all of.
func sourceOf(c net.Conn) netip.Addr {
	t, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	a := t.AddrPort().Addr().Unmap()
	if a.Is4() {
		return a
	}
	p, err := a.WithZone("").Prefix(64)
	if err != nil {
		return a
	}
	return p.Addr()
}

// passing is the connection of somebody without a certificate. It ends soon.
type passing struct {
	net.Conn
	left  func()
	mu    sync.Mutex
	timer *time.Timer
}

func (p *passing) Close() error {
	p.mu.Lock()
	p.timer.Stop()
	p.mu.Unlock()
	p.left()
	return p.Conn.Close()
}

func (s *strangers) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these credentials are a server's")
}

// Clone returns s itself: the bounds are one listener's.
func (s *strangers) Clone() credentials.TransportCredentials { return s }
