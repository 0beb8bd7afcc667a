package inject

import (
	"errors"
	"net"
	"net/netip"
	"sync"
)

// Bounds of what anybody can have control hold. No source has all of it, so that none keeps the
// API server out.
const (
	maxReview      = 3 << 20 // what an API server takes
	maxBodies      = 32 << 20
	maxBodiesFrom  = 8 << 20
	maxAnswers     = 4 // at once
	maxConnections = 256
	maxFrom        = 64
	// Decoded, an element of a list is hundreds of bytes, whatever it was before.
	maxElements = 8192
	maxMembers  = 65536
	maxDepth    = 128
)

// shares is something of which there is so much, and so much for each source.
type shares struct {
	most, each int64

	mu   sync.Mutex
	all  int64
	from map[netip.Addr]int64
}

func newShares(most, each int64) *shares {
	return &shares{most: most, each: each, from: map[netip.Addr]int64{}}
}

func (s *shares) take(source netip.Addr, n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all+n > s.most || s.from[source]+n > s.each {
		return false
	}
	s.all += n
	s.from[source] += n
	return true
}

func (s *shares) give(source netip.Addr, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all -= n
	if s.from[source] -= n; s.from[source] == 0 {
		delete(s.from, source)
	}
}

// sourceOf is an address, or for IPv6 the network that a machine can have all of.
func sourceOf(remote string) netip.Addr {
	to, err := netip.ParseAddrPort(remote)
	if err != nil {
		return netip.Addr{}
	}
	a := to.Addr().Unmap().WithZone("")
	if a.Is4() {
		return a
	}
	p, err := a.Prefix(64)
	if err != nil {
		return a
	}
	return p.Addr()
}

// Bounded returns a listener whose connections are so many, and so many from one source; others
// are closed. It is closed as l is.
func Bounded(l net.Listener) net.Listener {
	return &bounded{Listener: l, open: newShares(maxConnections, maxFrom)}
}

type bounded struct {
	net.Listener
	open *shares
}

func (b *bounded) Accept() (net.Conn, error) {
	for {
		conn, err := b.Listener.Accept()
		if err != nil {
			return nil, err
		}
		source := sourceOf(conn.RemoteAddr().String())
		if b.open.take(source, 1) {
			return &counted{Conn: conn, left: sync.OnceFunc(func() { b.open.give(source, 1) })}, nil
		}
		conn.Close()
	}
}

type counted struct {
	net.Conn
	left func()
}

func (c *counted) Close() error {
	defer c.left()
	return c.Conn.Close()
}

// measure refuses JSON that would be many times its size when it is decoded. What is no JSON is
// not for it to say.
func measure(body []byte) error {
	var lists [maxDepth]bool
	depth, elements, members := 0, 0, 0
	for i := 0; i < len(body); i++ {
		switch c := body[i]; c {
		case '"':
			for i++; i < len(body) && body[i] != '"'; i++ {
				if body[i] == '\\' {
					i++
				}
			}
		case '[', '{':
			if depth == maxDepth {
				return errors.New("it is nested too deeply")
			}
			lists[depth] = c == '['
			depth++
			elements++ // its first, or itself
		case ']', '}':
			depth = max(depth-1, 0)
		case ',':
			if depth > 0 && lists[depth-1] {
				elements++
			} else {
				members++
			}
		}
		if elements > maxElements || members > maxMembers {
			return errors.New("its lists have too many elements")
		}
	}
	return nil
}
